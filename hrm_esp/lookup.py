"""What followed the contexts at the end of a text that grows: the counts, as writing needs them.

Shapes: N orders, the table's and those of what was just read together, by rising length; V =
vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log1p
from operator import sub
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .layers import HASH_FACTOR, ngram_hashes
from .tokenizer import BOS, EOS, PAD, VOCAB_SIZE

TOKEN_BITS = 9
TRUST_ORDERS = 4  # contexts of up to so many tokens foretell the hints after them
TRUST_ROWS = 16_381  # for the contexts of each order; a prime, as these are found by remainders
LITTLE = 0.2  # of a distribution: for so much a draft is not guessed by shorter contexts


class Place(NamedTuple):
    """What was met before of the contexts that end at a place: where the entries of each in the
    table begin and end, (n, 2) of the n that are complete, by rising length; and for each order met
    in what was just read, by its place among all orders, how often each token followed."""

    bounds: NDArray[np.int64]
    recent: dict[int, dict[int, int]]


class Followers(NamedTuple):
    """What came after the contexts of P places.

    ``times`` and ``distinct`` (P, N): how often each context was met, 0 if it is not to be used,
    and by how many tokens it was followed. The M pairs of a context and a token that followed it,
    (M,) each: which ``context`` of the P * N, which ``token`` of the P * V, and in what ``share``
    of the times.
    """

    times: NDArray[np.float32]
    distinct: NDArray[np.float32]
    context: NDArray[np.int64]
    token: NDArray[np.int64]
    share: NDArray[np.float32]

    def expected(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tokens' probabilities by contexts of such weights, (P, N) -> (P, V)."""
        n_places = len(self.times)
        mass = weights.ravel()[self.context] * self.share
        summed = np.bincount(self.token, mass, n_places * VOCAB_SIZE)
        return summed.reshape(n_places, VOCAB_SIZE).astype(np.float32)


