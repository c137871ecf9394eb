"""From text files to documents, one at a time and in constant memory."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

from ..console import print0
from ..errors import HRMError
from ..files import PathLike
from .corpus_files import check_suffix, missing_file
from .encodings import (
    DOUBLE_ENCODED,
    guess_encoding,
    is_binary,
    is_utf8,
    marked_encoding,
    unmarked_utf16,
)
from .licence import Line, cut_licence

Result = TypeVar("Result")
UNDECODABLE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" decodes an invalid byte
WARN_UNDECODABLE = 5e-4  # share of undecodable bytes from which a line becomes a warning
MAX_UNDECODABLE = 0.2  # share from which the file is refused
N_SNIFFED_BYTES = 4096  # at the beginning of a file
N_SAMPLE_BYTES = 4096  # undecodable bytes from which the encoding is guessed
# A line break inside a document. No text has this byte: it is read with universal newlines.
LINE_BREAK = "\r"


@dataclass
class TextStats:
    """What was read: documents, their UTF-8 bytes and characters, the ``encoding`` in which Python
    read it, and whether that was ``guessed``; and what is odd about it.

    ``undecodable``: number of bytes that could not be decoded; ``undecodable_sample``: the first.
    ``double_encoded``: places that look like UTF-8 read as Latin-1. ``nuls``: NUL characters, the
    first in ``nul_line``. ``licence_lines``: lines of Project Gutenberg's licence that were cut.
    """

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    encoding: str = "utf-8"
    guessed: bool = False
    undecodable: int = 0
    undecodable_sample: bytearray = field(default_factory=bytearray)
    double_encoded: int = 0
    nuls: int = 0
    nul_line: int = 0
    licence_lines: int = 0

    def add(self, document: str) -> None:
        self.documents += 1
        self.characters += len(document)
        self.bytes += len(document) if document.isascii() else len(document.encode())

    def clean(self, line: str, number: int) -> str:
        """Returns a line without undecodable bytes and NULs, and counts what is odd about it."""
        if "\0" in line:
            self.nul_line = self.nul_line or number
            self.nuls += line.count("\0")
            line = line.replace("\0", "")
        if line.isascii():
            return line
        line = line.removeprefix("\ufeff")  # a byte order mark inside files that were joined
        if bad := UNDECODABLE.findall(line):
            self.undecodable += len(bad)
            if len(self.undecodable_sample) < N_SAMPLE_BYTES:
                self.undecodable_sample += "".join(bad).encode("latin-1", "surrogateescape")
            line = UNDECODABLE.sub("", line)
        if "Ã" in line or "Â" in line or "â" in line:
            self.double_encoded += len(DOUBLE_ENCODED.findall(line))
        return line

    def true_encoding(self) -> str | None:
        """Returns the old encoding of a text that was read as UTF-8, if it is one: its bytes that
        are not UTF-8 outnumber its letters with accents, and are Spanish in that encoding."""
        is_trace = self.undecodable <= WARN_UNDECODABLE * (self.bytes + self.undecodable)
        is_rare = self.undecodable <= self.bytes - self.characters
        has_mark = self.encoding.endswith("-sig")  # it is surely UTF-8
        if is_trace or is_rare or has_mark or not is_utf8(self.encoding):
            return None
        return guess_encoding(bytes(self.undecodable_sample))

    def report_guess(self, name: PathLike) -> None:
        """Prints a warning if the encoding was guessed."""
        if self.guessed:
            print0(
                f"warning: {display_name(name)} is not UTF-8: read as {self.encoding} (as with "
                f"--encoding {self.encoding})"
            )

    def report(self, name: PathLike, max_undecodable: float = 1.0) -> None:
        """Prints what is odd about a text that was read; more than a trace is a warning.

        Raises:
            HRMError: the share of undecodable bytes is more than ``max_undecodable``.
        """
        name, encoding = display_name(name), self.encoding.removesuffix("-sig")
        guess = guess_encoding(bytes(self.undecodable_sample))
        advice = "check --encoding" if guess is None else f"try --encoding {guess}"
        share = self.undecodable / max(1, self.bytes + self.undecodable)
        if share > max_undecodable:
            raise HRMError(f"{name} is not text in {encoding}: {advice}, or give another file")
        if self.undecodable:
            line = f"{name}: skipped {self.undecodable:,} bytes ({share:.2%}) that are not "
            line += encoding
            print0(line if share <= WARN_UNDECODABLE else f"warning: {line}; {advice}")
        if self.nuls:
            print0(f"{name}: skipped {self.nuls:,} NUL bytes, the first in line {self.nul_line:,}")
        if self.double_encoded > WARN_UNDECODABLE * self.bytes:
            if encoding.lower().startswith("utf"):
                advice = f"repair it with iconv -f utf-8 -t cp1252 {name} > repaired.txt"
            else:
                advice = f"leave out --encoding {encoding}"
            print0(f"warning: {name}: UTF-8 read as latin-1 (Ã³ for ó): {advice}")
        if self.licence_lines:
            print0(
                f"{name}: cut {self.licence_lines:,} lines of Project Gutenberg's licence "
                "(pretrain and evaluate keep them with --keep_licence)"
            )


def to_bytes(text: str) -> bytes:
    """Returns UTF-8 in NFC: an accented letter is always the same bytes. Drops lone surrogates."""
    return unicodedata.normalize("NFC", text).encode(errors="ignore")


def document_bytes(document: str) -> bytes:
    """Returns a document as the model reads it: UTF-8 in NFC, line breaks as LINE_BREAK."""
    return to_bytes(re.sub("\r\n?|\n", LINE_BREAK, document))


def document_text(data: bytes) -> str:
    """Returns a document as people read it: the inverse of `document_bytes`."""
    return data.decode().replace(LINE_BREAK, "\n")


def truncate_utf8(data: bytes, length: int) -> bytes:
    """Returns at most ``length`` bytes and never a part of a character."""
    return data if len(data) <= length else data[:length].decode(errors="ignore").encode()


def display_name(path: PathLike) -> str:
    """Returns the name of a file for messages."""
    return "standard input" if str(path) == "-" else str(path)


@contextmanager
def read_errors(path: PathLike, encoding: str) -> Iterator[None]:
    """Turns what may go wrong when a text file is opened or read into an HRMError."""
    name = display_name(path)
    try:
        yield
    except LookupError as error:
        raise HRMError(f"unknown encoding {encoding!r}: try utf-8, latin-1 or cp1252") from error
    except FileNotFoundError as error:
        raise missing_file(path) from error
    except IsADirectoryError as error:
        raise HRMError(f"{name} is a folder: give a file") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise HRMError(f"{name} is damaged, or not compressed with gzip: {error}") from error
    except UnicodeError as error:
        raise HRMError(f"{name} cannot be read as {encoding} text: {error}") from error
    except OSError as error:
        raise HRMError(
            f"cannot read {name}: {error.strerror or 'it is not a regular file'}"
        ) from error


def open_binary(path: PathLike) -> io.BufferedReader:
    """Opens a file, decompressed if its name ends in ``.gz``; ``-`` is standard input.

    Raises:
        HRMError: there is no standard input, or the name is that of a file to be converted.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise HRMError("there is no standard input: give a file")
        return cast(io.BufferedReader, sys.stdin.buffer)
    check_suffix(path)
    if str(path).lower().endswith(".gz"):
        return cast(io.BufferedReader, gzip.open(path))
    return open(path, "rb")


