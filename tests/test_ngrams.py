"""N-gram counts and the mixture, compared with counting by hand."""

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, SMALL, TEXT, Run, random_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp.config import HRMConfig
from hrm_esp.data import as_inputs, as_targets
from hrm_esp.ngrams import ContextMatch, NgramContext, NgramMixture, counting
from hrm_esp.ngrams.counting import add_up, count_ngrams, drop_rare
from hrm_esp.ngrams.entries import COUNT_BITS, COUNTS, MAX_CODE, count_codes
from hrm_esp.ngrams.hashing import TWO_WORDS, WORD_ORDERS
from hrm_esp.ngrams.mixture import MAX_NGRAM_MASS, count_features, count_probs
from hrm_esp.ngrams.packing import pack_table, unpack_table
from hrm_esp.tokenizer import BOS, EOS, PAD
from hrm_esp.training import load_model

NGRAM_ORDERS = [2, 3, 4, 5, 6, 7, 8]
TABLE_ORDERS, RECENT_ORDERS = [*WORD_ORDERS, *NGRAM_ORDERS], [*WORD_ORDERS, 4, 6]
TEXTS = st.text(alphabet="abA \n", min_size=20, max_size=120)
Context = bytes | tuple[bytes, ...]
BEGINS = st.integers(0, 18)


def random_mixture(text: bytes, seed: int = 0) -> NgramMixture:
    """A mixture with the counts of ``text`` and random weights."""
    torch.manual_seed(seed)
    mixture = NgramMixture(HRMConfig(d_model=4, n_heads=1, count_max=8))
    with torch.no_grad():
        for p in mixture.parameters():
            p += 0.3 * torch.randn_like(p)
    mixture.build(np.frombuffer(text, dtype=np.uint8))
    return mixture


def to_ids(text: bytes) -> list[int]:
    ids: list[int] = as_inputs(np.frombuffer(text, dtype=np.uint8)).tolist()
    return ids


def context(text: bytes, position: int, order: int) -> Context | None:
    """The ``order`` bytes before ``position``; they may begin with a line break, not span one. Or
    the word so far, and perhaps the one before it in the line."""
    if order not in WORD_ORDERS:
        if order > position or b"\n" in text[position - order + 1 : position]:
            return None
        return text[position - order : position]
    line = text[:position].lower().split(b"\n")[-1] or b"\n"
    letters = re.findall(rb"[a-z\x80-\xff]+", line)
    in_word = letters and line.endswith(letters[-1])
    word = letters.pop() if in_word else line[-1:]
    return (word, *letters[-1:]) if order == TWO_WORDS else (word,)


def continuations(
    text: bytes, wanted: Context, order: int, end: int | None = None
) -> Counter[bytes]:
    """How often each byte came after ``wanted`` in ``text``, up to ``end``."""
    positions = range(1, len(text) if end is None else end)
    return Counter(text[j : j + 1] for j in positions if context(text, j, order) == wanted)


