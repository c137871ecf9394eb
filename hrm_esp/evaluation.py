"""Scoring, honestly: the Planner sees only what precedes the bytes being predicted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from .decoding import window_start
from .device import autocast, choose_precision
from .errors import HRMError
from .generation import generate_batch
from .model import HRMModel
from .progress import scoring_bar
from .tokenizer import BOS, PAD

Progress = Callable[[int], object]  # told how many bytes or rows are done


@dataclass(frozen=True)
class TextScore:
    """``n`` bytes, line breaks included, each predicted once."""

    bits_per_byte: float
    n: int

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.3f} bits per byte over {self.n:,} bytes"


Interval = tuple[float, float]


@dataclass(frozen=True)
class PairScore:
    """``n`` rows with a target, answered greedily, and the bits per target byte of all rows, ends
    included.

    Error rates are edits per character and per word of the targets (Levenshtein). Beside each
    figure its 95% confidence interval, by bootstrap over rows (Efron 1979); that of exact match by
    Wilson's score (1927), which holds where all rows are right, too. All but the bits are ``None``
    where no row has a target.
    """

    bits_per_byte: float
    bits_per_byte_interval: Interval
    n: int = 0
    exact_match: float | None = None
    exact_match_interval: Interval | None = None
    char_error_rate: float | None = None
    char_error_rate_interval: Interval | None = None
    word_error_rate: float | None = None
    word_error_rate_interval: Interval | None = None

    def __str__(self) -> str:
        low, high = self.bits_per_byte_interval
        bits = f"{self.bits_per_byte:.3f} ({low:.3f} to {high:.3f}) bits per target byte"
        if self.exact_match is None:
            return bits

        def share(value: float | None, interval: Interval | None) -> str:
            assert value is not None and interval is not None
            return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"

        return (
            f"exact match {share(self.exact_match, self.exact_match_interval)}, "
            f"character errors {share(self.char_error_rate, self.char_error_rate_interval)}, "
            f"word errors {share(self.word_error_rate, self.word_error_rate_interval)} "
            f"over {self.n:,} rows, {bits}"
        )


class Answer(NamedTuple):
    """A pair and what the model answered."""

    pair: Pair
    text: str


@torch.inference_mode()
def row_bits(model: HRMModel, batch: Batch, dtype: torch.dtype) -> np.ndarray:
    """The bits that the targets of each row of a batch cost, (B,)."""
    batch = batch.to(model.device)
    with autocast(model.device, dtype):
        nats = model.nats(*batch).mixed
    return nats.cpu().double().numpy() / math.log(2)  # in this order: MPS has no float64


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
        batch = scoring_windows(stream, max_len, group, model.config.past_len)
        bits += float(row_bits(model, batch, dtype).sum())
        if progress is not None:
            progress(int((batch.y_out != PAD).sum()))
    model.train(training)
    return TextScore(bits / len(stream), len(stream))


def pair_bits(
    model: HRMModel, data: TSVDataset, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> np.ndarray:
    """The bits of each row's target and its tokens, the end included: (rows, 2), in any order."""
    training = model.training
    model.eval()
    rows = []
    for pairs in data.groups(batch_size, np.arange(len(data))):
        batch = data.collate(pairs)
        tokens = (batch.y_out != PAD).sum(1).numpy()
        rows.append(np.stack((row_bits(model, batch, dtype), tokens), axis=1))
    model.train(training)
    return np.concatenate(rows)


def answers(
    model: HRMModel, data: TSVDataset, batch_size: int = 64, progress: Progress | None = None
) -> list[Answer]:
    """The greedy answers to the rows with a target, in their order; of one that is too long to be
    right, the beginning."""
    training = model.training
    model.eval()
    places = [i for i, p in enumerate(data) if not p.lm]
    places.sort(key=lambda i: (len(data[i].target), len(data[i].prompt)))
    found: dict[int, Answer] = {}
    for begin in range(0, len(places), batch_size):
        group = places[begin : begin + batch_size]
        pairs = [data[i] for i in group]
        # 4 bytes more than are read: what no longer fits would depend on the batch.
        texts = generate_batch(
            model, [p.prompt.decode() for p in pairs], mode="answer", precision="fp32",
            max_new_tokens=enough(pairs[-1]) + 4, batch_size=batch_size,
        )  # fmt: skip
        for i, pair, written in zip(group, pairs, texts, strict=True):
            found[i] = Answer(pair, cut(written.text.encode(), enough(pair)).decode())
        if progress is not None:
            progress(len(group))
    model.train(training)
    return [found[i] for i in sorted(found)]


