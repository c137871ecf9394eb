"""Weights as checkpoints store them: large tensors in bfloat16, n-gram counts packed. Weights that
are loaded are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import HRMConfig
from ..errors import HRMError
from ..model.skeleton import skeleton
from ..ngrams.packing import pack_table, unpack_table
from ..ngrams.table import is_valid_table
from ..options import describe

TABLE = "executor.ngrams.table"
ENTRIES = f"{TABLE}.entries"  # a tensor whose size depends on the text
MIN_NUMEL = 4096  # of a tensor in bfloat16: what is smaller takes no space


def compact_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a checkpoint stores of some weights without the n-gram counts. `expand_weights`
    is the inverse, but for the rounding to bfloat16."""

    def shorten(tensor: Tensor) -> Tensor:
        is_large = tensor.dtype is torch.float32 and tensor.numel() >= MIN_NUMEL
        return tensor.bfloat16() if is_large else tensor

    return map_shared(shorten, without_counts(weights))


def pack_counts(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Returns the n-gram counts of some weights as a checkpoint stores them, if there are any."""
    return pack_table(weights[ENTRIES].cpu()) if ENTRIES in weights else None


def expand_weights(
    stored: Any, counts: Any, config: HRMConfig, is_state: bool
) -> dict[str, Tensor]:
    """Checks what a checkpoint stores and returns the weights in float32. Takes no memory that
    depends on the config.

    Args:
        stored, counts: see `compact_weights` and `pack_counts`.
        is_state: the weights lack the n-gram counts.

    Raises:
        HRMError: a name, shape, dtype or layout is not that of a model of this config, or values
            are not finite or not valid.
    """
    if not isinstance(stored, dict):
        raise HRMError(f"its weights are {describe(stored)}")
    expected = without_counts(skeleton(config).state_dict())
    if unknown := [name for name in stored if name not in expected]:
        raise HRMError(f"its weights have an unknown name, {describe(unknown[0])}")
    for name, like in expected.items():
        if name not in stored:
            raise HRMError(f"its weights lack {name}")
        check_tensor(name, stored[name], like, may_be_bf16=not is_state)
    weights = map_shared(lambda t: t.float() if t.dtype is torch.bfloat16 else t, stored)
    if config.counts_ngrams and not is_state:
        weights[ENTRIES] = expand_counts(counts)
        if weights[f"{TABLE}.min_count"] < 1:
            raise HRMError("its n-gram counts are not in order")
    return weights


def expand_counts(counts: Any) -> Tensor:
    """Returns the entries of the n-gram table.

    Raises:
        HRMError: they are not those of a table.
    """
    try:
        entries = unpack_table(counts)
    except (
        AttributeError,
        IndexError,
        KeyError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ):
        entries = None
    if entries is None or not is_valid_table(entries):
        raise HRMError("its n-gram counts are not in order")
    return entries


def check_tensor(name: str, found: Any, like: Tensor, may_be_bf16: bool = False) -> None:
    """Checks that a tensor from a file can take the place of another one, and is finite.

    Args:
        like: of any device.
        may_be_bf16: instead of float32.

    Raises:
        HRMError: it cannot, or is not.
    """
    if type(found) is not Tensor:
        raise HRMError(f"{name} is {describe(found)}, not a tensor")
    is_plain = found.layout is torch.strided and found.device.type == "cpu"
    is_plain = is_plain and not (found.is_nested or found.is_neg() or found.requires_grad)
    is_dtype = found.dtype is like.dtype or (
        may_be_bf16 and (like.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    )
    if not is_dtype or not is_plain or not found.is_contiguous():
        raise HRMError(f"{name} is not a dense tensor of {like.dtype}".replace("torch.", ""))
    if found.shape != like.shape:
        shapes = describe(str(tuple(found.shape)))[1:-1], tuple(like.shape)
        raise HRMError("{} has shape {}, not {}".format(name, *shapes))
    if found.is_floating_point() and not is_finite(found):
        raise HRMError(f"{name} is not finite: the run diverged, train again with a lower --lr")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    # A sum is finite only if all numbers are, and is the fastest test; it may also overflow.
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def only_counts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the entries of the n-gram table, if there are any."""
    return {name: weights[name] for name in (ENTRIES,) if name in weights}


def without_counts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights without the n-gram counts."""
    return {name: tensor for name, tensor in weights.items() if name != ENTRIES}


def map_shared(
    function: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Applies a function to tensors; those that share memory before share it afterwards."""
    results: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in tensors.values():
        key = (tensor.data_ptr(), tensor.shape)
        results[key] = results[key] if key in results else function(tensor)
    return {name: results[t.data_ptr(), t.shape] for name, t in tensors.items()}
