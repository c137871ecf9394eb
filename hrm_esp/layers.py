"""The parts of a Transformer: norm, positions, attention and its cache, feed-forward, blocks.

Shapes: B rows, T positions, S positions attended to, D = d_model, H heads of d = D / H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HRMConfig
from .tokenizer import BOS, PAD


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x), in fewer passes over memory than PyTorch's own takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """(..., D) -> (..., D)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """(..., D) -> (..., D): (grad - y mean(grad y)) / rms(x)."""
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y)[..., None] / -y.shape[-1]
        return torch.addcmul(grad, y, along).mul_(scale), None


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(..., D) -> (..., D), each row with a root mean square of one."""
    return RMSNormFunction.apply(x, eps)


class RMSNorm(nn.Module):
    """Root mean square norm with a learned gain (Zhang & Sennrich 2019, section 4)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x) * self.weight.to(x.dtype)


def linear(d_in: int, d_out: int, *, zero: bool = False) -> nn.Linear:
    """A projection without bias; ``zero`` for those that write to the residual stream."""
    layer = nn.Linear(d_in, d_out, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=0.5 * d_in**-0.5)
    return layer


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021, section 3.2): angles by position, the first ``capacity`` of
    them from a table."""

    frequency: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, capacity: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** -(torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("frequency", frequency, persistent=False)
        cos, sin = self.at(torch.arange(capacity))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions ``start`` to ``start + length``, each (length, d / 2)."""
        return self.cos[start : start + length], self.sin[start : start + length]

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of any positions (..., T), each (..., T, d / 2)."""
        angle = places[..., None] * self.frequency
        return angle.cos(), angle.sin()


def characters(ids: Tensor, before: Tensor | None = None) -> Tensor:
    """Which character each of ids (B, T) is part of, after the tokens ``before`` (B, R), counted
    from 0 where they begin with one, -> (B, T). A token that is no byte is one of its own."""

    def begins(ids: Tensor) -> Tensor:
        return ((ids < 0x80) | (ids > 0xBF)).long()

    place = begins(ids).cumsum(1) - 1
    return place if before is None else place + begins(before).sum(1, keepdim=True)


def ngram_hashes(ids: Tensor, longest: int, reach: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Rolling hashes of the last 1, 2, ... ``longest`` tokens at each position but the first
    ``reach``.

    N-grams begin anew at BOS: a longer one takes in nothing before it, and is not complete.

    Args:
        ids: (B, reach + T); PAD for what is not there.

    Yields:
        For each length the hashes, (B, T) int64, and which n-grams are complete, (B, T) bool.
    """
    n = ids.shape[1]
    ids = F.pad(ids, (max(0, longest - 1 - reach), 0), value=PAD)
    first = ids.shape[1] - n + reach
    digest = torch.zeros_like(ids[:, first:])
    inside = torch.ones_like(digest, dtype=torch.bool)
    for k in range(longest):
        token = ids[:, first - k : ids.shape[1] - k]
        inside = inside & (token != PAD)
        digest = digest * 1_000_003 + torch.where(inside, token + 1, 0)  # int64 wraps around
        yield digest, inside
        inside = inside & (token != BOS)


class NgramEmbedding(nn.Module):
    """Hashed byte n-gram embeddings (Pagnoni et al. 2024, Byte Latent Transformer, section 3.2.1).

    To each position the sum of one vector for each n-gram that ends there, looked up by its hash.
    N-grams begin anew at BOS and at the window's start. In training each vector is dropped with
    ``ngram_dropout``, the rest scaled up: rare n-grams would be learned by heart.
    """

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.orders, self.rows = tuple(range(2, config.ngram_max + 1)), 2**config.ngram_bits
        self.dropout = config.ngram_dropout
        self.table = nn.EmbeddingBag(
            len(self.orders) * self.rows, config.d_model, mode="sum", sparse=True
        )
        nn.init.zeros_(self.table.weight)

    def forward(self, ids: Tensor, before: Tensor) -> Tensor:
        """ids: (B, T), after the tokens ``before`` (B, R) -> (B, T, D)."""
        index = self.index(ids, before)
        weights = None
        if self.training and self.dropout:
            kept = torch.rand(index.shape, device=ids.device) >= self.dropout
            weights = kept.float().div_(1 - self.dropout).flatten(0, 1)
        if ids.device.type != "mps":
            summed = self.table(index.flatten(0, 1), per_sample_weights=weights)
        else:  # which has no EmbeddingBag
            vectors = F.embedding(index.flatten(0, 1), self.table.weight)
            summed = (vectors if weights is None else vectors * weights[..., None]).sum(1)
        return summed.view(*ids.shape, -1)

    def index(self, ids: Tensor, before: Tensor) -> Tensor:
        """ids: (B, T), after ``before`` (B, R) -> rows of the table, (B, T, orders)."""
        before = before[:, max(0, before.shape[1] - self.orders[-1] + 1) :]
        rows = []
        window = torch.cat((before, ids), dim=1)
        for k, (digest, _) in enumerate(ngram_hashes(window, self.orders[-1], before.shape[1])):
            if k:
                mixed = (digest ^ (digest >> 29)) * 0x9E3779B97F4A7C1 >> 24
                rows.append(mixed % self.rows + (k - 1) * self.rows)
        return torch.stack(rows, dim=-1)


