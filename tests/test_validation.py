"""How often a run validates, on how much, and what it shows of it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CONFIG, SMALL, TEXT, Run, random_model

from hrm_esp.config import PretrainConfig
from hrm_esp.data import Batch, LMDataset
from hrm_esp.model import HRMModel
from hrm_esp.training import Score, Trainer, metrics_log, trainer, validation


def validations(folder: Path, stage: str) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` that are of a validation."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for line in lines if (entry := json.loads(line))["stage"] == stage]
    return [entry for entry in entries if "val_bpb" in entry]


@pytest.mark.parametrize(("minutes", "seconds"), [(2, 0.1), (2, 3), (2, 45), (10, 13)])
def test_a_run_of_two_minutes_validates_at_least_five_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: int, seconds: float
) -> None:
    """Whatever it takes to score all validation data, up to 37% of the run, and also if one
    validation takes a tenth of the run, because the machine was busy. The clock moves by a
    sixtieth of the run in each step, and when the model validates."""
    clock = 0.0
    for module in (trainer, validation, metrics_log):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock))
    monkeypatch.setattr(trainer.RunningClock, "seconds", lambda _: clock)

    class SlowDataset(LMDataset):
        def batches(self, *args: Any, **keywords: Any) -> Iterator[tuple[int, Batch]]:
            nonlocal clock
            for item in super().batches(*args, **keywords):
                clock += minutes
                yield item

    sizes = []

    def validate(model: HRMModel, size: float) -> Score:
        nonlocal clock
        sizes.append(size)
        clock += 6 * minutes if len(sizes) == 4 else seconds * size
        return Score(0.5, 1.0, 200)

    data = SlowDataset(np.frombuffer(TEXT.encode(), dtype=np.uint8), CONFIG.max_len)
    options = PretrainConfig(minutes=minutes, out_dir=str(tmp_path), batch_size=1, denoise=0)
    Trainer(random_model(), data, options, stage="finetune", data_id="", validate=validate).run()
    times = [entry["seconds"] / (60 * minutes) for entry in validations(tmp_path, "finetune")]
    assert len(times) >= 5 and times[-1] >= 1
    # Their sizes are equal, so that scores can be compared: the first only measured the time.
    assert len(sizes) == len(times) + 1 and len(set(sizes[1:])) == 1
    size = sizes[1]
    assert 1 / 8 <= size <= 1
    assert size == 1 or (len(times) * size * seconds < 0.06 * 60 * minutes) or size == 1 / 8
    # They are even: no score shown is older than a third of the run.
    gaps = np.diff([0, *times])
    assert gaps.max() < 1 / 3
    during_run = sum(sizes[:-1]) * seconds  # without the one that took so long
    assert during_run < 0.25 * 60 * minutes


def test_a_validation_is_shown_with_its_age(trained: Path, run: Run, tmp_path: Path) -> None:
    start = trained / "checkpoints" / "pretrain_best.pt"
    finetune = ("finetune", trained / "pairs.tsv", "--ckpt", start)
    pretrain = ("pretrain", trained / "corpus.txt", *SMALL)
    for command in (pretrain, finetune):
        before_first = run(*command, "--steps", 1, "--overwrite").stderr
        assert "100%" in before_first and "val " not in before_first
        shown = run(*command, "--steps", 16, "--overwrite").stderr.splitlines()
        (line,) = (text for text in shown if text.startswith("100%"))
        score = validations(tmp_path / "checkpoints", command[0])[-2]
        assert score["step"] == 14
        expected = f"val {score['val_bpb']:.3f}"
        if command is finetune:
            expected += f", {score['val_exact_match']:.1%} right"
        assert re.search(re.escape(f", {expected} (at 88%), "), line), line
