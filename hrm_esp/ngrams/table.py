"""Counts of the n-grams of the training text, and of the text just read, for training.

An *entry* is a context and the token that continued it. A context of order n is the last n tokens.
The table holds all entries of all orders in one sorted array, so that the entries of one context
lie side by side.

Shapes: B rows, T positions, R preceding positions, N orders, E entries, M pairs of a context and a
token.
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
from .hashing import WORD_ORDERS, ContextHasher

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
    """Counts of the contexts at each position, for each order.

    ``context_count``: how often the context occurred, 0 if it is not to be used, (B, T, N).
    ``n_continuations``: by how many different tokens it was continued, (B, T, N).
    ``continuation_count``: how often by the token that comes next here, (B, T, N).

    Then M pairs of a context and a token that continued it, (M,) each: ``context_index`` into the
    B * T * N contexts, ``tokens``, and ``counts``. A pair may be there several times; its counts
    add up, and negative ones are subtracted.
    """

    context_count: Tensor
    n_continuations: Tensor
    continuation_count: Tensor
    context_index: Tensor
    tokens: Tensor
    counts: Tensor


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
    ) -> None:
        """Counts the n-grams of a stream.

        Args:
            path: cache file; the table is read from it if it was made from the same text.
            max_bytes: of the table in memory.
            progress: see `count_ngrams`.
        """
        self.is_built = True
        max_entries = max_bytes // BYTES_PER_ENTRY

        def count() -> tuple[Entries, int]:
            if len(stream) >= ANNOUNCED_BYTES:
                print0(f"counting n-grams of {len(stream) / 1e6:,.0f} MB")
            return count_ngrams(stream, self.orders, max_entries, progress)

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
        self, ids: Tensor, next_tokens: Tensor, preceding_ids: Tensor, leave_one_out: bool
    ) -> ContextCounts:
        """Looks up the contexts at all positions.

        Args:
            ids, next_tokens: (B, T), the window and what comes after each of its tokens.
            preceding_ids: (B, R), the text before the window.
            leave_one_out: subtract the counts of windows that are part of the counted text: all
                windows if this table was built, and if it was loaded, those that seem to be.
        """
        # Step 1: find the range of each context's entries.
        hashes, valid = ContextHasher(ids, preceding_ids).hashes(self.orders)
        keys = entry_key(hashes)
        begin = torch.searchsorted(self.entries, keys)
        end = torch.searchsorted(self.entries, last_key(keys), right=True)
        n_continuations = torch.where(valid, end - begin, 0)
        # Step 2: read the entries.
        size = n_continuations.flatten()
        index, context_index = concatenate_ranges(begin.flatten(), begin.flatten() + size)
        entries = self.entries[index]
        token = entry_tokens(entries)
        count = self.count_values[entries & MAX_CODE]
        total = F.pad(count.cumsum(0), (1, 0))
        last = size.cumsum(0)
        context_count = (total[last] - total[last - size]).view_as(n_continuations)
        is_next = token == next_tokens.flatten()[context_index // len(self.orders)]
        continuation_count = torch.zeros_like(n_continuations)
        continuation_count.view(-1)[context_index[is_next]] = count[is_next]
        if not leave_one_out:
            return ContextCounts(
                context_count, n_continuations, continuation_count, context_index, token, count
            )
        # Step 3: subtract what the window itself added, if it is part of the counted text. In the
        # window each context occurs same_context.size times, each entry same_entry.size times;
        # an entry that occurs nowhere else is a continuation less. Where a row was cut out of a
        # line, its end is an entry that the table does not hold.
        same_context = GroupedPositions(keys)
        same_entry = GroupedPositions(entry_key(hashes, next_tokens[..., None]))
        only_here = (same_entry.rank == 0) & (continuation_count == same_entry.size)
        unseen = (context_count > 0) & (continuation_count == 0)
        counted: Tensor | int = 1  # of each row
        if not self.is_built:
            counted = self._is_counted(ids, next_tokens, unseen).long()
        held = counted * (continuation_count >= same_entry.size)
        is_left = context_count > counted * same_context.size
        context_count = torch.where(is_left, context_count - same_context.total(held), 0)
        is_left = context_count >= counted * self.min_count
        context_count = torch.where(is_left, context_count, 0)
        n_continuations = n_continuations - counted * same_context.total(only_here.long())
        n_continuations = n_continuations.clamp_(min=0)
        continuation_count = continuation_count - held * same_entry.size
        # An n-gram of which one occurrence is left has no longer ones either.
        is_frequent = context_count[..., self.n_words : -1] > 1
        is_frequent = F.pad(is_frequent, (self.n_words + 1, 0), value=True)
        context_count = torch.where(is_frequent, context_count, 0)
        own_index, own_tokens, own_counts = pair_continuations(
            same_context, same_entry, next_tokens, context_count > 0, held > 0
        )
        return ContextCounts(
            context_count,
            n_continuations,
            continuation_count,
            torch.cat((context_index, own_index)),
            torch.cat((token, own_tokens)),
            torch.cat((count, -own_counts)),
        )

    def _is_counted(self, ids: Tensor, next_tokens: Tensor, unseen: Tensor) -> Tensor:
        """Which rows are part of the counted text, (B, 1, 1) bool.

        A row counts as such if each of its contexts that is in the table was also followed there by
        the row's next token. The beginning and the end of a document are ignored: a row may be cut
        out of the middle of one.

        Args:
            ids, next_tokens: (B, T).
            unseen: (B, T, N), contexts of the table that the next token never continued.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        since_bos = position - torch.where(ids == BOS, position, -1).cummax(1).values
        orders = torch.tensor(self.orders[self.n_words :], device=ids.device)
        is_inside = since_bos[..., None] >= orders
        evidence = unseen[..., self.n_words :] & is_inside & (next_tokens != EOS)[..., None]
        return ~evidence.any(2, keepdim=True).any(1, True)


