"""Two processes that communicate through gloo. Where signals matter, torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT, set_flags
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp.data import WHOLE, LMDataset, Pair, Shard, TSVDataset
from hrm_esp.distributed import require_one_gpu_each
from hrm_esp.errors import HRMError
from hrm_esp.tokenizer import PAD
from hrm_esp.training.checkpoint import load_checkpoint

STREAM = np.frombuffer((TEXT + "\n").encode(), dtype=np.uint8)
WORDS = TSVDataset([Pair(w.encode(), w[::-1].encode()) for w in TEXT.split()[:70]], 32)
# Runs the command, and writes each step's loss and norm of the gradient beside the checkpoints.
RECORD = """\
import json, sys
from pathlib import Path
from hrm_esp import cli
from hrm_esp.training import Trainer
steps, train_step, finish = [], Trainer.train_step, Trainer.finish
def recorded_step(trainer, *batches):
    step = train_step(trainer, *batches)
    steps.append((step.nll / max(1, step.n_logged), step.grad_norm))
    return step
def recorded_finish(trainer, log):
    finish(trainer, log)
    (trainer.folder.root / "steps.json").write_text(json.dumps(steps))
Trainer.train_step, Trainer.finish = recorded_step, recorded_finish
status = cli.main()
running = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in running)  # such a thread may abort the exit
sys.exit(status)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "corpus.txt"


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.9]))
@settings(max_examples=20)
def test_the_shards_of_a_batch_are_the_batch(n: int, size: int, epoch: int, denoise: float) -> None:
    """Each row is in one of them."""
    for data in (WORDS, LMDataset(STREAM, 32, denoise=denoise)):
        whole, *parts = (
            list(data.batches(lambda: (size, 1), 0, epoch, shard=shard))
            for shard in (WHOLE, *(Shard(i, n) for i in range(n)))
        )
        for (behind, batch), *shares in zip(whole, *parts, strict=True):
            assert all(b == behind for b, _ in shares)
            rows = [r for _, share in shares for r in share.y_out]
            given_rows = sorted(r[r != PAD].tolist() for r in rows if (r != PAD).any())
            assert given_rows == sorted(r[r != PAD].tolist() for r in batch.y_out)


