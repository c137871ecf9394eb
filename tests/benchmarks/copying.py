"""Whether long prompts are copied without a dropped or doubled letter.

    python tests/benchmarks/copying.py train.txt held_out.txt --minutes 5 [--ckpt CKPT]

Learns to restore accents in passages of at most ``--longest`` bytes, and restores them in held-out
ones of ``--lengths`` bytes. An answer that is the prompt once its accents are taken off kept all
letters.
"""

import argparse
import os
import platform
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accents import error_rate

from hrm_esp import FinetuneConfig, HRMConfig, load_model, train_ft
from hrm_esp.config import SIZES
from hrm_esp.data import dataset_tsv, load_corpus_lines
from hrm_esp.denoising import without_marks
from hrm_esp.evaluation import answers


def passages(path: str, shortest: int, longest: int, seed: int = 0) -> Iterator[str]:
    """Whole words one after another, of as many bytes as drawn from that range."""
    draw = random.Random(seed)
    words: list[str] = []
    size = draw.randint(shortest, longest)
    for word in (w for line in load_corpus_lines(path) for w in line.split()):
        if words and len(" ".join([*words, word]).encode()) > size:
            yield " ".join(words)
            words, size = [], draw.randint(shortest, longest)
        words.append(word)


def write_pairs(path: Path, targets: list[str]) -> Path:
    path.write_text("".join(f"{without_marks(t)}\t{t}\n" for t in targets), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--ckpt", help="where to start (default: a new model of --size)")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--longest", type=int, default=100)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[50, 100, 150, 200, 300, 400, 500]
    )
    parser.add_argument("--rows", type=int, default=50, help="held-out passages of each length")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = write_pairs(folder / "train.tsv", [*passages(args.train, 10, args.longest)])
        start = args.ckpt or HRMConfig(**SIZES[args.size])
        options = FinetuneConfig(minutes=args.minutes, out_dir=str(folder / "run"))
        model = load_model(train_ft(pairs, start, options).best)
        print(f"{os.cpu_count()} CPUs, {platform.machine()}; trained on up to {args.longest} bytes")
        print("| bytes | rows | letters kept | right | word errors |\n| - | - | - | - | - |")
        for length in args.lengths:
            targets = [*passages(args.held_out, length - 10, length)][: args.rows]
            data = dataset_tsv(write_pairs(folder / f"{length}.tsv", targets), model.config.max_len)
            texts = [a.text for a in answers(model, data)]
            kept = sum(
                without_marks(text) == without_marks(t)
                for text, t in zip(texts, targets, strict=True)
            )
            right = sum(text == t for text, t in zip(texts, targets, strict=True))
            n, errors = len(targets), error_rate(texts, targets)
            print(f"| {length} | {n} | {kept / n:.0%} | {right / n:.0%} | {errors:.1%} |")


if __name__ == "__main__":
    main()
