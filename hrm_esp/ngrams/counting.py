"""Counts the n-grams of a corpus of any size.

Shapes: E entries, N orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.stream import ByteStream, as_inputs, as_targets
from ..tokenizer import BOS
from .entries import (
    CONTEXT_MASK,
    COUNT_BITS,
    COUNTS,
    MAX_CODE,
    Entries,
    context_counts,
    count_codes,
    entry_key,
    group_begins,
    last_key,
)
from .hashing import HASH_FACTOR, WORD_FACTOR, WORD_ORDERS, ContextHasher, signed

BLOCK_BYTES = 2**27  # that are counted at once
CHUNK_BYTES = 2**18  # that are hashed at once
PRECEDING_BYTES = 512  # hashed with a chunk: a word before it that begins earlier is cut
PART_KEYS = 2**22  # sorted keys that are counted at once
MAX_SET_SLOTS = 2**27  # of a `HashSet`
SLOTS_PER_KEY = 64


class HashSet:
    """A set of at most ``n_keys`` contexts. It knows some bits of their hashes, so it has a few
    contexts too many."""

    def __init__(self, n_keys: int) -> None:
        self.n_bits = (min(SLOTS_PER_KEY * n_keys, MAX_SET_SLOTS) - 1).bit_length()
        self.has = np.zeros(2**self.n_bits, np.bool_)

    def add(self, keys: NDArray[np.int64]) -> None:
        self.has[self._index(keys)] = True

    def contains(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.has[self._index(keys)]

    def _index(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        mixed = (keys & CONTEXT_MASK) * np.int64(signed(WORD_FACTOR))
        return mixed >> (64 - self.n_bits) & (2**self.n_bits - 1)


def count_ngrams(
    stream: ByteStream,
    orders: Sequence[int],
    max_entries: int,
    progress: Callable[[int], object] = lambda n: None,
    earlier: tuple[Entries, int] | None = None,
) -> tuple[Entries, int]:
    """Counts the n-grams of a stream.

    Of contexts that occurred once, hardly any longer ones are stored: they would say the same. If
    there are more than ``max_entries``, contexts that occurred rarely are dropped. A large stream
    is counted in blocks, whose rare contexts are dropped before the blocks are added up (lossy
    counting: Manku & Motwani 2002).

    Args:
        orders: those of words first, then n-grams by rising n.
        progress: called with the number of bytes done, N times the stream in all.
        earlier: what this function returned for other text, to which the counts are added.

    Returns:
        The sorted entries, (E,), and the count below which contexts were dropped.
    """
    entries, min_count = earlier or (np.empty(0, np.int64), 1)
    for begin in range(0, max(1, len(stream) - 1), BLOCK_BYTES):
        end = max(begin, min(begin + BLOCK_BYTES, len(stream) - 1))
        old_min_count = min_count
        block, min_count = count_block(stream, begin, end, orders, max_entries, min_count, progress)
        entries = add_up(entries, block, seed=begin) if len(entries) else block
        del block  # of half a gigabyte
        if len(entries) > max_entries:
            min_count = max(min_count, fitting_min_count([entries], max_entries))
        if min_count > old_min_count:
            entries = drop_rare(entries, min_count)
    return entries, min_count


def count_block(
    stream: ByteStream,
    begin: int,
    end: int,
    orders: Sequence[int],
    max_entries: int,
    min_count: int,
    progress: Callable[[int], object],
) -> tuple[Entries, int]:
    """Counts the n-grams that end in a block of a stream; see `count_ngrams`."""
    tables: list[Entries] = []
    shorter: tuple[int, HashSet] | None = None
    starts = range(begin, end, CHUNK_BYTES)
    n_threads = torch.get_num_threads()
    with ThreadPoolExecutor(n_threads) as pool:
        for order in orders:
            # Step 1: sort the keys of all positions whose shorter context is frequent.
            keys, n = np.empty(end - begin, np.int64), 0
            for chunk in pool.map(partial(chunk_keys, stream, end, order, shorter), starts):
                keys[n : n + len(chunk)] = chunk
                n += len(chunk)
            keys = keys[:n]
            keys.sort()
            # Step 2: count equal ones, and find out which contexts are frequent.
            frequent, parts = HashSet(end - begin), split_keys(keys)
            while group := [*islice(parts, n_threads)]:
                for table, contexts in pool.map(partial(count_keys, min_count), group):
                    tables.append(table)
                    frequent.add(contexts)
                # Step 3: drop rare contexts if there are too many entries.
                if sum(map(len, tables)) > max_entries:
                    min_count = fitting_min_count(tables, max_entries)
                    tables = [drop_rare(table, min_count) for table in tables]
            shorter = None if order in WORD_ORDERS else (order, frequent)
            progress(end - begin)
        del keys
    return add_up(*tables), min_count


def chunk_keys(
    stream: ByteStream, end: int, order: int, shorter: tuple[int, HashSet] | None, begin: int
) -> NDArray[np.int64]:
    """Returns the keys of the valid contexts of an order in a chunk of a stream, from ``begin`` up
    to ``end`` at most, with the token after each.

    Args:
        shorter: a shorter order, and its frequent contexts; only longer ones of these are returned.
    """
    end = min(begin + CHUNK_BYTES, end)
    if order in WORD_ORDERS:
        return word_keys(stream, begin, end, order)
    return ngram_keys(stream, begin, end, order, shorter)


def word_keys(stream: ByteStream, begin: int, end: int, order: int) -> NDArray[np.int64]:
    """Returns the keys of an order of words at the positions [begin, end) of a stream, with the
    token after each."""
    n_preceding = min(begin, PRECEDING_BYTES)
    ids = torch.from_numpy(as_inputs(stream[begin - n_preceding : end]))[None]
    hashes, _ = ContextHasher(ids).hashes([order], n_preceding)
    keys: NDArray[np.int64] = entry_key(
        hashes[0, 0].numpy(), as_targets(stream[begin + 1 : end + 1])
    )
    return keys


def ngram_keys(
    stream: ByteStream, begin: int, end: int, order: int, shorter: tuple[int, HashSet] | None
) -> NDArray[np.int64]:
    """Returns the keys of an order of n-grams at the positions [begin, end) of a stream; see
    `chunk_keys`. The hashes are those of `ContextHasher`; for so many positions a product a token
    is faster."""
    n_preceding = min(begin, order)
    tokens = as_inputs(stream[begin - n_preceding : end])
    position = np.arange(len(tokens))
    document_begin = np.maximum.accumulate(np.where(tokens == BOS, position, 0))
    is_used = (position - document_begin + 1 >= order)[n_preceding:]
    tokens += 1
    hashes, factor = np.zeros(end - begin, np.int64), 1
    for i in range(min(order, len(tokens))):
        if shorter is not None and i == shorter[0]:
            is_used &= shorter[1].contains(entry_key(hashes))
        first = n_preceding - i
        hashes[max(0, -first) :] += tokens[max(0, first) : len(tokens) - i] * np.int64(
            signed(factor)
        )
        factor *= HASH_FACTOR
    targets = as_targets(stream[begin + 1 : end + 1])
    keys: NDArray[np.int64] = entry_key(hashes[is_used], targets[is_used])
    return keys


def split_keys(keys: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Yields sorted keys in parts that split no context."""
    begin = 0
    while begin < len(keys):
        end = begin + PART_KEYS
        if end < len(keys):
            end = int(keys.searchsorted(last_key(keys[end]), "right"))
        yield keys[begin:end]
        begin = end


