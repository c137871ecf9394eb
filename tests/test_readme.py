"""The documents keep their word: commands and Python run (shortened), and both READMEs agree."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import flags
import pytest
from conftest import PAIRS, SMALL, TEXT

ROOT = Path(__file__).parent.parent
README, SPANISH, GUIDE = (ROOT / name for name in ("README.md", "README.es.md", "docs/guide.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
SPANISH_NAMES = {
    "carta.txt": "letter.txt",
    "corregida.txt": "restored.txt",
    "poema.txt": "poem.txt",
    "reservado.txt": "held_out.txt",
    "datos.csv": "data.csv",
    "preguntas.csv": "questions.csv",
    "respuestas.csv": "answers.csv",
    "tildes.tsv": "accents.tsv",
}


def blocks(path: Path, kind: str) -> list[str]:
    """The code blocks of a kind, without shell comments."""
    found = [code for k, code in BLOCK.findall(path.read_text(encoding="utf-8")) if k == kind]
    return [re.sub(r" +#.*$", "", code, flags=re.M) for code in found] if kind == "bash" else found


def commands() -> list[str]:
    """Installation is tested by .ci/run, several machines are not tested."""
    found = blocks(README, "bash") + blocks(GUIDE, "bash")
    return list(dict.fromkeys(c for c in found if "pip install" not in c and "torchrun" not in c))


def test_the_list_of_flags_is_that_of_the_parser() -> None:
    assert flags.PATH.read_text("utf-8") == flags.document(), "run: python tests/flags.py"


def test_both_readmes_have_the_same_code() -> None:
    for kind in ("bash", "python"):
        translated = []
        for code in blocks(SPANISH, kind):
            for spanish, english in SPANISH_NAMES.items():
                code = code.replace(spanish, english)
            translated.append(code)
        assert translated == blocks(README, kind)
    headings = [len(re.findall("^## ", p.read_text("utf-8"), re.M)) for p in (README, SPANISH)]
    assert headings[0] == headings[1]


def test_the_readme_is_short_and_its_links_exist() -> None:
    assert len(README.read_text("utf-8").split()) <= 1200
    for path in (README, SPANISH, *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The files that the documents name."""
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(trained / "checkpoints", tmp_path / "other")
    names = ("corpus.txt", "held_out.txt", "books/a.txt", "book.txt", "cuentos.txt", "poem.txt")
    for name in (*names, "letter.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    (tmp_path / "new.txt").write_text(TEXT.upper(), encoding="utf-8")
    (tmp_path / "old.txt").write_text(TEXT.replace("—", "-"), encoding="latin-1")
    for name in ("data.tsv", "held_out.tsv", "pairs.tsv"):
        (tmp_path / name).write_text(PAIRS, encoding="utf-8")
    (tmp_path / "data.csv").write_text(
        "frase,corregida\n" + PAIRS.replace("\t", ","), encoding="utf-8"
    )
    (tmp_path / "poems.txt").write_text(TEXT.replace("\n", "\n\n"), encoding="utf-8")
    (tmp_path / "questions.txt").write_text("12\n7\n", encoding="utf-8")
    (tmp_path / "questions.csv").write_text("tema;pregunta\na;12\nb;7\n", encoding="utf-8")
    for name in ("hrm_esp", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def shortened(code: str) -> str:
    """Two steps instead of minutes, small models, nothing held out, and few bytes."""
    code = re.sub(r"--minutes \S+", "", code)
    code = code.replace("hrm-esp pretrain", "hrm-esp pretrain --steps 2")
    code = re.sub(r"(hrm-esp pretrain)(?!.*--ckpt)", rf"\1 {' '.join(SMALL)}", code)
    code = code.replace("hrm-esp finetune", "hrm-esp finetune --steps 2")
    code = re.sub(
        r"(hrm-esp (?:pretrain|finetune)) (?!.*--set help)", r"\1 --set val_fraction=0 ", code
    )
    code = re.sub(
        r"(hrm-esp (?:pretrain|finetune) (?!.*--resume).*)$", r"\1 --overwrite", code, flags=re.M
    )
    code = code.replace("hrm-esp generate", "hrm-esp generate --max_new_tokens 9")
    return code.replace("hrm_esp/samples/cuentos.txt", "corpus.txt").replace(
        "hrm_esp/samples/numeros.held_out.tsv", "held_out.tsv"
    )


@pytest.mark.parametrize("code", commands(), ids=lambda code: code.split("\n")[0][:50])
def test_commands_run(folder: Path, hrm_esp_command: list[str], tmp_path: Path, code: str) -> None:
    command = tmp_path / "bin" / "hrm-esp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(hrm_esp_command)} "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join(
        (str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"])
    )
    out = subprocess.run(
        ["bash", "-ec", shortened(code)], cwd=folder, env=os.environ | {"PATH": path},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("path", [README, GUIDE], ids=lambda path: path.name)
def test_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.chdir(folder)
    code = "\n".join(blocks(path, "python"))
    code = code.replace("minutes=10", "steps=2, overwrite=True").replace("epochs=3", "steps=2")
    exec(code.replace("200)", "3)"), {})
