"""Pretraining: from a corpus to a model."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import DEFAULT_COUNT_MEMORY, HRMConfig, PretrainConfig
from ..console import print0, progress_bar
from ..data import ByteStream, CorpusStats, LMDataset, corpus_stats, load_stream, split_stream
from ..data.corpus_files import text_files
from ..data.held_out import remove_shared, shared_fraction, shared_units
from ..device import choose_device, choose_precision
from ..distributed import local_rank_zero_first, process_group
from ..errors import HRMError
from ..evaluation import TextScore, score_stream
from ..files import PathLike
from ..model import HRMModel
from ..ngrams import NgramTable
from ..ngrams.table import EarlierCounts
from .continued import Start, read_start
from .early_stopping import Score
from .memory import check_memory, total_memory
from .metrics_log import describe_run
from .resume import run_batch_size
from .run_folder import open_run
from .signals import interruptible
from .trainer import Trainer, TrainResult

VAL_BYTES = 16_384  # of the held-out text, scored at a validation, at most
FINAL_VAL_BYTES = 1_000_000  # scored at the end
MIN_SHARED = 0.01  # share of the held-out text in the training text from which a warning says so


@process_group()
def train_lm(
    corpus: PathLike | Sequence[PathLike],
    config: HRMConfig | None = None,
    options: PretrainConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Pretrains a model on text: next-byte prediction in windows of ``max_len`` bytes.

    In a fraction ``options.denoise`` of the batches the Executor restores corrupted lines, which it
    reads through cross-attention to the Planner.

    Args:
        corpus: text files or folders.
        config: of a new model; ``options.denoise`` decides its ``cross_attention``.
        options: with a `ContinueConfig` a pretrained model is trained further, and the result is a
            `ContinueResult`.
        val: text to score on, a file or a folder, which is left out of the corpus; by default the
            tail of the corpus, ``options.val_fraction``.

    Raises:
        HRMError: bad data or options, a folder that holds a run, or what `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
        KeyboardInterrupt: Ctrl-C or SIGTERM before training; the message says so.
    """
    options = options or PretrainConfig()
    device = device or choose_device()
    dtype = choose_precision(device, options.precision)

    def validate(model: HRMModel, size: float) -> Score:
        text = held_out[: round(VAL_BYTES * size)]
        return Score(None, score_stream(model, text, dtype).bits_per_byte)

    def final_eval(model: HRMModel, text: ByteStream) -> TextScore:
        text = text[:FINAL_VAL_BYTES]
        with progress_bar(len(text), "B") as bar:
            return score_stream(model, text, dtype, progress=bar.update)

    with open_run(options, "pretrain") as resumed:
        # Step 1: read the corpus and hold out a part of it.
        start = read_start(options, resumed)
        with local_rank_zero_first(), interruptible("reading the corpus"):
            stream, held_out = load_corpus(corpus, val, options, start)
        # Step 2: build the model and count the n-grams.
        config = model_config(config, options, start)
        n_windows = math.ceil(len(stream) / config.max_len)
        batch_size = run_batch_size(options, config, device, resumed)
        check_memory(config, device, min(batch_size, n_windows), config.max_len)
        torch.manual_seed(options.seed)
        model = HRMModel(config) if start is None else start.build_model().to(device)
        if start is not None:
            start.score_before(model, held_out, final_eval)
        if model.executor.ngrams is not None:
            earlier = None if start is None else start.earlier_counts()
            with local_rank_zero_first(), interruptible("counting n-grams"):
                build_table(model.executor.ngrams.table, stream, options, earlier)
        model.to(device)
        # Step 3: report what was read.
        stats = corpus_stats(stream)
        warnings = stats.warnings(model.n_parameters(), options.sep, start is None, len(held_out))
        report_corpus(stats, len(held_out), val, warnings if resumed is None else ())
        describe_run("pretrain", model, dtype)
        # Step 4: train.
        data = LMDataset(
            stream, config.max_len, options.planner_input, config.preceding_len, options.denoise
        )
        trainer = Trainer(
            model,
            data,
            options,
            stage="pretrain",
            data_id=f"{len(stream)}:{zlib.crc32(stream.data):08x}",
            origin=describe_data(corpus, len(stream), stats.documents, options, start),
            validate=validate if len(held_out) else None,
            resumed=resumed,
        )
        trainer.run()
        result = trainer.result(lambda model: final_eval(model, held_out))
        return result if start is None else start.add_scores(result, model, final_eval)


