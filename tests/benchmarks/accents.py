"""Restoring accents without a model: the word error rates to beat.

    hrm-esp pairs train.txt -o train.tsv
    hrm-esp pairs held_out.txt -o held_out.tsv
    python tests/benchmarks/accents.py train.txt held_out.txt
    hrm-esp finetune train.tsv --minutes 20
    hrm-esp evaluate held_out.tsv

Prints two rates for the sentences of the held-out text: of leaving their prompts unchanged, and of
writing each word as it is most often written in the training text.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable

from common import new_parser

from hrm_esp.data import accent_pairs, load_corpus_lines, strip_accents
from hrm_esp.evaluation import edit_distance

WORD = re.compile(r"\w+")


def word_error_rate(answers: list[str], targets: list[str]) -> float:
    """Returns the edits per word of the targets."""
    edits = sum(edit_distance(a.split(), t.split()) for a, t in zip(answers, targets, strict=True))
    return edits / sum(len(t.split()) for t in targets)


def most_frequent_forms(path: str) -> Callable[[str], str]:
    """Returns a function that replaces each word of a text without accents by its most frequent
    form in a training text."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in load_corpus_lines(path):
        for word in WORD.findall(unicodedata.normalize("NFC", line)):
            counts[strip_accents(word)][word] += 1
    forms = {word: forms.most_common(1)[0][0] for word, forms in counts.items()}
    return lambda text: WORD.sub(lambda match: forms.get(match[0], match[0]), text)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("train", help="training text")
    parser.add_argument("held_out", help="held-out text")
    parser.add_argument("--max_bytes", type=int, default=300, help="leave out longer sentences")
    args = parser.parse_args()
    restore = most_frequent_forms(args.train)
    pairs = list(accent_pairs(args.held_out, args.max_bytes))
    prompts, targets = [prompt for prompt, _ in pairs], [target for _, target in pairs]
    print(f"{len(pairs):,} held-out sentences")
    print("| method | word error rate |\n| --- | --- |")
    print(f"| prompts unchanged | {word_error_rate(prompts, targets):.2%} |")
    restored = [restore(prompt) for prompt in prompts]
    print(f"| most frequent form of each word | {word_error_rate(restored, targets):.2%} |")


if __name__ == "__main__":
    main()
