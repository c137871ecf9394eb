"""The real command, in a process of its own."""

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Run
from test_training import MODEL_OPTIONS, TRAIN_OPTIONS

import hrm_esp
from hrm_esp.cli import build_parser
from hrm_esp.cli.command_line import normalize_flag
from hrm_esp.cli.parser import from_args
from hrm_esp.config import FinetuneConfig, HRMConfig, PretrainConfig
from hrm_esp.training.checkpoint import load_checkpoint


def one_line_error(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 2, result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("hrm-esp: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert not result.stdout
    return line


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    start = time.perf_counter()
    code = (
        "import sys; from hrm_esp.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.perf_counter() - start < 1  # 0.1 on an idle machine
    assert out.returncode == 0 and "examples:" in out.stdout


@pytest.mark.parametrize("command", ["pretrain", "finetune", "generate", "evaluate", "plans"])
def test_each_command_has_help_with_examples(run: Run, command: str) -> None:
    out = run(command, "--help")
    assert out.returncode == 0 and f"hrm-esp {command} " in out.stdout
    flags = set(re.findall(r"^  (--\w+)", out.stdout, re.M))
    assert {"--device", "--cpu"} <= flags


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"hrm-esp {hrm_esp.__version__}\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--top-k", "--top_k"),
        ("--top-k=a-b", "--top_k=a-b"),
        ("--", "--"),
        ("a-b", "a-b"),
        ("-1", "-1"),
    ],
)
def test_dashes_and_underscores_are_alike(given: str, expected: str) -> None:
    assert normalize_flag(given) == expected


def test_every_flag_of_the_mission_is_there() -> None:
    flags = {
        "pretrain": "batch_size max_len lr d_model n_heads n_layers_enc n_layers_dec plan_dim "
        "n_plan_codes epochs steps minutes dropout cpu no_gumbel out_dir seed val ckpt size "
        "device resume overwrite set",
        "finetune": "batch_size lr epochs steps minutes dropout cpu no_gumbel out_dir seed ckpt",
        "generate": "prompt max_new_tokens min_new_tokens temperature top_k top_p seed cpu ckpt",
    }
    for command, names in flags.items():
        text = subprocess.run(
            [sys.executable, "-m", "hrm_esp", command, "--help"], capture_output=True, text=True
        ).stdout
        for name in names.split():
            assert re.search(rf"^  --{name}\b", text, re.M), name
    args = build_parser().parse_args(["pretrain", "a", "b", "--no_gumbel", "--lr", "0.1"])
    assert (args.corpus, args.gumbel, args.lr) == (["a", "b"], False, 0.1)


def test_no_command_has_more_than_25_flags() -> None:
    (commands,) = (a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    for name, parser in commands.items():
        flags = [a for a in parser._actions if a.option_strings and a.dest != "help"]
        assert len(flags) <= 25, name


@pytest.mark.parametrize("name", [*MODEL_OPTIONS, *TRAIN_OPTIONS, "encoding", "out_dir", "keep"])
def test_every_option_reaches_its_field(name: str) -> None:
    options = {**MODEL_OPTIONS, **TRAIN_OPTIONS, "encoding": "cp1252", "out_dir": "x", "keep": 9}
    value, config = options[name], HRMConfig if name in MODEL_OPTIONS else PretrainConfig
    expected = replace(config(), **{name: value} | ({"minutes": None} if name == "steps" else {}))
    given = [["--set", f"{name}={value}"]]
    if config.__dataclass_fields__[name].metadata["flag"]:
        given.append([f"--no_{name}"] if value is False else [f"--{name}", str(value)])
    for args in given:
        assert from_args(config, build_parser().parse_args(["pretrain", *args])) == expected


def test_set_help_lists_the_options_without_a_flag(run: Run) -> None:
    for command, name in (("pretrain", "planner_input"), ("finetune", "weight_decay")):
        out = run(command, "--set", "help")
        assert out.returncode == 0 and not out.stderr
        assert re.search(rf"^{name} ", out.stdout, re.M) and "\nlr " not in out.stdout
    assert "did you mean warmup?" in run("pretrain", "--set", "warm-up=3").stderr


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--context", "plan"], {"context": "plan"}),
        (["--no-gumbel", "--dropout=0.2"], {"gumbel": False, "dropout": 0.2}),
        (["--epochs", "2", "--batch-size", "7"], {"epochs": 2, "batch_size": 7, "minutes": None}),
        (["--set", "weight-decay=0"], {"weight_decay": 0.0}),
        (["--set", "sample_prompt=a = b "], {"sample_prompt": "a = b "}),
    ],
)
def test_finetuning_flags(flags: list[str], changes: dict[str, object]) -> None:
    args = build_parser().parse_args(["finetune", *map(normalize_flag, flags)])
    assert from_args(FinetuneConfig, args) == replace(FinetuneConfig(), **changes)


