"""Atomic writes, and files that are built once and memory-mapped."""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from .errors import HRMError

PathLike = str | os.PathLike[str]

PARTIAL_SUFFIX = ".partial"  # of files that are still being written
HEADER_BYTES = 4096  # of a cached file: one page, so that the data after it stays aligned


def check_output(
    flag: str, path: PathLike, source: PathLike | None, is_replaced: bool = True
) -> None:
    """Raises HRMError if a file cannot be written, or is the one that is read.

    Args:
        source: the file that is read, if any.
        is_replaced: a new file takes its place, which must not be that of a device.
    """
    out = Path(path).resolve()
    is_other = out.exists() and not out.is_file() if is_replaced else out.is_dir()
    if not out.parent.is_dir() or is_other:
        raise HRMError(f"cannot write {path}: give a file in a folder that exists")
    if source and out.exists() and Path(source).exists() and out.samefile(source):
        raise HRMError(f"{flag} would overwrite {source}: give another file")


def remove_partial_files(folder: Path, *prefixes: str) -> None:
    """Deletes what killed processes left half written in a folder.

    Args:
        prefixes: only files whose names begin with one of these: another run may be writing others.
    """
    for path in folder.glob(f".*{PARTIAL_SUFFIX}"):
        if path.name[1:].startswith(prefixes):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that replaces ``path`` when the block ends.

    The data goes to a temporary file in the same folder, which is synced and then renamed. A crash
    at any moment leaves the old file or the new one; an exception leaves the old one.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name survives a power cut
        finally:
            os.close(folder)


def mmap_cached(path: Path, key: str, write: Callable[[IO[bytes]], None]) -> np.ndarray:
    """Memory-maps the bytes that ``write`` produces, from the cache file ``path``.

    The file is written if it is missing, damaged, or has another ``key``.

    Args:
        key: identifies what the data was made from.

    Returns:
        uint8, (N,), copy-on-write: changes stay in memory.

    Raises:
        OSError: the disk is full, or the folder cannot be written. No part of the file is left.
    """
    if not is_valid(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(bytes(HEADER_BYTES))
            write(file)
            header = cache_header(key, file)
            file.seek(0)
            file.write(header)
    return np.memmap(path, dtype=np.uint8, mode="c", offset=HEADER_BYTES)


def open_cached(path: Path) -> np.ndarray:
    """Memory-maps a file that `mmap_cached` wrote, whatever its key: uint8, (N,), read-only.

    Raises:
        OSError: there is no such file.
        ValueError: it is none that `mmap_cached` wrote.
    """
    with open(path, "rb") as file:
        if not file.read(HEADER_BYTES).startswith(b'{"key"'):
            raise ValueError(f"{path} has no header")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER_BYTES)


def is_valid(path: Path, key: str) -> bool:
    """Whether a cache file exists, has this key and is undamaged."""
    if not path.is_file() or path.stat().st_size <= HEADER_BYTES:
        return False
    with open(path, "rb") as file:
        found = file.read(HEADER_BYTES)
        has_key = found.startswith(json.dumps({"key": key})[:-1].encode())
        return has_key and found == cache_header(key, file)


def cache_header(key: str, file: IO[bytes]) -> bytes:
    """Returns the header of a cache file: its key, and the size and checksum of its data."""
    file.seek(HEADER_BYTES)
    size = checksum = 0
    while block := file.read(2**20):
        size, checksum = size + len(block), zlib.crc32(block, checksum)
    fields = {"key": key, "bytes": size, "crc32": checksum}
    return json.dumps(fields).encode().ljust(HEADER_BYTES)