def run_ranks(n: int, argv: list[str], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """Runs a command in n processes of one group, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            argv, cwd=cwd, env=os.environ | group | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(n)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in processes]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *output)
        for p, output in zip(processes, outputs, strict=True)
    ]


def recorded(python: list[str], n: int, folder: Path, *args: object) -> np.ndarray:
    """Trains in n processes; the loss and the norm of the gradient of each step, (steps, 2)."""
    script = folder.parent / "record.py"
    ranks = run_ranks(n, [*python, *map(str, (script, *args, "--out_dir", folder))], folder.parent)
    for out in ranks:
        assert out.returncode == 0, out.stderr
    assert "held out" in ranks[0].stdout
    assert not any(out.stdout for out in ranks[1:])  # one process alone speaks
    return np.array(json.loads((folder / "steps.json").read_text()))


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-2)])
def test_two_processes_are_one_with_twice_the_batch(
    python: list[str], corpus: Path, optimizer: str, tolerance: float
) -> None:
    """Without noise: in their losses, and in the gradients of text and of text restored."""
    flags = (*SMALL, "--no_gumbel", "--steps", 20, *set_flags(
        precision="fp32", optimizer=optimizer, denoise=0.3, grad_accum=2
    ))  # fmt: skip
    one, two = (
        recorded(
            python, n, corpus.parent / str(n), "pretrain", corpus, *flags, "--batch_size", 8 // n
        )
        for n in (1, 2)
    )
    assert len(one) == 20
    np.testing.assert_allclose(one[:, 0], two[:, 0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(one[:, 1], two[:, 1], rtol=100 * tolerance)
    saved = [load_checkpoint(corpus.parent / str(n) / "pretrain_last.pt") for n in (1, 2)]
    assert saved[0].bytes_seen == saved[1].bytes_seen


def test_two_processes_finetune_as_one_does(python: list[str], corpus: Path, trained: Path) -> None:
    given = ("finetune", trained / "pairs.tsv", "--ckpt", trained / "checkpoints/pretrain_last.pt",
             "--dropout", "0", "--no_gumbel", "--steps", 8)  # fmt: skip
    flags = set_flags(precision="fp32", optimizer="adamw")
    one, two = (
        recorded(python, n, corpus.parent / str(n), *given, *flags, "--batch_size", 4 // n)
        for n in (1, 2)
    )
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


def test_processes_with_other_data_are_told_so(python: list[str], corpus: Path) -> None:
    """Else each would wait for the other."""
    (corpus.parent / "0.txt").write_text(TEXT, encoding="utf-8")
    (corpus.parent / "1.txt").write_text(TEXT[:1500], encoding="utf-8")
    script = corpus.parent / "other.py"
    script.write_text(
        "import os, sys\nfrom hrm_esp import cli\nrank = os.environ['RANK']\n"
        "sys.exit(cli.main([*sys.argv[1:], rank + '.txt', '--out_dir', 'run' + rank]))"
    )
    ranks = run_ranks(2, [*python, str(script), "pretrain", *SMALL, "--epochs", "1"], corpus.parent)
    error = "hrm-esp: error: the processes of this run do not have the same data"
    assert any(error in out.stderr for out in ranks)


def pretrain(folder: Path, *args: object) -> list[str]:
    flags = (*SMALL, "--steps", 40, "--batch_size", 2, "--set", "save_every=0.005", *args)
    words = ("-m", "hrm_esp", "pretrain", folder.parent / "corpus.txt", *flags, "--out_dir", folder)
    return [*map(str, words)]


def torchrun(argv: list[str]) -> "subprocess.Popen[str]":
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*start, *argv], text=True, stderr=subprocess.PIPE)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


def test_stopped_by_the_cluster_and_resumed_it_is_the_same(python: list[str], corpus: Path) -> None:
    whole, part = corpus.parent / "whole", corpus.parent / "part"
    process = torchrun(pretrain(part))
    wait_for(part / "pretrain_state.pt", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert "--resume" in stderr
    assert 0 < load_checkpoint(part / "pretrain_state.pt").step < 40
    for argv in (pretrain(whole), pretrain(part, "--resume")):
        assert not any(out.returncode for out in run_ranks(2, [*python, *argv], corpus.parent))
    one, other = (load_checkpoint(f / "pretrain_last.pt").weights for f in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_process_that_dies_ends_the_run_and_loses_nothing(
    python: list[str], corpus: Path
) -> None:
    """It goes on with another number of processes: one."""
    folder = corpus.parent / "run"
    process = torchrun(pretrain(folder, "--set", "save_every=60"))
    wait_for(folder / "pretrain_best.pt", process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    second = next(
        pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(int(second), signal.SIGKILL)
    _, stderr = process.communicate()
    assert process.returncode != 0
    errors = [line for line in stderr.splitlines() if line.startswith("hrm-esp: error: ")]
    assert len(errors) == 1 and "--resume" in errors[0], stderr
    saved = load_checkpoint(folder / "pretrain_state.pt")
    assert 0 < saved.step < 40
    (out,) = run_ranks(1, [*python, *pretrain(folder, "--resume")], corpus.parent)
    assert out.returncode == 0, out.stderr
    assert load_checkpoint(folder / "pretrain_last.pt").step == 40


def test_processes_that_would_share_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses them with an error that reads as if a process had gone."""
    variables = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for name, value in {**variables, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    for n_gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n_gpus: n)
        refused = pytest.raises(HRMError, match="2 processes on this machine, but 1 GPU:")
        with refused if n_gpus < 2 else nullcontext():
            require_one_gpu_each(torch.device("cuda", 0))
        require_one_gpu_each(torch.device("cpu"))
