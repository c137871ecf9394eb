"""Counts of the n-grams of the training text, and of the text just read, for training.

An *entry* is a context and the token that continued it. A context of order n is the last n tokens.
The table holds all entries of all orders in one sorted array, so that the entries of one context
lie side by side.

Shapes: B rows, T positions, N orders, E entries, M pairs of a context and a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..console import print0
from ..data.stream import ByteStream
from ..files import mmap_cached
from ..tokenizer import BOS, EOS, PAD, inputs_to_targets
from .counting import count_ngrams
from .entries import (
    COUNT_BITS,
    COUNTS,
    MAX_CODE,
    Entries,
    chunks,
    entry_key,
    entry_tokens,
    last_key,
)
from .hashing import WORD_ORDERS, order_lengths

TABLE_ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
TABLE_VERSION = 3  # of the entries that a text becomes: changing it counts again
BYTES_PER_ENTRY = 8
ANNOUNCED_BYTES = 10**7  # of a stream from which a line says that it is counted: it takes a while


def is_valid_table(entries: Tensor) -> bool:
    """Whether int64 entries from a file are those of an `NgramTable`: sorted, of tokens that can
    come next, with counts."""
    if entries.ndim != 1:
        return False
    keys = entries.numpy()
    for chunk in chunks(len(keys)):
        tokens, codes = entry_tokens(keys[chunk]), keys[chunk] & MAX_CODE
        is_sorted = (np.diff(keys[max(0, chunk.start - 1) : chunk.stop] >> COUNT_BITS) > 0).all()
        if not (is_sorted and ((tokens < PAD) | (tokens == EOS)).all() and codes.all()):
            return False
    return True


class ContextCounts(NamedTuple):
    """Counts of the contexts of each order at each position.

    ``context_count``: how often the context occurred, 0 if it is not to be used, (B, N, T).
    ``n_continuations``: by how many different tokens it was continued, (B, N, T).
    ``continuation_count``: how often by the token that comes next here, (B, N, T).

    Then M pairs of a context and a token that continued it, (M,) each: ``context_index`` into the
    B * N * T contexts, ``tokens``, and ``counts``. A pair may be there several times; its counts
    add up, and negative ones are subtracted. The contexts that are not to be used have pairs, too.
    """

    context_count: Tensor
    n_continuations: Tensor
    continuation_count: Tensor
    context_index: Tensor
    tokens: Tensor
    counts: Tensor


class EarlierCounts(NamedTuple):
    """N-gram counts of other text, to which those of a stream are added.

    ``checksum`` identifies them. ``load`` returns them: entries, and the count below which contexts
    were dropped. It is only called if there is no cache file.
    """

    checksum: str
    load: Callable[[], tuple[Entries, int]]


class NgramTable(nn.Module):
    """N-gram counts of the training text.

    An n-gram that occurred once says as much as any longer one, so hardly any longer ones are
    stored.
    """

    entries: Tensor  # (E,) int64, see entries.py
    count_values: Tensor  # (2^COUNT_BITS,) int64: the count of each code
    min_count: Tensor  # () int64: contexts that occurred less often are not stored

    def __init__(self, orders: Sequence[int]) -> None:
        super().__init__()
        self.orders = list(orders)
        self.n_words = sum(order in WORD_ORDERS for order in orders)  # they come first
        self.is_built = False  # from the text that the model is trained on
        self.register_buffer("entries", torch.empty(0, dtype=torch.int64))
        self.register_buffer("min_count", torch.ones((), dtype=torch.int64))
        self.register_buffer("count_values", torch.from_numpy(COUNTS), persistent=False)

    def build(
        self,
        stream: ByteStream,
        path: Path | None = None,
        max_bytes: int = 2**40,
        progress: Callable[[int], object] = lambda n: None,
        earlier: EarlierCounts | None = None,
    ) -> None:
        """Counts the n-grams of a stream.

        Args:
            path: cache file; the table is read from it if it was made from the same text.
            max_bytes: of the table in memory.
            progress: see `count_ngrams`.
            earlier: counts to add those of the stream to.
        """
        self.is_built = True
        max_entries = max_bytes // BYTES_PER_ENTRY

        def count() -> tuple[Entries, int]:
            if len(stream) >= ANNOUNCED_BYTES:
                print0(f"counting n-grams of {len(stream) / 1e6:,.0f} MB")
            start = None if earlier is None else earlier.load()
            return count_ngrams(stream, self.orders, max_entries, progress, start)

        if path is None:
            entries, min_count = count()
            self.entries, self.min_count = torch.from_numpy(entries), torch.tensor(min_count)
            return

        def write(file: IO[bytes]) -> None:
            entries, min_count = count()
            file.write(np.int64(min_count).tobytes())
            file.write(entries.data)

        source = f"{len(stream)} {zlib.crc32(stream.data):08x}"
        key = f"{TABLE_VERSION} {self.orders} {source} {max_entries}"
        if earlier is not None:
            key += f" after {earlier.checksum}"
        data = torch.from_numpy(mmap_cached(path, key, write).view(np.int64))
        self.min_count, self.entries = data[0].clone(), data[1:]

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        loaded = state.get(prefix + "entries")  # their number depends on the text
        if loaded is not None:
            if self.entries.shape == loaded.shape and self.entries.equal(
                loaded.to(self.entries.device)
            ):
                state[prefix + "entries"] = self.entries  # copying would load a memory-mapped table
            else:
                self.entries = torch.empty_like(loaded, device=self.entries.device)
                self.is_built = False
        super()._load_from_state_dict(state, prefix, *rest)

    def lookup(
        self,
        hashes: Tensor,
        is_valid: Tensor,
        ids: Tensor,
        next_tokens: Tensor,
        leave_one_out: bool,
    ) -> ContextCounts:
        """Looks up the contexts at all positions.

        Args:
            hashes, is_valid: of the contexts, (B, N, T), see `ContextHasher.hashes`.
            ids, next_tokens: (B, T), the window and what comes after each of its tokens.
            leave_one_out: subtract the counts of windows that are part of the counted text: all
                windows if this table was built, and if it was loaded, those that seem to be.
        """
        # Step 1: find the range of each context's entries, and the entry of the next token.
        keys, next_keys = entry_key(hashes), entry_key(hashes, next_tokens[:, None])
        begin = torch.searchsorted(self.entries, keys)
        end = torch.searchsorted(self.entries, last_key(keys), right=True)
        n_continuations = torch.where(is_valid, end - begin, 0)
        continuation_count = self._counts_of(next_keys) * is_valid
        ranges = [(begin.flatten(), n_continuations.flatten())]
        if leave_one_out:
            # In the window each context occurs same_context.size times, each entry same_entry.size
            # times.
            same_context, same_entry = GroupedPositions(keys), GroupedPositions(next_keys)
            is_known = continuation_count >= same_entry.size
            own = OwnContinuations(same_context, same_entry, is_known)
            ranges.append((own.begin, own.size))
        # Step 2: read the entries.
        (index, context_index), *own_ranges = concatenate_ranges(*ranges)
        entries = self.entries[index]
        tokens, counts = entry_tokens(entries), self.count_values[entries & MAX_CODE]
        total, last = F.pad(counts.cumsum(0), (1, 0)), n_continuations.flatten().cumsum(0)
        total = total[F.pad(last, (1, 0))]
        context_count = (total[1:] - total[:-1]).view_as(n_continuations)
        if not leave_one_out:
            return ContextCounts(
                context_count, n_continuations, continuation_count, context_index, tokens, counts
            )
        # Step 3: subtract what the window itself added, if it is part of the counted text. An entry
        # that occurs nowhere else is a continuation less. Where a row was cut out of a line, its
        # end is an entry that the table does not hold.
        only_here = (same_entry.rank == 0) & (continuation_count == same_entry.size)
        counted = torch.ones_like(ids[:, :1, None])  # of each row
        if not self.is_built:
            unseen = (context_count > 0) & (continuation_count == 0)
            counted = self._is_counted(ids, next_tokens, unseen).long()
        held = counted * is_known
        is_left = context_count > counted * same_context.size
        context_count = torch.where(is_left, context_count - same_context.total(held), 0)
        is_left = context_count >= counted * self.min_count
        context_count = torch.where(is_left, context_count, 0)
        n_continuations = n_continuations - counted * same_context.total(only_here.long())
        n_continuations = n_continuations.clamp_(min=0)
        continuation_count = continuation_count - held * same_entry.size
        # An n-gram of which one occurrence is left has no longer ones either.
        is_frequent = context_count[:, self.n_words : -1] > 1
        is_frequent = F.pad(is_frequent, (0, 0, self.n_words + 1, 0), value=True)
        context_count = torch.where(is_frequent, context_count, 0)
        own_index, own_tokens, own_counts = own.pairs(next_tokens, *own_ranges[0])
        if not self.is_built:
            own_counts = own_counts * counted.expand_as(hashes).flatten()[own_index]
        return ContextCounts(
            context_count,
            n_continuations,
            continuation_count,
            torch.cat((context_index, own_index)),
            torch.cat((tokens, own_tokens)),
            torch.cat((counts, -own_counts)),
        )

    def _counts_of(self, keys: Tensor) -> Tensor:
        """Returns the counts of entries by their keys, 0 of those that the table does not hold:
        (B, N, T) -> (B, N, T)."""
        if not len(self.entries):
            return torch.zeros_like(keys)
        index = torch.searchsorted(self.entries, keys).clamp_(max=len(self.entries) - 1)
        code = self.entries[index] ^ keys  # the key of another entry differs in higher bits
        return self.count_values[code & MAX_CODE] * ((code >= 0) & (code <= MAX_CODE))

    def _is_counted(self, ids: Tensor, next_tokens: Tensor, unseen: Tensor) -> Tensor:
        """Which rows are part of the counted text, (B, 1, 1) bool.

        A row counts as such if each of its contexts that is in the table was also followed there by
        the row's next token. The beginning and the end of a document are ignored: a row may be cut
        out of the middle of one.

        Args:
            ids, next_tokens: (B, T).
            unseen: (B, N, T), contexts of the table that the next token never continued.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        since_bos = position - torch.where(ids == BOS, position, -1).cummax(1).values
        lengths = order_lengths(tuple(self.orders[self.n_words :]), ids.device)
        is_inside = since_bos[:, None] >= lengths
        evidence = unseen[:, self.n_words :] & is_inside & (next_tokens != EOS)[:, None]
        return ~evidence.flatten(1).any(1)[:, None, None]


