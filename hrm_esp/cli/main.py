"""Entry point of the command ``hrm-esp``: exit status and error messages."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from ..errors import HRMError, Interrupted, PeerLost
from .commands import COMMANDS
from .parser import build_parser, expand_options
from .rank import RANK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    argv = [normalize_flag(a) for a in (sys.argv[1:] if argv is None else argv)]
    try:
        args = build_parser().parse_args(expand_options(argv))
    except HRMError as error:  # the same in all processes: only the first reports it
        return 2 if RANK else report_error(str(error))
    try:
        COMMANDS[args.command](args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        if RANK == 0:
            print(file=sys.stderr)
            if isinstance(error, Interrupted):
                print(f"saved: continue with {resume_command(argv)} --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout is gone, as in `hrm-esp generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PeerLost as error:
        return report_error(str(error)) if RANK == 0 else 2
    except HRMError as error:
        return report_error(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if (message := describe_system_error(error)) is None:
            raise
        return report_error(message)


def report_error(message: str) -> int:
    """Prints an error as one line. Returns the exit status."""
    process = f"process {RANK}: " if RANK else ""
    print(f"hrm-esp: error: {process}" + " ".join(message.split()), file=sys.stderr)
    return 2


def describe_system_error(error: BaseException) -> str | None:
    """Returns what to do about an error of the system, or ``None`` for an error of the program."""
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        advice = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{name}{error.strerror or error}{advice}"
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory: give a smaller --batch_size, --max_len or --size"
    if "C++ compiler" in text:
        return "--set compile=true needs a C++ compiler: install one, or leave it out"
    return None


def normalize_flag(word: str) -> str:
    """Replaces dashes in the name of a flag: ``--top-k=5`` becomes ``--top_k=5``."""
    name, equals, value = word.partition("=")
    if not name.startswith("--") or len(name) == 2 or " " in name:
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


def resume_command(argv: Sequence[str]) -> str:
    """Returns the command that was given, without --resume and --overwrite."""
    import shlex

    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command and"
    return shlex.join(["hrm-esp", *(a for a in argv if a not in ("--resume", "--overwrite"))])
