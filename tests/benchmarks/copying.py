"""Whether answers copy long prompts without dropping or doubling a letter.

    python tests/benchmarks/copying.py train.txt held_out.txt --minutes 5 [--ckpt CKPT]

Finetunes a model to restore accents in passages of at most ``--max_bytes`` bytes, then restores
them in held-out passages of ``--lengths`` bytes. An answer kept all letters if, without its
accents, it equals the prompt.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accents import word_error_rate
from common import machine, new_parser

from hrm_esp import (
    SIZES,
    FinetuneConfig,
    HRMConfig,
    dataset_tsv,
    load_corpus_lines,
    load_model,
    train_ft,
)
from hrm_esp.data import strip_accents
from hrm_esp.evaluation.scoring import answer_pairs


def passages(path: str, min_bytes: int, max_bytes: int, seed: int = 0) -> Iterator[str]:
    """Yields passages of whole words; the size of each is drawn from that range."""
    rng = random.Random(seed)
    words: list[str] = []
    size = rng.randint(min_bytes, max_bytes)
    for word in (w for line in load_corpus_lines(path) for w in line.split()):
        if words and len(" ".join([*words, word]).encode()) > size:
            yield " ".join(words)
            words, size = [], rng.randint(min_bytes, max_bytes)
        words.append(word)


def write_pairs(path: Path, targets: list[str]) -> Path:
    """Writes a TSV whose prompts are the targets without accents."""
    path.write_text("".join(f"{strip_accents(t)}\t{t}\n" for t in targets), encoding="utf-8")
    return path


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--ckpt", help="checkpoint to start from (default: a new model of --size)")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--max_bytes", type=int, default=100, help="of a training passage")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[50, 100, 150, 200, 300, 400, 500]
    )
    parser.add_argument("--rows", type=int, default=50, help="held-out passages of each length")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tsv = write_pairs(folder / "train.tsv", [*passages(args.train, 10, args.max_bytes)])
        start = args.ckpt or HRMConfig(**SIZES[args.size])
        options = FinetuneConfig(minutes=args.minutes, out_dir=str(folder / "run"))
        model = load_model(train_ft(tsv, start, options).best)
        print(f"{machine()}; trained on passages of up to {args.max_bytes} bytes")
        print("| bytes | rows | all letters kept | exact match | word error rate |")
        print("| --- | --- | --- | --- | --- |")
        for length in args.lengths:
            targets = [*passages(args.held_out, length - 10, length)][: args.rows]
            path = write_pairs(folder / f"{length}.tsv", targets)
            answers = [a.text for a in answer_pairs(model, dataset_tsv(path, model.config.max_len))]
            rows, n = list(zip(answers, targets, strict=True)), len(targets)
            n_kept = sum(strip_accents(answer) == strip_accents(t) for answer, t in rows)
            n_exact = sum(answer == t for answer, t in rows)
            errors = word_error_rate(answers, targets)
            print(f"| {length} | {n} | {n_kept / n:.0%} | {n_exact / n:.0%} | {errors:.1%} |")


if __name__ == "__main__":
    main()