def buffered(data: bytes) -> io.BufferedReader:
    return cast(io.BufferedReader, io.BufferedReader(cast(io.RawIOBase, io.BytesIO(data))))


def decode(file: io.BufferedReader, path: PathLike, encoding: str) -> io.TextIOWrapper:
    """Returns the text of a binary file, without its byte order mark, which decides the encoding.

    Raises:
        HRMError: the file is binary.
    """
    name, head = display_name(path), file.peek(N_SNIFFED_BYTES)
    if marked := marked_encoding(head):
        if not codecs.lookup(encoding).name.startswith(marked.removesuffix("-sig")):
            read_as = marked.removesuffix("-sig").upper()
            print0(f"{name}: read as {read_as}, as its byte order mark says")
        encoding = marked
    text = io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape")
    if "16" not in encoding and "32" not in encoding and is_binary(head):
        guess = unmarked_utf16(head)
        advice = "give another file" if guess is None else f"try --encoding {guess}"
        raise HRMError(f"{name} is not text in {encoding.removesuffix('-sig')}: {advice}")
    return text


def read_lines(
    path: PathLike, encoding: str, stats: TextStats, data: bytes | None = None
) -> Iterator[str]:
    """Yields all lines of a text file, blank ones too, as soon as they are read.

    Undecodable bytes and NULs are dropped and counted in ``stats``.

    Args:
        path: the file, decompressed if its name ends in ``.gz``; ``-`` is standard input.
        data: the content of the file, if it has been read already.

    Raises:
        HRMError: the file is missing, a folder, unreadable or not text, or an unknown encoding.
    """
    with read_errors(path, encoding):
        codecs.lookup(encoding)
        binary = open_binary(path) if data is None else buffered(data)
        with decode(binary, path, encoding) as file:
            stats.encoding = file.encoding
            for number, line in enumerate(file, 1):
                yield stats.clean(line.removesuffix("\n"), number)


