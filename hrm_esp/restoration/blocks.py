"""Reading a text of any length without changing a byte of it."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from ..data import TextStats
from ..data.encodings import is_binary, is_utf8, marked_encoding
from ..data.text import display_name, open_binary, read_errors
from ..errors import HRMError
from ..files import PathLike

BLOCK_BYTES = 2**16


class TextBlocks:
    """The blocks of a text, in characters, each up to the end of a line. From standard input they
    come as soon as there is a line. What cannot be decoded is kept ("surrogateescape").

    Args:
        path: the file, decompressed if its name ends in ``.gz``; ``-`` is standard input.

    Raises:
        HRMError: the encoding is unknown, or has no letters with accents.
    """

    def __init__(self, path: PathLike, encoding: str = "utf-8") -> None:
        self.path, self.encoding = path, encoding
        with read_errors(path, encoding):
            codecs.lookup(encoding)
        try:
            "áéíóúüñ".encode(encoding)
        except UnicodeError as error:
            raise HRMError(
                f"{encoding} has no letters with accents: give another --encoding"
            ) from error
        self._encoder: codecs.IncrementalEncoder | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields the blocks.

        Raises:
            HRMError: the file is missing, a folder, unreadable or not text.
        """
        with read_errors(self.path, self.encoding), open_binary(self.path) as file:
            data = file.read1(BLOCK_BYTES)
            self._find_encoding(data)
            decoder = codecs.getincrementaldecoder(self.encoding)("surrogateescape")
            text = ""
            while data:
                text += decoder.decode(data)
                end = text.rfind("\n") + 1
                if not end and len(text) > BLOCK_BYTES:  # a line without end
                    end = text.rfind(" ") + 1
                if end:
                    yield text[:end]
                    text = text[end:]
                data = file.read1(BLOCK_BYTES)
            if text := text + decoder.decode(b"", final=True):
                yield text

    def _find_encoding(self, data: bytes) -> None:
        """Finds out the encoding from the beginning of a text."""
        marked = marked_encoding(data)
        if marked is not None and not is_utf8(marked):
            self.encoding = marked
        elif is_binary(data):
            raise HRMError(f"{display_name(self.path)} is not text in {self.encoding}")
        elif is_utf8(self.encoding):
            stats = TextStats()
            stats.add(stats.clean(data.decode(errors="surrogateescape"), 1))
            if true := stats.true_encoding():
                self.encoding, stats.encoding, stats.guessed = true, true, True
                stats.report_guess(self.path)

    def encode(self, text: str) -> bytes:
        """Returns a text in the encoding of the file."""
        if self._encoder is None:  # one for the whole text: it writes a byte order mark once
            self._encoder = codecs.getincrementalencoder(self.encoding)("surrogateescape")
        return self._encoder.encode(text)
