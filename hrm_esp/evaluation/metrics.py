"""Error rates, confidence intervals and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Interval = tuple[float, float]


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns the Levenshtein distance (Wagner & Fischer 1974)."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def wilson_interval(n_correct: int, n: int) -> Interval:
    """Returns the 95% confidence interval of the share ``n_correct / n`` (Wilson 1927)."""
    z, share = 1.96, n_correct / n
    center = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return (max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale))


def bootstrap_ratio(rows: np.ndarray, n_samples: int = 1000) -> tuple[float, Interval]:
    """Returns the sum of the first column over that of the second, and its 95% interval.

    Args:
        rows: (N, 2).
        n_samples: bootstrap samples of N rows (Efron 1979), with a fixed seed.
    """
    rng = np.random.default_rng(0)
    rows, ratios = rows.astype(float), np.empty(n_samples)
    for i in range(n_samples):
        numerator, denominator = rows[rng.integers(len(rows), size=len(rows))].sum(0)
        ratios[i] = numerator / max(1.0, denominator)
    numerator, denominator = rows.sum(0)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(numerator / max(1.0, denominator)), (float(low), float(high))


def perplexity(counts: Tensor) -> float:
    """Returns exp of the entropy of counts (K,): how many codes are in use."""
    p = counts / counts.sum()
    return float((-(p * p.clamp(min=1e-9).log()).sum()).exp())
