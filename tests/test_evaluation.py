import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, PAIRS, random_model
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.config import FinetuneConfig
from hrm_esp.data import (
    Pair,
    TSVDataset,
    dataset_tsv,
    document_bytes,
    document_text,
    truncate_utf8,
)
from hrm_esp.evaluation import (
    edit_distance,
    evaluate,
    pair_bits,
    score_pairs,
    score_stream,
    score_targets,
)
from hrm_esp.evaluation.metrics import bootstrap_ratio, wilson_interval
from hrm_esp.evaluation.scoring import Answer, answer_pairs, max_answer_len, score_answers
from hrm_esp.generation import generate_batch, window_start
from hrm_esp.model import HRMModel
from hrm_esp.tokenizer import BOS, EOS
from hrm_esp.training import load_model, train_ft

TEXT = "Érase una vez un gato.\nEl gato dormía mucho; y soñaba.\nFin: el año acabó.\n"


def stream(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def bits_one_by_one(model: HRMModel, text: str) -> float:
    """Predicts each byte by itself. The Executor reads the window before it, the Planner the text
    before the window's first target."""
    data, max_len = text.encode(), model.config.max_len
    as_input = [BOS, *(BOS if b == 10 else b for b in data)]
    bits = 0.0
    for i, byte in enumerate(data):
        start = window_start(i + 1, max_len)
        first = start + max_len // 2 if start else 0
        plan, _ = model.planner(
            torch.tensor([[BOS, *as_input[1 + max(0, first - max_len) : 1 + first]]])
        )
        preceding = torch.tensor([as_input[max(0, start - model.config.recent_len) : start]])
        window = torch.tensor([as_input[start : i + 1]])
        log_probs = model.executor(window, plan, preceding_ids=preceding.long())[0, -1]
        bits -= log_probs[EOS if byte == 10 else byte].item() / math.log(2)
    return bits / len(data)


@pytest.mark.parametrize(
    "kind",
    [{}, {"positions": "learned", "gumbel": False}, {"cross_attention": True}, {"recent_len": 37}],
    ids=str,
)
@pytest.mark.parametrize("text", ["a\n", TEXT[:31] + "\n", TEXT])
def test_a_text_scores_as_byte_by_byte(kind: dict[str, object], text: str) -> None:
    model = random_model(**kind)
    with torch.inference_mode():
        expected = bits_one_by_one(model, text)
    for batch_size in (1, 3, 16):
        score = score_stream(model, stream(text), batch_size=batch_size)
        assert score.n == len(text.encode())
        assert score.bits_per_byte == pytest.approx(expected, abs=1e-4)


def test_no_byte_is_read_before_it_is_predicted() -> None:
    """Were the plan made from the scored text, a change at the end would change earlier scores."""
    model = random_model()
    text = TEXT * 3
    for end in range(20, 200, 13):
        ends = (stream(text[:end] + last) for last in "ab")
        one, other = (s.bits_per_byte * s.n for s in (score_stream(model, e) for e in ends))
        base = score_stream(model, stream(text[:end]))
        last_bits = [x - base.bits_per_byte * base.n for x in (one, other)]
        assert 2.0 ** -last_bits[0] + 2.0 ** -last_bits[1] <= 1 + 1e-3  # two outcomes of one choice


def test_pairs_score_the_same_in_any_batch() -> None:
    model = random_model(cross_attention=True)
    pairs = [Pair(b"uno" * n, b"dos tres"[: n + 1], lm=n == 2) for n in range(7)]
    data = TSVDataset(pairs, 32)
    scores = [score_pairs(model, data, batch_size=b) for b in (1, 3, 64)]
    sums = [pair_bits(model, data, batch_size=b).sum(0) for b in (1, 3, 64)]
    bits = [bits / tokens for bits, tokens in sums]
    assert scores[0].n == 6
    assert max(bits) - min(bits) < 1e-4
    for score in scores[1:]:
        assert score.exact_match == scores[0].exact_match
        assert score.char_error_rate == pytest.approx(scores[0].char_error_rate)


def test_exact_match_counts_correct_answers() -> None:
    model = random_model(cross_attention=True)
    prompts = ["uno", "dos", "tres"]
    answers = generate_batch(model, prompts, mode="answer", max_new_tokens=8, precision="fp32")
    pairs = [Pair(a.prompt.encode(), a.text.encode()) for a in answers]
    data = TSVDataset([*pairs, Pair(b"uno", b"otra cosa")], 32)
    rows = [p for p in data.pairs if len(p.target) < 8] or data.pairs[-1:]
    score = score_pairs(model, TSVDataset(rows, 32))
    assert score.exact_match == pytest.approx((len(rows) - 1) / len(rows))


def generated_answers(model: HRMModel, data: TSVDataset) -> list[Answer]:
    """All answers are generated."""
    pairs = [pair for pair in data if not pair.lm]
    completions = generate_batch(
        model, [document_text(p.prompt) for p in pairs], mode="answer", temperature=0,
        precision="fp32", max_new_tokens=max(map(max_answer_len, pairs)) + 4, batch_size=64,
    )  # fmt: skip
    texts = [completion.text.encode() for completion in completions]
    return [
        Answer(pair, truncate_utf8(text, max_answer_len(pair)).decode())
        for pair, text in zip(pairs, texts, strict=True)
    ]


def answering_model(seed: int, **kind: object) -> HRMModel:
    """Gives many answers of about ``max_len`` bytes, which repeat what the prompt has, and have
    characters of several bytes."""
    model = random_model(seed, max_len=8, **kind)
    with torch.no_grad():
        model.executor.lm_head.weight[EOS] *= 5
        model.executor.lm_head.weight[ord("a") : ord("d") + 1] *= 3
        model.executor.lm_head.weight[0x80:0x100] *= 2
    return model


def answerable_pairs(model: HRMModel, prompts: list[str]) -> TSVDataset:
    """Targets that are the model's answers, or nearly; some are cut to fill ``max_len``."""
    max_len, pairs = model.config.max_len, []
    for answer in generate_batch(
        model, prompts, mode="answer", precision="fp32", max_new_tokens=max_len
    ):
        prompt, text = document_bytes(answer.prompt), answer.text
        for target in (text, text[:-1], text[:-1] + "ñ"):
            pairs.append(Pair(prompt, truncate_utf8(document_bytes(target), max_len)))
    return TSVDataset([*pairs, Pair(b"abc", b"abc", lm=True), pairs[0]], max_len)


def scored_as_generated(model: HRMModel, data: TSVDataset) -> tuple[int, int]:
    """Checks all rows; returns how many are right, and how many of these fill ``max_len``."""
    answers = generated_answers(model, data)
    margins = [margin for *_, margin in score_targets(model, data)[[not pair.lm for pair in data]]]
    right = [answer.text == document_text(answer.pair.target) for answer in answers]
    assert [margin > 0 for margin in margins] == right
    assert all(answer_pairs(model, data, batch_size) == answers for batch_size in (64, 7))
    assert score_pairs(model, data) == score_answers(answers, pair_bits(model, data))
    full = [len(answer.pair.target) == data.max_len for answer in answers]
    return sum(right), sum(r and f for r, f in zip(right, full, strict=True))


KINDS = (
    {"cross_attention": True},
    {"cross_attention": True, "recent_len": 10},
    {"gumbel": False, "count_max": 0, "positions": "learned"},
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_target_is_right_if_it_would_be_generated(kind: dict[str, object]) -> None:
    """Also if the answer ends where ``max_len`` is full, and the window has moved."""
    n_right = n_full = 0
    for seed in (0, 4, 10):  # random models that end some answers, of each kind
        model = answering_model(seed, **kind)
        prompts = ["ñandú", "", *("".join(letters) * 4 for letters in product("abcd", repeat=2))]
        found = scored_as_generated(model, answerable_pairs(model, prompts))
        n_right, n_full = n_right + found[0], n_full + found[1]
    assert n_right > 10 and n_full > 0


def test_a_trained_model_scores_as_it_answers(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    options = FinetuneConfig(steps=40, out_dir=str(tmp_path))
    train_ft(tmp_path / "pairs.tsv", replace(CONFIG, cross_attention=True), options)
    model = load_model(tmp_path / "finetune_best.pt")
    data = dataset_tsv(tmp_path / "pairs.tsv", model.config.max_len)
    n_right, _ = scored_as_generated(model, data)
    assert 0 < n_right < len(data)


def test_a_prompt_counts_as_generation_reads_it() -> None:
    """Where the model does not know line breaks, generation makes spaces of them."""
    knows_line_breaks, model = (
        answering_model(0, cross_attention=True, line_breaks=known) for known in (True, False)
    )
    prompts = ["".join(p) for p in product("abcd", "\n", "abcd")]
    data = answerable_pairs(knows_line_breaks, prompts)
    answers = generated_answers(model, data)
    assert answers != generated_answers(knows_line_breaks, data)
    assert answer_pairs(model, data) == answers


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_an_interval_lies_within_the_range_of_the_rows(rows: list[tuple[int, int]]) -> None:
    value, (low, high) = bootstrap_ratio(np.array(rows))
    assert value == pytest.approx(sum(a for a, _ in rows) / sum(b for _, b in rows))
    shares = [a / b for a, b in rows]
    assert min(shares) - 1e-9 <= low <= high <= max(shares) + 1e-9


def test_intervals_of_a_share_equal_the_binomial() -> None:
    rows = np.array([(i % 10 < 3, 1) for i in range(1000)])
    value, by_bootstrap = bootstrap_ratio(rows)
    wide = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert value == pytest.approx(0.3)
    for interval in (by_bootstrap, wilson_interval(300, 1000)):
        assert interval == pytest.approx((0.3 - wide, 0.3 + wide), abs=0.004)


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_wilson_interval_inverts_the_score_test(right: int, n: int) -> None:
    right = min(right, n)
    low, high = wilson_interval(right, n)
    assert 0 <= low <= right / n + 1e-9 and right / n - 1e-9 <= high <= 1 and high - low > 0.01
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            z = (right / n - end) / (end * (1 - end) / n) ** 0.5
            assert abs(z) == pytest.approx(1.96)


def levenshtein(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        levenshtein(a[1:], b) + 1,
        levenshtein(a, b[1:]) + 1,
        levenshtein(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abñ", max_size=5), st.text("abñ", max_size=5))
def test_edit_distance_equals_the_recursive_definition(a: str, b: str) -> None:
    assert edit_distance(a, b) == levenshtein(a, b)


def test_the_name_of_a_file_decides_how_it_is_scored(tmp_path: Path) -> None:
    model = random_model()
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a.tsv").write_text("uno\tdos\n", encoding="utf-8")
    assert evaluate(model, tmp_path / "a.txt").n == len(TEXT.encode())
    assert hasattr(evaluate(model, tmp_path / "a.tsv"), "exact_match")