FIGURES = ("exact_match", "char_error_rate", "word_error_rate", "bits_per_byte")


def test_the_three_jobs(trained: Path, run: Run) -> None:
    """On the checkpoints that the command made in ``trained``."""
    names = {p.name for p in (trained / "checkpoints").glob("*.pt")}
    assert {"pretrain_best.pt", "pretrain_last.pt", "finetune_best.pt"} <= names
    pretrained = ("--ckpt", trained / "checkpoints" / "pretrain_best.pt")
    out = run(
        "generate", "--prompt", "La niña", "--max-new-tokens", "20", "--seed", "1", *pretrained
    )
    assert out.returncode == 0 and out.stdout.startswith("La niña") and not out.stderr
    assert (
        out.stdout
        == run(
            "generate", "--prompt", "La niña", "--max_new_tokens=20", "--seed=1", *pretrained
        ).stdout
    )
    answer = run("generate", "--prompt", "12", "--max_new_tokens", "9", cwd=trained)
    assert answer.returncode == 0 and len(answer.stdout.encode()) <= 10
    for file, keys in (
        ("corpus.txt", {"bits_per_byte", "n"}),
        ("pairs.tsv", {"n", *FIGURES, *(f"{figure}_interval" for figure in FIGURES)}),
    ):
        score = run("evaluate", file, "--json", cwd=trained)
        assert json.loads(score.stdout).keys() == keys, score.stderr


def test_predictions_are_rows_in_order(trained: Path, run: Run) -> None:
    out = run("evaluate", "pairs.tsv", "--predictions", "out.tsv", "--json", cwd=trained)
    score = json.loads(out.stdout)
    rows = [r.split("\t") for r in (trained / "out.tsv").read_text("utf-8").splitlines()]
    pairs = [r.split("\t") for r in (trained / "pairs.tsv").read_text("utf-8").splitlines()]
    assert [r[:2] for r in rows] == [p for p in pairs if len(p) == 2 and p[1]]
    right = sum(target == answer for _, target, answer in rows)
    assert score["exact_match"] == pytest.approx(right / len(rows))


def test_finetuning_from_scratch(trained: Path, run: Run, tmp_path: Path) -> None:
    out = run("finetune", trained / "pairs.tsv", "--from-scratch", "--size=tiny", "--steps", "2")
    assert out.returncode == 0, out.stderr
    saved = torch.load(tmp_path / "checkpoints" / "finetune_best.pt", weights_only=True)
    assert saved["config"]["d_model"] == 128 and saved["config"]["cross_attention"]


def test_progress_is_lines_on_stderr_and_results_on_stdout(trained: Path, run: Run) -> None:
    out = run("pretrain", trained / "corpus.txt", "--steps", "3", *SMALL)
    assert out.returncode == 0
    assert "bits/byte" in out.stderr and "\r" not in out.stderr
    assert "bits per byte" in out.stdout and "checkpoints/pretrain_best.pt" in out.stdout


def test_python_api(trained: Path) -> None:
    model = hrm_esp.load_model(trained / "checkpoints" / "pretrain_best.pt")
    text = hrm_esp.generate(model, "La niña", seed=1, max_new_tokens=20)
    assert text == "".join(hrm_esp.stream(model, "La niña", seed=1, max_new_tokens=20))
    assert hrm_esp.evaluate(model, trained / "corpus.txt").bits_per_byte < 8
    with pytest.raises(AttributeError):
        hrm_esp.nothing  # noqa: B018


