"""Batches: what one step of training or evaluation reads.

Shapes: B rows, S prompt positions, T target positions, R preceding positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..tokenizer import BOS, EOS, PAD

SORT_POOL = 4096  # pairs that are sorted by length together


class Shard(NamedTuple):
    """Every ``world_size``-th row of a batch from ``rank`` on: the part of one process."""

    rank: int
    world_size: int


WHOLE = Shard(0, 1)


class Pair(NamedTuple):
    """A prompt and its target, as UTF-8; ``lm`` marks a row without a target (pure LM)."""

    prompt: bytes
    target: bytes
    lm: bool = False


class Batch(NamedTuple):
    """One batch.

    ``prompt_ids`` (B, S) is read by the Planner, ``y_in`` (B, T) by the Executor, which predicts
    ``y_out`` (B, T), PAD where there is nothing to predict. ``cross_attends`` (B,) marks the rows
    whose Executor may attend to the prompt; ``None`` in a batch of plain text: none may.
    ``preceding_ids`` (B, R), PAD on the left, is the text before ``y_in``, for the n-gram counts
    only; ``None`` is no text. ``is_padded``: whether ``prompt_ids`` have any PAD, if it is known.
    """

    prompt_ids: Tensor
    y_in: Tensor
    y_out: Tensor
    cross_attends: Tensor | None = None
    preceding_ids: Tensor | None = None
    is_padded: bool | None = None

    @property
    def n_targets(self) -> int:
        """Number of tokens to predict."""
        return int((self.y_out != PAD).sum())

    @property
    def has_targets(self) -> Tensor:
        """Rows with something to predict, (B,) bool."""
        return (self.y_out != PAD).any(1)

    def without_targets(self) -> Batch:
        """Returns the same batch with nothing to predict."""
        return self._replace(y_out=torch.full_like(self.y_out, PAD))

    def to(self, device: torch.device) -> Batch:
        """Moves the tensors to a device."""
        is_padded = self.is_padded
        if is_padded is None:  # here it is known without waiting for a GPU
            is_padded = bool((self.prompt_ids == PAD).any())
        batch = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return batch._replace(is_padded=is_padded)

    def pin_memory(self) -> Batch:
        """Copies what is on the CPU to pinned memory, from which a GPU copies without the host."""
        return self._map(lambda x: x.pin_memory() if x.device.type == "cpu" else x)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(function(x) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


class Dataset(Protocol):
    """What the Trainer trains on: ``len`` items (windows or pairs), yielded in batches.

    `LMDataset` and `TSVDataset` are examples; any class with these two methods will do.
    """

    def __len__(self) -> int: ...

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = WHOLE,
    ) -> Iterator[tuple[int, Batch]]:
        """Yields the number of items done in this epoch, and a batch.

        An epoch must yield at least one batch, and its last number must be ``len(self)``.

        Args:
            size: returns the size of the next batch, of all processes together, and into how many
                rows to split each item. The unit of the size is up to the class: `LMDataset` takes
                windows, `TSVDataset` units of ``max_len`` tokens.
            seed, epoch: the order of the items must be a function of these two.
            skip: number of items to skip, when a run is resumed.
            shard: the rows of each batch to return, one process's part.
        """


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Stacks rows of ids as (B, T), PAD on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def pad_left(rows: Sequence[Sequence[int]]) -> Tensor:
    """Stacks rows of ids as (B, R), PAD on the left."""
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rows]).long()


def prompt_tokens(prompt: bytes) -> list[int]:
    """Returns a prompt to be answered as the Planner reads it.

    EOS marks its end: without it the model confuses ``73`` and ``733``.
    """
    return [BOS, *prompt, EOS]


def collate_pairs(pairs: Sequence[Pair], max_len: int) -> Batch:
    """Makes a batch of pairs. For a row without a target the Planner reads BOS alone."""
    prompts = [[BOS] if p.lm else prompt_tokens(p.prompt) for p in pairs]
    targets = [[BOS, *p.target, EOS][: max_len + 1] for p in pairs]
    return Batch(
        pad(prompts),
        pad([t[:-1] for t in targets]),
        pad([t[1:] for t in targets]),
        torch.tensor([not p.lm for p in pairs]),
        pad_left([b"" if p.lm else p.prompt for p in pairs]),
    )


def collate_shard(pairs: Sequence[Pair], max_len: int, shard: Shard) -> Batch:
    """Makes a batch of one shard of the pairs; without targets if the shard is empty."""
    if own := pairs[shard.rank :: shard.world_size]:
        return collate_pairs(own, max_len)
    return collate_pairs(pairs[:1], max_len).without_targets()


def group_by_length(pairs: Sequence[Pair], order: np.ndarray, max_tokens: int) -> list[list[Pair]]:
    """Groups pairs of similar length into batches of at most ``max_tokens``, PAD included.

    Pairs are taken in ``order`` in pools of some thousand, and sorted by length within a pool.
    """
    groups = []
    for begin in range(0, len(order), SORT_POOL):
        pool = [pairs[i] for i in order[begin : begin + SORT_POOL]]
        pool.sort(key=lambda p: (len(p.prompt) + len(p.target), len(p.target)))
        group: list[Pair] = []
        prompt_width = target_width = 0
        for pair in pool:
            prompt = max(prompt_width, len(pair.prompt) + 2)  # BOS and EOS
            target = max(target_width, len(pair.target) + 1)
            if group and (len(group) + 1) * (prompt + target) > max_tokens:
                groups.append(group)
                group, prompt, target = [], len(pair.prompt) + 2, len(pair.target) + 1
            group.append(pair)
            prompt_width, target_width = prompt, target
        groups.append(group)
    return groups
