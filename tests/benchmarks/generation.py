"""Speed of writing, with the key/value cache and without.

    python tests/benchmarks/generation.py [CHECKPOINT] --bytes 500

Without a checkpoint, a model of size small with random weights: time does not depend on them.
"""

import argparse
import platform
import statistics
import time

import torch

from hrm_esp import HRMConfig, HRMModel, generate, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--bytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = load_model(args.checkpoint) if args.checkpoint else HRMModel(HRMConfig()).eval()
    speed: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(args.repeats):
        for cache in speed:  # alternating, as machines are noisy
            start = time.perf_counter()
            text = generate(
                model, "En un lugar", mode="continue", seed=seed, use_cache=cache,
                min_new_tokens=args.bytes, max_new_tokens=args.bytes,
            )  # fmt: skip
            speed[cache].append(len(text.encode()) / (time.perf_counter() - start))
    cached, plain = (statistics.median(speed[c]) for c in (True, False))
    print(f"{model.n_parameters():,} parameters, {args.bytes} bytes, {platform.machine()}, "
          f"{torch.get_num_threads()} threads, median of {args.repeats}")  # fmt: skip
    print("| | bytes/s |\n| --- | --- |")
    print(f"| with cache | {cached:.0f} |\n| without | {plain:.1f} |")
    print(f"| ratio | {cached / plain:.1f} |")


if __name__ == "__main__":
    main()