BAD = {
    "missing corpus": ("pretrain", "nowhere.txt"),
    "empty corpus": ("pretrain", "empty.txt"),
    "binary corpus": ("pretrain", "binary.txt"),
    "damaged gz": ("pretrain", "damaged.txt.gz"),
    "huge seed": ("pretrain", "text.txt", "--seed", str(2**64)),
    "folder without text": ("pretrain", "folder"),
    "unknown encoding": ("pretrain", "text.txt", "--encoding", "klingon"),
    "heads do not divide": ("pretrain", "text.txt", "--d_model", "30", "--n_heads", "4"),
    "negative steps": ("pretrain", "text.txt", "--steps", "-1"),
    "negative learning rate": ("pretrain", "text.txt", "--lr", "-0.1"),
    "no number": ("pretrain", "text.txt", "--batch_size", "many"),
    "two lengths": ("pretrain", "text.txt", "--steps", "1", "--minutes", "1"),
    "unknown flag": ("pretrain", "text.txt", "--colour", "red"),
    "no command": (),
    "no such device": ("pretrain", "text.txt", "--device", "abacus"),
    "missing validation text": ("pretrain", "text.txt", "--val", "nowhere.txt"),
    "nothing to resume": ("pretrain", "text.txt", "--resume"),
    "broken state to resume": ("pretrain", "text.txt", "--resume", "--out_dir", "broken_run"),
    "state that runs code": (
        "finetune",
        "pairs.tsv",
        "--resume",
        "--out_dir",
        "evil_run",
        "--ckpt",
        "good.pt",
    ),
    "out_dir is a file": ("pretrain", "text.txt", "--out_dir", "text.txt"),
    "no checkpoint yet": ("finetune", "pairs.tsv"),
    "missing checkpoint": ("generate", "--ckpt", "nowhere.pt"),
    "folder as checkpoint": ("generate", "--ckpt", "folder"),
    "text as checkpoint": ("generate", "--ckpt", "text.txt"),
    "foreign checkpoint": ("generate", "--ckpt", "foreign.pt"),
    "broken checkpoint": ("evaluate", "text.txt", "--ckpt", "broken.pt"),
    "negative temperature": ("generate", "--ckpt", "good.pt", "--temperature", "-1"),
    "top_p of zero": ("generate", "--ckpt", "good.pt", "--top_p", "0"),
    "min_p above one": ("generate", "--ckpt", "good.pt", "--min_p", "1.5"),
    "no such code": ("generate", "--ckpt", "good.pt", "--plan_code", "8"),
    "guided by nothing": ("generate", "--ckpt", "good.pt", "--guidance", "2"),
    "no code": ("generate", "--ckpt", "good.pt", "--plan_code", "a"),
    "empty stop": ("generate", "--ckpt", "good.pt", "--stop", ""),
    "no samples": ("generate", "--ckpt", "good.pt", "--num_samples", "0"),
    "batch of no texts": ("generate", "--ckpt", "good.pt", "--json", "--batch_size", "0"),
    "prompt and prompts": ("generate", "--ckpt", "good.pt", "--prompt", "a", "--prompts", "-"),
    "missing prompts": ("generate", "--ckpt", "good.pt", "--prompts", "nowhere.txt"),
    "binary prompts": ("generate", "--ckpt", "good.pt", "--prompts", "binary.txt"),
    "negative length": ("generate", "--ckpt", "good.pt", "--max_new_tokens", "-5"),
    "missing TSV": ("finetune", "nowhere.tsv", "--ckpt", "good.pt"),
    "empty TSV": ("finetune", "empty.txt", "--ckpt", "good.pt"),
    "binary TSV": ("finetune", "binary.txt", "--ckpt", "good.pt"),
    "folder as TSV": ("finetune", "folder", "--ckpt", "good.pt"),
    "TSV of blank lines": ("finetune", "blank.tsv", "--ckpt", "good.pt"),
    "blocks of no checkpoint": (
        "finetune",
        "pairs.tsv",
        "--from_scratch",
        "--reinit_blocks",
        "never",
    ),
    "unknown hyperparameter": ("pretrain", "text.txt", "--set", "colour=red"),
    "hyperparameter without a value": ("pretrain", "text.txt", "--set", "warmup"),
    "hyperparameter of another type": ("pretrain", "text.txt", "--set", "warmup=many"),
    "hyperparameter out of range": ("pretrain", "text.txt", "--set", "decay=2"),
    "neither true nor false": ("pretrain", "text.txt", "--set", "grow=perhaps"),
    "new model's hyperparameter": (
        "finetune",
        "pairs.tsv",
        "--ckpt",
        "good.pt",
        "--set",
        "ff_mult=2",
    ),
    "pairs of a folder": ("pairs", "folder"),
    "pairs into nowhere": ("pairs", "text.txt", "-o", "no/pairs.tsv"),
    "no sentence is short enough": ("pairs", "text.txt", "--max_bytes", "3", "-o", "out.tsv"),
    "pairs over their text": ("pairs", "text.txt", "-o", "./text.txt"),
    "a flag that is set": ("pretrain", "text.txt", "--set", "overwrite=true"),
    "a hyperparameter's value": ("pretrain", "text.txt", "--optimizer", "sgd"),
    "a hyperparameter without a value": ("pretrain", "text.txt", "--warmup"),
    "two starts": ("finetune", "pairs.tsv", "--ckpt", "good.pt", "--from_scratch"),
    "size of a checkpoint": ("finetune", "pairs.tsv", "--ckpt", "good.pt", "--size", "tiny"),
    "predictions of a text": ("evaluate", "text.txt", "--ckpt", "good.pt", "--predictions", "p"),
    "predictions nowhere": ("evaluate", "pairs.tsv", "--ckpt", "good.pt", "--predictions", "no/p"),
    "predictions over the pairs": (
        "evaluate",
        "pairs.tsv",
        "--ckpt",
        "good.pt",
        "--predictions",
        "./pairs.tsv",
    ),
    "no run to plot": ("plot", "folder"),
    "unknown picture": ("plot", "folder", "-o", "a.gif"),
    "missing text": ("evaluate", "nowhere.txt", "--ckpt", "good.pt"),
    "empty text": ("evaluate", "empty.txt", "--ckpt", "good.pt"),
    "batch of none": ("evaluate", "text.txt", "--ckpt", "good.pt", "--batch_size", "0"),
}


