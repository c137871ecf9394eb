from pathlib import Path
from typing import IO

import pytest
import torch
from conftest import CONFIG, TEXT, damaged

from hrm_esp.counts import NgramCounts
from hrm_esp.data import load_stream
from hrm_esp.files import mapped, remove_partial, written_whole


def test_a_damaged_token_file_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    path = tmp_path / "run" / "a.tokens"
    expected = load_stream([tmp_path / "a.txt"], token_file=path).tobytes()
    good = path.read_bytes()
    for broken in damaged(good, 100):
        path.write_bytes(broken)
        assert load_stream([tmp_path / "a.txt"], token_file=path).tobytes() == expected
        assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_table_of_counts_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:2000], encoding="utf-8")
    stream, path = load_stream([tmp_path / "a.txt"]), tmp_path / "ngrams.counts"
    alone = NgramCounts(CONFIG)
    alone.count(stream)
    NgramCounts(CONFIG).count(stream, path)
    for broken in damaged(path.read_bytes(), 100):
        path.write_bytes(broken)
        kept = NgramCounts(CONFIG)
        kept.count(stream, path)
        assert torch.equal(kept.entries, alone.entries)
        assert torch.equal(kept.cumulative, alone.cumulative)
    kept.count(stream[:1000], path)
    assert len(kept.entries) < len(alone.entries)


def test_a_mapped_file_is_written_once_for_each_key(tmp_path: Path) -> None:
    made: list[str] = []

    def get(key: str) -> bytes:
        def write(file: IO[bytes]) -> None:
            made.append(key)
            file.write(key.encode() * 3)

        return mapped(tmp_path / "run" / "a", key, write).tobytes()

    assert [get(key) for key in "xxyyx"] == [b"xxx", b"xxx", b"yyy", b"yyy", b"xxx"]
    assert made == ["x", "y", "x"]
    # What is written to the array is not written to the file.
    array = mapped(tmp_path / "run" / "a", "x", lambda _: None)
    array[0] = 0
    assert get("x") == b"xxx"


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / ".a.12345678.partial").touch()  # of a process that was killed
    (tmp_path / ".b.12345678.partial").touch()  # of another run
    remove_partial(tmp_path, "a.", "c.")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.12345678.partial", "a"]


def test_files_have_the_permissions_of_any_other(tmp_path: Path) -> None:
    with written_whole(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
