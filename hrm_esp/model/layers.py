"""Transformer layers: norm, attention, feed-forward, blocks.

Shapes: B rows, T positions, S positions attended to, D = d_model, H heads of d = D / H dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HRMConfig
from .embeddings import apply_rotary
from .kv_cache import BlockCache, KVCache

ATTENTION_BLOCK = 128  # queries computed at once in causal attention on a CPU


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """Returns 1 / rms(x), (..., D) -> (..., 1), in few passes over memory."""
    wide = None if x.dtype == torch.float32 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x), in fewer passes over memory than ``F.rms_norm`` takes on a CPU."""

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
        projection = torch.linalg.vecdot(grad, y)[..., None] / -y.shape[-1]
        return torch.addcmul(grad, y, projection).mul_(scale), None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Scales each row to a root mean square of one, times an optional gain (D,). (..., D) ->
    (..., D), of the same dtype."""
    weight = None if weight is None else weight.to(x.dtype)
    if x.is_cuda:  # one kernel; autocast would choose float32
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(x, x.shape[-1:], weight, eps)
    if torch.is_grad_enabled():
        y: Tensor = RMSNormFunction.apply(x, eps)
    else:
        y = x * rms_scale(x, eps)
    return y if weight is None else y * weight


class RMSNorm(nn.Module):
    """Root mean square norm with a learned gain (Zhang & Sennrich 2019, section 4)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return rms_norm(x, self.weight)


def dropout(p: float) -> nn.Module:
    return nn.Dropout(p) if p else nn.Identity()


