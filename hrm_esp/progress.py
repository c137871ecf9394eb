"""What a person sees while waiting, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor
from tqdm import tqdm

from .files import written_whole

if TYPE_CHECKING:
    from .trainer import RunState

LOG_SECONDS = 10.0  # between lines; the bar is told twice a second


def scoring_bar(total: int, unit: str, show: bool = True) -> tqdm[NoReturn]:
    """A bar that leaves nothing behind."""
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        desc="scoring",
        leave=False,
        disable=None if show else True,
    )


def entropy(p: Tensor) -> Tensor:
    """Probabilities (..., K) -> nats (...)."""
    return -(p * p.clamp(min=1e-9).log()).sum(-1)


def perplexity(usage: Tensor) -> float:
    """How many codes are in use: counts (K,) -> exp of the entropy."""
    return float(entropy(usage / usage.sum(-1, keepdim=True)).exp().mean())


class MetricsLog:
    """``metrics.jsonl`` of a run's folder: a line of JSON for each logging step and each scoring.

    Every line has ``stage``, ``step``, ``bytes_seen`` and ``seconds``. Those of a logging step add
    ``train_bpb``, ``lr``, ``grad_norm``, ``bytes_per_second``, ``codes`` (perplexity) and
    ``skipped`` (steps, so far); those of a scoring ``val_bpb`` and, of pairs, ``val_exact_match``.

    Args:
        folder: of the run.
        stage: of which the lines after ``step`` are dropped: they were of another run, or are about
            to be written again. Those of the other stage stay.
    """

    def __init__(self, folder: Path, stage: str, step: int) -> None:
        self.path, self.stage = folder / "metrics.jsonl", stage
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # half written when the machine went down
                if entry["stage"] != stage or entry["step"] <= step:
                    kept.append(line + "\n")
        with written_whole(self.path) as file:
            file.write("".join(kept).encode())

    def add(self, state: RunState, **figures: float | None) -> None:
        """Adds a line with the figures that there are."""
        entry: dict[str, object] = {
            "stage": self.stage,
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "seconds": round(state.seconds, 2),
        }
        for name, figure in figures.items():
            if figure is not None:
                entry[name] = float(f"{figure:.6g}")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Meter:
    """Loss, speed, gradient and use of codes of the last seconds, shown and logged."""

    def __init__(self, title: str, state: RunState, log: MetricsLog) -> None:
        self.log = log
        self.bar = tqdm(
            total=100,
            desc=title,
            disable=None,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )
        self.on_terminal = not self.bar.disable
        self.shown_at = time.perf_counter()
        self.restart(state)

    def restart(self, state: RunState) -> None:
        self.nats, self.tokens = 0.0, 0
        self.norms: list[float] = []
        self.usage: Tensor | None = None
        self.since, self.bytes_then = time.perf_counter(), state.bytes_seen

    def add(self, nats: float, tokens: int, norm: float, usage: Tensor | None) -> None:
        """Takes in a step: the loss of so many tokens, summed, the norm of its gradient, and counts
        of the codes (K,)."""
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens
        self.norms += [norm] if math.isfinite(norm) else []
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage + usage

    def show(self, state: RunState, progress: float, lr: float) -> None:
        """Shows where the run stands, if it is time or the run is over."""
        now = time.perf_counter()
        if now - self.shown_at < (0.5 if self.on_terminal else LOG_SECONDS) and progress < 1:
            return
        train = self.nats / self.tokens / math.log(2) if self.tokens else None
        speed = (state.bytes_seen - self.bytes_then) / (now - self.since)
        codes = None if self.usage is None else perplexity(self.usage)
        bits = [] if train is None else [f"train {train:.3f}"]
        bits += [] if state.val_bpb is None else [f"val {state.val_bpb:.3f}"]
        text = (f"{' '.join(bits)} bits/byte, " if bits else "") + f"{speed:,.0f} B/s"
        if state.val_errors is not None:
            text += f", {1 - state.val_errors:.1%} right"
        if codes is not None:
            text += f", {codes:.1f} codes"
        if self.on_terminal:
            self.bar.n = round(100 * progress, 1)
            self.bar.set_postfix_str(text)
        else:
            left = state.seconds / progress - state.seconds
            print(
                f"{progress:4.0%}, {left:,.0f} s left, step {state.step:,}: {text}, lr {lr:.2g}",
                file=sys.stderr,
            )
        self.shown_at = now
        if now - self.since >= LOG_SECONDS or progress >= 1:
            self.log.add(
                state,
                train_bpb=train,
                lr=lr,
                grad_norm=sum(self.norms) / len(self.norms) if self.norms else None,
                bytes_per_second=speed,
                codes=codes,
                skipped=state.skipped_in_all,
            )
            self.restart(state)
