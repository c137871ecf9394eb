"""Pretraining: from a corpus to a model."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import DEFAULT_COUNT_MEMORY, HRMConfig, PretrainConfig
from ..console import print0, progress_bar
from ..data import ByteStream, LMDataset, corpus_stats, load_stream, split_stream
from ..data.corpus_files import text_files
from ..data.held_out import remove_shared, shared_fraction, shared_units
from ..device import choose_device, choose_precision
from ..distributed import local_rank_zero_first, process_group
from ..errors import HRMError
from ..evaluation import TextScore, score_stream
from ..files import PathLike
from ..model import HRMModel
from ..ngrams import NgramTable
from .early_stopping import Score
from .memory import check_memory, total_memory
from .metrics_log import describe_run
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
        config: of the model; ``options.denoise`` decides its ``cross_attention``.
        val: text to score on, a file or a folder, which is left out of the corpus; by default the
            tail of the corpus, ``options.val_fraction``.

    Raises:
        HRMError: bad data or options, a folder that holds a run, or what `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
        KeyboardInterrupt: Ctrl-C or SIGTERM before training; the message says so.
    """
    options = options or PretrainConfig()
    config = replace(
        config or HRMConfig(),
        cross_attention=options.denoise > 0,
        sep=options.sep,
        line_breaks=options.sep in ("stanza", "file"),
    )
    device = device or choose_device()
    folder = Path(options.out_dir)
    with open_run(options, "pretrain") as resumed:
        # Step 1: read the corpus and hold out a part of it.
        with local_rank_zero_first(), interruptible("reading the corpus"):
            stream, held_out = load_corpus(corpus, val, options)
        # Step 2: build the model and count the n-grams.
        n_windows = math.ceil(len(stream) / config.max_len)
        check_memory(config, device, min(options.batch_size, n_windows), config.max_len)
        torch.manual_seed(options.seed)
        model = HRMModel(config)
        if model.executor.ngrams is not None:
            with local_rank_zero_first(), interruptible("counting n-grams"):
                build_table(model.executor.ngrams.table, stream, folder, options.count_memory)
        model.to(device)
        dtype = choose_precision(device, options.precision)
        # Step 3: report what was read.
        stats = corpus_stats(stream)
        print0(f"corpus: {stats}")
        print0(f"held out: {len(held_out):,} bytes, {'the end of it' if val is None else val}")
        for line in stats.warnings(model.n_parameters(), options.sep):
            print0(f"warning: {line}")
        describe_run("pretrain", model, dtype)

        # Step 4: train.
        def validate(model: HRMModel, size: float) -> Score:
            text = held_out[: round(VAL_BYTES * size)]
            return Score(None, score_stream(model, text, dtype).bits_per_byte)

        def final_eval(model: HRMModel) -> TextScore:
            text = held_out[:FINAL_VAL_BYTES]
            with progress_bar(len(text), "B") as bar:
                return score_stream(model, text, dtype, progress=bar.update)

        data = LMDataset(
            stream, config.max_len, options.planner_input, config.preceding_len, options.denoise
        )
        trainer = Trainer(
            model,
            data,
            options,
            stage="pretrain",
            data_id=f"{len(stream)}:{zlib.crc32(stream.data):08x}",
            origin={"pretrain": describe_data(corpus, len(stream), stats.documents, options)},
            validate=validate if len(held_out) else None,
            resumed=resumed,
        )
        trainer.run()
        return trainer.result(final_eval)


def describe_data(
    corpus: PathLike | Sequence[PathLike], n_bytes: int, n_documents: int, options: PretrainConfig
) -> dict[str, str | int]:
    """Returns what a checkpoint says about its training text."""
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    return {
        "data": ", ".join(Path(path).name for path in paths),
        "bytes": n_bytes,
        "documents": n_documents,
        "sep": options.sep,
        "encoding": options.encoding,
    }


def build_table(
    table: NgramTable, stream: ByteStream, folder: Path, count_memory: float | None
) -> None:
    """Counts the n-grams of a stream, or reads the counts if the folder has them, and says what was
    dropped.

    Args:
        count_memory: see `PretrainConfig`.
    """
    if count_memory is None:
        memory = total_memory(torch.device("cpu"))
        count_memory = DEFAULT_COUNT_MEMORY
        if memory is not None and memory < 8e6 * DEFAULT_COUNT_MEMORY:
            # A power of two: a system update changes the memory a little, and not the counts.
            count_memory = 2 ** int(math.log2(memory / 8e6))
    n_bytes = len(table.orders) * (len(stream) - 1)
    with progress_bar(n_bytes, "B", task="counting n-grams") as bar:
        table.build(stream, folder / "ngrams.counts", int(count_memory * 1e6), bar.update)
    if (min_count := int(table.min_count)) > 1:
        print0(
            f"n-gram counts: only of contexts that occurred at least {min_count} times; rarer ones "
            f"do not fit in {count_memory:g} MB (--count_memory)"
        )


def load_corpus(
    corpus: PathLike | Sequence[PathLike], val: PathLike | None, options: PretrainConfig
) -> tuple[ByteStream, ByteStream]:
    """Returns the training stream and the held-out stream, which have no document in common.

    Documents of ``val`` are left out of the training stream. Of the tail of the corpus those are
    left out that the training stream has, too, unless little would be left to score.

    Raises:
        HRMError: a file cannot be read, or nothing is left to train on.
    """
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    token_file = Path(options.out_dir) / "corpus.tokens"
    reading = (options.sep, options.keep_licence)
    if val is None:
        stream = load_stream(paths, options.encoding, token_file, *reading)
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
        stream = load_stream(files, options.encoding, token_file, *reading, held_out)
        shared = shared_units(stream, held_out)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --set val_fraction")
    if (fraction := shared_fraction(held_out, shared)) >= MIN_SHARED:
        print0(
            f"warning: {fraction:.0%} of the held-out text is in lines that the training text also "
            "has, so its score is too good: remove the copies, or give another --val"
        )
    return stream, held_out