def linear(d_in: int, d_out: int, *, zero: bool = False) -> nn.Linear:
    """Returns a linear layer without bias.

    Args:
        zero: initialize to zero, for layers that write to the residual stream.
    """
    layer = nn.Linear(d_in, d_out, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=0.5 * d_in**-0.5)
    return layer


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention. q: (B, H, T, d), k and v: (B, H, S, d) -> (B, H, T, d).

    Args:
        mask: broadcast to (B, H, T, S); bool, true where a key may be attended to, or without
            gradients also a bias to add to the scores.
        causal: position t attends to keys 0 to t; T = S.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    # The backward pass of the CPU's fused kernel is slow: plain products take half its time.
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    scale, n_heads = q.shape[-1] ** -0.5, q.shape[1]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if not causal:
        return (scale * q @ k.mT).softmax(-1).bmm(v).unflatten(0, (-1, n_heads))
    n = q.shape[1]
    future = q.new_full((n, n), -torch.inf).triu_(1)
    outputs = []
    for start in range(0, n, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, n)
        scores = torch.baddbmm(future[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=scale)
        outputs.append(scores.softmax(-1).bmm(v[:, :end]))
    return torch.cat(outputs, dim=1).unflatten(0, (-1, n_heads))


class CrossInputs(NamedTuple):
    """What cross attention reads: the Planner's ``states`` (B, S, D) of the prompt.

    ``mask`` (B, S) is true where a position may be attended to, ``None`` where all may; a row
    without such a position gets zeros. ``q_freqs_cis`` and ``k_freqs_cis`` are those of the queries
    and of the prompt; the latter may be ``None`` once the keys are cached.
    """

    states: Tensor
    mask: Tensor | None
    q_freqs_cis: Tensor
    k_freqs_cis: Tensor | None


class MHA(nn.Module):
    """Multi-head attention: self-attention, causal or not, or cross-attention.

    Queries and keys are RMS-normalized per head (QK-norm: Henry et al. 2020; Dehghani et al. 2023,
    section 2), then rotated.
    """

    def __init__(self, config: HRMConfig, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        d = config.d_model
        self.n_heads, self.head_dim = config.n_heads, config.head_dim
        self.is_causal, self.is_cross = causal, cross
        if cross:
            self.wq = linear(d, d)
            self.wkv = linear(d, 2 * d)
        else:
            self.wqkv = linear(d, 3 * d)
        self.out = linear(d, d, zero=True)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Self-attention. x: (B, T, D) -> (B, T, D).

        Args:
            freqs_cis: of the positions of ``x``.
            mask: see `attention`; by default all keys, or with causal attention those up to the
                query's.
            cache: keys and values before ``x``; those of ``x`` are added.
        """
        h = self.n_heads
        qkv = self.wqkv(x).view(*x.shape[:2], 3 * h, self.head_dim)
        qk, v = qkv.split((2 * h, h), dim=2)  # the backward pass of a split is a single copy
        q, k = apply_rotary(rms_norm(qk), freqs_cis).transpose(1, 2).split(h, dim=1)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self._attend(q, k, v, mask, self.is_causal and mask is None and q.shape[2] > 1)

    def cross_attend(self, x: Tensor, cross: CrossInputs, cache: KVCache | None = None) -> Tensor:
        """Cross-attention. x: (B, T, D) -> (B, T, D).

        Args:
            cache: keeps the keys and values of the prompt after the first call.
        """
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        q = apply_rotary(rms_norm(q), cross.q_freqs_cis).transpose(1, 2)
        if cache is not None and cache.kv is not None:
            k, v = cache.kv.unbind()
        else:
            assert cross.k_freqs_cis is not None
            kv = self.wkv(cross.states).unflatten(-1, (2, self.n_heads, self.head_dim))
            k = apply_rotary(rms_norm(kv[:, :, 0]), cross.k_freqs_cis).transpose(1, 2)
            v = kv[:, :, 1].transpose(1, 2)
            if cache is not None:
                k, v = cache.append(k, v)
        if cross.mask is None:
            return self._attend(q, k, v, None, False)
        # A softmax over nothing is NaN: rows without a readable position read all, times zero.
        is_readable = cross.mask.any(1)
        mask = (cross.mask | ~is_readable[:, None])[:, None, None, :]
        output = self._attend(q, k, v, mask, False)
        return output * is_readable[:, None, None].to(output.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """q: (B, H, T, d), k and v: (B, H, S, d) -> (B, T, D)."""
        output: Tensor = self.out(attention(q, k, v, mask, causal).transpose(1, 2).flatten(2))
        return output


class FFN(nn.Module):
    """GEGLU feed-forward layer (Shazeer 2020, equation 6): out(gelu(gate(x)) * up(x))."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        hidden = config.ff_mult * config.d_model
        self.gate_up = linear(config.d_model, 2 * hidden)
        self.out = linear(hidden, config.d_model, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # Two products: the halves of a single one would not be contiguous, which is slow.
        gate, up = (F.linear(x, w) for w in self.gate_up.weight.chunk(2))
        output: Tensor = self.out(F.gelu(gate) * up)
        return output


class EncoderBlock(nn.Module):
    """Pre-norm block of bidirectional self-attention and feed-forward."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.norm_attn = RMSNorm(config.d_model)
        self.attn = MHA(config)
        self.norm_ffn = RMSNorm(config.d_model)
        self.ffn = FFN(config)
        self.dropout = dropout(config.dropout)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); keys where ``mask`` (B, T) is false are not attended to."""
        mask = None if mask is None else mask[:, None, None, :]
        x = x + self.dropout(self.attn(self.norm_attn(x), freqs_cis, mask))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class DecoderBlock(nn.Module):
    """Pre-norm block of causal self-attention, cross-attention if the config has it, and
    feed-forward."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()
        self.norm_attn = RMSNorm(config.d_model)
        self.attn = MHA(config, causal=True)
        has_cross = config.cross_attention
        self.norm_cross = RMSNorm(config.d_model) if has_cross else None
        self.cross = MHA(config, cross=True) if has_cross else None
        self.norm_ffn = RMSNorm(config.d_model)
        self.ffn = FFN(config)
        self.dropout = dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        cross: CrossInputs | None = None,
        cache: BlockCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            freqs_cis: of the positions of ``x``.
            cross: what cross-attention reads; without it, it adds nothing.
            cache, mask: of self-attention, see `MHA.forward`.
        """
        self_cache = None if cache is None else cache.self_attn
        x = x + self.dropout(self.attn(self.norm_attn(x), freqs_cis, mask, self_cache))
        if self.cross is not None and self.norm_cross is not None and cross is not None:
            cross_cache = None if cache is None else cache.cross_attn
            x = x + self.dropout(self.cross.cross_attend(self.norm_cross(x), cross, cross_cache))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
