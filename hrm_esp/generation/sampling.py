"""Sampling of the next byte: temperature, top-k, top-p, min-p, and valid UTF-8.

Shapes: V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..config import DEFAULT_NEW_TOKENS, DEFAULT_TEMPERATURE
from ..tokenizer import EOS, VOCAB_SIZE

MIN_TEMPERATURE = 1e-30  # lower ones would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, with all defaults filled in. `GenerationConfig` describes and checks the
    fields.

    ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. A text ends with
    any of the ``stop`` sequences.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    temperature: float = DEFAULT_TEMPERATURE
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[bytes, ...] = ()

    @property
    def has_filters(self) -> bool:
        """Whether top-k, top-p or min-p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def allowed_tokens(self, utf8_state: int, n: int) -> NDArray[np.bool_]:
        """Returns which tokens may come after n bytes, in a state of `UTF8_NEXT_STATE`, (V,).

        A character begins only if it fits in ``max_new_tokens``.
        """
        allowed = UTF8_ALLOWED[utf8_state, min(4, self.max_new_tokens - n)]
        if n < self.min_new_tokens:
            allowed = allowed.copy()
            allowed[EOS] = False
        return allowed


# UTF-8 as an automaton (Unicode 16, table 3-7). State 0 is the end of a character. States 1 to 3
# expect that many continuation bytes; states 4 to 7 follow E0, ED, F0 and F4, and first expect a
# continuation byte from a narrower range. (first byte, last byte, next state)
_CONTINUATION = {1: (0x80, 0xBF, 0), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2)}
_CONTINUATION |= {4: (0xA0, 0xBF, 1), 5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}
# (first lead byte, last lead byte, next state, length of the character)
_LEAD = [(0x00, 0x7F, 0, 1), (0xC2, 0xDF, 1, 2), (0xE0, 0xE0, 4, 3), (0xE1, 0xEC, 2, 3)]
_LEAD += [(0xED, 0xED, 5, 3), (0xEE, 0xEF, 2, 3), (0xF0, 0xF0, 6, 4), (0xF1, 0xF3, 3, 4)]
_LEAD += [(0xF4, 0xF4, 7, 4)]


def _utf8_tables() -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Returns which tokens are allowed, (8 states, 5 bytes of space left, V), and the next state,
    (8, V)."""
    allowed = np.zeros((8, 5, VOCAB_SIZE), dtype=bool)
    next_state = np.zeros((8, VOCAB_SIZE), dtype=np.int64)
    for first, last, state, length in _LEAD:
        allowed[0, length:, first : last + 1] = True
        next_state[0, first : last + 1] = state
    allowed[0, :, EOS] = True
    for state, (first, last, then) in _CONTINUATION.items():
        allowed[state, :, first : last + 1] = True
        next_state[state, first : last + 1] = then
    return allowed, next_state


UTF8_ALLOWED, UTF8_NEXT_STATE = _utf8_tables()


def sampling_probs(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """Returns the probabilities to sample from, (..., V).

    Applies temperature, then top-k (Fan et al. 2018, section 5.1), top-p (Holtzman et al. 2020,
    section 3.1) and min-p (Nguyen et al. 2024, section 3), one after another.

    Args:
        logits: (..., V), -inf where a token is not allowed.
    """
    # In double precision and relative to the largest: a tiny temperature must not overflow.
    scaled = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    if params.temperature == 0:
        one_hot = np.zeros_like(scaled)
        np.put_along_axis(one_hot, scaled.argmax(-1, keepdims=True), 1, -1)
        return one_hot
    weights = np.exp(scaled / max(params.temperature, MIN_TEMPERATURE))
    return filter_probs(weights, params)


def draft_sampling_probs(probs: Sequence[float], params: SamplingParams) -> list[float]:
    """Returns what `sampling_probs` returns, for a few allowed tokens only.

    Args:
        probs: of the tokens, up to a common factor. At temperature 0 the most likely ones share
            the probability.
    """
    largest, power = max(probs), 1 / max(params.temperature, MIN_TEMPERATURE)
    weights = [(p / largest) ** power for p in probs]
    if params.has_filters:
        return cast(list[float], filter_probs(np.array(weights), params).tolist())
    total = sum(weights)
    return [weight / total for weight in weights]


def filter_probs(weights: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Applies top-k, top-p and min-p to weights (..., V), of which the largest is 1, in place;
    returns probabilities (..., V)."""
    if 0 < params.top_k < weights.shape[-1]:
        smallest = np.partition(weights, -params.top_k)[..., -params.top_k, None]
        weights[weights < smallest] = 0
    if params.top_p < 1:
        order = np.argsort(-weights, axis=-1, kind="stable")
        ordered = np.take_along_axis(weights, order, -1)
        cumulative_before = ordered.cumsum(-1) - ordered
        ordered[cumulative_before >= params.top_p * ordered.sum(-1, keepdims=True)] = 0
        np.put_along_axis(weights, order, ordered, -1)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    return weights / weights.sum(-1, keepdims=True)


def sample(weights: NDArray[np.float64], uniform: float) -> int:
    """Samples a token in proportion to weights (V,), by a number from [0, 1)."""
    cumulative = weights.cumsum()
    return int((cumulative / cumulative[-1]).searchsorted(uniform, "right"))
