"""Checks the package on a GPU and measures its speed, in about 8 minutes.

    bash tests/benchmarks/gpu_check.sh
    bash tests/benchmarks/gpu_check.sh --only speed,where
    python tests/benchmarks/gpu_check.py --device cpu --quick    # tests the check itself

Run it in the root of the repository. It needs transformers and the packages of the ``test`` extra.
A part that fails does not stop the others; a part that no longer fits in ``--seconds`` is left out.
Lines that begin with OK or BAD are verdicts, all others are figures. The verdicts that are BAD are
repeated at the end, and the exit status is 1 if there are any.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A copy of this file in the root finds its parts, too.
sys.path.insert(0, str(Path.cwd() / "tests" / "benchmarks"))
sys.path.insert(0, str(Path.cwd()))

import gpu_commands
import gpu_equal
import gpu_speed
import torch
from gpu_common import Check


class Part(NamedTuple):
    """A part of the check, and about how many seconds it takes on a GPU."""

    name: str
    seconds: float
    run: Callable[[Check], None]


PARTS = (
    Part("env", 10, gpu_speed.env),
    Part("same", 60, gpu_equal.same),
    Part("waits", 25, gpu_speed.waits),
    Part("speed", 110, gpu_speed.speed),
    Part("where", 40, gpu_speed.where),
    Part("nccl", 15, gpu_equal.nccl),
    Part("runs", 160, gpu_commands.runs),
    Part("tests", 75, gpu_commands.tests),
    Part("two", 30, gpu_commands.two),
    Part("compiled", 90, gpu_speed.compiled),
)


def run_part(check: Check, part: Part) -> None:
    """Runs a part; an error is a verdict."""
    print(f"\n--- {part.name} ({check.seconds_used():.0f} s)", flush=True)
    begin = time.perf_counter()
    try:
        part.run(check)
    except Exception:
        trace = traceback.format_exc().strip().splitlines()
        print("\n".join(trace[-12:]))
        check.verdict(False, f"{part.name} did not finish: {trace[-1][:200]}")
    print(f"({part.name} took {time.perf_counter() - begin:.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the check")
    parser.add_argument("--only", default="", metavar="PARTS", help=f"of {','.join(names)}")
    parser.add_argument("--quick", action="store_true", help="few steps, small models, no limit")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"no part {unknown[0]}: give some of {','.join(names)}")
    check = Check(torch.device(args.device), args.seconds, args.quick)
    for part in PARTS:
        if part.name not in chosen:
            continue
        if check.seconds_left() < part.seconds / 2:
            print(f"\n--- {part.name}: left out, {check.seconds_left():.0f} s left")
            continue
        run_part(check, part)
    bad = [verdict for verdict in check.verdicts if verdict.startswith("BAD")]
    print("\n=== verdicts", *bad, sep="\n")
    print(
        f"{len(check.verdicts) - len(bad)} OK, {len(bad)} BAD, {check.seconds_used():.0f} s",
        flush=True,
    )
    (check.out / "verdicts.txt").write_text("\n".join(check.verdicts) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
