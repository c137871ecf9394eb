import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.data import Batch, LMDataset
from hrm_esp.denoising import damage, mistype, without_marks
from hrm_esp.evaluation import edit_distance
from hrm_esp.tokenizer import BOS, EOS, PAD, ByteTokenizer

TEXT = (
    "—En verdad, señor —dijo él—, que aún hay pingüinos.\nNo lo sé, añadió: «¡qué más da!»\n" * 100
)
STREAM = np.frombuffer(TEXT.encode(), dtype=np.uint8)


def test_only_the_marks_of_spanish_are_taken_off() -> None:
    assert without_marks("El niño comió pingüino: ÁÉÍÓÚÜÑ, ç, à") == (
        "El nino comio pinguino: AEIOUUN, ç, à"
    )


@given(st.text(), st.integers(0, 9))
def test_damage_is_the_same_for_a_seed(text: str, seed: int) -> None:
    first, again = (damage(text, np.random.default_rng(seed)) for _ in range(2))
    assert first == again


def test_each_way_to_mistype_occurs() -> None:
    typed = {mistype("señor", "x", np.random.default_rng(seed)) for seed in range(400)}
    assert {"", "senor", "SEÑOR"} < typed
    assert {"eñor", "xeñor", "xseñor", "esñor", "señr", "señox"} < typed
    assert all(edit_distance(t, "señor") <= 2 for t in typed - {"", "SEÑOR"})


def test_what_is_damaged_differs_and_mostly_survives() -> None:
    random, line = np.random.default_rng(0), TEXT.splitlines()[0]
    versions = {damage(line, random) for _ in range(200)}
    assert len(versions) > 100
    kept = [sum(w in v for w in ("verdad", "dijo", "que", "hay")) for v in versions]
    assert np.mean(kept) > 2.5


def batches(denoise: float, seed: int = 0, skip: int = 0) -> list[tuple[int, Batch]]:
    data = LMDataset(STREAM, 64, denoise=denoise)
    return list(data.batches(lambda: (2, 1), seed, 0, skip))


def test_a_share_of_the_batches_restores_and_no_window_is_lost() -> None:
    text, some = batches(0.0), batches(0.4)
    assert all(b.reads_memory is None for _, b in text)
    assert [n for n, _ in text] == [n for n, _ in some]
    restoring = [b for _, b in some if b.reads_memory is not None]
    assert 0.25 < len(restoring) / len(some) < 0.55


def test_what_is_restored_depends_on_where_the_epoch_stands_alone() -> None:
    whole = batches(0.5)
    rest = batches(0.5, skip=whole[3][0])
    assert len(rest) == len(whole) - 4
    for (n, a), (m, b) in zip(whole[4:], rest, strict=True):
        assert n == m and (a.reads_memory is None) == (b.reads_memory is None)
        assert a.y_out.equal(b.y_out) and a.prompt_ids.equal(b.prompt_ids)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pieces", [1, 4])
def test_the_text_restored_is_that_of_the_window(seed: int, pieces: int) -> None:
    data, decode = LMDataset(STREAM, 64), ByteTokenizer().decode
    starts = np.array([5, 100])
    batch = data.damaged(starts, pieces, np.random.default_rng(seed))
    assert batch.reads_memory is not None and batch.reads_memory.all()
    windows = [TEXT.encode()[s : s + 64].decode(errors="ignore") for s in starts]
    for prompt, y_in, y_out in zip(batch.prompt_ids, batch.y_in, batch.y_out, strict=True):
        assert prompt[0] == y_in[0] == BOS and prompt[prompt != PAD][-1] == EOS
        assert any(decode(y_out.tolist()) in window for window in windows)
    assert batch.y_out.shape[1] <= 64 // pieces + 1


def test_a_long_line_among_many_short_ones_does_not_fill_memory() -> None:
    text = ("sí\n" * 300 + "palabra " * 200 + "\n") * 20
    data = LMDataset(np.frombuffer(text.encode(), dtype=np.uint8), 512)
    random = np.random.default_rng(0)
    for _ in range(200):
        batch = data.damaged(random.integers(len(text), size=8), 1, random)
        assert batch.prompt_ids.numel() + batch.y_out.numel() <= 3 * 8 * 512


def test_lines_are_restored_each_by_itself() -> None:
    data = LMDataset(np.frombuffer("ñ\nñ\n".encode(), dtype=np.uint8), 8)
    for seed in range(20):
        batch = data.damaged(np.arange(6), 1, np.random.default_rng(seed))
        rows = [[t for t in row if t != PAD] for row in batch.y_out.tolist()]
        assert rows and all(row in ([0xC3, 0xB1, EOS], [EOS]) for row in rows)
