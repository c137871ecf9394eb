"""The batches of a run, and their way to the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
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
    progress: Callable[[RunState], float],
) -> Iterator[StepBatches]:
    """Yields for each step, until the run is over, how many items of the epoch are done after it,
    and this process's part of its micro-batches.

    Args:
        state: where the run stands.
        progress: fraction of the run that is done at a state; the size of a batch follows from it.
            It is asked about the state before the step, even if that is still to come.
    """
    n, shard = world_size(), Shard(rank(), world_size())
    step, epoch, item = state.step, state.epoch, state.item

    def fraction() -> float:
        return progress(replace(state, step=step, epoch=epoch, item=item))

    def size() -> tuple[int, int]:
        return batch_shape(options, model.config.max_len, fraction(), n, model.device)

    while fraction() < 1:
        batches = data.batches(size, options.seed, epoch, item, shard)
        while group := list(itertools.islice(batches, options.grad_accum)):
            step, item = step + 1, group[-1][0]
            yield item, [batch for _, batch in group]
            if fraction() >= 1:
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

    On CUDA this has a stream of its own and is one batch ahead: a batch is loaded while the kernels
    of the one before run, and what the host waits for is not those.
    """

    def __init__(self, model: HRMModel) -> None:
        self.model, self.device = model, model.device
        self.is_ahead = self.device.type == "cuda"
        # A high priority: a lookup is many small kernels, one waiting for the other.
        self.stream = torch.cuda.Stream(self.device, priority=-1) if self.is_ahead else None
        self.started: tuple[Batch, LoadedBatch] | None = None

    def load(
        self, batches: list[Batch], next_batches: list[Batch] | None = None
    ) -> Iterator[LoadedBatch]:
        """Yields the batches of a step.

        Args:
            next_batches: of the next step. The first of them is loaded once all work of this step
                on the batches is queued.
        """
        upcoming = [*batches, *(next_batches or [])[:1]]
        for i, batch in enumerate(batches):
            yield self._finish(batch)
            if self.is_ahead and i + 1 < len(upcoming):
                self._start(upcoming[i + 1])

    def _start(self, batch: Batch) -> None:
        stream = self.stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            self.started = batch, self._load(batch)

    def _finish(self, batch: Batch) -> LoadedBatch:
        """Loads a batch, unless that was started, and makes the current stream wait for it."""
        if self.started is None or self.started[0] is not batch:
            self._start(batch)
        assert self.started is not None
        (_, loaded), self.started = self.started, None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in tensors_of(loaded):  # so that their memory is not used again too soon
                tensor.record_stream(current)
        return loaded

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
