import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.data import Batch, LMDataset
from hrm_esp.data.corruption import corrupt, mistype, strip_accents
from hrm_esp.evaluation import edit_distance
from hrm_esp.tokenizer import BOS, EOS, PAD, ByteTokenizer

TEXT = (
    "—En verdad, señor —dijo él—, que aún hay pingüinos.\nNo lo sé, añadió: «¡qué más da!»\n" * 100
)
STREAM = np.frombuffer(TEXT.encode(), dtype=np.uint8)


def test_only_spanish_accents_are_stripped() -> None:
    assert strip_accents("El niño comió pingüino: ÁÉÍÓÚÜÑ, ç, à") == (
        "El nino comio pinguino: AEIOUUN, ç, à"
    )


@given(st.text(), st.integers(0, 9))
def test_a_seed_determines_the_corruption(text: str, seed: int) -> None:
    first, again = (corrupt(text, np.random.default_rng(seed)) for _ in range(2))
    assert first == again


def test_each_kind_of_typo_occurs() -> None:
    typed = {mistype("señor", "x", np.random.default_rng(seed)) for seed in range(400)}
    assert {"", "senor", "SEÑOR"} < typed
    assert {"eñor", "xeñor", "xseñor", "esñor", "señr", "señox"} < typed
    assert all(edit_distance(t, "señor") <= 2 for t in typed - {"", "SEÑOR"})


def test_corruptions_differ_and_most_words_survive() -> None:
    random, line = np.random.default_rng(0), TEXT.splitlines()[0]
    versions = {corrupt(line, random) for _ in range(200)}
    assert len(versions) > 100
    kept = [sum(w in v for w in ("verdad", "dijo", "que", "hay")) for v in versions]
    assert np.mean(kept) > 2.5


def batches(denoise: float, seed: int = 0, skip: int = 0) -> list[tuple[int, Batch]]:
    data = LMDataset(STREAM, 64, denoise=denoise)
    return list(data.batches(lambda: (2, 1), seed, 0, skip))


def test_a_share_of_the_batches_is_corrupted_and_no_window_is_lost() -> None:
    text, some = batches(0.0), batches(0.4)
    assert all(b.cross_attends is None for _, b in text)
    assert [n for n, _ in text] == [n for n, _ in some]
    corrupted = [b for _, b in some if b.cross_attends is not None]
    assert 0.25 < len(corrupted) / len(some) < 0.55


def test_corrupted_batches_depend_on_the_position_in_the_epoch_only() -> None:
    whole = batches(0.5)
    rest = batches(0.5, skip=whole[3][0])
    assert len(rest) == len(whole) - 4
    for (n, a), (m, b) in zip(whole[4:], rest, strict=True):
        assert n == m and (a.cross_attends is None) == (b.cross_attends is None)
        assert a.y_out.equal(b.y_out) and a.prompt_ids.equal(b.prompt_ids)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_splits", [1, 4])
def test_the_targets_are_lines_of_the_window(seed: int, n_splits: int) -> None:
    data, decode = LMDataset(STREAM, 64), ByteTokenizer().decode
    starts = np.array([5, 100])
    batch = data.corrupted(starts, n_splits, np.random.default_rng(seed))
    assert batch.cross_attends is not None and batch.cross_attends.all()
    windows = [TEXT.encode()[s : s + 64].decode(errors="ignore") for s in starts]
    for prompt, y_in, y_out in zip(batch.prompt_ids, batch.y_in, batch.y_out, strict=True):
        assert prompt[0] == y_in[0] == BOS and prompt[prompt != PAD][-1] == EOS
        assert any(decode(y_out.tolist()) in window for window in windows)
    assert batch.y_out.shape[1] <= 64 // n_splits + 1


def test_a_long_line_among_many_short_ones_does_not_fill_memory() -> None:
    text = ("sí\n" * 300 + "palabra " * 200 + "\n") * 20
    data = LMDataset(np.frombuffer(text.encode(), dtype=np.uint8), 512)
    random = np.random.default_rng(0)
    for _ in range(200):
        batch = data.corrupted(random.integers(len(text), size=8), 1, random)
        assert batch.prompt_ids.numel() + batch.y_out.numel() <= 3 * 8 * 512


def test_each_line_is_a_pair() -> None:
    data = LMDataset(np.frombuffer("ñ\nñ\n".encode(), dtype=np.uint8), 8)
    for seed in range(20):
        batch = data.corrupted(np.arange(6), 1, np.random.default_rng(seed))
        rows = [[t for t in row if t != PAD] for row in batch.y_out.tolist()]
        assert rows and all(row in ([0xC3, 0xB1, EOS], [EOS]) for row in rows)
