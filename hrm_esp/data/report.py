"""Statistics and warnings about a corpus, before hours are spent on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .held_out import CHUNK_BYTES, MIN_LINE_BYTES, split_breaks
from .stream import DOCUMENT_END, ByteStream

SAMPLE_BYTES = 2**22  # from all parts of the corpus, for statistics of words and lines
MAX_COUNTED_LENGTH = 4096  # longer documents share one bin of the histogram
SPANISH = re.compile(rb"\b(?:de|la|que|el|en|y|los|se)\b", re.IGNORECASE)
SENTENCE_END = re.compile(rb"[.!?:)'\"\xbb]\s*$|\xe2\x80[\xa6\x99\x9d]\s*$")  # ... and quotes, too
MIN_COMMON_WORDS = 12  # in 1,000 bytes: Spanish prose has about 40, English 2
MIN_BYTES_PER_WEIGHT = 1 / 20  # with less text the model overfits
SMALLER_SIZES = {"small": 7_700_000, "tiny": 1_440_000}  # weights, see --size
# Held-out bytes from which a score means something: the standard error over parts of *Don Quijote*
# is then 0.09 bits per byte (0.14 over 500 bytes, 0.05 over 8,000).
MIN_SCORED_BYTES = 2048
MUCH_SMALLER = 2  # times: other dimensions change the weights of a --size by less


@dataclass(frozen=True)
class CorpusStats:
    """Statistics of a corpus.

    Lengths are in bytes. ``hard_wrapped``: most lines end at one width. ``like_verse``: short lines
    of several words, most of which are not the end of a sentence. ``repeated`` is the share of a
    sample in lines that occurred before, ``common_words`` the number of common Spanish words in
    1,000 bytes.
    """

    documents: int
    bytes: int
    median: int
    longest: int
    hard_wrapped: bool
    like_verse: bool
    repeated: float
    common_words: float

    def __str__(self) -> str:
        if self.documents == 1:
            return f"one document of {self.bytes:,} bytes"
        return (
            f"{self.documents:,} documents, {self.bytes:,} bytes; "
            f"median length {self.median:,} bytes, longest {self.longest:,}"
        )

    def warnings(
        self,
        n_parameters: int,
        sep: str = "line",
        is_new_model: bool = True,
        n_held_out: int = 0,
    ) -> Iterator[str]:
        """Yields what may go wrong, with the flag that helps.

        Args:
            n_parameters: of the model.
            sep: what ended a document of the corpus.
            is_new_model: it may have another --size.
            n_held_out: bytes that are held out.
        """
        if self.hard_wrapped and sep == "line":
            yield (
                "many short lines of similar length: if paragraphs are wrapped, give --sep blank; "
                "if it is verse, --sep stanza"
            )
        elif self.like_verse and sep == "line":
            yield (
                "many short lines of uneven length, each a document of its own: for verse, "
                "dialogue or code give --sep stanza, which keeps the line breaks; for paragraphs "
                "that are wrapped --sep blank"
            )
        if self.repeated > 0.3:
            yield f"{self.repeated:.0%} of the text is repeated lines: remove the copies"
        if self.common_words < MIN_COMMON_WORDS:
            yield "this does not look like Spanish: check --encoding"
        if self.bytes < n_parameters * MIN_BYTES_PER_WEIGHT:
            most = n_parameters / MUCH_SMALLER if is_new_model else 0
            smaller = {s: n for s, n in SMALLER_SIZES.items() if n <= most}
            fitting = [s for s, n in smaller.items() if self.bytes >= n * MIN_BYTES_PER_WEIGHT]
            advice = "more text"
            if fitting:
                advice = f"--size {fitting[0]}, or more text"
            elif smaller:
                advice = "--size tiny and more text"
            yield f"little text for {n_parameters:,} weights, which may memorize it: give {advice}"
        if 0 < n_held_out < MIN_SCORED_BYTES:
            yield (
                f"the score of fewer than {MIN_SCORED_BYTES:,} held-out bytes means little, it may "
                "be off by 0.2 bits per byte and more: give more text, or --val"
            )


def corpus_stats(stream: ByteStream) -> CorpusStats:
    """Computes the statistics of a stream (N,): of lengths in all of it, of words in a sample."""
    histogram = np.zeros(MAX_COUNTED_LENGTH + 1, np.int64)
    longest = since_break = 0
    for start in range(0, len(stream), CHUNK_BYTES):
        chunk = stream[start : start + CHUNK_BYTES]
        (breaks,) = np.nonzero(chunk == DOCUMENT_END)
        lengths = np.diff(breaks, prepend=-1 - since_break) - 1
        since_break = len(chunk) - 1 - int(breaks[-1]) if len(breaks) else since_break + len(chunk)
        clipped = np.minimum(lengths, MAX_COUNTED_LENGTH)
        histogram += np.bincount(clipped, minlength=MAX_COUNTED_LENGTH + 1)
        longest = max(longest, int(lengths.max(initial=0)))
    if since_break:  # the end of a document that was cut
        histogram[min(since_break, MAX_COUNTED_LENGTH)] += 1
        longest = max(longest, since_break)
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
        like_verse=looks_like_verse(sample),
        repeated=repeated_share(sample),
        common_words=1000 * len(SPANISH.findall(sample)) / max(1, len(sample)),
    )


def sample_chunks(stream: ByteStream, n_chunks: int = 64) -> Iterator[bytes]:
    """Yields the stream, or chunks from all parts of it if it is large."""
    if len(stream) <= SAMPLE_BYTES:
        yield bytes(stream)
        return
    size = SAMPLE_BYTES // n_chunks
    for start in np.linspace(0, len(stream) - size, n_chunks).astype(int):
        yield bytes(stream[start : start + size])


def looks_like_verse(sample: bytes) -> bool:
    """Whether most lines are short, of several words, and not the end of a sentence. Lists of words
    or sentences and tables are no verse."""
    lines = [line for line in sample.split(b"\n") if line and b"\t" not in line]
    if len(lines) < 20:
        return False
    lengths = sorted(map(len, lines))
    n_words = sum(line.count(b" ") + 1 for line in lines) / len(lines)
    n_ends = sum(SENTENCE_END.search(line) is not None for line in lines)
    return lengths[len(lines) * 9 // 10] <= 70 and n_words >= 3 and n_ends < 0.6 * len(lines)


def repeated_share(sample: bytes) -> float:
    """Returns the share of a text in lines of MIN_LINE_BYTES or more that occurred before."""
    seen: set[bytes] = set()
    n_repeated = 0
    for line in split_breaks(sample):
        if len(line) >= MIN_LINE_BYTES:
            n_repeated += len(line) * (line in seen)
            seen.add(line)
    return n_repeated / max(1, len(sample))
