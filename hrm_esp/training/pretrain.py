"""Pretraining: from a corpus to a model."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..config import HRMConfig, PretrainConfig
from ..console import print0, progress_bar
from ..data import ByteStream, LMDataset, corpus_stats, load_stream, split_stream
from ..data.corpus_files import text_files
from ..data.report import shared_lines
from ..device import choose_device, choose_precision
from ..distributed import local_rank_zero_first, process_group
from ..errors import HRMError
from ..evaluation import TextScore, score_stream
from ..files import PathLike
from ..model import HRMModel
from .early_stopping import Score
from .memory import check_memory
from .run_folder import open_state
from .trainer import Trainer, TrainResult, describe_run

VAL_BYTES = 16_384  # of the held-out text, scored at each validation
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
        val: a text file to score on; by default the tail of the corpus, ``options.val_fraction``.

    Raises:
        HRMError: bad data or options, a folder that holds a run, or what `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
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
    # Step 1: read the corpus and hold out a part of it.
    with local_rank_zero_first():
        resumed = open_state(options, "pretrain")
        stream, held_out = load_corpus(corpus, val, options)
    # Step 2: build the model and count the n-grams.
    n_windows = math.ceil(len(stream) / config.max_len)
    check_memory(config, device, min(options.batch_size, n_windows), config.max_len)
    torch.manual_seed(options.seed)
    model = HRMModel(config)
    if model.executor.ngrams is not None:
        with local_rank_zero_first():
            model.executor.ngrams.build(stream, folder / "ngrams.counts")
    model.to(device)
    dtype = choose_precision(device, options.precision)
    # Step 3: report what was read.
    stats = corpus_stats(stream)
    print0(f"corpus: {stats}")
    print0(f"held out: {len(held_out):,} bytes, {'the end of it' if val is None else val}")
    for line in stats.warnings(model.n_parameters(), options.sep):
        print0(f"warning: {line}")
    warn_if_shared(stream, held_out)
    describe_run("pretrain", model, dtype)

    # Step 4: train.
    def validate(model: HRMModel) -> Score:
        return Score(None, score_stream(model, held_out[:VAL_BYTES], dtype).bits_per_byte)

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
        validate=validate if len(held_out) else None,
        resumed=resumed,
    )
    trainer.run()
    return trainer.result(final_eval)


def warn_if_shared(stream: ByteStream, held_out: ByteStream) -> None:
    """Prints a warning if the training text has lines of the held-out text."""
    if (share := shared_lines(stream, held_out)) >= MIN_SHARED:
        print0(
            f"warning: {share:.0%} of the held-out text is in lines that the training text also "
            "has, so its score is too good: remove the copies"
        )


def load_corpus(
    corpus: PathLike | Sequence[PathLike], val: PathLike | None, options: PretrainConfig
) -> tuple[ByteStream, ByteStream]:
    """Returns the training stream and the held-out stream.

    Raises:
        HRMError: a file cannot be read, or nothing is left to train on.
    """
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    token_file = Path(options.out_dir) / "corpus.tokens"
    reading = (options.sep, options.keep_licence)
    held_out = None if val is None else load_stream([val], options.encoding, None, *reading)
    files = [f for f in text_files(paths) if val is None or not f.samefile(val)]
    if not files:
        raise HRMError(f"{val} is all the text there is: give another --val, or none")
    stream = load_stream(files, options.encoding, token_file, *reading)
    if held_out is None:
        stream, held_out = split_stream(stream, options.val_fraction)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --set val_fraction")
    return stream, held_out
