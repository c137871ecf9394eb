"""N-gram counts and the mixture, compared with counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CONFIG, TEXT, random_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp.config import HRMConfig
from hrm_esp.data import as_inputs, as_targets
from hrm_esp.ngrams import ContextMatch, NgramContext, NgramMixture, gate_means, table
from hrm_esp.ngrams.mixture import (
    DRAFT_TAIL_MASS,
    MAX_NGRAM_MASS,
    draft_probs,
    interpolation_weights,
)
from hrm_esp.tokenizer import BOS, EOS, PAD

TABLE_ORDERS, RECENT_ORDERS = [2, 3, 4, 5, 6, 7, 8], [4, 6]
TEXTS = st.text(alphabet="ab\n", min_size=20, max_size=120)
BEGINS = st.integers(0, 18)


def random_mixture(text: bytes, seed: int = 0) -> NgramMixture:
    """A mixture with the counts of ``text`` and random weights."""
    torch.manual_seed(seed)
    mixture = NgramMixture(HRMConfig(d_model=4, n_heads=1, count_max=8))
    with torch.no_grad():
        for p in mixture.parameters():
            p += torch.randn_like(p)
    mixture.build(np.frombuffer(text, dtype=np.uint8))
    return mixture


def to_ids(text: str) -> list[int]:
    return as_inputs(np.frombuffer(text.encode(), dtype=np.uint8)).tolist()


def context(text: bytes, position: int, order: int) -> bytes | None:
    """The ``order`` bytes before ``position``; they may begin with a line break, not span one."""
    if order > position or b"\n" in text[position - order + 1 : position]:
        return None
    return text[position - order : position]


def continuations(text: bytes, wanted: bytes, end: int | None = None) -> Counter[bytes]:
    """How often each byte came after ``wanted`` in ``text``, up to ``end``."""
    n = len(wanted)
    positions = range(n, len(text) if end is None else end)
    return Counter(text[j : j + 1] for j in positions if text[j - n : j] == wanted)


def prob_by_hand(
    mixture: NgramMixture,
    p: float,
    text: bytes,
    window: bytes,
    position: int,
    begin: int,
    leave_one_out: bool,
) -> float:
    """The mixture's probability of ``window[position]``, by the contexts in ``text``, without
    those of ``window`` from ``begin`` on if ``leave_one_out``, and in ``window`` so far."""
    shorter_count, mixed = 2, p
    kinds = [(n, "table") for n in TABLE_ORDERS] + [(n, "recent") for n in RECENT_ORDERS]
    for i, (order, kind) in enumerate(sorted(kinds, key=lambda pair: pair[0])):
        wanted = context(window, position, order)
        if wanted is None:
            continue
        if kind == "table":
            after = continuations(text, wanted)
            if leave_one_out:
                own = continuations(window, wanted) - continuations(window, wanted, begin + 1)
                after.subtract(own)
            count = sum(after.values())
            skip, shorter_count = shorter_count < 2, count  # one occurrence has no longer contexts
            if skip:
                continue
        else:
            after = continuations(window, wanted, position)
            count = sum(after.values())
        if count == 0:
            continue
        n_continuations = sum(n > 0 for n in after.values())
        a, b, d = mixture.count_weights[i].tolist()
        score = a * math.log(count + 1) + b * math.log(n_continuations + 1) + d
        gate = 1 / (1 + math.exp(-score))
        mixed += gate * (after[window[position : position + 1]] / count - mixed)
    return (1 - MAX_NGRAM_MASS) * p + MAX_NGRAM_MASS * mixed


def compute(
    mixture: NgramMixture, window: bytes, leave_one_out: bool, begin: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The probability of each byte of ``window`` after ``begin``, the log-probabilities of all
    tokens there, and the targets; the network is uniform."""
    data = np.frombuffer(window, dtype=np.uint8)
    ids = torch.from_numpy(as_inputs(data[:-1]))[None]
    targets = torch.from_numpy(as_targets(data[1:]))[None, begin:]
    preceding_ids, ids = ids[:, :begin], ids[:, begin:]
    states = torch.zeros(*ids.shape, 4)
    p = torch.full(targets.shape, 1 / 260)
    with torch.no_grad():
        counts = mixture.lookup(ids, targets, preceding_ids, leave_one_out)
        probs, _ = mixture.target_probs(p, states, *counts)
        found = mixture.find_continuations(ids, preceding_ids)
        log_probs = mixture.log_probs(torch.zeros(*ids.shape, 260), states, found)
    return probs[0], log_probs[0], targets[0]


@settings(max_examples=40)
@given(TEXTS, TEXTS, BEGINS)
def test_probabilities_equal_counting_by_hand(text: str, other: str, begin: int) -> None:
    counted, window = text.encode(), other.encode()
    mixture = random_mixture(counted)
    probs, log_probs, targets = compute(mixture, window, False, begin)
    for i, p in enumerate(probs.tolist(), begin + 1):
        by_hand = prob_by_hand(mixture, 1 / 260, counted, window, i, begin, False)
        assert p == pytest.approx(by_hand, rel=1e-4)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(probs)))
    torch.testing.assert_close(log_probs.gather(1, targets[:, None])[:, 0], probs.log())


@settings(max_examples=40)
@given(TEXTS, TEXTS, TEXTS, BEGINS, st.booleans())
def test_the_network_reads_what_the_counts_alone_predict(
    text: str, other: str, more: str, begin: int, leave_one_out: bool
) -> None:
    """The mixture without network and state. All tokens as looked up one by one; and the target,
    where its window is subtracted from the counts."""
    window = other.encode()
    counted = text.encode() + (window if leave_one_out else b"") + more.encode()
    mixture = random_mixture(counted)
    data = np.frombuffer(window, dtype=np.uint8)
    ids, targets = (
        torch.from_numpy(f(d)) for f, d in ((as_inputs, data[:-1]), (as_targets, data[1:]))
    )
    preceding_ids, ids, targets = ids[None, :begin], ids[None, begin:], targets[None, begin:]
    found, _ = mixture.lookup(ids, targets, preceding_ids, leave_one_out)
    probs = mixture.probs(found)
    assert probs.min() > -1e-6 and probs.sum(-1).max() < 1 + 1e-6
    by_hand = [
        prob_by_hand(mixture, 0.0, counted, window, i, begin, leave_one_out)
        for i in range(begin + 1, len(window))
    ]
    of_target = probs.gather(1, targets[0, :, None])[:, 0]
    torch.testing.assert_close(of_target, torch.tensor(by_hand), rtol=1e-4, atol=1e-6)
    if not leave_one_out:
        one_by_one = mixture.probs(mixture.find_continuations(ids, preceding_ids))
        torch.testing.assert_close(probs, one_by_one, rtol=1e-4, atol=1e-6)


@settings(max_examples=100)
@given(TEXTS, st.integers(0, 19), st.integers(2, 20))
def test_a_row_cut_out_of_a_line_leaves_no_trace_in_the_input(
    text: str, begin: int, size: int
) -> None:
    """Its end is not in the counted text, so nothing may be subtracted for it."""
    text += "a" * 20
    row = text[begin : begin + size].replace("\n", "a").encode()
    mixture = random_mixture(f"\n{text}\n{row.decode()}abab\n".encode())
    ids, targets = to_ids("\n" + row.decode()), [*row, EOS]
    found, _ = mixture.lookup(torch.tensor([ids]), torch.tensor([targets]), leave_one_out=True)
    probs = mixture.probs(found)
    assert probs.min() > -1e-6 and probs.clamp(min=0).sum(-1).max() < 1 + 1e-6


def test_a_text_that_repeats_itself_has_no_more_continuations() -> None:
    text = b"\n" + b"a" * 2000
    mixture = random_mixture(text)
    ids = torch.full((2, 1500), ord("a"))
    found, _ = mixture.lookup(ids[:, 1000:], ids[:, 1000:], ids[:, :1000], leave_one_out=True)
    n_contexts = found.context_count.numel()
    assert found.context_count.sum() > 100 * n_contexts  # by occurrences there would be as many
    assert len(found.context_index) <= 2 * n_contexts


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(1, 19))
def test_rollback_restores_the_context(text: str, other: str, n: int) -> None:
    ids = to_ids(other)
    context = NgramContext(random_mixture(text.encode()).index(), ids[:-n])
    before = context.match()
    for _ in range(2):
        for token in ids[-n:]:
            context.append(token)
        assert_equal(context.match(), NgramContext(context.index, ids).match())
        context.rollback(n)
    assert_equal(context.match(), before)


