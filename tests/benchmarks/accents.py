"""Restoring accents: words wrong, beside the most frequent form of each word, and speed.

    hrm-esp pretrain train.txt --val held_out.txt --out_dir run
    python tests/benchmarks/accents.py train.txt held_out.txt --ckpt run/pretrain_best.pt

Restores the held-out text without its marks, and the held-out text itself, where each change is
wrong. Words are what white space separates.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import torch
from common import machine, new_parser

from hrm_esp import load_model, restore
from hrm_esp.data import load_corpus_lines, strip_accents, to_bytes

WORD = re.compile(r"\w+")


def read(path: str) -> str:
    """Returns a text in NFC."""
    return "".join(f"{to_bytes(line).decode()}\n" for line in load_corpus_lines(path))


def share_wrong(text: str, correct: str) -> float:
    """Returns the share of wrong words."""
    words = list(zip(text.split(), correct.split(), strict=True))
    return sum(a != b for a, b in words) / len(words)


def most_frequent_forms(path: str) -> Callable[[str], str]:
    """Returns a function that replaces each word of a text without accents by its most frequent
    form in a training text."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for word in WORD.findall(read(path)):
        counts[strip_accents(word)][word] += 1
    forms = {word: forms.most_common(1)[0][0] for word, forms in counts.items()}
    return lambda text: WORD.sub(lambda match: forms.get(match[0], match[0]), text)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("train", help="training text")
    parser.add_argument("held_out", help="held-out text")
    parser.add_argument("--ckpt", help="checkpoint pretrained on the training text")
    parser.add_argument("--characters", type=int, default=200_000, help="of the held-out text")
    args = parser.parse_args()
    text = read(args.held_out)[: args.characters]
    plain = strip_accents(text)
    model = load_model(args.ckpt)
    begin = time.perf_counter()
    found = restore(model, plain)
    seconds = time.perf_counter() - begin
    assert strip_accents(found) == plain
    frequent = most_frequent_forms(args.train)(plain)
    print(f"{len(text.split()):,} words; {machine()}, {torch.get_num_threads()} threads")
    print("| method | words wrong |\n| --- | --- |")
    print(f"| unchanged | {share_wrong(plain, text):.2%} |")
    print(f"| most frequent form of each word | {share_wrong(frequent, text):.2%} |")
    print(f"| restore | {share_wrong(found, text):.2%} |")
    kept = share_wrong(restore(model, text), text)
    print(f"| restore, given the text with its marks | {kept:.2%} |")
    print(f"{len(plain.encode()) / seconds:,.0f} bytes/s")


if __name__ == "__main__":
    main()
