"""Corrupted text, for denoising (Lewis et al. 2020, BART, section 2.2).

The corruption is what happens to Spanish text: accents and tildes, capitals or punctuation are
missing, letters are mistyped, words are left out.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np

DIACRITICS = re.compile("[\u0301\u0303\u0308]")  # combining acute, tilde, diaeresis
PUNCTUATION = re.compile(r"[^\w\s]")
WORD_RATES = (0.05, 0.15, 0.3)  # share of the words that are mistyped; one is drawn for each text


def strip_accents(text: str) -> str:
    """Removes accents, tildes and diaereses: ``niño`` becomes ``nino``."""
    return unicodedata.normalize("NFC", DIACRITICS.sub("", unicodedata.normalize("NFD", text)))


def corrupt(text: str, rng: np.random.Generator) -> str:
    """Returns a random corruption of a text; it may be unchanged or empty."""
    if rng.random() < 1 / 2:
        text = strip_accents(text)
    if rng.random() < 1 / 8:
        text = text.lower()
    if rng.random() < 1 / 8:
        text = PUNCTUATION.sub("", text)
    words = text.split(" ")
    for i in np.nonzero(rng.random(len(words)) < rng.choice(WORD_RATES))[0]:
        if words[i]:
            words[i] = mistype(words[i], text[rng.integers(len(text))], rng)
    return " ".join(words)


def mistype(word: str, letter: str, rng: np.random.Generator) -> str:
    """Returns a word with one random typing error; ``letter`` is the one that may be inserted."""
    at = int(rng.integers(len(word)))
    before, here, after = word[:at], word[at], word[at + 1 :]
    typos = (
        "",
        strip_accents(word),
        word.swapcase(),
        before + after,
        before + letter + here + after,
        before + letter + after,
        before + after[:1] + here + after[1:],
    )
    return typos[rng.integers(len(typos))]
