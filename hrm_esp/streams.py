"""Standard streams that may be closed, broken or not in UTF-8.

What is shown on stderr never stops a command: if it cannot be written, it is lost.

This module does not import torch, so that ``hrm-esp --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO, TypeVar

from .errors import HRMError

Result = TypeVar("Result")


def prepare_standard_streams() -> None:
    """Opens the null device for standard descriptors that are closed, and sets the encoding of
    stdout to UTF-8."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # A file that is opened later must not get this number: libraries print to it. The
            # lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def require_stdout() -> None:
    """Raises HRMError if there is no stdout for the result of a command."""
    if sys.stdout is None:
        raise HRMError("standard output is closed")


def flush_stdout() -> None:
    """Writes what stdout holds. If that is impossible, it is lost: the interpreter would report
    the error again at exit."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            discard_output(sys.stdout)


def discard_output(stream: TextIO) -> None:
    """Redirects a broken stream to the null device, with what it still holds."""
    with suppress(OSError, ValueError):  # it has no descriptor, or is closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Display:
    """Writes to ``sys.stderr`` and never raises: a closed pipe or terminal is no error."""

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        return self._attempt(lambda: sys.stderr.write(text), len(text))

    def flush(self) -> None:
        self._attempt(lambda: sys.stderr.flush(), None)

    def isatty(self) -> bool:
        return self._attempt(lambda: sys.stderr.isatty(), False)

    def fileno(self) -> int:
        """Raises OSError if there is no stderr."""
        if sys.stderr is None:
            raise OSError("no stderr")
        return sys.stderr.fileno()

    def _attempt(self, action: Callable[[], Result], otherwise: Result) -> Result:
        """Returns the result of an action, or another value if it fails."""
        if sys.stderr is None:
            return otherwise
        try:
            return action()
        except BlockingIOError:  # a full pipe in non-blocking mode: only this text is lost
            pass
        except (OSError, ValueError):
            discard_output(sys.stderr)
        return otherwise


STDERR = Display()
