"""Entry point of the command ``hrm-esp``: exit status and error messages."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Sequence

from .. import launch
from ..errors import HRMError, Interrupted, PeerLost
from ..launch import launched_rank, resume_command
from ..streams import STDERR, discard_output, flush_stdout, prepare_standard_streams
from .command_line import parse_command_line
from .commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, 2 for a user's mistake, 130 if the run was
    interrupted by Ctrl-C or another signal."""
    prepare_standard_streams()
    try:
        return run_command(sys.argv[1:] if argv is None else argv)
    finally:
        flush_stdout()


def run_command(argv: Sequence[str]) -> int:
    try:
        args = parse_command_line(argv)
    except HRMError as error:  # the same in all processes: only the first reports it
        return 2 if launched_rank() else report_error(str(error))
    words = ["hrm-esp", *argv]
    launch.command_line = shlex.join(words)
    try:
        COMMANDS[args.command](args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        if launched_rank() == 0:
            print(file=STDERR)
            if isinstance(error, Interrupted):
                print(f"saved: continue with {resume_command(words)}", file=STDERR)
            elif str(error):  # says what was interrupted
                print(error, file=STDERR)
        return 130
    except BrokenPipeError:  # the reader of stdout is gone, as in `hrm-esp generate | head`
        discard_output(sys.stdout)
        return 0
    except PeerLost as error:
        return report_error(str(error)) if launched_rank() == 0 else 2
    except HRMError as error:
        return report_error(str(error))
    except (MemoryError, OSError, RuntimeError) as error:
        if (message := describe_system_error(error)) is None:
            raise
        return report_error(message)


def report_error(message: str) -> int:
    """Prints an error as one line. Returns the exit status."""
    rank = launched_rank()
    process = f"process {rank}: " if rank else ""
    print(f"hrm-esp: error: {process}" + " ".join(message.split()), file=STDERR)
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
    if "C++ compiler" in text or "C compiler" in text:
        return "--set compile=true needs a C++ compiler: install one, or leave it out"
    return None
