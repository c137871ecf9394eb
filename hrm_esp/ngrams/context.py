"""N-gram contexts of a text that grows token by token, for generation. NumPy and plain Python:
for a few tokens starting a PyTorch operation takes longer than the operation.

Shapes: P positions, N orders (of the table and of the text just read, sorted by order), V =
vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..tokenizer import VOCAB_SIZE, inputs_to_targets
from .entries import COUNTS, MAX_CODE, entry_key, entry_tokens, last_key
from .hashing import WORD_ORDERS, ContextHasher, RollingHash, hash_index, min_length
from .table import NgramTable

Array = Any  # torch.Tensor or np.ndarray


class ContextMatch(NamedTuple):
    """The contexts at one position.

    ``last_token``: that the contexts end with.
    ``counts``: how often each context occurred, and by how many tokens it was continued, (2, N).
    Then for each of M pairs of a context and a token that continued it, (M,) each:
    ``context_index`` into the N contexts, ``tokens``, and how often the token continued the context
    (``continuation_counts``).
    """

    last_token: int
    counts: NDArray[np.float32]
    context_index: NDArray[np.int64]
    tokens: NDArray[np.int64]
    continuation_counts: NDArray[np.int64]


class Continuations(NamedTuple):
    """All continuations of the contexts at P positions, as NumPy arrays; in training, as tensors.

    ``last_tokens``: the token that the contexts end with, (P,).
    ``context_count``: how often each context occurred, (P, N). ``log_counts``: log(1 + C) of each
    context, then log(1 + D), where C is its count and D by how many different tokens it was
    continued, (P, 2 N). Then for each of M pairs of a context and a token that continued it, (M,)
    each: ``context_index`` into the P * N contexts, ``token_index`` into the P * V tokens, and the
    ``frequency`` of the token after the context, relative to the context's count.
    """

    last_tokens: Array
    context_count: Array
    log_counts: Array
    context_index: Array
    token_index: Array
    frequency: Array


def sort_orders(orders: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the permutation that sorts the orders, and its inverse. Of equal orders, that of the
    table comes first: the text just read has the last word."""
    permutation = sorted(range(len(orders)), key=orders.__getitem__)
    return permutation, sorted(range(len(orders)), key=permutation.__getitem__)


class NgramIndex:
    """A NumPy view of an `NgramTable`, for lookups one position at a time.

    Args:
        table: of the training text.
        recent_orders: of the n-grams counted in the text just read; each is an order of the table.
    """

    def __init__(self, table: NgramTable, recent_orders: Sequence[int]) -> None:
        self.entries = table.entries.cpu().numpy()
        self.recent_orders = list(recent_orders)
        orders, n_table = table.orders, len(table.orders)
        # Index among all N orders, first of the table's orders, then of the recent ones.
        _, order_index = sort_orders([*orders, *recent_orders])
        self.table_index = np.array(order_index[:n_table])
        self.recent_index = order_index[n_table:]
        self.n_orders = len(order_index)
        # The index of each order's hash in a RollingHash, and how many orders are valid after some
        # tokens.
        self.max_order = max(n for n in orders if n not in WORD_ORDERS)
        self.table_hashes, self.recent_hashes = (
            np.array([hash_index(n) for n in some]) for some in (orders, recent_orders)
        )
        self.n_table_valid, self.n_recent_valid = (
            [sum(min_length(n) <= k for n in some) for k in range(self.max_order + 1)]
            for some in (orders, recent_orders)
        )

    def recent_keys(self, state: RollingHash) -> list[int]:
        """Returns the hashes of the valid contexts counted in the text just read."""
        n = self.n_recent_valid[min(state.length, self.max_order)]
        hashes: list[int] = state.hashes[self.recent_hashes[:n]].tolist()
        return hashes

    def match(self, state: RollingHash, recent: Sequence[dict[int, int]]) -> ContextMatch:
        """Looks up the contexts at the end of a sequence.

        Args:
            recent: by which tokens, and how often, each context of the recent orders was continued
                in the text just read, as far as they are valid.
        """
        # Step 1: find the contexts in the table.
        n_valid = self.n_table_valid[min(state.length, self.max_order)]
        keys = entry_key(state.hashes[self.table_hashes[:n_valid]])
        begin = self.entries.searchsorted(keys)
        end = self.entries.searchsorted(last_key(keys), "right")
        size = end - begin
        last = size.cumsum()
        entries = self.entries[np.arange(size.sum()) + (end - last).repeat(size)]
        context_index = self.table_index[:n_valid].repeat(size)
        tokens, continuation_counts = entry_tokens(entries), COUNTS[entries & MAX_CODE]
        # Step 2: the contexts in the text just read.
        pairs = [
            (order_index, *pair)
            for order_index, next_counts in zip(self.recent_index, recent)  # noqa: B905
            for pair in next_counts.items()
        ]
        if pairs:
            of_table = context_index, tokens, continuation_counts
            found = np.concatenate((of_table, np.array(pairs).T), axis=1)
            context_index, tokens, continuation_counts = found
        # Step 3: add up.
        counts = np.zeros((2, self.n_orders), np.float32)
        counts[0] = np.bincount(context_index, continuation_counts, self.n_orders)
        counts[1] = np.bincount(context_index, minlength=self.n_orders)
        return ContextMatch(state.last_token(), counts, context_index, tokens, continuation_counts)

    def gather_continuations(self, matches: Sequence[ContextMatch]) -> Continuations:
        """Gathers all continuations of the contexts at P positions."""
        n_orders = self.n_orders
        counts = np.array([match.counts for match in matches], np.float32).reshape(-1, 2, n_orders)
        last_tokens, _, *pairs = zip(*matches, strict=True) if matches else [()] * 5
        position = np.arange(len(matches)).repeat([len(tokens) for tokens in pairs[0]])
        context, token, count = (
            np.concatenate((np.empty(0, np.int64), *of_position)) for of_position in pairs
        )
        context += position * n_orders
        return Continuations(
            np.array(last_tokens, np.int64),
            counts[:, 0],
            np.log1p(counts).reshape(-1, 2 * n_orders),
            context,
            token + position * VOCAB_SIZE,
            count.astype(np.float32) / counts[:, 0].ravel()[context],
        )


