"""How much of a generated text stands word for word in the training text.

A *run* is a part of the text that also stands in the corpus, as long as possible. All windows of
WINDOW bytes of the text are looked for in the corpus in one pass over it; windows that follow each
other in both are one run.

Shapes: N bytes of the text, W windows of it, M matches of a window and a place in the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data import ByteStream
from ..errors import HRMError
from ..files import open_cached

WORD_BYTES = 8  # compared at once, as an integer
WINDOW = 2 * WORD_BYTES  # bytes of the shortest run that is found
CHUNK_BYTES = 2**23  # of the corpus, at once; a multiple of WORD_BYTES
LONG_RUN = 40  # characters


class Copied(NamedTuple):
    """The ``longest`` run of a text, empty if none has WINDOW bytes, and the ``share`` of its bytes
    in runs of at least LONG_RUN characters."""

    longest: str
    share: float

    def __str__(self) -> str:
        if not self.longest:
            return f"copied: no run of {WINDOW} bytes or more"
        shown = " ".join(self.longest.split())
        return (
            f"copied: the longest run has {len(self.longest):,} characters: {shown!r}; "
            f"{self.share:.0%} of the text is in runs of {LONG_RUN} characters or more"
        )


def training_text(checkpoint: Path) -> ByteStream:
    """Opens the training text of a checkpoint: ``corpus.tokens`` in its folder.

    Raises:
        HRMError: it is not there.
    """
    path = checkpoint.parent / "corpus.tokens"
    try:
        return open_cached(path)
    except (OSError, ValueError) as error:
        raise HRMError(
            f"--copied needs {path}, the training text that hrm-esp pretrain left beside the "
            "checkpoint: train again, or leave out --copied"
        ) from error


def find_copied(texts: Sequence[str], corpus: ByteStream) -> Copied:
    """Looks for some texts in a corpus."""
    data = "\0".join(texts).encode()  # which no corpus has
    begins, lengths = find_runs(data, corpus)
    longest, in_long_run = "", np.zeros(len(data) + 1, np.int64)
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        run = data[begin : begin + length].decode(errors="ignore")
        longest = max(longest, run, key=len)
        if len(run) >= LONG_RUN:
            in_long_run[begin] += 1
            in_long_run[begin + length] -= 1
    n_bytes = len(data) - (len(texts) - 1)
    return Copied(longest, int((in_long_run.cumsum() > 0).sum()) / max(1, n_bytes))


def find_runs(data: bytes, corpus: ByteStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns where the runs of a text (N bytes) begin in it and their lengths in bytes, in any
    order; a run for each place of the corpus that has it."""
    at, place = find_windows(data, corpus)
    # Windows of one run lie on one diagonal, side by side.
    order = np.lexsort((at, place - at))
    at, diagonal = at[order], (place - at)[order]
    is_first = np.ones(len(at), bool)
    is_first[1:] = (diagonal[1:] != diagonal[:-1]) | (at[1:] != at[:-1] + 1)
    (first,) = np.nonzero(is_first)
    n_windows = np.diff(first, append=len(at))
    return at[first], n_windows + WINDOW - 1


def find_windows(data: bytes, corpus: ByteStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns all matches: the index of a window in the text, and its place in the corpus, (M,)
    each."""
    # Step 1: the first and the second half of each window of the text, sorted by the first.
    n_windows = max(0, len(data) - WINDOW + 1)
    halves = [read_words(np.frombuffer(data, np.uint8), i) for i in range(n_windows + WORD_BYTES)]
    words = np.concatenate([half[:1] for half in halves]) if halves else np.empty(0, np.uint64)
    first, second = words[:n_windows], words[WORD_BYTES : WORD_BYTES + n_windows]
    order = np.argsort(first, kind="stable")
    first, second = first[order], second[order]
    # Step 2: all words of the corpus, at each of the offsets in a word.
    found_at, found_place = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for begin in range(0, len(corpus) if n_windows else 0, CHUNK_BYTES):
        chunk = np.asarray(corpus[begin : begin + CHUNK_BYTES + WINDOW - 1])
        for offset in range(WORD_BYTES):
            heads = read_words(chunk, offset)
            low = np.searchsorted(first, heads)
            (hit,) = np.nonzero(first[np.minimum(low, n_windows - 1)] == heads)
            hit = hit[hit + 1 < len(heads)]  # the second half is the next word
            low = low[hit]
            high = np.searchsorted(first, heads[hit], side="right")
            # A window for each of the text's that have this first half.
            size = high - low
            which = np.repeat(np.arange(len(hit)), size)
            window = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size) + low[which]
            is_equal = second[window] == heads[hit[which] + 1]
            found_at.append(order[window[is_equal]])
            found_place.append(begin + offset + hit[which[is_equal]] * WORD_BYTES)
    return np.concatenate(found_at), np.concatenate(found_place)


def read_words(data: NDArray[np.uint8], offset: int) -> NDArray[np.uint64]:
    """Returns the words of WORD_BYTES bytes that begin at ``offset`` and after each other."""
    n = max(0, len(data) - offset) // WORD_BYTES
    return np.frombuffer(data[offset : offset + n * WORD_BYTES].tobytes(), np.uint64)
