"""Checkpoints: tensors and plain types, written atomically and verified before they are read."""

from __future__ import annotations

import errno
import os
import pickle
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_DIR, HRMConfig
from ..data import PairColumns
from ..errors import HRMError
from ..files import PathLike, atomic_write
from ..model import HRMModel
from ..options import check_fields
from .weights import compact_weights, expand_weights, pack_counts, without_counts

FORMAT = 10  # raised by every change after which older files cannot be read
STAGES = ("pretrain", "finetune")
TEXT_FACTS = ("bytes", "documents", "sep", "encoding")  # of a training text, beside its ``data``
# Of a stage's facts, if it is not text. The scores are in bits per byte.
FACT_TYPES = {
    "bytes": int,
    "documents": int,
    "rows": int,
    "n_columns": int,
    "new_bpb_before": float,
    "old_bpb_before": float,
}
COUNT = {"low": 0, "high": 2**53}  # bounds of a field that counts something
# Of bits per byte: rounding may make them negative, and a byte of probability 0 infinite.
BITS = {"low": -1, "high": 1e30, "finite": False}


@dataclass
class Checkpoint:
    """The weights of a model, and what produced them.

    ``val_bpb``: held-out bits per byte, if measured. ``origin``: for each stage what it was trained
    on, when and how, see `RunFolder`; under ``earlier`` a list of what was pretrained on before.
    ``counts``: the n-gram counts as they are
    stored, if they were packed before; of a large corpus that takes seconds. ``training``: what
    resuming needs, in ``{stage}_state.pt`` only, whose weights lack the n-gram counts.
    """

    config: HRMConfig
    weights: dict[str, Tensor]
    stage: str = field(metadata={"choices": STAGES})
    step: int = field(default=0, metadata=COUNT)
    bytes_seen: int = field(default=0, metadata=COUNT)
    val_bpb: float | None = field(default=None, metadata=BITS)
    version: str = ""
    origin: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Tensor] | None = None
    training: dict[str, Any] | None = None

    @property
    def columns(self) -> PairColumns | None:
        """The columns of the table that the model was finetuned on, if they are known."""
        facts = self.origin.get("finetune", {}) if self.stage == "finetune" else {}
        names = ("prompt_col", "target_col", "n_columns")
        return PairColumns(*map(facts.get, names)) if facts.keys() >= {*names} else None

    def build_model(self, device: torch.device | str = "cpu") -> HRMModel:
        """Builds the model, in evaluation mode. On the CPU it shares these weights.

        Raises:
            HRMError: the weights do not fit the config, or it is a state to resume from.
        """
        if self.training is not None:
            raise HRMError(
                "this is a state for --resume: give the checkpoint that ends in _last.pt"
            )
        model = HRMModel(self.config)
        try:
            model.load_state_dict(self.weights, assign=True)
        except RuntimeError as error:
            raise HRMError("the checkpoint's weights do not fit its config") from error
        model.stage, model.columns = self.stage, self.columns
        return model.to(device).eval()


