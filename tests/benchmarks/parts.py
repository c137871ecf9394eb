"""What the network and the n-gram counts are worth: bits per byte of each alone and of both.

    python tests/benchmarks/parts.py corpus.txt held_out.txt --minutes 10

Trains twice with the command, with counts and without, one run after the other. The model with
counts is scored as a whole, by its counts alone, and by its network alone, which reads what the
counts predict.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, new_parser

from hrm_esp import HRMModel, load_model
from hrm_esp.data import ByteStream, load_stream
from hrm_esp.evaluation.scoring import scoring_windows
from hrm_esp.generation.windows import window_start, window_stride

PARTS = ("mixture", "counts", "network")  # fields of LossTerms


def train(corpus: str, folder: Path, flags: list[str]) -> HRMModel:
    """Trains in a new process and returns the best model."""
    command = [sys.executable, "-m", "hrm_esp", "pretrain", corpus, "--out_dir", str(folder)]
    subprocess.run([*command, *flags], check=True)
    return load_model(folder / "pretrain_best.pt")


@torch.inference_mode()
def score(model: HRMModel, stream: ByteStream) -> dict[str, float]:
    """Returns the bits per byte of each part of a model, in the windows of `hrm-esp evaluate`."""
    model.eval()
    max_len, bits = model.config.max_len, dict.fromkeys(PARTS, 0.0)
    for start in range(0, window_start(len(stream), max_len) + 1, window_stride(max_len)):
        batch = scoring_windows(stream, max_len, [start], model.config.preceding_len)
        terms = model.nll(*batch.to(model.device))
        for part in PARTS:
            bits[part] += float(getattr(terms, part).sum()) / math.log(2) / len(stream)
    return bits


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("held_out")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--size", default="small")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    flags = ["--minutes", str(args.minutes), "--size", args.size, "--seed", str(args.seed)]
    with tempfile.TemporaryDirectory() as folder:
        with_counts = train(args.corpus, Path(folder, "with"), flags)
        without = train(args.corpus, Path(folder, "without"), [*flags, "--set", "count_max=0"])
    stream = load_stream([args.held_out], sep=with_counts.config.sep)
    whole, alone = score(with_counts, stream), score(without, stream)
    print(f"{machine()}; {args.size}, {args.minutes:g} minutes, {len(stream):,} bytes")
    print("| model | bits per byte |\n| --- | --- |")
    print(f"| network and counts | {whole['mixture']:.4f} |")
    print(f"| its counts alone | {whole['counts']:.4f} |")
    print(f"| its network alone, which reads what the counts predict | {whole['network']:.4f} |")
    print(f"| a network without counts | {alone['network']:.4f} |")


if __name__ == "__main__":
    main()
