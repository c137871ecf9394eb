"""Text to numbers and back: one token a byte."""

from __future__ import annotations

from collections.abc import Iterable

PAD, BOS, EOS, PLAN = 256, 257, 258, 259
VOCAB_SIZE = 260


class ByteTokenizer:
    """UTF-8 bytes 0..255, then PAD, BOS, EOS and PLAN."""

    pad_id, bos_id, eos_id, plan_id = PAD, BOS, EOS, PLAN
    vocab_size = VOCAB_SIZE

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The bytes of ``text``, exactly.

        Raises:
            UnicodeEncodeError: ``text`` holds lone surrogates, which UTF-8 has no bytes for.
        """
        return [BOS] * add_bos + list(text.encode()) + [EOS] * add_eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")
