"""What each part of the recipe is worth: bits per byte at equal training bytes.

    python tests/benchmarks/ablation.py corpus.txt held_out.txt --size tiny --steps 600

Every row trains with one thing changed and is scored honestly on the held-out text. Runs go side by
side, one thread each: only bits per byte are compared, never time.
"""

import argparse
import os
import platform
import tempfile
from multiprocessing import get_context

ROWS: dict[str, dict[str, object]] = {
    "default": {},
    "learned positions": {"positions": "learned"},
    "AdamW instead of Muon, same lr": {"optimizer": "adamw"},
    "AdamW instead of Muon, lr 2e-3": {"optimizer": "adamw", "lr": 2e-3},
    "no zero-initialised outputs": {"zero_init": False},
    "no n-gram counts": {"count_max": 0},
    "no counts of what came before the window": {"recent_len": 0},
    "no damaged text to restore": {"denoise": 0.0},
    "no n-gram embeddings": {"ngram_max": 1},
    "full windows and batches from the start": {"grow": False},
    "Planner view: previous": {"planner_view": "previous"},
    "continuous plan": {"gumbel": False},
    "straight-through codebook": {"gumbel_hard": True},
    "no codebook penalty": {"codebook_penalty": 0.0},
}  # fmt: skip


def train(job: tuple[str, argparse.Namespace, int]) -> tuple[str, int, float, int]:
    name, args, seed = job
    import torch

    torch.set_num_threads(1)
    from hrm_esp import layers, model, optim
    from hrm_esp.config import SIZES, HRMConfig, PretrainConfig
    from hrm_esp.training import train_lm

    changes = dict(ROWS[name])
    if not changes.pop("zero_init", True):
        linear = layers.linear
        for module in (layers, model):
            module.linear = lambda d_in, d_out, zero=False: linear(d_in, d_out)
    steps = args.steps
    if not changes.get("grow", True):  # as many bytes in fewer, larger batches
        parts = [0.0, *(until for until, _, _ in optim.GROWTH), 1.0]
        sizes = [1 / fewer for _, fewer, _ in optim.GROWTH] + [1.0]
        steps = round(
            steps * sum((b - a) * n for a, b, n in zip(parts, parts[1:], sizes, strict=False))
        )
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
    return name, seed, result.score.bits_per_byte, result.bytes_seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    jobs = [(name, args, seed) for seed in range(args.seeds) for name in args.only]
    scores: dict[str, list[float]] = {name: [] for name in args.only}
    seen = {}
    with get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for name, _, bits, n in pool.imap(train, jobs, chunksize=1):
            scores[name].append(bits)
            seen[name] = n
    base = sum(scores[args.only[0]]) / args.seeds
    print(f"{args.size}, {args.steps} steps, {args.seeds} seed(s), {platform.machine()}")
    print("| recipe | bits per byte | change | training bytes |\n| --- | --- | --- | --- |")
    for name, values in scores.items():
        mean = sum(values) / len(values)
        print(f"| {name} | {mean:.3f} | {mean - base:+.3f} | {seen[name]:,} |")


if __name__ == "__main__":
    main()
