"""Memory and start-up time with a corpus much larger than usual.

    python tests/benchmarks/big_corpus.py --megabytes 1000

Writes a random text of the given size, and one of 1 MB; word frequencies follow Zipf's law. On each
text the command starts twice, and the time to the first step is measured, without the import of
torch. Then the command makes one pass over the text, and its anonymous resident memory is read at
the end.

The pass would take days, so only about 20 of its steps are executed, evenly spaced; the other steps
read their batch and skip the rest. Denoising is off, because its batches differ in size. Linux
only: memory is read from /proc.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LETTERS = "eaosrnidlctumpbgvyqhfzjñxkwáéíóú"
N_STEPS = 20  # steps of a pass that are executed


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


def pretrain_and_measure(argv: list[str]) -> int:
    """Runs ``hrm-esp pretrain`` in this process. Prints the seconds between the import of torch and
    the end of the first step, and the anonymous resident memory at the end, in kB."""
    import torch._dynamo  # noqa: F401  (the optimizers import it)

    begin = time.perf_counter()

    from hrm_esp import Trainer, cli
    from hrm_esp.data import Batch
    from hrm_esp.training.state import StepStats

    train_step, run = Trainer.train_step, Trainer.run
    end_times: list[float] = []  # of the executed steps

    def train_some_steps(trainer: Trainer, batches: list[Batch]) -> StepStats:
        if len(end_times) > trainer.progress() * N_STEPS:
            return StepStats(sum(b.n_targets for b in batches), 0.0, 0, 0.0, 0.0, None)
        stats = train_step(trainer, batches)
        end_times.append(time.perf_counter())
        return stats

    def run_and_measure(trainer: Trainer) -> None:
        run(trainer)
        memory = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert memory is not None
        print("measured", end_times[0] - begin, memory[1])

    Trainer.train_step, Trainer.run = train_some_steps, run_and_measure
    return cli.main(["pretrain", *argv])


def measure(*argv: str) -> tuple[float, float]:
    """Runs `pretrain_and_measure` in a new process. Returns the seconds to the first step and the
    memory in MB."""
    command = [sys.executable, __file__, "--measure", *argv, "--cpu"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        sys.exit(process.stderr)
    (line,) = (x for x in process.stdout.splitlines() if x.startswith("measured"))
    _, seconds, kilobytes = line.split()
    return float(seconds), float(kilobytes) / 1000


def main() -> None:
    from common import machine, new_parser  # imports torch, which is not to be measured

    parser = new_parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    args = parser.parse_args()
    print(machine())
    print("| corpus | first start, s | second start, s | RssAnon after a pass, MB |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in (1, args.megabytes):
            corpus, out_dir = Path(folder) / f"{megabytes}.txt", Path(folder) / str(megabytes)
            write_text(corpus, megabytes)
            flags = [str(corpus), "--out_dir", str(out_dir), "--overwrite"]
            flags += ["--set", "val_fraction=0"]
            (first, _), (second, _) = (measure(*flags, "--steps", "1") for _ in range(2))
            _, memory = measure(*flags, "--epochs", "1", "--set", "denoise=0")
            print(f"| {megabytes} MB | {first:.1f} | {second:.1f} | {memory:,.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        sys.exit(pretrain_and_measure(sys.argv[2:]))
    main()
