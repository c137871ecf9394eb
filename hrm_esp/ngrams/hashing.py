"""Hashes of contexts: for all positions of a tensor, or one token at a time.

The context of order n is the last n tokens. Two contexts are made of words, whatever their length:
WORD is the word so far, or the last token where that is no letter, and TWO_WORDS the same with the
word before it. Letters are folded to lower case. No context reaches back over a BOS; an n-gram may
begin with it.

The hash of tokens t_1 .. t_n, t_n the newest, is the sum of (t_i + 1) F^(n - i) modulo 2^64, read
as int64, with F = HASH_FACTOR. F is odd, so it has an inverse: the hash of any part of a row is a
difference of cumulative sums of (t_i + 1) F^-i, times a power of F.

Shapes: B rows, T positions, N orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..tokenizer import BOS, PAD

HASH_FACTOR = 1_000_003
WORD_FACTOR = 0x9E3779B97F4A7C15  # of the word before, and of the kind of context; odd as well
WORD, TWO_WORDS = WORD_ORDERS = (1001, 1002)  # above every order of n-grams: they are sorted last


class ContextHasher:
    """Hashes the contexts at each of ids (B, T). PAD is no token."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, n = ids, ids.shape[1]
        self.position = torch.arange(n, device=ids.device)
        capacity = 1 << n.bit_length()  # few sizes, so that they are kept
        self.powers, self.inverse_powers = (p[:n] for p in factor_powers(capacity, ids.device))
        # Where the document begins, at each position; at a PAD, the position after it.
        begin = torch.where(ids == PAD, self.position + 1, 0)
        begin = torch.where(ids == BOS, self.position, begin)
        self.document_begin = begin.cummax(1).values
        self.sums = self._cumulative(ids + 1)

    def _cumulative(self, values: Tensor) -> Tensor:
        """Returns the sums of values (B, T) times F^-i over all positions before: one more."""
        return F.pad((values * self.inverse_powers).cumsum(1), (1, 0))

    def hashes(self, orders: Sequence[int], first: int = 0) -> tuple[Tensor, Tensor]:
        """Returns the hashes of the contexts of some orders, those of words first, (B, N, T) int64,
        and which contexts are valid, (B, N, T) bool; of the positions from ``first`` on."""
        parts = []
        if words := [n - WORD for n in orders if n in WORD_ORDERS]:
            parts.append([x[:, words[0] : words[-1] + 1, first:] for x in self.words])
        if ngrams := [n for n in orders if n not in WORD_ORDERS]:
            parts.append(list(self.ngrams(ngrams, first)))
        hashes, is_valid = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return hashes, is_valid

    def ngrams(self, orders: Sequence[int], first: int) -> tuple[Tensor, Tensor]:
        """Returns the hashes of n-grams (B, N, T) int64, and which are valid, (B, N, T) bool."""
        lengths = order_lengths(tuple(orders), self.ids.device)
        begin, document_begin = self.position[first:] + 1 - lengths, self.document_begin[:, None]
        document_begin = document_begin[..., first:]
        from_document = torch.maximum(begin, document_begin)
        sums = self.sums.gather(1, from_document.flatten(1)).view_as(from_document)
        hashes = (self.sums[:, None, first + 1 :] - sums) * self.powers[first:]
        return hashes, begin >= document_begin

    @cached_property
    def words(self) -> tuple[Tensor, Tensor]:
        """The hashes of WORD and TWO_WORDS (B, 2, T) int64, and which are valid, (B, 2, T)
        bool."""
        # Step 1: the word so far.
        letter, sums = is_letter(self.ids), self._cumulative(fold_case(self.ids) + 1)
        begin = torch.where(letter, -1, self.position).cummax(1).values + letter
        word = (sums[:, 1:] - sums.gather(1, begin)) * self.powers
        # Step 2: the word before, if it is in the same document.
        is_end = F.pad(letter[:, :-1], (1, 0)) & ~letter
        end = torch.where(is_end, self.position - 1, -1).cummax(1).values
        previous = word.gather(1, end.clamp(min=0)) * (end >= self.document_begin)
        hashes = torch.stack(hash_words(word, previous), dim=1)
        return hashes, (self.ids != PAD)[:, None].expand_as(hashes)


