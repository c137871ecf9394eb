"""Files that are never half written, and those that are read where they lie."""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

PARTIAL = ".partial"  # how the names of files end that are not yet whole
HEADER = 4096  # of a mapped file: one page, so that what comes after it stays aligned


def remove_partial(folder: Path, *names: str) -> None:
    """Removes what processes that were killed left half written in a folder, of files whose names
    begin with one of ``names``: another run may be writing others."""
    for path in folder.glob(f".*{PARTIAL}"):
        if path.name[1:].startswith(names):
            path.unlink(missing_ok=True)


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in place of ``path``: beside it, synced, then renamed. A crash at any moment
    leaves the old one or the new one; a failure leaves the old one and nothing else.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
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


def mapped(path: Path, key: str, write: Callable[[IO[bytes]], None]) -> np.ndarray:
    """The bytes that ``write`` writes, memory-mapped from the file ``path``.

    It is written where it is not there, damaged, or of another ``key``, which says what it was made
    from; a failure leaves no part of it.

    Returns:
        uint8, (N,); what is changed of it stays in memory.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    if not is_whole(path, key):
        is_new = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_whole(path) as file:
                file.write(bytes(HEADER))
                write(file)
                start = header(key, file)
                file.seek(0)
                file.write(start)
        except BaseException:
            if is_new:
                with suppress(OSError):  # there is more in it by now
                    path.parent.rmdir()
            raise
    return np.memmap(path, dtype=np.uint8, mode="c", offset=HEADER)


def is_whole(path: Path, key: str) -> bool:
    """Whether a mapped file is there, of this key and undamaged."""
    if not path.is_file() or path.stat().st_size <= HEADER:
        return False
    with open(path, "rb") as file:
        found = file.read(HEADER)
        of_this_key = found.startswith(json.dumps({"key": key})[:-1].encode())
        return of_this_key and found == header(key, file)


def header(key: str, file: IO[bytes]) -> bytes:
    """What a mapped file begins with: the key, and the size and checksum of the rest."""
    file.seek(HEADER)
    size = checksum = 0
    while block := file.read(2**20):
        size, checksum = size + len(block), zlib.crc32(block, checksum)
    fields = {"key": key, "bytes": size, "crc32": checksum}
    return json.dumps(fields).encode().ljust(HEADER)