@pytest.fixture(scope="module")
def bad_folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "empty.txt").touch()
    (folder / "blank.tsv").write_text(" \n\t\n\n")
    (folder / "text.txt").write_text("Una línea.\n", encoding="utf-8")
    (folder / "pairs.tsv").write_text("a\tb\n")
    (folder / "latin.txt").write_text("ñáéíóú" * 20, encoding="latin-1")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0\1" * 99)
    good = trained / "checkpoints" / "pretrain_best.pt"
    shutil.copy(good, folder / "good.pt")
    packed = bytearray(gzip.compress(b"Un texto largo. " * 999))
    packed[20:30] = b"\xff" * 10
    (folder / "damaged.txt.gz").write_bytes(packed)
    data = bytearray(good.read_bytes())
    for i in range(128):  # more than the padding between two tensors
        data[len(data) // 2 + i] ^= 1
    (folder / "broken.pt").write_bytes(data)
    torch.save({"state": torch.zeros(3)}, folder / "foreign.pt")
    (folder / "broken_run").mkdir()
    (folder / "broken_run" / "pretrain_state.pt").write_bytes(data)
    (folder / "evil_run").mkdir()
    (folder / "evil_run" / "finetune_state.pt").write_bytes(pickle.dumps(Evil()))
    return folder


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("code_was_run", "w")


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(run: Run, bad_folder: Path, case: str) -> None:
    before = sorted(bad_folder.rglob("*"))
    line = one_line_error(run(*BAD[case], cwd=bad_folder))
    assert "Traceback" not in line and "[Errno" not in line
    assert sorted(bad_folder.rglob("*")) == before


def test_a_missing_file_is_always_named_in_the_same_words(trained: Path, run: Run) -> None:
    """Texts, tables and prompts."""
    for args in (
        ("pretrain", "nowhere.txt", "--overwrite"),
        ("pretrain", "corpus.txt", "--overwrite", "--val", "nowhere"),
        ("finetune", "nowhere.tsv", "--overwrite"), ("evaluate", "nowhere.txt"),
        ("evaluate", "nowhere.csv", "--by", "word"), ("generate", "--prompts", "nowhere.txt"),
        ("generate", "--prompts", "nowhere.csv"), ("plans", "nowhere.txt"), ("pairs", "nowhere"),
        ("restore", "nowhere", "--ckpt", "checkpoints/pretrain_best.pt"),
    ):  # fmt: skip
        line = one_line_error(run(*args, cwd=trained))
        (name,) = (word for word in args if word.startswith("nowhere"))
        assert line == f"hrm-esp: error: no such file: {name}: check the name and the folder"


def test_a_run_in_the_folder_is_kept(trained: Path, run: Run) -> None:
    best = trained / "checkpoints" / "pretrain_best.pt"
    before = best.read_bytes()
    assert "--overwrite" in one_line_error(run("pretrain", "corpus.txt", cwd=trained))
    assert best.read_bytes() == before


def test_a_folder_that_cannot_be_written(trained: Path, run: Run) -> None:
    line = one_line_error(run("pretrain", trained / "corpus.txt", "--out_dir", "/proc/nowhere"))
    assert "/proc" in line


def test_a_full_disk_is_one_line_and_loses_nothing(trained: Path, run: Run, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    args = ("pretrain", trained / "corpus.txt", "--steps", "2", *SMALL)
    assert run(*args).returncode == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    out = run(*args, "--out_dir", "other", preexec_fn=limit)
    assert out.returncode == 2 and out.stderr.splitlines()[-1].startswith("hrm-esp: error: ")
    assert "Traceback" not in out.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").glob("*.pt")} == before
    assert not list((tmp_path / "other").glob("*.pt"))
    assert not list((tmp_path / "other").glob(".*"))


def test_a_disk_that_is_full_later_leaves_a_checkpoint_and_names_it(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    """There is room for checkpoints, not for the state, which is larger."""
    import resource

    sizes = [
        (trained / "checkpoints" / f"pretrain_{kind}.pt").stat().st_size
        for kind in ("best", "state")
    ]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes) // 2,) * 2)

    args = ("pretrain", trained / "corpus.txt", "--steps", "8", "--batch_size", "4", *SMALL)
    out = run(*args, preexec_fn=limit)
    folder = tmp_path / "checkpoints"
    assert out.returncode == 2 and "Traceback" not in out.stderr
    line = out.stderr.splitlines()[-1]
    assert line.startswith("hrm-esp: error: checkpoints/pretrain_state.pt: ")
    named = re.search(r"the newest checkpoint is (\S+)", line)
    assert named and load_checkpoint(tmp_path / named[1]).step == 8, line
    assert not list(folder.glob(".*")) and not (folder / "pretrain_state.pt").exists()


INTERRUPTED = ["--steps", "70", "--batch_size", "1", "--set", "save_every=0.001", *SMALL]


@pytest.fixture(scope="module")
def uninterrupted(
    trained: Path, hrm_esp_command: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    args = ["pretrain", str(trained / "corpus.txt"), *INTERRUPTED, "--out_dir", str(folder)]
    subprocess.run([*hrm_esp_command, *args], check=True)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_was_interrupted_comes_to_the_same(
    trained: Path, uninterrupted: Path, run: Run, tmp_path: Path, number: int
) -> None:
    args = ["pretrain", str(trained / "corpus.txt"), *INTERRUPTED]
    process = subprocess.Popen(
        [sys.executable, "-m", "hrm_esp", *args], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    awaited = [tmp_path / "checkpoints" / f"pretrain_{name}.pt" for name in ("best", "state")]
    while not all(path.exists() for path in awaited):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and "--resume" in stderr and "Traceback" not in stderr
    saved = load_checkpoint(tmp_path / "checkpoints" / "pretrain_state.pt")
    assert 0 < saved.step < 70
    part = run(*args, "--resume")
    assert part.returncode == 0, part.stderr
    for name in ("last", "best"):
        one, other = (
            load_checkpoint(folder / f"pretrain_{name}.pt")
            for folder in (uninterrupted, tmp_path / "checkpoints")
        )
        assert one.step == other.step and one.bytes_seen == other.bytes_seen
        assert all(one.weights[key].equal(other.weights[key]) for key in one.weights)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {p.name for p in uninterrupted.iterdir()}  # nothing half written


def test_a_closed_pipe_is_no_error(trained: Path) -> None:
    command = f"{sys.executable} -m hrm_esp generate --min_new_tokens 400 | head -c 5"
    out = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=trained, capture_output=True
    )
    assert b"Traceback" not in out.stderr and b"rror" not in out.stderr


def test_many_texts_in_order(trained: Path, run: Run) -> None:
    """From a file, from standard input, as lines of text and of JSON."""
    prompts = ["La niña", "", "El sombrero"]
    (trained / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8-sig")
    args = ("generate", "--ckpt", trained / "checkpoints" / "pretrain_best.pt", "--seed", "1",
            "--max_new_tokens", "20", "--num_samples", "2", "--batch_size", "4",
            "--keep_blank")  # fmt: skip
    lines = run(*args, "--prompts", trained / "prompts.txt").stdout.splitlines()
    twice = [p for p in prompts for _ in range(2)]
    assert len(lines) == 6 and all(map(str.startswith, lines, twice))
    out = run(*args, "--prompts", "-", "--json", input="\r\n".join(prompts))
    texts = [json.loads(line) for line in out.stdout.splitlines()]
    assert out.returncode == 0 and [t["prompt"] for t in texts] == twice
    assert [" ".join((t["prompt"] + t["text"]).splitlines()) for t in texts] == lines
    for text in texts:
        assert text.keys() == {"prompt", "text", "logprobs", "logprob", "finish_reason"}
        assert text["logprob"] == pytest.approx(sum(text["logprobs"]))
    (answers,) = run("generate", "--prompt", "12", "--json", cwd=trained).stdout.splitlines()
    assert json.loads(answers)["prompt"] == "12"


def test_prompts_with_what_is_no_text(trained: Path, hrm_esp_command: list[str]) -> None:
    args = [*hrm_esp_command, "generate", "--max_new_tokens", "3", "--prompts"]
    for data, first in ((b"\xef\xbb\xbfni\xf1o\n", "nio"), ("ñ".encode("utf-16"), "ñ")):
        (trained / "odd.txt").write_bytes(data)
        encoding = ["--encoding", "utf-16"] if first == "ñ" else []
        for name, given in (("-", data), ("odd.txt", None)):
            out = subprocess.run(
                [*args, name, "--json", *encoding], cwd=trained, capture_output=True, input=given
            )
            assert out.returncode == 0 and json.loads(out.stdout)["prompt"] == first
            assert (b"warning" in out.stderr) == (first == "nio")
    for data, encoding in ((b"a", ["klingon"]), (b"a", ["rot13"]), (b"abc", ["utf-16"])):
        out = subprocess.run(
            [*args, "-", "--encoding", *encoding], cwd=trained, capture_output=True, input=data
        )
        assert out.returncode == 2 and out.stderr.count(b"\n") == 1, out.stderr
    command = f"{' '.join(args)} - <&- >&-"
    closed = subprocess.run(["bash", "-c", command], cwd=trained, capture_output=True)
    assert closed.returncode == 2 and b"Traceback" not in closed.stderr


def test_prompts_are_answered_as_they_come(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hrm_esp", "generate", "--prompts", "-", "--batch_size", "1"],
        cwd=trained, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    for prompt in ("12", "7"):
        process.stdin.write(prompt + "\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith("\n")
    process.communicate("", timeout=60)
    assert process.returncode == 0


def test_ctrl_c_leaves_what_was_written(trained: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hrm_esp", "generate", "--ckpt", "checkpoints/pretrain_best.pt",
         "--prompt", "La niña", "--min_new_tokens", "9999999"],
        cwd=trained, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        # Where the tests run in the background, Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    begin = b""
    while len(begin) < 200:
        begin += process.stdout.read(200)  # blocks until something was written
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and not stderr.strip()
    assert (begin + rest).decode().startswith("La niña") and rest.endswith(b"\n")


def test_stray_bytes_in_a_prompt(trained: Path, run: Run) -> None:
    ckpt = os.fsencode(trained / "checkpoints" / "pretrain_best.pt")
    out = subprocess.run(
        [sys.executable, "-m", "hrm_esp", "generate", "--max_new_tokens", "5", "--ckpt", ckpt,
         "--prompt", b"a\xff\xfeb"], capture_output=True,
    )  # fmt: skip
    assert out.returncode == 0 and out.stdout.startswith(b"ab")


def test_pairs_are_sentences_without_and_with_accents(run: Run, tmp_path: Path) -> None:
    """To a file, to standard output, and through a link, which stays one."""
    text = "El niño comió. ¿Qué pasó? " + "muy larga " * 40 + ".\nSí."
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "link.tsv").symlink_to("target.tsv")
    expected = "El nino comio.\tEl niño comió.\n¿Que paso?\t¿Qué pasó?\nSi.\tSí.\n"
    assert run("pairs", "a.txt").stdout == expected
    assert run("pairs", "a.txt", "-o", "link.tsv").stdout == "3 pairs in link.tsv\n"
    assert (tmp_path / "link.tsv").is_symlink()
    assert (tmp_path / "target.tsv").read_text("utf-8") == expected


def test_info_says_what_made_a_checkpoint(trained: Path, run: Run, tmp_path: Path) -> None:
    """By a checkpoint or by a folder, and as a card in two languages."""
    checkpoint = trained / "checkpoints" / "pretrain_best.pt"
    lines = run("info", checkpoint).stdout.splitlines()
    known = dict(line.split(maxsplit=1) for line in lines[: lines.index("")] if line)
    assert known["stage"] == "pretrain"
    assert known["size"].startswith("1 + 2 layers of 32: 95,429 weights")
    assert known["command"].startswith("hrm-esp pretrain corpus.txt --steps 40")
    assert any(
        line.startswith("trained on") and "corpus.txt (5,775 bytes, utf-8, --sep line)" in line
        for line in lines
    )
    described = {line.split()[0] for line in lines[lines.index("") + 1 :]}
    assert described == {p.name for p in checkpoint.parent.iterdir()} - {"sample.txt"}
    newest = run("info", checkpoint.parent).stdout
    assert "finetune_best.pt" in newest and ", pairs.tsv (48 prompts)" in newest
    for language, word in (("es", "entrenado"), ("en", "trained")):
        card = run("info", checkpoint, "--card", language).stdout
        assert card.startswith("---\nlanguage: es\n") and word in card and "corpus.txt" in card
        assert ("95.429 parámetros" in card) == (language == "es")
    assert run("info", tmp_path).returncode == 2
    # A folder is a checkpoint for every command.
    text = run("generate", "--ckpt", checkpoint.parent, "--prompt", "3").stdout
    assert text == run("generate", "--ckpt", checkpoint.parent / "finetune_best.pt",
                       "--prompt", "3").stdout  # fmt: skip


def test_a_spanish_card_is_all_spanish(trained: Path, run: Run, tmp_path: Path) -> None:
    """But for the command, the names of files and the field names of the front matter."""
    content = torch.load(trained / "checkpoints" / "finetune_best.pt", weights_only=True)
    text = content["origin"]["pretrain"] | {"data": "1.500 versos.txt", "bytes": 1234567}
    pairs = content["origin"]["finetune"] | {"rows": 1300}
    for sep, words in (
        ("line", "un documento por línea"), ("blank", "una línea en blanco entre párrafos"),
        ("stanza", "una línea en blanco entre estrofas"), ("file", "un documento por archivo"),
    ):  # fmt: skip
        origin = {"earlier": [text | {"sep": sep}], "pretrain": text, "finetune": pairs}
        torch.save(content | {"origin": origin}, tmp_path / "a.pt")
        card = run("info", "a.pt", "--card", "es").stdout
        known = "1.500 versos.txt (1.234.567 bytes, UTF-8,"
        expected = f"{known} {words}), {known} un documento por línea), pairs.tsv (1.300 ejemplos)"
        assert f"| entrenado con | {expected} |" in card, card
    text = re.sub("```.*?```|^---.*?---", "", card, flags=re.S).replace("pairs.tsv", "")
    assert not re.search(r"\b(prompts?|layers|sep|the|of|with|trained|weights)\b", text), text
    assert "fecha | 20" not in card and re.search(r"fecha \| \d+ de [a-z]+ de 20\d\d \|", card)
    english = run("info", "a.pt", "--card", "en").stdout
    assert "1.500 versos.txt (1,234,567 bytes, utf-8, --sep file)" in english


@pytest.mark.parametrize(
    "origin", [[], {"x": {}}, {"pretrain": {"data": 3}}, {"pretrain": {"data": "a"}},
               {"pretrain": {"bytes": "many"}}, {"pretrain": 1}, {"finetune": {"n_columns": "4"}}],
)  # fmt: skip
def test_a_checkpoint_with_a_strange_origin_is_refused(
    trained: Path, run: Run, tmp_path: Path, origin: object
) -> None:
    content = torch.load(trained / "checkpoints" / "pretrain_best.pt", weights_only=True)
    torch.save(content | {"origin": origin}, tmp_path / "bad.pt")
    out = run("info", "bad.pt")
    assert out.returncode == 2 and out.stderr.count("\n") == 1
