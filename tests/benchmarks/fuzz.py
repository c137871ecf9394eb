"""Random command lines, and whether they keep the contract of tests/command_fuzz.py.

    python tests/benchmarks/fuzz.py --cases 2000 --seed 1 --workers 2

Prints each violation with its command line, and how many cases had which exit status.
"""

import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import machine, new_parser
from hypothesis import HealthCheck, Phase, given, seed, settings

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from command_fuzz import Case, cases, make_template, run_case  # noqa: E402
from conftest import PAIRS, SMALL, TEXT  # noqa: E402


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    drawn = draw_cases(args.cases, args.seed)
    begin, failed = time.perf_counter(), list[int]()
    statuses: Counter[int | None] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template, python = prepare(folder)

        def run(number: int) -> None:
            case = drawn[number]
            status, violations = run_case(case, template, folder / f"case{number}", python)
            statuses[status] += 1
            if violations:
                failed.append(number)
                print(f"{number}: {case}", *violations, sep="\n    ", flush=True)

        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(run, range(len(drawn))))
    seconds = time.perf_counter() - begin
    print(f"\n{len(drawn):,} cases in {seconds:,.0f} s, seed {args.seed}; {machine()}")
    counts = ", ".join(f"{n:,} with {status}" for status, n in statuses.most_common())
    print(f"exit status: {counts}; violations: {len(failed):,}")


def draw_cases(n: int, number: int) -> list[Case]:
    drawn: list[Case] = []

    @seed(number)
    @given(cases())
    @settings(
        max_examples=n, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return drawn


def prepare(folder: Path) -> tuple[Path, list[str]]:
    """Trains small models, and starts a process that has imported torch: see command_server.py."""
    (folder / "corpus.txt").write_text(TEXT, encoding="utf-8")
    (folder / "pairs.tsv").write_text(PAIRS, encoding="utf-8")
    command = [sys.executable, "-m", "hrm_esp"]
    for args in (
        ["pretrain", "corpus.txt", "--steps", "20", *SMALL],
        ["finetune", "pairs.tsv", "--steps", "5"],
    ):
        subprocess.run([*command, *args], cwd=folder, check=True, capture_output=True)
    (folder / "template").mkdir()
    make_template(folder / "template", folder / "checkpoints")
    address = str(folder / "socket")
    server = subprocess.Popen(
        [sys.executable, TESTS / "command_server.py", address], stdout=subprocess.PIPE
    )
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    return folder / "template", [sys.executable, "-SE", str(TESTS / "command_client.py"), address]


if __name__ == "__main__":
    main()
