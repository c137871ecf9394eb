"""A corpus as one stream of bytes, memory-mapped from disk.

A document is one non-empty line. Byte 10 (line feed) ends each document in the stream: as an input
of the model it is BOS, as a target it is EOS. So the stream has one token per byte.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import HRMError
from ..files import PathLike, mmap_cached
from ..tokenizer import BOS, inputs_to_targets
from .text import LOADERS, TextStats, text_files, to_bytes

BREAK = 10  # the byte that ends a document
VAL_FRACTION = 0.05  # default share of the data that is held out

ByteStream = np.ndarray  # uint8, (N,)


def as_inputs(window: np.ndarray) -> np.ndarray:
    """Returns stream bytes as the model reads them: int64, the document break as BOS."""
    ids = window.astype(np.int64)
    ids[ids == BREAK] = BOS
    return ids


def as_targets(window: np.ndarray) -> np.ndarray:
    """Returns stream bytes as the model predicts them: int64, the document break as EOS."""
    targets: np.ndarray = inputs_to_targets(as_inputs(window))
    return targets


def write_stream(files: Sequence[Path], out: IO[bytes], encoding: str, sep: str = "line") -> None:
    """Writes the documents of ``files`` to ``out``, each followed by a line feed.

    Raises:
        HRMError: a file cannot be read, none holds any text, or an unknown ``sep``.
    """
    if sep not in LOADERS:
        raise HRMError(f"sep must be one of {', '.join(LOADERS)}, not {sep!r}")
    n_documents = 0
    for path in files:
        stats = TextStats()
        for document in LOADERS[sep](path, encoding, stats):
            out.write(to_bytes(document) + b"\n")
        stats.report_undecodable(path, encoding)
        n_documents += stats.documents
    if not n_documents:
        raise HRMError(f"no text in {', '.join(map(str, files[:3]))}")


def load_stream(
    paths: Sequence[PathLike],
    encoding: str = "utf-8",
    token_file: PathLike | None = None,
    sep: str = "line",
) -> ByteStream:
    """Loads text files as one byte stream, memory-mapped.

    Args:
        paths: files or folders.
        token_file: where to cache the stream; it is reused until the sources change. ``None`` keeps
            it for this process only.
        sep: what ends a document: each ``line``, or a ``blank`` line.

    Raises:
        HRMError: a file cannot be read, or none holds any text.
    """
    files = text_files(paths)
    if token_file is None:
        with tempfile.TemporaryFile() as file:
            write_stream(files, file, encoding, sep)
            file.flush()
            return np.memmap(file, dtype=np.uint8, mode="r")
    sources = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    key = hashlib.sha256(json.dumps([2, encoding, sep, sources]).encode()).hexdigest()
    return mmap_cached(Path(token_file), key, lambda file: write_stream(files, file, encoding, sep))


def split_stream(stream: ByteStream, fraction: float | None) -> tuple[ByteStream, ByteStream]:
    """Splits off the tail of a stream as held-out data.

    Args:
        fraction: of the stream, about; ``None`` is 5%. The split falls between two documents unless
            the next one is longer than half the tail.

    Returns:
        The training part and the held-out part.
    """
    fraction = VAL_FRACTION if fraction is None else fraction
    cut = len(stream) - round(len(stream) * fraction)
    middle = (cut + len(stream)) // 2
    (breaks,) = np.nonzero(stream[cut:middle] == BREAK)
    if len(breaks):
        cut += int(breaks[0]) + 1
    return stream[:cut], stream[cut:]
