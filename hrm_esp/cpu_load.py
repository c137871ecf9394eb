"""How many CPUs this process may use, and how many of them other processes use."""

from __future__ import annotations

import os
import time
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def n_usable_cpus() -> int:
    """Returns how many CPUs this process may use: its affinity and the quota of its container."""
    n = len(own_cpus()) or os.cpu_count() or 1
    quota = cpu_quota()
    return n if quota is None else max(1, min(n, int(quota)))


def own_cpus() -> set[int]:
    """Returns the CPUs that the system may run this process on, empty if unknown."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def cpu_quota() -> float | None:
    """Returns how many CPUs' time a Linux control group grants, ``None`` if it is unlimited."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1
            quota = (CGROUP / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (CGROUP / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return share if share > 0 else None


class LoadMeter:
    """Measures how many CPUs other processes use, from Linux's /proc/stat."""

    def __init__(self) -> None:
        self.read()

    def read(self) -> None:
        self.at, self.own, self.all = time.perf_counter(), time.process_time(), busy_seconds()

    def others(self) -> float | None:
        """Returns the mean since the last call, ``None`` where the system does not say."""
        at, own, total = self.at, self.own, self.all
        self.read()
        if total is None or self.all is None or self.at <= at:
            return None
        return max(0.0, (self.all - total) - (self.own - own)) / (self.at - at)


def busy_seconds() -> float | None:
    """Returns for how long this process's CPUs were busy, in seconds since the system started."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    names = {f"cpu{i}" for i in own_cpus()}
    busy = 0
    for line in lines:
        name, *times = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, times[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy / ticks


SINCE_START = LoadMeter()  # measures from the start of the process