def recent_counts(
    hashes: Tensor, is_valid: Tensor, next_tokens: Tensor, first: int
) -> ContextCounts:
    """Counts the contexts at each position in the text up to it (a cache model: Kuhn & De Mori
    1990).

    Args:
        hashes, is_valid: of the contexts in the window and in the text before it, (B, N, T).
        next_tokens: what comes after each token, (B, T).
        first: where the window begins: what is returned of earlier positions does not matter.
    """
    same_context = GroupedPositions(entry_key(hashes))
    same_entry = GroupedPositions(entry_key(hashes, next_tokens[:, None]))
    own = OwnContinuations(same_context, same_entry, is_valid, first)
    (range_,) = concatenate_ranges((own.begin, own.size))
    return ContextCounts(
        torch.where(is_valid, same_context.rank, 0),
        same_context.total_before((same_entry.rank == 0).long()),
        same_entry.rank,
        *own.pairs(next_tokens, *range_),
    )


class GroupedPositions:
    """Groups the positions of a row that share a key; keys (B, N, T), each order by itself."""

    def __init__(self, keys: Tensor) -> None:
        sorted_keys, self.sort_index = keys.sort(dim=-1, stable=True)
        n = keys.shape[-1]
        self.index = torch.arange(n, device=keys.device).expand_as(keys)
        is_first = F.pad(sorted_keys[..., 1:] != sorted_keys[..., :-1], (1, 0), value=True)
        self.begin = torch.where(is_first, self.index, 0).cummax(-1).values
        self.is_last = F.pad(is_first[..., 1:], (0, 1), value=True)

    @cached_property
    def end(self) -> Tensor:
        """Where each group ends in sorted order, (B, N, T)."""
        end = torch.where(self.is_last, self.index + 1, self.index.shape[-1])
        return end.flip(-1).cummin(-1).values.flip(-1)

    def by_position(self, values: Tensor) -> Tensor:
        """Returns values (B, N, T) in sorted order in the order of the positions."""
        return torch.empty_like(values).scatter_(-1, self.sort_index, values)

    def _cumulative(self, values: Tensor) -> Tensor:
        return F.pad(values.gather(-1, self.sort_index).cumsum(-1), (1, 0))

    @cached_property
    def rank(self) -> Tensor:
        """Number of earlier positions with the same key, (B, N, T)."""
        return self.by_position(self.index - self.begin)

    @cached_property
    def size(self) -> Tensor:
        """Number of positions with the same key, (B, N, T)."""
        return self.by_position(self.end - self.begin)

    def total_before(self, values: Tensor) -> Tensor:
        """Sum of values (B, N, T) over the earlier positions with the same key, (B, N, T)."""
        sums = self._cumulative(values)
        return self.by_position(sums[..., :-1] - sums.gather(-1, self.begin))

    def total(self, values: Tensor) -> Tensor:
        """Sum of values (B, N, T) over all positions with the same key, (B, N, T)."""
        sums = self._cumulative(values)
        return self.by_position(sums.gather(-1, self.end) - sums.gather(-1, self.begin))