def prob_by_hand(
    mixture: NgramMixture,
    p: float,
    text: bytes,
    window: bytes,
    position: int,
    begin: int,
    leave_one_out: bool,
    with_network: bool = True,
) -> float:
    """The mixture's probability of ``window[position]``, by the contexts in ``text``, without
    those of ``window`` from ``begin`` on if ``leave_one_out``, and in ``window`` so far."""
    # Step 1: count, by rising order.
    shorter_count = 2
    found: list[tuple[int, int, float]] = []  # C, D and c / C of the target
    kinds = [(n, "table") for n in TABLE_ORDERS] + [(n, "recent") for n in RECENT_ORDERS]
    for order, kind in sorted(kinds, key=lambda pair: pair[0]):
        found.append((0, 0, 0.0))
        wanted = context(window, position, order)
        if wanted is None:
            continue
        if kind == "table":
            after = continuations(text, wanted, order)
            if leave_one_out:
                own = continuations(window, wanted, order)
                after.subtract(own - continuations(window, wanted, order, begin + 1))
            count = sum(after.values())
            if order not in WORD_ORDERS:
                skip, shorter_count = shorter_count < 2, count  # one has no longer n-grams
                count *= not skip
            count *= count >= int(mixture.table.min_count)
        else:
            after = continuations(window, wanted, order, position)
            count = sum(after.values())
        if count > 0:
            n_continuations = sum(n > 0 for n in after.values())
            found[-1] = count, n_continuations, after[window[position : position + 1]] / count
    # Step 2: mix, by the gates of the mixture or by those of the counts alone.
    logs = [math.log(f[i] + 1) for i in (0, 1) for f in found]
    token_emb, hidden, out, bias = (w.tolist() for w in mixture.count_gates.weights())
    last_token = to_ids(window[:position])[-1]
    activations = [
        max(0, dot(row, logs) + e) for row, e in zip(hidden, token_emb[last_token], strict=True)
    ]
    mixed = p
    for n, (count, _, frequency) in enumerate(found):
        log_count, log_continuations = logs[n], logs[n + len(found)]
        logit = log_count - log_continuations + dot(out[n], activations) + bias[n]
        if with_network:
            logit = dot(mixture.count_weights[n].tolist(), [log_count, log_continuations, 1])
        mixed += (count > 0) / (1 + math.exp(-logit)) * (frequency - mixed)
    return (1 - MAX_NGRAM_MASS) * p + MAX_NGRAM_MASS * mixed


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


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
    with torch.no_grad():
        counts = mixture.lookup(ids, targets, preceding_ids, leave_one_out)
        gate_logits = mixture.gate_logits(counts[0], states)
        probs = mixture.target_probs(1 / 260, gate_logits, *counts)
        found = mixture.find_continuations(ids, preceding_ids)
        log_probs = mixture.log_probs(torch.zeros(*ids.shape, 260), states, found)
    return probs, log_probs[0], targets[0]


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
    """The mixture without the network. All tokens as looked up one by one; the target, where its
    window is subtracted from the counts."""
    window = b"\n" + other.encode()  # no word is cut
    counted = text.encode() + (window if leave_one_out else b"") + more.encode()
    mixture = random_mixture(counted)
    data = np.frombuffer(window, dtype=np.uint8)
    ids, targets = (
        torch.from_numpy(f(d)) for f, d in ((as_inputs, data[:-1]), (as_targets, data[1:]))
    )
    preceding_ids, ids, targets = ids[None, :begin], ids[None, begin:], targets[None, begin:]
    found, _ = mixture.lookup(ids, targets, preceding_ids, leave_one_out)
    probs = count_probs(found, mixture.count_gate_logits(found).detach())
    assert probs.min() > -1e-6 and probs.sum(-1).max() < 1 + 1e-6
    by_hand = [
        prob_by_hand(mixture, 0.0, counted, window, i, begin, leave_one_out, with_network=False)
        for i in range(begin + 1, len(window))
    ]
    of_target = probs.gather(1, targets[0, :, None])[:, 0]
    torch.testing.assert_close(of_target, torch.tensor(by_hand), rtol=1e-4, atol=1e-6)
    if not leave_one_out:
        features = count_features(found, mixture.count_gate_logits(found).detach())
        one_by_one = mixture.features(mixture.find_continuations(ids, preceding_ids))
        torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


@settings(max_examples=100)
@given(TEXTS, st.integers(0, 19), st.integers(2, 20))
def test_a_row_cut_out_of_a_line_leaves_no_trace_in_the_input(
    text: str, begin: int, size: int
) -> None:
    """Its end is not in the counted text, so nothing may be subtracted for it."""
    text += "a" * 20
    row = text[begin : begin + size].replace("\n", "a").encode()
    mixture = random_mixture(f"\n{text}\n{row.decode()}abab\n".encode())
    ids, targets = to_ids(b"\n" + row), [*row, EOS]
    found, _ = mixture.lookup(torch.tensor([ids]), torch.tensor([targets]), leave_one_out=True)
    probs = count_probs(found, mixture.count_gate_logits(found).detach())
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
    ids = to_ids(other.encode())
    context = NgramContext(random_mixture(text.encode()).index(), ids[:-n])
    before = context.match()
    for _ in range(2):
        for token in ids[-n:]:
            context.append(token)
        assert_equal(context.match(), NgramContext(context.index, ids).match())
        context.rollback(n)
    assert_equal(context.match(), before)


def assert_equal(one: ContextMatch, other: ContextMatch) -> None:
    np.testing.assert_array_equal(one.counts, other.counts)
    pairs, others = (sorted(zip(*match[2:], strict=True)) for match in (one, other))
    assert pairs == others