def order_weights(
    times: NDArray[np.float32],
    distinct: NDArray[np.float32],
    gains: NDArray[np.float32],
    hints: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The share of each order in the mixture, (..., N), as `NgramCounts` learned it.

    Args:
        times, distinct: (..., N), of `Followers`.
        gains: (N, 3), its ``by_count``.
        hints: (..., N), its ``by_state`` of the network's states.
    """
    often, varied, always = gains.T
    score = np.log1p(times) * often + np.log1p(distinct) * varied + always + hints
    weights = (times > 0) / (1 + np.exp(np.minimum(-score, 80)))
    weights[..., :-1] *= (1 - weights[..., :0:-1]).cumprod(-1)[..., ::-1]  # left by all after each
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


def foretold_hints(trust: NDArray[np.float32], contexts: Contexts) -> list[float]:
    """The hints, N, to be expected where the network has not looked, by the ``trust`` of
    `NgramCounts`: the mean after the longest context, in which what is expected after the next
    shorter one counts once, and so on down to zero."""
    n = min(TRUST_ORDERS, contexts.known)
    sums = trust[np.arange(n), contexts.digest[:n] % TRUST_ROWS]
    weights = (1 / (sums[:, -1] + 1))[::-1].cumprod()[::-1]
    hints: list[float] = (weights @ sums)[:-1].tolist()
    return hints


class Table:
    """The n-grams of the training text, to be looked up as another text grows.

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
        self.ends = np.array([0, self.last])
        self.recent_orders, self.by_kind = list(recent_orders), list(by_kind)
        # Where the hash of each order is among those of 1, 2, ... tokens (``places``), and where
        # what is found of it stands among all orders by length (``rows``).
        self.places, self.recent_places = np.array(orders) - 1, np.array(recent_orders) - 1
        self.rows, self.recent_rows = np.array(by_kind[: len(orders)]), by_kind[len(orders) :]
        # From the longest on: which it is among all orders, and which of its kind.
        self.by_length = sorted(((row, kind) for kind, row in enumerate(by_kind)), reverse=True)
        # How many are complete, by the length of the longest context that is.
        lengths = range(self.longest + 1)
        self.n_complete = [sum(n <= known for n in orders) for known in lengths]
        self.n_recent = [sum(n <= known for n in recent_orders) for known in lengths]
        powers = [pow(HASH_FACTOR, i, 2**64) for i in range(self.longest)]  # see `ngram_hashes`
        self.powers = np.array(powers, np.uint64).view(np.int64)

    def hashes(self, tokens: Sequence[int]) -> Contexts:
        """The contexts at the end of tokens, PAD on the left."""
        contexts = Contexts(np.zeros(self.longest, np.int64), 0)
        for token in tokens[-self.longest :]:
            if token != PAD:
                contexts = contexts.then(token, self.powers)
        return contexts

    def recent_hashes(self, contexts: Contexts) -> list[int]:
        """Those that are to be met again: of complete contexts, by rising length."""
        digest: list[int] = contexts.digest[self.recent_places].tolist()
        return digest[: self.n_recent[contexts.known]]

    def find(self, contexts: Contexts) -> NDArray[np.int64]:
        """Where the entries of complete contexts begin and end, (n, 2) by rising length."""
        n = self.n_complete[contexts.known]
        # The last key of a context is that of no token.
        keys = contexts.digest[self.places[:n], None] << TOKEN_BITS
        return self.entries.searchsorted(keys + self.ends)

    def followers(self, places: Sequence[Place]) -> Followers:
        """What came after the contexts of places."""
        n_orders = len(self.by_kind)
        n_found = [len(place.bounds) for place in places]
        begin, end = np.concatenate([place.bounds for place in places]).T
        context = np.concatenate([self.rows[:n] for n in n_found])
        context += np.arange(0, len(places) * n_orders, n_orders).repeat(n_found)
        size = end - begin
        met = np.zeros((2, len(places) * n_orders), np.float32)
        met[0, context] = times = self.cumulative[end] - self.cumulative[begin]
        met[1, context] = size
        # All entries of all contexts, one after another.
        until = size.cumsum()
        index = np.arange(until[-1] if len(until) else 0) + (end - until).repeat(size)
        context = context.repeat(size)
        token = (self.entries[index] & self.last) + context // n_orders * VOCAB_SIZE
        share = (self.cumulative[index + 1] - self.cumulative[index]) / times.repeat(size)
        recent: list[tuple[int, int, float]] = []
        for i, place in enumerate(places):
            for row, after in place.recent.items():
                at, total = i * n_orders + row, sum(after.values())
                met[:, at] = total, len(after)
                recent += [(at, i * VOCAB_SIZE + t, often / total) for t, often in after.items()]
        if recent:
            more = zip(*recent, strict=True)
            context, token, share = (
                np.concatenate(parts) for parts in zip((context, token, share), more, strict=True)
            )
        times, distinct = met.reshape(2, len(places), n_orders)
        return Followers(times, distinct, context, token, share.astype(np.float32))

    def guess(
        self, place: Place, gains: Sequence[Sequence[float]], hints: Sequence[float]
    ) -> dict[int, float]:
        """What is expected at a place by `order_weights`, as probabilities of tokens that add up to
        the counts' share, without the shorter contexts where all but `LITTLE` is the longer ones'.
        For one place sooner done than `followers`."""
        expected: dict[int, float] = {}
        left, bounds = 1.0, place.bounds.tolist()
        often: Iterable[int]
        for row, kind in self.by_length:
            if row in place.recent:
                after = place.recent[row]
                tokens, often, times = list(after), after.values(), sum(after.values())
            elif kind < len(bounds) and bounds[kind][0] < bounds[kind][1]:
                begin, end = bounds[kind]
                # Of few, memoryviews are made sooner than arrays.
                tokens = [entry & self.last for entry in self.entries.data[begin:end]]
                until = self.cumulative.data[begin : end + 1].tolist()
                often, times = map(sub, until[1:], until), until[-1] - until[0]
            else:
                continue
            of_times, of_distinct, always = gains[row]
            score = of_times * log1p(times) + of_distinct * log1p(len(tokens)) + always + hints[row]
            weight = 1 / (1 + exp(min(-score, 80)))
            share = left * weight / times
            for token, n in zip(tokens, often):  # noqa: B905
                expected[token] = expected.get(token, 0) + share * n
            left *= 1 - weight
            if left < LITTLE:
                break
        return expected


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

    def place(self) -> Place:
        """Where the text ends."""
        ends = self.ends[-1] if self.ends else ()
        recent = {
            row: after.copy()
            for row, context in zip(self.table.recent_rows, ends)  # noqa: B905
            if (after := self.seen.get(context))
        }
        return Place(self.table.find(self.contexts[-1]), recent)
