"""Pretraining and finetuning: what a run is made of."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .checkpoint import Checkpoint, load_checkpoint
from .config import FinetuneConfig, HRMConfig, PretrainConfig, TrainConfig
from .corpus import look_at
from .data import (
    LMDataset,
    PathLike,
    TSVDataset,
    dataset_tsv,
    load_stream,
    split_pairs,
    split_stream,
    text_files,
)
from .device import choose_device, choose_precision
from .distributed import first_process_first, process_group, say, world_size
from .errors import HRMError
from .evaluation import PairScore, TextScore, pair_bits, ratio, score_pairs, score_stream
from .model import HRMModel
from .progress import scoring_bar
from .trainer import Score, Trainer, TrainResult

SCORED_OFTEN = 16_384  # bytes of held-out text scored while training
SCORED_LAST = 1_000_000  # ... and at the end
ROWS_OFTEN, ROWS_LAST = 200, 1000  # the same for pairs
ROWS_FIRST = 64  # pairs by which is told whether they are of a kind that a checkpoint knows
UNLIKE = 1.5  # times the bits of held-out text: short answers have little before their bytes
ANEW = "the blocks begin anew, embeddings and how to copy from a prompt are kept"


@process_group()
def train_lm(
    corpus: PathLike | Sequence[PathLike],
    config: HRMConfig | None = None,
    options: PretrainConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Pretrains on text: next-byte cross-entropy on windows of ``max_len``. In ``options.denoise``
    of the batches the Executor restores damaged lines that it reads through the Planner.

    Args:
        config: of the model; its ``memory`` is set by ``options.denoise``.
        corpus: text files or folders.
        val: a text file to score on; by default the tail of the corpus, ``options.val_fraction``.

    Raises:
        HRMError: bad data or options, a folder that holds a run, or what `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or PretrainConfig()
    config = replace(config or HRMConfig(), memory=options.denoise > 0)
    device = device or choose_device()
    folder = Path(options.out_dir)
    with first_process_first():
        resumed = state_to_resume(options, "pretrain")
        paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
        held_out = None if val is None else load_stream([val], options.encoding, sep=options.sep)
        files = [f for f in text_files(paths) if val is None or not f.samefile(val)]
        if not files:
            raise HRMError(f"{val} is all the text there is: give another --val, or none")
        stream = load_stream(files, options.encoding, folder / "corpus.tokens", options.sep)
    if held_out is None:
        stream, held_out = split_stream(stream, options.val_fraction)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --val_fraction")
    torch.manual_seed(options.seed)
    model = HRMModel(config)
    if model.executor.counts is not None:
        with first_process_first():
            model.executor.counts.count(stream, folder / "ngrams.counts")
    model.to(device)
    dtype = choose_precision(device, options.precision)

    def score_some(model: HRMModel) -> Score:
        return Score(None, score_stream(model, held_out[:SCORED_OFTEN], dtype).bits_per_byte)

    def score_all(model: HRMModel) -> TextScore:
        text = held_out[:SCORED_LAST]
        with scoring_bar(len(text), "B") as bar:
            return score_stream(model, text, dtype, progress=bar.update)

    say(f"corpus: {(found := look_at(stream))}")
    say(f"held out: {len(held_out):,} bytes, {'the end of it' if val is None else val}")
    for line in found.warnings(model.n_parameters()):
        say(f"warning: {line}")
    announce("pretrain", model, dtype)
    trainer = Trainer(
        model,
        LMDataset(stream, config.max_len, options.planner_view, config.past_len, options.denoise),
        options,
        stage="pretrain",
        data_id=f"{len(stream)}:{zlib.crc32(stream.data):08x}",
        score=score_some if len(held_out) else None,
        resumed=resumed,
    )
    trainer.run()
    return trainer.result(score_all)


@process_group()
def train_ft(
    tsv: PathLike,
    start: PathLike | HRMConfig,
    options: FinetuneConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Finetunes on ``prompt TAB target`` rows: cross-entropy on the targets.

    Args:
        start: a checkpoint, or the config of a new model.
        val: a TSV to score on; by default ``options.val_fraction`` of the rows, drawn by seed.

    Raises:
        HRMError: bad data or options, a bad checkpoint, a folder that holds a run, or what
            `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or FinetuneConfig()
    device = device or choose_device()
    with first_process_first():
        resumed = state_to_resume(options, "finetune")
    torch.manual_seed(options.seed)
    if isinstance(start, HRMConfig):
        checkpoint = Checkpoint(start, HRMModel(start).state_dict(), "pretrain")
    else:
        checkpoint = load_checkpoint(start)
    max_len = checkpoint.config.max_len
    data = dataset_tsv(tsv, max_len, encoding=options.encoding)
    if val is not None:
        held_out = dataset_tsv(val, max_len, encoding=options.encoding)
        scored = set(held_out.pairs)
        data = TSVDataset([p for p in data if p not in scored], data.max_len)
        held_out, _ = split_pairs(held_out, 0.0, options.seed)  # shuffled: the first are scored
    else:
        data, held_out = split_pairs(data, options.val_fraction, options.seed)
    if not len(data):
        raise HRMError("nothing is left to train on: give another --val or --val_fraction")
    model = model_to_finetune(checkpoint, options).to(device)
    if model.config.gumbel and options.context == "plan":
        bits = math.log2(model.config.n_plan_codes)
        say(
            "warning: with a codebook the plan says which of its codes a prompt has, about "
            f"{bits:.3g} bits: give --no_gumbel for one that holds more, or --context memory"
        )
    dtype = choose_precision(device, options.precision)
    if resumed is None and is_to_begin_anew(checkpoint, data, options, device, dtype):
        begin_anew(model)

    def score_some(model: HRMModel) -> Score:
        rows = TSVDataset(held_out.pairs[:ROWS_OFTEN], held_out.max_len)
        score = score_pairs(model, rows, dtype)
        errors = None if score.exact_match is None else 1 - score.exact_match
        return Score(errors, score.bits_per_byte, score.n)

    def score_all(model: HRMModel) -> PairScore:
        rows = TSVDataset(held_out.pairs[:ROWS_LAST], held_out.max_len)
        with scoring_bar(len(rows), "row") as bar:
            return score_pairs(model, rows, dtype, progress=bar.update)

    trainer = Trainer(
        model,
        data,
        options,
        stage="finetune",
        data_id=f"{len(data)}:{zlib.crc32(repr(data.pairs).encode()):08x}",
        score=score_some if len(held_out) else None,
        resumed=resumed,
    )
    announce("finetune", model, dtype, f", {len(data):,} rows, {len(held_out):,} held out")
    trainer.run()
    return trainer.result(score_all)


def announce(stage: str, model: HRMModel, dtype: torch.dtype, data: str = "") -> None:
    """Says on stderr what is about to be trained, and on what."""
    precision = str(dtype).removeprefix("torch.")
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    say(
        f"{stage}: {model.n_parameters():,} parameters{data}; "
        f"{model.device} in {precision}{processes}"
    )


def model_to_finetune(start: Checkpoint, options: FinetuneConfig) -> HRMModel:
    """The checkpoint's model, with cross attention to the prompt or without, as asked for.

    Where it is not there yet its output is zero at first, so that the function starts as it was.

    Raises:
        HRMError: the checkpoint was finetuned to read the prompt, and ``context`` is ``plan``.
    """
    if start.config.memory and start.stage == "finetune" and options.context == "plan":
        raise HRMError("this checkpoint was finetuned to read the prompt: give --context memory")
    config = replace(
        start.config,
        memory=options.context == "memory",
        dropout=options.dropout,
        ngram_dropout=options.ngram_dropout,
        gumbel=start.config.gumbel and options.gumbel,
    )
    model = HRMModel(config)
    missing, unexpected = model.load_state_dict(start.weights, strict=False)
    dropped = [name for name in unexpected if "cross" in name or "codebook" in name]
    if any("cross" not in name for name in missing) or len(dropped) < len(unexpected):
        raise HRMError("the checkpoint's weights do not fit its config")
    return model


def is_to_begin_anew(
    start: Checkpoint,
    data: TSVDataset,
    options: FinetuneConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether to `begin_anew`: as asked for, or by what the checkpoint makes of some answers.

    Those that it foretells about as well as held-out text are of a kind that it knows.
    """
    if options.blocks == "new":
        say(ANEW)
        return True
    reads = start.config.memory and options.context == "memory"
    may_differ = options.blocks == "auto" and start.stage == "pretrain" and reads
    if start.val_bpb is None or not may_differ:
        return False
    order = np.random.default_rng(options.seed).permutation(len(data))[:ROWS_FIRST]
    rows = [data[i] for i in order if not data[i].lm]
    if len(rows) < len(order) / 2:  # text to learn from, most of it
        return False
    answers = TSVDataset(rows, data.max_len)
    bits, (low, _) = ratio(pair_bits(start.model(device), answers, dtype))
    if not low > UNLIKE * start.val_bpb:
        return False
    say(
        f"these answers cost the checkpoint {bits:.2f} bits per byte, held-out text "
        f"{start.val_bpb:.2f}: {ANEW} (--blocks keep keeps all)"
    )
    return True


