"""How much code a newcomer has to read.

    python tests/benchmarks/reading.py

Executes one step of pretraining on plain text and one on corrupted text, and separately one short
generation, and records which functions of the package run. Prints the number of files and of source
lines of these functions: decorators, signature, docstring and body. Building the model and loading
the data are not counted. Then the largest file, the longest function, and the flags of each
command.
"""

import argparse
import ast
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import numpy as np
import torch
from common import new_model, new_trainer

import hrm_esp
from hrm_esp import HRMConfig, PretrainConfig
from hrm_esp.cli import build_parser
from hrm_esp.data import LMDataset, load_stream

PACKAGE = Path(hrm_esp.__file__).parent
CPU_KERNELS = PACKAGE / "generation" / "cpu_kernels.py"
CONFIG = HRMConfig(d_model=64, n_heads=2, n_layers_enc=1, n_layers_dec=2, cross_attention=True)
PROMPT = "Había una vez"


class Function(NamedTuple):
    """A function's name, its first line, decorators included, and its last line."""

    name: str
    first: int
    last: int


def functions(path: Path) -> list[Function]:
    """Returns the functions of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(n.lineno for n in (node, *node.decorator_list))
            found.append(Function(node.name, first, node.end_lineno or first))
    return found


def executed_lines(call: Callable[[], object]) -> dict[Path, int]:
    """Returns the files of the package of which a call executes functions, and the number of lines
    of these functions in each."""
    executed: set[CodeType] = set()

    def record(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            executed.add(frame.f_code)

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    lines: dict[Path, set[int]] = defaultdict(set)  # sets: nested functions count once
    for code in executed:
        path = Path(code.co_filename)
        if PACKAGE not in path.parents:
            continue
        for name, first, last in functions(path):  # not of lambdas: they are part of a function
            if (name, first) == (code.co_name, code.co_firstlineno):
                lines[path].update(range(first, last + 1))
    return {path: len(numbers) for path, numbers in lines.items()}


def count_flags() -> dict[str, int]:
    """Returns the number of flags of each command, --help aside."""
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {
        name: sum(bool(a.option_strings) and a.dest != "help" for a in command._actions)
        for name, command in commands.choices.items()
    }


def main() -> None:
    stream = load_stream([PACKAGE / "samples" / "cuentos.txt"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(
            new_model(CONFIG, stream), stream, PretrainConfig(steps=10, out_dir=folder)
        )
    data, starts = trainer.data, np.arange(4) * 10_000
    assert isinstance(data, LMDataset)
    text, corrupted = data.windows(starts), data.corrupted(starts, 1, np.random.default_rng(0))
    generate, model = hrm_esp.generate, trainer.model
    torch.set_num_threads(1)

    def train() -> None:
        trainer.train_step([text])
        trainer.train_step([corrupted])

    training = executed_lines(train)
    generation = executed_lines(lambda: generate(model, PROMPT, max_new_tokens=30, seed=0))
    without_kernels = {path: n for path, n in generation.items() if path != CPU_KERNELS}
    print("| | files | lines |\n| --- | --- | --- |")
    for name, lines in (
        ("training step", training),
        ("generation", generation),
        ("generation, without cpu_kernels.py", without_kernels),
    ):
        print(f"| {name} | {len(lines)} | {sum(lines.values()):,} |")
    files = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    largest = max(files, key=files.__getitem__)
    print(f"| largest file: {largest.relative_to(PACKAGE.parent)} | 1 | {files[largest]:,} |")
    n_lines, name = max((f.last - f.first + 1, f.name) for path in files for f in functions(path))
    print(f"| longest function: {name} | 1 | {n_lines} |")
    print(f"| package | {len(files)} | {sum(files.values()):,} |")
    for name, n in count_flags().items():
        print(f"| flags of {name} | | {n} |")


if __name__ == "__main__":
    main()
