"""Random command lines, files and environments, and what holds for all of them.

The contract: exit status 0, 2 or 130; with 2 one line ``hrm-esp: error: ...`` that comes last; no
traceback; UTF-8 on both streams; JSON where it was asked for; files that existed are unchanged,
unless they were named as output or belong to a run that was overwritten or resumed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import PAIRS, SMALL, TEXT
from hypothesis import strategies as st

from hrm_esp.cli import build_parser
from hrm_esp.cli.parser import SetAction, options
from hrm_esp.config import FinetuneConfig, HRMConfig, PretrainConfig

STOP_SECONDS = 4  # after which a command gets a Ctrl-C
HANG_SECONDS = 90  # after which it counts as hanging
# Runs the command in a process that sends itself a Ctrl-C.
ENTRY = f"""\
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
signal.alarm({STOP_SECONDS})
from hrm_esp.cli import main
sys.exit(main())
"""
NUMBERS = (
    "0", "1", "2", "3", "5", "8", "64", "0.5", "1e-3", "-1", "-0.0", "1e20", "1e308", "inf", "nan",
    "", "abc", "٣", "0x10", "1_000", "9" * 30, "9" * 5000, " 4 ", "1.5",
)  # fmt: skip
WORDS = (
    "", " ", "La niña", "¿Qué?", "-Hola", "--raro", "a\tb", "a\nb", "\x1b[31m", "😀", "e\u0301",
    "line", "utf-8", "latin-1", "cp1252", "utf-16", "rot13", "klingon", "cpu", "cuda", "mps", "0",
    "2", "prompt", "a" * 3000, os.fsdecode(b"\xff\xfe"),
)  # fmt: skip
FILES = (
    "corpus.txt", "pairs.tsv", "pairs.csv", "pairs.jsonl", "empty.txt", "blank.txt", "latin1.txt",
    "binary.bin", "table.xlsx", "text.txt.gz", "broken.txt.gz", "año ñ.txt", "--raro.txt", "folder",
    "empty_folder", "missing.txt", "missing/x.txt", "checkpoints", "checkpoints/pretrain_best.pt",
    "checkpoints/finetune_best.pt", "checkpoints/pretrain_state.pt", "broken.pt", "nan.pt",
    "foreign.pt", "new.csv", "new.jsonl", "new.tsv", "new.png", "new", "-", "/dev/null",
    "/dev/full",
)  # fmt: skip
GOOD_NUMBERS = ("1", "2", "3", "8", "16")
CKPTS = ("checkpoints/pretrain_best.pt", "checkpoints/finetune_best.pt")
TEXTS = ("corpus.txt", "año ñ.txt", "text.txt.gz", "folder", "latin1.txt")
TABLES = ("pairs.tsv", "pairs.csv", "pairs.jsonl")
GOOD = {
    "--ckpt": CKPTS, "--val": (*TEXTS, *TABLES), "--prompts": (*TEXTS[:3], *TABLES, "-"),
    "--out_dir": ("new", "año", "a/b"), "--out": ("new.csv", "new.tsv", "new.jsonl", "new.png"),
    "--predictions": ("new.tsv",), "--html": ("new.html",), "--encoding": ("utf-8", "cp1252"),
    "--device": ("cpu",), "--prompt_col": ("1", "prompt"), "--target_col": ("2", "target"),
}  # fmt: skip
ARGUMENTS = {
    "pretrain": TEXTS, "finetune": TABLES, "generate": WORDS, "evaluate": (*TEXTS, *TABLES),
    "pairs": TEXTS, "plans": (*TEXTS, *TABLES, "La casa", "", "-Hola"), "plot": ("checkpoints",),
    "restore": (*TEXTS, "-"), "info": ("checkpoints", *CKPTS),
}  # fmt: skip
SHORT = {
    "pretrain": ["--steps", "2", "--batch_size", "1", "--out_dir", "out", *SMALL],
    "finetune": ["--steps", "2", "--out_dir", "out"],
    "generate": ["--max_new_tokens", "8"],
}
OUTPUTS = ("-o", "--out", "--predictions", "--html")
ENVIRONMENTS = (
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "LANG": "C"}, {"COLUMNS": "10"},
    {"COLUMNS": "abc"}, {"WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"},
    {"TERM": "dumb"}, {"PYTHONWARNINGS": "error"}, {"OMP_NUM_THREADS": "0"},
)  # fmt: skip
STANDARD = ("<&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full", "| head -c 5")


@dataclass(frozen=True)
class Case:
    """A command line, and what it runs in. ``streams``: redirections of the shell."""

    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    streams: tuple[str, ...] = ()
    stdin: bytes = b""

    def shell(self) -> str:
        redirections = " ".join(sorted(self.streams, key=lambda s: s.startswith("|")))
        return f'set -o pipefail; "$@" {redirections}'


def cases() -> st.SearchStrategy[Case]:
    commands = _commands()
    words = st.sampled_from(sorted(commands)).flatmap(lambda name: _words(name, commands[name]))
    garbage = st.lists(st.sampled_from([*WORDS, *FILES]), max_size=3).map(tuple)
    return st.builds(
        Case,
        words=_mostly((words,), st.just(garbage)).flatmap(lambda strategy: strategy),
        env=_mostly(({},), st.sampled_from(ENVIRONMENTS)),
        streams=_mostly(((),), st.lists(st.sampled_from(STANDARD), max_size=2, unique=True)),
        stdin=st.sampled_from((b"", b"La casa\n", b"\n\n", b"a\tb\n\xff\n", b"1\n2\n3")),
    )


def _commands() -> dict[str, argparse.ArgumentParser]:
    parsers = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    return dict(next(parsers))


def _words(name: str, parser: argparse.ArgumentParser) -> st.SearchStrategy[tuple[str, ...]]:
    """A command with some of its flags. Training is short unless a flag says otherwise."""
    flags = [_flag(a) for a in parser._actions if a.option_strings and not _is_help(a)]
    if name in ("pretrain", "finetune"):
        config = PretrainConfig if name == "pretrain" else FinetuneConfig
        names, values = st.sampled_from(sorted(options(HRMConfig, config))), _mostly(GOOD_NUMBERS)
        flags.append(st.tuples(names, values).map(lambda v: ("--set", "=".join(v))))
        flags.append(st.tuples(names.map("--{}".format), values))
    drawn = st.lists(st.one_of(flags), max_size=3).map(lambda f: [w for words in f for w in words])
    least = 0 if name in ("pretrain", "finetune", "generate") else 1
    arguments = st.lists(_mostly(ARGUMENTS[name]), min_size=least, max_size=least + 1)
    if name == "generate":
        arguments = _mostly(([],), arguments)
    short = _mostly((SHORT.get(name, []),), st.just([]))
    return st.builds(lambda a, s, d: (name, *a, *s, *d), arguments, short, drawn)


def _is_help(action: argparse.Action) -> bool:
    return isinstance(action, argparse._HelpAction | argparse._VersionAction | SetAction)


def _flag(action: argparse.Action) -> st.SearchStrategy[tuple[str, ...]]:
    """A flag, with a value if it takes one."""
    name = action.option_strings[-1]
    dashes = st.sampled_from((name, name.replace("_", "-")))
    if action.nargs == 0:
        return dashes.map(lambda flag: (flag,))
    if action.choices:
        value = _mostly(tuple(action.choices))
    elif action.type in (int, float):
        value = _mostly(GOOD_NUMBERS, st.sampled_from(NUMBERS))
    else:
        value = _mostly(GOOD.get(name, WORDS))
    pair = st.tuples(dashes, value)
    return st.one_of(pair, pair.map(lambda v: ("=".join(v),)))


def _mostly(good: tuple[Any, ...], other: st.SearchStrategy[Any] | None = None) -> Any:
    """Good values four times of five, else any."""
    other = _values() if other is None else other
    return st.integers(0, 4).flatmap(lambda n: other if n == 0 else st.sampled_from(good))


def _values() -> st.SearchStrategy[str]:
    return st.sampled_from(WORDS) | st.sampled_from(FILES) | st.sampled_from(NUMBERS)


def make_template(folder: Path, checkpoints: Path) -> None:
    """Writes the files that the cases use, with checkpoints of both stages."""
    shutil.copytree(checkpoints, folder / "checkpoints")
    texts = {
        "corpus.txt": TEXT, "pairs.tsv": PAIRS, "año ñ.txt": TEXT, "--raro.txt": TEXT,
        "pairs.csv": "prompt;target\n" + PAIRS.replace("\t", ";"), "empty.txt": "",
        "blank.txt": "\n \n", "pairs.jsonl": '{"prompt": "1", "target": "uno"}\n' * 30,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin1.txt").write_text(TEXT, encoding="cp1252")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "table.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "broken.txt.gz").write_bytes(gzip.compress(TEXT.encode())[:-20])
    (folder / "folder").mkdir()
    (folder / "folder" / "a.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty_folder").mkdir()
    best = folder / "checkpoints" / "pretrain_best.pt"
    (folder / "broken.pt").write_bytes(best.read_bytes()[:-3000])
    content = torch.load(best, weights_only=True)
    torch.save({"weights": {"a": torch.zeros(3)}}, folder / "foreign.pt")
    for weight in content["weights"].values():
        if weight.is_floating_point():
            weight.fill_(float("nan"))
    torch.save(content, folder / "nan.pt")
    (folder / "entry.py").write_text(ENTRY)


def run_case(
    case: Case, template: Path, folder: Path, python: list[str]
) -> tuple[int | None, list[str]]:
    """Runs a case in a new folder, and returns its exit status and what violates the contract."""
    shutil.copytree(template, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    env = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    try:
        out = subprocess.run(
            ["bash", "-c", case.shell(), "bash", *python, "entry.py", *case.words],
            cwd=folder, env=env | case.env, input=case.stdin, capture_output=True,
            timeout=HANG_SECONDS,
        )  # fmt: skip
        status, found = out.returncode, _violations(case, out, before)
    except subprocess.TimeoutExpired:
        status, found = None, [f"hangs for more than {HANG_SECONDS} s"]
    shutil.rmtree(folder)
    return status, found


def _violations(
    case: Case, out: subprocess.CompletedProcess[bytes], before: dict[Path, bytes]
) -> list[str]:
    found = []
    if out.returncode not in (0, 2, 130):
        found.append(f"exit status {out.returncode}")
    text = {}
    for name in ("stdout", "stderr"):
        try:
            text[name] = getattr(out, name).decode()
        except UnicodeDecodeError:
            if name == "stderr" or not any("head" in s for s in case.streams):
                found.append(f"{name} is not UTF-8")
            text[name] = getattr(out, name).decode(errors="replace")
    errors = [s for s in text["stderr"].splitlines() if s.startswith("hrm-esp: error:")]
    has_stderr = not any(s.startswith("2>") for s in case.streams)
    if has_stderr and len(errors) != (out.returncode == 2):
        found.append(f"{len(errors)} error lines and exit status {out.returncode}")
    if errors and text["stderr"].splitlines()[-1] != errors[-1]:
        found.append("the error is not the last line")
    if "Traceback" in text["stderr"] or "Exception ignored" in text["stderr"]:
        found.append("a traceback")
    if "--json" in case.words and out.returncode == 0 and not case.streams:
        for line in text["stdout"].splitlines():
            try:
                json.loads(line, parse_constant=lambda name: found.append(f"JSON with {name}"))
            except ValueError:
                found.append(f"not JSON: {line[:80]}")
    may_change = _may_change(case)
    for path, content in before.items():
        if path.name in may_change or (may_change & {"*.pt"} and path.suffix == ".pt"):
            continue
        if not path.is_file() or path.read_bytes() != content:
            found.append(f"{path.name} was changed")
    return [*found, text["stderr"][-1500:]] if found else []


def _may_change(case: Case) -> set[str]:
    """Names of the files that a case may overwrite."""
    names = {"metrics.jsonl", "corpus.tokens", "ngrams.counts"}
    for flag, value in zip(case.words, (*case.words[1:], ""), strict=False):
        name, equals, same_word = flag.partition("=")
        if name in OUTPUTS:
            names.add(Path(same_word if equals else value).name)
        if name in ("--overwrite", "--resume"):
            names.add("*.pt")
    return names
