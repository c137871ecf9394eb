"""Pretraining and finetuning: one loop, two kinds of data."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer, SparseAdam
from tqdm import tqdm

from . import __version__
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import FinetuneConfig, HRMConfig, PretrainConfig, TrainConfig
from .data import (
    Batch,
    LMDataset,
    PathLike,
    TSVDataset,
    dataset_tsv,
    load_stream,
    split_pairs,
    split_stream,
)
from .device import autocast, choose_device, choose_precision
from .errors import HRMError
from .evaluation import (
    PairScore,
    TextScore,
    cross_entropy,
    pair_bits,
    score_pairs,
    score_stream,
    scoring_bar,
)
from .layers import NgramEmbedding
from .model import HRMModel
from .tokenizer import PAD

SCORED_OFTEN = 16_384  # bytes of held-out text scored while training
SCORED_LAST = 1_000_000  # ... and at the end
ROWS_OFTEN, ROWS_LAST = 200, 1000  # the same for pairs
NGRAM_LR = 10.0  # of lr: a row of the n-gram table is met rarely, so its steps are longer
NEWTON_SCHULZ = 3  # steps of Muon; five take a tenth more of the time and bring no better text
# Until which share of a run, the fraction of a batch and the pieces of a window.
GROWTH = ((0.3, 4, 4), (0.7, 2, 2))
SCORING_SHARE = 0.04  # of the time, at most
N_SCORES = 8  # times a run is scored, evenly spaced
LOG_SECONDS = 10.0  # between lines, where there is no terminal
MAX_SKIPPED = 20  # steps in a row without a finite gradient


class Dataset(Protocol):
    """What the loop trains on: ``len`` items, windows or pairs, taken in batches."""

    def __len__(self) -> int: ...

    def batches(
        self, size: Callable[[], tuple[int, int]], seed: int, epoch: int, skip: int
    ) -> Iterator[tuple[int, Batch]]: ...


@dataclass
class RunState:
    """Where a run stands."""

    step: int = 0
    epoch: int = 0
    item: int = 0  # of the epoch
    bytes_seen: int = 0
    seconds: float = 0.0
    scored: int = 0  # of N_SCORES
    scoring: float = 0.0  # seconds
    val_bpb: float | None = None
    best_bpb: float | None = None
    skipped: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; ``score`` is that of ``best``, ``None`` if nothing was held out."""

    best: Path
    last: Path
    steps: int
    bytes_seen: int
    seconds: float
    score: TextScore | PairScore | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved."""


def train_lm(
    corpus: PathLike | Sequence[PathLike],
    config: HRMConfig | None = None,
    options: PretrainConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Pretrains on text: next-byte cross-entropy on windows of ``max_len``.

    Args:
        corpus: text files or folders.
        val: a text file to score on; by default the tail of the corpus, ``options.val_fraction``.

    Raises:
        HRMError: bad data or options, or a folder that holds a run.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    config, options = config or HRMConfig(), options or PretrainConfig()
    device = device or choose_device()
    check_folder(options, "pretrain")
    paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
    held_out = None if val is None else load_stream([val], options.encoding)
    stream = load_stream(paths, options.encoding, options.out_dir)
    if held_out is None:
        stream, held_out = split_stream(stream, options.val_fraction)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --val_fraction")
    torch.manual_seed(options.seed)
    model = HRMModel(config).to(device)
    dtype = choose_precision(device, options.precision)

    def score_often(model: HRMModel) -> float:
        return score_stream(model, held_out[:SCORED_OFTEN], dtype).bits_per_byte

    def score_last(model: HRMModel) -> TextScore:
        text = held_out[:SCORED_LAST]
        with scoring_bar(len(text), "B") as bar:
            return score_stream(model, text, dtype, progress=bar.update)

    return fit(
        model,
        LMDataset(stream, config.max_len, options.planner_view),
        options,
        stage="pretrain",
        data_id=f"{len(stream)}:{zlib.crc32(stream.data):08x}",
        about=f"{len(stream):,} bytes of text, {len(held_out):,} held out",
        score_often=score_often if len(held_out) else None,
        score_last=score_last,
    )


def train_ft(
    tsv: PathLike,
    checkpoint: PathLike,
    options: FinetuneConfig | None = None,
    *,
    val: PathLike | None = None,
    device: torch.device | None = None,
) -> TrainResult:
    """Finetunes a checkpoint on ``prompt TAB target`` rows: cross-entropy on the targets.

    Args:
        val: a TSV to score on; by default ``options.val_fraction`` of the rows, drawn by seed.

    Raises:
        HRMError: bad data or options, a bad checkpoint, or a folder that holds a run.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or FinetuneConfig()
    device = device or choose_device()
    check_folder(options, "finetune")
    start = load_checkpoint(checkpoint)
    data = dataset_tsv(tsv, start.config.max_len, encoding=options.encoding)
    if val is not None:
        held_out = dataset_tsv(val, start.config.max_len, encoding=options.encoding)
    else:
        data, held_out = split_pairs(data, options.val_fraction, options.seed)
    if not len(data):
        raise HRMError("nothing is left to train on: give a smaller --val_fraction")
    torch.manual_seed(options.seed)
    model = model_to_finetune(start, options).to(device)
    dtype = choose_precision(device, options.precision)

    def score_often(model: HRMModel) -> float:
        return pair_bits(model, TSVDataset(held_out.pairs[:ROWS_OFTEN], held_out.max_len), dtype)

    def score_last(model: HRMModel) -> PairScore:
        rows = TSVDataset(held_out.pairs[:ROWS_LAST], held_out.max_len)
        with scoring_bar(len(rows), "row") as bar:
            return score_pairs(model, rows, dtype, progress=bar.update)

    return fit(
        model,
        data,
        options,
        stage="finetune",
        data_id=f"{len(data)}:{zlib.crc32(repr(data.pairs).encode()):08x}",
        about=f"{len(data):,} rows, {len(held_out):,} held out",
        score_often=score_often if len(held_out) else None,
        score_last=score_last,
    )


