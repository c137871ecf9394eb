"""Evaluation. The Planner reads only what precedes the bytes being predicted.

Shapes: B rows, N bytes of a stream, T = max_len.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..console import progress_bar
from ..data import (
    Batch,
    ByteStream,
    Pair,
    TSVDataset,
    as_inputs,
    as_targets,
    dataset_tsv,
    document_text,
    encode_prompt,
    is_table,
    load_stream,
    truncate_utf8,
)
from ..device import adapt_threads, autocast, choose_precision, eval_mode
from ..errors import HRMError
from ..files import PathLike, check_output
from ..generation import generate_batch, window_start, window_stride
from ..generation.decoder import Decoder
from ..generation.sampling import UTF8_ALLOWED, UTF8_NEXT_STATE
from ..model import HRMModel
from ..tokenizer import BOS, EOS, PAD
from .metrics import Interval, bootstrap_ratio, edit_distance, wilson_interval

# nats; a decoder with caches rounds differently, so a smaller margin might have another sign there.
MIN_MARGIN = 0.01
MIN_RIGHT = 0.5  # share of right answers below which it is not faster to look for them first

Progress = Callable[[int], object]  # called with the number of bytes or rows just done


@dataclass(frozen=True)
class TextScore:
    """Score of a text of ``n`` bytes, line breaks included, each predicted once."""

    bits_per_byte: float
    n: int

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.3f} bits per byte over {self.n:,} bytes"


@dataclass(frozen=True)
class PairScore:
    """Score of pairs: greedy answers to the ``n`` rows with a target, and bits per target byte of
    all rows, their ends included.

    Error rates are edits per character and per word of the targets. Intervals are 95% confidence
    intervals: Wilson's for exact match, bootstrap over rows for the rest. All but the bits are
    ``None`` where no row has a target.
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

        def percent(value: float | None, interval: Interval | None) -> str:
            assert value is not None and interval is not None
            return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"

        return (
            f"exact match {percent(self.exact_match, self.exact_match_interval)}, "
            f"character errors {percent(self.char_error_rate, self.char_error_rate_interval)}, "
            f"word errors {percent(self.word_error_rate, self.word_error_rate_interval)} "
            f"over {self.n:,} rows, {bits}"
        )


class Answer(NamedTuple):
    """A pair and the model's answer to its prompt."""

    pair: Pair
    text: str


@torch.inference_mode()
def batch_bits(model: HRMModel, batch: Batch, dtype: torch.dtype) -> np.ndarray:
    """Returns the bits of each target, (B, T), 0 at PAD."""
    adapt_threads()
    batch = batch.to(model.device)
    with autocast(model.device, dtype):
        nll = model.target_nll(*batch)
    return nll.cpu().double().numpy() / math.log(2)  # on the CPU first: MPS has no float64


def scoring_windows(
    stream: ByteStream, max_len: int, starts: Sequence[int], recent_len: int = 0
) -> Batch:
    """Makes a batch of the windows that begin at ``starts``, the same as in generation.

    The targets of a window are the bytes that no earlier window predicts. The Planner reads the
    ``max_len`` bytes before the first target, the n-gram counts the ``recent_len`` bytes before the
    window.

    Returns:
        prompt_ids (B, max_len + 1 or less), y_in and y_out (B, max_len or less), preceding_ids (B,
        recent_len).
    """
    n = len(stream)
    prompt_ids = np.full((len(starts), max_len + 1), PAD)
    y_in, y_out = np.full((2, len(starts), max_len), PAD)
    preceding_ids = np.full((len(starts), recent_len), PAD)
    prompt_ids[:, 0] = BOS
    for row, start in enumerate(starts):
        end = min(start + max_len, n)
        # The first target: the windows before predict all bytes up to it.
        first = start + max_len - window_stride(max_len) if start else 0
        prompt = as_inputs(stream[max(0, first - max_len) : first])
        prompt_ids[row, 1 : len(prompt) + 1] = prompt
        # y_in begins with the token before the window, the preceding text ends before that token.
        preceding = as_inputs(stream[max(0, start - 1 - recent_len) : start])
        if start <= recent_len:
            preceding = np.concatenate(([BOS], preceding))
        preceding_ids[row, recent_len + 1 - len(preceding) :] = preceding[:-1]
        y_in[row, 0] = preceding[-1]
        y_in[row, 1 : end - start] = as_inputs(stream[start : end - 1])
        y_out[row, first - start : end - start] = as_targets(stream[first:end])
    width = min(max_len, n)
    prompt_width = (prompt_ids != PAD).sum(1).max()
    return Batch(
        torch.from_numpy(prompt_ids[:, :prompt_width]),
        torch.from_numpy(y_in[:, :width]),
        torch.from_numpy(y_out[:, :width]),
        preceding_ids=torch.from_numpy(preceding_ids),
    )


