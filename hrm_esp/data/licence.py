"""Project Gutenberg's licence, which stands before and after the text of its files."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from typing import TypeVar

Line = TypeVar("Line", bound=str)
HINTS = ("***", "*end*", "gutenberg")  # a cheap test before the regular expressions
START = re.compile(
    r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG|^\*END\* ?THE SMALL PRINT", re.IGNORECASE
)
END = re.compile(
    r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|^End of (?:the |this )?Project Gutenberg",
    re.IGNORECASE,
)
MAX_HEADER_LINES = 1000  # lines before START that are held back until it comes


def cut_licence(lines: Iterable[Line]) -> Generator[Line, None, int]:
    """Yields the lines of a text without Project Gutenberg's licence: without what stands before
    ``*** START OF ...``, and from ``*** END OF ...`` to the end or to the next ``*** START``. Old
    files have other such lines.

    Returns:
        The number of lines that were cut.
    """
    n_cut = 0
    held_back: list[Line] | None = []  # lines that are part of the licence if START comes
    is_after_end = False
    for line in lines:
        is_marked = any(hint in line.lower() for hint in HINTS)
        if is_marked and START.search(line):
            n_cut += 1 + len(held_back or ())
            held_back, is_after_end = None, False
        elif is_after_end or (is_marked and END.search(line)):
            n_cut += 1
            yield from held_back or ()
            held_back, is_after_end = None, True
        elif held_back is None:
            yield line
        else:
            held_back.append(line)
            if len(held_back) == MAX_HEADER_LINES:
                yield from held_back
                held_back = None
    yield from held_back or ()
    return n_cut