def model_to_finetune(start: Checkpoint, options: FinetuneConfig) -> HRMModel:
    """The checkpoint's model, with cross attention to the prompt if asked for and not yet there.

    Its output is zero at first, so that the function starts as it was.

    Raises:
        HRMError: the checkpoint reads the prompt already and ``context`` is ``plan``.
    """
    if start.config.memory and options.context == "plan":
        raise HRMError("this checkpoint attends to the prompt: give --context memory")
    config = replace(
        start.config,
        memory=options.context == "memory",
        dropout=options.dropout,
        gumbel=start.config.gumbel and options.gumbel,
    )
    model = HRMModel(config)
    missing, unexpected = model.load_state_dict(start.weights, strict=False)
    if any("cross" not in name for name in missing) or any("codebook" not in u for u in unexpected):
        raise HRMError("the checkpoint's weights do not fit its config")
    return model


def check_folder(options: TrainConfig, stage: str) -> None:
    """Raises HRMError if the folder holds a run of this stage that nobody said what to do with."""
    folder = Path(options.out_dir)
    if folder.exists() and not folder.is_dir():
        raise HRMError(f"{folder} is a file: give another --out_dir")
    holds_run = any(folder.glob(f"{stage}_*.pt"))
    if options.resume and not (folder / f"{stage}_state.pt").is_file():
        raise HRMError(f"no {stage} run to resume in {folder}")
    if holds_run and not (options.resume or options.overwrite):
        raise HRMError(
            f"{folder} holds a {stage} run: give --resume, --overwrite or another --out_dir"
        )


