"""Many processes, one run, through ``torch.distributed``. Alone, all of this does nothing.

``torchrun`` starts the processes and says to each, in its environment, which of how many it is.
"""

from __future__ import annotations

import gc
import os
import sys
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

PATIENCE = timedelta(hours=2)  # one may be reading a corpus, or scoring


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that ``torchrun`` started, if it did; also a decorator."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    import torch.distributed.nn  # imported later, its functions would keep the group as a default

    backend = "gloo"  # also beside NCCL, for what is on the CPU
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()  # while a model holds the group, gloo's threads go on, and may abort the exit
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def say(text: str) -> None:
    """A line on stderr, from the first process alone."""
    if rank() == 0:
        print(text, file=sys.stderr)


def summed(*values: float) -> list[float]:
    """The sum of each value over all processes.

    Raises:
        PeerLost: another process is gone.
    """
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    with noticing_lost_peers():
        dist.all_reduce(total)
    return total.tolist()


def wait_for_all() -> None:
    """Goes on when all processes are here; a sum of nothing waits as well as any.

    Raises:
        PeerLost: another process is gone.
    """
    summed(0.0)


def require_the_same(what: str, value: object) -> None:
    """Processes that differ would wait for each other for ever.

    Raises:
        HRMError: not all have the same value.
        PeerLost: another process is gone.
    """
    if world_size() == 1:
        return
    values: list[object] = [None] * world_size()
    with noticing_lost_peers():
        dist.all_gather_object(values, value)
    if any(v != value for v in values):
        raise HRMError(f"the processes of this run do not have the same {what}")


@contextmanager
def first_process_first() -> Iterator[None]:
    """All go through the block, one process of each machine before the others: it makes files that
    they read. If it fails, they find it gone."""
    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()


def parallel(
    module: nn.Module, some_unused: bool, synced_buffers: tuple[str, ...] = ()
) -> nn.Module:
    """The module, its gradients averaged over all processes as they are computed.

    Args:
        some_unused: there are steps that leave some parameters without gradients.
        synced_buffers: how the names of those end that all take from the first process before each
            step.
    """
    if world_size() == 1:
        return module
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of the codes
    # Each process makes most buffers itself: the table of counts is large, and mapped from a file.
    buffers = [name for name, _ in module.named_buffers() if not name.endswith(synced_buffers)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)
    with noticing_lost_peers():
        return DistributedDataParallel(module, find_unused_parameters=some_unused)


def without_averaging(module: nn.Module) -> AbstractContextManager[None]:
    """For all but the last of the batches whose gradients are accumulated."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


@contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Tells an error of a collective operation from all others; too long a wait is one, too.

    Raises:
        PeerLost: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost from error
        raise
