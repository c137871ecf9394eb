"""Speed of training and generation beside other processes that use the CPU.

    python tests/benchmarks/busy.py corpus.txt --base ../old_version --minutes 1 --repeats 5

Runs ``hrm-esp pretrain`` alone, beside one busy process and beside two, and ``hrm-esp generate``
with the model; of each the bytes per second, as a share of the speed alone. With --base, that is
the speed of another checkout of the package, which runs in turn with this one.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import machine, new_parser

HERE = Path(__file__).resolve().parents[2]
TEXT_BYTES = 4000  # that a call generates


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--base", type=Path, help="another checkout, whose speed alone is 100%%")
    parser.add_argument("--size", default="small")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max_busy", type=int, default=2)
    args = parser.parse_args()
    trees = {"base": args.base.resolve(), "now": HERE} if args.base else {"now": HERE}
    train, write = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for n_busy in range(args.max_busy + 1):
                for name, tree in sorted(trees.items(), reverse=bool(repeat % 2)):
                    if name == "base" and n_busy:
                        continue
                    with busy_processes(n_busy):
                        key, out = (name, n_busy), Path(folder) / name
                        train.setdefault(key, []).append(train_speed(tree, out, args))
                        write.setdefault(key, []).append(write_speed(tree, out))
    reference = next(iter(trees))
    print(f"{args.size}, {args.minutes:g} minutes, medians of {args.repeats}; {machine()}\n")
    print("| | busy processes | training, bytes/s | share | generation, bytes/s | share |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, n_busy in train:
        row = [name, str(n_busy)]
        for speeds in (train, write):
            speed = statistics.median(speeds[name, n_busy])
            share = speed / statistics.median(speeds[reference, 0])
            row += [f"{speed:,.0f}", f"{share:.0%}"]
        print(f"| {' | '.join(row)} |")


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Runs processes that use all the CPU time they get."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start(tree: Path, *args: object) -> subprocess.Popen[str]:
    """Starts ``hrm-esp`` of a checkout."""
    command = [sys.executable, "-m", "hrm_esp", *map(str, args)]
    return subprocess.Popen(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def train_speed(tree: Path, out: Path, args: argparse.Namespace) -> float:
    """Returns the bytes per second of a run."""
    with start(
        tree, "pretrain", args.corpus.resolve(), "--size", args.size, "--minutes", args.minutes,
        "--out_dir", out, "--overwrite", "--set", "val_fraction=0",
    ) as process:  # fmt: skip
        result, _ = process.communicate()
    found = re.search(r"([\d,]+) bytes seen in .* ([\d,]+) s", result)
    assert found is not None, result
    return int(found[1].replace(",", "")) / int(found[2].replace(",", ""))


def write_speed(tree: Path, out: Path) -> float:
    """Returns the bytes per second of a text, from its first byte on."""
    prompt = "La"
    with start(
        tree, "generate", "--ckpt", out / "pretrain_last.pt", "--prompt", prompt, "--seed", 1,
        "--max_new_tokens", TEXT_BYTES, "--min_new_tokens", TEXT_BYTES,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(len(prompt) + 1)
        begin = time.perf_counter()
        n = len(process.stdout.read().encode())
        seconds = time.perf_counter() - begin
    assert process.returncode == 0 and n >= TEXT_BYTES - 1
    return n / seconds


if __name__ == "__main__":
    main()
