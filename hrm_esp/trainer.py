"""The loop of a run: steps, and what is kept of them."""

from __future__ import annotations

import errno
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import __version__
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import ALL, Batch, Shard
from .device import autocast, choose_precision, keep_freed_memory
from .distributed import (
    noticing_lost_peers,
    parallel,
    rank,
    require_the_same,
    summed,
    wait_for_all,
    without_averaging,
    world_size,
)
from .errors import HRMError, PeerLost
from .evaluation import PairScore, TextScore
from .files import remove_partial
from .generation import generate
from .layers import NgramEmbedding
from .model import HRMModel, Nats
from .optim import (
    Parameters,
    batch_shape,
    build_optimizers,
    learning_rate,
    set_learning_rate,
)
from .progress import Meter, MetricsLog

SCORING_SHARE = 0.04  # of the time of a timed run, its first scoring aside
SAMPLE_LEN = 120  # bytes
N_SCORES = 8  # times a run is scored, evenly spaced
WORSE = 0.01  # bits per byte more than at the best: noise at a high learning rate is less
EPOCH_SECONDS = 10.0  # at least, between the checkpoints of two epochs of a timed run
# Of foretelling from the plan alone which bytes the Planner read, in whatever order (bag-of-word
# loss: Zhao et al. 2017, section 3.3). Of each next byte a plan says so little that the Executor
# would not learn to heed it.
BAG_WEIGHT = 0.6
SINKHORN_TAU = 0.5  # of `even_shares`: lower is surer of each row's code
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
    usage: Tensor | None  # counts of the codes chosen, (K,); in this process


class Score(NamedTuple):
    """Of some held-out data: less is better, and fewer errors come before fewer bits."""

    errors: float | None  # the share of the answers that are not right; of text none
    bpb: float  # bits per byte
    rows: int = 1  # answered


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; ``score`` is that of ``best``, ``None`` if nothing was held out, or in
    another process than the first."""

    best: Path
    last: Path
    steps: int
    bytes_seen: int
    seconds: float
    score: TextScore | PairScore | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved."""


def even_shares(code_logits: Tensor) -> Tensor:
    """Each row dealt out to the codes it likes, so that all codes get about alike much: (B, K),
    each row summing to one (Sinkhorn's algorithm, as in Caron et al. 2020, SwAV, section 3.1)."""
    share = code_logits.float() / SINKHORN_TAU
    for _ in range(3):
        share = share - share.logsumexp(0)
        share = share - share.logsumexp(-1, keepdim=True)
    return share.exp()


def codebook_penalty(code_logits: Tensor) -> Tensor:
    """The cross-entropy of the rows' choices against `even_shares`, in nats. It
    is nought when every row is sure of its code and all codes are used alike; also a
    code that nobody chooses has a gradient.

    Args:
        code_logits: (B, K), with B several times K: each code is to have rows.
    """
    shares = even_shares(code_logits.detach())
    return -(shares * code_logits.float().log_softmax(-1)).sum(-1).mean()


