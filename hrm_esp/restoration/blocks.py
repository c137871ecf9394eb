"""Reading a text of any length without changing a byte of it."""

from __future__ import annotations

import codecs
import string
from collections.abc import Iterator

from ..data import TextStats
from ..data.encodings import is_binary, is_utf8, marked_encoding
from ..data.text import display_name, open_binary, read_errors
from ..errors import HRMError
from ..files import PathLike

BLOCK_BYTES = 2**14
WIDE = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}  # without a mark


class TextBlocks:
    """The blocks of a text, in characters, each up to the end of a line. From standard input they
    come as soon as there is a line. Bytes that cannot be decoded are kept.

    Args:
        path: the file, decompressed if its name ends in ``.gz``; ``-`` is standard input.

    Raises:
        HRMError: the encoding is unknown, has no letters with accents, or not one form of a text.
    """

    def __init__(self, path: PathLike, encoding: str = "utf-8") -> None:
        self.path = path
        with read_errors(path, encoding):
            self.encoding = codecs.lookup(encoding).name.removesuffix("-sig")
            self.encoding = WIDE.get(self.encoding, self.encoding)
            refused = HRMError(f"a text in {encoding} cannot be restored: give another --encoding")
            try:
                "áéíóúüñ".encode(self.encoding)
                ascii_bytes = string.printable.encode(self.encoding)
            except UnicodeError as error:
                raise refused from error
            if not self.is_wide and ascii_bytes != string.printable.encode():
                raise refused

    @property
    def is_wide(self) -> bool:
        """Whether a character has at least two bytes."""
        return self.encoding.startswith(("utf-16", "utf-32"))

    @property
    def errors(self) -> str:
        """How what cannot be decoded is kept."""
        return "surrogatepass" if self.is_wide else "surrogateescape"

    def __iter__(self) -> Iterator[str]:
        """Yields the blocks.

        Raises:
            HRMError: the file is missing, a folder, unreadable or not text.
        """
        with read_errors(self.path, self.encoding), open_binary(self.path) as file:
            data = file.read1(BLOCK_BYTES)
            self._find_encoding(data)
            with read_errors(self.path, self.encoding):
                decoder = codecs.getincrementaldecoder(self.encoding)(self.errors)
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
        if marked := marked_encoding(data, keep_mark=True):
            self.encoding = marked
        elif not self.is_wide and is_binary(data):
            raise HRMError(f"{display_name(self.path)} is not text in {self.encoding}")
        elif is_utf8(self.encoding):
            stats = TextStats()
            stats.add(stats.clean(data.decode(errors="surrogateescape"), 1))
            if true := stats.true_encoding():
                self.encoding, stats.encoding, stats.guessed = true, true, True
                stats.report_guess(self.path)

    def encode(self, text: str) -> bytes:
        """Returns a text in the encoding of the file."""
        return text.encode(self.encoding, self.errors)
