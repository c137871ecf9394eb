"""Ctrl-C, SIGTERM and SIGHUP let a step finish."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import PeerLost


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C, SIGTERM and SIGHUP (the terminal is closed) inside the block. Yields a
    function that tells whether one came.

    A second Ctrl-C interrupts at once. ``nohup`` keeps SIGHUP from having any effect. Outside the
    main thread nothing is caught.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {s: signal.signal(s, catch) for s in stop_signal_numbers()}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    except PeerLost:
        old.pop(signal.SIGTERM, None)  # torchrun terminates this process, too: it must report first
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def stop_signal_numbers() -> list[signal.Signals]:
    """Returns the signals that stop a run."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers
