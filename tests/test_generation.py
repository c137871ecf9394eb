"""Generation, as a user calls it."""

import collections
import itertools
import math
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import KINDS

from hrm_esp import generate, generate_batch, load_model, stream
from hrm_esp.config import GenerationConfig
from hrm_esp.data import Pair, TSVDataset, encode_prompt
from hrm_esp.errors import HRMError
from hrm_esp.evaluation import score_pairs
from hrm_esp.generation.decoder import Decoder
from hrm_esp.generation.generate import GenerationSetup, continuation_tokens, new_decoder
from hrm_esp.generation.sampling import UTF8_NEXT_STATE, SamplingParams
from hrm_esp.model import HRMModel
from hrm_esp.tokenizer import BOS, EOS

LENGTH = 3 * 32  # past max_len, so that the window rolls over more than once


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mode", ["continue", "answer"])
def test_greedy_text_is_the_same_with_drafts(kind: dict[str, object], mode: str) -> None:
    model = random_model(**kind)
    length = {"min_new_tokens": LENGTH, "max_new_tokens": LENGTH}
    options = {"mode": mode, "temperature": 0.0, "precision": "fp32", **length}
    one, other = (generate(model, "El niño abcdaabc", draft_len=n, **options) for n in (0, 16))
    assert one == other and len(one.encode()) == LENGTH


def exact(model: HRMModel, prompt: str, n: int, k: int) -> dict[str, float]:
    """The probability of each text of at most n bytes, with ``top_k`` k at temperature 3."""
    tokens = continuation_tokens(prompt)
    plan, _ = model.planner(torch.tensor([tokens]))
    going, found = {b"": 1.0}, {}
    for size in range(n):
        longer = {}
        for text, p in going.items():
            logits = model.executor(torch.tensor([[*tokens, *text]]), plan)[0, -1].double() / 3
            state = 0
            for byte in text:
                state = int(UTF8_NEXT_STATE[state, byte])
            allowed = SamplingParams(max_new_tokens=n).allowed_tokens(state, size)
            logits[~torch.from_numpy(allowed)] = -torch.inf
            best = logits.topk(k)
            for q, token in zip(
                best.values.softmax(0).tolist(), best.indices.tolist(), strict=True
            ):
                if token == EOS:
                    found[text.decode()] = p * q
                elif q:
                    longer[text + bytes([token])] = p * q
        going = longer
    return found | {text.decode(): p for text, p in going.items()}