def assert_equal(one: ContextMatch, other: ContextMatch) -> None:
    np.testing.assert_array_equal(one.ranges, other.ranges)
    assert one.recent == other.recent


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(0, 9))
def test_the_scalar_form_equals_the_tensor_form(text: str, other: str, seed: int) -> None:
    """Up to the cap, and to what a draft ignores at the end."""
    mixture = random_mixture(text.encode(), seed)
    index, match = mixture.index(), NgramContext(mixture.index(), to_ids(other)).match()
    found = index.gather_continuations([match])
    state = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        gate_logits = mixture.gate_proj(state)
        _, order_weights = interpolation_weights(
            *map(torch.from_numpy, found[:2]), gate_logits, mixture.count_weights
        )
    expected = np.zeros(260)
    mass = order_weights.numpy().ravel()[found.context_index] * found.frequency / MAX_NGRAM_MASS
    np.add.at(expected, found.token_index, mass)
    probs = draft_probs(
        index.longest_contexts(match),
        gate_logits[0].tolist().__getitem__,
        mixture.count_weights.tolist(),
    )
    for token, p in enumerate(expected):
        assert p - DRAFT_TAIL_MASS - 1e-5 < probs.get(token, 0) < p + 1e-5
    assert sum(probs.values()) > expected.sum() - DRAFT_TAIL_MASS - 1e-5


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(0, 9))
def test_gate_means_are_means_after_similar_contexts(text: str, other: str, seed: int) -> None:
    counted, end = text.encode(), other.encode()
    mixture = random_mixture(counted, seed)
    ids = torch.tensor([to_ids(text)])
    states = torch.randn(2, 1, ids.shape[1], 4, generator=torch.Generator().manual_seed(seed))
    for batch in states:
        no_targets = torch.full_like(ids, PAD)
        counts = mixture.lookup(ids, no_targets)
        _, gate_logits = mixture.target_probs(torch.ones(ids.shape), batch, *counts)
        mixture.gate_means.update([(ids, gate_logits.detach())])
    with torch.no_grad():
        gate_logits = mixture.gate_proj(states)[:, 0].numpy()
    decay = [gate_means.DECAY, 1.0]  # of the two steps
    expected = np.zeros(gate_logits.shape[-1])
    for order in range(1, gate_means.MAX_ORDER + 1):
        wanted = context(end, len(end), order)
        if wanted is None:
            break
        at = [i for i in range(len(counted)) if context(counted, i + 1, order) == wanted]
        total = sum(w * gate_logits[b, at].sum(0) for b, w in enumerate(decay))
        expected = (expected + total) / (1 + sum(decay) * len(at))
    state = NgramContext(mixture.index(), to_ids(other)).states[-1]
    means = [*map(mixture.gate_means.lookup()(state), range(len(expected)))]
    np.testing.assert_allclose(means, expected, rtol=1e-3, atol=1e-5)


@settings(max_examples=40)
@given(TEXTS, TEXTS, TEXTS, BEGINS)
def test_leave_one_out_equals_counts_without_the_window(
    text: str, other: str, more: str, begin: int
) -> None:
    window = other.encode()
    counted = text.encode() + window + more.encode()
    mixture = random_mixture(counted)
    probs, _, _ = compute(mixture, window, True, begin)
    for i, p in enumerate(probs.tolist(), begin + 1):
        by_hand = prob_by_hand(mixture, 1 / 260, counted, window, i, begin, True)
        assert p == pytest.approx(by_hand, rel=1e-4)


def test_contexts_longer_than_one_that_occurs_once_are_pruned() -> None:
    once = random_mixture(b"\nabcdefghijk").table
    twice = random_mixture(b"\nabcdefghijk\nabcdefghijk").table
    assert len(once.entries) == 10 + 1 < len(twice.entries)