def guess_and_read(
    encoding: str, read: Callable[[str, TextStats], Result]
) -> tuple[Result, TextStats]:
    """Reads a text, and again if `TextStats.true_encoding` names another encoding.

    Args:
        read: reads the whole text in an encoding, and counts in the statistics what is read.

    Returns:
        What ``read`` returned last, and the statistics of it.
    """
    stats = TextStats()
    result = read(encoding, stats)
    if true := stats.true_encoding():
        stats = TextStats(guessed=True)
        result = read(true, stats)
    return result, stats


def read_text(path: PathLike, encoding: str) -> tuple[str, TextStats]:
    """Reads a whole file that is small enough for memory, and guesses its encoding.

    Returns:
        The text with its line breaks as LF, and its statistics.

    Raises:
        HRMError: see `read_lines`; or more than MAX_UNDECODABLE of the bytes cannot be decoded.
    """
    with read_errors(path, encoding), open_binary(path) as file:
        data = file.read()

    def read(encoding: str, stats: TextStats) -> str:
        text = "\n".join(read_lines(path, encoding, stats, data))
        stats.add(text)
        return text

    text, stats = guess_and_read(encoding, read)
    stats.report(path, MAX_UNDECODABLE)
    return text, stats


def split_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yields the lines that are not blank."""
    return (line for line in lines if line and not line.isspace())


def _split_at_blank_lines(lines: Iterable[str]) -> Iterator[list[str]]:
    for is_blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not is_blank:
            yield list(group)


def split_paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Yields paragraphs, which blank lines separate; their lines are joined by spaces."""
    for group in _split_at_blank_lines(lines):
        yield " ".join(line.strip() for line in group)


def split_stanzas(lines: Iterable[str]) -> Iterator[str]:
    """Yields stanzas, which blank lines separate, with their line breaks."""
    for group in _split_at_blank_lines(lines):
        yield "\n".join(line.rstrip() for line in group)


