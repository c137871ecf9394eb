"""Pairs for restoring accents: sentences without their accents, and as they were."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..files import PathLike
from .corruption import strip_accents
from .stream import load_stream, stream_documents


def sentences(path: PathLike, max_bytes: int = 300, encoding: str = "utf-8") -> Iterator[str]:
    """Yields the sentences of a text file, or of those in a folder, that have at most ``max_bytes``
    bytes, in NFC.

    Raises:
        HRMError: a file is missing or not text, or the folder holds none.
    """
    for document in stream_documents(load_stream([path], encoding)):
        line = re.sub(r"\s+", " ", document.strip())
        for sentence in re.split(r"(?<=[.!?…]) ", line):
            if 0 < len(sentence.encode()) <= max_bytes:
                yield sentence


def accent_pairs(
    path: PathLike, max_bytes: int = 300, encoding: str = "utf-8"
) -> Iterator[tuple[str, str]]:
    """Yields for each sentence a prompt, without accents, and its target, the sentence.

    Raises:
        HRMError: a file is missing or not text, or the folder holds none.
    """
    for sentence in sentences(path, max_bytes, encoding):
        yield strip_accents(sentence), sentence
