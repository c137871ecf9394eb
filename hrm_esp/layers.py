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


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x), (..., D) -> (..., 1), in few passes over memory."""
    wide = None if x.dtype == torch.float32 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x), in fewer passes over memory than PyTorch's own takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """(..., D) -> (..., D)."""
        scale = rms_scale(x, eps)
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
    if not torch.is_grad_enabled():
        return x * rms_scale(x, eps)
    return RMSNormFunction.apply(x, eps)


class RMSNorm(nn.Module):
    """Root mean square norm with a learned gain (Zhang & Sennrich 2019, section 4)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x) * self.weight.to(x.dtype)


def dropout(p: float) -> nn.Module:
    """Nothing at all for 0."""
    return nn.Dropout(p) if p else nn.Identity()


def linear(d_in: int, d_out: int, *, zero: bool = False) -> nn.Linear:
    """A projection without bias; ``zero`` for those that write to the residual stream."""
    layer = nn.Linear(d_in, d_out, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=0.5 * d_in**-0.5)
    return layer


# Of rotary positions: cosines and sines, each (T, 1, d), or (B, T, 1, d) where rows differ. Sines
# of the first half are negated, as `rotate` takes them.
Angles = tuple[Tensor, Tensor]


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

    def forward(self, places: slice | Tensor) -> Angles:
        """Those of a range of T positions, or of any (..., T)."""
        return self.cos[places], self.sin[places]

    def at(self, places: Tensor) -> Angles:
        """Those of any positions (..., T), also beyond the table."""
        angle = places[..., None, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def begins_character(ids: Any) -> Any:
    """Whether a token, or each of a tensor, is a character's first; one that is no byte is one of
    its own."""
    return (ids < 0x80) | (ids > 0xBF)


def characters(ids: Tensor) -> Tensor:
    """Which character each of ids (B, T) is part of, from 0 on, -> (B, T)."""
    return begins_character(ids).long().cumsum(1) - 1


HASH_FACTOR = 1_000_003


def ngram_hashes(ids: Any, longest: int, reach: int = 0) -> Iterator[tuple[Any, Any]]:
    """Rolling hashes of the last 1, 2, ... ``longest`` tokens at each position but the first
    ``reach``.

    N-grams begin anew at BOS: a longer one takes in nothing before it, and is not complete.

    Args:
        ids: (B, reach + T); PAD for what is not there. An array, too, where that reaches far
            enough.

    Yields:
        For each length the hashes, (B, T) int64, and which n-grams are complete, (B, T) bool.
    """
    n, short = ids.shape[1] - reach, longest - 1 - reach
    if short > 0:
        ids = F.pad(ids, (short, 0), value=PAD)
    end = ids.shape[1]
    digest: Any = 0
    inside: Any = True
    for k in range(longest):
        token = ids[:, end - n - k : end - k]
        inside = inside & (token != PAD)
        digest = digest * HASH_FACTOR + (token + 1) * inside  # int64 wraps around
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
        self.longest, self.rows = config.ngram_max, 2**config.ngram_bits
        self.dropout = config.ngram_dropout
        nothing = torch.zeros((self.longest - 1) * self.rows, config.d_model)
        self.table = nn.EmbeddingBag.from_pretrained(nothing, freeze=False, mode="sum", sparse=True)

    def forward(self, ids: Tensor, before: Tensor) -> Tensor:
        """ids: (B, T), after the tokens ``before`` (B, R) -> (B, T, D)."""
        reach = before.shape[1]
        index = torch.stack(self.index(torch.cat((before, ids), dim=1), reach), dim=-1)
        weights = None
        if self.training and self.dropout:
            kept = torch.rand(index.shape, device=ids.device) >= self.dropout
            weights = kept.float().div_(1 - self.dropout).flatten(0, 1)
        if ids.device.type != "mps":
            summed = self.table(index.flatten(0, 1), per_sample_weights=weights)
        else:  # which has no EmbeddingBag
            vectors = F.embedding(index.flatten(0, 1), self.table.weight)
            summed = (vectors if weights is None else vectors * weights[..., None]).sum(1)
        return summed.view(*ids.shape, self.table.embedding_dim)

    def index(self, ids: Any, reach: int) -> list[Any]:
        """ids: (B, reach + T), as of `ngram_hashes` -> for each order rows of the table, (B, T)."""
        rows = []
        for k, (digest, _) in enumerate(ngram_hashes(ids, self.longest, reach)):
            if k:
                mixed = (digest ^ (digest >> 29)) * 0x9E3779B97F4A7C1 >> 24
                rows.append(mixed % self.rows + (k - 1) * self.rows)
        return rows


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turns each pair (x[i], x[i + d/2]) by its position's angle. x: (B, T, H, d) -> the same."""
    cos, sin = (a.to(x.dtype) for a in angles)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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
    """Keys and values of one attention, (2, B, H, capacity, d), filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.held: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, T, d) keys and values; returns all so far, (B, H, S, d)."""
        if self.held is None:
            self.held = k.new_empty((2, *k.shape[:2], self.capacity, k.shape[3]))
        begin, self.length = self.length, self.length + k.shape[2]
        keys, values = self.held[..., : self.length, :].unbind()
        keys[:, :, begin:] = k
        values[:, :, begin:] = v
        return keys, values

    def put(self, rows: Tensor, n_rows: int, end: int, other: KVCache) -> None:
        """Replaces what the given ones of ``n_rows`` rows hold by what another cache's rows do,
        moved to end at ``end``."""
        self.length = end
        if other.held is None:
            return
        _, _, *rest = other.held.shape
        if self.held is None:
            self.held = other.held.new_zeros((2, n_rows, rest[0], self.capacity, rest[2]))
        self.held[:, rows, :, end - other.length : end] = other.held[..., : other.length, :]

    def shift(self, n: int) -> None:
        """Forgets the first n."""
        self.length -= n
        if self.held is not None:
            self.held[..., : self.length, :] = self.held[..., n : n + self.length, :].clone()

    def select(self, rows: Tensor) -> None:
        """Keeps only the given rows of the batch."""
        if self.held is not None:
            self.held = self.held[:, rows]


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
    2023, section 2), then rotated if angles are given.
    """

    def __init__(self, config: HRMConfig, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.causal, self.cross = causal, cross
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
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Self attention. x: (B, T, D) -> (B, T, D).

        Args:
            angles: of the positions of ``x``.
            mask: bool, broadcast to (B, H, T, S), the keys that may be read, the cache's first, or
                without gradients what is added to their scores; by default all may, or if causal,
                where nothing is in the cache, those up to the query's.
            cache: holds what came before ``x`` and takes its keys and values in.
        """
        h = self.n_heads
        qkv = self.wqkv(x).view(*x.shape[:2], 3 * h, self.head_dim)
        qk, v = qkv.split((2 * h, h), dim=2)  # backwards one copy, where slices would take three
        q, k = self._prepare(qk, angles).transpose(1, 2).split(h, dim=1)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._attend(q, k, v, mask, self.causal and mask is None and q.shape[2] > 1)

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
        if cache is not None and cache.held is not None:
            k, v = cache.held.unbind()
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
        """Norm and rotation of queries or keys. (B, T, H, d) -> the same."""
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
        self.dropout = dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, visible: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); keys where ``visible`` (B, T) is false are never read."""
        mask = None if visible is None else visible[:, None, None, :]
        x = x + self.dropout(self.attn(self.norm_attn(x), angles=angles, mask=mask))
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
        self.dropout = dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        memory: Memory | None = None,
        cross_angles: Angles | None = None,
        memory_angles: Angles | None = None,
        cache: BlockCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); without ``memory`` the cross attention adds nothing.

        Args:
            angles, cross_angles: of the positions of ``x``, for self and for cross attention.
            memory_angles: of those of the memory.
            mask: of self attention, see `MHA.forward`.
        """
        own = None if cache is None else cache.own
        attn = self.attn(self.norm_attn(x), angles=angles, mask=mask, cache=own)
        x = x + self.dropout(attn)
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
