"""Entries of an n-gram table: a context, a token that continued it, and how often, in 64 bits.

From the highest bits on: the hash of the context (HASH_BITS of it), the token, and a code of the
count. Sorted entries of one context lie side by side, by rising token. Counts below EXACT_COUNTS
are exact; larger ones are rounded to one of CODES_PER_OCTAVE values between two powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOKEN_BITS, COUNT_BITS = 9, 11
HASH_BITS = 64 - TOKEN_BITS - COUNT_BITS
MAX_TOKEN, MAX_CODE = 2**TOKEN_BITS - 1, 2**COUNT_BITS - 1
EXACT_COUNTS = 2 ** (COUNT_BITS - 1)
CODES_PER_OCTAVE = 32
CHUNK_ENTRIES = 2**18  # at once: intermediate results stay in the cache; a multiple of 8
CONTEXT_MASK = -1 << (TOKEN_BITS + COUNT_BITS)
_LARGE_COUNTS = EXACT_COUNTS * 2.0 ** (np.arange(EXACT_COUNTS) / CODES_PER_OCTAVE)
COUNTS = np.concatenate((np.arange(EXACT_COUNTS), _LARGE_COUNTS.round().astype(np.int64)))

Entries = NDArray[np.int64]  # (E,)


def entry_key(hashes: Any, tokens: Any = 0) -> Any:
    """Returns the entry of a context and a token with a count of zero: int64, array or tensor."""
    return hashes << (TOKEN_BITS + COUNT_BITS) | tokens << COUNT_BITS


def last_key(key: Any) -> Any:
    """Returns the largest entry of the context that an entry is of."""
    return key | ~CONTEXT_MASK


def entry_tokens(entries: Any) -> Any:
    """Returns the tokens of entries, an array or a tensor."""
    return entries >> COUNT_BITS & MAX_TOKEN


def count_codes(
    counts: NDArray[np.int64], rng: np.random.Generator | None = None
) -> NDArray[np.int64]:
    """Returns the codes of counts; `COUNTS` has their values.

    Args:
        rng: round at random, to the nearer value more often: then many small numbers may be added
            to a large one, one after another.
    """
    codes = counts.copy()
    large = counts >= EXACT_COUNTS
    code = CODES_PER_OCTAVE * np.log2(counts[large] / EXACT_COUNTS)
    offset = 0.5 if rng is None else rng.random(len(code))
    codes[large] = EXACT_COUNTS + np.floor(code + offset).astype(np.int64)
    return codes


def group_begins(sorted_keys: NDArray[np.int64]) -> NDArray[np.intp]:
    """Returns where each group of equal keys begins."""
    begins: NDArray[np.intp] = np.flatnonzero(sorted_keys[1:] != sorted_keys[:-1]) + 1
    return np.concatenate((np.zeros(min(1, len(sorted_keys)), np.intp), begins))


def context_counts(entries: Entries) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the count of each context of sorted entries, and by how many tokens it was continued,
    (C,) each."""
    begins = group_begins(entries & CONTEXT_MASK)
    if not len(begins):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    n_continuations = np.diff(begins, append=len(entries))
    return np.add.reduceat(COUNTS[entries & MAX_CODE], begins), n_continuations


def chunks(n: int) -> Iterator[slice]:
    """Yields slices of ``CHUNK_ENTRIES`` that cover n entries."""
    for begin in range(0, n, CHUNK_ENTRIES):
        yield slice(begin, min(begin + CHUNK_ENTRIES, n))
