"""Which device, and in which precision."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .errors import HRMError


def choose_device(name: str | None = None, cpu: bool = False) -> torch.device:
    """The named device, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Raises:
        HRMError: no such device here.
    """
    if cpu:
        name = "cpu"
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HRMError(f"no device {name!r} here: give --device cpu, or none") from error
    return device


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; emulated they are slower."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def choose_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype of matrix products in training and scoring; float32 means no autocast."""
    if precision == "auto":
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        else:
            precision = "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def keep_freed_memory() -> None:
    """Has glibc keep what is freed for what comes next. It gives large blocks back to the system
    otherwise, and each step of a training pays for fresh pages. For the whole process, for good.

    What is free by now is given back first: reading a corpus takes more than training does.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    except (AttributeError, OSError, TypeError):
        return  # another C library


@contextmanager
def at_most(n_threads: int) -> Iterator[None]:
    """So many CPU threads for what is computed inside, if there are more: where there is little to
    share, others save no time, and waiting for them costs much on a busy machine. Other threads of
    the program keep their number, but one that first computes meanwhile keeps this one."""
    before = torch.get_num_threads()
    if before <= n_threads:
        yield
        return
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision, or nothing for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)
