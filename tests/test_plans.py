"""Reports about plans, on models that the command trained."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, Run, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_esp.analysis.plans import compute_plans, label_points, report, report_neighbors
from hrm_esp.analysis.plot import figure


def test_each_text_has_the_code_of_its_plan() -> None:
    model = random_model(gumbel_hard=True)
    texts = TEXT.split("\n")
    plans = compute_plans(model, texts)
    assert model.planner.codebook is not None and plans.code_probs is not None
    codes = model.planner.codebook.codes.detach().numpy()
    for vector, probs in zip(plans.vectors, plans.code_probs, strict=True):
        np.testing.assert_allclose(vector, codes[probs.argmax(-1)], rtol=1e-5)
    lines = list(report(plans))
    shares = [float(line.split()[-1][:-1]) for line in lines if line.startswith("\ncode ")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))


def test_a_text_is_closest_to_itself() -> None:
    model = random_model(gumbel=False)
    plans = compute_plans(model, ["uno dos", "El mar", "uno dos", "La casa azul"])
    lines = list(report_neighbors(plans))
    assert lines[1].split() == ["1.00", "uno", "dos", "~", "uno", "dos"]
    assert len(lines) == 5
    assert len(list(report(compute_plans(model, ["solo"])))) == 1


@given(st.integers(0, 1000), st.floats(0.01, 10))
@settings(max_examples=5)
def test_labels_of_a_map_do_not_overlap(tmp_path_factory: pytest.TempPathFactory, seed: int,
                                        spread: float) -> None:  # fmt: skip
    out = tmp_path_factory.mktemp("map") / "map.svg"
    x, y = spread * np.random.default_rng(seed).standard_normal((2, 30))
    with figure(str(out), 1, 1, (9, 7)) as panels:
        panel = panels.flat[0]
        panel.scatter([-10, 10], [-10, 10])
        labels = [f"En un lugar {i}" for i in range(30)]
        kept = label_points(panel, x, y, labels)
    assert kept[0].get_text() == labels[0]
    drawn = [text.get_window_extent() for text in panel.texts]
    assert len(drawn) == len(kept)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(drawn, 2))


def test_the_command_shows_codes_and_draws_a_map(trained: Path, run: Run, tmp_path: Path) -> None:
    ckpt = trained / "checkpoints" / "pretrain_best.pt"
    out = run("plans", trained / "corpus.txt", "Otra línea", "--ckpt", ckpt, "-o", "map.png")
    assert out.returncode == 0 and not out.stderr, out.stderr
    assert out.stdout.startswith(f"{TEXT.count(chr(10)) + 2} texts") and "\ncode " in out.stdout
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    pairs = run("plans", trained / "pairs.tsv", "--ckpt", ckpt)
    assert pairs.stdout.startswith("60 texts") and "impar" not in pairs.stdout
