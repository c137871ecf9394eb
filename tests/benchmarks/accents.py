"""Pairs for restoring accents, made from any Spanish text, and the error rates to beat.

    python tests/benchmarks/accents.py train.txt train.tsv
    python tests/benchmarks/accents.py held_out.txt held_out.tsv --train train.txt
    hrm-esp finetune train.tsv --minutes 20
    hrm-esp evaluate held_out.tsv

A pair is a sentence without its accents and tildes, and as it was. With ``--train`` two word error
rates are printed: of leaving the held-out sentences as they are, and of writing each word as it is
most often written in the training text.
"""

import argparse
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator

from hrm_esp.data import load_corpus_lines
from hrm_esp.denoising import without_marks
from hrm_esp.evaluation import edit_distance


def sentences(path: str, longest: int) -> Iterator[str]:
    """The sentences of at most so many bytes."""
    for line in load_corpus_lines(path):
        line = unicodedata.normalize("NFC", re.sub(r"\s+", " ", line.strip()))
        for sentence in re.split(r"(?<=[.!?…]) ", line):
            if 0 < len(sentence.encode()) <= longest:
                yield sentence


def error_rate(answers: list[str], targets: list[str]) -> float:
    """Edits per word."""
    edits = sum(edit_distance(a.split(), t.split()) for a, t in zip(answers, targets, strict=True))
    return edits / sum(len(t.split()) for t in targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text")
    parser.add_argument("tsv")
    parser.add_argument("--longest", type=int, default=300, help="bytes of a sentence")
    parser.add_argument("--train", help="the training text, for the rates to beat")
    args = parser.parse_args()
    targets = list(sentences(args.text, args.longest))
    with open(args.tsv, "w", encoding="utf-8") as file:
        file.writelines(f"{without_marks(target)}\t{target}\n" for target in targets)
    print(f"{len(targets):,} pairs")
    if args.train:
        forms: dict[str, Counter[str]] = defaultdict(Counter)
        for line in load_corpus_lines(args.train):
            for word in re.findall(r"\w+", unicodedata.normalize("NFC", line)):
                forms[without_marks(word)][word] += 1
        usual = {word: seen.most_common(1)[0][0] for word, seen in forms.items()}

        def restore(text: str) -> str:
            return re.sub(r"\w+", lambda m: usual.get(m[0], m[0]), text)

        prompts = [without_marks(t) for t in targets]
        print(f"word errors as they are: {error_rate(prompts, targets):.2%}")
        print(
            f"word errors, most frequent form: {error_rate([*map(restore, prompts)], targets):.2%}"
        )


if __name__ == "__main__":
    main()