def score_pairs(
    model: HRMModel,
    data: TSVDataset,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> PairScore:
    """Scores pairs. Rows without a target have no answer: they count in the bits alone."""
    given = answers(model, data, batch_size, progress)
    return score_answers(given, pair_bits(model, data, dtype))


def score_answers(given: Sequence[Answer], bits: np.ndarray) -> PairScore:
    """Scores answers; ``bits`` as `pair_bits` gives them, (rows, 2)."""
    per_byte, per_byte_interval = ratio(bits)
    if not given:
        return PairScore(per_byte, per_byte_interval)
    chars, words = [], []
    for pair, text in given:
        target = pair.target.decode()
        chars.append((edit_distance(text, target), len(target)))
        words.append((edit_distance(text.split(), target.split()), len(target.split())))
    right = sum(text == pair.target.decode() for pair, text in given)
    char_rate, char_interval = ratio(np.array(chars))
    word_rate, word_interval = ratio(np.array(words))
    return PairScore(
        bits_per_byte=per_byte,
        bits_per_byte_interval=per_byte_interval,
        n=len(given),
        exact_match=right / len(given),
        exact_match_interval=wilson(right, len(given)),
        char_error_rate=char_rate,
        char_error_rate_interval=char_interval,
        word_error_rate=word_rate,
        word_error_rate_interval=word_interval,
    )


def wilson(right: int, n: int) -> Interval:
    """The 95% confidence interval of a share (Wilson 1927): ``right`` of ``n``."""
    z, share = 1.96, right / n
    middle = share + z * z / (2 * n)
    wide = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return (max(0.0, (middle - wide) / scale), min(1.0, (middle + wide) / scale))


def ratio(rows: np.ndarray, samples: int = 1000) -> tuple[float, Interval]:
    """The sum of the first column over that of the second, rows (N, 2), and its 95% confidence
    interval: percentiles over ``samples`` draws of N rows with replacement."""
    random = np.random.default_rng(0)
    rows, draws = rows.astype(float), np.empty(samples)
    for i in range(samples):
        above, below = rows[random.integers(len(rows), size=len(rows))].sum(0)
        draws[i] = above / max(1.0, below)
    above, below = rows.sum(0)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(above / max(1.0, below)), (float(low), float(high))


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
    predictions: PathLike | None = None,
    sep: str = "line",
) -> TextScore | PairScore:
    """Scores a file: pairs if its name ends in ``.tsv`` or ``.tsv.gz``, else text.

    Args:
        sep: what ends a document of a text, see `load_stream`.
        predictions: a file to write prompt, target and answer of each pair to, between tabs.

    Raises:
        HRMError: a file that cannot be read, or holds nothing; predictions of a text.
    """
    dtype = choose_precision(model.device, precision)
    if predictions is not None:
        check_predictions(path, Path(predictions))
    if not is_table(path):
        text = load_stream([path], encoding, sep=sep)
        with scoring_bar(len(text), "B", show_progress) as bar:
            return score_stream(model, text, dtype, batch_size, bar.update)
    data = dataset_tsv(path, model.config.max_len, encoding=encoding)
    with scoring_bar(len(data), "row", show_progress) as bar:
        given = answers(model, data, 4 * batch_size, bar.update)
    if predictions is not None:
        with open(predictions, "w", encoding="utf-8", newline="\n") as file:
            for pair, answer in given:
                # A tab or a line break in an answer would look like the next column or row.
                columns = pair.prompt.decode(), pair.target.decode(), answer
                file.write("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in columns) + "\n")
    return score_answers(given, pair_bits(model, data, dtype))


def is_table(path: PathLike) -> bool:
    return str(path).endswith((".tsv", ".tsv.gz"))


def check_predictions(path: PathLike, predictions: Path) -> None:
    """Raises HRMError, before the time is spent, if predictions of ``path`` cannot go there."""
    if not is_table(path):
        raise HRMError(f"{path} is not a .tsv: there are no predictions to write")
    if not predictions.parent.is_dir() or predictions.is_dir():
        raise HRMError(f"cannot write {predictions}: give a file in a folder that exists")
    if predictions.exists() and predictions.samefile(path):
        raise HRMError(f"--predictions would overwrite {path}: give another file")
