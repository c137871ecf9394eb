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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import FinetuneConfig, HRMConfig, PretrainConfig, TrainConfig
from .data import (
    ALL,
    Batch,
    LMDataset,
    PathLike,
    Shard,
    TSVDataset,
    dataset_tsv,
    load_stream,
    split_pairs,
    split_stream,
    text_files,
)
from .device import autocast, choose_device, choose_precision, keep_freed_memory
from .distributed import (
    first_on_each_machine,
    noticing_lost_peers,
    parallel,
    process_group,
    rank,
    say,
    summed,
    wait_for_all,
    without_averaging,
    world_size,
)
from .errors import HRMError, PeerLost
from .evaluation import (
    PairScore,
    TextScore,
    score_pairs,
    score_stream,
)
from .files import remove_partial
from .model import HRMModel
from .optim import (
    Parameters,
    batch_shape,
    build_optimizers,
    learning_rate,
    set_learning_rate,
)
from .progress import Meter, MetricsLog, entropy, scoring_bar

SCORED_OFTEN = 16_384  # bytes of held-out text scored while training
SCORED_LAST = 1_000_000  # ... and at the end
ROWS_OFTEN, ROWS_LAST = 200, 1000  # the same for pairs
SCORING_SHARE = 0.04  # of the time of a timed run, its first scoring aside
N_SCORES = 8  # times a run is scored, evenly spaced
WORSE = 0.01  # bits per byte more than at the best: noise at a high learning rate is less
EPOCH_SECONDS = 10.0  # at least, between the checkpoints of two epochs of a timed run
MAX_SKIPPED = 20  # steps in a row without a finite gradient


class Dataset(Protocol):
    """What the loop trains on: ``len`` items, windows or pairs, taken in batches."""

    def __len__(self) -> int: ...

    def batches(
        self,
        size: Callable[[], tuple[int, int]],
        seed: int,
        epoch: int,
        skip: int = 0,
        shard: Shard = ALL,
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
    val_errors: float | None = None
    best_bpb: float | None = None
    best_errors: float | None = None
    worse: int = 0  # scorings clearly worse than the best, since that
    length: float = 1.0  # of what was asked for: less once the run is past its best
    skipped: int = 0  # steps in a row
    skipped_in_all: int = 0


class Step(NamedTuple):
    """What an optimizer step met."""

    n_tokens: int  # trained on, in all processes
    nats: float  # the loss of those that are shown: damaged text, in pretraining, is not
    shown: int
    norm: float  # of the gradient, before it is clipped
    lr: float
    usage: Tensor | None  # counts of the codes chosen, (G, K); in this process


class Score(NamedTuple):
    """Of some held-out data: less is better, and fewer errors come before fewer bits."""

    errors: float | None  # the share of the answers that are not right; of text none
    bpb: float  # bits per byte
    rows: int = 1  # answered


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
        HRMError: bad data or options, or a folder that holds a run.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or PretrainConfig()
    config = replace(config or HRMConfig(), memory=options.denoise > 0)
    device = device or choose_device()
    with first_on_each_machine():
        check_folder(options, "pretrain")
        paths = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
        held_out = None if val is None else load_stream([val], options.encoding)
        files = [f for f in text_files(paths) if val is None or not f.samefile(val)]
        if not files:
            raise HRMError(f"{val} is all the text there is: give another --val, or none")
        stream = load_stream(files, options.encoding, options.out_dir)
    if held_out is None:
        stream, held_out = split_stream(stream, options.val_fraction)
    if not len(stream):
        raise HRMError("nothing is left to train on: give a smaller --val_fraction")
    torch.manual_seed(options.seed)
    model = HRMModel(config)
    if model.executor.counts is not None:
        with first_on_each_machine():
            model.executor.counts.count(stream, Path(options.out_dir) / "ngrams.counts")
    model.to(device)
    dtype = choose_precision(device, options.precision)

    def score_some(model: HRMModel) -> Score:
        return Score(None, score_stream(model, held_out[:SCORED_OFTEN], dtype).bits_per_byte)

    def score_all(model: HRMModel) -> TextScore:
        text = held_out[:SCORED_LAST]
        with scoring_bar(len(text), "B") as bar:
            return score_stream(model, text, dtype, progress=bar.update)

    trainer = Trainer(
        model,
        LMDataset(stream, config.max_len, options.planner_view, config.past_len, options.denoise),
        options,
        stage="pretrain",
        data_id=f"{len(stream)}:{zlib.crc32(stream.data):08x}",
        score=score_some if len(held_out) else None,
    )
    announce("pretrain", model, dtype, f"{len(stream):,} bytes of text, {len(held_out):,} held out")
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
        HRMError: bad data or options, a bad checkpoint, or a folder that holds a run.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    options = options or FinetuneConfig()
    device = device or choose_device()
    with first_on_each_machine():
        check_folder(options, "finetune")
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
        bits = model.config.n_plan_groups * math.log2(model.config.n_plan_codes)
        say(
            "warning: with a codebook the plan says which of its codes a prompt has, about "
            f"{bits:.3g} bits: give --no_gumbel for one that holds more, or --context memory"
        )
    dtype = choose_precision(device, options.precision)

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
    )
    announce("finetune", model, dtype, f"{len(data):,} rows, {len(held_out):,} held out")
    trainer.run()
    return trainer.result(score_all)