@lru_cache(maxsize=64)
def factor_powers(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the powers 0 to n - 1 of HASH_FACTOR and of its inverse modulo 2^64, (n,) int64."""
    factors = signed(HASH_FACTOR), signed(pow(HASH_FACTOR, -1, 2**64))
    powers = [np.full(n, factor, np.int64).cumprod() for factor in factors]
    first, second = (torch.from_numpy(np.append(1, p)[:n]).to(device) for p in powers)
    return first, second


@lru_cache(maxsize=64)
def order_lengths(orders: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns orders of n-grams as a column, (N, 1) int64."""
    return torch.tensor(orders).to(device)[:, None]


def hash_words(word: Any, previous: Any) -> tuple[Any, Any]:
    """Returns the hashes of WORD and TWO_WORDS, of ints or tensors."""
    factor = signed(WORD_FACTOR)
    return word * factor + WORD, (previous * factor + word) * factor + TWO_WORDS


def is_letter(ids: Any) -> Any:
    """Whether an int, or each of a tensor, is an ASCII letter or part of a character of several
    bytes: those are letters, mostly."""
    folded = fold_case(ids)
    return ((folded >= 97) & (folded <= 122)) | ((ids >= 128) & (ids < 256))


def fold_case(ids: Any) -> Any:
    """Maps ASCII capitals to small letters, in an int or a tensor."""
    return ids + 32 * ((ids >= 65) & (ids <= 90))


def signed(x: int) -> int:
    """Returns x modulo 2^64, read as int64."""
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


class RollingHash(NamedTuple):
    """The end of a sequence.

    ``hashes``: of WORD, of TWO_WORDS and of the last 1, 2, ... tokens, see `hash_index`.
    ``length``: tokens since the last BOS. ``word`` and ``previous``: hashes of the word so far and
    of the one before, 0 if there is none. ``in_word``: whether the last token is a letter.
    """

    hashes: NDArray[np.int64]
    length: int = 0
    word: int = 0
    previous: int = 0
    in_word: bool = False

    @classmethod
    def of(cls, tokens: Sequence[int], max_order: int) -> RollingHash:
        """Hashes the end of ``tokens``; PAD is skipped."""
        begin = min(max(0, len(tokens) - max_order), previous_word_begin(tokens))
        state = cls(np.zeros(len(WORD_ORDERS) + max_order, np.int64))
        for token in tokens[begin:]:
            if token != PAD:
                state = state.append(token)
        return state

    def append(self, token: int) -> RollingHash:
        """Returns the state after one more token."""
        word, previous, in_word = fold_case(token) + 1, self.previous, is_letter(token)
        if token == BOS:
            previous = 0
        elif in_word and self.in_word:
            word = (self.word * HASH_FACTOR + word) % 2**64
        elif self.in_word:
            previous = self.word
        n_words = len(WORD_ORDERS)
        hashes = np.full_like(self.hashes, token + 1)
        hashes[n_words + 1 :] += self.hashes[n_words:-1] * HASH_FACTOR
        hashes[:n_words] = [signed(h) for h in hash_words(word, previous)]
        length = 1 if token == BOS else self.length + 1
        return RollingHash(hashes, length, word, previous, in_word)

    def last_token(self) -> int:
        """Returns the last token, 0 if there is none."""
        return max(0, int(self.hashes[hash_index(1)]) - 1)  # the hash of a token is one more


def hash_index(order: int) -> int:
    """Returns the index of an order among the hashes of a `RollingHash`."""
    return order - WORD if order in WORD_ORDERS else len(WORD_ORDERS) + order - 1


def min_length(order: int) -> int:
    """Returns how many tokens there must be for a context of an order."""
    return 1 if order in WORD_ORDERS else order


def previous_word_begin(tokens: Sequence[int]) -> int:
    """Returns where the last word but one begins, or the document if it has no such word."""
    n_words = 0
    for i in range(len(tokens) - 1, 0, -1):
        n_words += is_letter(tokens[i]) and not is_letter(tokens[i - 1])
        if n_words == 2 or tokens[i] == BOS:
            return i
    return 0
