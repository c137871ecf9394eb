"""What the safety of a run costs in speed.

    python tests/benchmarks/safety.py corpus.txt --size tiny

Two loops train the same model on the same batches, some steps of each in turn: `Trainer.run`, which
checks each gradient, synchronizes with other processes, catches signals, logs and shows its
progress, and a minimal loop. Saving the state, once every ``save_every`` minutes, is added to the
difference.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from common import machine, new_model, new_parser, new_trainer
from torch import nn

from hrm_esp import Trainer
from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
from hrm_esp.data import WHOLE, Batch, Shard, load_stream
from hrm_esp.device import autocast
from hrm_esp.training import loss
from hrm_esp.training.optim import set_learning_rate
from hrm_esp.training.schedule import batch_shape, learning_rate
from hrm_esp.training.trainer import Dataset


class Finished(Exception):
    """All rounds are done."""


class InterleavedDataset:
    """A dataset for `Trainer.run` that runs steps of another loop between its batches, and times
    both.

    Args:
        data: the dataset to read from.
        other: each ``next`` is a step of the other loop.
        rounds: after the first, which is not timed.
        n_steps: of each loop per round.
    """

    def __init__(self, data: Dataset, other: Iterator[None], rounds: int, n_steps: int) -> None:
        self.data, self.other, self.rounds, self.n_steps = data, other, rounds, n_steps
        self.run_seconds: list[float] = []
        self.other_seconds: list[float] = []

    def __len__(self) -> int:
        return len(self.data)

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = WHOLE,
    ) -> Iterator[tuple[int, Batch]]:
        batches = endless_batches(self.data, size, seed)
        for i in range(self.rounds + 1):
            for is_run in (True, False) if i % 2 else (False, True):
                begin = time.perf_counter()
                for _ in range(self.n_steps):
                    if is_run:
                        yield 1, next(batches)  # the step is done when the loop asks for the next
                    else:
                        next(self.other)
                seconds = self.run_seconds if is_run else self.other_seconds
                if i:
                    seconds.append(time.perf_counter() - begin)
        raise Finished


def endless_batches(
    data: Dataset, size: Callable[[], tuple[int, int]], seed: int
) -> Iterator[Batch]:
    """Yields batches, epoch after epoch."""
    for epoch in range(10**9):
        for _, batch in data.batches(size, seed, epoch):
            yield batch


def minimal_loop(trainer: Trainer) -> Iterator[None]:
    """Trains with the shortest loop that gives the same model, a step at a time."""
    model, options = trainer.model, trainer.options

    def size() -> tuple[int, int]:
        return batch_shape(options, model.config.max_len, 0.0)

    for step, batch in enumerate(endless_batches(trainer.data, size, options.seed)):
        set_learning_rate(trainer.optimizers, learning_rate(options, step, 0.0))
        with autocast(trainer.device, trainer.dtype):
            total, terms = loss(model, batch.to(trainer.device), options.codebook_penalty)
        total.backward()
        nn.utils.clip_grad_norm_(trainer.parameters.dense, options.grad_clip)
        for optimizer in trainer.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.update_code_queue([terms.pooled])
        yield


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of each loop per round")
    args = parser.parse_args()
    stream = load_stream([args.corpus])
    config = HRMConfig(**SIZES[args.size], cross_attention=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer, other = (
            new_trainer(
                new_model(config, stream),
                stream,
                # As at the start of a long run, and without saving.
                PretrainConfig(steps=10**6, save_every=10**6, out_dir=f"{folder}/{name}"),
            )
            for name in ("run", "minimal")
        )
        data = InterleavedDataset(trainer.data, minimal_loop(other), args.rounds, args.steps)
        trainer.data = data
        with suppress(Finished):
            trainer.run()
        begin = time.perf_counter()
        trainer.save_state()
        save_seconds = time.perf_counter() - begin
    minimal = statistics.median(data.other_seconds) / args.steps
    safe = statistics.median(data.run_seconds) / args.steps
    ratios = [a / b for a, b in zip(data.run_seconds, data.other_seconds, strict=True)]
    cost = statistics.median(ratios) - 1
    save_every = PretrainConfig().save_every
    save_cost = save_seconds / (60 * save_every)
    print(f"{machine()}, {args.size}, {trainer.dtype}")
    print("| | seconds per step | cost |\n| --- | --- | --- |")
    print(f"| minimal loop | {minimal:.4f} | |")
    print(f"| `Trainer.run` | {safe:.4f} | {cost:+.2%}, median of {args.rounds} rounds |")
    print(f"| saving the state | {save_seconds:.2f} | {save_cost:+.2%}, every {save_every:g} min |")
    print(f"| total | | {cost + save_cost:+.2%} |")


if __name__ == "__main__":
    main()