def matrices_and_rest(model: HRMModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The 2-D weights inside the blocks, and all other parameters."""
    blocks = [*model.planner.blocks.parameters(), *model.executor.blocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    chosen = {*map(id, matrices), *map(id, ngram_tables(model))}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def ngram_tables(model: HRMModel) -> list[Tensor]:
    """The n-gram tables, whose gradients are sparse."""
    return [m.table.weight for m in model.modules() if isinstance(m, NgramEmbedding)]


def build_optimizers(model: HRMModel, options: TrainConfig) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices in the blocks, its steps scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2), so that one learning rate serves both; AdamW for the
    rest, without weight decay."""
    matrices, rest = matrices_and_rest(model)
    adamw: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.95), "fused": True}
    decay = options.weight_decay
    tables = ngram_tables(model)
    sparse = [SparseAdam(tables, lr=options.lr, betas=(0.9, 0.95))] if tables else []
    if options.optimizer == "adamw":
        groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0}]
        return [AdamW(groups, **adamw), *sparse]
    return [
        Muon(
            matrices,
            lr=options.lr,
            weight_decay=decay,
            ns_steps=NEWTON_SCHULZ,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(rest, weight_decay=0.0, **adamw),
        *sparse,
    ]


def learning_rate(options: TrainConfig, step: int, progress: float) -> float:
    """Warm-up, stable, linear decay (Hu et al. 2024, section 4.1). ``progress``: 0 to 1."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    left = min(1.0, (1 - progress) / options.decay) if options.decay else 1.0
    return options.lr * warm * max(0.0, left)


def batch_shape(options: TrainConfig, max_len: int, progress: float) -> tuple[int, int]:
    """Windows a batch, and the pieces each is cut into.

    Short windows in small batches at first (Li et al. 2022): most of what is near is learned from
    them at a fraction of the time.
    """
    if isinstance(options, PretrainConfig) and options.grow:
        for until, fewer, pieces in GROWTH:
            if progress < until and max_len % pieces == 0:
                return max(1, options.batch_size // fewer), pieces
    return options.batch_size, 1


def codebook_penalty(code_logits: Tensor, groups: int) -> Tensor:
    """Nats short of even use: log K - (H(mean choice) - mean H(choice)), averaged over codebooks.

    The bracket is the mutual information of row and code. It is largest when every row is sure of
    its code and all codes are used alike, so that it never blurs a single choice.

    Args:
        code_logits: (B, G * K).
    """
    p = code_logits.unflatten(-1, (groups, -1)).softmax(-1)  # (B, G, K)
    information = entropy(p.mean(0)) - entropy(p).mean(0)  # (G,)
    return math.log(p.shape[-1]) - information.mean()


def entropy(p: Tensor) -> Tensor:
    """(..., K) -> (...), in nats."""
    return -(p * p.clamp(min=1e-9).log()).sum(-1)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Lets a step finish on Ctrl-C or SIGTERM; yields a function that says whether one came."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once

    try:
        old = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are not ours
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Meter:
    """Loss and speed since the last look, on a bar or in lines on stderr."""

    def __init__(self, title: str, state: RunState) -> None:
        self.bar = tqdm(
            total=100, desc=title, disable=None, unit="%", bar_format=(
                "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
            ),
        )  # fmt: skip
        self.lines = self.bar.disable
        self.shown_at = time.perf_counter()
        self.reset(state)

    def reset(self, state: RunState) -> None:
        self.nats, self.tokens = 0.0, 0
        self.usage: Tensor | None = None
        self.since, self.bytes_then = time.perf_counter(), state.bytes_seen

    def add(self, nats: float, tokens: int, usage: Tensor | None) -> None:
        """``usage`` (G, K): how often each code was chosen."""
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage + usage

    def show(self, state: RunState, progress: float, lr: float, force: bool = False) -> None:
        now = time.perf_counter()
        wait = LOG_SECONDS if self.lines else 0.5
        if not self.tokens or (not force and now - self.shown_at < wait):
            return
        bpb = self.nats / self.tokens / math.log(2)
        speed = (state.bytes_seen - self.bytes_then) / (now - self.since)
        parts = [f"train {bpb:.3f}"]
        parts += [] if state.val_bpb is None else [f"val {state.val_bpb:.3f}"]
        parts += ["bits/byte", f"{speed:,.0f} B/s"]
        if self.usage is not None:
            p = self.usage / self.usage.sum(-1, keepdim=True)
            parts.append(f"codes {entropy(p).exp().mean():.1f}")
        if self.lines:
            left = state.seconds / progress - state.seconds if progress else math.inf
            print(
                f"step {state.step:,} ({progress:.0%}, {left:,.0f} s left): {', '.join(parts)}, "
                f"lr {lr:.2g}",
                file=sys.stderr,
            )
        else:
            self.bar.n = round(100 * progress, 1)
            self.bar.set_postfix_str(" ".join(parts))
        self.shown_at = now
        if now - self.since > LOG_SECONDS:
            self.reset(state)

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)


def fit(
    model: HRMModel,
    data: Dataset,
    options: TrainConfig,
    *,
    stage: str,
    data_id: str,
    about: str,
    score_often: Callable[[HRMModel], float] | None,
    score_last: Callable[[HRMModel], TextScore | PairScore],
) -> TrainResult:
    """Trains ``model`` on ``data`` and keeps checkpoints in ``options.out_dir``.

    Args:
        data_id: tells whether a run to be resumed had the same data.
        about: the data, in words.
        score_often: bits per byte of some held-out data; ``None`` if nothing is held out.
        score_last: the score of all of it.
    """
    folder = Path(options.out_dir)
    device = model.device
    dtype = choose_precision(device, options.precision)
    optimizers = build_optimizers(model, options)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    dense = [p for part in matrices_and_rest(model) for p in part]
    state = RunState()
    settings = comparable(options) | {"data": data_id}

    def save(name: str, **more: Any) -> Path:
        path = folder / f"{stage}_{name}.pt"
        save_checkpoint(
            Checkpoint(model.config, model.state_dict(), stage, state.step, state.bytes_seen,
                       state.val_bpb, __version__, **more),
            path,
        )  # fmt: skip
        return path

    def save_state() -> None:
        training = {
            "run": asdict(state),
            "settings": settings,
            "optimizers": [o.state_dict() for o in optimizers],
            "scaler": scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        save("state", training=training)

    if options.resume:
        saved = load_checkpoint(folder / f"{stage}_state.pt")
        training = saved.training or {}
        if saved.config != model.config or training.get("settings") != settings:
            differ = differences(training.get("settings", {}), settings) or ["the model"]
            raise HRMError(f"cannot resume: {', '.join(differ)} changed since the run in {folder}")
        model.load_state_dict(saved.weights)
        for optimizer, content in zip(optimizers, training["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        scaler.load_state_dict(training["scaler"])
        torch.set_rng_state(training["random"])
        if training["random_cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(training["random_cuda"], device)
        state = RunState(**training["run"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{stage}_*.pt"):
            old.unlink()
    if options.compile:
        for block in (*model.planner.blocks, *model.executor.blocks):
            block.compile()

    def progress() -> float:
        if options.minutes is not None:
            return min(1.0, state.seconds / (60 * options.minutes))
        if options.steps is not None:
            return min(1.0, state.step / options.steps)
        assert options.epochs is not None
        return min(1.0, (state.epoch + state.item / len(data)) / options.epochs)

    def size() -> tuple[int, int]:
        return batch_shape(options, model.config.max_len, progress())

    def batch_groups() -> Iterator[list[tuple[int, Batch]]]:
        """The batches of each step, until the run is over."""
        while progress() < 1:
            batches = data.batches(size, options.seed, state.epoch, state.item)
            while progress() < 1 and (taken := list(itertools.islice(batches, options.grad_accum))):
                yield taken

    def train_step(group: list[Batch], lr: float) -> tuple[float, int, Tensor | None]:
        """One optimizer step over some batches; the nats, the tokens and the codes chosen."""
        n_tokens = sum(int((b.y_out != PAD).sum()) for b in group)
        nats, usage = 0.0, None
        for batch in group:
            batch = batch.to(device)
            with autocast(device, dtype):
                logits, codes = model(batch.prompt_ids, batch.y_in, batch.reads_memory)
            loss = cross_entropy(logits, batch.y_out) / n_tokens
            nats += loss.item() * n_tokens
            if codes is not None:
                groups = model.config.n_plan_groups
                chosen = codes.detach().unflatten(-1, (groups, -1))
                p = torch.nn.functional.one_hot(chosen.argmax(-1), chosen.shape[-1]).sum(0).float()
                usage = p if usage is None else usage + p
                if options.codebook_penalty:
                    penalty = codebook_penalty(codes, groups) * (len(batch.y_out) / rows(group))
                    loss = loss + options.codebook_penalty * penalty
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr * (NGRAM_LR if isinstance(optimizer, SparseAdam) else 1)
        norm = torch.nn.utils.clip_grad_norm_(dense, options.grad_clip or math.inf)
        if math.isfinite(norm.item()):
            state.skipped = 0
            for optimizer in optimizers:
                scaler.step(optimizer)
        else:
            state.skipped += 1
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        return nats, n_tokens, usage

    def score() -> None:
        if score_often is None:
            return
        start = time.perf_counter()
        state.val_bpb = score_often(model)
        state.scoring += time.perf_counter() - start
        if state.best_bpb is None or state.val_bpb < state.best_bpb:
            state.best_bpb = state.val_bpb
            save("best")

    print(
        f"{stage}: {model.n_parameters():,} parameters on {device} in {str(dtype)[6:]}; "
        f"{about}, checkpoints in {folder}",
        file=sys.stderr,
    )
    begin = time.perf_counter() - state.seconds
    model.train()
    meter = Meter(stage, state)
    with stop_signals() as stopped, meter.bar:
        for taken in batch_groups():
            group = [batch for _, batch in taken]
            lr = learning_rate(options, state.step, progress())
            nats, n_tokens, usage = train_step(group, lr)
            if state.skipped == MAX_SKIPPED:
                raise HRMError(
                    f"{MAX_SKIPPED} steps in a row without a finite gradient: "
                    "try a lower --lr or --precision fp32"
                )
            state.step += 1
            state.bytes_seen += n_tokens
            state.item = taken[-1][0]
            epoch_is_over = state.item == len(data)
            if epoch_is_over:
                state.epoch, state.item = state.epoch + 1, 0
            state.seconds = time.perf_counter() - begin
            meter.add(nats, n_tokens, usage)
            done = progress()
            meter.show(state, done, lr, force=done >= 1)
            if done * N_SCORES >= state.scored + 1 and done < 1:
                state.scored = int(done * N_SCORES)
                # A short run is for training: only where time counts may its scores be fewer.
                if options.minutes is None or state.scoring < SCORING_SHARE * state.seconds:
                    score()
            if epoch_is_over:
                save(f"epoch{state.epoch}")
                (folder / f"{stage}_epoch{state.epoch - options.keep}.pt").unlink(missing_ok=True)
                save_state()
            if stopped():
                save("last")
                save_state()
                raise Interrupted
        score()
        last = save("last")
        save_state()
    best = folder / f"{stage}_best.pt"
    if score_often is None:
        save("best")
        return TrainResult(best, last, state.step, state.bytes_seen, state.seconds, None)
    model.load_state_dict(load_checkpoint(best).weights)
    final = score_last(model)
    return TrainResult(best, last, state.step, state.bytes_seen, state.seconds, final)


def rows(group: list[Batch]) -> int:
    return sum(len(b.y_out) for b in group)


def comparable(options: TrainConfig) -> dict[str, Any]:
    """The options that a resumed run must share."""
    free = {"out_dir", "resume", "overwrite", "keep", "compile"}
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in free}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return ["the data" if k == "data" else f"--{k}" for k in new if old.get(k, new[k]) != new[k]]
