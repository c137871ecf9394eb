"""Scoring, honestly: the Planner sees only what precedes the bytes being predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .data import (
    Batch,
    Pair,
    PathLike,
    Stream,
    TSVDataset,
    as_inputs,
    as_targets,
    cut,
    dataset_tsv,
    load_stream,
)
from .device import autocast, choose_precision
from .model import HRMModel
from .progress import scoring_bar
from .sampling import answer_batch, window_start
from .tokenizer import BOS, PAD

Progress = Callable[[int], object]  # told how many bytes or rows are done


@dataclass(frozen=True)
class TextScore:
    """``n`` bytes, line breaks included, each predicted once."""

    bits_per_byte: float
    n: int

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.3f} bits per byte over {self.n:,} bytes"


@dataclass(frozen=True)
class PairScore:
    """``n`` rows with a target, answered greedily, and the bits per target byte of all rows, ends
    included.

    Error rates are edits per character and per word of the targets (Levenshtein). All three are
    ``None`` where no row has a target.
    """

    exact_match: float | None
    char_error_rate: float | None
    word_error_rate: float | None
    bits_per_byte: float
    n: int

    def __str__(self) -> str:
        bits = f"{self.bits_per_byte:.3f} bits per target byte"
        if self.exact_match is None:
            return bits
        return (
            f"exact match {self.exact_match:.1%}, character errors {self.char_error_rate:.1%}, "
            f"word errors {self.word_error_rate:.1%} over {self.n:,} rows, {bits}"
        )


@torch.inference_mode()
def sum_bits(model: HRMModel, batch: Batch, dtype: torch.dtype) -> float:
    """The bits that a batch's targets cost."""
    batch = batch.to(model.device)
    with autocast(model.device, dtype):
        nats, _, _ = model.nats(*batch)
    return nats.item() / math.log(2)


def scoring_windows(
    stream: Stream, max_len: int, starts: Sequence[int], recent_len: int = 0
) -> Batch:
    """The windows that begin at each of ``starts``: those the Executor has in generation.

    Each predicts the bytes no earlier window predicts; the Planner reads the ``max_len`` bytes
    before the first of them, and the counts the ``recent_len`` before the window.
    """
    n = len(stream)
    prompt_ids = np.full((len(starts), max_len + 1), PAD)
    y_in, y_out = np.full((2, len(starts), max_len), PAD)
    past = np.full((len(starts), recent_len), PAD)
    prompt_ids[:, 0] = BOS
    for row, start in enumerate(starts):
        end = min(start + max_len, n)
        first = start + max_len // 2 if start else 0
        read = as_inputs(stream[max(0, first - max_len) : first])
        prompt_ids[row, 1 : len(read) + 1] = read
        seen = as_inputs(stream[max(0, start - 1 - recent_len) : start])
        seen = np.concatenate(([BOS], seen)) if start <= recent_len else seen
        past[row, recent_len + 1 - len(seen) :] = seen[:-1]
        y_in[row, 0] = seen[-1]
        y_in[row, 1 : end - start] = as_inputs(stream[start : end - 1])
        y_out[row, first - start : end - start] = as_targets(stream[first:end])
    width = min(max_len, n)
    batch = prompt_ids[:, : (prompt_ids != PAD).sum(1).max()], y_in[:, :width], y_out[:, :width]
    return Batch(*map(torch.from_numpy, batch))._replace(past=torch.from_numpy(past))


def score_stream(
    model: HRMModel,
    stream: Stream,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> TextScore:
    """Bits per byte of a stream (N,), in windows of ``max_len``, ``batch_size`` at a time."""
    training = model.training
    model.eval()
    max_len = model.config.max_len
    last = window_start(len(stream), max_len)
    starts = range(0, last + 1, max_len - max_len // 2)
    bits = 0.0
    # The first window alone: its Planner reads nothing, and PAD would fill the row.
    for group in [
        starts[:1],
        *(starts[i : i + batch_size] for i in range(1, len(starts), batch_size)),
    ]:
        batch = scoring_windows(stream, max_len, group, model.config.recent_len)
        bits += sum_bits(model, batch, dtype)
        if progress is not None:
            progress(int((batch.y_out != PAD).sum()))
    model.train(training)
    return TextScore(bits / len(stream), len(stream))


def pair_bits(
    model: HRMModel, data: TSVDataset, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> float:
    """Bits per target token of all rows, the end of each target included."""
    training = model.training
    model.eval()
    bits, n = 0.0, 0
    for pairs in data.groups(batch_size, np.arange(len(data))):
        batch = data.collate(pairs)
        bits += sum_bits(model, batch, dtype)
        n += int((batch.y_out != PAD).sum())
    model.train(training)
    return bits / n


def score_pairs(
    model: HRMModel,
    data: TSVDataset,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> PairScore:
    """Scores pairs. Rows without a target have no answer: they count in the bits alone."""
    training = model.training
    model.eval()
    rows = sorted((p for p in data if not p.lm), key=lambda p: len(p.target))
    exact = char_edits = word_edits = chars = words = 0
    for i in range(0, len(rows), batch_size):
        group = rows[i : i + batch_size]
        # 4 bytes more than are read: what no longer fits would depend on the batch.
        answers = answer_batch(model, [p.prompt for p in group], enough(group[-1]) + 4)
        for pair, text in zip(group, answers, strict=True):
            answer, target = cut(text.encode(), enough(pair)).decode(), pair.target.decode()
            exact += answer == target
            chars, words = chars + len(target), words + len(target.split())
            char_edits += edit_distance(answer, target)
            word_edits += edit_distance(answer.split(), target.split())
        if progress is not None:
            progress(len(group))
    model.train(training)
    bits, n = pair_bits(model, data, dtype), len(rows)
    if not n:
        return PairScore(None, None, None, bits, 0)
    return PairScore(exact / n, char_edits / chars, word_edits / max(1, words), bits, n)


def enough(pair: Pair) -> int:
    """Bytes of an answer to read: a longer one is wrong already."""
    return 2 * len(pair.target) + 16


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Insertions, deletions and substitutions from ``a`` to ``b`` (Wagner & Fischer 1974)."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def evaluate(
    model: HRMModel,
    path: PathLike,
    *,
    encoding: str = "utf-8",
    precision: str = "auto",
    batch_size: int = 16,
    show_progress: bool = False,
) -> TextScore | PairScore:
    """Scores a file: pairs if its name ends in ``.tsv`` or ``.tsv.gz``, else text.

    Raises:
        HRMError: a file that cannot be read, or holds nothing.
    """
    dtype = choose_precision(model.device, precision)
    if str(path).endswith((".tsv", ".tsv.gz")):
        data = dataset_tsv(path, model.config.max_len, encoding=encoding)
        with scoring_bar(len(data), "row", show_progress) as bar:
            return score_pairs(model, data, dtype, 4 * batch_size, bar.update)
    text = load_stream([path], encoding)
    with scoring_bar(len(text), "B", show_progress) as bar:
        return score_stream(model, text, dtype, batch_size, bar.update)
