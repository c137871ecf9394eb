"""How the next byte is chosen: restrictions, noise, and what keeps the text valid UTF-8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from .errors import HRMError
from .tokenizer import EOS, VOCAB_SIZE


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 restrict nothing. A text
    ends with any of ``stop``.

    Raises:
        HRMError: a value out of its range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise HRMError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise HRMError(
                f"min_new_tokens must be from 0 to max_new_tokens ({self.max_new_tokens}), "
                f"not {self.min_new_tokens}"
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise HRMError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise HRMError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise HRMError(f"top_p must be more than 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise HRMError(f"min_p must be from 0 to 1, not {self.min_p}")
        if b"" in self.stop:
            raise HRMError("stop must not be empty")

    @property
    def restricts(self) -> bool:
        """Whether some tokens may be left out for others that are likelier."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def allowed(self, state: int, n: int) -> NDArray[np.bool_]:
        """What may come after n bytes, in a state of the automaton below, (V,)."""
        allowed = ALLOWED[state, min(4, self.max_new_tokens - n)]
        if n < self.min_new_tokens:
            allowed = allowed.copy()
            allowed[EOS] = False
        return allowed


# UTF-8 as an automaton (Unicode 16, table 3-7). State 0 is a character's end; the others say what
# may follow: so many bytes 80..BF, or first one from the narrower range after E0, ED, F0 or F4.
_FOLLOW = {1: (0x80, 0xBF, 0), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2)}
_FOLLOW |= {4: (0xA0, 0xBF, 1), 5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}
_LEAD = [(0x00, 0x7F, 0, 1), (0xC2, 0xDF, 1, 2), (0xE0, 0xE0, 4, 3), (0xE1, 0xEC, 2, 3)]
_LEAD += [(0xED, 0xED, 5, 3), (0xEE, 0xEF, 2, 3), (0xF0, 0xF0, 6, 4), (0xF1, 0xF3, 3, 4)]
_LEAD += [(0xF4, 0xF4, 7, 4)]


def _utf8_tables() -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What may come, (8 states, 5 sizes of room left, V), and the state after it, (8, V)."""
    allowed = np.zeros((8, 5, VOCAB_SIZE), dtype=bool)
    after = np.zeros((8, VOCAB_SIZE), dtype=np.int64)
    for low, high, state, length in _LEAD:
        allowed[0, length:, low : high + 1] = True
        after[0, low : high + 1] = state
    allowed[0, :, EOS] = True
    for state, (low, high, then) in _FOLLOW.items():
        allowed[state, :, low : high + 1] = True
        after[state, low : high + 1] = then
    return allowed, after


ALLOWED, AFTER = _utf8_tables()


COLDEST = 1e-30  # a temperature; those below would overflow


def probabilities(logits: NDArray[np.float32], how: Sampling) -> NDArray[np.float64]:
    """Logits (..., V), -inf where forbidden -> the probabilities to choose by, (..., V).

    Top-k (Fan et al. 2018, section 5.1), of these top-p (Holtzman et al. 2020, section 3.1), of
    these min-p (Nguyen et al. 2024, section 3).
    """
    # In double precision and relative to the largest: a tiny temperature must not overflow.
    scaled = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    if how.temperature == 0:
        weights = np.zeros_like(scaled)
        np.put_along_axis(weights, scaled.argmax(-1, keepdims=True), 1, -1)
        return weights
    return restricted(np.exp(scaled / max(how.temperature, COLDEST)), how)


def sharpened(p: Sequence[float], how: Sampling) -> list[float]:
    """As `probabilities`, from probabilities or any multiple of them, of a few tokens that are not
    forbidden; at temperature 0 the likeliest share alike."""
    largest, power = max(p), 1 / max(how.temperature, COLDEST)
    weights = [(x / largest) ** power for x in p]
    if how.restricts:
        return cast(list[float], restricted(np.array(weights), how).tolist())
    total = sum(weights)
    return [weight / total for weight in weights]


def restricted(weights: NDArray[np.float64], how: Sampling) -> NDArray[np.float64]:
    """Weights (..., V), of which the largest is 1 -> the probabilities of those left by top-k,
    top-p and min-p, (..., V)."""
    if 0 < how.top_k < weights.shape[-1]:
        smallest = np.partition(weights, -how.top_k)[..., -how.top_k, None]
        weights[weights < smallest] = 0
    if how.top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ordered = np.take_along_axis(weights, order, -1)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= how.top_p * ordered.sum(-1, keepdims=True)] = 0
        np.put_along_axis(weights, order, ordered, -1)
    if how.min_p > 0:
        weights[weights < how.min_p] = 0
    return weights / weights.sum(-1, keepdims=True)


def draw(weights: NDArray[np.float64], uniform: float) -> int:
    """Weights (V,) and a number from 0 to 1, 1 excluded -> a token, as likely as its weight is
    large."""
    cumulative = weights.cumsum()
    return int((cumulative / cumulative[-1]).searchsorted(uniform, "right"))