def begin_anew(model: HRMModel) -> None:
    """Gives the blocks of the Planner and of the Executor, but for cross attention, the weights of
    a new model. What else is pretrained stays, among it the embeddings and how to copy a prompt.

    Weights that foretell text by what was written learn a few pairs of another kind by heart: they
    are behind a new model's then, while what stays puts the model ahead of that.
    """
    for block in (*model.planner.blocks, *model.executor.blocks):
        fresh = type(block)(model.config).state_dict()
        own = {name: weight for name, weight in fresh.items() if "cross" not in name}
        block.load_state_dict(own, strict=False)
    # What was met was of the old blocks.
    if model.planner.codebook is not None:
        model.planner.codebook.last_pooled.zero_()
    if model.executor.counts is not None:
        model.executor.counts.trust.zero_()


def state_to_resume(options: TrainConfig, stage: str) -> Checkpoint | None:
    """The state of the run to go on with, if asked for.

    Raises:
        HRMError: there is none, or it is damaged; or the folder holds a run of this stage, and
            nobody said what to do with it.
    """
    folder = Path(options.out_dir)
    if folder.exists() and not folder.is_dir():
        raise HRMError(f"{folder} is a file: give another --out_dir")
    if options.resume:
        path = folder / f"{stage}_state.pt"
        if not path.is_file():
            raise HRMError(f"no saved state of a {stage} run in {folder}: start without --resume")
        return load_checkpoint(path)
    if any(folder.glob(f"{stage}_*.pt")) and not options.overwrite:
        raise HRMError(
            f"{folder} holds a {stage} run: give --resume, --overwrite or another --out_dir"
        )
    return None
