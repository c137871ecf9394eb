"""A corpus as one stream of bytes, memory-mapped from disk.

A document is one non-empty line, or what ``sep`` says. Byte 10 (line feed) ends each document in
the stream: as an input of the model it is BOS, as a target it is EOS. So the stream has one token
per byte. A line break inside a document is LINE_BREAK.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..console import print0
from ..errors import HRMError
from ..files import PathLike, mmap_cached
from ..tokenizer import BOS, inputs_to_targets
from .corpus_files import CopyFinder, text_files
from .held_out import DocumentSet, Removed, stream_units
from .text import (
    LINE_BREAK,
    MAX_UNDECODABLE,
    LineNumbers,
    TextStats,
    document_bytes,
    document_text,
    guess_and_read,
    load_documents,
)

STREAM_VERSION = 3  # of the bytes that a text becomes: changing it rebuilds cached streams
DOCUMENT_END = 10  # the byte after each document
VAL_FRACTION = 0.05  # default share of the data that is held out

ByteStream = np.ndarray  # uint8, (N,)


def as_inputs(window: np.ndarray) -> np.ndarray:
    """Returns stream bytes as the model reads them: int64, the end of a document as BOS."""
    ids = window.astype(np.int64)
    ids[ids == DOCUMENT_END] = BOS
    return ids


def as_targets(window: np.ndarray) -> np.ndarray:
    """Returns stream bytes as the model predicts them: int64, the end of a document as EOS."""
    targets: np.ndarray = inputs_to_targets(as_inputs(window))
    return targets


def write_stream(
    files: Sequence[Path],
    out: IO[bytes],
    encoding: str,
    sep: str = "line",
    keep_licence: bool = False,
    held_out: ByteStream | None = None,
    lines: LineNumbers | None = None,
) -> None:
    """Writes the documents of ``files`` to ``out``, each followed by a line feed, and prints what
    is odd about them.

    Args:
        held_out, lines: see `load_stream`.

    Raises:
        HRMError: a file cannot be read, none holds any text, or an unknown ``sep``.
    """
    n_documents, all_removed, copies = 0, Removed(), CopyFinder()
    held_out_units = () if held_out is None else stream_units(held_out)
    excluded = DocumentSet(itertools.chain.from_iterable(held_out_units))
    for path in files:
        read = partial(load_documents, path, sep=sep, keep_licence=keep_licence, line_numbers=lines)
        removed, stats = write_documents(read, out, encoding, excluded, copies)
        copies.end(path)
        stats.report_guess(path)
        stats.report(path, MAX_UNDECODABLE)
        n_documents += stats.documents
        all_removed.n_documents += removed.n_documents
        all_removed.n_bytes += removed.n_bytes
    copies.report()
    if not n_documents:
        raise HRMError(f"no text in {', '.join(map(str, files[:3]))}")
    if n_documents == all_removed.n_documents:
        raise HRMError("all of the text is held out: give another --val, or none")
    if all_removed.n_documents:
        print0(f"left out of the training text: {all_removed} that are also in the held-out text")


def write_documents(
    read: Callable[..., Iterator[str]],
    out: IO[bytes],
    encoding: str,
    excluded: DocumentSet,
    copies: CopyFinder,
) -> tuple[Removed, TextStats]:
    """Writes the documents of a file to ``out``, each followed by a line feed.

    Args:
        read: `load_documents` of the file.

    Returns:
        What was left out because it is ``excluded``, and statistics of all that was read.
    """
    start = out.tell()

    def write(encoding: str, stats: TextStats) -> Removed:
        out.seek(start)
        out.truncate()
        removed = Removed()
        documents = map(document_bytes, read(encoding, stats=stats))
        for document in copies.read(excluded.remove_from(documents, removed)):
            out.write(document + b"\n")
        return removed

    return guess_and_read(encoding, write)


def load_stream(
    paths: Sequence[PathLike],
    encoding: str = "utf-8",
    token_file: PathLike | None = None,
    sep: str = "line",
    keep_licence: bool = False,
    held_out: ByteStream | None = None,
    lines: LineNumbers | None = None,
) -> ByteStream:
    """Loads text files as one byte stream, memory-mapped.

    Args:
        paths: files or folders.
        token_file: where to cache the stream; it is reused until the sources change. ``None`` keeps
            it for this process only.
        sep, keep_licence: see `load_documents`.
        held_out: a stream whose documents are left out, see `DocumentSet.remove_from`.
        lines: records the lines of the stream, where no document is left out and nothing cached.

    Raises:
        HRMError: a file cannot be read, or none holds any text that is not held out.
    """
    files = text_files(paths)
    if token_file is None:
        with tempfile.TemporaryFile() as file:
            write_stream(files, file, encoding, sep, keep_licence, held_out, lines)
            file.flush()
            return np.memmap(file, dtype=np.uint8, mode="r")
    sources = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    parts: list[Any] = [STREAM_VERSION, encoding, sep, keep_licence, sources]
    if held_out is not None:
        parts.append([len(held_out), zlib.crc32(held_out.data)])
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(file: IO[bytes]) -> None:
        write_stream(files, file, encoding, sep, keep_licence, held_out)

    return mmap_cached(Path(token_file), key, write)


def stream_documents(stream: ByteStream) -> Iterator[str]:
    """Yields the documents of a stream as people read them."""
    return map(document_text, bytes(stream).split(b"\n")[:-1])


def split_stream(stream: ByteStream, fraction: float | None) -> tuple[ByteStream, ByteStream]:
    """Splits off the tail of a stream as held-out data.

    Args:
        fraction: of the stream, about; ``None`` is 5%. The split falls between two documents unless
            the next one is longer than half the tail, then between two lines where possible.

    Returns:
        The training part and the held-out part.
    """
    fraction = VAL_FRACTION if fraction is None else fraction
    cut = len(stream) - round(len(stream) * fraction)
    middle = (cut + len(stream)) // 2
    for end in (DOCUMENT_END, ord(LINE_BREAK)):
        (breaks,) = np.nonzero(stream[cut:middle] == end)
        if len(breaks):
            cut += int(breaks[0]) + 1
            break
    return stream[:cut], stream[cut:]
