"""Byte-level tokenizer: one token per UTF-8 byte, and four special tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS, PLAN = 256, 257, 258, 259
VOCAB_SIZE = 260


class ByteTokenizer:
    """Maps text to UTF-8 bytes 0..255 and back. Special tokens: PAD, BOS, EOS, PLAN."""

    pad_id, bos_id, eos_id, plan_id = PAD, BOS, EOS, PLAN
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Returns the bytes of ``text``, unchanged.

        Raises:
            UnicodeEncodeError: ``text`` holds lone surrogates, which have no UTF-8 form.
        """
        return [BOS] * add_bos + list(text.encode()) + [EOS] * add_eos

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids`` without special tokens; invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def starts_character(ids: Any) -> Any:
    """Whether a token, or each token of a tensor, is the first of a character.

    Only UTF-8 continuation bytes (0x80..0xBF) are not; a special token counts as a character.
    """
    return (ids < 0x80) | (ids > 0xBF)


def inputs_to_targets(ids: Any) -> Any:
    """Maps tokens as the model reads them to tokens as it predicts them; an int, array or tensor.

    The break between two documents is one position of a stream: BOS as an input, EOS as a target.
    All other tokens stay as they are.
    """
    return ids + (ids == BOS) * (EOS - BOS)
