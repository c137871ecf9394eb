"""What a person sees while waiting, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from .training import RunState

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
    """How many codes are in use: counts (G, K) -> exp of the entropy, averaged over codebooks."""
    return float(entropy(usage / usage.sum(-1, keepdim=True)).exp().mean())


class Meter:
    """Loss, speed and use of codes of the last seconds."""

    def __init__(self, title: str, state: RunState) -> None:
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
        self.usage: Tensor | None = None
        self.since, self.bytes_then = time.perf_counter(), state.bytes_seen

    def add(self, nats: float, tokens: int, usage: Tensor | None) -> None:
        """Takes in a step: the loss of so many tokens, summed, and counts of the codes (G, K)."""
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens
        if usage is not None:
            self.usage = usage if self.usage is None else self.usage + usage

    def show(self, state: RunState, progress: float, lr: float) -> None:
        """Shows where the run stands, if it is time or the run is over."""
        now = time.perf_counter()
        if now - self.shown_at < (0.5 if self.on_terminal else LOG_SECONDS) and progress < 1:
            return
        bits = [f"train {self.nats / self.tokens / math.log(2):.3f}"] if self.tokens else []
        bits += [] if state.val_bpb is None else [f"val {state.val_bpb:.3f}"]
        speed = (state.bytes_seen - self.bytes_then) / (now - self.since)
        text = (f"{' '.join(bits)} bits/byte, " if bits else "") + f"{speed:,.0f} B/s"
        if state.val_errors is not None:
            text += f", {1 - state.val_errors:.1%} right"
        if self.usage is not None:
            text += f", {perplexity(self.usage):.1f} codes"
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
        if now - self.since >= LOG_SECONDS:
            self.restart(state)
