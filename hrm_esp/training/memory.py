"""Whether training fits into memory.

`check_memory` estimates it before anything is allocated: a system that runs out of memory may kill
the process without a word. Its estimates are lower bounds, so that nothing is refused that would
have fit. On a GPU, `fit_batch_size` tries out how large a batch may be.
"""

from __future__ import annotations

import os

import torch

from ..config import HRMConfig
from ..console import print0
from ..data import Batch
from ..device import autocast
from ..distributed import all_reduce_sum
from ..errors import HRMError
from ..model import HRMModel
from ..model.skeleton import skeleton
from .loss import loss

WEIGHT_BYTES = 4
COPIES = 3  # of each weight: itself, its gradient and a moment of it; or two moments
ACTIVATION_BYTES = 2  # in bfloat16


def check_memory(config: HRMConfig, device: torch.device, n_rows: int = 0, length: int = 0) -> None:
    """Checks that a model can be trained on a device.

    Args:
        n_rows, length: rows of the largest batch, and tokens of a row.

    Raises:
        HRMError: it needs more memory than there is.
    """
    n_weights = sum(p.numel() for p in skeleton(config).parameters())
    weights = WEIGHT_BYTES * n_weights + rotary_bytes(config)
    total = COPIES * weights + batch_bytes(config, device, n_rows, length)
    for place, need in ((torch.device("cpu"), weights), (device, total)):  # built on the CPU
        have = total_memory(place)
        if have is None or need <= have:
            continue
        if n_rows and COPIES * weights <= have:
            what, advice = "a batch of this size", "--batch_size or --max_len"
        else:
            what, advice = "this model", "--size, --d_model or number of layers"
        raise HRMError(
            f"training {what} takes at least {need / 1e9:,.1f} GB, and there are "
            f"{have / 1e9:,.1f} GB: give a smaller {advice}"
        )


def rotary_bytes(config: HRMConfig) -> int:
    """Returns the size of the rotary tables of the Planner and of the Executor."""
    is_rotary = config.positions == "rotary"
    return 2 * 2 * WEIGHT_BYTES * config.max_len * config.head_dim * is_rotary


def batch_bytes(config: HRMConfig, device: torch.device, n_rows: int, length: int) -> int:
    """Returns the size of what the Executor keeps of a batch for the backward pass on a CPU: inputs
    and outputs of the matrix products, and the attention weights. A GPU says itself what does not
    fit."""
    if device.type != "cpu":
        return 0
    widths = (8 + 3 * config.ff_mult) * config.d_model
    per_token = ACTIVATION_BYTES * widths + WEIGHT_BYTES * config.n_heads * (length // 2)
    return n_rows * length * config.n_layers_dec * per_token


def fit_batch_size(model: HRMModel, batch_size: int, dtype: torch.dtype) -> int:
    """Halves a batch size until a step fits into the memory of the GPU, in all processes.

    Raises:
        HRMError: not even one window fits.
    """
    fitting = batch_size
    while all_reduce_sum(not fits(model, fitting, dtype))[0]:
        fitting //= 2
        if not fitting:
            raise HRMError("out of memory: give a smaller --size or --max_len")
    if fitting < batch_size:
        print0(f"batch size: {fitting}, because {batch_size} do not fit into the GPU's memory")
    return fitting


def fits(model: HRMModel, n_rows: int, dtype: torch.dtype) -> bool:
    """Whether a step on so many full windows, with the optimizer's moments, fits into memory."""
    config, device = model.config, model.device
    try:
        moments = [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
        ids = torch.full((n_rows, config.max_len), ord(" "), device=device)
        attends = torch.ones(n_rows, dtype=torch.bool, device=device)
        batch = Batch(ids, ids, ids, attends if config.cross_attention else None, is_padded=False)
        with autocast(device, dtype):
            loss(model, batch).total.backward()
        del moments
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return True


def total_memory(device: torch.device) -> int | None:
    """Returns the bytes of memory of a device, ``None`` if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on Windows
        return None
