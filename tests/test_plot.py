"""The picture of a run, as the command draws it."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run


@pytest.mark.parametrize(
    ("ending", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_curves_are_drawn_in_the_format_of_the_name(
    trained: Path, run: Run, tmp_path: Path, ending: str, begin: bytes
) -> None:
    out = run("plot", trained / "checkpoints", trained / "checkpoints", "-o", f"curves.{ending}")
    assert out.returncode == 0 and out.stdout == f"curves.{ending}\n" and not out.stderr
    drawn = (tmp_path / f"curves.{ending}").read_bytes()
    assert drawn.startswith(begin) and len(drawn) > 5000
    if ending == "svg":
        assert b"bits per byte" in drawn or drawn.count(b"<path") > 50


def test_the_folder_is_that_of_the_other_commands_by_default(trained: Path, run: Run) -> None:
    out = run("plot", "-o", "default.svg", cwd=trained)
    assert out.returncode == 0 and out.stdout == "default.svg\n", out.stderr
    (trained / "default.svg").unlink()


def test_a_log_cut_short_is_drawn(run: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "pretrain", "step": 1, "seconds": 2.0, "train_bpb": 3.0, "bytes_seen": 9}\n{"sta'
    )
    assert run("plot", ".").returncode == 0


def test_without_matplotlib_a_line_says_how_to_get_it(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from hrm_esp.cli import main; "
        f"sys.exit(main(['plot', {str(trained / 'checkpoints')!r}]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 2 and out.stderr.count("\n") == 1
    assert "pip install matplotlib" in out.stderr
