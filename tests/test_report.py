"""Statistics and warnings about a corpus, compared with counting by hand."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, TEXT, Run
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.data import CorpusStats, corpus_stats, report

LINES = [line for line in TEXT.split("\n") for _ in (0, 1)]
BOOK = "\n\n".join(textwrap.fill(" ".join(LINES[i : i + 9]), 70) for i in range(0, len(LINES), 6))


def stream(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=1, max_size=30), st.integers(1, 9))
def test_documents_are_counted_in_chunks_of_any_size(lines: list[str], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "CHUNK_BYTES", chunk)
        found = corpus_stats(stream("\n".join(lines) + "\n"))
    lengths = sorted(map(len, lines))
    assert (found.documents, found.longest) == (len(lines), lengths[-1])
    assert found.median == lengths[(len(lines) - 1) // 2]


def warned(text: str, n_parameters: int = 100) -> set[str]:
    lines = corpus_stats(stream(text)).warnings(n_parameters)
    return {word for line in lines for word in line.split()}


def test_warnings_name_the_flag_that_helps() -> None:
    assert not warned(TEXT)
    assert "--sep" in warned(BOOK.replace("\n\n", "\n"))
    assert "copies" in warned(TEXT + "\n" + TEXT)
    assert "--encoding" in warned("The quick brown fox jumps over the lazy dog.\n" * 9)
    assert {"tiny", "more"} < warned(TEXT, 10**7)  # too little for any size
    assert {"tiny,", "or"} < warned(TEXT * 30, 10**7)
    assert {"small,", "or"} < warned(TEXT * 200, 10**8)
    assert {"little", "more"} < warned(TEXT, 10**6) and "--size" not in warned(TEXT, 10**6)  # tiny


def test_a_smaller_size_is_named_only_if_there_is_one(run: Run, tmp_path: Path) -> None:
    """Not to a tiny model, whatever its other dimensions are, nor to that of a checkpoint."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXT.upper(), encoding="utf-8")
    few = ("--steps", "1", "--max_len", "64")
    for args, is_advised in (
        (("a.txt", "--size", "tiny", "--n_plan_codes", "64", *few), False),
        (("b.txt", "--ckpt", "checkpoints", "--steps", "1", "--out_dir", "b"), False),
        (("a.txt", *few, "--out_dir", "c"), True),
    ):
        out = run("pretrain", *args)
        assert out.returncode == 0 and "warning: little text for" in out.stderr, out.stderr
        assert ("--size tiny" in out.stderr) == is_advised, out.stderr


@pytest.mark.parametrize("n_bytes", [0, 500, 2047, 2048])
def test_a_score_that_means_nothing_is_announced(run: Run, tmp_path: Path, n_bytes: int) -> None:
    """Held out are so many bytes of another text, or the end of a small one."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "val.txt").write_text("x" * (n_bytes - 1), encoding="utf-8")
    val = ("--val", "val.txt") if n_bytes else ()
    out = run("pretrain", "a.txt", "--steps", "1", *SMALL, *val)
    assert out.returncode == 0, out.stderr
    warned = [x for x in out.stderr.splitlines() if "held-out bytes" in x]
    assert len(warned) == (n_bytes < 2048) and all("--val" in x for x in warned), out.stderr
    if not n_bytes:
        again = run("pretrain", "a.txt", "--steps", "1", *SMALL, "--overwrite",
                    "--set", "val_fraction=0")  # fmt: skip
        assert again.returncode == 0 and "held-out bytes" not in again.stderr


def test_an_empty_corpus_has_statistics() -> None:
    assert isinstance(corpus_stats(stream("\n")), CorpusStats)


def test_a_book_with_wrapped_lines(run: Run, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(BOOK, encoding="utf-8")
    args = ("pretrain", "book.txt", "--steps", "2", *SMALL, "--out_dir")
    wrapped = run(*args, "lines").stderr
    whole = run(*args, "paragraphs", "--sep", "blank", "--set", "sample_prompt=La niña")
    assert "--sep blank" in wrapped and "--sep blank" not in whole.stderr
    n = BOOK.count("\n\n") + 1
    assert whole.returncode == 0 and "\nsample: La niña" in whole.stderr
    lines = whole.stderr.splitlines()
    assert lines[0].startswith("corpus: ") and lines[1].startswith("held out: ")
    said = int(lines[0].split()[1].replace(",", ""))
    assert 0.9 * n < said < n  # without what is held out
    score = run("evaluate", "book.txt", "--sep", "blank", "--ckpt", "paragraphs/pretrain_best.pt")
    assert "bits per byte" in score.stdout
