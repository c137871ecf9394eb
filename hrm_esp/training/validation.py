"""How often a run validates, and on how much of its held-out data."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..model import HRMModel
from .early_stopping import Score
from .state import RunState

N_VALIDATIONS = 8  # per run, evenly spaced
VALIDATION_SHARE = 0.05  # of the time of a timed run: what the size of a validation aims at
# Of the time since the validation before, where even the smallest size takes more than that: with a
# large model, or on a busy machine, and in a short run.
MAX_VALIDATION_SHARE = 0.2
MIN_SIZE = 1 / 8

# Scores a part of the validation data, from its beginning: up to 1, which is all of it.
Validate = Callable[[HRMModel, float], Score]


def validation_size(validate: Validate, model: HRMModel, minutes: float | None) -> float:
    """Returns the part of the validation data to score at each validation: all of it, but in a run
    of so many minutes what takes `VALIDATION_SHARE` of the time, at least `MIN_SIZE`."""
    if minutes is None:
        return 1.0
    start = time.perf_counter()
    validate(model, MIN_SIZE)
    seconds = time.perf_counter() - start
    affordable_seconds = 60 * minutes * VALIDATION_SHARE / N_VALIDATIONS
    return min(1.0, MIN_SIZE * max(1.0, affordable_seconds / seconds))


def is_due(state: RunState, progress: float, minutes: float | None) -> bool:
    """Whether it is time to validate, and counts it then: `N_VALIDATIONS` times per run, in a timed
    run fewer if that takes more than `MAX_VALIDATION_SHARE`. The last one is not counted: it comes
    after the end."""
    n_due = int(progress * N_VALIDATIONS)
    if not state.n_validations < n_due < N_VALIDATIONS:
        return False
    if minutes is not None:
        seconds = (progress - state.val_progress) * state.horizon_scale * 60 * minutes
        if state.validation_seconds > MAX_VALIDATION_SHARE * seconds:
            return False
    state.n_validations = n_due
    return True
