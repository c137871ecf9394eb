"""Which encoding a text has: byte order marks, old encodings of Spanish, UTF-8 read as Latin-1."""

from __future__ import annotations

import codecs
import re

# Byte order marks, and the encodings that skip them, and that read them as a character. UTF-32 is
# before UTF-16: its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: ("utf-8-sig", "utf-8"),
    codecs.BOM_UTF32_LE: ("utf-32", "utf-32-le"),
    codecs.BOM_UTF32_BE: ("utf-32", "utf-32-be"),
    codecs.BOM_UTF16_LE: ("utf-16", "utf-16-le"),
    codecs.BOM_UTF16_BE: ("utf-16", "utf-16-be"),
}
OLD_ENCODINGS = ("latin-1", "cp1252", "cp850", "mac_roman")
LETTERS = frozenset("áéíóúüñÁÉÍÓÚÜÑ")
PUNCTUATION = frozenset("¿¡«»ºª°·—–“”‘’…€")
MIN_SPANISH = 0.8  # mean score from which a guess is trusted, see `guess_encoding`
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\f\r\x1b"))
MAX_CONTROL_BYTES = 0.1  # share of them from which a file is no text in its encoding
# "ó" in UTF-8 is two bytes, which are "Ã³" in Latin-1. Most others begin with these letters, too.
DOUBLE_ENCODED = re.compile(
    "Ã[\x80-\xbf‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]|Â[¡¿«»ºª°·]|â€[\x80-\xbfœ“”™˜¦]"
)


def is_utf8(encoding: str) -> bool:
    """Raises LookupError if there is no such encoding."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def marked_encoding(head: bytes, keep_mark: bool = False) -> str | None:
    """Returns the encoding that a byte order mark names, if there is one: one that skips the mark,
    or that reads it as a character."""
    return next((names[keep_mark] for mark, names in MARKS.items() if head.startswith(mark)), None)


def guess_encoding(data: bytes) -> str | None:
    """Returns the old encoding in which some bytes that are not UTF-8 are Spanish, if any.

    A letter of Spanish scores 1, or 0.85 if there is only one of them, other punctuation of Spanish
    0.9, anything else 0; ASCII is ignored. So dashes of dialogues are not taken for many an "ó".
    """
    best, best_score = None, MIN_SPANISH
    for name in OLD_ENCODINGS:
        characters = [c for c in data.decode(name, errors="replace") if not c.isascii()]
        of_letter = 1.0 if len(LETTERS & set(characters)) > 1 else 0.85
        score = sum(of_letter * (c in LETTERS) + 0.9 * (c in PUNCTUATION) for c in characters)
        if characters and score / len(characters) > best_score:
            best, best_score = name, score / len(characters)
    return best


def is_binary(head: bytes) -> bool:
    """Whether a file that begins like this is no text, or text in UTF-16 or UTF-32."""
    n_control = len(head) - len(head.translate(None, CONTROL_BYTES))
    return n_control > MAX_CONTROL_BYTES * len(head)


def unmarked_utf16(head: bytes) -> str | None:
    """Returns the form of UTF-16 that a text without a mark seems to have, ``None`` for others."""
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) < len(head) / 4 or min(even, odd) > max(even, odd) / 4:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"