def save_checkpoint(checkpoint: Checkpoint, path: PathLike) -> None:
    """Writes a checkpoint atomically: large tensors in bfloat16 and n-gram counts packed, or as a
    state to resume from with exact weights and without counts.

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
    if checkpoint.training is None:
        content["weights"] = compact_weights(checkpoint.weights)
        content["counts"] = checkpoint.counts or pack_counts(checkpoint.weights)
    else:
        content |= {"weights": without_counts(checkpoint.weights), "counts": None}
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise  # these two are PyTorch's errors for a file that cannot grow
            number = getattr(error.__context__, "errno", None) or errno.ENOSPC
            raise OSError(number, os.strerror(number), str(path)) from error


def load_checkpoint(path: PathLike) -> Checkpoint:
    """Reads a checkpoint onto the CPU; of a folder the best one of its newest run. Verifies its
    checksums, and that its weights are those of a model of its config.

    Raises:
        HRMError: missing, damaged, not from hrm-esp, from another version of it, or with
            weights that no model has.
    """
    path = checkpoint_path(path)
    if not path.is_file():  # a device may have no end
        raise HRMError(f"no checkpoint {path}: run hrm-esp pretrain first, or give --ckpt")
    content = read_archive(path)
    foreign = HRMError(f"{path} is not a checkpoint of hrm-esp")
    if not isinstance(content, dict) or content.pop("project", None) != "hrm-esp":
        raise foreign
    found = content.pop("format", None)
    if type(found) is not int:
        raise foreign
    if found > FORMAT:
        raise HRMError(f"{path} was written by a newer hrm-esp: pip install -U hrm-esp")
    if found < FORMAT:
        raise HRMError(f"{path} was written by an older hrm-esp: train it again")
    try:
        content["config"] = config = HRMConfig(**content["config"])
        counts = content.pop("counts", None)
        checkpoint = Checkpoint(**content)
        check_fields(checkpoint)
        check_origin(checkpoint.origin)
        is_state = checkpoint.training is not None
        checkpoint.weights = expand_weights(checkpoint.weights, counts, config, is_state)
    except (TypeError, KeyError) as error:
        raise foreign from error
    except HRMError as error:
        raise HRMError(f"{path} is not a usable checkpoint: {error}; use another one") from error
    return checkpoint


def check_origin(origin: Any) -> None:
    """Raises TypeError if this is not the `Checkpoint.origin` that a run writes."""
    if type(origin) is not dict or type(origin.get("earlier", [])) is not list:
        raise TypeError
    parts = [origin[stage] for stage in STAGES if stage in origin]
    if not origin.keys() <= {*STAGES, "earlier"}:
        raise TypeError
    for known in (*parts, *origin.get("earlier", [])):
        if type(known) is not dict:
            raise TypeError
        for name, value in known.items():
            kind = FACT_TYPES.get(name, str)
            if type(name) is not str or type(value) is not kind:
                raise TypeError
        if "data" in known and not ("rows" in known or {*TEXT_FACTS} <= known.keys()):
            raise TypeError


def read_archive(path: Path) -> Any:
    """Returns the content of a file of PyTorch's: plain types and tensors on the CPU.

    Raises:
        HRMError: damaged, or with anything but plain types and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch compresses nothing. A small file that unpacks to a large one is none of its.
            is_compressed = sum(f.file_size for f in archive.infolist()) > path.stat().st_size
            if is_compressed or archive.testzip() is not None:
                raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HRMError(f"{path} is not a checkpoint of hrm-esp") from error
    except OSError as error:
        raise HRMError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive fails in many ways
        raise HRMError(
            f"{path} is damaged, or not a checkpoint of hrm-esp: use another one"
        ) from error


def find_checkpoint(folder: PathLike = DEFAULT_DIR, stages: tuple[str, ...] = STAGES) -> Path:
    """Returns the best checkpoint of the newest run in ``folder``.

    Raises:
        HRMError: there is none.
    """
    names = [Path(folder) / f"{stage}_{kind}.pt" for stage in stages for kind in ("best", "last")]
    found = [p for p in names if p.is_file()]
    if not found:
        kind = "checkpoint" if len(stages) > 1 else f"{stages[0].removesuffix('e')}ed checkpoint"
        raise HRMError(f"no {kind} in {folder}: run hrm-esp {stages[0]} first, or give --ckpt")
    newest = max(found, key=lambda p: p.stat().st_mtime_ns).name.partition("_")[0]
    return next(p for p in found if p.name.startswith(newest))


def checkpoint_path(path: PathLike, stages: tuple[str, ...] = STAGES) -> Path:
    """Returns the path of a checkpoint; of a folder, that of the best one of its newest run.

    Raises:
        HRMError: the folder has none.
    """
    return find_checkpoint(path, stages) if Path(path).is_dir() else Path(path)


def load_model(path: PathLike | None = None, device: torch.device | str = "cpu") -> HRMModel:
    """Loads the model of a checkpoint, by default of the newest run in ``checkpoints``.

    Raises:
        HRMError: see `load_checkpoint` and `find_checkpoint`.
    """
    return load_checkpoint(find_checkpoint() if path is None else path).build_model(device)
