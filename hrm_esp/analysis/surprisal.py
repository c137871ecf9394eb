"""Words shaded by their surprisal: in a terminal, or as a page of HTML."""

from __future__ import annotations

import bisect
import html
import itertools
from collections.abc import Iterable, Iterator

from ..evaluation import Surprisal, TextScore
from .spanish import spanish_number

LIMITS = (2, 4, 6, 8, 11, 14, 18, 24)  # bits from which a word is a shade darker
# The page is in Spanish, as what it shows.
PAGE = """<!DOCTYPE html>
<html lang="es">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; background: #fff; color: #000;
  font: 1.05em/1.8 Georgia, serif; print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
h1 {{ font-size: 1.3em; }}
span {{ padding: .1em .15em; border-radius: .2em; }}
.key {{ font-size: .85em; }}
{styles}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{bits} bits por byte en {n} bytes</p>
<p class="key">bits: {key}</p>
"""


def shade(bits: float) -> int:
    """Returns the shade of a number of bits, from 0, the lightest, to the number of limits."""
    return bisect.bisect_right(LIMITS, bits)


def page(
    words: Iterable[Surprisal], title: str, score: TextScore, is_wrapped: bool = False
) -> Iterator[str]:
    """Yields the parts of a page without scripts that shows words by their surprisal.

    Args:
        score: of all words.
        is_wrapped: lines that follow each other in the file are one paragraph.
    """
    styles = "\n".join(
        f".b{i} {{ background: hsl(0 0% {100 - 5 * i}%); border-bottom: {i / 3:.1f}px solid }}"
        for i in range(len(LIMITS) + 1)
    )
    lows = (0, *LIMITS)
    key = " ".join(f'<span class="b{i}">desde {low}</span>' for i, low in enumerate(lows))
    yield PAGE.format(
        title=html.escape(title), styles=styles, key=key,
        bits=spanish_number(f"{score.bits_per_byte:.3f}"), n=spanish_number(f"{score.n:,}"),
    )  # fmt: skip
    for paragraph in paragraphs(words, 1 if is_wrapped else 0):
        spans = (
            f'<span class="b{shade(word.bits)}" title="{spanish_number(f"{word.bits:.1f}")} bits">'
            f"{html.escape(word.text)}</span>"
            for word in paragraph
        )
        yield f"<p>{' '.join(spans)}</p>\n"
    yield "</body>\n</html>\n"


def paragraphs(words: Iterable[Surprisal], step: int) -> Iterator[list[Surprisal]]:
    """Yields the words of each group of lines whose numbers differ by at most ``step``."""
    group: list[Surprisal] = []
    for word in words:
        if group and word.line > group[-1].line + step:
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def terminal_lines(words: Iterable[Surprisal]) -> Iterator[str]:
    """Yields lines of words in black on shades of gray, with the codes of a terminal."""
    for _, line in itertools.groupby(words, lambda word: word.line):
        yield " ".join(
            f"\033[30;48;5;{255 - shade(word.bits)}m{printable(word.text)}\033[0m" for word in line
        )


def printable(text: str) -> str:
    """Returns a text without control characters, which would change the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