Angles = tuple[Tensor, Tensor]


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turns each pair (x[i], x[i + d/2]) by its position's angle, (T, d / 2) or (B, T, d / 2).
    x: (B, T, ..., d) -> the same."""
    between = (1,) * (x.dim() - 3)
    cos, sin = (a.to(x.dtype).view(*a.shape[:-1], *between, -1) for a in angles)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Memory(NamedTuple):
    """What cross attention reads.

    ``states`` (B, S, D); ``visible`` (B, S) is true where a position may be read, ``None`` where
    all may. A row with no visible position reads nothing: its cross attention adds zero.
    ``places`` (B, S): which character each is part of, for rotary positions.
    """

    states: Tensor
    visible: Tensor | None
    places: Tensor


BLOCK = 128  # queries whose causal attention is computed together on a CPU


class KVCache:
    """Keys and values of one attention, (B, H, capacity, d), filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, d) keys and values; returns all so far, (B, H, S, d)."""
        if self.keys is None or self.values is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention. q: (B, H, T, d), k and v: (B, H, S, d) -> (B, H, T, d).

    Args:
        mask: bool, broadcast to (B, H, T, S): the keys that may be read.
        causal: position t reads keys 0 to t, where T = S.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # The CPU kernel is slow backwards: in training, plain products take half its time or less.
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    scale, heads = q.shape[-1] ** -0.5, q.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if not causal:
        return (scale * q @ k.mT).softmax(-1).bmm(v).unflatten(0, (-1, heads))
    n = q.shape[1]
    future = q.new_full((n, n), -torch.inf).triu_(1)
    read = []
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        scores = torch.baddbmm(future[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=scale)
        read.append(scores.softmax(-1).bmm(v[:, :end]))
    return torch.cat(read, dim=1).unflatten(0, (-1, heads))


class MHA(nn.Module):
    """Multi-head attention: self (causal or not) or cross.

    Queries and keys are RMS-normalised per head (QK-norm: Henry et al. 2020; Dehghani et al.
    2023, section 2) unless ``qk_norm`` is off, then rotated if angles are given.
    """

    def __init__(self, config: HRMConfig, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.qk_norm, self.causal, self.cross = config.qk_norm, causal, cross
        if cross:
            self.wq = linear(d, d)
            self.wkv = linear(d, 2 * d)
        else:
            self.wqkv = linear(d, 3 * d)
        self.out = linear(d, d, zero=True)

    def forward(
        self,
        x: Tensor,
        *,
        angles: Angles | None = None,
        visible: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Self attention. x: (B, T, D) -> (B, T, D).

        Args:
            angles: of the positions of ``x``.
            visible: (B, T) bool, the keys that may be read; all by default.
            cache: holds what came before ``x`` and takes its keys and values in.
        """
        qkv = self.wqkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        qk, v = qkv.split((2, 1), dim=2)  # backwards one copy, where slices would take three
        q, k = (t.transpose(1, 2) for t in self._prepare(qk, angles).unbind(2))
        v = v.squeeze(2).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        mask = None if visible is None else visible[:, None, None, :]
        causal = self.causal and q.shape[2] > 1
        if causal and q.shape[2] < k.shape[2]:  # SDPA's is_causal aligns the upper left corner
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
            mask, causal = mask.tril(k.shape[2] - q.shape[2]), False
        return self._attend(q, k, v, mask, causal)

    def attend_memory(
        self,
        x: Tensor,
        memory: Memory,
        *,
        angles: Angles | None = None,
        memory_angles: Angles | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Cross attention. x: (B, T, D), memory.states: (B, S, D) -> (B, T, D).

        Args:
            angles, memory_angles: of the positions of ``x`` and of the memory.
            cache: keeps the memory's keys and values after the first call.
        """
        q = self._prepare(self.wq(x).unflatten(-1, (self.n_heads, self.head_dim)), angles)
        if cache is not None and cache.keys is not None and cache.values is not None:
            k, v = cache.keys, cache.values
        else:
            kv = self.wkv(memory.states).unflatten(-1, (2, self.n_heads, self.head_dim))
            k = self._prepare(kv[:, :, 0], memory_angles).transpose(1, 2)
            v = kv[:, :, 1].transpose(1, 2)
            if cache is not None:
                k, v = cache.append(k, v)
        if memory.visible is None:
            return self._attend(q.transpose(1, 2), k, v, None, False)
        # A softmax over nothing is NaN: rows that may read nothing read all, times zero.
        readable = memory.visible.any(1)
        mask = (memory.visible | ~readable[:, None])[:, None, None, :]
        read = self._attend(q.transpose(1, 2), k, v, mask, False)
        return read * readable[:, None, None].to(read.dtype)

    def _prepare(self, x: Tensor, angles: Angles | None) -> Tensor:
        """Norm and rotation of queries or keys. (B, T, ..., d) -> the same."""
        if self.qk_norm:
            x = rms_norm(x)
        return x if angles is None else rotate(x, angles)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q: (B, H, T, d), k and v: (B, H, S, d) -> (B, T, D)."""
        read = attention(q, k, v, mask, causal)
        return self.out(read.transpose(1, 2).flatten(2))


class FFN(nn.Module):
    """GEGLU feed-forward (Shazeer 2020, equation 6): out(gelu(gate(x)) * up(x))."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        hidden = config.ff_mult * config.d_model
        self.gate_up = linear(config.d_model, 2 * hidden)
        self.out = linear(hidden, config.d_model, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # Two products: halves of one would not be contiguous, and slow in training.
        gate, up = (F.linear(x, w) for w in self.gate_up.weight.chunk(2))
        return self.out(F.gelu(gate) * up)


class EncoderBlock(nn.Module):
    """Non-causal self attention and feed-forward, each normed first and added to its input."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.norm_attn = RMSNorm(config.d_model)
        self.attn = MHA(config)
        self.norm_ffn = RMSNorm(config.d_model)
        self.ffn = FFN(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, visible: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); keys where ``visible`` (B, T) is false are never read."""
        x = x + self.dropout(self.attn(self.norm_attn(x), angles=angles, visible=visible))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class BlockCache(NamedTuple):
    """The caches of one DecoderBlock."""

    own: KVCache
    memory: KVCache


class DecoderBlock(nn.Module):
    """Causal self attention, cross attention where ``config.memory`` is on, feed-forward."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.norm_attn = RMSNorm(config.d_model)
        self.attn = MHA(config, causal=True)
        self.norm_cross = RMSNorm(config.d_model) if config.memory else None
        self.cross = MHA(config, cross=True) if config.memory else None
        self.norm_ffn = RMSNorm(config.d_model)
        self.ffn = FFN(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        memory: Memory | None = None,
        cross_angles: Angles | None = None,
        memory_angles: Angles | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); without ``memory`` the cross attention adds nothing.

        Args:
            angles, cross_angles: of the positions of ``x``, for self and for cross attention.
            memory_angles: of those of the memory.
        """
        own = None if cache is None else cache.own
        x = x + self.dropout(self.attn(self.norm_attn(x), angles=angles, cache=own))
        if self.cross is not None and self.norm_cross is not None and memory is not None:
            read = self.cross.attend_memory(
                self.norm_cross(x),
                memory,
                angles=cross_angles,
                memory_angles=memory_angles,
                cache=None if cache is None else cache.memory,
            )
            x = x + self.dropout(read)
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
