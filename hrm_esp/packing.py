"""Weights laid out for the few rows of a decoding step, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Angles, BlockCache, DecoderBlock, Memory, rotate
from .model import Executor


def product(x: Tensor, weight: Tensor, then: str = "none") -> Tensor:
    """(..., d_in) times a `laid_out` weight (d_out, d_in) -> (..., d_out)."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, then, [], "none")


def laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as oneDNN wants it for few rows (4, to it). A plain product lays it out anew each
    time, or reads it in an order that is slow."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 4)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + D eps), (..., D) -> the same: `rms_norm` over the root of D."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.square_().add_(x.shape[-1] * eps).sqrt_()


class PackedLinear(nn.Module):
    """A linear layer without bias."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.weight = dtype, laid_out(layer.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) float32 -> (..., d_out) float32."""
        return product(x.to(self.dtype), self.weight).to(x.dtype)


class PackedBlock(nn.Module):
    """A DecoderBlock for inference, in as few operations as there are: gains of norms are part of
    the weights, and the feed-forward's products take what is done to each element along."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attn, ffn = block.attn, block.ffn
        self.n_heads, self.head_dim, self.qk_norm = attn.n_heads, attn.head_dim, attn.qk_norm
        self.dtype = dtype
        self.scale = self.head_dim ** (0.5 if self.qk_norm else -0.5)
        size = block.norm_attn.weight.shape[0] ** 0.5
        self.wqkv = laid_out(attn.wqkv.weight * block.norm_attn.weight * size, dtype)
        self.attn_out = laid_out(attn.out.weight, dtype)
        self.norm_cross, self.cross = block.norm_cross, copy.deepcopy(block.cross)
        if self.cross is not None:
            for name in ("wq", "wkv", "out"):
                setattr(self.cross, name, PackedLinear(getattr(self.cross, name), dtype))
        gate, up = (ffn.gate_up.weight * block.norm_ffn.weight * size).chunk(2)
        self.gate, self.up = laid_out(gate, dtype), laid_out(up, dtype)
        self.ffn_out = laid_out(ffn.out.weight, dtype)

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
        """(B, T, D) float32 -> the same, as `DecoderBlock.forward`."""
        (b, t, d), h = x.shape, self.n_heads
        low = unit(x).to(self.dtype)
        qkv = product(low, self.wqkv).to(x.dtype).view(b, t, 3 * h, self.head_dim)
        qk, v = qkv[:, :, : 2 * h], qkv[:, :, 2 * h :]
        if self.qk_norm:
            qk = unit(qk)
        if angles is not None:
            qk = rotate(qk, angles)
        q, k, v = qk[:, :, :h].transpose(1, 2), qk[:, :, h:].transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.own.append(k, v)
        causal = mask is None and t > 1
        read = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale
        )
        low = read.transpose(1, 2).reshape(b, t, d).to(self.dtype)
        x = x + product(low, self.attn_out)
        if self.cross is not None and self.norm_cross is not None and memory is not None:
            x = x + self.cross.attend_memory(
                self.norm_cross(x),
                memory,
                angles=cross_angles,
                memory_angles=memory_angles,
                cache=None if cache is None else cache.memory,
            )
        low = unit(x).to(self.dtype)
        gate = product(low, self.gate, "gelu")
        hidden = torch.ops.mkldnn._linear_pointwise.binary(low, gate, self.up, None, "mul")
        return x + product(hidden, self.ffn_out)


def packed(executor: Executor, dtype: torch.dtype) -> Executor:
    """The same function of the same weights, faster for few tokens; on a CPU with oneDNN."""
    if executor.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return executor
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    blocks: Iterable[Any] = executor.blocks
    twin = copy.copy(executor)
    twin._modules = executor._modules | {
        "blocks": nn.ModuleList(PackedBlock(block, dtype) for block in blocks),
        "lm_head": PackedLinear(executor.lm_head, dtype),
    }
    return twin
