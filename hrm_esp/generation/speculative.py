"""The generation loop, with speculative decoding from n-gram counts.

Shapes: B sequences, T pending tokens, V = vocab_size.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import NotFinite
from ..tokenizer import EOS
from .decoder import Decoder, GuidedDecoder
from .sampling import (
    UTF8_NEXT_STATE,
    SamplingParams,
    draft_sampling_probs,
    sample,
    sampling_probs,
)

MIN_ACCEPT_PROB = 0.3  # drafting stops if the whole draft is less likely to be accepted
# The probability that a drafted token is accepted is about ACCEPT_BASE + ACCEPT_SLOPE times the sum
# of the squares of what the counts predict (a fit to drafts of Don Quijote).
ACCEPT_BASE, ACCEPT_SLOPE = 0.87, 0.12


class SampledToken(NamedTuple):
    """A token sampled for a sequence, and its log-probability in nats before any filter."""

    sequence: int
    token: int
    log_prob: float


@dataclass
class SequenceState:
    """One sequence that is being generated; ``utf8_state`` as in `SamplingParams`."""

    index: int
    rng: np.random.Generator
    utf8_state: int = 0
    output: bytearray = field(default_factory=bytearray)

    def allowed_tokens(
        self, params: SamplingParams, draft: Sequence[int] = ()
    ) -> list[NDArray[np.bool_]]:
        """Returns which tokens may come next, and after each token of the draft, (V,) each."""
        state, n = self.utf8_state, len(self.output)
        allowed = [params.allowed_tokens(state, n)]
        for i, token in enumerate(draft, 1):
            state = int(UTF8_NEXT_STATE[state, token])
            allowed.append(params.allowed_tokens(state, n + i))
        return allowed

    def append(self, token: int, params: SamplingParams) -> bool:
        """Adds a token; returns whether the sequence goes on."""
        if token == EOS:
            return False
        self.utf8_state = int(UTF8_NEXT_STATE[self.utf8_state, token])
        self.output.append(token)
        is_full = len(self.output) >= params.max_new_tokens
        return not is_full and not self.output.endswith(params.stop)


class DraftToken(NamedTuple):
    """A drafted token, its probability, and the tokens it was sampled from with theirs."""

    token: int
    prob: float
    candidates: list[int]
    candidate_probs: list[float]


def draft(
    decoder: Decoder | GuidedDecoder, sequence: SequenceState, params: SamplingParams, max_len: int
) -> list[DraftToken]:
    """Samples tokens from the n-gram counts and appends them to the decoder of one sequence.

    Whether to draft another token is decided before it is sampled: a decision by the sampled token
    would make some tokens more likely than they are.
    """
    drafted: list[DraftToken] = []
    utf8_state, accept_prob = sequence.utf8_state, 1.0
    space = params.max_new_tokens - len(sequence.output) - 1
    max_len = min(max_len, space, decoder.max_draft_len())
    while len(drafted) < max_len:
        probs = decoder.draft_probs()
        end_prob = probs.pop(EOS, 0.0)  # nothing can be drafted after it
        allowed = params.allowed_tokens(utf8_state, len(sequence.output) + len(drafted))
        candidates = [token for token in probs if allowed[token]]
        candidate_probs = [probs[token] for token in candidates]
        mass = sum(candidate_probs)
        accept_prob *= ACCEPT_BASE + ACCEPT_SLOPE * sum(p * p for p in candidate_probs)
        if mass <= end_prob or accept_prob < MIN_ACCEPT_PROB:
            break
        candidate_probs = draft_sampling_probs(candidate_probs, params)
        chosen = bisect(list(accumulate(candidate_probs[:-1])), sequence.rng.random())
        token = candidates[chosen]
        drafted.append(DraftToken(token, candidate_probs[chosen], candidates, candidate_probs))
        decoder.append([token])
        utf8_state = int(UTF8_NEXT_STATE[utf8_state, token])
    return drafted


def accept(
    drafted: Sequence[DraftToken], probs: NDArray[np.float64], rng: np.random.Generator
) -> tuple[int, NDArray[np.float64]]:
    """Accepts a prefix of a draft so that the text is a sample from the model's own distribution
    (Leviathan, Kalman & Matias 2023, algorithm 1).

    Args:
        probs: the model's, at each token of the draft and after it, (len(drafted) + 1, V).

    Returns:
        The number of accepted tokens, and the weights to sample the next one with, (V,).
    """
    for n_accepted, (token, prob, candidates, candidate_probs) in enumerate(drafted):
        if rng.random() * prob < probs[n_accepted, token]:
            continue
        residual = probs[n_accepted].copy()
        residual[candidates] -= candidate_probs
        if (residual > 0).any():  # else it is zero but for rounding
            return n_accepted, np.maximum(residual, 0)
        return n_accepted, probs[n_accepted]
    return len(drafted), probs[len(drafted)]


def decode(
    decoder: Decoder | GuidedDecoder,
    params: SamplingParams,
    rngs: Sequence[np.random.Generator],
    draft_len: int = 0,
) -> Iterator[SampledToken]:
    """Continues the sequences of a decoder until each has ended.

    Args:
        rngs: one for each sequence.
        draft_len: tokens drafted per pass, at most, once a single sequence is left.

    Raises:
        NotFinite: the model's predictions are not.
    """
    sequences = [SequenceState(i, rng) for i, rng in enumerate(rngs)]
    while sequences:
        # Step 1: draft tokens from the n-gram counts.
        drafted = draft(decoder, sequences[0], params, draft_len) if len(sequences) == 1 else []
        tokens = [d.token for d in drafted]
        # Step 2: verify the draft in one pass of the Executor.
        with np.errstate(over="ignore", invalid="ignore"):
            log_probs = decoder.verify()
        allowed = np.array([s.allowed_tokens(params, tokens) for s in sequences])
        allowed_log_probs = np.where(allowed, log_probs, -np.inf)
        if not np.isfinite(allowed_log_probs.max(-1)).all():
            raise NotFinite
        probs = sampling_probs(allowed_log_probs, params)
        # Step 3: accept a prefix of the draft, and remove the rest.
        n_accepted, weights = 0, probs[:, 0]
        if drafted:
            n_accepted, residual = accept(drafted, probs[0], sequences[0].rng)
            weights = residual[None]
            decoder.rollback(len(drafted) - n_accepted)
        # Step 4: sample one more token for each sequence.
        sampled = [sample(w, s.rng.random()) for w, s in zip(weights, sequences, strict=True)]
        # Step 5: yield the tokens, and drop the sequences that have ended.
        unfinished = []
        for i, sequence in enumerate(sequences):
            for position, token in enumerate([*tokens[:n_accepted], sampled[i]]):
                yield SampledToken(sequence.index, token, float(log_probs[i, position, token]))
                if not sequence.append(token, params):
                    break
            else:
                unfinished.append(i)
        if unfinished and len(unfinished) < len(sequences):
            decoder.select(unfinished)
        sequences = [sequences[i] for i in unfinished]
        if sequences:
            decoder.append([sampled[i] for i in unfinished])
