import gzip
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.data import (
    LMDataset,
    Pair,
    TextStats,
    TSVDataset,
    dataset_lm,
    dataset_tsv,
    load_corpus_lines,
    load_stream,
    split_pairs,
    split_stream,
)
from hrm_esp.errors import HRMError
from hrm_esp.tokenizer import BOS, EOS, PAD, ByteTokenizer


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def ring(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def test_lines_have_no_mark_and_no_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfuno\r\n\r\n  dos \r\xc3\xb1\n \nfin")
    assert list(load_corpus_lines(path)) == ["uno", "  dos ", "ñ", "fin"]


def test_undecodable_bytes_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "la niña".encode("latin-1") + b"\nbien\n")
    stats = TextStats()
    assert list(load_corpus_lines(path, stats=stats)) == ["la nia", "bien"]
    assert stats.undecodable == 1
    assert list(load_corpus_lines(path, "latin-1")) == ["la niña", "bien"]


def test_a_wrong_encoding_is_a_warning_that_names_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_stream([write(tmp_path / "a.txt", ("La niña cantó una canción. " * 20).encode("latin-1"))])
    assert "--encoding latin-1" in capsys.readouterr().err
    load_stream([write(tmp_path / "a.txt", b"\xf1\n" + b"La nina canta. " * 200)])
    said = capsys.readouterr().err
    assert "skipped 1 bytes (0.03%)" in said and "warning" not in said
    load_stream([write(tmp_path / "b.txt", "La niña cantó una canción. " * 20)])
    assert not capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "latin-1", "UTF-8"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "a.txt", "¿Qué?\nAñil\n".encode(encoding))
    assert load_stream([path], encoding).tobytes().decode() == "¿Qué?\nAñil\n"


def test_text_is_normalized_to_nfc(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", unicodedata.normalize("NFD", "canción\n"))
    assert load_stream([path]).tobytes().decode() == "canción\n"


def test_files_folders_and_gz_are_one_stream(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"dos\n"))
    write(folder / "a.txt", "uno")
    write(folder / "c.pdf", b"%PDF\0")
    extra = write(tmp_path / "z.txt", "tres")
    assert load_stream([folder, extra]).tobytes() == b"uno\ndos\ntres\n"


def test_the_token_file_is_reused_until_the_source_changes(tmp_path: Path) -> None:
    source, token_file = write(tmp_path / "a.txt", "uno\n"), tmp_path / "run" / "a.tokens"
    load_stream([source], token_file=token_file)
    built = token_file.stat()
    load_stream([source], token_file=token_file)
    assert token_file.stat().st_mtime_ns == built.st_mtime_ns
    write(source, "dos\n")
    os.utime(source, ns=(1, 1))
    assert load_stream([source], token_file=token_file).tobytes() == b"dos\n"
    assert list(token_file.parent.iterdir()) == [token_file]


@given(
    st.text(st.sampled_from("ab\n"), min_size=1).filter(str.strip),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 5),
    st.sampled_from(["same", "previous"]),
)
def test_windows_cover_every_byte_as_target(
    text: str, length: int, n_splits: int, seed: int, view: str
) -> None:
    """Each epoch predicts every byte once, and some twice to fill the last window."""
    stream = ring("".join(f"{x}\n" for x in text.split("\n") if x).encode())
    data = LMDataset(stream, length * n_splits, view)
    n_done, batches = zip(*data.batches(lambda: (3, n_splits), seed, epoch=1), strict=True)
    assert list(n_done) == [min(3 * (i + 1), len(data)) for i in range(len(batches))]
    targets = np.concatenate([b.y_out.numpy().ravel() for b in batches])
    assert len(targets) == len(data) * data.max_len < len(stream) + data.max_len
    expected = np.where(stream == 10, EOS, stream.astype(int))
    for token in set(expected.tolist()):
        assert (targets == token).sum() >= (expected == token).sum()
    for batch in batches:
        as_target = np.where(batch.y_in == BOS, EOS, batch.y_in)
        assert (as_target[:, 1:] == batch.y_out[:, :-1].numpy()).all()
        assert batch.y_in.shape[1] == length
        assert batch.prompt_ids.shape == (len(batch.y_in), length + 1)
        assert (batch.prompt_ids[:, 0] == BOS).all()
        if view == "same":
            as_target = np.where(batch.prompt_ids == BOS, EOS, batch.prompt_ids)
            assert (as_target[:, 1:] == batch.y_out.numpy()).all()
    rest = list(data.batches(lambda: (3, n_splits), seed, epoch=1, skip=3))
    assert [n for n, _ in rest] == list(n_done)[1:]
    for (_, a), b in zip(rest, batches[1:], strict=True):
        assert (a.y_in == b.y_in).all()


def test_the_previous_window_ends_where_the_window_begins() -> None:
    batch = LMDataset(ring(b"0123456789\n"), 4, "previous").windows(np.array([4]))
    decode = ByteTokenizer().decode
    assert decode(batch.prompt_ids[0].tolist()) == "0123"
    assert decode(batch.y_in[0].tolist()) == "3456"
    assert decode(batch.y_out[0].tolist()) == "4567"


