"""What ``torchrun`` says about this process in the environment, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from shlex import join

command_line = ""  # the command that this process was started with, if it was one of hrm-esp
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set for each process


def resume_command(words: Sequence[str]) -> str:
    """Returns the command that continues the run which the command of ``words`` started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command and --resume"
    program, command, *rest = words
    end = rest.index("--") if "--" in rest else len(rest)  # what follows are no flags
    flags = [word for word in rest[:end] if word not in ("--resume", "--overwrite")]
    return join([program, command, *flags, "--resume", *rest[end:]])


def launched_rank() -> int:
    """Returns the index of this process among those that were started together, else 0."""
    return int(os.environ["RANK"]) if is_distributed() else 0


def local_rank() -> int:
    """Returns the index of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() else 0


def local_world_size() -> int:
    """Returns the number of processes that were started together on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_distributed() else 1


def is_distributed() -> bool:
    """Whether ``torchrun`` or the like started several processes. Some of its variables alone do
    not mean that: clusters leave them in the environment."""
    if any(name not in os.environ for name in NAMES):
        return False
    try:
        return 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]) > 1
    except ValueError:
        return False
