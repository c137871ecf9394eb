"""Options of any type and of any size: each is used, or refused in one line."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import CONFIG, PAIRS, TEXT, Run
from hypothesis import given
from hypothesis import strategies as st

from hrm_esp import train_ft, train_lm
from hrm_esp.cli.command_line import parse_command_line
from hrm_esp.config import FinetuneConfig, GenerationConfig, HRMConfig, PretrainConfig
from hrm_esp.continue_config import ContinueConfig
from hrm_esp.errors import HRMError
from hrm_esp.training import finetune, memory, pretrain

CONFIGS = (HRMConfig, PretrainConfig, ContinueConfig, FinetuneConfig, GenerationConfig)
FIELDS = [(config, f.name) for config in CONFIGS for f in fields(config)]
NUMBERS = [
    (config, f.name)
    for config in CONFIGS
    for f in fields(config)
    if f.type.split(" | ")[0] in ("int", "float")
]
DIGITS = "1" + "0" * 5000  # more than Python reads


@given(
    st.sampled_from(FIELDS),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.sampled_from([10**20, -(10**30), 10**5000, -(10**400), 1e308, 2.5, [1], {}, (), [[]]])
)  # fmt: skip
def test_any_value_is_of_the_right_type_or_refused(field: tuple[type, str], value: object) -> None:
    config, name = field
    (annotation,) = (f.type for f in fields(config) if f.name == name)
    try:
        built = config(**{name: value})
    except HRMError as error:
        text = str(error)
        assert len(text) < 200 and "\n" not in text
    else:
        kind = type(getattr(built, name)).__name__.replace("NoneType", "None")
        allowed = annotation.split(" | ")
        assert kind in allowed or (kind == "int" and "float" in allowed) or name == "stop"


def test_a_value_of_another_type_is_named() -> None:
    for values, word in (
        ({"n_heads": True}, "n_heads must be of type int, not True"),
        ({"max_len": None}, "max_len must be of type int, not None"),
        ({"ff_mult": 2.5}, "ff_mult must be of type int, not 2.5"),
        ({"sep": ["line"]}, "sep must be of type str, not a list"),
        ({"d_model": 10**20}, "d_model must be at most 65,536, not 100000000000000000000"),
        ({"d_model": 10**5000}, "not a number of about 5000 digits"),
    ):
        with pytest.raises(HRMError, match=word):
            HRMConfig(**values)


@pytest.mark.parametrize(("config", "name"), NUMBERS)
def test_each_number_has_bounds(config: type, name: str) -> None:
    rules = config.__dataclass_fields__[name].metadata
    for bounds, value in (({"low", "above"}, -math.inf), ({"high", "below"}, math.inf)):
        assert bounds & rules.keys()
        for beyond in (value, 1e308 * math.copysign(1, value), int(math.copysign(10**30, value))):
            with pytest.raises(HRMError, match=name):
                config(**{name: beyond})


@pytest.mark.parametrize(
    "args",
    [
        *(
            ("pretrain", "text.txt", f"--{name}", value)
            for name, value in (
                ("max_len", "1e20"), ("max_len", 10**20), ("d_model", 10**7), ("steps", 10**400),
                ("steps", DIGITS), ("epochs", 10**400), ("minutes", "1e308"), ("lr", "1e308"),
                ("batch_size", 10**20), ("grad_accum", 10**30), ("recent_len", 10**20),
                ("warmup", DIGITS), ("save_every", "1e308"), ("weight_decay", "1e308"),
            )
        ),
        *(
            ("generate", f"--{name}", value)
            for name, value in (
                ("num_samples", 10**20), ("num_samples", DIGITS), ("batch_size", 10**20),
                ("max_new_tokens", 10**20), ("draft_len", 10**20), ("temperature", "1e308"),
            )
        ),
        ("evaluate", "text.txt", "--batch_size", 10**20),
        ("evaluate", "text.txt", "--batch_size", DIGITS),
        ("pairs", "text.txt", "--max_bytes", 10**20),
    ],
    ids=lambda args: " ".join(str(a)[:12] for a in args),
)  # fmt: skip
def test_a_number_out_of_range_is_one_line(
    run: Run, tmp_path: Path, args: tuple[object, ...]
) -> None:
    (tmp_path / "text.txt").write_text("Una línea.\n" * 20, encoding="utf-8")
    out = run(*args)
    assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
    assert out.stderr.startswith("hrm-esp: error: ") and str(args[-2])[2:] in out.stderr


FLOAT_FLAGS = [
    *[(("pretrain", f"--{name}"), name) for name in ("minutes", "lr", "dropout", "decay")],
    *[(("pretrain", "--set"), name) for name in ("val_fraction", "count_memory", "save_every")],
    *[(("finetune", f"--{name}"), name) for name in ("minutes", "lr", "dropout", "weight_decay")],
    *[(("generate", f"--{name}"), name) for name in ("temperature", "top_p", "min_p", "guidance")],
    (("restore", "--min_p"), "min_p"),
]


@pytest.mark.parametrize(("words", "name"), FLOAT_FLAGS, ids=lambda value: "".join(value))
def test_a_decimal_comma_is_a_point(words: tuple[str, str], name: str) -> None:
    command, flag = words
    for written in ("0,5", "0.5"):
        value = f"{name}={written}" if flag == "--set" else written
        assert getattr(parse_command_line([command, flag, value]), name) == 0.5
    assert parse_command_line(["pretrain", "--lr", "1,5e-3"]).lr == 1.5e-3


@pytest.mark.parametrize("text", ["1,000", "12,500", "1,234,567"])
def test_a_comma_that_may_separate_thousands_is_refused(text: str) -> None:
    for words in (["--minutes", text], ["--set", f"minutes={text}"], [f"--decay={text}"]):
        with pytest.raises(HRMError, match="thousands or decimals"):
            parse_command_line(["pretrain", *words])
    with pytest.raises(HRMError):
        parse_command_line(["pretrain", "--minutes", "1,5,5"])
    with pytest.raises(HRMError):
        parse_command_line(["pretrain", "--steps", "1,5"])


def test_a_model_larger_than_memory_is_refused_before_it_is_built(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    size = ("--set", "d_model=65536", "--set", "n_layers_dec=400", "--set", "ff_mult=64")
    for command in (("pretrain", "text.txt"), ("finetune", "pairs.tsv", "--from_scratch")):
        out = run(*command, *size, "--steps", 1)
        assert out.returncode == 2
        line = out.stderr.splitlines()[-1]
        assert line.startswith("hrm-esp: error: training this model takes at least "), out.stderr
        assert "GB" in line and "--d_model" in line
        assert not (tmp_path / "checkpoints" / "ngrams.counts").exists()


def test_what_fits_into_memory_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine of 50 MB: a batch is as large as the data at most."""
    monkeypatch.setattr(memory, "total_memory", lambda device: 50 * 10**6)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    (tmp_path / "long.txt").write_text(TEXT * 99, encoding="utf-8")
    huge = {"steps": 1, "batch_size": 2**20, "out_dir": str(tmp_path / "a"), "overwrite": True}
    start = train_lm(tmp_path / "text.txt", CONFIG, PretrainConfig(**huge)).last
    train_ft(tmp_path / "pairs.tsv", start, FinetuneConfig(**huge))
    with pytest.raises(HRMError, match=r"a batch of this size .* --batch_size or --max_len"):
        train_lm(tmp_path / "long.txt", CONFIG, PretrainConfig(**huge))


def test_the_batch_of_a_resumed_run_is_the_saved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is checked for it, not for the default of the device, which may be another one now."""
    (tmp_path / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    checked = []

    def check(config: HRMConfig, device: object, n_rows: int = 0, length: int = 0) -> None:
        checked.append(n_rows)

    monkeypatch.setattr(pretrain, "check_memory", check)
    monkeypatch.setattr(finetune, "check_memory", check)
    options = {"steps": 1, "out_dir": str(tmp_path / "a")}
    for size in (3, None):
        changes = {**options, "batch_size": size, "resume": size is None}
        last = train_lm(tmp_path / "text.txt", CONFIG, PretrainConfig(**changes)).last
    assert checked == [3, 3]
    for size in (1, None):
        changes = {**options, "batch_size": size, "resume": size is None}
        train_ft(tmp_path / "pairs.tsv", last, FinetuneConfig(**changes))
    assert checked == [3, 3, CONFIG.max_len, CONFIG.max_len]
