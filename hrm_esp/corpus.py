"""A look at a corpus before hours are spent on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .data import BREAK, Stream

CHUNK = 2**24  # bytes looked at together: a corpus may be larger than memory
SAMPLE = 2**22  # bytes, from all of it, whose words and lines are looked at
LENGTHS = 4096  # the longest line whose length is counted by itself
SPANISH = re.compile(rb"\b(?:de|la|que|el|en|y|los|se)\b", re.IGNORECASE)
GUTENBERG = re.compile(rb"\*\*\* ?(?:START|END) OF TH", re.IGNORECASE)
FEW_WORDS = 12  # of those in 1,000 bytes: Spanish prose has about 40, English 2
LITTLE = 20  # weights for each byte: with more, the text is learned by heart


@dataclass(frozen=True)
class CorpusStats:
    """What a corpus is made of; lengths are in bytes, ``repeated`` is the share of a sample that
    stood in lines that had come before, ``spanish`` common words in 1,000 bytes, ``licence``
    whether Project Gutenberg's is there, too."""

    documents: int
    bytes: int
    median: int
    longest: int
    hard_wrapped: bool
    repeated: float
    spanish: float
    licence: bool

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.bytes:,} bytes; "
            f"the median one has {self.median:,} bytes, the longest {self.longest:,}"
        )

    def warnings(self, n_parameters: int) -> Iterator[str]:
        """What may go wrong, and which flag helps."""
        if self.hard_wrapped:
            yield "many short lines of nearly one length: are they wrapped? give --sep blank"
        if self.repeated > 0.3:
            yield f"{self.repeated:.0%} of it are lines that came before: leave the copies out"
        if self.spanish < FEW_WORDS:
            yield "it does not look like Spanish: is --encoding right?"
        if self.licence:
            yield (
                "Project Gutenberg's licence is part of it, in English: leave out what stands "
                "before *** START and after *** END"
            )
        if self.bytes * LITTLE < n_parameters:
            yield (
                f"little text for {n_parameters:,} weights, which may learn it by heart: "
                "give --size tiny, or more text"
            )


def look_at(stream: Stream) -> CorpusStats:
    """Counts the documents of a stream (N,), and looks at a sample of them."""
    counts = np.zeros(LENGTHS + 1, np.int64)
    longest = since = 0  # bytes since the last line break
    for start in range(0, len(stream), CHUNK):
        chunk = stream[start : start + CHUNK]
        (breaks,) = np.nonzero(chunk == BREAK)
        lengths = np.diff(breaks, prepend=-1 - since) - 1
        since = len(chunk) - 1 - int(breaks[-1]) if len(breaks) else since + len(chunk)
        counts += np.bincount(np.minimum(lengths, LENGTHS), minlength=LENGTHS + 1)
        longest = max(longest, int(lengths.max(initial=0)))
    documents = int(counts.sum())
    shares = counts.cumsum() / max(1, documents)
    median, wide = int(shares.searchsorted(0.5)), int(shares.searchsorted(0.95))
    near = 1 - shares[int(0.8 * wide)]  # the share of the lines that are nearly so wide
    sample = b"".join(sampled(stream))
    return CorpusStats(
        documents=documents,
        bytes=len(stream),
        median=median,
        longest=longest,
        hard_wrapped=bool(documents > 100 and 50 <= wide <= 100 and near > 0.5),
        repeated=repeated(sample),
        spanish=1000 * len(SPANISH.findall(sample)) / max(1, len(sample)),
        licence=GUTENBERG.search(sample) is not None,
    )


def sampled(stream: Stream, pieces: int = 64) -> Iterator[bytes]:
    """The stream, or pieces from all of it."""
    if len(stream) <= SAMPLE:
        yield bytes(stream)
        return
    size = SAMPLE // pieces
    for start in np.linspace(0, len(stream) - size, pieces).astype(int):
        yield bytes(stream[start : start + size])


def repeated(sample: bytes) -> float:
    """The share of a text that stands in lines that came before; short ones do not count."""
    seen: set[bytes] = set()
    again = 0
    for line in sample.split(b"\n"):
        if len(line) >= 20:
            again += len(line) * (line in seen)
            seen.add(line)
    return again / max(1, len(sample))
