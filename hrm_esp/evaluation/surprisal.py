"""Surprisal: the bits of each word, line or byte of a text, or of the targets of a table.

A word ends before the next one begins: the space after it, or the line break, is part of it. So the
bits of all words, lines or bytes, divided by the number of bytes, are the score of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from ..data import ByteStream, TSVDataset
from ..model import HRMModel
from .scoring import Progress, byte_bits, target_bits

WORD = re.compile(r"(?:^\s+)?\S+\s*|^\s+$")


class Surprisal(NamedTuple):
    """A part of a text: its line in the file, or its row in the table, its number in that, both
    from 1, its text, its bits and its bytes."""

    line: int
    number: int
    text: str
    bits: float
    n_bytes: int


def text_surprisals(
    model: HRMModel,
    stream: ByteStream,
    lines: Iterable[tuple[int, int]],
    by: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Iterator[Surprisal]:
    """Yields the surprisal of each part of a stream.

    Args:
        lines: number and bytes of each line, see `LineNumbers`.
        by: ``word``, ``line`` or ``byte``.
        dtype, batch_size, progress: see `byte_bits`.
    """
    bits = byte_bits(model, stream, dtype, batch_size, progress)
    begin = 0
    for number, n_bytes in lines:
        end = begin + n_bytes
        yield from split_line(number, bytes(stream[begin:end]), bits[begin:end], by)
        begin = end


def target_surprisals(
    model: HRMModel,
    data: TSVDataset,
    by: str,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[Surprisal]:
    """Yields the surprisal of each part of the targets of a table, given their prompts; the token
    that ends a target counts as a byte of it. Arguments as in `text_surprisals`."""
    bits = dict(target_bits(model, data, dtype, batch_size, progress))
    for number, pair in enumerate(data, 1):
        yield from split_line(number, (pair.target + b"\n")[: len(bits[pair])], bits[pair], by)


def split_line(number: int, line: bytes, bits: np.ndarray, by: str) -> Iterator[Surprisal]:
    """Yields the parts of a line (N bytes), given the bits of each byte, (N,)."""
    if by == "byte":
        for i, (byte, value) in enumerate(zip(line, bits, strict=True), 1):
            yield Surprisal(number, i, show_byte(byte), float(value) + 0.0, 1)  # no -0.0
        return
    text = line.decode()
    parts = [text] if by == "line" else [match[0] for match in WORD.finditer(text)]
    begin = 0
    for i, part in enumerate(parts, 1):
        end = begin + len(part.encode())
        shown = " ".join(part.split())
        yield Surprisal(number, i, shown, float(bits[begin:end].sum()) + 0.0, end - begin)
        begin = end


def show_byte(byte: int) -> str:
    """Returns a byte as an ASCII character, or as an escape."""
    return chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}"
