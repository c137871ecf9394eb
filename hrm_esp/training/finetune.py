"""Finetuning: from a checkpoint and a table of pairs to a model that answers."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import FinetuneConfig, HRMConfig
from ..console import print0, progress_bar
from ..data import TSVDataset, dataset_tsv, remove_pairs, split_pairs
from ..data.text import LINE_BREAK
from ..device import choose_device, choose_precision
from ..distributed import process_group
from ..errors import HRMError
from ..evaluation import PairScore, pair_bits, score_pairs, score_targets
from ..evaluation.metrics import bootstrap_ratio
from ..files import PathLike
from ..model import HRMModel
from .checkpoint import Checkpoint, load_checkpoint
from .early_stopping import Score
from .memory import check_memory
from .metrics_log import describe_run
from .resume import run_batch_size
from .run_folder import open_run
from .trainer import Trainer, TrainResult

VAL_ROWS, FINAL_VAL_ROWS = 200, 1000  # scored at a validation, at most, and at the end
READING = ("encoding", "prompt_col", "target_col", "lm")  # options of `dataset_tsv`
PROBE_ROWS = 64  # pairs that tell how well a checkpoint predicts the targets
# Reinitialize if the targets cost this many times the bits of held-out text. Short targets have
# little context, so they cost more than text anyway.
REINIT_BPB_RATIO = 1.5


@process_group()
def train_ft(
    tsv: PathLike,
    start: PathLike | HRMConfig,
    options: FinetuneConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Finetunes on ``prompt TAB target`` rows: next-byte prediction of the targets.

    Args:
        start: a checkpoint, or the config of a new model.
        val: a TSV to score on; by default ``options.val_fraction`` of the rows, at random.

    Raises:
        HRMError: bad data or options, a bad checkpoint, a folder that holds a run, or what
            `Trainer.run` raises.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or FinetuneConfig()
    device = device or choose_device()
    with open_run(options, "finetune") as resumed:
        # Step 1: load the checkpoint, read the pairs and hold out some of them.
        torch.manual_seed(options.seed)
        if isinstance(start, HRMConfig):
            check_memory(start, device)
            checkpoint = Checkpoint(start, HRMModel(start).state_dict(), "pretrain")
        else:
            checkpoint = load_checkpoint(start)
        data, held_out = load_pairs(tsv, val, checkpoint.config.max_len, options)
        if any(LINE_BREAK.encode() in p.prompt + p.target for p in (*data, *held_out)):
            checkpoint.config = replace(checkpoint.config, line_breaks=True)
        n_tokens = sum(len(pair.prompt) + len(pair.target) for pair in data)
        batch_size = run_batch_size(options, checkpoint.config, device, resumed)
        max_tokens = batch_size * checkpoint.config.max_len
        check_memory(checkpoint.config, device, min(n_tokens, max_tokens), 1)
        # Step 2: adapt the model.
        model = model_to_finetune(checkpoint, options).to(device)
        if model.config.gumbel and options.context == "plan":
            print0(
                "warning: a plan from a codebook tells prompts apart by their codes only, and one "
                f"code is {math.log2(model.config.n_plan_codes):.3g} bits: give --no_gumbel for a "
                "continuous plan, or --context cross_attention"
            )
        dtype = choose_precision(device, options.precision)
        if resumed is None and should_reinitialize(checkpoint, data, options, device, dtype):
            reinitialize_blocks(model)

        # Step 3: train.
        def validate(model: HRMModel, size: float) -> Score:
            rows = TSVDataset(held_out.pairs[: round(VAL_ROWS * size)], held_out.max_len)
            bits, n_tokens, margins = score_targets(model, rows, dtype).T
            is_wrong = margins[[not pair.lm for pair in rows]] <= 0
            errors = float(is_wrong.mean()) if len(is_wrong) else None
            return Score(errors, float(bits.sum() / n_tokens.sum()), len(is_wrong))

        def final_eval(model: HRMModel) -> PairScore:
            rows = TSVDataset(held_out.pairs[:FINAL_VAL_ROWS], held_out.max_len)
            with progress_bar(len(rows), "row") as bar:
                return score_pairs(model, rows, dtype, progress=bar.update)

        trainer = Trainer(
            model,
            data,
            options,
            stage="finetune",
            data_id=f"{len(data)}:{zlib.crc32(repr(data.pairs).encode()):08x}",
            origin=checkpoint.origin | {"finetune": describe_data(tsv, data)},
            validate=validate if len(held_out) else None,
            resumed=resumed,
        )
        describe_run("finetune", model, dtype, f", {len(data):,} rows, {len(held_out):,} held out")
        trainer.run()
        return trainer.result(final_eval)


def load_pairs(
    tsv: PathLike, val: PathLike | None, max_len: int, options: FinetuneConfig
) -> tuple[TSVDataset, TSVDataset]:
    """Returns the training pairs, and the held-out pairs in random order.

    Raises:
        HRMError: a file cannot be read, no row has a target, or nothing is left to train on.
    """
    reading = {name: getattr(options, name) for name in READING}
    data = dataset_tsv(tsv, max_len, **reading)
    if all(pair.lm for pair in data) and not options.lm:
        raise HRMError(
            f"no row of {tsv} has a target: give a second column, or --lm to train on plain text"
        )
    if val is None:
        data, held_out = split_pairs(data, options.val_fraction, options.seed)
    else:
        held_out = dataset_tsv(val, max_len, **reading, trained=data.columns)
        data = remove_pairs(data, held_out)
        held_out, _ = split_pairs(held_out, 0.0, options.seed)  # shuffled
    if not len(data):
        raise HRMError("nothing is left to train on: give another --val or --set val_fraction")
    return data, held_out


def describe_data(tsv: PathLike, data: TSVDataset) -> dict[str, Any]:
    """Returns what the `Checkpoint.origin` of a run says about its data."""
    found: dict[str, Any] = {"data": Path(tsv).name, "rows": len(data)}
    if (columns := data.columns) is not None:
        prompt_col, target_col, n_columns = columns
        found |= {"prompt_col": prompt_col, "target_col": target_col, "n_columns": n_columns}
    return found


def model_to_finetune(start: Checkpoint, options: FinetuneConfig) -> HRMModel:
    """Builds the checkpoint's model with the options of finetuning.

    Cross-attention that the checkpoint does not have starts with a zero output, so that the
    function of the model is the same at first.

    Raises:
        HRMError: the checkpoint was finetuned with cross-attention, and ``context`` is ``plan``; or
            its weights do not fit its config.
    """
    had_cross = start.config.cross_attention and start.stage == "finetune"
    if had_cross and options.context == "plan":
        raise HRMError(
            "this checkpoint was finetuned with cross-attention: give --context cross_attention"
        )
    config = replace(
        start.config,
        cross_attention=options.context == "cross_attention",
        dropout=options.dropout,
        gumbel=start.config.gumbel and options.gumbel,
    )
    model = HRMModel(config)
    missing, unexpected = model.load_state_dict(start.weights, strict=False)
    dropped = [name for name in unexpected if "cross" in name or "codebook" in name]
    if any("cross" not in name for name in missing) or len(dropped) < len(unexpected):
        raise HRMError("the checkpoint's weights do not fit its config")
    return model


def should_reinitialize(
    start: Checkpoint,
    data: TSVDataset,
    options: FinetuneConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    """Whether to `reinitialize_blocks`: as ``options.reinit_blocks`` says; ``auto`` does so if the
    checkpoint predicts some targets much worse than held-out text."""
    action = "reinitializing the blocks; embeddings and cross-attention are kept"
    if options.reinit_blocks == "always":
        print0(action)
        return True
    has_cross = start.config.cross_attention and options.context == "cross_attention"
    may_be_needed = options.reinit_blocks == "auto" and start.stage == "pretrain" and has_cross
    if start.val_bpb is None or not may_be_needed:
        return False
    order = np.random.default_rng(options.seed).permutation(len(data))[:PROBE_ROWS]
    rows = [data[i] for i in order if not data[i].lm]
    if len(rows) < len(order) / 2:  # mostly plain text
        return False
    probe = TSVDataset(rows, data.max_len)
    bpb, (low, _) = bootstrap_ratio(pair_bits(start.build_model(device), probe, dtype))
    if not low > REINIT_BPB_RATIO * start.val_bpb:
        return False
    print0(
        f"the targets cost the checkpoint {bpb:.2f} bits per byte, held-out text "
        f"{start.val_bpb:.2f}: {action} (--reinit_blocks never keeps all)"
    )
    return True


def reinitialize_blocks(model: HRMModel) -> None:
    """Gives self-attention and feed-forward layers the weights of a new model.

    Cross-attention, which has learned to copy from a prompt, and embeddings stay. Layers that
    learned to predict text memorize a few pairs of another kind, and are then worse than new ones.
    """
    for block in (*model.planner.blocks, *model.executor.blocks):
        fresh = type(block)(model.config).state_dict()
        own = {name: weight for name, weight in fresh.items() if "cross" not in name}
        block.load_state_dict(own, strict=False)
    if model.planner.codebook is not None:
        model.planner.codebook.pooled_queue.zero_()  # it is of the old blocks
