"""Weights as checkpoints store them: matrices in bfloat16, and n-gram counts packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ngrams.packing import pack_table, unpack_table

TABLE = "executor.ngrams.table"
BUFFERS = (f"{TABLE}.entries", f"{TABLE}.cumulative")
MIN_NUMEL = 4096  # of a tensor in bfloat16: what is smaller takes no space


def compact_weights(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the content of a checkpoint of some weights; `expand_weights` is the inverse, but for
    the rounding to bfloat16."""
    stored = map_shared(
        lambda t: t.bfloat16() if t.dtype == torch.float32 and t.numel() >= MIN_NUMEL else t,
        without_counts(weights),
    )
    content: dict[str, Any] = {"weights": stored}
    if BUFFERS[0] in weights:
        content["counts"] = pack_table(*(weights[name].cpu() for name in BUFFERS))
    return content


def expand_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the weights in float32.

    Raises:
        KeyError, ValueError: the content does not fit together.
    """
    weights = map_shared(
        lambda t: t.float() if t.dtype == torch.bfloat16 else t, content["weights"]
    )
    if "counts" in content:
        weights |= zip(BUFFERS, unpack_table(content["counts"]), strict=True)
    return weights


def without_counts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights without the n-gram table."""
    return {name: tensor for name, tensor in weights.items() if name not in BUFFERS}


def map_shared(
    function: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Applies a function to tensors; those that share memory before share it afterwards."""
    results: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in tensors.values():
        key = (tensor.data_ptr(), tensor.shape)
        results[key] = results[key] if key in results else function(tensor)
    return {name: results[t.data_ptr(), t.shape] for name, t in tensors.items()}