@settings(max_examples=40)
@given(TEXTS, TEXTS, TEXTS, BEGINS, st.integers(1, 3))
def test_leave_one_out_equals_counts_without_the_window(
    text: str, other: str, more: str, begin: int, min_count: int
) -> None:
    window = b"\n" + other.encode()  # no word is cut
    counted = text.encode() + window + more.encode()
    mixture = random_mixture(counted)
    entries = drop_rare(mixture.table.entries.numpy(), min_count)
    mixture.table.entries, mixture.table.min_count = map(torch.tensor, (entries, min_count))
    probs, _, _ = compute(mixture, window, True, begin)
    for i, p in enumerate(probs.tolist(), begin + 1):
        by_hand = prob_by_hand(mixture, 1 / 260, counted, window, i, begin, True)
        assert p == pytest.approx(by_hand, rel=1e-4)


def test_contexts_longer_than_one_that_occurs_once_are_pruned() -> None:
    once = random_mixture(b"\nabcdefghijk").table
    twice = random_mixture(b"\nabcdefghijk\nabcdefghijk").table
    n_words, n_ngrams = 2 * 11, 10
    assert len(once.entries) == n_words + n_ngrams < len(twice.entries) - n_ngrams


def test_counts_are_nearly_exact() -> None:
    counts = np.concatenate((np.arange(1, 5000), np.geomspace(5000, 4e12, 1000).astype(np.int64)))
    rounded = COUNTS[count_codes(counts)]
    assert (rounded[counts < 1024] == counts[counts < 1024]).all()
    np.testing.assert_allclose(rounded, counts, rtol=0.0115)


@settings(max_examples=40)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_counts_of_several_tables_add_up(texts: list[str]) -> None:
    tables = [
        count_ngrams(np.frombuffer(text.encode(), dtype=np.uint8), TABLE_ORDERS, 10**6)[0]
        for text in texts
    ]
    expected: Counter[int] = Counter()
    for table in tables:
        expected.update(dict(zip((table >> COUNT_BITS).tolist(), table & MAX_CODE, strict=True)))
    total = add_up(*tables, tables[0][:0])
    assert dict(zip((total >> COUNT_BITS).tolist(), total & MAX_CODE, strict=True)) == expected
    assert torch.equal(unpack_table(pack_table(torch.from_numpy(total))), torch.from_numpy(total))


@settings(max_examples=40)
@given(TEXTS, st.integers(1, 400))
def test_rare_contexts_are_dropped_until_the_table_fits(text: str, max_entries: int) -> None:
    stream = np.frombuffer(text.encode(), dtype=np.uint8)
    whole, _ = count_ngrams(stream, TABLE_ORDERS, 10**6)
    entries, min_count = count_ngrams(stream, TABLE_ORDERS, max_entries)
    assert len(entries) <= max_entries
    np.testing.assert_array_equal(entries, drop_rare(whole, min_count))
    assert min_count == 1 or len(drop_rare(whole, min_count - 1)) > max_entries
    assert (np.diff(entries) > 0).all()