class NgramContext:
    """The n-gram contexts at the end of one sequence.

    Args:
        index: of the training text.
        tokens: of the sequence so far; PAD on the left is ignored.
    """

    def __init__(self, index: NgramIndex, tokens: Sequence[int]) -> None:
        self.index = index
        self.next_counts: dict[int, dict[int, int]] = {}  # by the hash of a context
        self.recent_keys = self._initial_keys(tokens)  # at each token
        for keys, token in zip(self.recent_keys, tokens[1:]):  # noqa: B905
            self._count(keys, token)
        self.states = [RollingHash.of(tokens, index.max_order)]  # now, and after each `append`
        self.added: list[int] = []  # tokens, by `append`

    def _initial_keys(self, tokens: Sequence[int]) -> list[list[int]]:
        if not tokens:
            return []
        hashes, valid = ContextHasher(torch.tensor([tokens])).hashes(self.index.recent_orders)
        rows = zip(hashes[0].T.tolist(), valid[0].T.tolist(), strict=True)
        return [[h for h, v in zip(*row, strict=True) if v] for row in rows]

    def _count(self, keys: list[int], token: int) -> None:
        if not keys:
            return
        target = inputs_to_targets(token)
        for key in keys:
            counts = self.next_counts.setdefault(key, {})
            counts[target] = counts.get(target, 0) + 1

    def append(self, token: int) -> None:
        """Adds a token to the sequence."""
        if self.recent_keys:
            self._count(self.recent_keys[-1], token)
        state = self.states[-1].append(token)
        self.states.append(state)
        self.recent_keys.append(self.index.recent_keys(state))
        self.added.append(token)

    def rollback(self, n: int) -> None:
        """Removes the last n tokens, which `append` added."""
        for _ in range(n):
            target = inputs_to_targets(self.added.pop())
            self.recent_keys.pop()
            self.states.pop()
            for key in self.recent_keys[-1] if self.recent_keys else ():
                counts = self.next_counts[key]
                counts[target] -= 1
                if not counts[target]:
                    del counts[target]

    def match(self) -> ContextMatch:
        """Returns the contexts at the end of the sequence."""
        keys = self.recent_keys[-1] if self.recent_keys else ()
        recent = [self.next_counts.get(key, {}) for key in keys]
        return self.index.match(self.states[-1], recent)
