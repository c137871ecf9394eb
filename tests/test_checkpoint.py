import itertools
import math
import os
import pickle
import random
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, TEXT, Run, broken_copies, random_model
from crafted import crafted, replaced, use

from hrm_esp.config import PretrainConfig
from hrm_esp.data import LMDataset
from hrm_esp.errors import HRMError
from hrm_esp.model import HRMModel
from hrm_esp.model.skeleton import skeleton
from hrm_esp.training import Trainer
from hrm_esp.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from hrm_esp.training.weights import MIN_NUMEL


def checkpoint(model: HRMModel) -> Checkpoint:
    return Checkpoint(model.config, model.state_dict(), "finetune", 7, 900, 1.25, "0.1.0")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(checkpoint(random_model(cross_attention=True)), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_round_trip(saved: Path) -> None:
    expected, loaded = checkpoint(random_model(cross_attention=True)), load_checkpoint(saved)
    for name, value in expected.weights.items():
        is_large = value.dtype is torch.float32 and value.numel() >= MIN_NUMEL
        assert torch.equal(loaded.weights[name], value.bfloat16().float() if is_large else value)
    expected.weights = loaded.weights = {}
    assert loaded == expected
    model = load_checkpoint(saved).build_model()
    assert model.stage == "finetune" and not model.training
    assert [p.name for p in saved.parent.iterdir()] == ["a.pt"]  # no temporary file is left


def test_nothing_but_plain_types_and_nothing_of_the_machine(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert content["config"] == asdict(random_model(cross_attention=True).config)
    assert str(saved.parent).encode() not in saved.read_bytes()


@pytest.mark.parametrize("kind", ["best", "state"])
def test_any_flipped_bit_or_cut_is_refused_or_harmless(
    trained: Path, tmp_path: Path, kind: str
) -> None:
    """Of a checkpoint, and of the state that a run resumes from."""
    path = tmp_path / "broken.pt"
    data = (trained / "checkpoints" / f"pretrain_{kind}.pt").read_bytes()
    path.write_bytes(data)
    good, refused = load_checkpoint(path), 0
    for broken in broken_copies(data, 100):
        path.write_bytes(broken)
        try:
            loaded = load_checkpoint(path)
        except HRMError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:  # padding between the records
            assert equal(loaded.__dict__, good.__dict__)
    assert refused > 90


def equal(a: object, b: object) -> bool:
    """Of plain containers of tensors and plain values."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code was run",)


def test_foreign_files_are_refused_and_run_no_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"model": {}}, path)
    with pytest.raises(HRMError, match="not a checkpoint of hrm-esp"):
        load_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil()))
        archive.writestr("a/version", "3\n")
    with pytest.raises(HRMError):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(HRMError):
        load_checkpoint(path)
    assert not capsys.readouterr().out


def test_other_formats_and_unknown_fields_are_refused(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save(content | {"format": 99}, saved)
    with pytest.raises(HRMError, match="newer"):
        load_checkpoint(saved)
    torch.save(content | {"format": 1}, saved)
    with pytest.raises(HRMError, match="older"):
        load_checkpoint(saved)
    torch.save(content | {"config": content["config"] | {"colour": 1}}, saved)
    with pytest.raises(HRMError):
        load_checkpoint(saved)


def test_a_failed_save_keeps_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(checkpoint(random_model()), saved)
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == ["a.pt"]


def test_the_newest_runs_best_is_found(tmp_path: Path) -> None:
    with pytest.raises(HRMError, match="hrm-esp pretrain"):
        find_checkpoint(tmp_path)
    import os

    for age, name in enumerate(["finetune_best", "finetune_last", "pretrain_best"]):
        path = tmp_path / f"{name}.pt"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert find_checkpoint(tmp_path).name == "finetune_best.pt"
    os.utime(tmp_path / "pretrain_best.pt", (2000, 2000))
    assert find_checkpoint(tmp_path).name == "pretrain_best.pt"
    (tmp_path / "pretrain_last.pt").touch()
    assert find_checkpoint(tmp_path, ("pretrain",)).name == "pretrain_best.pt"


@pytest.fixture
def tiny() -> HRMModel:
    """A model whose checkpoints are small: hundreds of them are written."""
    return random_model(d_model=8, plan_dim=4, n_layers_dec=1, cross_attention=True)


def some(crafted: Iterable[tuple[str, Any]], n: int) -> list[tuple[str, Any]]:
    """Some of many; tests/crafted.py tries all."""
    return random.Random(0).sample(list(crafted), n)


def one_line(error: HRMError) -> bool:
    return "\n" not in str(error) and len(str(error)) < 900


@pytest.mark.filterwarnings("ignore")
def test_any_value_of_a_checkpoint_is_used_or_refused(tiny: HRMModel, tmp_path: Path) -> None:
    """Whatever is loaded writes text with finite probabilities, or says that it cannot."""
    path, refused = tmp_path / "a.pt", 0
    save_checkpoint(checkpoint(tiny), path)
    for name, content in some(crafted(torch.load(path, weights_only=True), per_tensors=1), 250):
        torch.save(content, path)
        try:
            use(path, name)
        except HRMError as error:
            refused += 1
            assert one_line(error)
    assert 180 < refused < 250


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "precision": "fp16"}], ids=str)
def test_any_value_of_a_state_is_used_or_refused(
    tiny: HRMModel, tmp_path: Path, options: dict[str, str]
) -> None:
    """Whatever is loaded makes another step."""
    stream = np.frombuffer(f"\n{TEXT}\n".encode(), dtype=np.uint8)
    data = LMDataset(stream, tiny.config.max_len, denoise=0.5)
    config = PretrainConfig(steps=9, batch_size=2, out_dir=str(tmp_path), **options)
    trainer = Trainer(tiny, data, config, stage="pretrain", data_id="text")
    train(trainer, 4)
    trainer.save_state()
    path = trainer.folder.checkpoint("state")
    content = torch.load(path, weights_only=True)
    # The options of the optimizers are not read.
    training = (
        c for c in crafted(content["training"], per_tensors=1) if "param_groups" not in c[0]
    )
    refused = 0
    for _, wrong in [*some(training, 100), ("", replaced(content["training"], ITEM, len(data)))]:
        torch.save(content | {"training": wrong}, path)
        try:
            trainer.load_state(load_checkpoint(path))
        except HRMError as error:
            refused += 1
            assert one_line(error)
        else:
            train(trainer, 1)
    assert 60 < refused < 100
    with pytest.raises(HRMError, match="item must be less than"):
        trainer.load_state(load_checkpoint(path))


ITEM = ("run", "item")


def train(trainer: Trainer, n_steps: int) -> None:
    for n_done, batches in itertools.islice(trainer.batches(), n_steps):
        step = trainer.train_step(batches)
        trainer.state.advance(step, n_done, len(trainer.data), 1.0)


def test_a_model_without_its_weights_has_their_shapes(tiny: HRMModel) -> None:
    for model in (tiny, random_model(positions="learned", gumbel=False, count_max=0)):
        expected, found = model.state_dict(), skeleton(model.config).state_dict()
        assert list(found) == list(expected)
        for name, value in expected.items():
            is_table = ".table." in name
            assert found[name].dtype == value.dtype
            assert is_table or found[name].shape == value.shape


WEIGHTS = "executor.blocks.0.ffn.out.weight"
QUEUE = "planner.codebook.pooled_queue"
BAD_CHECKPOINTS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "a bool as a number": (("config", "n_heads"), True, "n_heads"),
    "no length": (("config", "max_len"), None, "max_len"),
    "half a layer": (("config", "ff_mult"), 2.5, "ff_mult"),
    "a huge model": (("config", "d_model"), 10**20, "d_model"),
    "more layers than weights": (("config", "n_layers_dec"), 500, "executor.blocks.2"),
    "a score in words": (("val_bpb",), "good", "val_bpb"),
    "no weights": (("weights",), None, "weights"),
    "no tensor": (("weights", WEIGHTS), None, WEIGHTS),
    "weights of another type": (("weights", WEIGHTS), lambda w: w.double(), WEIGHTS),
    "weights of another shape": (("weights", WEIGHTS), lambda w: w[:-1], WEIGHTS),
    "sparse weights": (("weights", WEIGHTS), lambda w: w.to_sparse(), WEIGHTS),
    "weights without values": (("weights", WEIGHTS), lambda w: w.to("meta"), WEIGHTS),
    "a short queue": (("weights", QUEUE), lambda w: w[:9], QUEUE),
    "n-grams in disorder": (("counts", "is_first"), lambda w: 255 - w, "n-gram counts"),
    "no n-grams": (("counts",), None, "n-gram counts"),
    "weights that are not finite": (("weights", WEIGHTS), lambda w: w * math.nan, "lower --lr"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_checkpoint_that_is_not_usable_is_one_line(
    trained: Path, run: Run, tmp_path: Path, case: str
) -> None:
    at, value, word = BAD_CHECKPOINTS[case]
    content = torch.load(trained / "checkpoints" / "pretrain_best.pt", weights_only=True)
    if callable(value):
        value = value(content[at[0]][at[1]])
    torch.save(replaced(content, at, value), tmp_path / "bad.pt")
    commands = (("generate",), ("evaluate", trained / "corpus.txt"))
    for command in (commands[len(case) % 2], ("finetune", trained / "pairs.tsv")):
        out = run(*command, "--ckpt", "bad.pt")
        assert out.returncode == 2 and out.stderr.count("\n") == 1, out.stderr
        assert out.stderr.startswith("hrm-esp: error: bad.pt ") and word in out.stderr


BAD_STATES: dict[str, tuple[tuple[str, ...], Any]] = {
    "nothing": ((), None),
    "no optimizers": (("optimizers",), []),
    "after the end": (ITEM, 10_000),
    "no time": (("run", "seconds"), math.nan),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_is_not_usable_is_one_line(
    trained: Path, run: Run, tmp_path: Path, case: str
) -> None:
    at, value = BAD_STATES[case]
    content = torch.load(trained / "checkpoints" / "pretrain_state.pt", weights_only=True)
    (tmp_path / "r").mkdir()
    torch.save(replaced(content, ("training", *at), value), tmp_path / "r" / "pretrain_state.pt")
    out = run("pretrain", trained / "corpus.txt", "--steps", "40", "--batch_size", "4", *SMALL,
              "--out_dir", "r", "--resume")  # fmt: skip
    assert out.returncode == 2, out.stderr
    line = out.stderr.splitlines()[-1]
    assert line.startswith("hrm-esp: error: r/pretrain_state.pt is not a usable "), line
    assert "Traceback" not in out.stderr


def test_a_model_to_which_a_byte_was_impossible_is_loaded(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save(content | {"val_bpb": math.inf}, saved)
    assert load_checkpoint(saved).val_bpb == math.inf


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(saved: Path, tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(saved) as stored,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(HRMError, match="damaged"):
        load_checkpoint(tmp_path / "packed.pt")


def test_no_device_is_read_as_a_checkpoint() -> None:
    """Some have no end; this one is empty."""
    with pytest.raises(HRMError, match="no checkpoint"):
        load_checkpoint(os.devnull)
