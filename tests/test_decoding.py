"""The fast way to the next token, against reading the whole window anew. All weights are random."""

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
from hrm_esp.decoding import Decoder, window_start
from hrm_esp.layers import Memory, Rotary, characters
from hrm_esp.model import HRMModel
from hrm_esp.packing import packed
from hrm_esp.tokenizer import BOS

LENGTH = 3 * 32  # past max_len, so that the window rolls over more than once


@given(st.integers(1, 500), st.integers(8, 65))
def test_windows_keep_half_and_never_overflow(n: int, max_len: int) -> None:
    start = window_start(n, max_len)
    assert 0 <= start < n and n - start <= max_len
    assert start == 0 or n - start > max_len // 2
    assert window_start(n + 1, max_len) in (start, start + max_len - max_len // 2)


class Plain:
    """What the model says of rows, each window read whole, alone and without a cache."""

    def __init__(self, model: HRMModel, prompts: Sequence[bytes]) -> None:
        self.model, self.prompts = model, [p if model.config.memory else b"" for p in prompts]
        self.read = model.planner.read(pad([[BOS, *p] for p in prompts]))
        self.plan, _ = model.planner.plan(self.read)
        self.memory = self.read if model.config.memory else None

    def decoder(self, rows: Sequence[Sequence[int]], fast: bool) -> Decoder:
        executor = packed(self.model.executor, torch.float32) if fast else self.model.executor
        return Decoder(self.model, executor, self.plan, rows, self.memory, self.prompts)

    def logprobs(self, i: int, row: Sequence[int]) -> torch.Tensor:
        """Of what follows the i-th row, (V,)."""
        config, ids = self.model.config, torch.tensor([row])
        start = window_start(len(row), config.max_len)
        past = torch.tensor([[*self.prompts[i], *row[:start]]], dtype=torch.long)
        memory = None
        if self.memory is not None:
            states, visible, places = self.memory
            visible = None if visible is None else visible[i : i + 1]
            memory = Memory(states[i : i + 1], visible, places[i : i + 1])
        logits = self.model.executor(
            ids[:, start:],
            self.plan[i : i + 1],
            memory,
            past[:, max(0, past.shape[1] - config.recent_len) :],
            characters(ids)[:, start:],
        )
        return logits[0, -1].log_softmax(-1)


def agree(found: Sequence[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_kept_changes_nothing(kind: dict[str, object], fast: bool) -> None:
    """Tokens come one by one or several together, and some are taken back."""
    model, text = random_model(**kind), tokens(1, LENGTH)[0].tolist()
    with torch.inference_mode():
        plain = Plain(model, [b"abcd"])
        decoder, n = plain.decoder([text[:1]], fast), 1
        while n < LENGTH - 8:
            draft = min(n % 5, decoder.room())
            for token in [98, 99, 100, 101][:draft]:
                decoder.append([token])
            found = decoder.look()[0]
            assert len(found) == draft + 1
            for i, row in enumerate(found):
                agree(row, plain.logprobs(0, text[:n] + [98, 99, 100, 101][:i]))
            decoder.undo(draft)
            decoder.append([text[n]])
            n += 1


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_any_lengths_are_as_alone(kind: dict[str, object], fast: bool) -> None:
    model, text = random_model(**kind), tokens(6, LENGTH + 40).tolist()
    lengths = [1, 5, 31, 5, 33, 70]
    with torch.inference_mode():
        plain = Plain(model, [b"", b"abc", b"dddddddd", b"a", b"cb", b"abcabc"])
        decoder = plain.decoder([row[:n] for row, n in zip(text, lengths, strict=True)], fast)
        kept = list(range(6))
        for step in range(60):
            for row, i in zip(decoder.look(), kept, strict=True):
                agree(row[0], plain.logprobs(i, text[i][: lengths[i] + step]))
            if step in (10, 40):
                decoder.select([0, 2, 3, 4][: len(kept) - 1])
                kept = [kept[i] for i in [0, 2, 3, 4][: len(kept) - 1]]
            decoder.append([text[i][lengths[i] + step] for i in kept])


def test_weights_in_bfloat16_are_nearly_the_same() -> None:
    model, text = random_model(), tokens(1, 30)[0].tolist()
    with torch.inference_mode():
        plain = Plain(model, [b""])
        low = Decoder(model, packed(model.executor, torch.bfloat16), plain.plan, [text])
        difference = torch.as_tensor(low.look()[0, 0]) - plain.logprobs(0, text)
    assert 0 < difference.abs().max() < 0.3


def test_writing_leaves_the_model_as_it_was() -> None:
    model = random_model(memory=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modules = list(model.modules())
    assert packed(model.executor, torch.bfloat16) is not model.executor
    assert list(model.modules()) == modules
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    asked = {"seed": 1, "min_new_tokens": 20, "max_new_tokens": 20}
    written = generate(model, "abc", **asked)
    assert generate(copy.deepcopy(model), "abc", **asked) == written


def test_what_is_copied_stays_where_it_was() -> None:
    """A letter that gains its accent moves nothing after it, in the window or in a later one."""
    model = random_model(memory=True, max_len=32)
    rotary, asked = model.executor.positions.rotary, []
    assert rotary is not None
    rotary.at = lambda places: asked.append(places[0].tolist()) or Rotary.at(rotary, places)  # type: ignore
    prompt, answer = ("la mañana " * 2).encode(), ("lá mañána " * 4).encode()
    of_prompt = characters(torch.tensor([[BOS, *prompt]]))[0].tolist()
    decoder = Plain(model, [prompt]).decoder([[BOS]], fast=False)
    for n, token in enumerate(answer):
        asked.clear()
        decoder.look()
        of_answer = [places for places in asked if places != of_prompt]
        assert of_answer[-1][-1] == len(answer[:n].decode(errors="replace"))
        decoder.append([token])
