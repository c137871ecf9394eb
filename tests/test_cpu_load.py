"""How many threads a process uses beside others."""

import os
import subprocess
import sys
import time

import pytest
import torch

from hrm_esp import cpu_load, device
from hrm_esp.cpu_load import LoadMeter

BUSY = [sys.executable, "-c", "while True: pass"]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="only Linux says how busy it is")
def test_the_load_is_that_of_other_processes() -> None:
    """More with another busy process; what this one does is not part of it."""
    meter, end = LoadMeter(), time.perf_counter() + 1
    while time.perf_counter() < end:
        pass
    own = meter.others()
    with subprocess.Popen(BUSY) as process:
        meter.read()
        time.sleep(1)
        beside = meter.others()
        process.kill()
    n_cpus = len(cpu_load.own_cpus())
    assert own is not None and own < n_cpus - 0.5
    assert beside is not None and 0.2 < beside < n_cpus + 0.1


@pytest.mark.parametrize(("others", "expected"), [(0.0, 4), (0.4, 4), (1.1, 3), (3.0, 1), (9.0, 1)])
def test_as_many_threads_as_there_are_free_cpus(
    monkeypatch: pytest.MonkeyPatch, others: float, expected: int
) -> None:
    """Afterwards there are as many as before; none are changed if the user has set a number."""
    monkeypatch.setattr(device, "n_usable_cpus", lambda: 4)
    monkeypatch.setattr(device, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(LoadMeter, "others", lambda _: others)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with device.adaptive_threads():
            device.adapt_threads()
            assert torch.get_num_threads() == 4  # OMP_NUM_THREADS is set
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        with device.adaptive_threads():
            device.adapt_threads()
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 4
        device.adapt_threads()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(
    tmp_path: cpu_load.Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str],
    quota: float | None,
) -> None:  # fmt: skip
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cpu_load, "CGROUP", tmp_path)
    assert cpu_load.cpu_quota() == quota
    assert 1 <= cpu_load.n_usable_cpus() <= (quota or 10**6) + 1
