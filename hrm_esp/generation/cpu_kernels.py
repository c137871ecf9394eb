"""The Executor in another form, faster for the few tokens of a decoding step on a CPU.

The modules here compute the same function from the same weights with fewer and cheaper operations:
oneDNN products with weights in the layout it prefers for few rows, the gains of norms folded into
the weights, rotary pairs as complex numbers, and updates in place. They are optional: generation
also works with `model.executor` in place of `pack_for_cpu(model.executor, dtype)`.

Shapes: B rows, T positions, D = d_model, H heads of d dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import MHA, DecoderBlock, Executor
from ..model.embeddings import Rotary
from ..model.kv_cache import BlockCache
from ..model.layers import CrossInputs

M = TypeVar("M", bound=nn.Module)


def prepack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in the layout that oneDNN prefers for products with few rows (here 4).

    A plain product would reorder it at each call, or read it in a slow order.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), 4)


def packed_linear(x: Tensor, weight: Tensor, activation: str = "none") -> Tensor:
    """x: (..., d_in), weight: (d_out, d_in) from `prepack_weight` -> (..., d_out)."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, activation, [], "none")


def row_norms(x: Tensor, floor: Tensor) -> Tensor:
    """sqrt(|x|^2 + floor^2), (..., D) -> (..., 1).

    With a `norm_floor` of D, x / row_norms(x) is rms_norm(x) / sqrt(D).
    """
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)


def norm_floor(d: int, eps: float = 1e-6) -> Tensor:
    return torch.tensor((d * eps) ** 0.5)


class PackedLinear(nn.Module):
    """A linear layer without bias."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.weight = dtype, prepack_weight(layer.weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) float32 -> (..., d_out) float32."""
        return packed_linear(x.to(self.dtype), self.weight).to(x.dtype)


class PackedRotary(nn.Module):
    """A Rotary whose freqs_cis are complex numbers, for `PackedBlock`."""

    def __init__(self, rotary: Rotary) -> None:
        super().__init__()
        cos, sin = rotary.table
        half = cos.shape[-1] // 2
        self.table = torch.complex(cos[..., :half], sin[..., half:])
        self.freqs_cis = rotary.freqs_cis  # cross-attention is not packed

    def forward(self, positions: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Returns freqs_cis of T positions or of positions (B, T), (..., T, 1, d / 2) complex."""
        return self.table[positions]


class PackedBlock(nn.Module):
    """A DecoderBlock for inference. The two numbers of a rotary pair are neighbors in a head."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attn, ffn = block.attn, block.ffn
        self.n_heads, self.head_dim = attn.n_heads, attn.head_dim
        self.dtype = dtype
        # q and k are divided by `row_norms`, which leaves each 1 / sqrt(head_dim) of its RMS norm.
        self.scale = self.head_dim**0.5
        d = attn.wqkv.in_features
        self.floor, self.head_floor = norm_floor(d), norm_floor(self.head_dim)
        wqkv = attn.wqkv.weight * block.norm_attn.weight * d**0.5
        if self.head_dim % 2 == 0:
            pairs = wqkv[: 2 * d].view(2 * self.n_heads, 2, self.head_dim // 2, d)
            wqkv = torch.cat((pairs.transpose(1, 2).reshape(2 * d, d), wqkv[2 * d :]))
        self.wqkv = prepack_weight(wqkv, dtype)
        self.attn_out = prepack_weight(attn.out.weight, dtype)
        self.block = block
        gate, up = (ffn.gate_up.weight * block.norm_ffn.weight * d**0.5).chunk(2)
        self.gate, self.up = prepack_weight(gate, dtype), prepack_weight(up, dtype)
        self.ffn_out = prepack_weight(ffn.out.weight, dtype)

    @cached_property
    def cross(self) -> MHA:
        """Cross-attention, packed when it is first used."""
        cross = copy.deepcopy(self.block.cross)
        assert cross is not None
        for name in ("wq", "wkv", "out"):
            setattr(cross, name, PackedLinear(getattr(cross, name), self.dtype))
        return cross

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        cross: CrossInputs | None = None,
        cache: BlockCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D) float32 -> same, as `DecoderBlock.forward`; freqs_cis of a `PackedRotary`."""
        # Self-attention.
        (b, t, d), h = x.shape, self.n_heads
        x_low = (x / row_norms(x, self.floor)).to(self.dtype)
        qkv = packed_linear(x_low, self.wqkv).to(x.dtype).view(b, t, 3 * h, self.head_dim)
        qk = qkv[:, :, : 2 * h]
        qk.div_(row_norms(qk, self.head_floor))
        if freqs_cis.shape[-1]:
            torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(freqs_cis)
        q, k, v = qkv.transpose(1, 2).split(h, dim=1)
        if cache is not None:
            k, v = cache.self_attn.append(k, v)
        causal = mask is None and t > 1
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale
        )
        x_low = output.transpose(1, 2).reshape(b, t, d).to(self.dtype)
        x = x + packed_linear(x_low, self.attn_out)
        # Cross-attention.
        if self.block.norm_cross is not None and cross is not None:
            cross_cache = None if cache is None else cache.cross_attn
            x = x + self.cross.cross_attend(self.block.norm_cross(x), cross, cross_cache)
        # Feed-forward.
        x_low = (x / row_norms(x, self.floor)).to(self.dtype)
        gate = packed_linear(x_low, self.gate, "gelu")
        hidden = torch.ops.mkldnn._linear_pointwise.binary(x_low, gate, self.up, None, "mul")
        return x.add_(packed_linear(hidden, self.ffn_out))


@torch.no_grad()
def pack_for_cpu(executor: Executor, dtype: torch.dtype) -> Executor:
    """Returns the Executor with packed modules in place of its own, which it shares otherwise.

    Args:
        dtype: of the packed weights.

    Returns:
        The Executor itself if it is not on a CPU, or PyTorch was built without oneDNN.
    """
    if executor.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return executor
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    blocks: Iterable[Any] = executor.blocks
    rotary = PackedRotary(executor.positions.rotary)
    modules: dict[str, nn.Module] = {
        # In float32 inside a caller's autocast, too, as PackedBlock needs it.
        "tok_emb": nn.Embedding.from_pretrained(executor.tok_emb.weight),
        "blocks": nn.ModuleList(PackedBlock(block, dtype) for block in blocks),
        "lm_head": PackedLinear(executor.lm_head, dtype),
        "positions": with_modules(executor.positions, {"rotary": rotary}),
    }
    if executor.from_ngrams is not None:
        modules["from_ngrams"] = PackedLinear(executor.from_ngrams, torch.float32)
    return with_modules(executor, modules)


def with_modules(module: M, replacements: dict[str, nn.Module]) -> M:
    """Returns a shallow copy of a module with some submodules replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replacements}
    return twin
