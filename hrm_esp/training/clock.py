"""The time that a run took."""

from __future__ import annotations

import threading
import time

TICK = 0.5  # seconds between two looks at the system's clock
MAX_GAP = 2.0  # seconds between two looks from which the process did not run in between


class RunningClock:
    """Counts the seconds in which the process runs, not those in which it is stopped (Ctrl-Z) or
    the machine is suspended.

    A thread reads the system's clock twice per second. Where it did not for some time, the process
    was stopped.

    Args:
        seconds: the count to start from.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds, self._read_at = seconds, time.perf_counter()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RunningClock:
        self._read_at = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def seconds(self) -> float:
        with self._lock:
            now = time.perf_counter()
            gap, self._read_at = now - self._read_at, now
            self._seconds += gap if gap < MAX_GAP else 0.0
            return self._seconds

    def _run(self) -> None:
        while not self._closed.wait(TICK):
            self.seconds()
