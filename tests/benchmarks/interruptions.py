"""Whether a run that is interrupted at any moment comes to the same model.

    python tests/benchmarks/interruptions.py corpus.txt --times 20

Trains once without interruption, then as often as asked with SIGINT, SIGTERM or SIGKILL at a random
moment, resumes, and compares the weights bit for bit. After each interruption every checkpoint
under a final name has to be readable.
"""

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hrm_esp.checkpoint import load_checkpoint
from hrm_esp.errors import HRMError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def start(args: list[str], folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hrm_esp", *args, "--out_dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def unreadable(folder: Path) -> int:
    """How many checkpoints under a final name cannot be read."""
    failed = 0
    for path in folder.glob("*.pt"):
        try:
            load_checkpoint(path)
        except HRMError:
            failed += 1
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    args = ["pretrain", options.corpus, "--size", "tiny", "--max_len", "128", "--save_every"]
    args += ["0.02", "--steps", str(options.steps), "--cpu"]
    draw = random.Random(options.seed)
    found: Counter[tuple[str, str]] = Counter()
    broken = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        begin = time.perf_counter()
        assert start(args, whole).wait() == 0
        length = time.perf_counter() - begin
        expected = load_checkpoint(whole / "pretrain_last.pt").weights
        for _ in range(options.times):
            folder = Path(name) / "part"
            shutil.rmtree(folder, ignore_errors=True)
            number = draw.choice(SIGNALS)
            process = start(args, folder)
            time.sleep(draw.uniform(0, length))
            process.send_signal(number)
            process.wait()
            broken += unreadable(folder)
            again = ["--resume"] if (folder / "pretrain_state.pt").exists() else ["--overwrite"]
            assert start([*args, *again], folder).wait() == 0
            weights = load_checkpoint(folder / "pretrain_last.pt").weights
            same = all(weights[key].equal(expected[key]) for key in expected)
            found[number.name, "the same" if same else "other weights"] += 1
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {options.steps} steps in {length:.0f} s")
    print("| signal | outcome | times |\n| - | - | - |")
    for (signal_name, outcome), times in sorted(found.items()):
        print(f"| {signal_name} | {outcome} | {times} |")
    print(f"| all | unreadable checkpoints | {broken} |")


if __name__ == "__main__":
    main()