def test_chunks_from_all_parts_of_a_large_text_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_COUNTED_BYTES", 4096)
    monkeypatch.setattr(table, "CHUNK_BYTES", 256)
    text = bytes(np.random.default_rng(0).integers(97, 123, 24000, dtype=np.uint8))
    mixture = random_mixture(text)
    assert int(mixture.table.cumulative[-1]) < len(TABLE_ORDERS) * 4096
    starts = table.chunk_starts(len(text))
    counted = b"".join(text[i : i + 256] for i in starts)
    for end in (text[:6], text[-6:]):
        assert compute(mixture, end, leave_one_out=False)[0][-1] > 0.01
    # A window is subtracted from the counts only if it is part of them.
    windows = [text[i : i + 16] for i in range(0, 24000, 120)]
    is_counted = [w in counted for w in windows]
    assert 15 < sum(is_counted) < 70
    for window, is_part in zip(windows, is_counted, strict=True):
        plain, left_out = (compute(mixture, window, out)[0] for out in (False, True))
        assert torch.equal(plain, left_out) != is_part


@settings(max_examples=40)
@given(TEXTS, TEXTS)
def test_only_windows_of_the_counted_text_are_left_out(text: str, other: str) -> None:
    """A row of pairs may begin and end in the middle of a line of the text."""
    mixture = random_mixture(text.encode())
    for row in (other, text[5:15], "\n" + text[5:15].replace("\n", "a") + "\n"):
        data = row.encode()
        is_known = (
            continuations(text.encode(), wanted).get(data[i : i + 1], 0) > 0
            for i in range(len(data))
            for wanted in (context(data, i, n) for n in TABLE_ORDERS)
            if wanted and b"\n" not in wanted and data[i : i + 1] != b"\n"
            if sum(continuations(text.encode(), wanted).values()) > 0
        )
        is_part = all(is_known)
        plain, left_out = (compute(mixture, data, out)[0] for out in (False, True))
        if not is_part:
            assert torch.equal(plain, left_out)
        elif row == text[5:15] and "\n" not in row:
            assert not torch.equal(plain, left_out)


def test_every_token_stays_possible() -> None:
    mixture = random_mixture(b"\nabcdefgh" * 500)
    probs, log_probs, _ = compute(mixture, b"\nabcdefgh" * 90 + b"x", leave_one_out=False)
    assert probs[-1] >= 0.99 * (1 - MAX_NGRAM_MASS) / 260
    assert (log_probs[-1].exp() > 0.99 * (1 - MAX_NGRAM_MASS) / 260).all()


def test_a_text_of_one_byte_can_be_counted() -> None:
    probs, log_probs, _ = compute(random_mixture(b"a\n"), b"abc abc abc", leave_one_out=False)
    assert probs.isfinite().all() and log_probs.isfinite().all()


def test_the_table_is_part_of_the_state_dict() -> None:
    model = random_model()
    other = random_model(seed=1, gumbel=True)
    assert other.executor.ngrams is not None
    other.executor.ngrams.build(np.frombuffer(TEXT.encode(), dtype=np.uint8))
    other.load_state_dict(model.state_dict())
    prompt, y_in = tokens(2, 9), tokens(2, 12, seed=1)
    assert torch.equal(other(prompt, y_in)[0], model(prompt, y_in)[0])


def test_nll_equals_the_log_probs_of_forward() -> None:
    model = random_model()
    prompt, y = tokens(2, 9), tokens(2, 13, seed=1)
    y_in, y_out = y[:, :-1], y[:, 1:].clone()
    y_out[1, 5:] = PAD
    terms = model.nll(prompt, y_in, y_out)
    mixture, network = terms.mixture.sum(), terms.network.sum()
    log_probs, _ = model(prompt, y_in)
    expected = torch.nn.functional.nll_loss(
        log_probs.flatten(0, 1), y_out.flatten(), ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(mixture, expected)
    assert abs(mixture - network) > 1
    assert y_in[0, 0] == BOS and CONFIG.count_max == 16


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(0, 9))
def test_numpy_arrays_and_tensors_give_the_same_mixture(text: str, other: str, seed: int) -> None:
    mixture = random_mixture(text.encode(), seed)
    ids = torch.tensor([to_ids(other)])
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(*ids.shape, 260, generator=rng)
    states = torch.randn(*ids.shape, 4, generator=rng)
    found = mixture.find_continuations(ids)
    with_grad = mixture.log_probs(logits, states, found)
    with torch.no_grad():
        without_grad = mixture.log_probs(logits, states, found)
    assert with_grad.requires_grad and not without_grad.requires_grad
    torch.testing.assert_close(with_grad.detach(), without_grad, rtol=1e-5, atol=1e-5)
