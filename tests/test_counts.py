"""The table of n-gram counts, against counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CONFIG, TEXT, random_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp import counts, lookup
from hrm_esp.config import HRMConfig
from hrm_esp.counts import NgramCounts
from hrm_esp.data import as_inputs, as_targets
from hrm_esp.lookup import Place, Reader, order_weights
from hrm_esp.tokenizer import BOS, PAD

TABLE, JUST_READ = [2, 3, 4, 5, 6, 7, 8], [4, 6]
TEXTS = st.text(alphabet="ab\n", min_size=20, max_size=120)
BEGINS = st.integers(0, 18)


def table(text: bytes, seed: int = 0) -> NgramCounts:
    torch.manual_seed(seed)
    made = NgramCounts(HRMConfig(d_model=4, n_heads=1, count_max=8))
    with torch.no_grad():
        for p in made.parameters():
            p += torch.randn_like(p)
    made.count(np.frombuffer(text, dtype=np.uint8))
    return made


def context(text: bytes, place: int, order: int) -> bytes | None:
    """The ``order`` bytes before ``place``; they may begin with a line break, not reach over it."""
    if order > place or b"\n" in text[place - order + 1 : place]:
        return None
    return text[place - order : place]


def followers(text: bytes, wanted: bytes, end: int | None = None) -> Counter[bytes]:
    """What came after ``wanted`` in ``text``, up to ``end``, and how often."""
    n = len(wanted)
    places = range(n, len(text) if end is None else end)
    return Counter(text[j : j + 1] for j in places if text[j - n : j] == wanted)


def by_hand(
    made: NgramCounts, p: float, text: bytes, here: bytes, place: int, begin: int, own: bool
) -> float:
    """The mixture's probability of ``here[place]``, from what followed its contexts in ``text``,
    without ``here`` from ``begin`` on if ``own``, and in ``here`` before ``place``."""
    met_before, mixed = 2, p
    kinds = [(n, "table") for n in TABLE] + [(n, "just read") for n in JUST_READ]
    for i, (order, kind) in enumerate(sorted(kinds, key=lambda pair: pair[0])):
        wanted = context(here, place, order)
        if wanted is None:
            continue
        if kind == "table":
            after = followers(text, wanted)
            if own:
                after.subtract(followers(here, wanted) - followers(here, wanted, begin + 1))
            met = sum(after.values())
            skip, met_before = met_before < 2, met  # one met once says all that longer ones can
            if skip:
                continue
        else:
            after = followers(here, wanted, place)
            met = sum(after.values())
        if met == 0:
            continue
        distinct = sum(n > 0 for n in after.values())
        gain = made.by_count[i].tolist()
        score = math.log(met + 1) * gain[0] + math.log(distinct + 1) * gain[1] + gain[2]
        weight = 1 / (1 + math.exp(-score))
        mixed += weight * (after[here[place : place + 1]] / met - mixed)
    return (1 - counts.SURE) * p + counts.SURE * mixed


def ask(
    made: NgramCounts, here: bytes, leave_out: bool, begin: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The probability of each byte of ``here`` after ``begin``, the log-probability of all tokens
    there, and the targets; the network knows nothing."""
    data = np.frombuffer(here, dtype=np.uint8)
    ids, targets = (torch.from_numpy(f(d))[None] for f, d in
                    ((as_inputs, data[:-1]), (as_targets, data[1:])))  # fmt: skip
    past, ids, targets = ids[:, :begin], ids[:, begin:], targets[:, begin:]
    states = torch.zeros(*ids.shape, 4)
    p = torch.full(targets.shape, 1 / 260)
    with torch.no_grad():
        probability = made.probability(p, states, ids, targets, past, leave_out)
        logits = made.mix(torch.zeros(*ids.shape, 260), states, made.followers(ids, past))
    return probability[0], logits[0], targets[0]


@settings(max_examples=40)
@given(TEXTS, TEXTS, BEGINS)
def test_the_table_is_what_counting_gives(text: str, here: str, begin: int) -> None:
    counted, other = text.encode(), here.encode()
    made = table(counted)
    found, logits, targets = ask(made, other, False, begin)
    for i, p in enumerate(found.tolist(), begin + 1):
        by_counting = by_hand(made, 1 / 260, counted, other, i, begin, False)
        assert p == pytest.approx(by_counting, rel=1e-4)
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(len(found)))
    torch.testing.assert_close(logits.gather(1, targets[:, None])[:, 0], found.log())


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(1, 19))
def test_what_was_read_can_be_taken_back(text: str, here: str, n: int) -> None:
    ids = as_inputs(np.frombuffer(here.encode(), dtype=np.uint8)).tolist()
    reader = Reader(table(text.encode()).table(), ids[:-n])
    before = reader.place()
    for _ in range(2):
        for token in ids[-n:]:
            reader.read(token)
        same(reader.place(), Reader(reader.table, ids).place())
        for _ in range(n):
            reader.unread()
    same(reader.place(), before)


def same(one: Place, other: Place) -> None:
    np.testing.assert_array_equal(one.bounds, other.bounds)
    assert one.recent == other.recent


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(0, 9))
def test_orders_weigh_as_in_the_mixture(text: str, here: str, seed: int) -> None:
    """What is drafted by is what the mixture adds to the network's own probabilities."""
    made = table(text.encode(), seed)
    ids = torch.from_numpy(as_inputs(np.frombuffer(here.encode(), dtype=np.uint8)))[None]
    state = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(seed))
    reader = Reader(made.table(), ids[0].tolist())
    found = made.table().followers([reader.place()])
    with torch.no_grad():
        mixed = made.mix(torch.zeros(1, 1, 260), state, found).exp()[0, 0]
        hint = made.by_state(state)[0, 0].numpy()
    gains = made.by_count.detach().numpy()
    expected = found.expected(order_weights(found.times, found.distinct, gains, hint))[0]
    rest = 1 - counts.SURE * expected.sum()
    np.testing.assert_allclose(mixed, counts.SURE * expected + rest / 260, rtol=1e-3)
    guessed = made.table().guess(reader.place(), gains.tolist(), hint.tolist())
    for token, p in enumerate(expected):
        assert p - lookup.LITTLE - 1e-5 < guessed.get(token, 0) < p + 1e-5
    assert sum(guessed.values()) > expected.sum() - lookup.LITTLE - 1e-5


@settings(max_examples=40)
@given(TEXTS, TEXTS, st.integers(0, 9))
def test_hints_are_foretold_as_the_mean_after_like_contexts(
    text: str, here: str, seed: int
) -> None:
    counted, other = text.encode(), here.encode()
    made = table(counted, seed)
    ids = torch.from_numpy(as_inputs(np.frombuffer(counted, dtype=np.uint8)))[None]
    states = torch.randn(2, 1, ids.shape[1], 4, generator=torch.Generator().manual_seed(seed))
    made.train()
    for batch in states:
        made.probability(torch.ones(ids.shape), batch, ids, torch.full_like(ids, PAD))
        made.remember()
    with torch.no_grad():
        hints = made.by_state(states)[:, 0].numpy()
    later = [counts.TRUST_KEPT, 1.0]
    expected = np.zeros(hints.shape[-1])
    for order in range(1, lookup.TRUST_ORDERS + 1):
        wanted = context(other, len(other), order)
        if wanted is None:
            break
        at = [i for i in range(len(counted)) if context(counted, i + 1, order) == wanted]
        total = sum(w * hints[b, at].sum(0) for b, w in enumerate(later))
        expected = (expected + total) / (1 + sum(later) * len(at))
    end = made.table().hashes(as_inputs(np.frombuffer(other, dtype=np.uint8)).tolist())
    foretold = lookup.foretold_hints(made.trust.numpy(), end)
    np.testing.assert_allclose(foretold, expected, rtol=1e-3, atol=1e-5)
    made.eval()
    made.probability(torch.ones(ids.shape), batch, ids, torch.full_like(ids, PAD))
    assert not made.met


@settings(max_examples=40)
@given(TEXTS, TEXTS, TEXTS, BEGINS)
def test_what_is_left_out_is_as_if_never_met(text: str, here: str, more: str, begin: int) -> None:
    window = here.encode()
    counted = text.encode() + window + more.encode()
    made = table(counted)
    found, _, _ = ask(made, window, True, begin)
    for i, p in enumerate(found.tolist(), begin + 1):
        by_counting = by_hand(made, 1 / 260, counted, window, i, begin, True)
        assert p == pytest.approx(by_counting, rel=1e-4)


