"""The words of a Spanish text, and the marks that they may have: acute accents, ñ and ü.

A vowel may have an acute accent, at most one in a word; an n before a vowel may be ñ, a u between g
and e or i may be ü. What is no plain word has no other form: addresses, names of files, code, words
with digits or with letters of other languages.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from ..data import strip_accents

ACUTE = dict(zip("aeiouAEIOU", "áéíóúÁÉÍÓÚ", strict=True))
TILDE, DIAERESIS = {"n": "ñ", "N": "Ñ"}, {"u": "ü", "U": "Ü"}
MARKED = frozenset("áéíóúÁÉÍÓÚñÑüÜ")
MAX_VARIED = 2  # letters n and u of a word that may be ñ and ü: 2^2 combinations at most
MAX_LETTERS = 24  # of a word that has other forms
WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|[\u0300-\u036f])*")  # letters and combining marks
EDGES = re.compile(r"^[\W_]+|[\W_]+$")
# What addresses, file names, code and damaged text have, anywhere or only between two letters.
CODE = re.compile(r"[@\\={}<>$^|~`\ud800-\udfff]")
CODE_INSIDE = re.compile(r"[\d_/#%*+&]|\w(?:[.:]|::)\w|\w[(\[]|[a-z][A-Z]")
# Where a sentence ends, or a line that the next one does not continue.
BREAK = re.compile(r"(?<=[.!?…])\s+|\s*[\r\n]\s*(?=[^\sa-záéíóúñü])|[^\S\n]*\n[^\S\n]*\n\s*")


class Word(NamedTuple):
    """A word of a text, text[begin:end], and the forms that it may have: first itself, or without
    its marks if those are reconsidered."""

    begin: int
    end: int
    forms: list[str]


def find_words(text: str, force: bool = False) -> Iterator[Word]:
    """Yields the words of a text.

    Args:
        force: words with marks may have other forms, too.
    """
    for chunk in re.finditer(r"\S+", text):
        is_code = CODE.search(chunk[0]) or CODE_INSIDE.search(EDGES.sub("", chunk[0]))
        for match in WORD.finditer(text, chunk.start(), chunk.end()):
            word = match[0]
            is_open = word.isascii() or (force and all(c.isascii() or c in MARKED for c in word))
            is_open = is_open and not is_code and len(word) <= MAX_LETTERS
            forms = word_forms(strip_accents(word)) if is_open else [word]
            yield Word(match.start(), match.end(), forms)


def word_forms(word: str) -> list[str]:
    """Returns the forms of a word without marks, itself first."""
    vowels: list[tuple[int, str]] = []
    others: list[tuple[int, str]] = []
    for i, letter in enumerate(word):
        before, after = word[max(0, i - 1) : i].lower(), word[i + 1 : i + 2].lower()
        if letter in TILDE and after and after in "aeiou":
            others.append((i, TILDE[letter]))
        elif letter in DIAERESIS and before == "g" and after and after in "ei":
            others.append((i, DIAERESIS[letter]))
        elif letter in ACUTE and not (letter in DIAERESIS and before == "q"):
            vowels.append((i, ACUTE[letter]))
    forms = []
    for chosen in itertools.product((False, True), repeat=len(others[:MAX_VARIED])):
        marks = list(itertools.compress(others, chosen))
        for acute in ([], *([vowel] for vowel in vowels)):
            letters = list(word)
            for i, letter in (*marks, *acute):
                letters[i] = letter
            forms.append("".join(letters))
    return forms


def sentence_ends(text: str) -> list[int]:
    """Returns where the sentences of a text end, the last at its end."""
    return [*(match.end() for match in BREAK.finditer(text)), len(text)]
