"""Shared by the tests: the real command, and small models without zero weights."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker on each core

import numpy as np
import pytest
import torch
from hypothesis import settings

from hrm_esp.config import HRMConfig
from hrm_esp.model import HRMModel
from hrm_esp.tokenizer import BOS, VOCAB_SIZE

# Under nohup the commands that tests start would ignore SIGHUP; a handler is not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

settings.register_profile("any machine", deadline=None)  # a slow one is no failure
settings.load_profile("any machine")

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--d_model", "32", "--n_heads", "2", "--n_layers_enc", "1", "--n_layers_dec", "2",
         "--plan_dim", "16", "--n_plan_codes", "8", "--max_len", "64",
         "--set", "recent_len=64")  # fmt: skip
CONFIG = HRMConfig(
    d_model=32,
    n_heads=2,
    n_layers_enc=1,
    n_layers_dec=2,
    plan_dim=16,
    n_plan_codes=8,
    max_len=32,
    recent_len=64,
)

TEXT = "\n".join(
    f"La niña {verb} {noun} en el jardín, ¿verdad? —Sí —dijo él{end}"
    for verb in ("miró", "buscó", "pintó", "guardó", "encontró")
    for noun in ("una piña", "el sombrero", "un pájaro", "la canción", "los años")
    for end in (".", " otra vez.", ", y se durmió.")
)
LETTERS = (97, 101)
PAIRS = "\n".join(f"{n}\t{'par' if n % 2 == 0 else 'impar'}" for n in range(60))


def random_model(seed: int = 0, **changes: object) -> HRMModel:
    """A model in evaluation mode whose weights are all random: zeros would hide mistakes."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = HRMModel(replace(CONFIG, **changes))  # type: ignore[arg-type]
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        if model.executor.ngrams is not None and model.executor.from_ngrams is not None:
            # The logarithms of counts are large: they would hide all else that the network reads.
            model.executor.from_ngrams.weight[:, VOCAB_SIZE:] *= 0.1
            letters = torch.randint(LETTERS[0], LETTERS[1], (400,)).numpy().astype(np.uint8)
            letters[::50] = 10
            model.executor.ngrams.build(letters)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """BOS and random letters, so few that most n-grams are in the table of `random_model`."""
    ids = torch.randint(*LETTERS, shape, generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def broken_copies(data: bytes, n: int) -> list[bytes]:
    """Copies that are cut anywhere, or have a bit flipped anywhere."""
    chance, found = random.Random(0), []
    for i in range(n):
        broken = bytearray(data)
        if i % 2:
            broken[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del broken[chance.randrange(len(data)) :]
        found.append(bytes(broken))
    return found


def set_flags(**values: object) -> list[str]:
    """``--set name=value`` for each value."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """``python``, with torch imported already; see command_server.py. Signals do not reach it."""
    tests, address = Path(__file__).parent, str(tmp_path_factory.mktemp("server") / "socket")
    with subprocess.Popen(
        [sys.executable, tests / "command_server.py", address], stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        yield [sys.executable, "-SE", str(tests / "command_client.py"), address]
        server.kill()


@pytest.fixture(scope="session")
def hrm_esp_command(python: list[str]) -> list[str]:
    """``hrm-esp``, likewise."""
    return [*python, "-m", "hrm_esp"]


@pytest.fixture
def run(tmp_path: Path, hrm_esp_command: list[str]) -> Run:
    """Runs ``hrm-esp`` in a process of its own, in an empty folder."""

    def run(*args: object, cwd: Path = tmp_path, **keywords: object) -> Any:
        command = hrm_esp_command
        if not {"input", "stdin"} & keywords.keys():
            keywords["stdin"] = subprocess.DEVNULL  # what comes through a pipe is read
        if "preexec_fn" in keywords:  # of a process of its own
            command = [sys.executable, "-m", "hrm_esp"]
        return subprocess.run(
            [*command, *map(str, args)], cwd=cwd, capture_output=True, text=True,
            encoding="utf-8", timeout=240, **keywords,
        )  # type: ignore[call-overload]  # fmt: skip

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, hrm_esp_command: list[str]) -> Path:
    """A folder with ``corpus.txt``, ``pairs.tsv`` and ``checkpoints`` of both stages, made by the
    command."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (folder / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    for args in (
        ("pretrain", "corpus.txt", "--steps", "40", "--batch_size", "4", *SMALL),
        ("finetune", "pairs.tsv", "--steps", "10"),
    ):
        subprocess.run([*hrm_esp_command, *args], cwd=folder, check=True)
    return folder
