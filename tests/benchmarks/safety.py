"""What it costs in speed that a run is safe.

    python tests/benchmarks/safety.py corpus.txt --size tiny

Two trainings side by side, some steps of each in turn, over the same batches: the project's loop,
which looks at each gradient, agrees with other processes, catches signals, logs and shows, and a
bare one. To the difference comes saving the state, once in ``--save_every`` minutes.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import LMDataset, load_stream
from hrm_esp.device import autocast, keep_freed_memory
from hrm_esp.model import HRMModel
from hrm_esp.optim import batch_shape, learning_rate, set_learning_rate
from hrm_esp.progress import Meter, MetricsLog
from hrm_esp.trainer import BAG_WEIGHT, Trainer, codebook_penalty, stop_signals


def safe(trainer: Trainer) -> Iterator[None]:
    """A step of the project's loop each time."""
    meter = Meter("", trainer.state, MetricsLog(trainer.folder, "pretrain", -1))
    with stop_signals() as stopped:
        for done in trainer.steps(stopped):
            meter.add(done.nats, done.shown, done.norm, done.usage)
            meter.show(trainer.state, trainer.progress(), done.lr)
            yield


def bare(trainer: Trainer) -> Iterator[None]:
    """A step of the shortest loop that trains the same model each time."""
    model, options = trainer.model, trainer.options
    max_len = model.config.max_len

    def size() -> tuple[int, int]:
        return batch_shape(options, max_len, 0.0)

    for step, (_, batch) in enumerate(trainer.data.batches(size, 0, 0)):
        set_learning_rate(trainer.optimizers, learning_rate(options, step, 0.0))
        with autocast(trainer.device, trainer.dtype):
            cost = model.nats(*batch, leave_out=True)
            last = model.planner.last_logits()
            loss = (cost.mixed + cost.alone).sum() / batch.n_tokens
            if batch.reads_memory is None:
                loss = loss + BAG_WEIGHT * cost.bag.mean()
            if last is not None:
                loss = loss + options.codebook_penalty * codebook_penalty(last)
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.parameters.dense, options.grad_clip)
        for optimizer in trainer.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.remember()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of each in a round")
    args = parser.parse_args()
    stream = load_stream([args.corpus])
    config = replace(HRMConfig(**SIZES[args.size]), memory=True)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        loops, trainers = [], []
        for name, loop in (("safe", safe), ("bare", bare)):
            torch.manual_seed(0)
            model = HRMModel(config).train()
            assert model.executor.counts is not None
            model.executor.counts.count(stream)
            options = PretrainConfig(steps=10**6, out_dir=f"{folder}/{name}")
            data = LMDataset(stream, config.max_len, recent_len=config.past_len)
            trainers.append(Trainer(model, data, options, stage="pretrain", data_id="", score=None))
            loops.append(loop(trainers[-1]))
        times: list[list[float]] = [[], []]
        for n in range(args.rounds + 1):
            for i in (0, 1) if n % 2 else (1, 0):
                begin = time.perf_counter()
                for _ in range(args.steps):
                    next(loops[i])
                times[i].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        trainers[0].save_state()
        saving = time.perf_counter() - begin
    ratio = statistics.median(a / b for a, b in zip(times[0][1:], times[1][1:], strict=True))
    share = saving / (60 * PretrainConfig().save_every)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {args.size}, {trainers[0].dtype}")
    print("| | seconds a step | cost |\n| - | - | - |")
    print(f"| bare loop | {statistics.median(times[1][1:]) / args.steps:.4f} | |")
    print(
        f"| safe loop | {statistics.median(times[0][1:]) / args.steps:.4f} | {ratio - 1:+.2%}, "
        "median of the rounds |"
    )
    print(f"| saving the state | {saving:.2f} | {share:+.2%}, once in 5 minutes |")
    print(f"| together | | {ratio - 1 + share:+.2%} |")


if __name__ == "__main__":
    main()
