"""Time and memory that a corpus costs, by its size.

    python tests/benchmarks/big_corpus.py --megabytes 2 95 1000
    python tests/benchmarks/big_corpus.py --megabytes 1000 --pass

Writes a random text of each size; word frequencies follow Zipf's law. On each text the command
starts with an empty folder, trains for some steps and is stopped. Then it starts again, with cached
files. Columns of the table:

- reading: seconds of reading the text and holding out a part of it. In parentheses, here and below:
  CPU seconds, which other processes of the machine hardly change.
- counting: seconds of counting n-grams.
- cached: size of `corpus.tokens` and `ngrams.counts`.
- build, training: peak of the anonymous resident memory, without memory-mapped files.
- entries, contexts from: of the n-gram table; contexts that occurred less often are dropped.
- second start: seconds from the command to the end of the first step, `import torch` included.
- bytes/s: of training with the whole batch from the first step on, after some seconds; in
  parentheses bytes per CPU second, and their share of the first row's.

``--pass`` measures the anonymous resident memory at the end of one pass over the text instead. The
pass would take days, so only about 20 of its steps are executed, evenly spaced; the other steps
read their batch and skip the rest. Denoising is off there, because its batches differ in size.

Linux only: memory is read from /proc. A text of N MB needs twice as much disk and 640 MB more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

LETTERS = "eaosrnidlctumpbgvyqhfzjñxkwáéíóú"
N_STEPS = 20  # steps of a pass that are executed
POLL_SECONDS = 0.05  # between two looks at a run
TRAINED_BYTES = 100_000  # whose speed is measured: 24 steps
ENTRIES_BEGIN = 4096 + 8  # bytes of ngrams.counts before its entries: a header and a count
HEADER = """\
| corpus, MB | reading, s | counting, s | cached, MB | build, MB | training, MB | entries, million \
| contexts from | second start, s | bytes/s |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def write_text(path: Path, megabytes: int) -> None:
    """Writes a random text of about so many megabytes."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 10, 50_000)
    words = np.array(["".join(rng.choice(list(LETTERS), n)) for n in lengths])
    frequency = 1 / np.arange(1, len(words) + 1)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            chosen = words[rng.choice(len(words), 100_000, p=frequency / frequency.sum())]
            for line in np.split(chosen, np.sort(rng.integers(0, len(chosen), 1500))):
                file.write(" ".join(line) + "\n")


def anonymous_memory(pid: int | str) -> float:
    """Returns the anonymous resident memory of a process in MB, 0 if it has ended."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        if found is not None:
            return int(found[1]) / 1000
    return 0.0


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Duration(NamedTuple):
    """Seconds of the clock, and of the CPU."""

    seconds: float
    cpu: float

    def since(self, earlier: Duration) -> Duration:
        return Duration(self.seconds - earlier.seconds, self.cpu - earlier.cpu)

    def __str__(self) -> str:
        return f"{self.seconds:.1f} ({self.cpu:.1f})"


class Run:
    """``hrm-esp pretrain`` in a process of its own.

    ``peak``: of its anonymous resident memory in MB, as long as `wait_for` waits.
    """

    def __init__(self, corpus: Path, out_dir: Path, stderr: IO[str], *flags: str) -> None:
        self.out_dir, self.peak, self.begin = out_dir, 0.0, time.perf_counter()
        command = [sys.executable, "-m", "hrm_esp", "pretrain", str(corpus), "--cpu", *flags]
        self.process = subprocess.Popen(
            [*command, "--out_dir", str(out_dir)], stdout=subprocess.DEVNULL, stderr=stderr
        )

    def wait_for(self, is_reached: Callable[[], object]) -> Duration:
        """Waits until something is reached. Returns the time since the start.

        Raises:
            SystemExit: the process ended before that.
        """
        while not is_reached():
            if self.process.poll() is not None:
                sys.exit(f"exit status {self.process.returncode} of {self.process.args}")
            self.peak = max(self.peak, anonymous_memory(self.process.pid))
            time.sleep(POLL_SECONDS)
        return Duration(time.perf_counter() - self.begin, cpu_seconds(self.process.pid))

    def has_file(self, pattern: str) -> bool:
        return any(self.out_dir.glob(pattern))

    def bytes_seen(self) -> int:
        """Returns the bytes of training that are logged: every 10 seconds."""
        path = self.out_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(x)["bytes_seen"] for x in lines if x.endswith("}")), default=0)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


class Cost(NamedTuple):
    """What a corpus costs: see the columns of the table. ``message``: the line about contexts that
    were dropped."""

    reading: Duration
    counting: Duration
    cached: float
    build_memory: float
    training_memory: float
    n_entries: int
    min_count: int
    message: str
    second_start: Duration
    speed: Duration  # bytes a second