def byte_bits(
    model: HRMModel,
    stream: ByteStream,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """Returns the bits of each byte of a stream, (N,), in windows of ``max_len``, ``batch_size`` at
    a time."""
    max_len = model.config.max_len
    last = window_start(len(stream), max_len)
    starts = range(0, last + 1, window_stride(max_len))
    # The first window is a batch of its own: its Planner reads BOS only, the rest would be PAD.
    groups = [starts[:1], *(starts[i : i + batch_size] for i in range(1, len(starts), batch_size))]
    bits = []
    with eval_mode(model):
        for group in groups:
            batch = scoring_windows(stream, max_len, group, model.config.preceding_len)
            bits.append(batch_bits(model, batch, dtype)[(batch.y_out != PAD).numpy()])
            if progress is not None:
                progress(len(bits[-1]))
    return np.concatenate(bits)


def score_stream(
    model: HRMModel,
    stream: ByteStream,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> TextScore:
    """Scores a stream (N,); arguments as in `byte_bits`."""
    bits = byte_bits(model, stream, dtype, batch_size, progress)
    return TextScore(float(bits.sum()) / len(stream), len(stream))


def target_bits(
    model: HRMModel,
    data: TSVDataset,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Iterator[tuple[Pair, np.ndarray]]:
    """Yields each row, in any order, and the bits of each token of its target, the end included."""
    with eval_mode(model):
        for pairs in data.groups(batch_size, np.arange(len(data))):
            batch = data.collate(pairs)
            bits, is_target = batch_bits(model, batch, dtype), (batch.y_out != PAD).numpy()
            yield from zip(pairs, map(np.compress, is_target, bits), strict=True)
            if progress is not None:
                progress(len(pairs))


def pair_bits(
    model: HRMModel, data: TSVDataset, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> np.ndarray:
    """Returns the bits of each row's target and its number of tokens, the end included:
    (len(data), 2), in any order."""
    rows = target_bits(model, data, dtype, batch_size)
    return np.array([(bits.sum(), len(bits)) for _, bits in rows])


@torch.inference_mode()
def score_targets(
    model: HRMModel, data: TSVDataset, dtype: torch.dtype = torch.float32, batch_size: int = 8
) -> np.ndarray:
    """Scores each row's target without generating an answer: (len(data), 3), its bits, its number
    of tokens with the end, and its margin.

    The margin is that of the least certain token of the target: its log-probability minus that of
    the most likely other token which greedy decoding may choose, in nats. If it is positive, the
    greedy answer is the target, else it is not, but for rounding near zero.
    """
    scores: dict[Pair, tuple[float, int, float]] = {}
    with eval_mode(model):
        for pairs in data.groups(batch_size, np.arange(len(data))):
            adapt_threads()
            batch = data.collate(pairs).to(model.device)
            with autocast(model.device, dtype):
                plan, encoded = model.encode_prompt(batch.prompt_ids, batch.cross_attends)
                log_probs = model.executor(batch.y_in, plan.plan, encoded, batch.preceding_ids)
            rows = zip(pairs, log_probs.float().cpu().numpy(), batch.y_out.tolist(), strict=True)
            for pair, row, padded in rows:
                ids = [token for token in padded if token != PAD]
                bits = -row[range(len(ids)), ids].sum(dtype=np.float64) / math.log(2)
                margin = greedy_margin(row[: len(ids)], ids)
                if ids[-1] != EOS and margin > 0 and not pair.lm:
                    margin = min(margin, end_margin(model, data, pair))
                scores[pair] = bits, len(ids), margin
    return np.array([scores[pair] for pair in data]).reshape(-1, 3)


def greedy_margin(log_probs: np.ndarray, ids: Sequence[int]) -> float:
    """Returns the smallest margin of the tokens ``ids`` (T,), see `score_targets`.

    Args:
        log_probs: of all tokens at each position, (T, V).
        ids: begin with a whole character, or the end.
    """
    states = itertools.accumulate(
        ids[:-1], lambda state, token: int(UTF8_NEXT_STATE[state, token]), initial=0
    )
    others = np.where(UTF8_ALLOWED[list(states), -1], log_probs, -np.inf)
    others[range(len(ids)), ids] = -np.inf
    return float((log_probs[range(len(ids)), ids] - others.max(1)).min())


def end_margin(model: HRMModel, data: TSVDataset, pair: Pair) -> float:
    """Returns the margin of the end after a target that fills ``max_len``: the window that predicts
    it is the next one."""
    batch = data.collate([pair]).to(model.device)
    plan, encoded = model.encode_prompt(batch.prompt_ids, batch.cross_attends)
    sequences = [[BOS, *pair.target]]
    decoder = Decoder(model, model.executor, plan.plan, sequences, encoded, [pair.prompt])
    return greedy_margin(decoder.verify()[0, -1:], [EOS])


def answer_pairs(
    model: HRMModel, data: TSVDataset, batch_size: int = 64, progress: Progress | None = None
) -> list[Answer]:
    """Returns greedy answers to the rows with a target, in their order. An answer that is too long
    to be right is cut. Always in float32: answers must not depend on the batch."""
    indices = [i for i, p in enumerate(data) if not p.lm]
    indices.sort(key=lambda i: (len(data[i].target), len(data[i].prompt)))
    # Step 1: find right answers, as long as there are many; long targets are last.
    answers: dict[int, Answer] = {}
    for begin in range(0, len(indices), batch_size):
        group = indices[begin : begin + batch_size]
        is_right = surely_right(model, TSVDataset([data[i] for i in group], data.max_len))
        for i in itertools.compress(group, is_right):
            answers[i] = Answer(data[i], document_text(data[i].target))
        if len(answers) < MIN_RIGHT * (begin + len(group)):
            break
    if progress is not None:
        progress(len(answers))
    # Step 2: generate the other answers.
    indices = [i for i in indices if i not in answers]
    for begin in range(0, len(indices), batch_size):
        group = indices[begin : begin + batch_size]
        pairs = [data[i] for i in group]
        # 4 bytes more than are kept: where a last character no longer fits depends on the batch.
        completions = generate_batch(
            model, [document_text(p.prompt) for p in pairs], mode="answer", precision="fp32",
            max_new_tokens=max_answer_len(pairs[-1]) + 4, batch_size=batch_size,
        )  # fmt: skip
        for i, pair, completion in zip(group, pairs, completions, strict=True):
            text = truncate_utf8(completion.text.encode(), max_answer_len(pair)).decode()
            answers[i] = Answer(pair, text)
        if progress is not None:
            progress(len(group))
    return [answers[i] for i in sorted(answers)]


def surely_right(model: HRMModel, data: TSVDataset) -> list[bool]:
    """Returns for each row whether the generated answer will be the target; false if that is not
    certain."""
    config, margins = model.config, score_targets(model, data)[:, 2]
    # Generation makes a space of a line break that the model does not know.
    prompts = [
        encode_prompt(document_text(p.prompt), config.max_len, config.line_breaks) for p in data
    ]
    return [
        margin > MIN_MARGIN and prompt == pair.prompt
        for margin, prompt, pair in zip(margins, prompts, data, strict=True)
    ]


def max_answer_len(pair: Pair) -> int:
    """Returns a number of bytes from which on an answer is surely wrong: twice the target's length,
    and a margin for short targets."""
    return 2 * len(pair.target) + 16


def score_pairs(
    model: HRMModel,
    data: TSVDataset,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> PairScore:
    """Scores pairs. Rows without a target count in the bits only."""
    answers = answer_pairs(model, data, batch_size, progress)
    return score_answers(answers, pair_bits(model, data, dtype))


def score_answers(answers: Sequence[Answer], bits: np.ndarray) -> PairScore:
    """Scores answers; ``bits`` (rows, 2) as `pair_bits` returns them."""
    bits_per_byte, bits_interval = bootstrap_ratio(bits)
    if not answers:
        return PairScore(bits_per_byte, bits_interval)
    chars, words = [], []
    for pair, text in answers:
        target = document_text(pair.target)
        chars.append((edit_distance(text, target), len(target)))
        words.append((edit_distance(text.split(), target.split()), len(target.split())))
    n_correct = sum(text == document_text(pair.target) for pair, text in answers)
    char_rate, char_interval = bootstrap_ratio(np.array(chars))
    word_rate, word_interval = bootstrap_ratio(np.array(words))
    return PairScore(
        bits_per_byte=bits_per_byte,
        bits_per_byte_interval=bits_interval,
        n=len(answers),
        exact_match=n_correct / len(answers),
        exact_match_interval=wilson_interval(n_correct, len(answers)),
        char_error_rate=char_rate,
        char_error_rate_interval=char_interval,
        word_error_rate=word_rate,
        word_error_rate_interval=word_interval,
    )


def evaluate(
    model: HRMModel,
    path: PathLike,
    *,
    encoding: str = "utf-8",
    precision: str = "auto",
    batch_size: int = 16,
    show_progress: bool = False,
    predictions: PathLike | None = None,
    sep: str | None = None,
    keep_licence: bool = False,
    prompt_col: str | None = None,
    target_col: str | None = None,
    lm: bool = False,
) -> TextScore | PairScore:
    """Scores a file: as pairs if its name is that of a table (.tsv, .csv or .jsonl), else as text.

    Args:
        encoding: of the file.
        precision: of the matrix products when bits are computed; answers are generated in float32.
        batch_size: windows per batch; four times as many answers are generated together.
        show_progress: show a bar on a terminal.
        sep: what ends a document of a text, see `load_documents`; by default as in pretraining.
        keep_licence: keep Project Gutenberg's licence in a text.
        prompt_col, target_col, lm: of a table, see `dataset_tsv`; by default the columns that the
            model was finetuned on, if the table has them.
        predictions: a file to write prompt, target and answer of each pair to, separated by tabs.

    Raises:
        HRMError: a file that cannot be read or is empty; predictions of a text.
    """
    dtype = choose_precision(model.device, precision)
    if predictions is not None:
        if not is_table(path):
            raise HRMError(f"{path} is not a table: there are no predictions to write")
        check_output("--predictions", predictions, path, is_replaced=False)
    if not is_table(path):
        sep = model.config.sep if sep is None else sep
        text = load_stream([path], encoding, sep=sep, keep_licence=keep_licence)
        with progress_bar(len(text), "B", show_progress) as bar:
            return score_stream(model, text, dtype, batch_size, bar.update)
    data = dataset_tsv(
        path,
        model.config.max_len,
        encoding=encoding,
        prompt_col=prompt_col,
        target_col=target_col,
        lm=lm,
        trained=model.columns,
    )
    with progress_bar(len(data), "row", show_progress) as bar:
        answers = answer_pairs(model, data, 4 * batch_size, bar.update)
    if predictions is not None:
        with open(predictions, "w", encoding="utf-8", newline="\n") as file:
            for pair, answer in answers:
                # A tab or line break in an answer would look like the next column or row.
                columns = document_text(pair.prompt), document_text(pair.target), answer
                file.write("\t".join(re.sub(r"[\t\r\n]", " ", c) for c in columns) + "\n")
    return score_answers(answers, pair_bits(model, data, dtype))