class OwnContinuations:
    """Pairs the context at each position with the different tokens that continued it in its row.

    There are as many pairs as different tokens, not as occurrences: in a text that repeats itself
    those would be quadratic.

    All positions of all rows and orders are taken in the order of their contexts: (B * N * T,). The
    first position of each entry is paired with a range of positions of the same context, from
    ``begin`` on, ``size`` of them; that is 0 at other positions.

    Args:
        same_context, same_entry: positions grouped by context, and by context and next token.
        is_used: (B, N, T), whether a context is paired with its next token.
        first: only positions from this one on, with what came before each of them; by default all
            positions, with all of the row.
    """

    def __init__(
        self,
        same_context: GroupedPositions,
        same_entry: GroupedPositions,
        is_used: Tensor,
        first: int | None = None,
    ) -> None:
        self.same_entry, self.first, n = same_entry, first, is_used.shape[-1]
        order = same_context.sort_index
        row = torch.arange(0, is_used.numel(), n, device=is_used.device)
        self.row = row.view(*is_used.shape[:2], 1)
        self.context_index = (self.row + order).flatten()
        begin, end = same_context.begin, same_context.end
        if first is not None:
            n_before = F.pad((order < first).cumsum(-1), (1, 0))
            begin = begin + n_before.gather(-1, end) - n_before.gather(-1, begin)
            begin = torch.maximum(begin, same_context.index + 1)
        is_first = ((same_entry.rank == 0) & is_used).gather(-1, order)
        self.size = ((end - begin).clamp(min=0) * is_first).flatten()
        self.begin = (self.row + begin).flatten()

    def pairs(
        self, next_tokens: Tensor, other: Tensor, entry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns indices into the B * N * T contexts, tokens, and how often each token continued
        the context, (M,) each.

        Args:
            next_tokens: (B, T).
            other, entry: (M,), positions paired, and the position of the entry of each; see
                `concatenate_ranges`.
        """
        same_entry, context_index = self.same_entry, self.context_index[other]
        entry = self.context_index[entry]
        tokens = next_tokens[:, None].expand_as(same_entry.index).flatten()[entry]
        if self.first is None:
            return context_index, tokens, same_entry.size.flatten()[entry]
        # Count the entry before the position: those of an entry are sorted by position.
        n = next_tokens.shape[1]
        group = (self.row + same_entry.by_position(same_entry.begin)).flatten()[entry]
        sorted_group = (self.row + same_entry.begin) * n + same_entry.sort_index
        position = context_index % n
        earlier = torch.searchsorted(sorted_group.flatten(), group * n + position)
        return context_index, tokens, earlier - group


def concatenate_ranges(*ranges: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns for each set of ranges of numbers these numbers one after another, and which range
    each is of, (M,). The host waits once for the device, to learn how many there are.

    Args:
        ranges: their beginnings and sizes.
    """
    n_numbers = torch.stack([size.sum() for _, size in ranges]).tolist()
    results = []
    for (begin, size), n in zip(ranges, n_numbers, strict=True):
        of_range = torch.repeat_interleave(size, output_size=n)
        offset = begin + size - size.cumsum(0)
        numbers = torch.arange(n, device=size.device) + offset[of_range]
        results.append((numbers, of_range))
    return results


def following_tokens(ids: Tensor) -> Tensor:
    """Returns the token after each of ids (B, T) as a target, (B, T); PAD after the last."""
    after: Tensor = inputs_to_targets(F.pad(ids[:, 1:], (0, 1), value=PAD))
    return after
