"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..config import TrainConfig
from ..console import print0
from ..data import Batch, Dataset
from ..device import (
    adapt_threads,
    adaptive_threads,
    autocast,
    choose_precision,
    keep_freed_memory,
    run_eagerly,
)
from ..distributed import (
    all_reduce_sum,
    barrier,
    data_parallel,
    detect_lost_peers,
    no_sync,
    rank,
    require_equal,
    world_size,
)
from ..errors import HRMError, Interrupted, PeerLost
from ..evaluation import PairScore, TextScore
from ..generation import generate
from ..model import HRMModel
from .checkpoint import Checkpoint, load_checkpoint
from .clock import RunningClock
from .early_stopping import is_best, is_worse
from .loader import Loader, StepBatches, step_batches, with_next
from .loss import BatchSizes, LossModule, code_counts
from .memory import fit_batch_size
from .metrics_log import Meter, MetricsLog
from .optim import build_optimizers, clip_gradients, set_learning_rate
from .resume import (
    changed_options,
    load_fingerprint,
    load_training,
    resume_fingerprint,
    run_batch_size,
    saved_command,
    usable_state,
)
from .run_folder import RunFolder
from .schedule import learning_rate
from .signals import stop_signals
from .state import RunState, StepStats
from .validation import Validate, is_due, validation_size
from .weights import is_finite, only_counts, pack_counts

EPOCH_SECONDS = 10.0  # minimum between two epoch checkpoints of a timed run
MAX_SKIPPED = 20  # steps in a row without a finite gradient
SAMPLE_LEN = 120  # bytes
MAX_SHAPES = 64  # for which the blocks are compiled


@dataclass(frozen=True)
class TrainResult:
    """Result of a run. ``score``: of the ``best`` checkpoint; ``None`` without held-out data, and
    in all processes but the first."""

    best: Path
    last: Path
    steps: int
    bytes_seen: int
    seconds: float
    score: TextScore | PairScore | None


