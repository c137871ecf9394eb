"""Pairs for restoring accents: sentences without their accents, and as they were."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from ..files import PathLike
from .corruption import strip_accents
from .text import MAX_UNDECODABLE, TextStats, load_documents


def sentences(path: PathLike, max_bytes: int = 300, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the sentences of a text file that have at most ``max_bytes`` bytes, in NFC.

    Raises:
        HRMError: the file is missing, a folder, or not text.
    """
    stats = TextStats()
    for line in load_documents(path, encoding, "line", stats):
        line = unicodedata.normalize("NFC", re.sub(r"\s+", " ", line.strip()))
        for sentence in re.split(r"(?<=[.!?…]) ", line):
            if 0 < len(sentence.encode()) <= max_bytes:
                yield sentence
    stats.report(path, encoding, MAX_UNDECODABLE)


def accent_pairs(
    path: PathLike, max_bytes: int = 300, encoding: str = "utf-8"
) -> Iterator[tuple[str, str]]:
    """Yields for each sentence a prompt, without accents, and its target, the sentence.

    Raises:
        HRMError: the file is missing, a folder, or not text.
    """
    for sentence in sentences(path, max_bytes, encoding):
        yield strip_accents(sentence), sentence
