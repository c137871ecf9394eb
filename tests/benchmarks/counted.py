"""Held-out bits per byte against how much text is counted: n-gram counts alone, beside PPMd.

    python tests/benchmarks/counted.py corpus.txt held_out.txt --megabytes 2 8 32 95

Counts evenly spaced parts of the corpus, fits the gates of the counts on windows of these parts
(leave-one-out, no network), and scores the held-out text. PPMd reads the same parts first. Draws
the curve with ``-o``.
"""

import resource
import time
from pathlib import Path

import numpy as np
import pyppmd
import torch
from common import machine, new_parser
from peers import ppmd_size

from hrm_esp import HRMConfig
from hrm_esp.config import DEFAULT_COUNT_MEMORY
from hrm_esp.data import ByteStream, LMDataset, load_stream
from hrm_esp.data.batch import Batch
from hrm_esp.ngrams import NgramMixture
from hrm_esp.tokenizer import VOCAB_SIZE

PART_BYTES = 2**16
BATCH = 16  # windows
PPMD_ORDER, PPMD_MEGABYTES = 10, 2047  # the best order, and as much memory as it takes


def evenly_spaced(stream: ByteStream, n_bytes: int) -> ByteStream:
    """Returns parts of a stream of ``n_bytes`` in all."""
    if n_bytes >= len(stream):
        return stream
    starts = np.linspace(0, len(stream) - PART_BYTES, max(1, n_bytes // PART_BYTES)).astype(int)
    return np.concatenate([stream[i : i + PART_BYTES] for i in starts])


def target_bits(mixture: NgramMixture, batch: Batch, leave_one_out: bool) -> torch.Tensor:
    """Returns the bits of each byte by the counts alone, (P,)."""
    found, counts = mixture.lookup(
        batch.y_in, batch.y_out, batch.preceding_ids, leave_one_out=leave_one_out
    )
    logits = mixture.count_gate_logits(found)
    return -mixture.target_probs(1 / VOCAB_SIZE, logits, found, counts).clamp(min=1e-9).log2()


def fit(mixture: NgramMixture, data: LMDataset, n_steps: int) -> None:
    """Fits the gates of the counts, with a learning rate that decays linearly at the end."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(mixture.count_gates.parameters(), weight_decay=0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (n_steps - step) / (0.4 * n_steps))
        starts = rng.integers(len(data.stream), size=BATCH)
        loss = target_bits(mixture, data.windows(starts), leave_one_out=True).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def score(mixture: NgramMixture, data: LMDataset) -> float:
    """Returns the bits per byte of a text, without its first window."""
    starts = np.arange(data.max_len, len(data.stream) - data.max_len, data.max_len)
    parts = [starts[i : i + BATCH] for i in range(0, len(starts), BATCH)]
    bits = [target_bits(mixture, data.windows(part), leave_one_out=False) for part in parts]
    return float(torch.cat(bits).mean())


def ppmd_bits(text: ByteStream, held_out: ByteStream) -> float:
    """Returns PPMd's bits per byte of a text after another one."""
    both, first = (
        ppmd_size(data.tobytes(), PPMD_ORDER, PPMD_MEGABYTES)
        for data in (np.concatenate((text, held_out)), text)
    )
    return 8 * (both - first) / len(held_out)


def draw(sizes: list[float], curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, bits in curves.items():
        axes.plot(sizes, bits, marker="o", label=name)
    axes.set(xscale="log", xlabel="megabytes counted", ylabel="bits per byte of held-out text")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[2, 8, 32, 95])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    config = HRMConfig()
    stream, held_out = load_stream([args.corpus]), load_stream([args.held_out])
    held_out_data = LMDataset(held_out, config.max_len, preceding_len=config.preceding_len)
    print(f"{machine()}; {len(held_out):,} bytes held out; pyppmd {pyppmd.__version__}")
    print("| MB | counts alone | PPMd | entries | smallest count | counting | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    curves: dict[str, list[float]] = {"n-gram counts alone": [], "PPMd, order 10": []}
    for size in args.megabytes:
        text = evenly_spaced(stream, round(size * 1e6))
        torch.manual_seed(0)
        mixture, begin = NgramMixture(config), time.perf_counter()
        mixture.table.build(text, max_bytes=round(DEFAULT_COUNT_MEMORY * 1e6))
        seconds = time.perf_counter() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        fit(
            mixture, LMDataset(text, config.max_len, preceding_len=config.preceding_len), args.steps
        )
        bits = score(mixture, held_out_data), ppmd_bits(text, held_out)
        for curve, value in zip(curves.values(), bits, strict=True):
            curve.append(value)
        table = mixture.table
        print(
            f"| {len(text) / 1e6:.3g} | {bits[0]:.3f} | {bits[1]:.3f} | {len(table.entries):,} | "
            f"{int(table.min_count)} | {seconds:.0f} s | {memory:.1f} GB |",
            flush=True,
        )
    if args.out:
        draw(args.megabytes, curves, args.out)


if __name__ == "__main__":
    main()
