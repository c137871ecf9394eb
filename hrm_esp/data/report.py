"""Statistics and warnings about a corpus, before hours are spent on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .stream import BREAK, ByteStream

CHUNK_BYTES = 2**24  # read at once: a corpus may be larger than memory
SAMPLE_BYTES = 2**22  # from all parts of the corpus, for statistics of words and lines
MAX_COUNTED_LENGTH = 4096  # longer documents share one bin of the histogram
SPANISH = re.compile(rb"\b(?:de|la|que|el|en|y|los|se)\b", re.IGNORECASE)
GUTENBERG = re.compile(rb"\*\*\* ?(?:START|END) OF TH", re.IGNORECASE)
MIN_COMMON_WORDS = 12  # in 1,000 bytes: Spanish prose has about 40, English 2
MIN_BYTES_PER_WEIGHT = 1 / 20  # with less text the model overfits


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus.

    Lengths are in bytes. ``repeated`` is the share of a sample in lines that occurred before,
    ``common_words`` the number of common Spanish words in 1,000 bytes, ``has_licence`` whether
    Project Gutenberg's licence is part of the text.
    """

    documents: int
    bytes: int
    median: int
    longest: int
    hard_wrapped: bool
    repeated: float
    common_words: float
    has_licence: bool

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.bytes:,} bytes; "
            f"median length {self.median:,} bytes, longest {self.longest:,}"
        )

    def warnings(self, n_parameters: int) -> Iterator[str]:
        """Yields what may go wrong, with the flag that helps."""
        if self.hard_wrapped:
            yield "many short lines of similar length: if paragraphs are wrapped, give --sep blank"
        if self.repeated > 0.3:
            yield f"{self.repeated:.0%} of the text is repeated lines: remove the copies"
        if self.common_words < MIN_COMMON_WORDS:
            yield "this does not look like Spanish: check --encoding"
        if self.has_licence:
            yield (
                "the licence of Project Gutenberg is part of the text: remove what is before "
                "*** START and after *** END"
            )
        if self.bytes < n_parameters * MIN_BYTES_PER_WEIGHT:
            yield (
                f"little text for {n_parameters:,} weights, which may memorize it: "
                "give --size tiny, or more text"
            )


def corpus_stats(stream: ByteStream) -> CorpusStats:
    """Computes the statistics of a stream (N,): of lengths in all of it, of words in a sample."""
    histogram = np.zeros(MAX_COUNTED_LENGTH + 1, np.int64)
    longest = since_break = 0
    for start in range(0, len(stream), CHUNK_BYTES):
        chunk = stream[start : start + CHUNK_BYTES]
        (breaks,) = np.nonzero(chunk == BREAK)
        lengths = np.diff(breaks, prepend=-1 - since_break) - 1
        since_break = len(chunk) - 1 - int(breaks[-1]) if len(breaks) else since_break + len(chunk)
        clipped = np.minimum(lengths, MAX_COUNTED_LENGTH)
        histogram += np.bincount(clipped, minlength=MAX_COUNTED_LENGTH + 1)
        longest = max(longest, int(lengths.max(initial=0)))
    documents = int(histogram.sum())
    cumulative = histogram.cumsum() / max(1, documents)
    median, wide = int(cumulative.searchsorted(0.5)), int(cumulative.searchsorted(0.95))
    nearly_as_wide = 1 - cumulative[int(0.8 * wide)]
    sample = b"".join(sample_chunks(stream))
    return CorpusStats(
        documents=documents,
        bytes=len(stream),
        median=median,
        longest=longest,
        hard_wrapped=bool(documents > 100 and 50 <= wide <= 100 and nearly_as_wide > 0.5),
        repeated=repeated_share(sample),
        common_words=1000 * len(SPANISH.findall(sample)) / max(1, len(sample)),
        has_licence=GUTENBERG.search(sample) is not None,
    )


def sample_chunks(stream: ByteStream, n_chunks: int = 64) -> Iterator[bytes]:
    """Yields the stream, or chunks from all parts of it if it is large."""
    if len(stream) <= SAMPLE_BYTES:
        yield bytes(stream)
        return
    size = SAMPLE_BYTES // n_chunks
    for start in np.linspace(0, len(stream) - size, n_chunks).astype(int):
        yield bytes(stream[start : start + size])


def repeated_share(sample: bytes) -> float:
    """Returns the share of a text in lines of 20 bytes or more that occurred before."""
    seen: set[bytes] = set()
    n_repeated = 0
    for line in sample.split(b"\n"):
        if len(line) >= 20:
            n_repeated += len(line) * (line in seen)
            seen.add(line)
    return n_repeated / max(1, len(sample))
