import math

import numpy as np
import pytest
import torch
from conftest import random_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import KINDS

from hrm_esp import generate
from hrm_esp.data import Pair, TSVDataset, encode_prompt
from hrm_esp.errors import HRMError
from hrm_esp.evaluation import score_pairs
from hrm_esp.layers import characters
from hrm_esp.sampling import (
    AFTER,
    ALLOWED,
    Decoder,
    Sampling,
    answer_batch,
    choose,
    continue_tokens,
    window_start,
)
from hrm_esp.tokenizer import BOS, EOS

LENGTH = 3 * 32  # past max_len, so that the window rolls over more than once


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["continue", "answer"])
def test_cached_writing_equals_uncached(kind: dict[str, object], mode: str) -> None:
    model = random_model(**kind)
    for temperature in (0.0, 0.9):
        one, other = (
            generate(model, "El niño", mode=mode, min_new_tokens=LENGTH, max_new_tokens=LENGTH,
                     temperature=temperature, seed=3, use_cache=cache)
            for cache in (True, False)
        )  # fmt: skip
        assert one == other
        assert len(one.encode()) > LENGTH - 4


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cached_logits_equal_those_of_the_window_alone(kind: dict[str, object]) -> None:
    model = random_model(**kind)
    text = tokens(2, LENGTH)
    memory = model.planner.read(text[:, :9]) if model.config.memory else None
    plan, _ = model.planner(text[:, :9])
    with torch.inference_mode():
        decoder = Decoder(model, plan, memory)
        for n in range(1, LENGTH):
            logits = decoder.next_logits(text[:, :n])
            start = window_start(n, 32)
            past = text[:, max(0, start - model.config.recent_len) : start]
            places = characters(text)[:, start:n]
            plain = model.executor(text[:, start:n], plan, memory, past=past, places=places)[:, -1]
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 70])
def test_prompts_of_any_length_are_answered(positions: str, length: int) -> None:
    model = random_model(memory=True, positions=positions)
    text = generate(model, "a" * length, mode="answer", max_new_tokens=50, min_new_tokens=50)
    assert len(text.encode()) == 50
    pairs = TSVDataset([Pair(b"a" * min(length, 32), b"b" * 32), Pair(b"", b"c")], 32)
    assert score_pairs(model, pairs).n == 2


@given(st.integers(1, 500), st.integers(8, 65))
def test_windows_keep_half_and_never_overflow(n: int, max_len: int) -> None:
    start = window_start(n, max_len)
    assert 0 <= start < n and n - start <= max_len
    assert start == 0 or n - start > max_len // 2
    assert window_start(n + 1, max_len) in (start, start + max_len - max_len // 2)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(st.characters(codec=None), max_size=60) | st.just("\ud800a\0"),
    mode=st.sampled_from(["continue", "answer"]),
    length=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 50.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    top_p=st.sampled_from([1e-9, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_whatever_is_asked_the_text_is_valid_and_fits(
    prompt: str, mode: str, length: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """A model with random weights writes bytes of all kinds: only the mask keeps them UTF-8."""
    text = generate(random_model(), prompt, mode=mode, max_new_tokens=length, top_k=top_k,
                    temperature=temperature, top_p=top_p, seed=seed)  # fmt: skip
    assert len(text.encode()) <= length
    assert "\ufffd" not in text or "\ufffd".encode() in text.encode()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17])
def test_min_new_tokens_fill_the_room_exactly(length: int) -> None:
    for seed in range(5):
        text = generate(random_model(), "x", min_new_tokens=length, temperature=3, seed=seed,
                        max_new_tokens=length)  # fmt: skip
        assert len(text.encode()) == length


def test_the_automaton_is_that_of_utf8() -> None:
    """Every code point is reachable, in a room that fits, and nothing else is."""
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
            reachable &= bool(ALLOWED[state, min(4, len(data) - i), byte])
            state = int(AFTER[state, byte])
        assert reachable == valid
        assert not valid or (state == 0 and not ALLOWED[0, len(data) - 1, data[0]])
    assert not ALLOWED[1:, :, EOS].any() and ALLOWED[0, :, EOS].all()
    assert not ALLOWED[:, :, [256, 257, 259]].any()


def reference(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, one row, by the book."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if how.top_k:
        order = order[: how.top_k]
    weights = np.array([math.exp((logits[i] - logits[order[0]]) / how.temperature) for i in order])
    weights /= weights.sum()
    keep, total = 0, 0.0
    while keep < len(order) and total < how.top_p:
        total += weights[keep]
        keep += 1
    p = np.zeros(len(logits))
    p[order[:keep]] = weights[:keep] / weights[:keep].sum()
    return p


@pytest.mark.parametrize("top_k", [0, 3, 10])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choice_follows_the_distribution(top_k: int, top_p: float, temperature: float) -> None:
    """A chi-square test at p = 0.0001 on 20,000 draws, with a fixed seed."""
    from scipy.stats import chisquare

    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5))
    n = 20_000
    chosen = choose(logits.repeat(n, 1), how, torch.Generator().manual_seed(1))
    count, p = np.bincount(chosen.numpy(), minlength=16), reference(logits.numpy(), how)
    assert (count[p == 0] == 0).all()
    assert chisquare(count[p > 0], n * p[p > 0]).pvalue > 1e-4


def test_a_seed_is_a_text_whatever_else_happened() -> None:
    model = random_model()
    one = generate(model, "Sol", seed=5, temperature=1.0)
    torch.randn(7)
    assert generate(model, "Sol", seed=5, temperature=1.0) == one
    assert generate(model, "Sol", seed=6, temperature=1.0) != one


def test_line_breaks_in_prompts() -> None:
    assert continue_tokens("a\r\n\nb\n")[0].tolist() == [BOS, 97, BOS, 98, BOS]
    assert encode_prompt("a\r\nb", 64) == b"a b"


def test_answers_in_a_batch_are_those_alone() -> None:
    for kind in ({}, {"memory": True}):
        model = random_model(**kind)
        prompts = [b"uno", b"", b"trescientos once", b"un rio muy largo"]
        together = answer_batch(model, prompts, 40)
        assert together == [
            generate(model, p.decode(), mode="answer", max_new_tokens=40) for p in prompts
        ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"mode": "write"},
    ],
    ids=str,
)
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(HRMError):
        generate(random_model(), "x", **wrong)