def test_the_preceding_bytes_end_where_the_window_begins() -> None:
    text = ring(b"0123456789\nabcdefghi\n")
    batch = LMDataset(text, 4, preceding_len=3).windows(np.array([1, 4, 13]), 2)
    assert batch.preceding_ids is not None
    decode = ByteTokenizer().decode
    assert [decode(row) for row in batch.preceding_ids.tolist()] == [
        "hi",
        "01",
        "012",
        "234",
        "9a",
        "abc",
    ]
    assert batch.preceding_ids[1].tolist() == [BOS, ord("0"), ord("1")]
    # In a corpus that is not much longer they are not part of the window.
    for n in range(1, 22):
        data = LMDataset(text[:n], 4, preceding_len=99)
        preceding = data.windows(np.array([0])).preceding_ids
        assert preceding is not None and preceding.shape[1] == max(0, n - 5)


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    data = LMDataset(ring(bytes(range(48, 120)) + b"\n"), 8)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [r for _, b in data.batches(lambda: (2, 1), seed, epoch) for r in b.y_out.tolist()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)


def test_dataset_lm_is_a_sequence_of_windows(tmp_path: Path) -> None:
    data = dataset_lm(write(tmp_path / "a.txt", "abcdefghij\n"), max_len=4)
    assert [ByteTokenizer().decode(b.y_out[0].tolist()) for b in data] == ["abcd", "efgh", "ija"]


def test_the_held_out_tail_has_whole_documents() -> None:
    stream = ring(b"aaaa\nbbbb\ncccc\ndddd\n")
    train, held_out = split_stream(stream, 0.4)
    assert train.tobytes() == b"aaaa\nbbbb\ncccc\n" and held_out.tobytes() == b"dddd\n"
    train, held_out = split_stream(ring(b"abcdefghi\n"), 0.2)
    assert train.tobytes() + held_out.tobytes() == b"abcdefghi\n" and len(held_out) == 2
    assert len(split_stream(stream, 0)[1]) == 0


def test_rows_of_a_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "uno\t1\n\ndos\tsí\tno\nsolo\nvacío\t\n\trespuesta\n")
    rows = [(p.prompt.decode(), p.target.decode(), p.lm) for p in dataset_tsv(path)]
    assert rows == [
        ("uno", "1", False),
        ("dos", "sí\tno", False),
        ("solo", "solo", True),
        ("vacío", "vacío", True),
        ("", "respuesta", False),
    ]


def test_long_pairs_are_cut_between_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset_tsv(write(tmp_path / "a.tsv", "ñññññ\tsí\nno\tññññññ\n"), max_len=9)
    assert [p.prompt.decode() for p in data] == ["ññññ", "no"]
    assert "2 of 2 pairs" in capsys.readouterr().err
    batch = data.collate(data.pairs)
    assert batch.y_in.shape[1] <= 9 and (batch.y_out[1] != PAD).sum() == 9


def test_no_row_held_out_is_trained_on() -> None:
    pairs = [Pair(str(n % 7).encode(), b"x") for n in range(40)]
    for seed in range(9):
        rest, held_out = split_pairs(TSVDataset(pairs, 32), 0.1, seed)
        assert len(held_out) == 1 and len(rest) and not set(rest) & set(held_out)
        assert set(rest) | set(held_out) == set(pairs)


def test_the_preceding_text_of_a_target_is_its_prompt() -> None:
    data = TSVDataset([Pair(b"ab", b"x"), Pair(b"abc", b"x"), Pair(b"y", b"y", lm=True)], 32)
    assert data.collate(data.pairs).preceding_ids.tolist() == [
        [PAD, 97, 98], [97, 98, 99], [PAD, PAD, PAD]
    ]  # fmt: skip


TARGETS = st.text("bé", min_size=1, max_size=31)  # longer ones are cut, and have no end


@given(st.lists(st.tuples(st.text("añ", max_size=30), TARGETS), min_size=1))
def test_every_pair_is_in_one_batch(rows: list[tuple[str, str]]) -> None:
    pairs = [Pair(p.encode(), t.encode()) for p, t in rows]
    data = TSVDataset(pairs, max_len=64)
    seen = []
    n_done = []
    for n, batch in data.batches(lambda: (2, 1), seed=1, epoch=0):
        n_done.append(n)
        decode = ByteTokenizer().decode
        assert batch.prompt_ids.numel() + batch.y_in.numel() <= 2 * 64 or len(batch.y_in) == 1
        for prompt, y_in, y_out in zip(batch.prompt_ids, batch.y_in, batch.y_out, strict=True):
            assert y_in[0] == BOS and y_out[y_out != PAD][-1] == EOS
            seen.append((decode(prompt.tolist()).encode(), decode(y_out.tolist()).encode()))
        assert n == len(seen)
    assert sorted(seen) == sorted((p.prompt, p.target) for p in pairs)
    rest = data.batches(lambda: (2, 1), seed=1, epoch=0, skip=n_done[0])
    assert [n for n, _ in rest] == n_done[1:]


def test_training_and_held_out_rows_are_all_rows(tmp_path: Path) -> None:
    data = dataset_tsv(write(tmp_path / "a.tsv", "".join(f"{i}\tx\n" for i in range(50))))
    kept, held_out = split_pairs(data, 0.2, seed=3)
    assert (len(kept), len(held_out)) == (40, 10)
    assert sorted([*kept, *held_out]) == sorted(data)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(4, None, 0), (5, None, 1), (99, None, 19), (300, None, 50), (1200, None, 60), (99, 0.1, 10)],
)
def test_enough_rows_are_held_out(n: int, fraction: float | None, expected: int) -> None:
    data = TSVDataset([Pair(str(i).encode(), b"x") for i in range(n)], 32)
    assert len(split_pairs(data, fraction, seed=0)[1]) == expected


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\0\1\2" * 50, bytes(range(128, 256)) * 9])
def test_files_that_are_not_text_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(HRMError):
        load_stream([write(tmp_path / "a.txt", data)])
