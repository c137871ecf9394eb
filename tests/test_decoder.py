"""Decoders with caches, compared with reading the whole window. All weights are random."""

import copy
from collections.abc import Sequence

import pytest
import torch
from conftest import random_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from test_model import KINDS

from hrm_esp import generate
from hrm_esp.data import pad
from hrm_esp.generation import window_start
from hrm_esp.generation.cpu_kernels import pack_for_cpu
from hrm_esp.generation.decoder import Decoder
from hrm_esp.model import EncoderOutput, HRMModel
from hrm_esp.model.embeddings import Rotary, character_positions
from hrm_esp.tokenizer import BOS

LENGTH = 3 * 32  # past max_len, so that the window rolls over more than once


@given(st.integers(1, 500), st.integers(8, 65))
def test_windows_keep_half_and_never_overflow(n: int, max_len: int) -> None:
    start = window_start(n, max_len)
    assert 0 <= start < n and n - start <= max_len
    assert start == 0 or n - start > max_len // 2
    assert window_start(n + 1, max_len) in (start, start + max_len - max_len // 2)


class Plain:
    """Reads the whole window of each row, alone and without a cache."""

    def __init__(self, model: HRMModel, prompts: Sequence[bytes]) -> None:
        has_cross = model.config.cross_attention
        self.model, self.prompts = model, [p if has_cross else b"" for p in prompts]
        encoded = model.planner.encode(pad([[BOS, *p] for p in prompts]))
        self.plan = model.planner.pool(encoded).plan
        self.encoded = encoded if has_cross else None

    def decoder(self, rows: Sequence[Sequence[int]], fast: bool) -> Decoder:
        executor = pack_for_cpu(self.model.executor, torch.float32) if fast else self.model.executor
        return Decoder(self.model, executor, self.plan, rows, self.encoded, self.prompts)

    def log_probs(self, i: int, row: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the token after the i-th row, (V,)."""
        config, ids = self.model.config, torch.tensor([row])
        start = window_start(len(row), config.max_len)
        preceding = torch.tensor([[*self.prompts[i], *row[:start]]], dtype=torch.long)
        encoded = None
        if self.encoded is not None:
            states, mask, chars = self.encoded
            mask = None if mask is None else mask[i : i + 1]
            encoded = EncoderOutput(states[i : i + 1], mask, chars[i : i + 1])
        log_probs = self.model.executor(
            ids[:, start:],
            self.plan[i : i + 1],
            encoded,
            preceding[:, max(0, preceding.shape[1] - config.recent_len) :],
            character_positions(ids)[:, start:],
        )
        return log_probs[0, -1]


def assert_close(found: Sequence[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_caches_change_nothing(kind: dict[str, object], fast: bool) -> None:
    """Tokens are appended one by one or several together, and some are rolled back."""
    model, text = random_model(**kind), tokens(1, LENGTH)[0].tolist()
    with torch.inference_mode():
        plain = Plain(model, [b"abcd"])
        decoder, n = plain.decoder([text[:1]], fast), 1
        while n < LENGTH - 8:
            draft = min(n % 5, decoder.max_draft_len())
            for token in [98, 99, 100, 101][:draft]:
                decoder.append([token])
            found = decoder.verify()[0]
            assert len(found) == draft + 1
            for i in {0, draft}:
                assert_close(found[i], plain.log_probs(0, text[:n] + [98, 99, 100, 101][:i]))
            decoder.rollback(draft)
            decoder.append([text[n]])
            n += 1


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_any_length_equal_rows_alone(kind: dict[str, object], fast: bool) -> None:
    model, text = random_model(**kind), tokens(6, LENGTH + 40).tolist()
    lengths = [1, 5, 31, 5, 33, 70]
    with torch.inference_mode():
        plain = Plain(model, [b"", b"abc", b"dddddddd", b"a", b"cb", b"abcabc"])
        decoder = plain.decoder([row[:n] for row, n in zip(text, lengths, strict=True)], fast)
        kept = list(range(6))
        for step in range(60):
            found = decoder.verify()
            for row, i in list(zip(found, kept, strict=True))[step % 2 :: 2]:
                assert_close(row[0], plain.log_probs(i, text[i][: lengths[i] + step]))
            if step in (10, 40):
                decoder.select([0, 2, 3, 4][: len(kept) - 1])
                kept = [kept[i] for i in [0, 2, 3, 4][: len(kept) - 1]]
            decoder.append([text[i][lengths[i] + step] for i in kept])


def test_bfloat16_weights_are_nearly_the_same() -> None:
    model, text = random_model(), tokens(1, 30)[0].tolist()
    with torch.inference_mode():
        plain = Plain(model, [b""])
        low = Decoder(model, pack_for_cpu(model.executor, torch.bfloat16), plain.plan, [text])
        difference = torch.as_tensor(low.verify()[0, 0]) - plain.log_probs(0, text)
    assert 0 < difference.abs().max() < 0.3


def test_generation_leaves_the_model_unchanged() -> None:
    model = random_model(cross_attention=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modules = list(model.modules())
    assert pack_for_cpu(model.executor, torch.bfloat16) is not model.executor
    assert list(model.modules()) == modules
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    options = {"seed": 1, "min_new_tokens": 20, "max_new_tokens": 20}
    text = generate(model, "abc", **options)
    assert generate(copy.deepcopy(model), "abc", **options) == text


def test_a_copy_stays_at_the_position_of_its_original() -> None:
    """A letter that gains an accent moves nothing after it, in the window or in a later one."""
    model = random_model(cross_attention=True, max_len=32)
    rotary, calls = model.executor.positions.rotary, []

    def recorded(positions: torch.Tensor) -> torch.Tensor:
        calls.append(positions[0].tolist())
        return Rotary.freqs_cis(rotary, positions)

    rotary.freqs_cis = recorded  # type: ignore[method-assign]
    prompt, answer = ("la mañana " * 2).encode(), ("lá mañána " * 4).encode()
    of_prompt = character_positions(torch.tensor([[BOS, *prompt]]))[0].tolist()
    decoder = Plain(model, [prompt]).decoder([[BOS]], fast=False)
    for n, token in enumerate(answer):
        calls.clear()
        decoder.verify()
        of_answer = [positions for positions in calls if positions != of_prompt]
        assert of_answer[-1][-1] == len(answer[:n].decode(errors="replace"))
        decoder.append([token])