def noise_seed(*key: int) -> int:
    """A seed of 64 bits for each key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Loss(nn.Module):
    """`HRMModel.nats` of a batch, as a module: that is what PyTorch makes parallel."""

    def __init__(self, model: HRMModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Nats, Tensor | None]:
        """What `HRMModel.nats` returns, and the logits of `Planner.last_logits`."""
        return self.model.nats(*batch, leave_out=True), self.model.planner.last_logits()


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
    except PeerLost:
        del old[signal.SIGTERM]  # torchrun ends this one, too, which has a line to say first
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Trainer:
    """One run: trains ``model`` on ``data`` and keeps its files in ``options.out_dir``.

    Args:
        stage: ``pretrain`` or ``finetune``; the files are named after it.
        data_id: tells whether a run to be resumed had the same data.
        score: scores some held-out data; ``None`` if nothing is held out.
        resumed: the state of the run to go on with.

    Raises:
        HRMError: what is to be resumed is of another model, other data or other options.
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
        resumed: Checkpoint | None = None,
    ) -> None:
        self.model, self.data, self.options, self.stage = model, data, options, stage
        self.score_some = score
        self.folder = Path(options.out_dir)
        self.device = model.device
        self.dtype = choose_precision(self.device, options.precision)
        self.parameters = Parameters.of(model)
        # NCCL cannot sum sparse gradients, and MPS has none.
        sparse = self.device.type == "cpu" or (self.device.type == "cuda" and world_size() == 1)
        for module in model.modules():
            if isinstance(module, NgramEmbedding):
                module.table.sparse = sparse
        self.optimizers = build_optimizers(self.parameters, options, sparse)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.settings = comparable(options) | {"data": data_id}
        self.state = RunState()
        self.stale: list[Path] = []  # files of an overwritten run, until this one has its first
        self.state_saved_at, self.epoch_saved_at = time.perf_counter(), -math.inf
        self.last_scoring = 0.0  # seconds
        self.is_first = rank() == 0  # and so the one that writes, shows and scores
        if self.is_first:
            names = ("corpus.", "ngrams.") if stage == "pretrain" else ()
            remove_partial(self.folder, f"{stage}_", "metrics.", *names)
        if resumed is not None:
            self.resume(resumed)
        elif self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.stale = list(self.folder.glob(f"{stage}_*.pt"))
        if options.compile:
            for block in (*model.planner.blocks, *model.executor.blocks):
                block.compile()
        require_the_same("data, options or saved state", (self.settings, asdict(self.state)))
        # Text leaves the Planner's blocks without gradients, pairs do not.
        self.loss = parallel(Loss(model), stage == "pretrain", synced_buffers=("last_pooled",))

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

    def resume(self, saved: Checkpoint) -> None:
        """Takes over a state.

        Raises:
            HRMError: it is of another model, other data or other options.
        """
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
        saved.weights, saved.training = {}, None  # the caller holds it for as long as the run takes

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
            PeerLost: another process is gone; after saving, in the first.
        """
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model.train()
        with stop_signals() as stopped:
            try:
                stop = self.take_part(stopped)
            except BrokenPipeError:  # nobody reads what is shown
                raise
            except OSError as error:
                raise self.cannot_write(error) from error
            if self.progress() < 1 or stop:
                raise Interrupted

    def take_part(self, stopped: Callable[[], bool]) -> bool:
        """Trains until the run is over or stopped; returns whether it was stopped."""
        try:
            if self.is_first:
                self.lead(self.steps(stopped))
            else:
                for _ in self.steps(stopped):
                    pass
            return self.agree(stopped())  # once the first has saved
        except PeerLost:
            if self.is_first:  # no step is half done
                self.save_state()
            raise

    def cannot_write(self, error: OSError) -> HRMError:
        """What is left, and what to do."""
        saved = list(self.folder.glob(f"{self.stage}_*.pt"))
        left = "nothing of this run is saved"
        if not self.stale and saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
            left = f"the newest checkpoint is {newest}"
        if not self.stale and self.path("state").is_file():
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            left += f"; {'free some space and ' if is_full else ''}go on with --resume"
        return HRMError(f"{error.filename or self.folder}: {error.strerror or error}; {left}")

    def lead(self, steps: Iterator[Step]) -> None:
        """Takes the steps, and shows, scores and saves what they come to: what the first of many
        processes does."""
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
            self.save_state()  # first: whoever stops the run may not wait for long
            self.save("last")

    def steps(self, stopped: Callable[[], bool]) -> Iterator[Step]:
        """Trains a step at a time, until the run is over or, in any process, stopped. What the
        first process does between two steps, the others learn of before the next."""
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
        """Whether any process is to stop. How long the run took and is to be is what the first
        process says: the others add nothing to its figures."""
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
        n_tokens, n_rows, n_texts = summed(
            sum(b.n_tokens for b in batches),
            sum(len(b.y_out) for b in batches),
            sum(int(b.has_targets.sum()) for b in batches if b.reads_memory is None),
        )
        nats, shown, usage = 0.0, 0.0, None
        for i, batch in enumerate(batches):
            size = batch.n_tokens
            batch = batch.to(self.device)
            is_last = i == len(batches) - 1
            averaging = nullcontext() if is_last else without_averaging(self.loss)
            with noticing_lost_peers(), averaging:
                with autocast(self.device, self.dtype):
                    cost, last = self.loss(batch)
                if self.stage == "finetune" or batch.reads_memory is None:
                    nats, shown = nats + cost.mixed.sum().item(), shown + size
                # Alone, too, the network is to foretell all: else it learns the counts' leavings.
                loss = (cost.mixed + cost.alone).sum() / n_tokens
                if batch.reads_memory is None:
                    bags = (cost.bag * batch.has_targets).sum()
                    loss = loss + BAG_WEIGHT * bags / max(1, n_texts)
                if cost.code_logits is not None and last is not None:
                    codes = cost.code_logits
                    chosen = F.one_hot(codes.argmax(-1), codes.shape[-1]).sum(0).float()
                    usage = chosen if usage is None else usage + chosen
                    share = self.options.codebook_penalty * len(batch.y_out) / n_rows
                    loss = loss + share * codebook_penalty(last)
                # Gradients are averaged over the processes, and are to be summed.
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
        self.model.remember()
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
        if self.options.sample_prompt is not None:
            self.show_sample(self.options.sample_prompt)
        best = (state.best_errors or 0.0, state.best_bpb or math.inf)
        # At the end the learning rate has fallen, which few rows may be too few to show.
        is_last = self.progress() >= 1 and score.errors is not None
        as_good = is_last and not has_more_errors(score, state.best_errors)
        if (score.errors or 0.0, score.bpb) < best or state.best_bpb is None or as_good:
            state.best_errors, state.best_bpb, state.worse = score.errors, score.bpb, 0
            self.save("best")
        elif is_worse(score, state.best_errors, state.best_bpb):
            state.worse += 1
            self.end_early()

    def show_sample(self, prompt: str) -> None:
        """Says what the model makes of a prompt by now."""
        mode = "answer" if self.stage == "finetune" else "continue"
        with uncompiled(self.options):
            text = generate(self.model, prompt, mode=mode, max_new_tokens=SAMPLE_LEN, seed=0)
        self.model.train()
        shown = f"{prompt} -> {text}" if mode == "answer" else prompt + text
        tqdm.write(f"sample: {' '.join(shown.split())}", file=sys.stderr)

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
    in_errors = score.errors is None or has_more_errors(score, best_errors)
    return score.bpb > best_bpb + WORSE and in_errors


def has_more_errors(score: Score, best: float | None) -> bool:
    """Whether a share of wrong answers is more than a standard error above the best."""
    if score.errors is None or best is None:
        return False
    return score.errors > best + math.sqrt(best * (1 - best) / score.rows)


def uncompiled(options: TrainConfig) -> AbstractContextManager[None]:
    """Compiled blocks as they are written, for scoring: its shapes change at every step."""
    return torch.compiler.set_stance("force_eager") if options.compile else nullcontext()


def comparable(options: TrainConfig) -> dict[str, Any]:
    """The options that a resumed run must share."""
    free = {"out_dir", "resume", "overwrite", "keep", "compile", "save_every", "sample_prompt"}
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in free}