def model_config(
    config: HRMConfig | None, options: PretrainConfig, start: Start | None
) -> HRMConfig:
    """Returns the config of the model: that of a new one, completed by the options of pretraining,
    or that of the checkpoint.

    Raises:
        HRMError: there are both.
    """
    if start is not None:
        if config is not None:
            raise HRMError("a config is for a new model: leave it out with a ContinueConfig")
        return start.config
    return replace(
        config or HRMConfig(),
        cross_attention=options.denoise > 0,
        sep=options.sep,
        line_breaks=options.sep in ("stanza", "file"),
    )


def report_corpus(
    stats: CorpusStats, n_held_out: int, val: PathLike | None, warnings: Iterable[str]
) -> None:
    """Prints what was read.

    Args:
        warnings: none in a resumed run, in which nothing can be changed.
    """
    print0(f"corpus: {stats}")
    print0(f"held out: {n_held_out:,} bytes, {'the end of it' if val is None else val}")
    for line in warnings:
        print0(f"warning: {line}")


def describe_data(
    corpus: PathLike | Sequence[PathLike],
    n_bytes: int,
    n_documents: int,
    options: PretrainConfig,
    start: Start | None,
) -> dict[str, Any]:
    """Returns the `Checkpoint.origin` of a run."""
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    facts = {
        "data": ", ".join(Path(path).name for path in paths),
        "bytes": n_bytes,
        "documents": n_documents,
        "sep": options.sep,
        "encoding": options.encoding,
    }
    if start is None:
        return {"pretrain": facts}
    return {"earlier": start.earlier, "pretrain": facts | start.facts}


def build_table(
    table: NgramTable, stream: ByteStream, options: PretrainConfig, earlier: EarlierCounts | None
) -> None:
    """Counts the n-grams of a stream, or reads the counts if the folder of the run has them, and
    says what was dropped.

    Args:
        earlier: counts to add those of the stream to.
    """
    count_memory, path = options.count_memory, Path(options.out_dir) / "ngrams.counts"
    if count_memory is None:
        memory = total_memory(torch.device("cpu"))
        count_memory = DEFAULT_COUNT_MEMORY
        if memory is not None and memory < 8e6 * DEFAULT_COUNT_MEMORY:
            # A power of two: a system update changes the memory a little, and not the counts.
            count_memory = 2 ** int(math.log2(memory / 8e6))
    n_bytes = len(table.orders) * (len(stream) - 1)
    with progress_bar(n_bytes, "B", task="counting n-grams") as bar:
        table.build(stream, path, int(count_memory * 1e6), bar.update, earlier)
    if (min_count := int(table.min_count)) > 1:
        print0(
            f"n-gram counts: only of contexts that occurred at least {min_count} times; rarer ones "
            f"do not fit in {count_memory:g} MB (--count_memory)"
        )


def load_corpus(
    corpus: PathLike | Sequence[PathLike],
    val: PathLike | None,
    options: PretrainConfig,
    start: Start | None = None,
) -> tuple[ByteStream, ByteStream]:
    """Returns the training stream and the held-out stream, which have no document in common.

    Documents of ``val`` and of ``start.old_text`` are left out of the training stream. Of the tail
    of the corpus those are left out that the training stream has, too, unless little would be left
    to score.

    Raises:
        HRMError: a file cannot be read, or nothing is left to train on.
    """
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    old_text = None if start is None else start.old_text
    token_file = Path(options.out_dir) / "corpus.tokens"
    reading = (options.sep, options.keep_licence)
    if val is None:
        stream = load_stream(paths, options.encoding, token_file, *reading, old_text)
        stream, held_out = split_stream(stream, options.val_fraction)
        shared = shared_units(stream, held_out)
        left, removed = remove_shared(held_out, shared)
        if removed.n_documents and len(left) >= min(VAL_BYTES, len(held_out) / 2):
            held_out = left
            print0(f"left out of the held-out text: {removed} that are also in the training text")
    else:
        val_files = text_files([val])
        held_out = load_stream(val_files, options.encoding, None, *reading)
        scored = {file.resolve() for file in val_files}
        files = [file for file in text_files(paths) if file.resolve() not in scored]
        if not files:
            raise HRMError(f"{val} is all the text there is: give another --val, or none")
        scored_text = held_out if old_text is None else np.concatenate((held_out, old_text))
        stream = load_stream(files, options.encoding, token_file, *reading, scored_text)
        shared = shared_units(stream, held_out)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --set val_fraction")
    if (fraction := shared_fraction(held_out, shared)) >= MIN_SHARED:
        print0(
            f"warning: {fraction:.0%} of the held-out text is in lines that the training text also "
            "has, so its score is too good: remove the copies, or give another --val"
        )
    return stream, held_out
