"""Many processes, as torchrun starts them: really two, that talk through gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp.checkpoint import load_checkpoint
from hrm_esp.data import ALL, LMDataset, Pair, Shard, TSVDataset
from hrm_esp.tokenizer import PAD

STREAM = np.frombuffer((TEXT + "\n").encode(), dtype=np.uint8)
WORDS = TSVDataset([Pair(w.encode(), w[::-1].encode()) for w in TEXT.split()[:70]], 32)
# Runs the command, and writes the loss of each step beside the checkpoints.
RECORD = """\
import json, sys
from pathlib import Path
from hrm_esp import cli
from hrm_esp.trainer import Trainer
steps, lead = [], Trainer.lead
def recorded(trainer, given):
    lead(trainer, (steps.append(s.nats / max(1, s.shown)) or s for s in given))
    (trainer.folder / "losses.json").write_text(json.dumps(steps))
Trainer.lead = recorded
sys.exit(cli.main())
"""


def command(n_processes: int, *args: object) -> list[str]:
    start = [sys.executable]
    if n_processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return [*start, *map(str, args)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "corpus.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "corpus.txt"


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.sampled_from([0.0, 0.9]))
@settings(max_examples=20, deadline=None)
def test_the_shards_of_a_batch_are_the_batch(n: int, size: int, epoch: int, denoise: float) -> None:
    """Each row is in one of them."""
    for data in (WORDS, LMDataset(STREAM, 32, denoise=denoise)):
        whole, *parts = (
            list(data.batches(lambda: (size, 1), 0, epoch, shard=shard))
            for shard in (ALL, *(Shard(i, n) for i in range(n)))
        )
        for (behind, batch), *shares in zip(whole, *parts, strict=True):
            assert all(b == behind for b, _ in shares)
            rows = [r for _, share in shares for r in share.y_out]
            given_rows = sorted(r[r != PAD].tolist() for r in rows if (r != PAD).any())
            assert given_rows == sorted(r[r != PAD].tolist() for r in batch.y_out)


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-2)])
def test_two_processes_are_one_with_twice_the_batch(
    corpus: Path, optimizer: str, tolerance: float
) -> None:
    flags = (*SMALL, "--no_gumbel", "--ngram_dropout", "0", "--count_max", "0", "--precision",
             "fp32", "--steps", 50, "--optimizer", optimizer)  # fmt: skip
    losses, steps = [], []
    for n, batch_size in ((1, 8), (2, 4)):
        folder = corpus.parent / str(n)
        args = ("pretrain", corpus, *flags, "--batch_size", batch_size, "--out_dir", folder)
        out = subprocess.run(
            command(n, corpus.parent / "record.py", *args), text=True,
            capture_output=True,
        )  # fmt: skip
        assert out.returncode == 0, out.stderr
        assert out.stdout.count("held out") == 1  # one process alone speaks
        losses.append(json.loads((folder / "losses.json").read_text()))
        steps.append(load_checkpoint(folder / "pretrain_last.pt"))
    assert len(losses[0]) == 50 and np.ptp(losses[0]) > 0.5
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=tolerance)
    assert steps[0].bytes_seen == steps[1].bytes_seen


def start(folder: Path, *args: object) -> "subprocess.Popen[str]":
    flags = (*SMALL, "--steps", 60, "--batch_size", 2, "--save_every", 0.005, *args)
    return subprocess.Popen(
        command(2, "-m", "hrm_esp", "pretrain", folder.parent / "corpus.txt", *flags,
                "--out_dir", folder), text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


def test_stopped_by_the_cluster_and_resumed_it_is_the_same(corpus: Path) -> None:
    whole, part = corpus.parent / "whole", corpus.parent / "part"
    assert start(whole).wait() == 0
    process = start(part)
    wait_for(part / "pretrain_state.pt", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert "--resume" in stderr
    assert 0 < load_checkpoint(part / "pretrain_state.pt").step < 60
    assert start(part, "--resume").wait() == 0
    one, other = (load_checkpoint(f / "pretrain_last.pt").weights for f in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_process_that_dies_ends_the_run_and_loses_nothing(corpus: Path) -> None:
    """It goes on with another number of processes: one."""
    folder = corpus.parent / "run"
    process = start(folder, "--save_every", 60)
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
    assert 0 < saved.step < 60
    out = subprocess.run(
        command(1, "-m", "hrm_esp", "pretrain", corpus, *SMALL, "--steps", 60, "--batch_size", 2,
                "--out_dir", folder, "--resume"), text=True, capture_output=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert load_checkpoint(folder / "pretrain_last.pt").step == 60
