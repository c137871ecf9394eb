"""Weights laid out for the few rows of a decoding step, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MHA, Angles, BlockCache, DecoderBlock, Memory, NgramEmbedding, Rotary
from .model import Executor, TokenEmbedding
from .tokenizer import PAD

M = TypeVar("M", bound=nn.Module)


def product(x: Tensor, weight: Tensor, then: str = "none") -> Tensor:
    """(..., d_in) times a `laid_out` weight (d_out, d_in) -> (..., d_out)."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, then, [], "none")


def laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as oneDNN wants it for few rows (4, to it). A plain product lays it out anew each
    time, or reads it in an order that is slow."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 4)


def lengths(x: Tensor, floor: Tensor) -> Tensor:
    """sqrt(|x|^2 + floor^2), (..., D) -> (..., 1). With a `floor_of` D, x over it is what an
    `rms_norm` gives over the root of D."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def floor_of(d: int, eps: float = 1e-6) -> Tensor:
    return torch.tensor((d * eps) ** 0.5)


class PackedLinear(nn.Module):
    """A linear layer without bias."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.weight = dtype, laid_out(layer.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) float32 -> (..., d_out) float32."""
        return product(x.to(self.dtype), self.weight).to(x.dtype)


class PackedEmbedding(nn.Module):
    """A TokenEmbedding that finds the rows of n-grams with NumPy: of few tokens, beginning an
    operation takes longer than doing it, and PyTorch's take longest."""

    def __init__(self, tok_emb: TokenEmbedding, ngrams: NgramEmbedding) -> None:
        super().__init__()
        self.tok_emb, self.ngrams = tok_emb, ngrams

    def forward(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """As `TokenEmbedding.forward`; ``before`` reaches as far as the n-grams do, if given."""
        reach = self.ngrams.longest - 1
        if before is None:
            before = ids.new_full((len(ids), reach), PAD)
        window = torch.cat((before, ids), dim=1)
        index = torch.from_numpy(np.stack(self.ngrams.index(window.numpy(), reach), axis=-1))
        of_tokens = F.embedding(ids, self.tok_emb.weight)
        return F.embedding(index, self.ngrams.table.weight).sum(-2).add_(of_tokens)

    @property
    def weight(self) -> Tensor:
        """Of the tokens, (V, D)."""
        return self.tok_emb.weight


class PackedRotary(nn.Module):
    """A Rotary for a `PackedBlock`, whose pairs are complex numbers: it turns them by others."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        half = rotary.cos.shape[-1] // 2
        self.turns = torch.complex(rotary.cos[..., :half], rotary.sin[..., half:])
        self.at = rotary.at  # for cross attention, which is as it was

    def forward(self, places: slice | Tensor) -> Tensor:
        """Of a range of T positions, or of any (..., T) -> (..., T, 1, d / 2) complex."""
        return self.turns[places]


class PackedBlock(nn.Module):
    """A DecoderBlock for inference, in as few operations as there are, and in place: gains of norms
    are part of the weights, the feed-forward's products take what is done to each element along,
    and in a head the two of a rotary pair are neighbours."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attn, ffn = block.attn, block.ffn
        self.n_heads, self.head_dim = attn.n_heads, attn.head_dim
        self.dtype = dtype
        self.scale = self.head_dim**0.5
        d = attn.wqkv.in_features
        self.floor, self.head_floor = floor_of(d), floor_of(self.head_dim)
        wqkv = attn.wqkv.weight * block.norm_attn.weight * d**0.5
        if self.head_dim % 2 == 0:  # else there are no pairs
            pairs = wqkv[: 2 * d].view(2 * self.n_heads, 2, self.head_dim // 2, d)
            wqkv = torch.cat((pairs.transpose(1, 2).reshape(2 * d, d), wqkv[2 * d :]))
        self.wqkv = laid_out(wqkv, dtype)
        self.attn_out = laid_out(attn.out.weight, dtype)
        self.block = block
        gate, up = (ffn.gate_up.weight * block.norm_ffn.weight * d**0.5).chunk(2)
        self.gate, self.up = laid_out(gate, dtype), laid_out(up, dtype)
        self.ffn_out = laid_out(ffn.out.weight, dtype)

    @cached_property
    def cross(self) -> MHA:
        """Only where there is a memory to read."""
        cross = copy.deepcopy(self.block.cross)
        assert cross is not None
        for name in ("wq", "wkv", "out"):
            setattr(cross, name, PackedLinear(getattr(cross, name), self.dtype))
        return cross

    def forward(
        self,
        x: Tensor,
        turns: Tensor | None,
        memory: Memory | None = None,
        cross_angles: Angles | None = None,
        memory_angles: Angles | None = None,
        cache: BlockCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) float32 -> the same, as `DecoderBlock.forward`, but for ``turns``: those of a
        `PackedRotary`."""
        (b, t, d), h = x.shape, self.n_heads
        low = (x / lengths(x, self.floor)).to(self.dtype)
        qkv = product(low, self.wqkv).to(x.dtype).view(b, t, 3 * h, self.head_dim)
        qk = qkv[:, :, : 2 * h]
        qk.div_(lengths(qk, self.head_floor))
        if turns is not None:
            torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(turns)
        q, k, v = qkv.transpose(1, 2).split(h, dim=1)
        if cache is not None:
            k, v = cache.own.append(k, v)
        causal = mask is None and t > 1
        read = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale
        )
        low = read.transpose(1, 2).reshape(b, t, d).to(self.dtype)
        x = x + product(low, self.attn_out)
        if self.block.norm_cross is not None and memory is not None:
            x = x + self.cross.attend_memory(
                self.block.norm_cross(x),
                memory,
                angles=cross_angles,
                memory_angles=memory_angles,
                cache=None if cache is None else cache.memory,
            )
        low = (x / lengths(x, self.floor)).to(self.dtype)
        gate = product(low, self.gate, "gelu")
        hidden = torch.ops.mkldnn._linear_pointwise.binary(low, gate, self.up, None, "mul")
        return x.add_(product(hidden, self.ffn_out))


@torch.no_grad()
def packed(executor: Executor, dtype: torch.dtype) -> Executor:
    """The same function of the same weights, faster for few tokens; on a CPU with oneDNN."""
    if executor.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return executor
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    blocks: Iterable[Any] = executor.blocks
    modules: dict[str, nn.Module | None] = {
        "blocks": nn.ModuleList(PackedBlock(block, dtype) for block in blocks),
        "lm_head": PackedLinear(executor.lm_head, dtype),
    }
    if executor.tok_emb.ngrams is not None:
        modules["tok_emb"] = PackedEmbedding(executor.tok_emb, executor.tok_emb.ngrams)
    if executor.positions.rotary is not None:
        rotary = PackedRotary(executor.positions.rotary)
        modules["positions"] = replaced(executor.positions, {"rotary": rotary})
    return replaced(executor, modules)


def replaced(module: M, parts: dict[str, nn.Module | None]) -> M:
    """The module with other parts; those it keeps are its own."""
    twin = copy.copy(module)
    twin._modules = module._modules | parts
    return twin
