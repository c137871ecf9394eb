"""Rolling hashes of token n-grams: for all positions of a tensor, or one token at a time.

The hash of n tokens t_1 .. t_n, t_n the newest, is the sum of (t_i + 1) * F^(i - 1) modulo 2^64,
read as int64. An n-gram never reaches back over a BOS, but may begin with it. Both forms in this
file give the same hashes.

Shapes: B rows, T positions, R preceding positions, N orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..tokenizer import BOS, PAD

HASH_FACTOR = 1_000_003


def ngram_hashes(
    ids: Tensor, max_order: int, n_preceding: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hashes the last 1, 2, ... ``max_order`` tokens at each position.

    Args:
        ids: (B, n_preceding + T), PAD where there is no token.
        n_preceding: number of tokens in front that are context only.

    Yields:
        For each order the hashes (B, T) int64, and which n-grams are valid, (B, T) bool: those that
        begin after the last BOS, or with it. An invalid hash covers only the tokens back to the
        last BOS.
    """
    n, missing = ids.shape[1] - n_preceding, max_order - 1 - n_preceding
    if missing > 0:
        ids = F.pad(ids, (missing, 0), value=PAD)
    end = ids.shape[1]
    hashes = ids.new_zeros((len(ids), n))
    valid = torch.ones_like(hashes, dtype=torch.bool)
    for k in range(max_order):
        token = ids[:, end - n - k : end - k]
        valid = valid & (token != PAD)
        hashes = hashes * HASH_FACTOR + (token + 1) * valid  # int64 wraps around
        yield hashes, valid
        valid = valid & (token != BOS)


def stack_hashes(
    ids: Tensor, orders: Sequence[int], preceding_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Hashes the n-grams of the given orders at each of ids (B, T), after preceding_ids (B, R).

    Returns:
        The hashes (B, T, N) int64, and which n-grams are valid, (B, T, N) bool.
    """
    n_preceding, max_order = 0, max(orders)
    if preceding_ids is not None:
        preceding_ids = preceding_ids[:, max(0, preceding_ids.shape[1] - max_order + 1) :]
        n_preceding = preceding_ids.shape[1]
        ids = torch.cat((preceding_ids, ids), dim=1)
    by_order = list(ngram_hashes(ids, max_order, n_preceding))
    hashes, valid = zip(*(by_order[n - 1] for n in orders), strict=True)
    return torch.stack(hashes, dim=-1), torch.stack(valid, dim=-1)


def hash_powers(max_order: int) -> NDArray[np.int64]:
    """Returns HASH_FACTOR^0 .. HASH_FACTOR^(max_order - 1) modulo 2^64."""
    powers = [pow(HASH_FACTOR, i, 2**64) for i in range(max_order)]
    return np.array(powers, np.uint64).view(np.int64)


class RollingHash(NamedTuple):
    """The end of a sequence: ``hashes`` of its last 1, 2, ... tokens, of which the first
    ``n_valid`` are those of valid n-grams."""

    hashes: NDArray[np.int64]
    n_valid: int

    @classmethod
    def of(cls, tokens: Sequence[int], powers: NDArray[np.int64]) -> RollingHash:
        """Hashes the end of ``tokens``; PAD is skipped. ``powers`` as of `hash_powers`."""
        state = cls(np.zeros(len(powers), np.int64), 0)
        for token in tokens[-len(powers) :]:
            if token != PAD:
                state = state.append(token, powers)
        return state

    def append(self, token: int, powers: NDArray[np.int64]) -> RollingHash:
        """Returns the state after one more token."""
        hashes = powers * (token + 1)
        if token == BOS:
            return RollingHash(hashes, 1)
        hashes[1:] += self.hashes[:-1]
        return RollingHash(hashes, min(self.n_valid + 1, len(powers)))
