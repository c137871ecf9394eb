"""Data-parallel training with ``torch.distributed``. With one process all of this does nothing.

``torchrun`` starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE for each.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import HRMError, PeerLost
from .launch import is_distributed, local_rank, local_world_size

TIMEOUT = timedelta(hours=2)  # one process may read a corpus or validate while the others wait


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the process group if ``torchrun`` started this process; also a decorator."""
    if not is_distributed() or dist.is_initialized():
        yield
        return
    import torch.distributed.nn  # imported later, its default arguments would keep the group alive

    backend = "gloo"  # beside NCCL too, for tensors on the CPU
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()  # a model that still refers to the group keeps gloo's threads alive at exit
        dist.destroy_process_group()


def rank() -> int:
    """Returns the index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(*values: float) -> list[float]:
    """Returns the sum of each value over all processes.

    Raises:
        PeerLost: another process is gone.
    """
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    with detect_lost_peers():
        dist.all_reduce(total)
    return total.tolist()


def barrier() -> None:
    """Waits for all processes.

    Raises:
        PeerLost: another process is gone.
    """
    all_reduce_sum(0.0)  # unlike dist.barrier, on the CPU for any backend


def require_equal(what: str, value: object) -> None:
    """Checks that all processes have the same value: otherwise they would wait for ever.

    Raises:
        HRMError: they do not; the message names ``what``.
        PeerLost: another process is gone.
    """
    if world_size() == 1:
        return
    values: list[object] = [None] * world_size()
    with detect_lost_peers():
        dist.all_gather_object(values, value)
    if any(v != value for v in values):
        raise HRMError(f"the processes of this run do not have the same {what}")


def require_one_gpu_each(device: torch.device) -> None:
    """Checks that no two processes of this machine share a GPU, which NCCL refuses.

    Raises:
        HRMError: they do.
    """
    n_processes = local_world_size()
    if device.type == "cuda" and n_processes > (n_gpus := torch.cuda.device_count()):
        raise HRMError(
            f"{n_processes} processes on this machine, but {n_gpus} GPU{'s' * (n_gpus != 1)}: "
            f"start torchrun with --nproc_per_node={n_gpus}, or give --device cpu"
        )


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """One process of each machine runs the block before the others: it builds files they read.

    If it fails, the others find it gone.
    """
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def data_parallel(
    module: nn.Module, find_unused: bool, synced_buffers: tuple[str, ...] = ()
) -> nn.Module:
    """Wraps a module in DistributedDataParallel, which averages gradients over all processes.

    Args:
        find_unused: some steps leave some parameters without a gradient.
        synced_buffers: name endings of the buffers that process 0 broadcasts before each step.

    Raises:
        HRMError: there are fewer GPUs than processes.
        PeerLost: another process is gone.
    """
    if world_size() == 1:
        return module
    require_one_gpu_each(next(module.parameters()).device)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of the codebook
    # Each process builds the other buffers itself: the n-gram table is large and memory-mapped.
    ignored = [name for name, _ in module.named_buffers() if not name.endswith(synced_buffers)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    with detect_lost_peers():
        return DistributedDataParallel(module, find_unused_parameters=find_unused)


def no_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Skips averaging gradients, for all but the last micro-batch of a step."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


@contextmanager
def detect_lost_peers() -> Iterator[None]:
    """Raises PeerLost in place of the error of a collective operation, also after a time-out."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost from error
        raise
