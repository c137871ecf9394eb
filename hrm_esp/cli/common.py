"""What several commands share: the device, the model, texts of the command line."""

from __future__ import annotations

import argparse
import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..model import HRMModel


def choose_device(args: argparse.Namespace, default: str | None = None) -> torch.device:
    """Returns the device of --device and --cpu, and sets the number of CPU threads.

    Args:
        default: the device where there is neither flag; ``None`` is the best available.
    """
    from .. import device

    device.limit_to_usable_cpus()
    return device.choose_device(args.device or default, args.cpu)


def load_model(args: argparse.Namespace, device: str | None = None) -> HRMModel:
    """Loads the model of --ckpt.

    Args:
        device: the default, see `choose_device`.
    """
    gc.disable()  # imports create no garbage, and looking for it takes 0.1 s
    try:
        from .. import training
        from ..device import start_adapting_threads

        model = training.load_model(args.ckpt, choose_device(args, device))
        start_adapting_threads()
        gc.freeze()
    finally:
        gc.enable()
    return model


def clean_argument(argument: str) -> str:
    """Returns a text from the command line without bytes that are not UTF-8, its line breaks as
    LF."""
    text = os.fsencode(argument).decode(errors="ignore")
    return text.replace("\r\n", "\n").replace("\r", "\n")
