import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import broken_copies, random_model

from hrm_esp.errors import HRMError
from hrm_esp.model import HRMModel
from hrm_esp.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def checkpoint(model: HRMModel) -> Checkpoint:
    return Checkpoint(model.config, model.state_dict(), "finetune", 7, 900, 1.25, "0.1.0")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(checkpoint(random_model(cross_attention=True)), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_round_trip(saved: Path) -> None:
    expected, loaded = checkpoint(random_model(cross_attention=True)), load_checkpoint(saved)
    for name, value in expected.weights.items():
        assert torch.equal(loaded.weights[name], value)
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
