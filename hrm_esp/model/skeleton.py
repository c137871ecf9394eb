"""A model without its weights, to compare a checkpoint with before memory is allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..config import HRMConfig
from .hrm import HRMModel

FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.randn)


class _WithoutMemory(TorchFunctionMode):
    """Puts weights on the meta device, does not initialize them, and makes ranges empty.

    The rotary tables, which are made from ranges, are then empty, too. On the meta device their
    arithmetic would import torch._dynamo, as ``torch.randn`` does, which takes seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            return torch.empty(*args, **kwargs | {"device": "meta"})
        if func is torch.arange:
            return torch.arange(0)
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def skeleton(config: HRMConfig) -> HRMModel:
    """Builds a model whose parameters and persistent buffers have names, shapes and dtypes, but no
    values and no memory, whatever their size. It cannot be run."""
    with _WithoutMemory():
        return HRMModel(config)
