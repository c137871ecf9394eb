"""Ctrl-C and SIGTERM let a step finish."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import PeerLost


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Catches Ctrl-C and SIGTERM inside the block. Yields a function that tells whether one came.

    A second Ctrl-C interrupts at once. Outside the main thread nothing is caught.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    except PeerLost:
        del old[signal.SIGTERM]  # torchrun terminates this process, too: it must report first
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
