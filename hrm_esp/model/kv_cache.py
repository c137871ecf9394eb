"""Keys and values of what the Executor has read.

Shapes: B rows, H heads of d dimensions, T new positions, S positions in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer, (2, B, H, capacity, d), filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.kv: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values (B, H, T, d); returns all so far, (B, H, S, d)."""
        if self.kv is None:
            self.kv = k.new_empty((2, *k.shape[:2], self.capacity, k.shape[3]))
        begin, self.length = self.length, self.length + k.shape[2]
        keys, values = self.kv[..., : self.length, :].unbind()
        keys[:, :, begin:] = k
        values[:, :, begin:] = v
        return keys, values

    def copy_rows(self, rows: Tensor, n_rows: int, end: int, source: KVCache) -> None:
        """Replaces the given rows, of ``n_rows``, by those of another cache, moved to end at
        position ``end``."""
        self.length = end
        if source.kv is None:
            return
        _, _, n_heads, _, head_dim = source.kv.shape
        if self.kv is None:
            self.kv = source.kv.new_zeros((2, n_rows, n_heads, self.capacity, head_dim))
        self.kv[:, rows, :, end - source.length : end] = source.kv[..., : source.length, :]

    def drop_prefix(self, n: int) -> None:
        """Removes the first n positions."""
        self.length -= n
        if self.kv is not None:
            self.kv[..., : self.length, :] = self.kv[..., n : n + self.length, :].clone()

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        if self.kv is not None:
            self.kv = self.kv[:, rows]


class BlockCache(NamedTuple):
    """The caches of one DecoderBlock."""

    self_attn: KVCache
    cross_attn: KVCache


class ExecutorCache:
    """The caches of all blocks of the Executor.

    Rows of different lengths end together, at ``length`` ([PLAN] counts); the first ``offset`` (B,)
    positions of each row are empty. ``None``: no row has empty positions.

    Args:
        prompt_len: positions that cross attention reads; 0 is no cross attention.
    """

    def __init__(self, n_layers: int, capacity: int, prompt_len: int) -> None:
        self.blocks = [BlockCache(KVCache(capacity), KVCache(prompt_len)) for _ in range(n_layers)]
        self.offset: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.blocks[0].self_attn.capacity

    @property
    def length(self) -> int:
        return self.blocks[0].self_attn.length

    @property
    def has_prompt(self) -> bool:
        """Whether the keys and values of the prompt are cached."""
        return self.blocks[0].cross_attn.length > 0

    def positions(self, n: int) -> slice | Tensor:
        """Returns the positions of the next n tokens: a range, or (B, n) if rows differ."""
        if self.offset is None:
            return slice(self.length, self.length + n)
        return self.length - self.offset[:, None] + torch.arange(n, device=self.offset.device)

    def attention_bias(self, x: Tensor) -> Tensor | None:
        """Returns what to add to the attention scores of the next n tokens x (B, n, D).

        0 where a key may be attended to, else -inf: (n, length + n), or (B, 1, 1, length + 1) where
        rows differ and take one token at a time. ``None``: plain causal attention is right.
        """
        n = x.shape[1]
        if self.offset is not None:
            assert n == 1
            is_empty = torch.arange(self.length + 1, device=x.device) < self.offset[:, None]
            return x.new_zeros(is_empty.shape).masked_fill_(is_empty, -torch.inf)[:, None, None]
        if n == 1 or self.length == 0:
            return None
        return x.new_full((n, self.length + n), -torch.inf).triu_(self.length + 1)

    def truncate(self, n: int) -> None:
        """Removes the last n positions."""
        for block in self.blocks:
            block.self_attn.length -= n

    def drop_prefix(self, n: int) -> None:
        """Removes the first n positions, which are empty in every row."""
        assert self.offset is not None
        self.offset = self.offset - n
        for block in self.blocks:
            block.self_attn.drop_prefix(n)

    def copy_rows(self, rows: Tensor, n_rows: int, end: int, source: ExecutorCache) -> None:
        """Replaces the given rows, of ``n_rows``, by those of another cache, moved to end at
        position ``end``."""
        if self.offset is None:
            self.offset = torch.zeros(n_rows, dtype=torch.long, device=rows.device)
        self.offset[rows] = end - source.length
        for own, other in zip(self.blocks, source.blocks, strict=True):
            own.self_attn.copy_rows(rows, n_rows, end, other.self_attn)
            own.cross_attn.copy_rows(rows, n_rows, other.cross_attn.length, other.cross_attn)

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        for block in self.blocks:
            block.self_attn.select(rows)
            block.cross_attn.select(rows)
        if self.offset is not None:
            self.offset = self.offset[rows]
