"""Which validation score is the best, and when a run is past it."""

from __future__ import annotations

import math
from typing import NamedTuple

MIN_WORSE_BPB = 0.01  # bits per byte: noise at a high learning rate is smaller


class Score(NamedTuple):
    """A validation score; less is better, and errors come before bits.

    ``errors``: share of wrong answers, ``None`` for text; ``bpb``: bits per byte; ``rows``: number
    of answers.
    """

    errors: float | None
    bpb: float
    rows: int = 1


def is_best(score: Score, best_errors: float | None, best_bpb: float | None, is_last: bool) -> bool:
    """Whether a score replaces the best so far.

    On pairs the last score also does so unless it has more errors by more than one standard error:
    after the decay of the learning rate the weights are usually better, which a small number of
    rows may not show.
    """
    if best_bpb is None or (score.errors or 0.0, score.bpb) < (best_errors or 0.0, best_bpb):
        return True
    return is_last and score.errors is not None and not has_more_errors(score, best_errors)


def is_worse(score: Score, best_errors: float | None, best_bpb: float) -> bool:
    """Whether a score is worse than the best by more than chance: in bits, and for answers also in
    errors, because their bits often rise while errors still fall."""
    in_errors = score.errors is None or has_more_errors(score, best_errors)
    return score.bpb > best_bpb + MIN_WORSE_BPB and in_errors


def has_more_errors(score: Score, best_errors: float | None) -> bool:
    """Whether the share of errors is more than one standard error above the best."""
    if score.errors is None or best_errors is None:
        return False
    standard_error = math.sqrt(best_errors * (1 - best_errors) / score.rows)
    return score.errors > best_errors + standard_error