def recent_counts(
    ids: Tensor, next_tokens: Tensor, preceding_ids: Tensor, orders: Sequence[int]
) -> ContextCounts:
    """Counts the contexts at all positions in the text just read: the window up to the position,
    and ``preceding_ids`` before it (a cache model: Kuhn & De Mori 1990).

    Args:
        ids, next_tokens: (B, T), the window and what comes after each of its tokens.
        preceding_ids: (B, R), the text before the window.
    """
    n_preceding = preceding_ids.shape[1]
    ids = torch.cat((preceding_ids, ids), dim=1)
    next_tokens = torch.cat((following_tokens(ids)[:, :n_preceding], next_tokens), dim=1)
    hashes, valid = ContextHasher(ids).hashes(orders)
    same_context = GroupedPositions(entry_key(hashes))
    same_entry = GroupedPositions(entry_key(hashes, next_tokens[..., None]))
    is_first = (same_entry.rank == 0).long()
    context_count = torch.where(valid, same_context.rank, 0)
    n_continuations = same_context.total_before(is_first)
    continuation_count = same_entry.rank
    is_used = context_count > 0
    is_used[:, :n_preceding] = False
    context_index, tokens, counts = pair_continuations(
        same_context, same_entry, next_tokens, is_used, torch.ones_like(is_used), n_preceding
    )
    # The row's contexts begin with those of the preceding text.
    row = context_index // (len(orders) * ids.shape[1])
    context_index = context_index - (row + 1) * len(orders) * n_preceding
    return ContextCounts(
        context_count[:, n_preceding:],
        n_continuations[:, n_preceding:],
        continuation_count[:, n_preceding:],
        context_index,
        tokens,
        counts,
    )


class GroupedPositions:
    """Groups the positions of a row that share a key; keys (B, T, N), each order by itself."""

    def __init__(self, keys: Tensor) -> None:
        sorted_keys, self.sort_index = keys.sort(dim=1, stable=True)
        n = keys.shape[1]
        self.index = torch.arange(n, device=keys.device)[:, None].expand_as(keys)
        is_first = F.pad(sorted_keys[:, 1:] != sorted_keys[:, :-1], (0, 0, 1, 0), value=True)
        self.begin = torch.where(is_first, self.index, 0).cummax(1).values
        is_last = F.pad(is_first[:, 1:], (0, 0, 0, 1), value=True)
        self.end = torch.where(is_last, self.index + 1, n).flip(1).cummin(1).values.flip(1)

    def by_position(self, values: Tensor) -> Tensor:
        """Returns values (B, T, N) in sorted order in the order of the positions."""
        return torch.empty_like(values).scatter_(1, self.sort_index, values)

    def _cumulative(self, values: Tensor) -> Tensor:
        return F.pad(values.gather(1, self.sort_index).cumsum(1), (0, 0, 1, 0))

    @cached_property
    def rank(self) -> Tensor:
        """Number of earlier positions with the same key, (B, T, N)."""
        return self.by_position(self.index - self.begin)

    @cached_property
    def size(self) -> Tensor:
        """Number of positions with the same key, (B, T, N)."""
        return self.by_position(self.end - self.begin)

    def total_before(self, values: Tensor) -> Tensor:
        """Sum of values (B, T, N) over the earlier positions with the same key, (B, T, N)."""
        sums = self._cumulative(values)
        return self.by_position(sums[:, :-1] - sums.gather(1, self.begin))

    def total(self, values: Tensor) -> Tensor:
        """Sum of values (B, T, N) over all positions with the same key, (B, T, N)."""
        sums = self._cumulative(values)
        return self.by_position(sums.gather(1, self.end) - sums.gather(1, self.begin))


