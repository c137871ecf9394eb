"""What a run shows and logs: a bar on a terminal, else lines on stderr, and ``metrics.jsonl``."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..console import print0
from ..distributed import world_size
from ..evaluation import perplexity
from ..files import atomic_write
from ..json_lines import describe_skipped, parse_entry, to_json
from ..model import HRMModel
from ..streams import STDERR
from .state import RunState, StepStats

LOG_SECONDS = 10.0  # between two lines, on stderr and in the log
BAR_SECONDS = 0.5  # between two updates of the bar


class MetricsLog:
    """Appends to ``metrics.jsonl`` in the folder of a run: a JSON object per line.

    All lines have ``stage``, ``step``, ``bytes_seen`` and ``seconds``. Lines of training add
    ``train_bpb``, ``lr``, ``grad_norm``, ``bytes_per_second``, ``code_perplexity`` and
    ``skipped_steps``; lines of a validation add ``val_bpb`` and, for pairs, ``val_exact_match``.

    A number that is not finite is null. Without a file that can be read there is no log, and a
    warning: no log keeps a run from going on.

    Args:
        stage: its lines after ``step`` are dropped: they are of another run, or will be written
            again. Lines of the other stage stay, and so does what is no entry.
    """

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        self.path, self.stage = folder / "metrics.jsonl", stage
        self.is_open = True
        try:
            if self.path.exists() and not self.path.is_file():
                raise OSError("not a file")
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            print0(f"warning: nothing is logged in {self.path}: {error.strerror or error}")
            self.is_open = False
            return
        kept, n_foreign = [], 0
        for line in content.split(b"\n"):
            entry = parse_entry(line)
            if entry is None or entry["stage"] != stage or entry["step"] <= step:
                kept.append(line)
            n_foreign += entry is None and line.strip() != b""
        if n_foreign:
            print0(describe_skipped(self.path, n_foreign))
        content = b"\n".join(kept)
        with atomic_write(self.path) as file:
            file.write(content if content.endswith(b"\n") or not content else content + b"\n")

    def add(self, state: RunState, **values: float | None) -> None:
        """Appends a line with the values that are not ``None``."""
        if not self.is_open:
            return
        entry: dict[str, object] = {
            "stage": self.stage,
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "seconds": round(state.seconds, 2),
        }
        for name, value in values.items():
            if value is not None:
                entry[name] = float(f"{value:.6g}")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")


class Meter:
    """Averages the last steps, and shows and logs them."""

    def __init__(self, title: str, state: RunState, log: MetricsLog) -> None:
        self.state, self.log = state, log
        self.bar = tqdm(
            total=100,
            desc=title,
            file=STDERR,
            dynamic_ncols=True,
            disable=None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.on_terminal = not self.bar.disable
        self.shown_at = time.perf_counter()
        self.reset()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def reset(self) -> None:
        self.nll, self.n_logged = 0.0, 0
        self.grad_norms: list[float] = []
        self.code_counts: Tensor | None = None
        self.since, self.bytes_before = time.perf_counter(), self.state.bytes_seen

    def update(self, step: StepStats) -> None:
        self.nll, self.n_logged = self.nll + step.nll, self.n_logged + step.n_logged
        self.grad_norms += [step.grad_norm] if math.isfinite(step.grad_norm) else []
        if step.code_counts is not None:
            counts = self.code_counts
            self.code_counts = step.code_counts if counts is None else counts + step.code_counts

    def show(self, progress: float, lr: float) -> None:
        """Shows the averages, if it is time or the run is over, and logs them less often."""
        now = time.perf_counter()
        interval = BAR_SECONDS if self.on_terminal else LOG_SECONDS
        if now - self.shown_at < interval and progress < 1:
            return
        state = self.state
        train_bpb = self.nll / self.n_logged / math.log(2) if self.n_logged else None
        speed = (state.bytes_seen - self.bytes_before) / (now - self.since)
        codes = None if self.code_counts is None else perplexity(self.code_counts)
        # Step 1: the bar, or a line. A validation score is shown with its age.
        parts = [] if train_bpb is None else [f"train {train_bpb:.3f} bits/byte"]
        if state.val_bpb is not None:
            right = "" if state.val_errors is None else f", {1 - state.val_errors:.1%} right"
            parts.append(f"val {state.val_bpb:.3f}{right} (at {state.val_progress:.0%})")
        parts.append(f"{speed:,.0f} B/s")
        if codes is not None:
            parts.append(f"{codes:.1f} codes")
        text = ", ".join(parts)
        if self.on_terminal:
            self.bar.n = round(100 * progress, 1)
            self.bar.set_postfix_str(text)
        else:
            left = state.seconds / progress - state.seconds
            print(
                f"{progress:4.0%}, {left:,.0f} s left, step {state.step:,}: {text}, lr {lr:.2g}",
                file=STDERR,
            )
        self.shown_at = now
        # Step 2: the log.
        if now - self.since >= LOG_SECONDS or progress >= 1:
            self.log.add(
                state,
                train_bpb=train_bpb,
                lr=lr,
                grad_norm=sum(self.grad_norms) / len(self.grad_norms) if self.grad_norms else None,
                bytes_per_second=speed,
                code_perplexity=codes,
                skipped_steps=state.skipped_total,
            )
            self.reset()


def describe_run(stage: str, model: HRMModel, dtype: torch.dtype, data: str = "") -> None:
    """Prints what is about to be trained, and on what."""
    precision = str(dtype).removeprefix("torch.")
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    print0(
        f"{stage}: {model.n_parameters():,} parameters{data}; "
        f"{model.device} in {precision}{processes}"
    )