@settings(max_examples=40)
@given(st.text(alphabet="abA \n", min_size=100, max_size=300), st.integers(20, 200))
def test_a_large_text_is_counted_in_blocks(text: str, block_bytes: int) -> None:
    """N-grams whose shorter one is rare in each block are lost, and no other ones."""
    stream = np.frombuffer(text.encode(), dtype=np.uint8)
    orders = [*WORD_ORDERS, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_BYTES", block_bytes)
        patch.setattr(counting, "CHUNK_BYTES", 16)
        patch.setattr(counting, "PART_KEYS", 16)
        entries, _ = count_ngrams(stream, orders, 10**6)
        longer, _ = count_ngrams(stream, TABLE_ORDERS, 10**6)
    np.testing.assert_array_equal(entries, count_ngrams(stream, orders, 10**6)[0])
    whole, _ = count_ngrams(stream, TABLE_ORDERS, 10**6)
    counts = dict(zip(whole >> COUNT_BITS, whole & MAX_CODE, strict=True))
    for entry in longer.tolist():
        assert 1 <= entry & MAX_CODE <= counts[entry >> COUNT_BITS]


@settings(max_examples=40)
@given(TEXTS, TEXTS)
def test_only_windows_of_the_counted_text_are_left_out(text: str, other: str) -> None:
    """In finetuning. A row of pairs may begin and end in the middle of a line of the text."""
    mixture = random_mixture(text.encode())
    mixture.load_state_dict(random_mixture(b"\n").state_dict())
    mixture.load_state_dict(random_mixture(text.encode()).state_dict())
    for row in (other, text[5:15], "\n" + text[5:15].replace("\n", "a") + "\n"):
        data = row.encode()
        is_known = (
            after.get(data[i : i + 1], 0) > 0
            for i in range(len(data))
            for n in NGRAM_ORDERS
            if isinstance(wanted := context(data, i, n), bytes)
            if b"\n" not in wanted + data[i : i + 1]
            if (after := continuations(text.encode(), wanted, n))
        )
        is_part = all(is_known)
        plain, left_out = (compute(mixture, data, out)[0] for out in (False, True))
        if not is_part:
            assert torch.equal(plain, left_out)
        elif row == text[5:15] and "\n" not in row:
            assert not torch.equal(plain, left_out)


@settings(max_examples=40)
@given(TEXTS, st.integers(20, 200), st.integers(1, 3))
def test_windows_are_left_out_of_counts_made_in_blocks(
    text: str, block_bytes: int, min_count: int
) -> None:
    """Some of their n-grams were lost, so less is subtracted, and never too much."""
    window = text.encode() + b"\n"
    stream = np.frombuffer(window * 3, dtype=np.uint8)
    mixture = random_mixture(window * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_BYTES", block_bytes)
        mixture.build(stream)
    mixture.table.min_count.fill_(min_count)
    ids, targets = torch.tensor([to_ids(window)[:-1]]), torch.tensor([to_ids(window)[1:]])
    targets[targets == BOS] = EOS
    found, counts = mixture.lookup(ids, targets, leave_one_out=True)
    _, plain_counts = mixture.lookup(ids, targets)
    assert counts.min() >= 0 and (counts <= plain_counts).all() and (counts < plain_counts).any()
    is_left = found.context_count > 0
    assert (counts <= found.context_count)[is_left].all()
    probs = count_probs(found, mixture.count_gate_logits(found).detach())
    assert probs.min() > -1e-6 and probs.clamp(min=0).sum(-1).max() < 1 + 1e-6


def test_texts_of_a_few_bytes_can_be_counted() -> None:
    for text in (b"", b"\n", b"a", b"ab", b"a\n", b"\n\n\n", "á".encode()):
        for orders in (TABLE_ORDERS, [2, 3], [*WORD_ORDERS]):
            entries, _ = count_ngrams(np.frombuffer(text, dtype=np.uint8), orders, 10)
            assert len(entries) <= 10


def test_a_count_to_which_little_is_added_often_grows() -> None:
    stream = np.frombuffer(b"ab" * 2_000_000, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_BYTES", 40_000)
        entries, _ = count_ngrams(stream, [2], 100)
    np.testing.assert_allclose(COUNTS[entries & MAX_CODE], 2_000_000, rtol=0.3)


def test_count_memory_bounds_the_table(run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    command = ("pretrain", "corpus.txt", "--steps", "2", *SMALL, "--out_dir")
    small = run(*command, "small", "--count_memory", "0.02")
    assert "only of contexts that occurred at least" in small.stderr, small.stderr
    assert "occurred at least" not in run(*command, "large").stderr
    sizes = []
    for folder in ("small", "large"):
        ngrams = load_model(tmp_path / folder / "pretrain_last.pt").executor.ngrams
        assert ngrams is not None and (ngrams.table.min_count > 1) == (folder == "small")
        sizes.append(8 * len(ngrams.table.entries))
    assert 5_000 < sizes[0] <= 20_000 < sizes[1]


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
    ids = torch.tensor([to_ids(other.encode())])
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(*ids.shape, 260, generator=rng)
    states = torch.randn(*ids.shape, 4, generator=rng)
    found = mixture.find_continuations(ids)
    with_grad = mixture.log_probs(logits, states, found)
    with torch.no_grad():
        without_grad = mixture.log_probs(logits, states, found)
    assert with_grad.requires_grad and not without_grad.requires_grad
    torch.testing.assert_close(with_grad.detach(), without_grad, rtol=1e-5, atol=1e-5)
