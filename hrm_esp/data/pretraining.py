"""Windows of a corpus for pretraining.

Shapes: B windows, T = max_len bytes, or T = max_len / n_splits where windows are split.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..files import PathLike
from ..tokenizer import BOS
from .batch import WHOLE, Batch, Pair, Shard, collate_shard, group_by_length
from .corruption import corrupt
from .stream import ByteStream, as_inputs, as_targets, load_stream
from .text import truncate_utf8

MAX_HALVINGS = 4  # of a window, before its lines are corrupted
MIN_PART_LEN = 8  # bytes
CORRUPTED_TOKENS = 3  # size of a batch of corrupted lines, in tokens per byte of its windows


class LMDataset(Sequence[Batch]):
    """Windows of ``max_len`` bytes of a stream.

    The stream is a ring: windows from any offset cover all of it. Item ``i`` is the window that
    starts at ``i * max_len``, as a batch of one.

    Args:
        planner_input: what the Planner reads: the ``same`` window or the ``previous`` one.
        preceding_len: bytes before each window that come with it, for the n-gram counts.
        denoise: share of the batches that are `corrupted` lines instead.
    """

    def __init__(
        self,
        stream: ByteStream,
        max_len: int,
        planner_input: str = "same",
        preceding_len: int = 0,
        denoise: float = 0.0,
    ) -> None:
        self.stream, self.max_len, self.planner_input = stream, max_len, planner_input
        self.denoise = denoise
        # In a short corpus the preceding bytes must not wrap around to the window's targets.
        self.preceding_len = max(0, min(preceding_len, len(stream) - max_len - 1))

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / self.max_len)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.windows(np.array([index % len(self) * self.max_len]))

    def windows(self, starts: np.ndarray, n_splits: int = 1) -> Batch:
        """Returns the windows whose targets start at ``starts`` (B,), each split into ``n_splits``
        rows of equal length."""
        length = self.max_len // n_splits
        starts = (starts[:, None] + np.arange(n_splits) * length).ravel()
        ring = self.stream[(starts[:, None] + np.arange(-length, length)) % len(self.stream)]
        y_in, y_out = as_inputs(ring[:, length - 1 : -1]), as_targets(ring[:, length:])
        reads_same = self.planner_input == "same"
        planner_ids = as_inputs(ring[:, length:] if reads_same else ring[:, :length])
        prompt_ids = np.concatenate((np.full((len(starts), 1), BOS), planner_ids), axis=1)
        offsets = np.arange(-1 - self.preceding_len, -1)
        preceding = self.stream[(starts[:, None] + offsets) % len(self.stream)]
        prompt, inputs, targets, preceding_ids = map(
            torch.from_numpy, (prompt_ids, y_in, y_out, as_inputs(preceding))
        )
        return Batch(prompt, inputs, targets, preceding_ids=preceding_ids)

    def corrupted(
        self, starts: np.ndarray, n_splits: int, rng: np.random.Generator, shard: Shard = WHOLE
    ) -> Batch:
        """Returns pairs of corrupted lines and the originals, from the windows at ``starts`` (B,).

        Each of a window's ``n_splits`` parts is halved a random number of times and shortened at
        random; each line in it, or the part of the line that is there, gives one pair.
        """
        n_parts = n_splits * 2 ** int(rng.integers(MAX_HALVINGS + 1))
        n_parts = max(1, min(n_parts, self.max_len // MIN_PART_LEN))
        length = self.max_len // n_parts
        lines: list[str] = []
        for start in (starts[:, None] + np.arange(n_parts) * length).ravel():
            size = int(rng.integers(length // 2, length + 1))
            part = bytes(self.stream[(start + np.arange(size)) % len(self.stream)])
            lines += filter(None, part.decode(errors="ignore").split("\n"))
        pairs = [
            Pair(truncate_utf8(corrupt(line, rng).encode(), self.max_len), line.encode())
            for line in lines
        ] or [Pair(b"", b"")]
        # Usually one group. A few long lines among many short ones would be mostly PAD.
        max_tokens = CORRUPTED_TOKENS * len(starts) * self.max_len
        groups = group_by_length(pairs, rng.permutation(len(pairs)), max_tokens)
        return collate_shard(groups[rng.integers(len(groups))], self.max_len, shard)

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = WHOLE,
    ) -> Iterator[tuple[int, Batch]]:
        """Yields all windows from a random offset, shuffled; a function of ``seed`` and ``epoch``.

        Args:
            size: called before each batch; returns its number of windows and the splits of each.
            skip: number of windows to skip.
            shard: the part of each batch to return.

        Yields:
            The number of windows done, and the batch.
        """
        rng = np.random.default_rng((seed, epoch))
        starts = rng.integers(len(self.stream)) + np.arange(len(self)) * self.max_len
        rng.shuffle(starts)
        while skip < len(starts):
            n, n_splits = size()
            batch_rng = np.random.default_rng((seed, epoch, 1 + skip))
            chosen = starts[skip : skip + n]
            skip = min(skip + n, len(starts))
            if batch_rng.random() < self.denoise:
                yield skip, self.corrupted(chosen, n_splits, batch_rng, shard)
            elif len(own := chosen[shard.rank :: shard.world_size]):
                yield skip, self.windows(own, n_splits)
            else:
                yield skip, self.windows(chosen[:1], n_splits).without_targets()


def dataset_lm(
    paths: PathLike | Sequence[PathLike],
    max_len: int = 512,
    *,
    planner_input: str = "same",
    preceding_len: int = 0,
    encoding: str = "utf-8",
    token_file: PathLike | None = None,
    sep: str = "line",
) -> LMDataset:
    """Loads text files as windows of ``max_len`` tokens for pretraining.

    Args:
        paths: files or folders; ``.gz`` is decompressed.
        planner_input, preceding_len: see `LMDataset`.
        token_file: see `load_stream`.
        sep: what ends a document, see `load_documents`.

    Raises:
        HRMError: a file cannot be read, or none holds any text.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    stream = load_stream(paths, encoding, token_file, sep)
    return LMDataset(stream, max_len, planner_input, preceding_len)
