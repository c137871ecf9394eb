"""Devices, precision and CPU threads."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from .cpu_load import SINCE_START, n_usable_cpus
from .errors import HRMError
from .launch import launched_rank, local_rank, local_world_size
from .streams import STDERR

LOAD_SECONDS = 1.0  # between two looks at what other processes do


def choose_device(name: str | None = None, cpu: bool = False) -> torch.device:
    """Returns the named device, or the best available: CUDA, then MPS, then the CPU. Of the GPUs
    each process of ``torchrun`` gets its own.

    Raises:
        HRMError: this machine has no such device, or it is too old for this build of PyTorch.
    """
    if cpu:
        name = "cpu"
    if name is None:
        if torch.cuda.is_available():
            gpu = own_gpu()
            if (reason := unsupported_gpu(gpu)) is None:
                return gpu
            if launched_rank() == 0:
                print(f"warning: using the CPU: {reason}", file=STDERR)
            return torch.device("cpu")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = own_gpu(device.index)
            if (reason := unsupported_gpu(device)) is not None:
                raise HRMError(f"{reason}: give --device cpu")
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise HRMError(f"no device {name!r} here: give --device cpu, or none") from error
    return device


def own_gpu(index: int | None = None) -> torch.device:
    """Returns the GPU of this process.

    Args:
        index: of the GPU that the user named, if any.

    Raises:
        HRMError: several processes of this machine would share it.
    """
    if local_world_size() == 1:
        return torch.device("cuda" if index is None else f"cuda:{index}")
    if index is not None:
        raise HRMError("give --device cuda, without a number: each process takes a GPU of its own")
    return torch.device("cuda", local_rank() % max(1, torch.cuda.device_count()))


def unsupported_gpu(device: torch.device) -> str | None:
    """Says why this build of PyTorch has no kernels for a GPU; ``None`` if it has."""
    major, minor = torch.cuda.get_device_capability(device)
    # Code for sm_75 runs on 7.5 and later minor versions; compute_75 is compiled for any later GPU.
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    for kind, x, y in built:
        if (major, minor) >= (int(x), int(y)) and (kind == "compute" or major == int(x)):
            return None
    if not built:  # ROCm
        return None
    name = torch.cuda.get_device_name(device)
    return f"this build of PyTorch does not support {name} (compute capability {major}.{minor})"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware; emulation is slower than fp32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def choose_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Returns the dtype of matrix products; float32 disables autocast."""
    if precision == "auto":
        if device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
        else:
            precision = "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision; does nothing for float32."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode, and at the end, even after an error, each of its submodules
    in the mode that it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def limit_threads(n_threads: int) -> Iterator[None]:
    """Uses at most ``n_threads`` CPU threads inside the block.

    Small operations gain nothing from more threads, and waiting for them is slow on a busy machine.
    Other Python threads keep their setting, unless they first compute during the block.
    """
    before = torch.get_num_threads()
    if before <= n_threads:
        yield
        return
    torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class AdaptiveThreads:
    """Uses fewer CPU threads while other processes use the CPUs: an operation ends when its slowest
    thread does, and threads that wait use their CPU, too.

    Results depend on the number of threads, in the last digits. Does nothing where the system does
    not say how busy it is.
    """

    def __init__(self) -> None:
        self.max_threads, self.n_cpus = torch.get_num_threads(), n_usable_cpus()
        self.meter = SINCE_START
        self.adapt()

    def adapt(self) -> None:
        """Sets the number of threads of the calling thread, at most once per second."""
        if time.perf_counter() - self.meter.at < LOAD_SECONDS:
            return
        others = self.meter.others()
        if others is not None:
            torch.set_num_threads(max(1, min(self.max_threads, round(self.n_cpus - others))))


_adaptive: AdaptiveThreads | None = None


def has_own_threads() -> bool:
    """Whether the user has set a number of CPU threads."""
    return "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ


def limit_to_usable_cpus() -> None:
    """Uses no more CPU threads than a container grants, unless the user has set a number."""
    if not has_own_threads():
        torch.set_num_threads(min(torch.get_num_threads(), n_usable_cpus()))


def start_adapting_threads() -> None:
    """Makes `adapt_threads` work from now on, unless the user has set a number of threads."""
    global _adaptive
    _adaptive = None if has_own_threads() else AdaptiveThreads()


@contextmanager
def adaptive_threads() -> Iterator[None]:
    """Makes `adapt_threads` work inside the block."""
    global _adaptive
    before, n_threads = _adaptive, torch.get_num_threads()
    start_adapting_threads()
    try:
        yield
    finally:
        _adaptive = before
        torch.set_num_threads(n_threads)


def adapt_threads() -> None:
    """To be called between two steps of what takes long, see `AdaptiveThreads`."""
    if _adaptive is not None:
        _adaptive.adapt()


def run_eagerly(is_compiled: bool) -> AbstractContextManager[None]:
    """Runs compiled blocks uncompiled, for evaluation: its shapes change at every call."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for later allocations, for the rest of the process.

    By default glibc returns large blocks to the system, and each training step pays for new pages.
    Memory that is free now goes back first: reading a corpus takes more than training.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
    except (AttributeError, OSError, TypeError):
        return  # another C library
