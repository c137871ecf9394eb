"""Counts of words and of pairs of words, read from an `NgramTable`.

A word occurred as often as its context was continued by a token that is no letter.
"""

from __future__ import annotations

import numpy as np

from .entries import COUNTS, MAX_CODE, entry_key, entry_tokens, last_key
from .hashing import HASH_FACTOR, fold_case, hash_words, is_letter, signed
from .table import NgramTable


class Lexicon:
    """Counts of the words of the training text, capitals folded to small letters."""

    def __init__(self, table: NgramTable) -> None:
        self.entries = table.entries.cpu().numpy()
        self._counts: dict[int, int] = {}
        # There are about as many words as spaces, each of which is a context of its own.
        self.n_words = max(1, self._count(hash_words(hash_word(" "), 0)[0], at_end=False))

    def count(self, word: str) -> int:
        """Returns how often a word occurred."""
        return sum(self._count(hash_words(h, 0)[0]) for h in {*map(hash_word, cases(word))})

    def pair_count(self, previous: str, word: str) -> int:
        """Returns how often a word occurred after another one, in the same document."""
        hashes = {*map(hash_word, cases(word))}
        before = {*map(hash_word, cases(previous))}
        return sum(self._count(hash_words(h, p)[1]) for h in hashes for p in before)

    def _count(self, context: int, at_end: bool = True) -> int:
        if (count := self._counts.get(context)) is None:
            key = entry_key(np.array(signed(context)))
            begin = np.searchsorted(self.entries, key)
            end = np.searchsorted(self.entries, last_key(key), side="right")
            entries = self.entries[begin:end]
            if at_end:
                entries = entries[~is_letter(entry_tokens(entries))]
            count = self._counts[context] = int(COUNTS[entries & MAX_CODE].sum())
        return count


def cases(word: str) -> tuple[str, str]:
    """Returns a word as it is and in small letters: contexts only fold ASCII capitals."""
    return word, word.lower()


def hash_word(word: str) -> int:
    """Returns the hash of a word, as `RollingHash.word`."""
    value = 0
    for token in word.encode(errors="replace"):
        value = (value * HASH_FACTOR + fold_case(token) + 1) % 2**64
    return value
