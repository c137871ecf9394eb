"""Runs whose display goes away, whose folder is in use, that are stopped for a while or diverge."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from conftest import SMALL, TEXT, Run, set_flags

from hrm_esp import cli
from hrm_esp.training.clock import MAX_GAP, RunningClock

SHORT = ["pretrain", "corpus.txt", "--steps", "8", "--batch_size", "2", *SMALL]
LONG = ["pretrain", "corpus.txt", "--minutes", "9", *SMALL, *set_flags(save_every=9)]
REAL = [sys.executable, "-m", "hrm_esp"]


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    (tmp_path / "corpus.txt").write_bytes((trained / "corpus.txt").read_bytes())
    return tmp_path


def logged_steps(folder: Path) -> list[int]:
    lines = (folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def is_complete(folder: Path) -> bool:
    files = {path.name for path in (folder / "checkpoints").iterdir()}
    expected = {f"pretrain_{name}.pt" for name in ("best", "last", "state")}
    return expected <= files and logged_steps(folder)[-1] == 8


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full"])
def test_a_run_without_standard_streams(
    folder: Path, hrm_esp_command: list[str], closed: str
) -> None:
    out = subprocess.run(
        ["bash", "-c", f'exec "$@" {closed}', "bash", *hrm_esp_command, *SHORT],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0 and "Traceback" not in out.stderr, out.stderr
    assert is_complete(folder)


@pytest.mark.parametrize("display", ["pipe", "terminal"])
def test_a_run_whose_display_goes_away(
    folder: Path, hrm_esp_command: list[str], display: str
) -> None:
    """It goes on, and its end is the same."""
    ours, theirs = os.pipe() if display == "pipe" else pty.openpty()
    with subprocess.Popen(
        [*hrm_esp_command, *SHORT], cwd=folder, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
    assert process.returncode == 0 and is_complete(folder)


def test_output_that_is_not_utf8(folder: Path, run: Run) -> None:
    out = run(*SHORT, "--out_dir", "mi año", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert out.returncode == 0 and out.stdout.endswith("mi año/pretrain_best.pt\n"), out.stderr


def test_stdout_of_a_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no encoding to set."""
    monkeypatch.chdir(folder)
    with redirect_stdout(io.StringIO()) as shown:
        assert cli.main(SHORT) == 0
    assert shown.getvalue().endswith("pretrain_best.pt\n")


def test_help_for_a_closed_pipe() -> None:
    command = f"{sys.executable} -m hrm_esp pretrain --help | true"
    out = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True)
    assert out.returncode == 0 and not out.stderr


def test_one_run_per_folder(folder: Path, run: Run) -> None:
    """From its beginning on, and no longer than its process."""
    with subprocess.Popen([*REAL, *LONG], cwd=folder, stderr=subprocess.DEVNULL) as process:
        try:
            while not (folder / "checkpoints").exists():
                time.sleep(0.02)
            for other in (SHORT, [*SHORT, "--overwrite"], ["finetune", "--ckpt", "none.pt"]):
                out = run(*other)
                assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
                assert "another run is writing to checkpoints" in out.stderr
        finally:
            process.kill()
    out = run(*SHORT, "--overwrite")
    assert out.returncode == 0 and is_complete(folder), out.stderr


def test_a_folder_without_a_run_is_not_left(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert run("pretrain", "empty.txt").returncode == 2 and not (tmp_path / "checkpoints").exists()


def test_counting_is_announced_and_interrupted(folder: Path) -> None:
    """The same command begins to count again, with the text that it has read."""
    (folder / "corpus.txt").write_text("\n".join([TEXT] * (12 * 10**6 // len(TEXT.encode()))))
    files = folder / "checkpoints"
    read_at = set()
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            [*REAL, *SHORT], cwd=folder, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            assert "counting n-grams of 11 MB\n" in iter(process.stderr.readline, "")
            process.send_signal(number)
            *_, line = process.stderr.read().splitlines()
        assert process.returncode == 130
        assert line.startswith("interrupted while counting n-grams: nothing was trained; run")
        assert [path.name for path in files.iterdir()] == ["corpus.tokens"]
        read_at.add((files / "corpus.tokens").stat().st_mtime_ns)
    assert len(read_at) == 1


@pytest.mark.parametrize("val", [0.05, 0])
def test_a_run_that_diverges(folder: Path, run: Run, val: float) -> None:
    """It is an error, and leaves the files of an older run."""
    assert run(*SHORT).returncode == 0
    before = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}
    args = (*SHORT, "--steps", "40", "--lr", "100", "--overwrite", *set_flags(val_fraction=val))
    out = run(*args)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    (error,) = (line for line in out.stderr.splitlines() if line.startswith("hrm-esp: error:"))
    assert "diverged" in error and "--lr" in error
    assert before == {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}


@pytest.mark.parametrize(
    "leftovers",
    [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "many", "RANK": "0"}, {"WORLD_SIZE": "4", "RANK": "1"}],
)
def test_variables_of_a_cluster(folder: Path, run: Run, leftovers: dict[str, str]) -> None:
    out = run(*SHORT, env=os.environ | leftovers)
    assert out.returncode == 0 and out.stdout.endswith("pretrain_best.pt\n"), out.stderr


def test_time_in_which_a_run_is_stopped_does_not_count(folder: Path) -> None:
    minutes, stopped = 0.04, 2.0
    args = ["pretrain", "corpus.txt", "--minutes", str(minutes), *SMALL]
    with subprocess.Popen(
        [*REAL, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        while not (folder / "checkpoints" / "metrics.jsonl").exists():
            time.sleep(0.02)
        begin = time.perf_counter()
        process.send_signal(signal.SIGSTOP)
        time.sleep(stopped)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate()
        seconds = time.perf_counter() - begin - stopped
    assert process.returncode == 0 and seconds > 60 * minutes - 0.5, output
    last = json.loads((folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] < seconds


def test_a_clock_counts_what_it_does_not_see() -> None:
    """It counts also while nobody asks for the time."""
    begin = time.perf_counter()
    with RunningClock(100.0) as clock:
        time.sleep(MAX_GAP + 0.3)
        assert clock.seconds() == pytest.approx(100 + time.perf_counter() - begin, abs=0.1)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["pretrain", "--", "--muy-raro.txt"], "no such file: --muy-raro.txt"),
        (["generate", "--prompt", "-Hola"], "--prompt=VALUE"),
        (["generate", "La casa"], "--prompt 'La casa'"),
        (["generate", "--temprature", "3"], "generate --help"),
    ],
)
def test_words_that_are_no_flags(run: Run, words: list[str], advice: str) -> None:
    out = run(*words)
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and advice in out.stderr


def test_the_command_to_resume_works(folder: Path) -> None:
    """With a file whose name begins with dashes, too."""
    (folder / "corpus.txt").rename(folder / "--a.txt")
    args = [*LONG[2:], "--overwrite", "--", "--a.txt"]
    with subprocess.Popen(
        [*REAL, "pretrain", *args], cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        while not (folder / "checkpoints" / "metrics.jsonl").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        line = process.stderr.read().splitlines()[-1]
    assert process.returncode == 130
    command = line.removeprefix("saved: continue with hrm-esp ").replace("9", "0.001", 1)
    out = subprocess.run([*REAL, *command.split()], cwd=folder, capture_output=True, text=True)
    assert "minutes changed" in out.stderr and out.returncode == 2, out.stderr