def join_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yields all lines as one document, without blank lines at its beginning and end."""
    text = "\n".join(line.rstrip() for line in lines).strip("\n")
    if text:
        yield text


# How lines become documents, by what ends a document (``--sep``).
SPLITTERS: dict[str, Callable[[Iterable[str]], Iterator[str]]] = {
    "line": split_lines,
    "blank": split_paragraphs,
    "stanza": split_stanzas,
    "file": join_lines,
}


class NumberedLine(str):
    """A line of a text file, and its number in the file."""

    number: int


class LineNumbers:
    """The lines of text files that a stream consists of.

    Iterating yields of each its number in its file, from 1, and its bytes in the stream, with what
    ends it there. From one file to the next the numbers go on.
    """

    def __init__(self) -> None:
        self.n_lines: dict[PathLike, int] = {}  # of each file, blank ones too
        self.found: dict[PathLike, list[tuple[int, int]]] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.chain.from_iterable(self.found.values())

    def count(self, path: PathLike, lines: Iterable[str]) -> Iterator[NumberedLine]:
        """Yields all lines of a file with their numbers. A file may be read again."""
        self.n_lines[path] = 0
        n_before = sum(self.n_lines.values())
        for i, text in enumerate(lines, 1):
            line = NumberedLine(text)
            line.number = n_before + i
            self.n_lines[path] = i
            yield line

    def record(
        self, path: PathLike, lines: Iterable[NumberedLine], sep: str
    ) -> Iterator[NumberedLine]:
        """Yields the lines of a file that become its documents, and records them."""
        found = self.found[path] = []
        n_blank = 0
        for line in lines:
            if line.strip():
                text = line if sep == "line" else line.strip() if sep == "blank" else line.rstrip()
                found.append((line.number, len(to_bytes(text)) + 1))  # as SPLITTERS joins them
                n_blank = 0
            elif sep == "file" and found:  # only those between two others
                found.append((line.number, 1))
                n_blank += 1
            yield line
        del found[len(found) - n_blank :]


def load_documents(
    path: PathLike,
    encoding: str = "utf-8",
    sep: str = "line",
    stats: TextStats | None = None,
    keep_licence: bool = False,
    line_numbers: LineNumbers | None = None,
) -> Iterator[str]:
    """Yields the documents of a text file.

    Args:
        path: the file; ``.gz`` is decompressed. A byte order mark and CRLF are not part of a line.
        encoding: of the file; undecodable bytes are dropped.
        sep: what ends a document: ``line``, ``blank`` (a blank line; line breaks are spaces),
            ``stanza`` (a blank line; line breaks are kept) or ``file``.
        stats: counts the documents and bytes yielded, and what is odd about the text.
        keep_licence: keep Project Gutenberg's licence.
        line_numbers: records the lines of the documents.

    Raises:
        HRMError: the file is missing, a folder, or not text; or an unknown ``sep``.
    """
    if sep not in SPLITTERS:
        raise HRMError(f"sep must be one of {', '.join(SPLITTERS)}, not {sep!r}")
    stats = TextStats() if stats is None else stats
    lines: Iterator[str] = read_lines(path, encoding, stats)
    if line_numbers is not None:
        numbered = line_numbers.count(path, lines)
        kept = numbered if keep_licence else _without_licence(numbered, stats)
        lines = line_numbers.record(path, kept, sep)
    elif not keep_licence:
        lines = _without_licence(lines, stats)
    for document in SPLITTERS[sep](lines):
        stats.add(document)
        yield document


def _without_licence(lines: Iterable[Line], stats: TextStats) -> Iterator[Line]:
    stats.licence_lines += yield from cut_licence(lines)


def load_corpus_lines(
    path: PathLike, encoding: str = "utf-8", stats: TextStats | None = None
) -> Iterator[str]:
    """Yields the non-blank lines of a text file, without their line breaks.

    Arguments and errors as in `load_documents`. A licence of Project Gutenberg is kept.
    """
    return load_documents(path, encoding, "line", stats, keep_licence=True)


def encode_continuation(text: str, sep: str = "line") -> bytes:
    """Returns a text to be continued as the stream of a corpus has it: documents end with a line
    feed, and line breaks inside them are LINE_BREAK, as ``sep`` says.

    A break at the end of the text stays: the text goes on in a new line or a new document.
    """
    text = re.sub("\r\n?", "\n", text).lstrip("\n")
    if sep == "line":
        return to_bytes(re.sub(r"\n(?:[^\S\n]*\n)+", "\n", text))
    text = re.sub(r"[^\S\n]+\n", "\n", text)
    if sep == "file":
        return document_bytes(text)
    if sep == "blank":
        text = re.sub(r"\n[^\S\n]+", "\n", text)
    within = " " if sep == "blank" else LINE_BREAK
    documents = re.split("\n\n+", text)
    return to_bytes("\n".join(document.replace("\n", within) for document in documents))
