"""What is saved of a run beside its weights, and checked when the run is resumed."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from shlex import split
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from ..config import MAX_BATCH, HRMConfig, TrainConfig
from ..errors import HRMError
from ..launch import resume_command
from ..model import HRMModel
from ..options import check_bounds, check_fields, describe, flag_name
from .checkpoint import COUNT, Checkpoint
from .optim import Muon
from .schedule import choose_batch_size
from .state import RunState
from .weights import check_tensor, only_counts

MOMENTS: dict[type[Optimizer], tuple[str, ...]] = {
    Muon: ("momentum_buffer",),
    AdamW: ("exp_avg", "exp_avg_sq"),
}


def resume_fingerprint(options: TrainConfig, model: HRMModel, data_id: str) -> dict[str, Any]:
    """Returns what a resumed run must have in common with the saved one: options, data and n-gram
    counts, which the saved state does not contain. Columns of a table may be given in another way:
    the pairs are compared."""
    free = {"out_dir", "resume", "overwrite", "keep", "compile", "save_every", "sample_prompt"}
    free |= {"ckpt", "val_old", "prompt_col", "target_col"}
    fingerprint = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in free}
    checksum = 0
    for tensor in only_counts(model.state_dict()).values():
        checksum = zlib.crc32(tensor.cpu().numpy().data, checksum)
    return fingerprint | {"data": data_id, "n-gram counts": checksum}


def changed_options(options: TrainConfig, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns what differs between two fingerprints, as it is named on the command line."""
    names = {f.name for f in fields(options)}
    return [
        flag_name(options, name) if name in names else name
        for name, value in new.items()
        if old.get(name) != value
    ]


def run_batch_size(
    options: TrainConfig, config: HRMConfig, device: torch.device, resumed: Checkpoint | None
) -> int:
    """Returns the size of a batch. Where the options name none, it is that of the run to resume,
    else it follows from the device, which may be another one now."""
    if resumed is not None and options.batch_size is None and isinstance(resumed.training, dict):
        fingerprint = resumed.training.get("fingerprint")
        size = fingerprint.get("batch_size") if isinstance(fingerprint, dict) else None
        if type(size) is int and 0 < size <= MAX_BATCH:
            return size
    return choose_batch_size(options, config, device)


def saved_command(resumed: Checkpoint) -> str:
    """Returns what to add to an error: the command that continues a run, if a command started it,
    after a semicolon."""
    try:
        words = split(resumed.origin.get(resumed.stage, {}).get("command", ""))
    except ValueError:  # a quote that is not closed
        return ""
    return f"; continue it with {resume_command(words)}" if len(words) > 1 else ""


@contextmanager
def usable_state(path: Path) -> Iterator[None]:
    """Names the file in the HRMErrors of the functions below: they read ``Checkpoint.training``."""
    try:
        yield
    except HRMError as error:
        raise HRMError(
            f"{path} is not a usable state: {error}; start again with --overwrite"
        ) from error


def saved_part(training: Any, name: str, kind: type) -> Any:
    """Returns a part of ``Checkpoint.training``.

    Raises:
        HRMError: it is missing, or of another type.
    """
    part = training.get(name) if isinstance(training, dict) else None
    if not isinstance(part, kind):
        raise HRMError(f"{name} is {describe(part)}")
    return part


def load_training(
    training: Any, optimizers: list[Optimizer], scaler: GradScaler, n_items: int
) -> RunState:
    """Loads what is saved of the optimizers and of the scaler, and returns where the run stands.

    Args:
        n_items: windows or pairs of an epoch.

    Raises:
        HRMError: something is missing, of another kind, or not finite.
    """
    load_optimizers(training, optimizers)
    load_scaler(training, scaler)
    return load_run(training, n_items)


def load_run(training: Any, n_items: int) -> RunState:
    """Returns where a saved run stands.

    Args:
        n_items: windows or pairs of an epoch.

    Raises:
        HRMError: it can stand nowhere near.
    """
    try:
        state = RunState(**saved_part(training, "run", dict))
    except TypeError as error:
        raise HRMError("run has other fields") from error
    check_fields(state)
    check_bounds("item", state.item, below=n_items)
    return state


def load_fingerprint(training: Any) -> dict[str, Any]:
    """Returns the options that a run was saved with.

    Raises:
        HRMError: they are not of plain types.
    """
    options: dict[str, Any] = saved_part(training, "fingerprint", dict)
    if not all(v is None or isinstance(v, str | int | float) for v in options.values()):
        raise HRMError("fingerprint holds other types")
    return options


def load_optimizers(training: Any, optimizers: list[Optimizer]) -> None:
    """Loads the saved moments. The options of the optimizers stay: they follow from those of the
    run.

    Raises:
        HRMError: they are of other optimizers, or not finite.
    """
    saved = saved_part(training, "optimizers", list)
    if len(saved) != len(optimizers):
        raise HRMError(f"there are {len(saved)} optimizers, not {len(optimizers)}")
    for optimizer, content in zip(optimizers, saved, strict=True):
        states = saved_part(content, "state", dict)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in states.items():
            if type(index) is not int or not 0 <= index < len(parameters):
                raise HRMError(f"an optimizer has no parameter {describe(index)}")
            check_moments(optimizer, moments, parameters[index])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def check_moments(optimizer: Optimizer, moments: Any, parameter: Tensor) -> None:
    """Checks what is saved of an optimizer for one parameter.

    Raises:
        HRMError: it is of another optimizer or parameter, or not finite.
    """
    names, has_step = MOMENTS[type(optimizer)], not isinstance(optimizer, Muon)
    if not isinstance(moments, dict) or moments.keys() != {*names, *["step"] * has_step}:
        raise HRMError(f"an optimizer is not {type(optimizer).__name__}")
    for name in names:
        check_tensor(name, moments[name], parameter)
    if "exp_avg_sq" in moments and moments["exp_avg_sq"].min() < 0:
        raise HRMError("exp_avg_sq has negative values")
    if has_step:
        check_tensor("step", moments["step"], torch.tensor(0.0))
        check_bounds("step", moments["step"].item(), **COUNT)


def load_scaler(training: Any, scaler: GradScaler) -> None:
    """Loads the saved scale of the gradients. Without one, as after training on another device, the
    scaler keeps its initial scale.

    Raises:
        HRMError: it is no scale.
    """
    saved, own = saved_part(training, "scaler", dict), scaler.state_dict()
    if not saved or not own:
        return
    scale, tracker = saved.get("scale"), saved.get("_growth_tracker")
    is_scale = type(scale) is float and 0 < scale < torch.finfo(torch.float32).max
    if not is_scale or type(tracker) is not int or not 0 <= tracker <= own["growth_interval"]:
        raise HRMError("scaler holds no scale")
    scaler.load_state_dict(own | {"scale": scale, "_growth_tracker": tracker})
