"""Bytes a second in training, and where the time goes.

    pip install '.[bench]'
    python tests/benchmarks/throughput.py corpus.txt --size small

Full batches of full windows of text, none to be restored, optimizer included, beside a Hugging Face
Llama with as many weights in its matrices (see peers.py), step by step in turn. Utilisation is what
the matrix products of the forward and backward pass would take at the rate at which this machine
multiplies matrices of such shapes, as a share of the time taken; those of the optimizer are shown
apart.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from peers import Peer
from torch.utils.flop_counter import FlopCounterMode

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import LMDataset, load_stream
from hrm_esp.device import autocast, keep_freed_memory
from hrm_esp.model import HRMModel
from hrm_esp.trainer import Trainer


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    stream = load_stream([args.corpus])
    config = HRMConfig(**SIZES[args.size])
    peer = Peer(args.size, 1e-3, 0)
    model = HRMModel(config)
    if model.executor.counts is not None:
        model.executor.counts.count(stream)
    data = LMDataset(stream, config.max_len, recent_len=config.recent_len)
    with tempfile.TemporaryDirectory() as folder:
        options = PretrainConfig(steps=10**6, out_dir=folder)
        trainer = Trainer(
            model.to(peer.device), data, options, stage="pretrain", data_id="", score=None
        )
    model.train()
    keep_freed_memory()  # for both
    (_, batch), *_ = data.batches(lambda: (args.batch_size, 1), 0, 0)
    n, d = batch.y_in.numel(), config.d_model
    x, w = (torch.randn(*s, dtype=trainer.dtype, device=peer.device) for s in ((n, d), (8 * d, d)))

    def loss() -> torch.Tensor:
        with autocast(peer.device, trainer.dtype):
            cost = model.nats(*batch.to(peer.device))
        return (cost.mixed + cost.alone).sum() / n

    def forward_backward() -> None:
        loss().backward()

    def optimize() -> None:
        for optimizer in trainer.optimizers:
            optimizer.step()

    def whole() -> None:
        trainer.step([batch])

    def products() -> None:
        for _ in range(8):
            torch.nn.functional.linear(x, w)

    passes = flops(forward_backward)
    own = flops(optimize)
    trainer.step([batch])
    timed: dict[str, tuple[Callable[[], object], list[float]]] = {
        "HRM-ESP": (whole, []), "Llama": (lambda: peer.step(batch), []), "products": (products, []),
        "forward": (loss, []),
    }  # fmt: skip
    for turn in range(args.steps + 2):
        for call, times in timed.values():
            took = seconds(call)
            if turn > 1:  # the first two warm up
                times.append(took)
        trainer.model.zero_grad()
    median = {name: statistics.median(times) for name, (_, times) in timed.items()}
    rate = 8 * 2 * n * d * 8 * d / median["products"]
    print(f"size {args.size}, {args.batch_size} windows of {config.max_len} bytes, {trainer.dtype}")
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {torch.get_num_threads()} threads\n")
    print("| model | bytes/s | step, s |\n| - | - | - |")
    for name in ("HRM-ESP", "Llama"):
        print(f"| {name} | {n / median[name]:,.0f} | {median[name]:.3f} |")
    print(
        f"\nproducts: {rate / 1e9:,.0f} GFLOP/s on this machine; forward {median['forward']:.3f} s"
    )
    print(f"utilisation: {passes / rate / median['HRM-ESP']:.0%} in the model's products, ", end="")
    print(f"{own / rate / median['HRM-ESP']:.0%} more in the optimizer's")


if __name__ == "__main__":
    main()
