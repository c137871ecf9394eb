"""How much of a text stands in the training text."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from conftest import TEXT, Run
from hypothesis import given
from hypothesis import strategies as st
from pytest import MonkeyPatch

from hrm_esp.analysis import copied
from hrm_esp.analysis.copied import LONG_RUN, WINDOW, find_copied, find_runs

WORDS = st.lists(st.sampled_from(["la niña ", "un pájaro ", "y ", "en el jardín, "]), max_size=14)


def longest_run(text: bytes, corpus: bytes, begin: int) -> int:
    end = begin
    while end < len(text) and text[begin : end + 1] in corpus:
        end += 1
    return end - begin


@given(WORDS, WORDS)
def test_runs_are_as_long_as_possible(text: list[str], corpus: list[str]) -> None:
    """Against a search for all parts of the text. The corpus is read in chunks of a few bytes."""
    data, body = "".join(text).encode(), "".join(corpus).encode()
    with MonkeyPatch.context() as patch:
        patch.setattr(copied, "CHUNK_BYTES", 24)
        begins, lengths = find_runs(data, np.frombuffer(body, np.uint8))
    found: dict[int, int] = {}
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        assert length >= WINDOW and data[begin : begin + length] in body
        for i in range(begin, begin + length - WINDOW + 1):
            found[i] = max(found.get(i, 0), begin + length - i)
    expected = {i: n for i in range(len(data)) if (n := longest_run(data, body, i)) >= WINDOW}
    assert found == expected


def test_share_counts_each_byte_once() -> None:
    corpus = np.frombuffer((TEXT + "\n" + TEXT).encode(), np.uint8)
    run = TEXT[100 : 100 + LONG_RUN + 20]
    new = "z" * len(run.encode())
    result = find_copied([run + new, run[:LONG_RUN] + new, new], corpus)
    assert result.longest == run
    n_copied, n_new = len((run + run[:LONG_RUN]).encode()), len(3 * new)
    assert abs(result.share - n_copied / (n_copied + n_new)) < 0.02
    assert find_copied([new], corpus).longest == "" and "no run" in str(find_copied([new], corpus))
    assert find_copied([""], corpus).share == 0


def test_the_command(trained: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoints", tmp_path / "run")
    command = ("generate", "--ckpt", "run/pretrain_best.pt", "--prompt", "La niña", "--seed", 1,
               "--temperature", 0, "--copied")  # fmt: skip
    alone, several = run(*command), run(*command, "--num_samples", 2)
    for out in (alone, several):
        assert out.returncode == 0 and "copied: the longest run has " in out.stderr
    assert alone.stdout == run(*command[:-1]).stdout
    (tmp_path / "run" / "corpus.tokens").unlink()
    out = run(*command)
    assert out.returncode == 2 and "--copied needs run/corpus.tokens" in out.stderr
    assert not out.stdout
