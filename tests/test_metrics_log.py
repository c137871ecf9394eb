"""The log of a run, whatever its file holds."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, Run
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp.analysis.plot import read_runs
from hrm_esp.errors import HRMError
from hrm_esp.json_lines import to_json
from hrm_esp.training.metrics_log import MetricsLog
from hrm_esp.training.state import RunState

FOREIGN = [
    b"\xff\xfe stray bytes \x00",
    b"17",
    b"[1, 2]",
    b'"text"',
    b"null",
    b"not JSON at all",
    b'{"stage": "pretrain"}',
    b'{"step": 3}',
    b'{"stage": ["pretrain"], "step": 3}',
    b'{"stage": "pretrain", "step": "3"}',
    b'{"stage": "pretrain", "step": true}',
    b'{"stage": "pretrain", "step": NaN}',
    b"[" * 100_000,
    b"1" * 5000,
    b'{"stage": "pretrain", "step": 2, "train_b',
]
NUMBERS = st.floats() | st.integers() | st.sampled_from([10**400, -(10**30), 1e308, -1e308])
VALUES = NUMBERS | st.none() | st.booleans() | st.text() | st.lists(st.none(), max_size=1)
NAMES = ["train_bpb", "val_bpb", "lr", "bytes_per_second", "code_perplexity", "bytes_seen"]
ENTRIES = st.builds(
    lambda stage, step, values: {"stage": stage, "step": step, **values},
    st.sampled_from(["pretrain", "finetune", "other"]),
    st.integers(0, 9),
    st.dictionaries(st.sampled_from([*NAMES, "seconds"]), VALUES),
)
LINES = st.lists(
    st.sampled_from(FOREIGN)
    | st.binary().map(lambda line: line.replace(b"\n", b""))
    | ENTRIES.map(lambda entry: json.dumps(entry).encode())
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@given(LINES, st.sampled_from([b"", b"\n"]))
def test_what_is_no_entry_stays_where_it_is(folder: Path, lines: list[bytes], end: bytes) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    log = MetricsLog(folder, "pretrain", 5)
    log.add(RunState(step=6), train_bpb=math.nan, lr=0.1)
    *kept, added, rest = path.read_bytes().split(b"\n")
    of_run = {
        json.dumps({"stage": "pretrain", "step": step})[:-1].encode() for step in range(6, 10)
    }
    stay = [line for line in lines if not line.startswith(tuple(of_run))]
    assert list(filter(None, kept)) == list(filter(None, stay))
    assert json.loads(added)["train_bpb"] is None and not rest
    for run in read_runs([str(folder)]):  # what is drawn
        for y in NAMES:
            for values in run.curve("seconds", y):
                assert all(type(v) is float and math.isfinite(v) for v in values)


def test_a_run_goes_on_whatever_the_log_holds(trained: Path, run: Run, tmp_path: Path) -> None:
    """And its curves are drawn."""
    shutil.copytree(trained / "checkpoints", tmp_path / "r")
    log = tmp_path / "r" / "metrics.jsonl"
    log.write_bytes(b"\n".join([*FOREIGN[:7], *log.read_bytes().splitlines(), *FOREIGN[7:]]))
    out = run(
        "pretrain", trained / "corpus.txt", "--steps", "40", "--batch_size", "4", *SMALL,
        "--out_dir", "r", "--resume",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stderr.count(f"metrics.jsonl: {len(FOREIGN)} lines are not entries: skipped") == 1
    assert log.read_bytes().splitlines()[:7] == FOREIGN[:7]
    with open(log, "ab") as file:
        for bad in (
            '"train_bpb": NaN, "seconds": Infinity',
            '"lr": 1e999, "seconds": "2"',
            f'"val_bpb": {10**400}, "seconds": -1, "bytes_seen": null',
        ):
            file.write(f'{{"stage": "a$b$c^{{", "step": 1, {bad}}}\n'.encode())
    out = run("plot", "r")
    assert out.returncode == 0, out.stderr
    assert out.stderr == f"r/metrics.jsonl: {len(FOREIGN)} lines are not entries: skipped\n"


def test_a_log_that_is_no_file_is_a_warning(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Una línea.\nOtra línea.\n" * 40, encoding="utf-8")
    (tmp_path / "r" / "metrics.jsonl").mkdir(parents=True)
    out = run("pretrain", "text.txt", "--steps", "2", "--out_dir", "r", *SMALL)
    assert out.returncode == 0 and "metrics.jsonl" in out.stderr, out.stderr
    assert (tmp_path / "r" / "pretrain_best.pt").is_file()
    out = run("plot", "r")
    assert out.returncode == 2 and out.stderr.count("\n") == 1


@given(st.recursive(VALUES, lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_json_has_no_nan(value: object) -> None:
    try:
        line = to_json(value)
    except ValueError:  # an integer of more digits than Python writes
        return

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(line, parse_constant=refuse)


def test_no_device_is_read_as_a_log() -> None:
    """Some have no end; this one is empty."""
    with pytest.raises(HRMError, match="no log of a run"):
        read_runs([os.devnull])
