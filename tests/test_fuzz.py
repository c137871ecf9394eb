"""Random command lines keep the contract; more of them: tests/benchmarks/fuzz.py."""

import itertools
from pathlib import Path

import pytest
from command_fuzz import Case, cases, make_template, run_case
from hypothesis import HealthCheck, Phase, given, settings

N_CASES = 25  # about a second each


@pytest.fixture(scope="module")
def template(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    make_template(folder, trained / "checkpoints")
    return folder


def test_command_lines_keep_the_contract(template: Path, python: list[str], tmp_path: Path) -> None:
    numbers = itertools.count()

    @given(cases())
    @settings(
        max_examples=N_CASES, phases=[Phase.generate], database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case: Case) -> None:
        _, violations = run_case(case, template, tmp_path / str(next(numbers)), python)
        assert not violations, violations

    check()
