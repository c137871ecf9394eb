"""What a corpus much larger than usual costs in memory and in time to the first step.

    python tests/benchmarks/big_corpus.py --megabytes 1000

Makes a text of so many megabytes, and one of 1 MB, of words drawn by Zipf's law. On each the
command starts twice (the time to the first step, without the import of torch), then it makes a full
pass over the text, and its anonymous resident memory is read at the end. All is as ever but that of
the pass's steps 20 are taken, evenly spaced, and the others only read their batch, for it would
take days; and that no text is restored, for those batches differ in size. Linux alone.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LETTERS = "eaosrnidlctumpbgvyqhfzjñxkwáéíóú"
# Runs the command with the rest of its arguments; prints the seconds between the import of torch
# and the end of the first step, and at the end of training the anonymous resident memory.
PROBE = """\
import re, sys, time
from pathlib import Path
import torch, torch._dynamo  # the optimizers import that
start, first, taken = time.perf_counter(), [], []
from hrm_esp import cli
from hrm_esp.trainer import Step, Trainer
step, lead = Trainer.step, Trainer.lead
def some(trainer, batches):
    if len(taken) > trainer.progress() * 20:
        return Step(sum(b.n_tokens for b in batches), 0.0, 0, 0.0, 0.0, None)
    taken.append(step(trainer, batches))
    first or first.append(time.perf_counter() - start)
    return taken[-1]
def measured(*args):
    lead(*args)
    print("first", first[0])
    print("anon", re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Trainer.step, Trainer.lead = some, measured
sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
"""


def write_text(path: Path, megabytes: int) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 10, 50_000)
    words = np.array(["".join(random.choice(list(LETTERS), n)) for n in lengths])
    share = 1 / np.arange(1, len(words) + 1)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            drawn = words[random.choice(len(words), 100_000, p=share / share.sum())]
            for line in np.split(drawn, np.sort(random.integers(0, len(drawn), 1500))):
                file.write(" ".join(line) + "\n")


def probe(*args: str) -> dict[str, float]:
    """Seconds to the first step, and kB of anonymous memory at the end."""
    out = subprocess.run(
        [sys.executable, "-c", PROBE, *args, "--cpu"], capture_output=True, text=True
    )
    if out.returncode:
        sys.exit(out.stderr)
    lines = [line.split() for line in out.stdout.splitlines()]
    return {words[0]: float(words[1]) for words in lines if words[0] in ("first", "anon")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {platform.machine()}")
    print("| corpus | first start, s | second | RssAnon after a pass, MB |\n| - | - | - | - |")
    with tempfile.TemporaryDirectory() as name:
        for megabytes in (1, options.megabytes):
            corpus, folder = Path(name) / f"{megabytes}.txt", Path(name) / str(megabytes)
            write_text(corpus, megabytes)
            given = (str(corpus), "--out_dir", str(folder), "--overwrite", "--val_fraction", "0")
            starts = [probe(*given, "--steps", "1")["first"] for _ in "ab"]
            passed = probe(*given, "--epochs", "1", "--denoise", "0")["anon"] / 1000
            print(f"| {megabytes} MB | {starts[0]:.1f} | {starts[1]:.1f} | {passed:,.0f} |")


if __name__ == "__main__":
    main()
