"""Sampling, compared with plain references."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.generation.sampling import (
    UTF8_ALLOWED,
    UTF8_NEXT_STATE,
    SamplingParams,
    draft_sampling_probs,
    sample,
    sampling_probs,
)
from hrm_esp.tokenizer import EOS


def test_the_automaton_accepts_exactly_utf8() -> None:
    """Every code point is accepted where it fits, and nothing else is."""
    for code in (*range(0x900), *range(0xD700, 0xE100), *range(0xFFFF, 0x10FFFF, 977), 0x10FFFF):
        try:
            data = chr(code).encode()
        except UnicodeEncodeError:
            data = chr(code).encode(errors="surrogatepass")
            valid = False
        else:
            valid = True
        state, reachable = 0, True
        for i, byte in enumerate(data):
            reachable &= bool(UTF8_ALLOWED[state, min(4, len(data) - i), byte])
            state = int(UTF8_NEXT_STATE[state, byte])
        assert reachable == valid
        assert not valid or (state == 0 and not UTF8_ALLOWED[0, len(data) - 1, data[0]])
    assert not UTF8_ALLOWED[1:, :, EOS].any() and UTF8_ALLOWED[0, :, EOS].all()
    assert not UTF8_ALLOWED[:, :, [256, 257, 259]].any()


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """One row, step by step: temperature, top-k, top-p, min-p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if params.temperature == 0:
        order = order[:1]
    if params.top_k:
        order = order[: params.top_k]
    warm = params.temperature or 1.0
    weights = {i: math.exp((logits[i] - logits[order[0]]) / warm) for i in order}
    total, kept = 0.0, {}
    for i in order:
        if total < params.top_p * sum(weights.values()):
            kept[i] = weights[i]
        total += weights[i]
    kept = {i: w for i, w in kept.items() if w >= params.min_p * max(kept.values())}
    return [kept.get(i, 0) / sum(kept.values()) for i in range(len(logits))]


@given(
    st.lists(st.integers(-300, 100), min_size=12, max_size=12, unique=True),
    st.sampled_from([0.0, 1e-9, 0.3, 0.8, 1.0, 50.0]),
    st.sampled_from([0, 1, 4, 400]),
    st.sampled_from([0.001, 0.5, 0.93, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_sampling_probs_equal_the_reference(
    tenths: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = [t / 10 for t in tenths]
    found = sampling_probs(np.array([logits, logits[::-1]], np.float32), params)
    np.testing.assert_allclose(found[0], reference(logits, params), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found[1], found[0][::-1])


@given(
    st.lists(st.integers(1, 1000), min_size=12, max_size=12, unique=True),
    st.sampled_from([0.0, 0.3, 0.8, 1.0, 50.0]),
    st.sampled_from([0, 4]),
)
def test_draft_sampling_probs_equal_sampling_probs(
    masses: list[int], temperature: float, top_k: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    expected = sampling_probs(np.log(masses).astype(np.float32), params)
    np.testing.assert_allclose(draft_sampling_probs(masses, params), expected, rtol=1e-4, atol=1e-9)


def test_disallowed_tokens_have_probability_zero() -> None:
    logits = np.array([-np.inf, -200.0, -np.inf, -300.0], np.float32)
    for temperature in (0.0, 1e-30, 1.0, 1e9):
        p = sampling_probs(logits, SamplingParams(temperature=temperature))
        assert p[[0, 2]].tolist() == [0, 0] and p.sum() == pytest.approx(1)


def test_samples_follow_the_weights() -> None:
    """A chi-square test at p = 0.0001 on 20,000 draws, with a fixed seed."""
    from scipy.stats import chisquare

    weights, n = np.array([0.0, 3.0, 0.0, 1.0, 0.5, 0.0]), 20_000
    chosen = [sample(weights, u) for u in np.random.default_rng(0).random(n)]
    count = np.bincount(chosen, minlength=6)
    assert (count[weights == 0] == 0).all()
    assert chisquare(count[weights > 0], n * weights[weights > 0] / 4.5).pvalue > 1e-4
    assert sample(weights, 0.0) == 1 and sample(weights, math.nextafter(1, 0)) == 4
