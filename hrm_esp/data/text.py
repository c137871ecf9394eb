"""From text files to documents, one at a time and in constant memory."""

from __future__ import annotations

import gzip
import io
import itertools
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..console import print0
from ..errors import HRMError
from ..files import PathLike

UNDECODABLE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes an invalid byte
WARN_UNDECODABLE = 5e-4  # share of undecodable bytes from which a line becomes a warning
MAX_UNDECODABLE = 0.2  # share from which the file is refused
SUFFIXES = (".txt", ".txt.gz")  # files that are read from a folder


@dataclass
class TextStats:
    """What was read: documents, their UTF-8 bytes, and bytes that could not be decoded."""

    documents: int = 0
    bytes: int = 0
    undecodable: int = 0

    def add(self, document: str) -> None:
        self.documents += 1
        self.bytes += len(document) if document.isascii() else len(document.encode())

    def report_undecodable(self, name: PathLike, encoding: str) -> None:
        """Prints how many bytes could not be decoded; more than a trace is a warning.

        Raises:
            HRMError: so many that this is no text in this encoding.
        """
        share = self.undecodable / max(1, self.bytes + self.undecodable)
        if share > MAX_UNDECODABLE:
            raise HRMError(f"{name} is not text in {encoding}: give --encoding, or another file")
        if self.undecodable:
            line = f"{name}: skipped {self.undecodable:,} bytes ({share:.2%}) that are not "
            line += encoding
            print0(
                line if share <= WARN_UNDECODABLE else f"warning: {line}; try --encoding latin-1"
            )


def to_bytes(text: str) -> bytes:
    """Returns UTF-8 in NFC: an accented letter is always the same bytes. Drops lone surrogates."""
    return unicodedata.normalize("NFC", text).encode(errors="ignore")


def truncate_utf8(data: bytes, length: int) -> bytes:
    """Returns at most ``length`` bytes and never a part of a character."""
    return data if len(data) <= length else data[:length].decode(errors="ignore").encode()


def open_text(path: PathLike, encoding: str) -> IO[str]:
    """Opens a text file without its byte order mark.

    Args:
        path: the file, decompressed if its name ends in ``.gz``; ``-`` is standard input.

    Raises:
        HRMError: missing, a folder, unreadable, binary, or an unknown encoding.
    """
    name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise HRMError("there is no standard input: give a file")
            return io.TextIOWrapper(sys.stdin.buffer, encoding=name, errors="surrogateescape")
        opener = gzip.open if str(path).endswith(".gz") else open
        file: IO[str] = opener(path, "rt", encoding=name, errors="surrogateescape")
        if file.seekable():  # a pipe is not
            if "\0" in file.read(65536):
                raise HRMError(
                    f"{path} is not text in {encoding}: give --encoding, or another file"
                )
            file.seek(0)
    except LookupError as error:
        raise HRMError(f"unknown encoding {encoding!r}: try utf-8, latin-1 or cp1252") from error
    except IsADirectoryError as error:
        raise HRMError(f"{path} is a folder: give a file") from error
    except (UnicodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise HRMError(f"{path} cannot be read as {encoding} text: {error}") from error
    except OSError as error:
        raise HRMError(
            f"cannot read {path}: {error.strerror or 'it is not a regular file'}"
        ) from error
    return file


def read_lines(path: PathLike, encoding: str, stats: TextStats) -> Iterator[str]:
    """Yields all lines of a text file, blank ones too, as soon as they are read.

    Undecodable bytes are dropped and counted in ``stats``.

    Raises:
        HRMError: the file is missing, a folder, or not text.
    """
    with open_text(path, encoding) as file:
        try:
            for line in file:
                line = line.removesuffix("\n")
                if not line.isascii() and (n_bad := len(UNDECODABLE.findall(line))):
                    stats.undecodable += n_bad
                    line = UNDECODABLE.sub("", line)
                yield line
        except (UnicodeError, zlib.error, EOFError, OSError) as error:
            raise HRMError(f"{path} cannot be read as {encoding} text: {error}") from error


def load_corpus_lines(
    path: PathLike, encoding: str = "utf-8", stats: TextStats | None = None
) -> Iterator[str]:
    """Yields the non-blank lines of a text file, without their line breaks.

    Args:
        path: the file; ``.gz`` is decompressed. A byte order mark and CRLF are not part of a line.
        encoding: of the file; undecodable bytes are dropped.
        stats: counts the lines and bytes yielded, and the undecodable bytes.

    Raises:
        HRMError: the file is missing, a folder, or not text.
    """
    stats = TextStats() if stats is None else stats
    for line in read_lines(path, encoding, stats):
        if line and not line.isspace():
            stats.add(line)
            yield line


def load_paragraphs(
    path: PathLike, encoding: str = "utf-8", stats: TextStats | None = None
) -> Iterator[str]:
    """Yields the paragraphs of a text file, which blank lines separate.

    The lines of a paragraph are joined by spaces. Arguments and errors as in `load_corpus_lines`.
    """
    stats = TextStats() if stats is None else stats
    lines = read_lines(path, encoding, stats)
    for is_blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not is_blank:
            paragraph = " ".join(line.strip() for line in group)
            stats.add(paragraph)
            yield paragraph


Loader = Callable[[PathLike, str, TextStats | None], Iterator[str]]
# What ends a document (``--sep``), and the function that reads such documents.
LOADERS: dict[str, Loader] = {"line": load_corpus_lines, "blank": load_paragraphs}


def text_files(paths: Sequence[PathLike]) -> list[Path]:
    """Returns the given files, and the text files in the given folders, in order.

    Raises:
        HRMError: a path does not exist, or a folder holds no text.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not inside:
            raise HRMError(f"no {' or '.join(SUFFIXES)} file in the folder {path}")
        files += inside
    for file in files:
        if not file.exists():
            raise HRMError(f"no such file: {file}")
    return files
