"""Text that stands both in the held-out and in the training text: what is scored must not be
trained on.

Streams are uint8, (N,). A unit is a document, or a line of a document with several lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .text import LINE_BREAK

CHUNK_BYTES = 2**24  # read at once: a corpus may be larger than memory
MAX_COMPARED_BYTES = 2**24  # of a held-out text; at most the first million is scored
MIN_LINE_BYTES = 20  # a shorter line may stand in any text, such as «Sí.»
MIN_RUN_BYTES = 100  # of shared documents in a row, from which the short ones count, too


@dataclass
class Removed:
    """Number of documents that were left out, and of their bytes, their ends included."""

    n_documents: int = 0
    n_bytes: int = 0

    def add(self, document: bytes) -> None:
        self.n_documents += 1
        self.n_bytes += len(document) + 1

    def __str__(self) -> str:
        return f"{self.n_documents:,} documents ({self.n_bytes:,} bytes)"


class DocumentSet:
    """A set of documents and of their lines, kept as 64-bit hashes."""

    def __init__(self, units: Iterable[bytes] = ()) -> None:
        self.hashes = set(map(hash, units))

    def __contains__(self, document: bytes) -> bool:
        """Whether a document, or lines that are at least half of it, are in the set."""
        if hash(document) in self.hashes:
            return True
        lines = split_breaks(document)
        shared = (x for x in lines if len(x) >= MIN_LINE_BYTES and hash(x) in self.hashes)
        return len(lines) > 1 and 2 * sum(map(len, shared)) >= len(document)

    def remove_from(self, documents: Iterable[bytes], removed: Removed) -> Iterator[bytes]:
        """Yields the documents that are not in the set, and short ones that are in it, unless those
        that follow each other have MIN_RUN_BYTES in all.

        Args:
            removed: counts the others.
        """
        short: list[bytes] = []  # of the present run, and not decided yet
        n_run = 0
        for document in documents:
            if document not in self:
                yield from short
                yield document
                short, n_run = [], 0
                continue
            n_run += len(document)
            if len(document) < MIN_LINE_BYTES:
                short.append(document)
            else:
                removed.add(document)
            if n_run >= MIN_RUN_BYTES:
                for other in short:
                    removed.add(other)
                short = []
        yield from short


def split_breaks(text: bytes) -> list[bytes]:
    """Splits a part of a stream at the ends of documents and at line breaks inside them."""
    return text.replace(LINE_BREAK.encode(), b"\n").split(b"\n")


def stream_units(stream: np.ndarray) -> Iterator[list[bytes]]:
    """Yields the units of a stream (N,), those of a chunk at a time."""
    remainder = b""
    for start in range(0, len(stream), CHUNK_BYTES):
        text = remainder + bytes(stream[start : start + CHUNK_BYTES])
        *documents, remainder = text.split(b"\n")
        yield documents
        if LINE_BREAK.encode() in text:
            yield split_breaks(text[: len(text) - len(remainder)])
    yield [remainder, *split_breaks(remainder)]


def shared_units(stream: np.ndarray, held_out: np.ndarray) -> set[bytes]:
    """Returns the units of a held-out stream that another stream also has; all of the other one is
    read."""
    units = set(itertools.chain.from_iterable(stream_units(held_out[:MAX_COMPARED_BYTES])))
    units.discard(b"")
    missing = units.copy()
    for found in stream_units(stream) if missing else ():
        missing.difference_update(found)
    return units - missing


def remove_shared(held_out: np.ndarray, shared: set[bytes]) -> tuple[np.ndarray, Removed]:
    """Removes the documents with ``shared`` units from a held-out stream, see `DocumentSet`; of a
    large one only the beginning is left, of MAX_COMPARED_BYTES."""
    removed = Removed()
    documents = bytes(held_out[:MAX_COMPARED_BYTES]).split(b"\n")
    left = b"\n".join(DocumentSet(shared).remove_from(documents, removed))
    return np.frombuffer(left, np.uint8) if removed.n_documents else held_out, removed


def shared_fraction(held_out: np.ndarray, shared: set[bytes]) -> float:
    """Returns the fraction of a held-out stream in lines that are ``shared`` units."""
    removed, text = Removed(), bytes(held_out[:MAX_COMPARED_BYTES])
    for _ in DocumentSet(shared).remove_from(split_breaks(text), removed):
        pass
    return removed.n_bytes / max(1, len(text))