def count_keys(min_count: int, keys: NDArray[np.int64]) -> tuple[Entries, NDArray[np.int64]]:
    """Counts sorted keys.

    Returns:
        The entries of the contexts that occurred at least ``min_count`` times, and an entry of each
        of them that occurred more than once.
    """
    begins = group_begins(keys)
    entries = keys[begins] | count_codes(np.diff(begins, append=len(keys)))
    context_count, n_continuations = context_counts(entries)
    contexts = entries[group_begins(entries & CONTEXT_MASK)]
    is_kept = (context_count >= min_count).repeat(n_continuations)
    return entries[is_kept], contexts[context_count >= max(2, min_count)]


def add_up(*tables: Entries, seed: int = 0) -> Entries:
    """Adds up the counts of entries of the same context and token, and sorts the entries.

    Args:
        seed: for rounding; another one each time something is added.
    """
    entries, n = np.concatenate((np.empty(0, np.int64), *tables)), 0
    entries.sort()
    rng = np.random.default_rng(seed)
    for part in split_keys(entries):
        begins = group_begins(part >> COUNT_BITS)
        if len(begins) < len(part):
            counts = np.add.reduceat(COUNTS[part & MAX_CODE], begins)
            is_sum = np.diff(begins, append=len(part)) > 1
            part = part[begins]
            part[is_sum] = part[is_sum] & ~MAX_CODE | count_codes(counts[is_sum], rng)
        entries[n : n + len(part)] = part  # in place: a second array would take as much memory
        n += len(part)
    return entries[:n]


def fitting_min_count(tables: Sequence[Entries], max_entries: int) -> int:
    """Returns the smallest count so that the contexts that occurred at least as often have at most
    ``max_entries``. Above EXACT_COUNTS it may be up to 2% larger than necessary."""
    n_entries = np.zeros(len(COUNTS) + 1, np.int64)  # of contexts with a count of each code
    for table in tables:
        context_count, n_continuations = context_counts(table)
        codes = count_codes(context_count)
        n_entries += np.bincount(codes, n_continuations, len(n_entries)).astype(np.int64)
    n_left = n_entries[::-1].cumsum()[::-1]
    code = int(np.flatnonzero(n_left <= max_entries)[0])
    return int(COUNTS[code]) if code < len(COUNTS) else int(COUNTS[-1]) + 1


def drop_rare(entries: Entries, min_count: int) -> Entries:
    """Drops the contexts that occurred less than ``min_count`` times from sorted entries."""
    parts = [entries[:0]]
    for part in split_keys(entries):
        context_count, n_continuations = context_counts(part)
        parts.append(part[(context_count >= min_count).repeat(n_continuations)])
    return np.concatenate(parts)
