"""Checkpoints: tensors and plain types, written atomically and verified before they are read."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_DIR, HRMConfig
from ..errors import HRMError
from ..files import PathLike, atomic_write
from ..model import HRMModel

FORMAT = 5  # raised by every change after which older files cannot be read
STAGES = ("pretrain", "finetune")


@dataclass
class Checkpoint:
    """The weights of a model, and what produced them.

    ``val_bpb``: held-out bits per byte, if measured. ``training``: what resuming needs, in
    ``{stage}_state.pt`` only.
    """

    config: HRMConfig
    weights: dict[str, Tensor]
    stage: str
    step: int = 0
    bytes_seen: int = 0
    val_bpb: float | None = None
    version: str = ""
    training: dict[str, Any] | None = None

    def build_model(self, device: torch.device | str = "cpu") -> HRMModel:
        """Builds the model, in evaluation mode. On the CPU it shares these weights.

        Raises:
            HRMError: the weights do not fit the config.
        """
        model = HRMModel(self.config)
        try:
            model.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:
            raise HRMError("the checkpoint's weights do not fit its config") from error
        model.stage = self.stage
        return model.to(device).eval()


def save_checkpoint(checkpoint: Checkpoint, path: PathLike) -> None:
    """Writes a checkpoint atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    content = {
        "format": FORMAT,
        "project": "hrm-esp",
        **{f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)},
        "config": asdict(checkpoint.config),
    }
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise  # these two are PyTorch's errors for a file that cannot grow
            number = getattr(error.__context__, "errno", None) or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error


def load_checkpoint(path: PathLike) -> Checkpoint:
    """Reads a checkpoint onto the CPU, after verifying its checksums.

    Raises:
        HRMError: missing, a folder, damaged, not from hrm-esp, or from another version of it.
    """
    path = Path(path)
    if path.is_dir():
        raise HRMError(
            f"{path} is a folder: give a checkpoint in it, such as {path}/pretrain_best.pt"
        )
    if not path.exists():
        raise HRMError(f"no checkpoint {path}: run hrm-esp pretrain first, or give --ckpt")
    foreign = HRMError(f"{path} is not a checkpoint of hrm-esp")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise foreign from error
    except OSError as error:
        raise HRMError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise HRMError(
            f"{path} is damaged, or not a checkpoint of hrm-esp: use another one"
        ) from error
    if not isinstance(content, dict) or content.pop("project", None) != "hrm-esp":
        raise foreign
    try:
        found = content.pop("format")
        if found > FORMAT:
            raise HRMError(f"{path} was written by a newer hrm-esp: pip install -U hrm-esp")
        if found < FORMAT:
            raise HRMError(f"{path} was written by an older hrm-esp: train it again")
        content["config"] = HRMConfig(**content["config"])
        return Checkpoint(**content)
    except (TypeError, KeyError) as error:
        raise foreign from error


def find_checkpoint(folder: PathLike = DEFAULT_DIR, stages: tuple[str, ...] = STAGES) -> Path:
    """Returns the best checkpoint of the newest run in ``folder``.

    Raises:
        HRMError: there is none.
    """
    names = [Path(folder) / f"{stage}_{kind}.pt" for stage in stages for kind in ("best", "last")]
    found = [p for p in names if p.is_file()]
    if not found:
        raise HRMError(f"no checkpoint in {folder}: run hrm-esp {stages[0]} first, or give --ckpt")
    newest = max(found, key=lambda p: p.stat().st_mtime_ns).name.partition("_")[0]
    return next(p for p in found if p.name.startswith(newest))


def load_model(path: PathLike | None = None, device: torch.device | str = "cpu") -> HRMModel:
    """Loads the model of a checkpoint, by default of the newest run in ``checkpoints``.

    Raises:
        HRMError: see `load_checkpoint` and `find_checkpoint`.
    """
    return load_checkpoint(find_checkpoint() if path is None else path).build_model(device)