class Trainer:
    """Trains a model and keeps the files of the run.

    Args:
        stage: ``pretrain`` or ``finetune``; file names begin with it.
        data_id: identifies the data: a run is only resumed with the same.
        origin: see `RunFolder`.
        validate: scores a part of the held-out data; ``None`` if there is none.
        resumed: the state to continue from.

    Raises:
        HRMError: the state to resume is of another model, other data or other options.
    """

    def __init__(
        self,
        model: HRMModel,
        data: Dataset,
        options: TrainConfig,
        *,
        stage: str,
        data_id: str,
        origin: dict[str, Any] | None = None,
        validate: Validate | None = None,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.model, self.data, self.stage, self.loader = model, data, stage, Loader(model)
        model.stage = stage
        self.validate, self.device = validate, model.device
        self.dtype = choose_precision(self.device, options.precision)
        batch_size = run_batch_size(options, model.config, self.device, resumed)
        if self.device.type == "cuda" and options.batch_size is None and resumed is None:
            batch_size = fit_batch_size(model, batch_size, self.dtype)
        self.options = options = replace(options, batch_size=batch_size)
        # Optimizers.
        self.optimizers = build_optimizers(model, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        # State and files.
        self.state = RunState()
        self.fingerprint = resume_fingerprint(options, model, data_id)
        self.state_saved_at, self.epoch_saved_at = time.perf_counter(), -math.inf
        self.last_nll = 0.0
        self.packed_counts: dict[str, torch.Tensor] | None = None
        self.is_first = rank() == 0  # the process that logs, validates and saves
        self.folder = RunFolder(options.out_dir, stage, origin)
        if self.is_first:
            self.folder.prepare(resume=resumed is not None)
        if resumed is not None:
            self.load_state(resumed)
        # Compilation and data parallelism.
        if options.compile:
            torch._dynamo.config.recompile_limit = MAX_SHAPES
            for block in (*model.planner.blocks, *model.executor.blocks):
                block.compile()
        require_equal("data, options or saved state", (self.fingerprint, asdict(self.state)))
        # Plain text leaves the Planner's blocks without gradients, pairs do not.
        self.loss = data_parallel(
            LossModule(model, options.codebook_penalty),
            find_unused=stage == "pretrain",
            synced_buffers=("pooled_queue",),
        )

    def run(self) -> None:
        """Trains until the run is over.

        Raises:
            HRMError: the run diverged, or the disk is full.
            Interrupted: a signal stopped the run, after saving.
            PeerLost: another process is gone; the first process has saved the state.
        """
        state, last_epoch = self.state, self.state.epoch
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model.train()
        # The results of a run of so many steps must not depend on what else the machine does.
        is_timed = self.options.minutes is not None
        with (
            adaptive_threads() if is_timed else nullcontext(),
            RunningClock(state.seconds) as clock,
            stop_signals() as stop_requested,
            self.folder.report_write_errors(),
            self.open_meter() as meter,
        ):
            try:
                for (n_done, batches), ahead in with_next(self.batches(), self.loader.is_ahead):
                    adapt_threads()
                    step = self.train_step(batches, None if ahead is None else ahead[1])
                    state.advance(step, n_done, len(self.data), clock.seconds())
                    if meter is not None:  # in the first process
                        meter.update(step)
                        meter.show(self.progress(), step.lr)
                        if self.validate is not None and is_due(
                            state, self.progress(), self.options.minutes
                        ):
                            self.run_validation(meter.log)
                        if state.epoch > last_epoch:
                            last_epoch = state.epoch
                            self.save_epoch()
                        if time.perf_counter() - self.state_saved_at > 60 * self.options.save_every:
                            self.save_state()
                    if self.sync_stop(stop_requested()) or self.progress() >= 1:
                        break
                if meter is not None:
                    self.finish(meter.log)
                is_stopped = self.sync_stop(stop_requested())
            except PeerLost:
                if self.is_first:  # the step in progress has changed nothing
                    self.save_state()
                raise
        if self.progress() < 1 or is_stopped:
            raise Interrupted

    def open_meter(self) -> AbstractContextManager[Meter | None]:
        """Returns the meter of the run, in the first process."""
        if not self.is_first:
            return nullcontext()
        resumed_step = self.state.step if self.options.resume else -1
        log = MetricsLog(self.folder.root, self.stage, resumed_step)
        return Meter(self.stage, self.state, log)

    def batches(self) -> Iterator[StepBatches]:
        """Yields the batches of each step, see `step_batches`."""
        return step_batches(self.data, self.options, self.model, self.state, self.progress)

    def train_step(
        self, batches: list[Batch], next_batches: list[Batch] | None = None
    ) -> StepStats:
        """Takes one optimizer step on some micro-batches.

        Args:
            next_batches: of the next step, to be loaded while a GPU computes this one.

        Raises:
            HRMError: the run diverged.
            PeerLost: another process is gone.
        """
        lr = learning_rate(self.options, self.state.step, self.progress())
        set_learning_rate(self.optimizers, lr)
        # Noise is a function of the step, so that a resumed run draws the same.
        torch.manual_seed(noise_seed(self.options.seed, self.state.step, rank()))
        # Step 1: gradients, accumulated over micro-batches and averaged over processes.
        sizes = BatchSizes(*all_reduce_sum(*BatchSizes.of(batches)))
        n_logged, counts = 0, None
        losses, pooled = [], []
        loaded = self.loader.load(batches, next_batches)
        for i, (batch, window_counts, n_targets) in enumerate(loaded):
            is_last = i == len(batches) - 1
            with detect_lost_peers(), nullcontext() if is_last else no_sync(self.loss):
                # Windows have few shapes; pairs have many, and compiling would not end.
                is_eager = self.options.compile and batch.cross_attends is not None
                with autocast(self.device, self.dtype), run_eagerly(is_eager):
                    total, terms = self.loss(batch, sizes, window_counts)
                # DistributedDataParallel averages gradients; the total needs their sum.
                self.scaler.scale(total * world_size()).backward()
            if self.stage == "finetune" or batch.cross_attends is None:
                losses.append(terms.mixture.detach().sum())
                n_logged += n_targets
            pooled.append(terms.pooled)
            if terms.code_logits is not None:
                chosen = code_counts(terms.code_logits)
                counts = chosen if counts is None else counts + chosen
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        grad_norm = clip_gradients(self.model, self.options.grad_clip)
        # Step 2: the results. Here the host waits until the step is computed.
        with detect_lost_peers():
            *nlls, norm = torch.stack([*losses, grad_norm]).tolist()
        nll, logged = all_reduce_sum(sum(nlls), n_logged)
        self.last_nll = nll if logged else self.last_nll
        # Step 3: weights and the codebook's queue.
        self.optimizer_step(norm)
        self.model.update_code_queue(pooled)
        return StepStats(int(sizes.n_targets), nll, int(logged), norm, lr, counts)

    def optimizer_step(self, norm: float) -> None:
        """Updates the weights, unless the norm of the gradients is not finite."""
        if math.isfinite(norm):
            self.state.skipped = 0
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        else:
            self.state.skipped += 1
            self.state.skipped_total += 1
            if self.state.skipped == MAX_SKIPPED:
                raise self.diverged(f"{MAX_SKIPPED} steps in a row had no finite gradient")
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def diverged(self, reason: str) -> HRMError:
        """Returns the error that ends a run whose model is of no use."""
        best = self.folder.checkpoint("best")
        has_best = self.state.best_bpb is not None
        saved = f"the best checkpoint before that is {best}" if has_best else "nothing is saved"
        return HRMError(
            f"the run diverged: {reason}. Try a lower --lr than {self.options.lr:g}, or "
            f"--set precision=fp32; {saved}"
        )

    def progress(self, state: RunState | None = None) -> float:
        """Returns the fraction of the run that is done, 0 to 1; at another state, if given."""
        options, state = self.options, state or self.state
        if options.minutes is not None:
            done = state.seconds / (60 * options.minutes)
        elif options.steps is not None:
            done = state.step / options.steps
        else:
            assert options.epochs is not None
            done = (state.epoch + state.item / len(self.data)) / options.epochs
        return min(1.0, done / state.horizon_scale)

    def sync_stop(self, stop: bool) -> bool:
        """Whether any process is to stop. The time and the length of the run are those of the first
        process."""
        state = self.state
        own = (state.seconds, state.horizon_scale) if self.is_first else (0.0, 0.0)
        state.seconds, state.horizon_scale, n_to_stop = all_reduce_sum(*own, float(stop))
        return n_to_stop > 0

    def run_validation(self, log: MetricsLog) -> None:
        """Scores held-out data, saves the model if it is the best so far, and ends the run early if
        it is past its best.

        Raises:
            HRMError: the score is not finite.
        """
        assert self.validate is not None
        state, minutes = self.state, self.options.minutes
        with run_eagerly(self.options.compile):
            if state.validation_size is None:
                state.validation_size = validation_size(self.validate, self.model, minutes)
            start = time.perf_counter()
            score = self.validate(self.model, state.validation_size)
        seconds = time.perf_counter() - start
        state.validation_seconds = min(seconds, state.validation_seconds or math.inf)
        if not math.isfinite(score.bpb):
            raise self.diverged(f"the held-out score is {score.bpb}")
        state.val_errors, state.val_bpb = score.errors, score.bpb
        exact_match = None if score.errors is None else 1 - score.errors
        log.add(state, val_bpb=score.bpb, val_exact_match=exact_match)
        if self.options.sample_prompt is not None:
            self.show_sample(self.options.sample_prompt)
        if is_best(score, state.best_errors, state.best_bpb, is_last=self.progress() >= 1):
            state.best_errors, state.best_bpb, state.bad_evals = score.errors, score.bpb, 0
            self.save("best")
        elif state.best_bpb is not None and is_worse(score, state.best_errors, state.best_bpb):
            state.bad_evals += 1
            self.end_early_if_past_best()
        state.val_progress = self.progress()

    def end_early_if_past_best(self) -> None:
        """Starts the decay of the learning rate after `patience` bad validations: more passes would
        only memorize the training data."""
        state, patience, stable = self.state, self.options.patience, 1 - self.options.decay
        is_past_best = 0 < patience <= state.bad_evals
        if state.horizon_scale == 1 and is_past_best and self.progress() < stable:
            state.horizon_scale = self.progress() / stable
            print0("the held-out score is getting worse: ending early")

    def show_sample(self, prompt: str) -> None:
        """Shows what the model writes after a prompt."""
        mode = "answer" if self.stage == "finetune" else "continue"
        with run_eagerly(self.options.compile):
            text = generate(self.model, prompt, mode=mode, max_new_tokens=SAMPLE_LEN, seed=0)
        shown = f"{prompt} -> {text}" if mode == "answer" else prompt + text
        print0(f"sample: {' '.join(shown.split())}")

    def save(self, name: str, training: dict[str, Any] | None = None) -> None:
        """Writes the checkpoint ``{stage}_{name}.pt``.

        Raises:
            HRMError: a weight is not finite.
        """
        state = self.state
        if not all(map(is_finite, self.model.parameters())):
            raise self.diverged("its weights are not finite numbers")
        if training is None and self.packed_counts is None:  # once: they do not change
            self.packed_counts = pack_counts(self.model.state_dict())
        produced_by = state.step, state.bytes_seen, state.val_bpb, __version__
        content = Checkpoint(
            self.model.config, self.model.state_dict(), self.stage, *produced_by,
            counts=self.packed_counts, training=training,
        )  # fmt: skip
        self.folder.save(name, content)

    def save_state(self) -> None:
        """Writes all that an exact continuation needs."""
        training = {
            "run": asdict(self.state),
            "fingerprint": self.fingerprint,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
        }
        self.save("state", training)
        self.state_saved_at = time.perf_counter()

    def save_epoch(self) -> None:
        """Writes an epoch checkpoint, if ``keep`` asks for it; in a timed run with short epochs
        only now and then."""
        now, keep = time.perf_counter(), self.options.n_kept_epochs
        if not keep:
            return
        if self.options.minutes is not None and now - self.epoch_saved_at < EPOCH_SECONDS:
            return
        self.epoch_saved_at = now
        self.save(f"epoch{self.state.epoch}")
        self.folder.rotate_epochs(keep)

    def finish(self, log: MetricsLog) -> None:
        """Writes the last files of a run that is over or was stopped.

        Raises:
            HRMError: the run diverged.
        """
        if self.progress() >= 1:
            if self.validate is None:
                if not math.isfinite(self.last_nll):
                    raise self.diverged(f"the training loss is {self.last_nll}")
                self.save("best")
            else:
                self.run_validation(log)
        self.save_state()  # first: whoever stops the run may not wait for long
        self.save("last")

    def load_state(self, saved: Checkpoint) -> None:
        """Continues from a saved state.

        Raises:
            HRMError: it is of another model, other data or other options, or not usable.
        """
        path = self.folder.checkpoint("state")
        with usable_state(path):
            old = load_fingerprint(saved.training)
        changed = changed_options(self.options, old, self.fingerprint)
        if saved.config != self.model.config:
            changed.append("the model")
        if changed:
            reason = f"{', '.join(changed)} changed{saved_command(saved)}"
            raise HRMError(f"cannot resume the run in {self.folder.root}: {reason}")
        self.model.load_state_dict(saved.weights | only_counts(self.model.state_dict()))
        with usable_state(path):
            self.state = load_training(saved.training, self.optimizers, self.scaler, len(self.data))
        saved.weights, saved.training = {}, None  # the caller keeps it for as long as the run takes

    def result(self, final_eval: Callable[[HRMModel], TextScore | PairScore]) -> TrainResult:
        """Scores the best checkpoint with ``final_eval`` and returns the result of the run. In the
        first process the model then has the weights of that checkpoint."""
        score = None
        best = self.folder.checkpoint("best")
        if self.is_first and self.validate is not None:
            self.model.load_state_dict(load_checkpoint(best).weights)
            try:
                with run_eagerly(self.options.compile):
                    score = final_eval(self.model)
            except KeyboardInterrupt as error:
                raise Interrupted from error
        barrier()
        state, last = self.state, self.folder.checkpoint("last")
        return TrainResult(best, last, state.step, state.bytes_seen, state.seconds, score)


def noise_seed(*key: int) -> int:
    """Returns a 64-bit seed for a key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
