"""Which part of the package may import which, and the names it exports."""

import ast
import importlib
from pathlib import Path

import pytest

import hrm_esp

ROOT = Path(hrm_esp.__file__).parent
# Each may import from its own line and from the lines above it.
LAYERS = (
    ("errors", "options", "config", "continue_config", "tokenizer"),
    ("launch", "streams", "cpu_load", "files", "json_lines", "device", "distributed", "console"),
    ("data",),
    ("ngrams",),
    ("model",),
    ("generation",),
    ("evaluation",),
    ("restoration",),
    ("training",),
    ("analysis",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MISSION = """ByteTokenizer load_corpus_lines dataset_lm dataset_tsv RMSNorm MHA FFN DecoderBlock
    EncoderBlock Planner Executor HRMConfig HRMModel train_lm train_ft generate cli""".split()


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a module imports from, also inside functions."""
    parts = set()
    package = ["hrm_esp", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module or "").split(".")] if node.module else base
            full = [[*names, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [alias.name.split(".") for alias in node.names]
        else:
            continue
        parts |= {name[1] for name in full if name[0] == "hrm_esp" and len(name) > 1}
    return parts & RANK.keys()


@pytest.mark.parametrize("part", RANK)
def test_imports_go_one_way(part: str) -> None:
    paths = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else (ROOT / part).rglob("*.py")
    for path in paths:
        for other in imported_parts(path):
            assert RANK[other] <= RANK[part], f"{path.relative_to(ROOT)} imports {other}"


def test_every_module_has_a_place() -> None:
    found = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == RANK.keys()


def test_every_part_of_the_mission_is_exported() -> None:
    for name in [*MISSION, *hrm_esp.__all__]:
        assert getattr(hrm_esp, name) is not None
    for module, name in (("model", "Planner"), ("data", "dataset_tsv"), ("training", "train_lm")):
        found = getattr(importlib.import_module(f"hrm_esp.{module}"), name)
        assert found is getattr(hrm_esp, name)
