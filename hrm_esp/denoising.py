"""Damaged text, from which a model learns to restore what was there.

Denoising (Lewis et al. 2020, BART, section 2.2), with the damage that Spanish text suffers: its
accents and tildes, its capitals or its punctuation are gone, letters are mistyped, words missing.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

MARKS = re.compile("[\u0301\u0303\u0308]")  # acute, tilde, diaeresis
PUNCTUATION = re.compile(r"[^\w\s]")
RATES = (0.05, 0.15, 0.3)  # the share of the words that are damaged, one for each text


def without_marks(text: str) -> str:
    """Without accents, tildes and diaereses: ``niño`` is ``nino``."""
    return unicodedata.normalize("NFC", MARKS.sub("", unicodedata.normalize("NFD", text)))


def damage(text: str, random: np.random.Generator) -> str:
    """One damaged version of a text; it may be as it was, or empty."""
    if random.random() < 1 / 2:
        text = without_marks(text)
    if random.random() < 1 / 8:
        text = text.lower()
    if random.random() < 1 / 8:
        text = PUNCTUATION.sub("", text)
    words = text.split(" ")
    for i in np.nonzero(random.random(len(words)) < random.choice(RATES))[0]:
        if words[i]:
            words[i] = mistype(words[i], text[random.integers(len(text))], random)
    return " ".join(words)


def mistype(word: str, letter: str, random: np.random.Generator) -> str:
    """A word that was mistyped in one way, with ``letter`` where one is put in."""
    at = int(random.integers(len(word)))
    before, here, after = word[:at], word[at], word[at + 1 :]
    ways = (
        "",
        without_marks(word),
        word.swapcase(),
        before + after,
        before + letter + here + after,
        before + letter + after,
        before + after[:1] + here + after[1:],
    )
    return ways[random.integers(len(ways))]