def test_longer_contexts_of_one_met_once_are_not_kept() -> None:
    once = table(b"\nabcdefghijk")
    twice = table(b"\nabcdefghijk\nabcdefghijk")
    assert len(once.entries) == 10 + 1 < len(twice.entries)


def test_of_a_large_text_pieces_from_all_of_it_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "COUNTED", 4096)
    monkeypatch.setattr(counts, "PIECE", 256)
    text = bytes(np.random.default_rng(0).integers(97, 123, 24000, dtype=np.uint8))
    made = table(text)
    assert int(made.cumulative[-1]) < len(TABLE) * 4096
    starts = counts.counted_pieces(len(text))
    joined = b"".join(text[i : i + 256] for i in starts)
    for known in (text[:6], text[-6:]):
        assert ask(made, known, leave_out=False)[0][-1] > 0.01
    # A window is taken out of the table only if it is in there.
    windows = [text[i : i + 16] for i in range(0, 24000, 120)]
    was_in = [w in joined for w in windows]
    assert 15 < sum(was_in) < 70
    for window, is_part in zip(windows, was_in, strict=True):
        found, left_out = (ask(made, window, leave_out)[0] for leave_out in (False, True))
        assert torch.equal(found, left_out) != is_part


@settings(max_examples=40)
@given(TEXTS, TEXTS)
def test_only_what_is_part_of_the_text_is_left_out(text: str, here: str) -> None:
    """A row of pairs may begin and end where no line of the text does."""
    made = table(text.encode())
    for row in (here, text[5:15], "\n" + text[5:15].replace("\n", "a") + "\n"):
        data = row.encode()
        known = (
            followers(text.encode(), wanted).get(data[i : i + 1], 0) > 0
            for i in range(len(data))
            for wanted in (context(data, i, n) for n in TABLE)
            if wanted and b"\n" not in wanted and data[i : i + 1] != b"\n"
            if sum(followers(text.encode(), wanted).values()) > 0
        )
        is_part = all(known)
        found, left_out = (ask(made, data, leave_out)[0] for leave_out in (False, True))
        if not is_part:
            assert torch.equal(found, left_out)
        elif row == text[5:15] and "\n" not in row:
            assert not torch.equal(found, left_out)


def test_what_was_never_seen_stays_possible_however_often_something_was() -> None:
    made = table(b"\nabcdefgh" * 500)
    found, logits, _ = ask(made, b"\nabcdefgh" * 90 + b"x", leave_out=False)
    assert found[-1] >= 0.99 * (1 - counts.SURE) / 260
    assert (logits[-1].exp() > 0.99 * (1 - counts.SURE) / 260).all()


def test_a_text_of_one_byte_can_be_counted() -> None:
    made = table(b"a\n")
    found, logits, _ = ask(made, b"abc abc abc", leave_out=False)
    assert found.isfinite().all() and logits.isfinite().all()


def test_the_table_travels_with_the_weights() -> None:
    model = random_model()
    other = random_model(seed=1, gumbel=True)
    assert other.executor.counts is not None
    other.executor.counts.count(np.frombuffer(TEXT.encode(), dtype=np.uint8))
    other.load_state_dict(model.state_dict())
    prompt, y_in = tokens(2, 9), tokens(2, 12, seed=1)
    assert torch.equal(other(prompt, y_in)[0], model(prompt, y_in)[0])


def test_a_step_costs_what_the_logits_say() -> None:
    model = random_model()
    prompt, y = tokens(2, 9), tokens(2, 13, seed=1)
    y_in, y_out = y[:, :-1], y[:, 1:].clone()
    y_out[1, 5:] = PAD
    cost = model.nats(prompt, y_in, y_out)
    mixed, alone = cost.mixed.sum(), cost.alone.sum()
    logits, _ = model(prompt, y_in)
    said = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), y_out.flatten(), ignore_index=PAD, reduction="sum"
    )
    torch.testing.assert_close(mixed, said)
    assert abs(mixed - alone) > 1
    assert y_in[0, 0] == BOS and CONFIG.count_max == 16
