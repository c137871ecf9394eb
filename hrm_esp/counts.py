"""What followed what in the training text: n-gram counts that the network falls back from.

A network needs many passes to learn by heart what a table holds after one. So the Executor leaves
rote to a table, and learns what the table cannot know.

Shapes: B rows, T positions, N orders, D = d_model, V = vocab_size, E entries of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HRMConfig
from .data import BREAK, Stream
from .layers import ngram_hashes
from .tokenizer import BOS, EOS, VOCAB_SIZE

ORDERS = (3, 4, 5, 6, 8, 12, 16, 24, 32)  # lower ones are no match for a network
COUNTED = 2**24  # bytes counted at most: of a larger text, pieces from all of it
PIECE = 2**16
TOKEN_BITS = 9
SURE = 1 - 2**-12  # the largest weight of a count: what was never seen stays possible


class NgramCounts(nn.Module):
    """Mixes the network's distribution with relative frequencies after contexts of rising order.

    Deleted interpolation (Jelinek & Mercer 1980): p_n = p_(n-1) + w_n (c_n / N_n - p_(n-1)), where
    p_0 is the network's, and c_n of the N_n times that the last n tokens were met in the training
    text, this one came next. The weight w_n is that of Witten & Bell (1991, method C) at first: the
    more often a context was met, and the fewer tokens followed it, the more it is trusted. From
    there it is learned, as a function of both and of the network's state.

    A context met once says all that longer ones can: the table has none of those.
    """

    entries: Tensor  # (E,) int64, sorted: hash of the context and what followed it
    cumulative: Tensor  # (E + 1,) int32: the times all entries before were met

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.orders = [n for n in ORDERS if n <= config.count_max]
        self.register_buffer("entries", torch.empty(0, dtype=torch.int64))
        self.register_buffer("cumulative", torch.zeros(1, dtype=torch.int32))
        self.by_count = nn.Parameter(torch.tensor([1.0, -1.0, 0.0]).repeat(len(self.orders), 1))
        self.by_state = nn.Linear(config.d_model, len(self.orders), bias=False)
        nn.init.zeros_(self.by_state.weight)

    @property
    def reach(self) -> int:
        """How many tokens before its own a position's contexts may take in."""
        return self.orders[-1] - 1

    def count(self, stream: Stream) -> None:
        """Makes the table from a stream of bytes."""
        if len(stream) > COUNTED:
            starts = np.linspace(0, len(stream) - PIECE, COUNTED // PIECE).astype(np.int64)
            stream = np.concatenate([stream[i : i + PIECE] for i in starts])
        tokens = torch.from_numpy(stream.astype(np.int64))
        targets = torch.where(tokens == BREAK, EOS, tokens)[1:]
        tokens = torch.where(tokens == BREAK, BOS, tokens)[:-1]
        entries, counts = [], []
        known = torch.ones_like(tokens, dtype=torch.bool)
        for order, (digest, complete) in enumerate(ngram_hashes(tokens[None], self.orders[-1]), 1):
            if order not in self.orders:
                continue
            (places,) = (known & complete[0]).nonzero(as_tuple=True)
            found, order_of = self._keys(digest[0, places], targets[places]).sort()
            entry, times = found.unique_consecutive(return_counts=True)
            entries.append(entry)
            counts.append(times)
            _, which, met = (found >> TOKEN_BITS).unique_consecutive(
                return_inverse=True, return_counts=True
            )
            known.zero_()
            known[places[order_of[met[which] > 1]]] = True
        self.entries, order_of = torch.cat(entries).sort()
        self.cumulative = F.pad(torch.cat(counts)[order_of].cumsum(0), (1, 0)).int()

    @staticmethod
    def _keys(digest: Tensor, token: Tensor | int) -> Tensor:
        return digest << TOKEN_BITS | token

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("entries", "cumulative"):  # as long as the text made them
            if prefix + name in state:
                setattr(
                    self, name, torch.empty_like(state[prefix + name], device=self.entries.device)
                )
        super()._load_from_state_dict(state, prefix, *rest)

    def _contexts(self, ids: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids: (B, T) after ``before`` (B, reach) -> the hash of each order's context, and where its
        entries begin and end; all (B, T, N)."""
        pairs = list(ngram_hashes(torch.cat((before, ids), dim=1), self.orders[-1], len(before[0])))
        digest = torch.stack([pairs[n - 1][0] for n in self.orders], dim=-1)
        complete = torch.stack([pairs[n - 1][1] for n in self.orders], dim=-1)
        begin = torch.searchsorted(self.entries, self._keys(digest, 0))
        end = torch.searchsorted(self.entries, self._keys(digest, 2**TOKEN_BITS - 1), right=True)
        return digest, begin, torch.where(complete, end, begin)

    def _weights(self, met: Tensor, distinct: Tensor, states: Tensor) -> Tensor:
        """w_n, (B, T, N), from how often a context was ``met``, by how many ``distinct`` tokens it
        was followed, both (B, T, N), and the network's states (B, T, D)."""
        # After leaving out, too, a context met once has no longer ones.
        known = (met > 0) & (F.pad(met[..., :-1], (1, 0), value=2) > 1)
        score = (
            (met + 1).log() * self.by_count[:, 0]
            + (distinct + 1).log() * self.by_count[:, 1]
            + self.by_count[:, 2]
            + self.by_state(states).float()
        )
        return torch.where(known, SURE * score.sigmoid(), 0.0)

    def probability(
        self,
        p: Tensor,
        states: Tensor,
        ids: Tensor,
        before: Tensor,
        targets: Tensor,
        leave_out: bool,
    ) -> Tensor:
        """The probability of each target, (B, T).

        Args:
            p: (B, T), the network's.
            states: (B, T, D), the network's.
            ids, before: (B, T) and (B, reach), the tokens read.
            targets: (B, T).
            leave_out: the targets are part of the text counted: each is taken out of it, so that
                what the table knows of a text it is made from is what it knows of any other.
        """
        digest, begin, end = self._contexts(ids, before)
        key = self._keys(digest, targets[..., None])
        place = torch.searchsorted(self.entries, key).clamp_(max=len(self.entries) - 1)
        times = self.cumulative[place + 1] - self.cumulative[place]
        times = torch.where((self.entries[place] == key) & (end > begin), times, 0)
        met, distinct = self.cumulative[end] - self.cumulative[begin], end - begin
        if leave_out:
            met, distinct = met - (times > 0).int(), distinct - (times == 1).int()
            times = (times - 1).clamp_(min=0)
        weights = self._weights(met, distinct, states)
        frequency = times / met.clamp(min=1)
        for n in range(len(self.orders)):
            p = p + weights[..., n] * (frequency[..., n] - p)
        return p

    def mix(self, logits: Tensor, states: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """The network's logits (B, T, V) -> the log-probabilities of the mixture, (B, T, V); the
        other arguments as in `probability`."""
        _, begin, end = self._contexts(ids, before)
        met, distinct = self.cumulative[end] - self.cumulative[begin], end - begin
        weights = self._weights(met, distinct, states)
        rest = (1 - weights).flip(-1).cumprod(-1).flip(-1)  # what order n and those above leave
        share = (weights * F.pad(rest[..., 1:], (0, 1), value=1.0) / met.clamp(min=1)).flatten()
        # All entries of all contexts, one after another, each with the row it belongs to.
        size = distinct.flatten()
        context = torch.repeat_interleave(size)
        place = torch.arange(len(context), device=size.device)
        place += (begin.flatten() - size.cumsum(0) + size)[context]
        times = self.cumulative[place + 1] - self.cumulative[place]
        token = self.entries[place] & (2**TOKEN_BITS - 1)
        p = logits.float().softmax(-1) * rest[..., :1]
        row = context // len(self.orders)
        p.view(-1).index_add_(0, row * VOCAB_SIZE + token, times * share[context])
        return p.log()