def pair_continuations(
    same_context: GroupedPositions,
    same_entry: GroupedPositions,
    next_tokens: Tensor,
    is_used: Tensor,
    is_held: Tensor,
    first: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs the context at each position with the different tokens that continued it in its row.

    There are as many pairs as different tokens, not as occurrences: in a text that repeats itself
    those would be quadratic.

    Args:
        same_context, same_entry: positions grouped by context, and by context and next token.
        next_tokens: (B, T).
        is_used: (B, T, N), whether a context is paired.
        is_held: (B, T, N), whether a context is paired with its next token.
        first: only positions from this one on, with what came before each of them; by default all
            positions, with all of the row.

    Returns:
        Indices into the B * T * N contexts, tokens, and how often each token continued the context,
        (M,) each.
    """

    def flat(values: Tensor) -> Tensor:
        return values.transpose(1, 2).flatten()  # groups lie side by side: (B * N * T,)

    # Step 1: all positions in the order of their contexts, and the group of each.
    n_rows, n, n_orders = is_used.shape
    rows = torch.arange(n_rows, device=is_used.device)[:, None, None]
    orders = torch.arange(n_orders, device=is_used.device)
    row_begin = flat(((rows * n_orders + orders) * n).expand_as(is_used))
    order = same_context.sort_index
    position = flat(order)
    context_index = flat((rows * n + order) * n_orders + orders)
    begin, end = row_begin + flat(same_context.begin), row_begin + flat(same_context.end)
    # Step 2: pair the first position of each entry with the positions of the same context.
    is_first = (same_entry.rank == 0) & is_held
    (entry,) = flat(is_first.gather(1, order)).nonzero(as_tuple=True)
    begin, end = begin[entry], end[entry]
    if first is not None:
        is_before = (torch.arange(n, device=is_used.device) < first).long()
        n_before = same_context.total(is_before[:, None].expand_as(is_used))
        begin = torch.maximum(begin + flat(n_before.gather(1, order))[entry], entry + 1)
        end = torch.maximum(begin, end)
    other, pair = concatenate_ranges(begin, end)
    is_kept = is_used.flatten()[context_index[other]]
    other, entry = other[is_kept], entry[pair[is_kept]]
    tokens = next_tokens.flatten()[context_index[entry] // n_orders]
    # Step 3: count the entry, in the whole row or before the position.
    if first is None:
        return context_index[other], tokens, flat(same_entry.size.gather(1, order))[entry]
    group = row_begin + flat(same_entry.by_position(same_entry.begin).gather(1, order))
    sorted_group = row_begin + flat(same_entry.begin)
    earlier = torch.searchsorted(
        sorted_group * n + flat(same_entry.sort_index), group[entry] * n + position[other]
    )
    return context_index[other], tokens, earlier - group[entry]


def concatenate_ranges(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of M ranges one after another, and which range each is of. begin, end:
    (M,)."""
    size = end - begin
    of_range = torch.repeat_interleave(size)
    offset = end - size.cumsum(0)
    return torch.arange(len(of_range), device=size.device) + offset[of_range], of_range


def following_tokens(ids: Tensor) -> Tensor:
    """Returns the token after each of ids (B, T) as a target, (B, T); PAD after the last."""
    after: Tensor = inputs_to_targets(F.pad(ids[:, 1:], (0, 1), value=PAD))
    return after