def measure_cost(corpus: Path, out_dir: Path) -> Cost:
    """Trains on a text for some steps, then starts again."""
    shutil.rmtree(out_dir, ignore_errors=True)
    log = out_dir.with_suffix(".log")
    flags = ("--steps", "1000000", "--set", "grow=false")
    with open(log, "w") as stderr:
        # Step 1: the first start. A file that is being written has a longer name.
        run = Run(corpus, out_dir, stderr, *flags)
        started = run.wait_for(lambda: run.has_file("*corpus.tokens*"))
        read = run.wait_for(lambda: run.has_file("*ngrams.counts*"))
        counted = run.wait_for(lambda: run.has_file("ngrams.counts"))
        build_memory, run.peak = run.peak, 0.0
        warm = run.wait_for(run.bytes_seen)
        n_before = run.bytes_seen()
        trained = run.wait_for(lambda: run.bytes_seen() >= n_before + TRAINED_BYTES).since(warm)
        n_bytes = run.bytes_seen() - n_before
        run.stop()
    messages = [x for x in log.read_text().splitlines() if x.startswith("n-gram counts:")]
    message = messages[0] if messages else ""
    found = re.search(r"at least (\d+) times", message)
    sizes = [(out_dir / name).stat().st_size for name in ("corpus.tokens", "ngrams.counts")]
    with open(log, "w") as stderr:
        # Step 2: the second start. The line of the last step comes at once.
        again = Run(corpus, out_dir, stderr, "--overwrite", "--steps", "1", "--set", "grow=false")
        second_start = again.wait_for(lambda: "100%, " in log.read_text())
        again.stop()
    return Cost(
        read.since(started),
        counted.since(read),
        sum(sizes) / 1e6,
        build_memory,
        run.peak,
        (sizes[1] - ENTRIES_BEGIN) // 8,
        int(found[1]) if found else 1,
        message,
        second_start,
        Duration(n_bytes / trained.seconds, n_bytes / trained.cpu),
    )


def print_costs(texts: dict[int, Path], folder: Path) -> None:
    """Prints the table, and the lines about contexts that were dropped."""
    print(HEADER)
    messages, first_speed = [], 0.0
    for megabytes, corpus in texts.items():
        cost = measure_cost(corpus, folder / f"{megabytes}.run")
        first_speed = first_speed or cost.speed.cpu
        print(
            f"| {megabytes:,} | {cost.reading} | {cost.counting} | {cost.cached:,.0f} | "
            f"{cost.build_memory:,.0f} | {cost.training_memory:,.0f} | {cost.n_entries / 1e6:.1f} "
            f"| {cost.min_count} | {cost.second_start} | {cost.speed.seconds:,.0f} "
            f"({cost.speed.cpu:,.0f}, {cost.speed.cpu / first_speed:.0%}) |",
            flush=True,
        )
        messages.append(f"{megabytes:,} MB: {cost.message or 'all contexts fit'}")
    print("\n".join(messages))


def run_pass(argv: list[str]) -> int:
    """Runs ``hrm-esp pretrain`` in this process, with `N_STEPS` steps. Prints the anonymous
    resident memory at the end in MB."""
    from hrm_esp import Trainer, cli
    from hrm_esp.data import Batch
    from hrm_esp.training.state import StepStats

    train_step, run = Trainer.train_step, Trainer.run
    n_steps = 0

    def train_some_steps(
        trainer: Trainer, batches: list[Batch], next_batches: list[Batch] | None = None
    ) -> StepStats:
        nonlocal n_steps
        if n_steps > trainer.progress() * N_STEPS:
            return StepStats(sum(b.n_targets for b in batches), 0.0, 0, 0.0, 0.0, None)
        n_steps += 1
        return train_step(trainer, batches, next_batches)

    def run_and_measure(trainer: Trainer) -> None:
        run(trainer)
        print("measured", anonymous_memory("self"))

    Trainer.train_step, Trainer.run = train_some_steps, run_and_measure
    return cli.main(["pretrain", *argv])


def print_passes(texts: dict[int, Path], folder: Path) -> None:
    """Prints the memory after a pass over each text."""
    print("| corpus, MB | RssAnon after a pass, MB |\n| --- | --- |")
    for megabytes, corpus in texts.items():
        command = [sys.executable, __file__, "--measure", str(corpus), "--cpu", "--epochs", "1"]
        command += ["--set", "denoise=0", "--set", "val_fraction=0"]
        command += ["--out_dir", str(folder / f"{megabytes}.pass")]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        (line,) = (x for x in process.stdout.splitlines() if x.startswith("measured"))
        print(f"| {megabytes:,} | {float(line.split()[1]):,.0f} |", flush=True)


def main() -> None:
    from common import machine, new_parser  # imports torch

    parser = new_parser(__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[2, 95, 1000])
    parser.add_argument("--pass", dest="one_pass", action="store_true", help="see above")
    parser.add_argument("--folder", type=Path, help="keep the texts and the runs here")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        texts = {megabytes: folder / f"{megabytes}.txt" for megabytes in args.megabytes}
        for megabytes, path in texts.items():
            if not path.exists():
                write_text(path, megabytes)
        if args.one_pass:
            print_passes(texts, folder)
        else:
            print_costs(texts, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.exit(run_pass(sys.argv[2:]))
    main()