def announce(stage: str, model: HRMModel, dtype: torch.dtype, data: str) -> None:
    """Says on stderr what is about to be trained, and on what."""
    precision = str(dtype).removeprefix("torch.")
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    say(
        f"{stage}: {model.n_parameters():,} parameters, {data}; "
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


def check_folder(options: TrainConfig, stage: str) -> None:
    """Raises HRMError if the folder holds a run of this stage that nobody said what to do with."""
    folder = Path(options.out_dir)
    if folder.exists() and not folder.is_dir():
        raise HRMError(f"{folder} is a file: give another --out_dir")
    holds_run = any(folder.glob(f"{stage}_*.pt"))
    if options.resume and not (folder / f"{stage}_state.pt").is_file():
        raise HRMError(f"no saved state of a {stage} run in {folder}: start without --resume")
    if holds_run and not (options.resume or options.overwrite):
        raise HRMError(
            f"{folder} holds a {stage} run: give --resume, --overwrite or another --out_dir"
        )


def codebook_penalty(code_logits: Tensor) -> Tensor:
    """Nats short of even use: log K - (H(mean choice) - mean H(choice)), averaged over codebooks.

    The bracket is the mutual information of row and code. It is largest when every row is sure of
    its code and all codes are used alike, so that it never blurs a single choice.

    Args:
        code_logits: (B, G, K).
    """
    p = code_logits.float().softmax(-1)
    information = entropy(p.mean(0)) - entropy(p).mean(0)  # (G,)
    return math.log(p.shape[-1]) - information.mean()


def noise_seed(*key: int) -> int:
    """A seed of 64 bits for each key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Loss(nn.Module):
    """`HRMModel.nats` of a batch, as a module: that is what PyTorch makes parallel."""

    def __init__(self, model: HRMModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.model.nats(*batch, leave_out=True)


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


class Trainer:
    """One run: trains ``model`` on ``data`` and keeps its files in ``options.out_dir``.

    Args:
        stage: ``pretrain`` or ``finetune``; the files are named after it.
        data_id: tells whether a run to be resumed had the same data.
        score: scores some held-out data; ``None`` if nothing is held out.
    """

    def __init__(
        self,
        model: HRMModel,
        data: Dataset,
        options: TrainConfig,
        *,
        stage: str,
        data_id: str,
        score: Callable[[HRMModel], Score] | None,
    ) -> None:
        self.model, self.data, self.options, self.stage = model, data, options, stage
        self.score_some = score
        self.folder = Path(options.out_dir)
        self.device = model.device
        self.dtype = choose_precision(self.device, options.precision)
        self.parameters = Parameters.of(model)
        self.optimizers = build_optimizers(self.parameters, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.settings = comparable(options) | {"data": data_id}
        self.state = RunState()
        self.stale: list[Path] = []  # files of an overwritten run, until this one has its first
        self.state_saved_at, self.epoch_saved_at = time.perf_counter(), -math.inf
        self.last_scoring = 0.0  # seconds
        self.is_first = rank() == 0  # and so the one that writes, shows and scores
        if self.is_first:
            remove_partial(self.folder)
        if options.resume:
            self.resume()
        elif self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.stale = list(self.folder.glob(f"{stage}_*.pt"))
        if options.compile:
            for block in (*model.planner.blocks, *model.executor.blocks):
                block.compile()
        # Text leaves the Planner's blocks without gradients, pairs do not.
        self.loss = parallel(Loss(model), some_unused=stage == "pretrain")

    def path(self, name: str) -> Path:
        return self.folder / f"{self.stage}_{name}.pt"

    def save(self, name: str, training: dict[str, Any] | None = None) -> None:
        state = self.state
        content = Checkpoint(
            self.model.config,
            self.model.state_dict(),
            self.stage,
            state.step,
            state.bytes_seen,
            state.val_bpb,
            __version__,
            training,
        )
        save_checkpoint(content, self.path(name))
        for old in self.stale:
            if old != self.path(name):
                old.unlink(missing_ok=True)
        self.stale = []

    def save_state(self) -> None:
        """All that an exact continuation needs."""
        training = {
            "run": asdict(self.state),
            "settings": self.settings,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }
        self.save("state", training)
        self.state_saved_at = time.perf_counter()

    def resume(self) -> None:
        """Takes over the state in the folder.

        Raises:
            HRMError: it is of another model, other data or other options.
        """
        saved = load_checkpoint(self.path("state"))
        training = saved.training or {}
        old = training.get("settings", {})
        changed = [
            k if k == "data" else f"--{k}" for k, v in self.settings.items() if old.get(k) != v
        ]
        if saved.config != self.model.config:
            changed.append("the model")
        if changed:
            raise HRMError(f"cannot resume the run in {self.folder}: {', '.join(changed)} changed")
        self.model.load_state_dict(saved.weights)
        for optimizer, content in zip(self.optimizers, training["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        self.scaler.load_state_dict(training["scaler"])
        self.state = RunState(**training["run"])

    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        options, state = self.options, self.state
        if options.minutes is not None:
            done = state.seconds / (60 * options.minutes)
        elif options.steps is not None:
            done = state.step / options.steps
        else:
            assert options.epochs is not None
            done = (state.epoch + state.item / len(self.data)) / options.epochs
        return min(1.0, done / state.length)

    def groups(self) -> Iterator[list[tuple[int, Batch]]]:
        """This process's share of the batches of each step, until the run is over."""
        n, shard = world_size(), Shard(rank(), world_size())

        def size() -> tuple[int, int]:
            return batch_shape(self.options, self.model.config.max_len, self.progress(), n)

        while self.progress() < 1:
            seed, state = self.options.seed, self.state
            batches = self.data.batches(size, seed, state.epoch, state.item, shard)
            while group := list(itertools.islice(batches, self.options.grad_accum)):
                yield group
                if self.progress() >= 1:
                    return

    def run(self) -> None:
        """Trains until the run is over.

        Raises:
            HRMError: many steps in a row had no finite gradient.
            Interrupted: Ctrl-C or SIGTERM, after saving.
            PeerLost: another process is gone; after saving.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model.train()
        with stop_signals() as stopped:
            try:
                if self.is_first:
                    self.lead(self.steps(stopped))
                else:
                    for _ in self.steps(stopped):
                        pass
                wait_for_all()  # the others for the first, which saves
            except PeerLost:
                if self.is_first:  # no step is half done
                    self.save_state()
                raise
            except OSError as error:
                raise self.cannot_write(error) from error
            if self.progress() < 1 or stopped():
                raise Interrupted

    def cannot_write(self, error: OSError) -> HRMError:
        """What is left, and what to do."""
        saved = list(self.folder.glob(f"{self.stage}_*.pt"))
        left = "nothing of this run is saved"
        if not self.stale and saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
            left = f"the newest checkpoint is {newest}"
        if not self.stale and self.path("state").is_file():
            left += "; free some space and go on with --resume"
        return HRMError(f"{error.filename or self.folder}: {error.strerror or error}; {left}")

    def lead(self, steps: Iterator[Step]) -> None:
        """Shows, scores and saves what the steps come to: what one of many processes does."""
        state, epoch = self.state, self.state.epoch
        log = MetricsLog(self.folder, self.stage, state.step if self.options.resume else -1)
        meter = Meter(self.stage, state, log)
        with meter.bar:
            for done in steps:
                meter.add(done.nats, done.shown, done.norm, done.usage)
                meter.show(state, self.progress(), done.lr)
                self.score_if_due(log)
                if state.epoch > epoch:
                    epoch = state.epoch
                    self.save_epoch()
                if time.perf_counter() - self.state_saved_at > 60 * self.options.save_every:
                    self.save_state()
            if self.progress() >= 1 and self.score_some is None:
                self.save("best")
            elif self.progress() >= 1:
                self.score(log)
            self.save("last")
            self.save_state()

    def steps(self, stopped: Callable[[], bool]) -> Iterator[Step]:
        """Trains a step at a time, until the run is over or, in any process, stopped."""
        state = self.state
        begin = time.perf_counter() - state.seconds
        for group in self.groups():
            done = self.step([batch for _, batch in group])
            state.step += 1
            state.bytes_seen += done.n_tokens
            state.item = group[-1][0]
            state.seconds = time.perf_counter() - begin
            if state.item == len(self.data):
                state.epoch, state.item = state.epoch + 1, 0
            yield done
            if self.agree(stopped()):
                return

    def agree(self, stop: bool) -> bool:
        """Where the run stands is what the first process says; it stops where any is to."""
        state = self.state
        own = (state.seconds, state.length) if self.is_first else (0.0, 0.0)
        state.seconds, state.length, n_to_stop = summed(*own, float(stop))
        return n_to_stop > 0

    def step(self, batches: list[Batch]) -> Step:
        """One optimizer step; its batches are this process's share."""
        lr = learning_rate(self.options, self.state.step, self.progress())
        set_learning_rate(self.optimizers, lr)
        # Noise is a function of the step alone, so that a resumed run draws what it would have.
        torch.manual_seed(noise_seed(self.options.seed, self.state.step, rank()))
        n_tokens, n_rows = summed(
            sum(b.n_tokens for b in batches), sum(len(b.y_out) for b in batches)
        )
        nats, shown, usage = 0.0, 0.0, None
        for i, batch in enumerate(batches):
            size = batch.n_tokens
            batch = batch.to(self.device)
            is_last = i == len(batches) - 1
            with nullcontext() if is_last else without_averaging(self.loss):
                with autocast(self.device, self.dtype):
                    mixed, alone, codes = self.loss(batch)
                if self.stage == "finetune" or batch.reads_memory is None:
                    nats, shown = nats + mixed.sum().item(), shown + size
                # Alone, too, the network is to foretell all: else it learns the counts' leavings.
                loss = (mixed + alone).sum() / n_tokens
                if codes is not None:
                    codes = codes.unflatten(-1, (self.model.config.n_plan_groups, -1))
                    chosen = F.one_hot(codes.argmax(-1), codes.shape[-1]).sum(0).float()
                    usage = chosen if usage is None else usage + chosen
                    share = self.options.codebook_penalty * len(batch.y_out) / n_rows
                    loss = loss + share * codebook_penalty(codes)
                # Gradients are averaged over the processes, and are to be summed.
                with noticing_lost_peers():
                    self.scaler.scale(loss * world_size()).backward()
        nats, shown = summed(nats, shown)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = self.clip_gradient()
        if math.isfinite(norm):
            self.state.skipped = 0
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        else:
            self.state.skipped += 1
            self.state.skipped_in_all += 1
            if self.state.skipped == MAX_SKIPPED:
                raise HRMError(
                    f"{MAX_SKIPPED} steps in a row without a finite gradient: "
                    "try a lower --lr or --precision fp32"
                )
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Step(int(n_tokens), nats, int(shown), norm, lr, usage)

    def clip_gradient(self) -> float:
        """Clips the gradient; returns its norm before that, not finite if any of it is not."""
        norm = nn.utils.clip_grad_norm_(self.parameters.dense, self.options.grad_clip or math.inf)
        for table in self.parameters.tables:
            if table.grad is not None:
                if table.grad.is_sparse:
                    table.grad = table.grad.coalesce()  # once, for the optimizer too
                norm = norm + table.grad.norm()
        return norm.item()

    def score_if_due(self, log: MetricsLog) -> None:
        """Scores ``N_SCORES`` times a run; fewer if a timed run is too short for that."""
        state, due = self.state, int(self.progress() * N_SCORES)
        if state.scored < due < N_SCORES:
            state.scored = due
            expected = state.scoring + self.last_scoring
            if self.options.minutes is None or expected < SCORING_SHARE * state.seconds:
                self.score(log)

    def score(self, log: MetricsLog) -> None:
        """Scores some held-out data, and keeps the model if it is the best so far."""
        if self.score_some is None:
            return
        state, start = self.state, time.perf_counter()
        with uncompiled(self.options):
            score = self.score_some(self.model)
        self.last_scoring = time.perf_counter() - start
        state.scoring += self.last_scoring
        state.val_errors, state.val_bpb = score.errors, score.bpb
        right = None if score.errors is None else 1 - score.errors
        log.add(state, val_bpb=score.bpb, val_exact_match=right)
        best = (state.best_errors or 0.0, state.best_bpb or math.inf)
        if (score.errors or 0.0, score.bpb) < best or state.best_bpb is None:
            state.best_errors, state.best_bpb, state.worse = score.errors, score.bpb, 0
            self.save("best")
        elif is_worse(score, state.best_errors, state.best_bpb):
            state.worse += 1
            self.end_early()

    def end_early(self) -> None:
        """Lets the learning rate fall from here on, once held-out data was foretold worse often
        enough: more passes would only teach the training data by heart."""
        state, patience, stable = self.state, self.options.patience, 1 - self.options.decay
        if state.length == 1 and 0 < patience <= state.worse and self.progress() < stable:
            state.length = self.progress() / stable
            tqdm.write("held-out text is foretold worse than before: ending early", file=sys.stderr)

    def save_epoch(self) -> None:
        """Keeps the epoch's model; of a timed run's momentary epochs only one now and then."""
        now = time.perf_counter()
        if self.options.minutes is not None and now - self.epoch_saved_at < EPOCH_SECONDS:
            return
        self.epoch_saved_at = now
        self.save(f"epoch{self.state.epoch}")
        kept = sorted(self.folder.glob(f"{self.stage}_epoch*.pt"), key=lambda p: p.stat().st_mtime)
        for old in kept[: -self.options.keep]:
            old.unlink()

    def result(self, score: Callable[[HRMModel], TextScore | PairScore]) -> TrainResult:
        """What the run came to, by the score of its best model."""
        final = None
        if self.is_first and self.score_some is not None:
            self.model.load_state_dict(load_checkpoint(self.path("best")).weights)
            try:
                with uncompiled(self.options):
                    final = score(self.model)
            except KeyboardInterrupt as error:
                raise Interrupted from error
        wait_for_all()
        state = self.state
        return TrainResult(
            self.path("best"), self.path("last"), state.step, state.bytes_seen, state.seconds, final
        )


def is_worse(score: Score, best_errors: float | None, best_bpb: float) -> bool:
    """Whether a score is worse than the best by more than chance: in bits, and where there are
    answers by a standard error of their share, too, for that often rises while bits do."""
    if score.errors is None or best_errors is None:
        return score.bpb > best_bpb + WORSE
    noise = math.sqrt(best_errors * (1 - best_errors) / score.rows)
    return score.bpb > best_bpb + WORSE and score.errors > best_errors + noise


def uncompiled(options: TrainConfig) -> AbstractContextManager[None]:
    """Compiled blocks as they are written, for scoring: its shapes change at every step."""
    return torch.compiler.set_stance("force_eager") if options.compile else nullcontext()


def comparable(options: TrainConfig) -> dict[str, Any]:
    """The options that a resumed run must share."""
    free = {"out_dir", "resume", "overwrite", "keep", "compile", "save_every"}
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in free}
