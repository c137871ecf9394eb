"""The batches of a run, and their way to the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

from ..config import TrainConfig
from ..data import Batch, Dataset, Shard
from ..distributed import rank, world_size
from ..model import HRMModel
from ..ngrams.mixture import WindowCounts
from .schedule import batch_shape
from .state import RunState

T = TypeVar("T")
StepBatches = tuple[int, list[Batch]]  # how many items of the epoch are done after the step


def step_batches(
    data: Dataset,
    options: TrainConfig,
    model: HRMModel,
    state: RunState,
    progress: Callable[[], float],
) -> Iterator[StepBatches]:
    """Yields for each step, until the run is over, how many items of the epoch are done after it,
    and this process's part of its micro-batches.

    Args:
        state: where the run stands at first.
        progress: fraction of the run that is done. The size of a batch follows from it when the
            batch is drawn.
    """
    n, shard = world_size(), Shard(rank(), world_size())
    epoch, item = state.epoch, state.item

    def size() -> tuple[int, int]:
        return batch_shape(options, model.config.max_len, progress(), n, model.device)

    while progress() < 1:
        batches = data.batches(size, options.seed, epoch, item, shard)
        while group := list(itertools.islice(batches, options.grad_accum)):
            yield group[-1][0], [batch for _, batch in group]
            if progress() >= 1:
                return
        epoch, item = epoch + 1, 0


class LoadedBatch(NamedTuple):
    """A batch on the model's device, the counts of its contexts, see `NgramMixture.lookup`, and the
    number of its targets."""

    batch: Batch
    counts: WindowCounts | None
    n_targets: int


class Loader:
    """Moves batches to the model's device and looks up their contexts.

    On a GPU this has a stream of its own: the batches of the next step are loaded while the kernels
    of a step run, and what the host waits for is not the step.
    """

    def __init__(self, model: HRMModel) -> None:
        self.model, self.device = model, model.device
        is_cuda = self.device.type == "cuda"
        # A high priority: a lookup is many small kernels, one waiting for the other.
        self.stream = torch.cuda.Stream(self.device, priority=-1) if is_cuda else None
        self.next: tuple[list[Batch], list[LoadedBatch]] | None = None

    def load(self, batches: list[Batch]) -> list[LoadedBatch]:
        """Loads the batches of a step, if they have not been loaded yet."""
        if self.next is None or self.next[0] is not batches:
            self.start(batches)
        assert self.next is not None
        (_, loaded), self.next = self.next, None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in tensors_of(loaded):  # so that their memory is not used again too soon
                tensor.record_stream(current)
        return loaded

    def start(self, batches: list[Batch]) -> None:
        """Starts to load the batches of a step."""
        with torch.cuda.stream(self.stream):  # does nothing without one
            self.next = batches, [self._load(batch) for batch in batches]

    def _load(self, batch: Batch) -> LoadedBatch:
        n_targets = batch.n_targets
        if self.stream is not None:
            batch = batch.pin_memory()
        batch = batch.to(self.device)
        ngrams = self.model.executor.ngrams
        if ngrams is None:
            return LoadedBatch(batch, None, n_targets)
        counts = ngrams.lookup(batch.y_in, batch.y_out, batch.preceding_ids, leave_one_out=True)
        return LoadedBatch(batch, counts, n_targets)


def tensors_of(x: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested tuples and lists."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for part in x:
            yield from tensors_of(part)


def with_next(items: Iterator[T], is_ahead: bool) -> Iterator[tuple[T, T | None]]:
    """Yields each item and the one after it, ``None`` after the last.

    Args:
        is_ahead: draw the next item before an item is used; otherwise all come with ``None``.
    """
    if not is_ahead:
        for item in items:
            yield item, None
        return
    current = next(items, None)
    while current is not None:
        following = next(items, None)
        yield current, following
        current = following
