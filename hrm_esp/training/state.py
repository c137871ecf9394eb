"""Where a run stands, and what a step gave.

Shapes: K codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .checkpoint import BITS, COUNT

SECONDS = {"low": 0, "high": 1e12}
SHARE = {"low": 0, "high": 1}
SCALE = {"above": 0, "high": 1}


def rule(default: Any, rules: dict[str, Any]) -> Any:
    """Declares a dataclass field with bounds, see `check_fields`."""
    return field(default=default, metadata=rules)


@dataclass
class RunState:
    """Where a run stands. Part of a saved state."""

    step: int = rule(0, COUNT)
    epoch: int = rule(0, COUNT)
    item: int = rule(0, COUNT)  # windows or pairs done in this epoch
    bytes_seen: int = rule(0, COUNT)
    seconds: float = rule(0.0, SECONDS)
    n_validations: int = rule(0, COUNT)  # that were due so far
    validation_size: float | None = rule(None, SCALE)  # part of the validation data scored
    # Of the shortest validation: a busy machine slows others down.
    validation_seconds: float = rule(0.0, SECONDS)
    val_bpb: float | None = rule(None, BITS)
    val_errors: float | None = rule(None, SHARE)
    val_progress: float = rule(0.0, SHARE)  # when they were measured, as a fraction of the run
    best_bpb: float | None = rule(None, BITS)
    best_errors: float | None = rule(None, SHARE)
    bad_evals: int = rule(0, COUNT)  # validations worse than the best since the best
    # Length of the run relative to the options: less if it ends early.
    horizon_scale: float = rule(1.0, SCALE)
    skipped: int = rule(0, COUNT)  # steps in a row without a finite gradient
    skipped_total: int = rule(0, COUNT)

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
