"""Prompt and target pairs for finetuning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..console import print0
from ..files import PathLike
from .batch import WHOLE, Batch, Pair, Shard, collate_pairs, collate_shard, group_by_length
from .columns import PairColumns
from .stream import VAL_FRACTION
from .table import read_table
from .text import document_bytes, truncate_utf8

MIN_VAL_PAIRS = 50  # pairs held out by default, if that is at most a fifth of all


def encode_prompt(prompt: str, max_len: int, line_breaks: bool = False) -> bytes:
    """Returns a prompt to be answered as bytes, in NFC, cut to ``max_len``. Its line breaks are
    spaces, unless the model knows ``line_breaks``."""
    if not line_breaks:
        prompt = re.sub("[\r\n]+", " ", prompt)
    return truncate_utf8(document_bytes(prompt), max_len)


class TSVDataset(Sequence[Pair]):
    """Pairs in memory, batched by length.

    Args:
        max_len: bytes of a prompt and of a target.
        columns: of the table that they were read from.
    """

    def __init__(
        self, pairs: Sequence[Pair], max_len: int, columns: PairColumns | None = None
    ) -> None:
        self.pairs, self.max_len, self.columns = pairs, max_len, columns

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        return self.pairs[index]

    def collate(self, pairs: Sequence[Pair]) -> Batch:
        """See `collate_pairs`."""
        return collate_pairs(pairs, self.max_len)

    def groups(self, batch_size: int, order: np.ndarray) -> list[list[Pair]]:
        """Groups the pairs into batches of at most ``batch_size * max_len`` tokens."""
        return group_by_length(self.pairs, order, batch_size * self.max_len)

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = WHOLE,
    ) -> Iterator[tuple[int, Batch]]:
        """Yields all pairs once, shuffled; the order is a function of ``seed`` and ``epoch``.

        Args:
            size: called once; its first value is the size of a batch in units of ``max_len``.
            skip: number of pairs to skip.
            shard: the part of each batch to return.

        Yields:
            The number of pairs done, and the batch.
        """
        rng = np.random.default_rng((seed, epoch))
        groups = self.groups(size()[0], rng.permutation(len(self.pairs)))
        n_done = 0
        for i in rng.permutation(len(groups)):
            n_done += len(groups[i])
            if n_done > skip:
                yield n_done, collate_shard(groups[i], self.max_len, shard)


def dataset_tsv(
    path: PathLike,
    max_len: int = 512,
    *,
    encoding: str = "utf-8",
    prompt_col: str | None = None,
    target_col: str | None = None,
    lm: bool = False,
    trained: PairColumns | None = None,
) -> TSVDataset:
    """Reads a table of prompts and targets, and prints how it was understood: see `read_table`.

    A row without a target has its prompt as target (pure LM), with a warning unless ``lm`` says
    that this is meant. A pair longer than ``max_len`` is cut, and a warning counts such pairs.

    Raises:
        HRMError: the file is missing, a folder, not a table, or has no rows, or `read_table`
            refuses it.
    """
    table = read_table(path, encoding, prompt_col, target_col, trained=trained)
    print0(table.describe())
    pairs, n_cut = [], 0
    for prompt_text, target_text in table.rows():
        prompt, target = document_bytes(prompt_text), document_bytes(target_text)
        is_plain_text = not target.strip()
        if is_plain_text:
            target = prompt
        pairs.append(
            Pair(truncate_utf8(prompt, max_len), truncate_utf8(target, max_len), is_plain_text)
        )
        n_cut += len(prompt) > max_len or len(target) > max_len
    n_plain = sum(pair.lm for pair in pairs)
    if n_plain and not lm:
        print0(
            f"warning: {path}: {n_plain:,} of {len(pairs):,} rows have no target and are read as "
            "plain text; give --lm if this is meant"
        )
    if n_cut:
        print0(
            f"warning: {path}: cut {n_cut:,} of {len(pairs):,} pairs, which are longer than "
            f"max_len ({max_len} bytes)"
        )
    return TSVDataset(pairs, max_len, table.pair_columns())


def split_pairs(
    data: TSVDataset, fraction: float | None, seed: int
) -> tuple[TSVDataset, TSVDataset]:
    """Shuffles the rows and holds some of them out.

    Args:
        fraction: of the distinct rows, about. ``None`` is 5%, but of few rows 50, or a fifth if
            that is less: choosing the best checkpoint needs some.

    Returns:
        The training rows, none of which is held out, and the held-out rows, each once.
    """
    pairs = [data[i] for i in np.random.default_rng(seed).permutation(len(data))]
    distinct = list(dict.fromkeys(pairs))
    n = round(len(distinct) * (VAL_FRACTION if fraction is None else fraction))
    if fraction is None:
        n = max(n, min(MIN_VAL_PAIRS, len(distinct) // 5))
    held_out = TSVDataset(distinct[:n], data.max_len)
    return remove_pairs(TSVDataset(pairs, data.max_len, data.columns), held_out), held_out


def remove_pairs(data: TSVDataset, held_out: TSVDataset) -> TSVDataset:
    """Returns the rows of ``data`` that are not held out. Spaces make no difference."""
    scored = set(map(_without_spaces, held_out))
    kept = [p for p in data if _without_spaces(p) not in scored]
    return TSVDataset(kept, data.max_len, data.columns)


def _without_spaces(pair: Pair) -> Pair:
    """Returns a pair with one space for each group of spaces, and none at its ends."""
    prompt, target = (b" ".join(text.split()) for text in (pair.prompt, pair.target))
    return Pair(prompt, target, pair.lm)
