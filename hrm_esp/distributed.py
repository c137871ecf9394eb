"""Many processes, one run, through ``torch.distributed``. Alone, all of this does nothing.

``torchrun`` starts the processes and says to each, in its environment, which of how many it is.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import PeerLost

PATIENCE = timedelta(hours=2)  # for one that is reading a corpus, or scoring


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that ``torchrun`` started, if it did; also a decorator."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"  # also beside NCCL, for what is on the CPU
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
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
    """Goes on when all processes are here.

    Raises:
        PeerLost: another process is gone.
    """
    summed(0.0)


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Holds the others back until one process of each machine is through: it makes files that they
    read."""
    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()


def parallel(module: nn.Module, some_unused: bool) -> nn.Module:
    """The module, its gradients averaged over all processes as they are computed.

    Args:
        some_unused: there are steps that leave some parameters without gradients.
    """
    if world_size() == 1:
        return module
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of the codes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name for it
        return DistributedDataParallel(
            module, find_unused_parameters=some_unused, broadcast_buffers=False
        )


def without_averaging(module: nn.Module) -> AbstractContextManager[None]:
    """For all but the last of the batches whose gradients are accumulated."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


@contextmanager
def noticing_lost_peers() -> Iterator[None]:
    """Tells an error of a collective operation from all others.

    Raises:
        PeerLost: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeerLost from error
        raise
