"""Where a run stands, and what a step gave.

Shapes: K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RunState:
    """Where a run stands. Part of a saved state."""

    step: int = 0
    epoch: int = 0
    item: int = 0  # windows or pairs done in this epoch
    bytes_seen: int = 0
    seconds: float = 0.0
    n_validations: int = 0  # that were due so far
    validation_size: float | None = None  # part of the validation data that is scored
    validation_seconds: float = 0.0  # of the shortest validation: a busy machine slows others down
    val_bpb: float | None = None
    val_errors: float | None = None
    val_progress: float = 0.0  # when they were measured, as a fraction of the run
    best_bpb: float | None = None
    best_errors: float | None = None
    bad_evals: int = 0  # validations worse than the best since the best
    horizon_scale: float = 1.0  # length of the run relative to the options: less if it ends early
    skipped: int = 0  # steps in a row without a finite gradient
    skipped_total: int = 0

    def advance(self, step: StepStats, n_done: int, epoch_len: int, seconds: float) -> None:
        """Counts a step, after which ``n_done`` of the ``epoch_len`` items of the epoch are done
        and the run has taken ``seconds``."""
        self.step, self.item = self.step + 1, n_done
        self.bytes_seen += step.n_targets
        self.seconds = seconds
        if self.item == epoch_len:
            self.epoch, self.item = self.epoch + 1, 0


@dataclass(frozen=True)
class StepStats:
    """Results of an optimizer step.

    ``n_targets`` of all processes. ``nll`` in nats and ``n_logged``: the loss that is shown, and
    its number of targets; in pretraining corrupted text is not part of it. ``grad_norm`` before
    clipping. ``code_counts`` (K,): rows that chose each code in this process.
    """

    n_targets: int
    nll: float
    n_logged: int
    grad_norm: float
    lr: float
    code_counts: Tensor | None
