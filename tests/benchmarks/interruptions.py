"""Whether a run that is interrupted at any moment gives the same model in the end.

    python tests/benchmarks/interruptions.py corpus.txt --times 20

Trains once without interruption. Then it starts the same run again and again, sends SIGINT, SIGTERM
or SIGKILL at a random moment, resumes, and compares the weights bit for bit. After each
interruption every checkpoint must be readable.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import machine, new_parser

from hrm_esp import HRMError
from hrm_esp.training import load_checkpoint

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def start(flags: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Starts a run in a new process."""
    command = [sys.executable, "-m", "hrm_esp", *flags, "--out_dir", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for a run that must succeed."""
    if process.wait():
        raise SystemExit(f"exit status {process.returncode} of {process.args}")


def count_unreadable(folder: Path) -> int:
    """Returns how many of the checkpoints in a folder cannot be read."""
    n = 0
    for path in folder.glob("*.pt"):
        try:
            load_checkpoint(path)
        except HRMError:
            n += 1
    return n


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus")
    parser.add_argument("--times", type=int, default=20, help="interruptions")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    flags = ["pretrain", args.corpus, "--size", "tiny", "--max_len", "128", "--cpu"]
    flags += ["--steps", str(args.steps), "--set", "save_every=0.02"]
    rng = random.Random(args.seed)
    outcomes: Counter[tuple[str, str]] = Counter()
    n_unreadable = 0
    with tempfile.TemporaryDirectory() as name:
        uninterrupted, folder = Path(name) / "uninterrupted", Path(name) / "interrupted"
        begin = time.perf_counter()
        finish(start(flags, uninterrupted))
        seconds = time.perf_counter() - begin
        expected = load_checkpoint(uninterrupted / "pretrain_last.pt").weights
        for _ in range(args.times):
            shutil.rmtree(folder, ignore_errors=True)
            number = rng.choice(SIGNALS)
            process = start(flags, folder)
            time.sleep(rng.uniform(0, seconds))
            process.send_signal(number)
            process.wait()
            n_unreadable += count_unreadable(folder)
            was_saved = (folder / "pretrain_state.pt").exists()
            finish(start([*flags, "--resume" if was_saved else "--overwrite"], folder))
            weights = load_checkpoint(folder / "pretrain_last.pt").weights
            is_equal = all(weights[key].equal(expected[key]) for key in expected)
            outcomes[number.name, "equal weights" if is_equal else "other weights"] += 1
    print(f"{machine()}, {args.steps} steps in {seconds:.0f} s")
    print("| signal | outcome | times |\n| --- | --- | --- |")
    for (signal_name, outcome), times in sorted(outcomes.items()):
        print(f"| {signal_name} | {outcome} | {times} |")
    print(f"| all | unreadable checkpoints | {n_unreadable} |")


if __name__ == "__main__":
    main()
