"""What followed what in the training text: n-gram counts that the network falls back from.

A network needs many passes to learn by heart what a table holds after one. So the Executor leaves
rote to a table, and learns what the table cannot know.

Shapes: B rows, T positions, N orders, D = d_model, V = vocab_size, E entries of the table.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RECENT_ORDERS, HRMConfig
from .data import Stream, as_inputs, as_targets
from .files import mapped
from .layers import ngram_hashes
from .lookup import TOKEN_BITS, TRUST_ORDERS, TRUST_ROWS, Followers, Reader, Table
from .tokenizer import BOS, EOS, PAD

ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)  # of the table
COUNTED = 2**23  # bytes whose n-grams are counted, at most: of a larger text, pieces from all of it
PIECE = 2**16
TRUST_KEPT = 0.99  # of ``trust``, at each step
SURE = 1 - 2**-12  # the largest share of the counts: what was never seen stays possible


class Met(NamedTuple):
    """For each position and order, all (B, T, N): how many ``times`` its context was met before,
    0 if it is not to be used, by how many ``distinct`` tokens it was followed, and in how many
    ``hits`` by this position's target."""

    times: Tensor
    distinct: Tensor
    hits: Tensor


class NgramCounts(nn.Module):
    """Mixes the network's distribution with relative frequencies after contexts of rising order: of
    the training text, and of the text just read (a cache, Kuhn & De Mori 1990), which is the window
    and some of what came before it. Of equal order, the latter have the last word.

    Deleted interpolation (Jelinek & Mercer 1980): p_n = p_(n-1) + w_n (c_n / N_n - p_(n-1)), where
    p_0 is the network's, and c_n of the N_n times that the last n tokens were met, this one came
    next. The weight w_n is that of Witten & Bell (1991, method C) at first: the more often a
    context was met, and the fewer tokens followed it, the more it is trusted. From there it is
    learned, as a function of both and of the network's state.

    A context met once in the training text says all that longer ones can: the table has none of
    those.
    """

    entries: Tensor  # (E,) int64, sorted: hash of the context and what followed it
    cumulative: Tensor  # (E + 1,) int32: the times all entries before were met
    trust: Tensor  # (TRUST_ORDERS, TRUST_ROWS, N + 1): sums of hints, and of how many; `remember`

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.orders = [n for n in ORDERS if n <= config.count_max]
        self.recent_orders = [n for n in RECENT_ORDERS if n <= config.count_max]
        last = torch.tensor([torch.iinfo(torch.int64).max])  # so that no search runs off the end
        self.register_buffer("entries", last)
        self.register_buffer("cumulative", torch.zeros(2, dtype=torch.int32))
        orders = self.orders + self.recent_orders
        n = len(orders)
        self.recent_len = config.recent_len
        self.met: list[tuple[Tensor, Tensor]] = []  # in the step under way, ids and hints
        self._table: tuple[Tensor, Table] | None = None  # and the entries it was made from
        # The places of all orders, both kinds together, by rising order; and the way back.
        self.by_length = sorted(range(n), key=orders.__getitem__)
        self.by_kind = sorted(range(n), key=self.by_length.__getitem__)
        self.by_count = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]).repeat(n, 1))
        self.by_state = nn.Linear(config.d_model, n, bias=False)
        nn.init.zeros_(self.by_state.weight)
        self.register_buffer("trust", torch.zeros(TRUST_ORDERS, TRUST_ROWS, n + 1))

    def count(self, stream: Stream, path: Path | None = None) -> None:
        """Makes the table from a stream of bytes; reads it from the file ``path`` instead if that
        holds it, and keeps it there."""
        text = np.concatenate([stream[i : i + PIECE] for i in counted_pieces(len(stream))])
        if path is None:
            self.entries, self.cumulative = self._tabulate(text)
            return

        def write(file: IO[bytes]) -> None:
            for part in self._tabulate(text):
                file.write(part.numpy().data)

        key = f"1 {self.orders} {len(text)} {zlib.crc32(text.data):08x}"
        data = mapped(path, key, write)
        split = len(data) // 12 * 8  # an int64 for each entry, and an int32 for each and one more
        self.entries = torch.from_numpy(data[:split].view(np.int64))
        self.cumulative = torch.from_numpy(data[split:].view(np.int32))

    def _tabulate(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """The ``entries`` and ``cumulative`` of a stream."""
        tokens = torch.from_numpy(as_inputs(stream[:-1]))
        targets = torch.from_numpy(as_targets(stream[1:]))
        entries, counts = [self.entries[-1:]], [torch.zeros(1, dtype=torch.int64)]
        known = torch.ones_like(tokens, dtype=torch.bool)
        for order, (digest, complete) in enumerate(ngram_hashes(tokens[None], self.orders[-1]), 1):
            if order not in self.orders:
                continue
            (places,) = (known & complete[0]).nonzero(as_tuple=True)
            found, order_of = key(digest[0, places], targets[places]).sort()
            entry, times = found.unique_consecutive(return_counts=True)
            entries.append(entry)
            counts.append(times)
            _, which, met = (found >> TOKEN_BITS).unique_consecutive(
                return_inverse=True, return_counts=True
            )
            known.zero_()
            known[places[order_of[met[which] > 1]]] = True
        table, order_of = torch.cat(entries).sort()
        return table, F.pad(torch.cat(counts)[order_of].cumsum(0), (1, 0)).int()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("entries", "cumulative"):  # as long as the text made them
            if (given := state.get(prefix + name)) is None:
                continue
            own = getattr(self, name)
            if own.shape == given.shape and own.equal(given.to(own.device)):
                state[prefix + name] = own  # it may be mapped from a file: nothing is written to it
            else:
                setattr(self, name, torch.empty_like(given, device=own.device))
        # Older checkpoints have none: what they write is as likely, but drafted worse.
        state.setdefault(prefix + "trust", torch.zeros_like(self.trust))
        super()._load_from_state_dict(state, prefix, *rest)

    def probability(
        self,
        p: Tensor,
        states: Tensor,
        ids: Tensor,
        targets: Tensor,
        past: Tensor | None = None,
        leave_out: bool = False,
    ) -> Tensor:
        """The probability of each target, (B, T).

        Args:
            p: (B, T), the network's.
            states: (B, T, D), the network's.
            ids: (B, T), the window read.
            targets: (B, T), what came next; PAD where it does not matter.
            past: (B, R), the text before the window; none by default.
            leave_out: take windows that are part of the text counted out of it, so that what the
                table knows of them is what it knows of any other; the past stays in, as without
                it no better was learned. For training alone: a window's targets tell whether it
                is part of that text.
        """
        past = self._nearest(ids[:, :0] if past is None else past)
        follower = torch.where(targets == PAD, following(ids), targets)
        met = (
            self._met_in_table(ids, follower, past, leave_out),
            self._met_recently(ids, follower, past),
        )
        times, distinct, hits = (
            torch.cat(parts, dim=-1)[..., self.by_length] for parts in zip(*met, strict=True)
        )
        hints = self.by_state(states).float()
        if self.training:
            self.met.append((ids, hints.detach()))
        rest, shares = self._shares(times, distinct, hints)
        return p * rest + (shares * hits / times.clamp(min=1)).sum(-1)

    def remember(self) -> None:
        """Once a step is done, adds its hints (what `by_state` makes of the network's states) to
        ``trust``, in the rows of the last 1, 2, ... tokens, and fades those of older steps.

        After the same few tokens they are alike: writing drafts by their means, before the network
        has looked. Each process has its own; the first one's are saved.
        """
        self.trust *= TRUST_KEPT
        for ids, hints in self.met:  # the sums after incomplete contexts are never asked for
            digest, _ = contexts(ids, range(1, TRUST_ORDERS + 1))
            added = F.pad(hints.nan_to_num(0, 0, 0), (0, 1), value=1.0).flatten(0, 1)
            for sums, of_order in zip(self.trust, digest.flatten(0, 1).T, strict=True):
                sums.index_add_(0, of_order % TRUST_ROWS, added)
        self.met = []

    def table(self) -> Table:
        """For looking up contexts as a text grows."""
        if self._table is None or self._table[0] is not self.entries:
            entries, cumulative = self.entries.cpu().numpy(), self.cumulative.cpu().numpy()
            made = Table(entries, cumulative, self.orders, self.recent_orders, self.by_kind)
            self._table = self.entries, made
        return self._table[1]

    def followers(self, ids: Tensor, past: Tensor | None = None) -> Followers:
        """What came after the contexts at each of ids (B, T), after ``past`` (B, R), if any; of the
        B * T places."""
        places = []
        before = self._nearest(ids[:, :0] if past is None else past).tolist()
        for row, known in zip(ids.tolist(), before, strict=True):
            reader = Reader(self.table(), known)
            for token in row:
                reader.read(token)
                places.append(reader.place())
        return self.table().followers(places)

    def mix(self, logits: Tensor, states: Tensor, found: Followers) -> Tensor:
        """The network's logits (B, T, V) -> the log-probabilities of the mixture, (B, T, V). For
        any weights and gradients, a place at a time: training and writing have faster ways.

        Args:
            states: (B, T, D), the network's.
            found: what followed the contexts at each of the B * T places.
        """
        times, distinct, context, token, share = (
            torch.from_numpy(part).to(states.device) for part in found
        )
        shape = (*states.shape[:2], -1)
        hints = self.by_state(states).float()
        rest, weights = self._shares(times.view(shape), distinct.view(shape), hints)
        counted = torch.zeros_like(logits, dtype=torch.float32).flatten()
        counted = counted.index_add(0, token, weights.flatten()[context] * share).view_as(logits)
        return torch.addcmul(counted, logits.float().softmax(-1), rest[..., None]).log()

    def _nearest(self, past: Tensor) -> Tensor:
        """The last ``recent_len`` of past (B, R)."""
        return past[:, max(0, past.shape[1] - self.recent_len) :]

    def _ranges(self, digest: Tensor, complete: Tensor) -> tuple[Tensor, Tensor]:
        """Where the table's entries of each context begin and end; all (B, T, N)."""
        begin = torch.searchsorted(self.entries, key(digest, 0))
        end = torch.searchsorted(self.entries, key(digest, 2**TOKEN_BITS - 1), right=True)
        return begin, torch.where(complete, end, begin)

    def _met_in_table(self, ids: Tensor, follower: Tensor, past: Tensor, leave_out: bool) -> Met:
        """ids, follower: (B, T), past: (B, R)."""
        digest, complete = contexts(ids, self.orders, past)
        begin, end = self._ranges(digest, complete)
        pair = key(digest, follower[..., None])
        place = torch.searchsorted(self.entries, pair).clamp_(max=len(self.entries) - 1)
        found = (self.entries[place] == pair) & (end > begin)
        hits = torch.where(found, self.cumulative[place + 1] - self.cumulative[place], 0)
        times, distinct = self.cumulative[end] - self.cumulative[begin], end - begin
        if leave_out:
            by_context, by_pair = Runs(key(digest, 0)), Runs(pair)
            only_here = (by_pair.rank() == 0) & (hits == by_pair.size())
            out = self._is_part(ids, follower, (times > 0) & (hits == 0)).long()
            times = (times - out * by_context.size()).clamp_(min=0)
            distinct = (distinct - out * by_context.total(only_here.long())).clamp_(min=0)
            hits = (hits - out * by_pair.size()).clamp_(min=0)
            # What is left of a context may be met once: then, too, it has no longer ones.
            times = torch.where(F.pad(times[..., :-1], (1, 0), value=2) > 1, times, 0)
        return Met(times, distinct, hits)

    def _is_part(self, ids: Tensor, follower: Tensor, other: Tensor) -> Tensor:
        """Which rows are part of the text counted, (B, 1, 1): each of their contexts was there
        followed by the same token, too. Lines may begin and end elsewhere.

        Args:
            ids, follower: (B, T).
            other: (B, T, N), which contexts were met, but never with this follower.
        """
        place = torch.arange(ids.shape[1], device=ids.device)
        behind = place - torch.where(ids == BOS, place, -1).cummax(1).values  # in this line
        inner = behind[..., None] >= torch.tensor(self.orders, device=ids.device)
        return ~(other & inner & (follower != EOS)[..., None]).any(2, keepdim=True).any(1, True)

    def _met_recently(self, ids: Tensor, follower: Tensor, past: Tensor) -> Met:
        """ids, follower: (B, T), past: (B, R)."""
        r = past.shape[1]
        ids = torch.cat((past, ids), dim=1)
        follower = torch.cat((following(ids)[:, :r], follower), dim=1)
        digest, complete = contexts(ids, self.recent_orders)
        by_context, by_pair = Runs(key(digest, 0)), Runs(key(digest, follower[..., None]))
        is_new = (by_pair.rank() == 0).long()
        times = torch.where(complete, by_context.rank(), 0)
        met = Met(times, by_context.total_before(is_new), by_pair.rank())
        return Met(*(m[:, r:] for m in met))

    def _shares(self, times: Tensor, distinct: Tensor, hints: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of the network, (B, T), and of each order, (B, T, N), in the mixture, from how
        often its context was met, by how many tokens it was followed, and what `by_state` makes of
        the network's states, all (B, T, N). All by length."""
        score = (
            (times + 1).log() * self.by_count[:, 0]
            + (distinct + 1).log() * self.by_count[:, 1]
            + self.by_count[:, 2]
            + hints
        )
        weights = torch.where(times > 0, score.sigmoid(), 0.0)
        left = (1 - weights).flip(-1).cumprod(-1).flip(-1)  # by an order and all after it
        shares = SURE * weights * F.pad(left[..., 1:], (0, 1), value=1.0)
        return 1 - SURE + SURE * left[..., 0], shares


def counted_pieces(n: int) -> np.ndarray:
    """Where the pieces begin, ``PIECE`` bytes each, whose n-grams are counted of a stream of n."""
    if n <= COUNTED:
        return np.arange(0, n, PIECE)
    return np.linspace(0, n - PIECE, COUNTED // PIECE).astype(np.int64)


def key(digest: Tensor, token: Tensor | int) -> Tensor:
    """What an entry is sorted and found by: a context's hash, and the token after it."""
    return digest << TOKEN_BITS | token


def following(ids: Tensor) -> Tensor:
    """What came after each of ids (B, T) as a target, (B, T); PAD after the last."""
    after = F.pad(ids[:, 1:], (0, 1), value=PAD)
    return torch.where(after == BOS, EOS, after)


def contexts(
    ids: Tensor, orders: Sequence[int], before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The hashes of the last n tokens at each of ids (B, T), after ``before`` (B, R), for each
    order, and whether there are so many since BOS; both (B, T, N)."""
    reach, longest = 0, max(orders)
    if before is not None:
        before = before[:, max(0, before.shape[1] - longest + 1) :]
        ids, reach = torch.cat((before, ids), dim=1), before.shape[1]
    hashes = list(ngram_hashes(ids, longest, reach))
    digests, complete = zip(*(hashes[n - 1] for n in orders), strict=True)
    return torch.stack(digests, dim=-1), torch.stack(complete, dim=-1)


class Runs:
    """The positions of a row that share a key, for keys (B, T, N), each order by itself."""

    def __init__(self, keys: Tensor) -> None:
        ordered, self.order = keys.sort(dim=1, stable=True)
        n = keys.shape[1]
        self.index = torch.arange(n, device=keys.device)[:, None].expand_as(keys)
        begins = F.pad(ordered[:, 1:] != ordered[:, :-1], (0, 0, 1, 0), value=True)
        self.begin = torch.where(begins, self.index, 0).cummax(1).values
        ends = F.pad(begins[:, 1:], (0, 0, 0, 1), value=True)
        self.end = torch.where(ends, self.index + 1, n).flip(1).cummin(1).values.flip(1)

    def _unsort(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).scatter_(1, self.order, values)

    def _sums(self, values: Tensor) -> Tensor:
        return F.pad(values.gather(1, self.order).cumsum(1), (0, 0, 1, 0))

    def rank(self) -> Tensor:
        """How many positions before have the same key, (B, T, N)."""
        return self._unsort(self.index - self.begin)

    def size(self) -> Tensor:
        """How many positions in all have the same key, (B, T, N)."""
        return self._unsort(self.end - self.begin)

    def total_before(self, values: Tensor) -> Tensor:
        """The sum of values (B, T, N) over the positions before with the same key, (B, T, N)."""
        sums = self._sums(values)
        return self._unsort(sums[:, :-1] - sums.gather(1, self.begin))

    def total(self, values: Tensor) -> Tensor:
        """The sum of values (B, T, N) over all positions with the same key, (B, T, N)."""
        sums = self._sums(values)
        return self._unsort(sums.gather(1, self.end) - sums.gather(1, self.begin))