@torch.no_grad()
@pytest.mark.parametrize("draft_len", [0, 16])
def test_texts_are_samples_from_the_model(draft_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chi-square test at p = 0.0001, with a fixed seed, against exact sampling_probs."""
    from scipy.stats import chisquare

    passes = []  # pending tokens of each
    verify = Decoder.verify
    monkeypatch.setattr(
        Decoder, "verify", lambda self: passes.append(self.n_pending) or verify(self)
    )
    model, n = random_model(), 1200
    assert model.executor.ngrams is not None
    letters = np.random.default_rng(0).choice(list(b"abcd\n"), 600).astype(np.uint8)
    model.executor.ngrams.build(letters)  # of short lines: many texts end
    expected = exact(model, "abcab", 3, 6)
    assert sum(p for text, p in expected.items() if len(text) < 3) > 0.1
    texts = generate_batch(
        model, ["abcab"], num_samples=n, batch_size=1 if draft_len else 64,
        draft_len=draft_len, seed=0, top_k=6,
        temperature=3.0, max_new_tokens=3, precision="fp32",
    )  # fmt: skip
    count = collections.Counter(t.text for t in texts)
    expected = {text.replace("\r", "\n"): p for text, p in expected.items()}
    assert set(count) <= set(expected)
    rare = [t for t, p in expected.items() if p * n < 8]
    often = [t for t in expected if t not in rare]
    found = [*(count[t] for t in often), sum(count[t] for t in rare)]
    p = [*(expected[t] for t in often), sum(expected[t] for t in rare)]
    assert len(often) > 12 and sum(p) == pytest.approx(1)
    assert chisquare(found, [n * x for x in p]).pvalue > 1e-4
    assert (max(passes) > 1) == (draft_len > 0)


@pytest.mark.parametrize("kind", [{}, {"cross_attention": True}, {"count_max": 0}], ids=str)
@pytest.mark.parametrize("mode", ["continue", "answer"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_texts_are_the_same_in_a_batch(
    kind: dict[str, object], mode: str, temperature: float
) -> None:
    model = random_model(**kind)
    prompts = ["uno", "", "trescientos once", "un río muy largo que no cabe en la ventana, no"]
    options = {"mode": mode, "max_new_tokens": 40, "temperature": temperature, "seed": 7,
             "draft_len": 0, "num_samples": 2, "precision": "fp32"}  # fmt: skip
    alone = list(generate_batch(model, prompts, batch_size=1, **options))
    for size in (3, 8):
        together = list(generate_batch(model, iter(prompts), batch_size=size, **options))
        assert [(t.prompt, t.text, t.finish_reason) for t in together] == [
            (t.prompt, t.text, t.finish_reason) for t in alone
        ]
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-3, atol=1e-4)
    assert [t.prompt for t in alone] == [p for p in prompts for _ in range(2)]
    del options["num_samples"]
    assert alone[0].text == generate(model, prompts[0], **options)


def test_logprobs_are_those_of_the_model() -> None:
    model = random_model()
    for text in generate_batch(model, ["ab", "c"], seed=1, max_new_tokens=9, precision="fp32"):
        ids = continuation_tokens(text.prompt)
        plan, _ = model.planner(torch.tensor([ids]))
        with torch.no_grad():
            logits = model.executor(torch.tensor([[*ids, *text.text.encode()]]), plan)[0]
        ended = text.finish_reason == "stop"
        targets = [*text.text.encode(), *[258] * ended]
        said = logits[len(ids) - 1 :].log_softmax(-1)[range(len(targets)), targets]
        np.testing.assert_allclose(text.logprobs, said, rtol=1e-3, atol=1e-4)
        assert text.as_dict()["logprob"] == pytest.approx(float(said.sum()), rel=1e-4)
        assert ended or len(text.text.encode()) == 9


@pytest.mark.parametrize("draft_len", [0, 16])
def test_a_text_ends_before_the_first_stop(draft_len: int) -> None:
    model = random_model()
    options = {"seed": 3, "min_new_tokens": 60, "max_new_tokens": 60, "draft_len": draft_len}
    whole = generate(model, "abca", **options)
    pieces = {whole[i:j] for i in range(0, 40, 7) for j in range(i + 1, i + 4)} - {""}
    for stops in [[p] for p in pieces] + [["a", "ab"], ["b", whole[9:12]], ["zz", "ñ"]]:
        first = min((i for s in stops if (i := whole.find(s)) >= 0), default=len(whole))
        ends = {whole.find(s) + len(s) for s in stops if s in whole}
        first = min((whole.find(s) for s in stops if whole.find(s) + len(s) == min(ends)),
                    default=first) if ends else first  # fmt: skip
        assert generate(model, "abca", stop=stops, **options) == whole[:first]
        assert "".join(stream(model, "abca", stop=stops, **options)) == whole[:first]
        (text,) = generate_batch(model, ["abca"], stop=stops, **options)
        assert text.text == whole[:first] and len(text.logprobs) >= len(text.text.encode())
        assert (text.finish_reason == "stop") == bool(ends)


def test_a_stream_yields_whole_characters_as_they_come() -> None:
    model = random_model()
    text = "".join(pieces := list(stream(model, "ñ", seed=2, temperature=3.0, min_new_tokens=300)))
    assert all(len(p) == 1 for p in pieces) and not text.isascii()
    first = next(stream(model, "ñ", seed=2, temperature=3.0, min_new_tokens=10**6))
    assert first == text[0]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 70])
def test_prompts_of_any_length_are_answered(positions: str, length: int) -> None:
    model = random_model(cross_attention=True, positions=positions)
    text = generate(model, "a" * length, mode="answer", max_new_tokens=50, min_new_tokens=50)
    assert len(text.encode()) == 50
    pairs = TSVDataset([Pair(b"a" * min(length, 32), b"b" * 32), Pair(b"", b"c")], 32)
    assert score_pairs(model, pairs).n == 2


@settings(max_examples=int(os.environ.get("CASES", 40)))
@example("\ud800a\0", {}, 1, {})
@example("a\tb" * 350_000, {"mode": "continue"}, 1, {})
@example("a\tb" * 350_000, {"mode": "answer"}, 1, {"cross_attention": True})
@given(
    st.text(st.characters(codec=None), max_size=60) | st.text("abcdñ \n", max_size=90),
    st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["continue", "answer"]),
            "max_new_tokens": st.integers(1, 70),
            "temperature": st.sampled_from([0.0, 1e-9, 0.8, 50.0]),
            "top_k": st.sampled_from([0, 1, 5, 1000]),
            "top_p": st.sampled_from([1e-9, 0.5, 1.0]),
            "min_p": st.sampled_from([0.0, 0.1, 1.0]),
            "seed": st.integers(0, 2**32),
            "draft_len": st.sampled_from([0, 1, 16]),
            "stop": st.just([]) | st.lists(st.text("abñ.", min_size=1, max_size=2), max_size=2),
            "precision": st.sampled_from(["auto", "fp32"]),
        }
    ),
    st.integers(1, 4),
    st.sampled_from([{}, {"cross_attention": True}, {"count_max": 0}]),
)
def test_any_options_give_valid_text_that_fits(
    prompt: str, options: dict[str, object], n: int, kind: dict[str, object]
) -> None:
    """A model with random weights generates any bytes: only the mask keeps them UTF-8."""
    length = options.setdefault("max_new_tokens", 5)
    for text in generate_batch(random_model(**kind), [prompt, "b"], num_samples=n, **options):
        assert len(text.text.encode()) <= length
        assert all(p <= 1e-5 and math.isfinite(p) for p in text.logprobs)
        assert not any(s in text.text for s in options.get("stop", ()))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17])
def test_min_new_tokens_may_equal_max_new_tokens(length: int) -> None:
    for seed in range(5):
        text = generate(random_model(), "x", min_new_tokens=length, temperature=3, seed=seed,
                        max_new_tokens=length)  # fmt: skip
        assert len(text.encode()) == length


def test_a_seed_determines_the_text() -> None:
    model = random_model()
    one = generate(model, "Sol", seed=5, temperature=1.0)
    torch.randn(7)
    np.random.random(7)
    assert generate(model, "Sol", seed=5, temperature=1.0) == one
    assert generate(model, "Sol", seed=6, temperature=1.0) != one
    given = {"seed": 5, "precision": "fp32", "min_new_tokens": 9}  # an empty one may come twice
    texts = [t.text for t in generate_batch(model, ["Sol"] * 5, **given)]
    assert len(set(texts)) == 5
    for prompts, size in ((["Sol", "", "abcabc", "Sol", "Sol"], 8), (["Sol"] * 5, 4)):
        others = generate_batch(model, prompts, batch_size=size, **given)
        written = [t.text for t in others]
        assert all(a == b for a, b, p in zip(texts, written, prompts, strict=True) if p == "Sol")
    (alone,) = generate_batch(model, ["Sol"], seed=5)
    assert alone.text == generate(model, "Sol", seed=5)


@pytest.mark.parametrize("mode", ["continue", "answer"])
def test_a_chosen_plan_steers_the_text(mode: str) -> None:
    model = random_model(gumbel_hard=True)
    options = {"mode": mode, "seed": 0, "max_new_tokens": 30}
    own = generate(model, "abc", **options)
    prompt = torch.tensor([[BOS, *b"abc"] + [EOS] * (mode == "answer")])
    _, logits = model.planner(prompt)
    code = int(logits.argmax())
    assert generate(model, "abc", plan_code=code, guidance=1.0, **options) == own
    texts = {generate(model, "abc", plan_code=k, **options) for k in range(8)}
    assert len(texts) > 4
    code = int(model.planner(torch.tensor([[BOS, *b"dddd", EOS]]))[1].argmax())
    steered = generate(model, "abc", plan_from="dddd", guidance=1.0, **options)
    assert steered == generate(model, "abc", plan_code=code, guidance=1.0, **options)
    with pytest.raises(HRMError):
        generate(random_model(gumbel=False), "abc", plan_code=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("draft_len", [0, 16])
@pytest.mark.parametrize("mode", ["continue", "answer"])
def test_guidance_scales_the_difference(mode: str, draft_len: int, scale: float) -> None:
    """Also past max_len, with and without drafts."""
    model = random_model(gumbel_hard=True, cross_attention=True)
    options = {"mode": mode, "precision": "fp32", "max_new_tokens": 60, "min_new_tokens": 60}
    (text,) = generate_batch(
        model, ["abc"], plan_code=1, guidance=scale, draft_len=draft_len, seed=0, **options
    )
    setup = GenerationSetup.create(model, GenerationConfig(plan_code=1, **options))
    conditional, unconditional = (
        new_decoder(model, model.executor, ["abc"], replace(setup, plan=plan))
        for plan in (setup.plan, None)
    )
    for byte, logprob in zip(text.text.encode(), text.logprobs, strict=True):
        a, b = (d.verify()[0, -1].astype(float) for d in (conditional, unconditional))
        guided = b + scale * (a - b)
        assert logprob == pytest.approx(guided[byte] - np.logaddexp.reduce(guided), abs=1e-3)
        conditional.append([byte])
        unconditional.append([byte])


def test_guided_texts_are_the_same_in_a_batch() -> None:
    model = random_model()
    options = {
        "plan_code": 1,
        "seed": 0,
        "precision": "fp32",
        "stop": ["a", "b"],
        "temperature": 1.0,
    }
    prompts = ["abc", "", "d" * 50, "c", "a"]
    texts = [t.text for t in generate_batch(model, prompts, **options)]
    again = generate_batch(model, prompts, batch_size=1, draft_len=0, **options)
    assert texts == [t.text for t in again]
    assert len(set(map(len, texts))) > 2  # rows ended at different times


def test_line_breaks_in_prompts() -> None:
    assert continuation_tokens("a\r\n\nb\n") == [BOS, 97, BOS, 98, BOS]
    assert encode_prompt("a\r\nb", 64) == b"a b"


def test_prompts_are_normalized() -> None:
    model = random_model()
    for mode in ("continue", "answer"):
        texts = {
            generate(model, unicodedata.normalize(form, "niño"), mode=mode, seed=0)
            for form in ("NFC", "NFD")
        }
        assert len(texts) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"mode": "write"},
        {"seed": -1},
        {"precision": "int8"},
        {"draft_len": -1},
        {"stop": ""},
        {"stop": "\ud83d"},
        {"plan_code": 8},
        {"plan_code": 1, "plan_from": "a"},
        {"guidance": 1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"max_new_tokens": 0},
        {"min_new_tokens": -1},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"plan_code": 1, "guidance": -1.0},
        {"plan_code": 1, "guidance": math.nan},
        {"num_samples": 0},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_invalid_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(HRMError):
        generate_batch(random_model(), ["x"], **wrong)
    with pytest.raises(TypeError):
        generate_batch(random_model(), "x")
    if not wrong.keys() & {"num_samples", "batch_size"}:
        with pytest.raises(HRMError):
            stream(random_model(), "x", **wrong)


def test_drafts_are_accepted(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few passes for many bytes, and the same text as with a pass per byte."""
    model = load_model(trained / "checkpoints" / "pretrain_best.pt")
    passes = itertools.count()
    verify = Decoder.verify
    monkeypatch.setattr(Decoder, "verify", lambda self: (next(passes), verify(self))[1])
    options = {
        "min_new_tokens": 300,
        "max_new_tokens": 300,
        "temperature": 0.0,
        "precision": "fp32",
    }
    one, other = (generate(model, "La niña", draft_len=n, **options) for n in (16, 0))
    assert one == other and len(one.encode()) == 300
    assert next(passes) < 300 + 100


def test_generation_leaves_every_submodule_in_its_mode() -> None:
    """Between two characters too, and with two streams at once."""
    model = random_model(dropout=0.5).train()
    model.planner.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    one, other = (stream(model, "ab", seed=1, min_new_tokens=20) for _ in range(2))
    texts = ["", ""]
    for characters in zip(one, other, strict=True):
        texts = [text + c for text, c in zip(texts, characters, strict=True)]
        assert {name: m.training for name, m in model.named_modules()} == modes
    assert texts[0] == texts[1] == generate(model.eval(), "ab", seed=1, min_new_tokens=20)
