from pathlib import Path
from typing import IO

import pytest
import torch
from conftest import TEXT, broken_copies

from hrm_esp.data import load_stream
from hrm_esp.files import atomic_write, mmap_cached, remove_partial_files
from hrm_esp.ngrams import NgramTable


def test_a_damaged_token_file_is_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    path = tmp_path / "run" / "a.tokens"
    expected = load_stream([tmp_path / "a.txt"], token_file=path).tobytes()
    good = path.read_bytes()
    for broken in broken_copies(good, 100):
        path.write_bytes(broken)
        assert load_stream([tmp_path / "a.txt"], token_file=path).tobytes() == expected
        assert path.read_bytes() == good
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_ngram_table_is_rebuilt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:2000], encoding="utf-8")
    stream, path = load_stream([tmp_path / "a.txt"]), tmp_path / "ngrams.counts"
    expected = NgramTable([2, 3, 4])
    expected.build(stream)
    NgramTable([2, 3, 4]).build(stream, path)
    for broken in broken_copies(path.read_bytes(), 100):
        path.write_bytes(broken)
        table = NgramTable([2, 3, 4])
        table.build(stream, path)
        assert torch.equal(table.entries, expected.entries)
        assert table.min_count == expected.min_count
    table.build(stream[:1000], path)
    assert len(table.entries) < len(expected.entries)


def test_a_cached_file_is_written_once_per_key(tmp_path: Path) -> None:
    made: list[str] = []

    def get(key: str) -> bytes:
        def write(file: IO[bytes]) -> None:
            made.append(key)
            file.write(key.encode() * 3)

        return mmap_cached(tmp_path / "run" / "a", key, write).tobytes()

    assert [get(key) for key in "xxyyx"] == [b"xxx", b"xxx", b"yyy", b"yyy", b"xxx"]
    assert made == ["x", "y", "x"]
    # What is written to the array is not written to the file.
    array = mmap_cached(tmp_path / "run" / "a", "x", lambda _: None)
    array[0] = 0
    assert get("x") == b"xxx"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / ".a.12345678.partial").touch()  # of a process that was killed
    (tmp_path / ".b.12345678.partial").touch()  # of another run
    remove_partial_files(tmp_path, "a.", "c.")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.12345678.partial", "a"]


def test_files_have_default_permissions(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a"):
        pass
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
