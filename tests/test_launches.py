"""A training step on a device that pretends to be a GPU; see benchmarks/pretend_cuda.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Kernels that a step of `tiny` starts, and waits of the host. What saves some lowers these numbers:
# they are about 5% above what is counted, because versions of PyTorch differ.
MAX_LAUNCHES = {"text": 1165, "corrupted text": 1450, "pairs": 1450}
MAX_WAITS = 3
CAN_BUILD = sys.platform == "linux" and shutil.which("g++") and torch.version.cuda is None


@pytest.mark.skipif(not CAN_BUILD, reason="the device is built with g++, for PyTorch's CPU build")
def test_a_step_starts_few_kernels_and_hardly_waits() -> None:
    """Nor does it mix devices or dtypes: that would fail."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests" / "benchmarks" / "launches.py", "--size", "tiny"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    rows = re.findall(r"\| tiny \| (.+) \| (\d+) \| (\d+) \|", result.stdout)
    assert [name for name, *_ in rows] == [*MAX_LAUNCHES], result.stderr[-2000:]
    for name, n_launches, n_waits in rows:
        assert int(n_launches) <= MAX_LAUNCHES[name] and int(n_waits) <= MAX_WAITS, name
