"""What each part of the recipe contributes: bits per byte after the same number of training bytes.

    python tests/benchmarks/ablation.py corpus.txt held_out.txt --size tiny --steps 600

Each row of the table is a run with one change, scored on the held-out text. Runs go side by side
with one thread each, so only their scores can be compared, not their times.
"""

import argparse
import os
import tempfile
from itertools import pairwise
from multiprocessing import get_context

from common import machine, new_parser

from hrm_esp.config import SIZES, HRMConfig, PretrainConfig

# Fields of HRMConfig and PretrainConfig, and zero_init.
ROWS: dict[str, dict[str, object]] = {
    "default": {},
    "learned positions": {"positions": "learned"},
    "AdamW instead of Muon, same lr": {"optimizer": "adamw"},
    "AdamW instead of Muon, lr 2e-3": {"optimizer": "adamw", "lr": 2e-3},
    "no zero-initialized outputs": {"zero_init": False},
    "no n-gram counts": {"count_max": 0},
    "no n-gram counts of the text before the window": {"recent_len": 0},
    "no denoising": {"denoise": 0.0},
    "full windows and batches from the start": {"grow": False},
    "Planner reads the previous window": {"planner_input": "previous"},
    "continuous plan": {"gumbel": False},
    "straight-through codebook": {"gumbel_hard": True},
    "no code-balance loss": {"codebook_penalty": 0.0},
}


def disable_zero_init() -> None:
    """Makes all linear layers of this process start with random weights."""
    from hrm_esp.model import executor, layers

    linear = layers.linear
    for module in (layers, executor):
        module.linear = lambda d_in, d_out, *, zero=False: linear(d_in, d_out)


def steps_without_growth(steps: int) -> int:
    """Returns in how many steps of full batches a run sees as many bytes as in ``steps`` steps of
    growing batches."""
    from hrm_esp.training.schedule import GROWTH

    bounds = [0.0, *(until for until, _, _ in GROWTH), 1.0]
    sizes = [1 / divisor for _, divisor, _ in GROWTH] + [1.0]
    shares = [end - begin for begin, end in pairwise(bounds)]
    return round(steps * sum(share * n for share, n in zip(shares, sizes, strict=True)))


def train(job: tuple[str, argparse.Namespace, int]) -> tuple[str, float, int]:
    """Trains a row of the table with a seed. Returns its name, bits per byte and bytes seen."""
    name, args, seed = job
    import torch

    torch.set_num_threads(1)
    from hrm_esp import train_lm

    changes = dict(ROWS[name])
    if not changes.pop("zero_init", True):
        disable_zero_init()
    steps = args.steps if changes.get("grow", True) else steps_without_growth(args.steps)
    fields = HRMConfig.__dataclass_fields__
    config = {k: v for k, v in changes.items() if k in fields}
    options = {k: v for k, v in changes.items() if k not in fields}
    with tempfile.TemporaryDirectory() as folder:
        result = train_lm(
            args.corpus,
            HRMConfig(**SIZES[args.size] | config),
            PretrainConfig(steps=steps, seed=seed, out_dir=folder, **options),
            val=args.held_out,
        )
    assert result.score is not None
    return name, result.score.bits_per_byte, result.bytes_seen


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1, help="runs per row")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS, metavar="ROW")
    args = parser.parse_args()
    jobs = [(name, args, seed) for seed in range(args.seeds) for name in args.only]
    scores: dict[str, list[float]] = {name: [] for name in args.only}
    bytes_seen = {}
    n_processes = min(len(jobs), os.cpu_count() or 1)
    with get_context("spawn").Pool(n_processes, maxtasksperchild=1) as pool:
        for name, bits_per_byte, n in pool.imap(train, jobs, chunksize=1):
            scores[name].append(bits_per_byte)
            bytes_seen[name] = n
    first = sum(scores[args.only[0]]) / args.seeds
    print(f"{args.size}, {args.steps} steps, {args.seeds} seed(s), {machine()}")
    print("| recipe | bits per byte | change | training bytes |\n| --- | --- | --- | --- |")
    for name, values in scores.items():
        mean = sum(values) / len(values)
        print(f"| {name} | {mean:.3f} | {mean - first:+.3f} | {bytes_seen[name]:,} |")


if __name__ == "__main__":
    main()
