"""Ctrl-C, SIGTERM and SIGHUP (the terminal is closed) stop a run.

``nohup`` keeps SIGHUP from having any effect. Outside the main thread no signal is caught.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import PeerLost


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Lets a step finish: catches the signals inside the block. Yields a function that tells
    whether one came.

    A second Ctrl-C interrupts at once.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = set_handlers(catch)
    try:
        yield lambda: bool(caught)
    except PeerLost:
        old.pop(signal.SIGTERM, None)  # torchrun terminates this process, too: it must report first
        raise
    finally:
        restore_handlers(old)


@contextmanager
def interruptible(task: str) -> Iterator[None]:
    """Lets the signals interrupt a task that comes before training.

    Raises:
        KeyboardInterrupt: one came; its message names the task.
    """
    old = set_handlers(signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        message = f"interrupted while {task}: nothing was trained; run the same command again"
        raise KeyboardInterrupt(message) from error
    finally:
        restore_handlers(old)


def set_handlers(handler: Callable[[int, Any], object]) -> dict[signal.Signals, Any]:
    """Sets the handler of the signals that stop a run. Returns those they had."""
    try:
        return {number: signal.signal(number, handler) for number in stop_signal_numbers()}
    except ValueError:  # not the main thread
        return {}


def restore_handlers(old: dict[signal.Signals, Any]) -> None:
    for number, handler in old.items():
        signal.signal(number, handler)


def stop_signal_numbers() -> list[signal.Signals]:
    """Returns the signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers
