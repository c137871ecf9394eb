"""What followed the contexts at the end of a text that grows: the counts, as writing needs them.

Shapes: N orders, the table's and those of what was just read together, by rising length; V =
vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .layers import hash_factors, ngram_hashes
from .tokenizer import BOS, EOS, PAD, VOCAB_SIZE

TOKEN_BITS = 9


class Followers(NamedTuple):
    """What came after the contexts at a place. ``met`` (2, N): how often each was met, 0 if it is
    not to be used, and by how many tokens it was followed; ``shares`` (N, V): by which, each row
    summing to one where the context was met. Both float32."""

    met: NDArray[np.float32]
    shares: NDArray[np.float32]


def order_weights(
    met: NDArray[np.float32], gains: NDArray[np.float32], hints: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The share of each order in the mixture, (..., N), as `NgramCounts` learned it.

    Args:
        met: (..., 2, N), of `Followers`.
        gains: (3, N), its ``by_count``.
        hints: (..., N), its ``by_state`` of the network's states.
    """
    score = (np.log1p(met) * gains[:2]).sum(-2) + gains[2] + hints
    weights = np.where(met[..., 0, :] > 0, 1 / (1 + np.exp(-score.clip(-80))), 0)
    left = (1 - weights[..., :0:-1]).cumprod(-1)[..., ::-1]  # by all orders after each but the last
    weights[..., :-1] *= left
    return weights


class Contexts(NamedTuple):
    """What a text ends with: the hashes of its last 1, 2, ... tokens, as many as the longest order,
    and how many tokens the longest complete context has, at most as many."""

    digest: NDArray[np.int64]
    known: int

    def then(self, token: int, powers: NDArray[np.int64]) -> Contexts:
        """After one more token: each hash is that of the shorter context, and the token's part."""
        digest = powers * (token + 1)
        if token == BOS:
            return Contexts(digest, 1)
        digest[1:] += self.digest[:-1]
        return Contexts(digest, min(self.known + 1, len(powers)))


class Table:
    """The n-grams of the training text, to be looked up one place at a time.

    Args:
        entries: (E,) int64, sorted: the hash of a context and what followed it.
        cumulative: (E + 1,) int32: the times all entries before were met.
        orders: lengths of the contexts in the table.
        recent_orders: of those in what was just read; each one of ``orders``.
        by_kind: where among all orders by length each of ``orders + recent_orders`` stands.
    """

    def __init__(
        self,
        entries: NDArray[np.int64],
        cumulative: NDArray[np.int32],
        orders: Sequence[int],
        recent_orders: Sequence[int],
        by_kind: Sequence[int],
    ) -> None:
        self.entries, self.cumulative = entries, cumulative
        self.longest, self.last = max(orders), 2**TOKEN_BITS - 1
        self.recent_orders, self.by_kind = list(recent_orders), list(by_kind)
        # Where the hash of each order is among those of 1, 2, ... tokens (``places``), and where
        # what is found of it stands among all orders by length (``rows``).
        self.places, self.recent_places = np.array(orders) - 1, np.array(recent_orders) - 1
        self.rows, self.recent_rows = np.array(by_kind[: len(orders)]), by_kind[len(orders) :]
        # How many are complete, by the length of the longest context that is.
        lengths = range(self.longest + 1)
        self.n_complete = [sum(n <= known for n in orders) for known in lengths]
        self.n_recent = [sum(n <= known for n in recent_orders) for known in lengths]
        self.factors = hash_factors(self.longest).numpy()
        self.powers = self.factors[:, 0].copy()

    def hashes(self, tokens: Sequence[int]) -> Contexts:
        """The contexts at the end of tokens."""
        values, known = np.zeros(self.longest, np.int64), 0
        for token in reversed(tokens[-self.longest :]):
            if token == PAD:
                break
            values[known] = token + 1
            known += 1
            if token == BOS:
                break
        return Contexts((self.factors * values).sum(1), known)

    def recent_hashes(self, contexts: Contexts) -> list[int]:
        """Those that are to be met again: of complete contexts, by rising length."""
        digest: list[int] = contexts.digest[self.recent_places].tolist()
        return digest[: self.n_recent[contexts.known]]

    def look(self, contexts: Contexts, into: Followers) -> None:
        """Writes what followed contexts in the training text."""
        keys = contexts.digest[self.places] << TOKEN_BITS
        n = self.n_complete[contexts.known]
        # The last key of a context is that of no token.
        bounds = self.entries.searchsorted(np.concatenate((keys[:n], keys[:n] | self.last)))
        begin, end = bounds[:n], bounds[n:]
        size, rows = end - begin, self.rows[:n]
        times = self.cumulative[end] - self.cumulative[begin]
        into.met[0, rows], into.met[1, rows] = times, size
        # All entries of all contexts, one after another.
        place = np.arange(size.sum()) + (begin - size.cumsum() + size).repeat(size)
        often = self.cumulative[place + 1] - self.cumulative[place]
        into.shares[rows.repeat(size), self.entries[place] & self.last] = often / times.repeat(size)


class Reader:
    """Reads a text that grows, and can take back what it read last.

    Args:
        table: of the training text.
        text: the tokens so far.
    """

    def __init__(self, table: Table, text: Sequence[int]) -> None:
        self.table = table
        self.tokens = list(text)
        self.seen: dict[int, dict[int, int]] = {}  # how often what followed a context, by its hash
        self.ends = self._ends_in(text)  # the hashes of the contexts that end at each token
        for contexts, token in zip(self.ends, text[1:]):  # noqa: B905
            self._met(contexts, token)
        self.contexts = [table.hashes(text)]  # at the end, and at each of those read since

    def _ends_in(self, text: Sequence[int]) -> list[list[int]]:
        if not text:
            return []
        ids = torch.tensor([text])
        found: list[list[int]] = [[] for _ in text]
        for order, (digest, complete) in enumerate(ngram_hashes(ids, self.table.longest), 1):
            if order in self.table.recent_orders:
                for place, is_one, value in zip(
                    found, complete[0].tolist(), digest[0].tolist(), strict=True
                ):
                    if is_one:
                        place.append(value)
        return found

    def _met(self, contexts: list[int], token: int) -> None:
        follower = EOS if token == BOS else token
        for context in contexts:
            after = self.seen.setdefault(context, {})
            after[follower] = after.get(follower, 0) + 1

    def read(self, token: int) -> None:
        """Takes in one more token."""
        if self.ends:
            self._met(self.ends[-1], token)
        contexts = self.contexts[-1].then(token, self.table.powers)
        self.contexts.append(contexts)
        self.ends.append(self.table.recent_hashes(contexts))
        self.tokens.append(token)

    def unread(self) -> None:
        """Takes the last token back."""
        token = self.tokens.pop()
        self.ends.pop()
        self.contexts.pop()
        follower = EOS if token == BOS else token
        for context in self.ends[-1] if self.ends else ():
            after = self.seen[context]
            after[follower] -= 1
            if not after[follower]:
                del after[follower]

    def followers(self) -> Followers:
        """What came after the contexts that end here."""
        n = len(self.table.by_kind)
        found = Followers(np.zeros((2, n), np.float32), np.zeros((n, VOCAB_SIZE), np.float32))
        self.table.look(self.contexts[-1], found)
        for row, context in zip(self.table.recent_rows, self.ends[-1] if self.ends else ()):  # noqa: B905
            if after := self.seen.get(context):
                times = sum(after.values())
                found.met[:, row] = times, len(after)
                for token, often in after.items():
                    found.shares[row, token] = often / times
        return found
