"""The README keeps its word: its commands and its Python run, the long ones made short."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PAIRS, SMALL, TEXT
from readme import README, with_table

TEXT_OF_README = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT_OF_README, re.M | re.S)
# Setting up is what CI does; two machines are not here.
COMMANDS = [code for kind, code in BLOCKS if kind == "bash" and "pip install" not in code]
COMMANDS = [re.sub(r" +#.*$", "", c, flags=re.M) for c in COMMANDS if "torchrun" not in c]
COMMANDS = list(dict.fromkeys(COMMANDS))  # most stand there in Spanish, too
PYTHON = "\n".join(code for kind, code in BLOCKS if kind == "python")


def test_the_table_of_flags_is_that_of_the_parser() -> None:
    assert with_table(TEXT_OF_README) == TEXT_OF_README, "run: python tests/readme.py"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The files that the README speaks of."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for name in ("corpus.txt", "held_out.txt", "books/a.txt", "book.txt", "cuentos.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    (tmp_path / "old.txt").write_text(TEXT.replace("—", "-"), encoding="latin-1")
    for name in ("data.tsv", "held_out.tsv"):
        (tmp_path / name).write_text(PAIRS, encoding="utf-8")
    (tmp_path / "questions.txt").write_text("12\n7\n", encoding="utf-8")
    shutil.copytree(trained / "checkpoints", tmp_path / "other")
    for name in ("hrm_esp", "tests"):
        (tmp_path / name).symlink_to(README.parent / name)
    return tmp_path


def shortened(code: str) -> str:
    """Two steps instead of minutes, small models, and few bytes."""
    code = re.sub(r"--minutes \S+", "", code)
    code = code.replace("hrm-esp pretrain", f"hrm-esp pretrain --steps 2 {' '.join(SMALL)}")
    code = code.replace("hrm-esp finetune", "hrm-esp finetune --steps 2")
    code = re.sub(r"(hrm-esp (?:pretrain|finetune) .*)$", r"\1 --overwrite", code, flags=re.M)
    code = code.replace("hrm-esp generate", "hrm-esp generate --max_new_tokens 9")
    return code.replace("hrm_esp/samples/cuentos.txt", "corpus.txt").replace(
        "hrm_esp/samples/numeros.held_out.tsv", "held_out.tsv"
    )


@pytest.mark.parametrize("code", COMMANDS, ids=lambda code: code.split("\n")[0][:50])
def test_commands_run(folder: Path, code: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    out = subprocess.run(
        ["bash", "-ec", shortened(code)], cwd=folder, env=os.environ | {"PATH": path},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr


def test_python_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert "epochs=3" in PYTHON
    exec(PYTHON.replace("epochs=3", "steps=2"), {})
    assert "pretrain_best.pt" in capsys.readouterr().out
