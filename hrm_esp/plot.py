"""Curves of runs, from the ``metrics.jsonl`` in their folders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import HRMError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg", ".pdf")
# Told apart by the colour-blind (Okabe & Ito 2008), and by their lines where all is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "x")


class Run(NamedTuple):
    """The entries of one stage of a run."""

    name: str
    entries: list[dict[str, Any]]

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Two figures side by side, of the entries that have both."""
        found = [(e[x], e[y]) for e in self.entries if x in e and y in e]
        return [a for a, _ in found], [b for _, b in found]


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in folders, one for each stage.

    Raises:
        HRMError: a folder without a log, or a log that is none.
    """
    runs = []
    for folder in map(Path, folders):
        path = folder / "metrics.jsonl" if folder.is_dir() else folder
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise HRMError(f"no log of a run in {folder}: give the --out_dir of one") from error
        by_stage: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            try:
                entry = json.loads(line)
                by_stage.setdefault(entry["stage"], []).append(entry)
            except (ValueError, TypeError, KeyError):
                continue  # half written when the machine went down
        if not by_stage:
            raise HRMError(f"nothing is logged in {path} yet")
        for stage, entries in by_stage.items():
            name = str(folder) if len(by_stage) == 1 else f"{folder}, {stage}"
            runs.append(Run(name, entries))
    return runs


@contextmanager
def figure(out: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Panels to draw in, (rows, columns), saved in the format of the file's ending.

    Raises:
        HRMError: matplotlib is missing, or the ending is unknown.
    """
    if not out.endswith(ENDINGS):
        raise HRMError(f"cannot draw {out}: give a file that ends in {', '.join(ENDINGS)}")
    try:
        import matplotlib
    except ImportError as error:
        raise HRMError("plotting needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        drawn, panels = pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        yield panels
        drawn.savefig(out, dpi=110)
        pyplot.close(drawn)


def plot(folders: Sequence[str], out: str) -> None:
    """Draws bits per byte against bytes and minutes, and learning rate, speed and use of codes.

    Args:
        folders: those of the runs, drawn over one another.
        out: a file, in the format of its ending.

    Raises:
        HRMError: matplotlib is missing, a folder has no log, or the file's ending is unknown.
    """
    with figure(out, 2, 3, (13, 7)) as panels:
        runs = read_runs(folders)
        size, minutes, lr, speed, codes, legend = panels.flat
        bits(size, runs, "bytes_seen", "million bytes seen", lambda n: n / 1e6)
        bits(minutes, runs, "seconds", "minutes", lambda s: s / 60)
        panel(lr, runs, "lr", "learning rate")
        panel(speed, runs, "bytes_per_second", "bytes per second")
        panel(codes, runs, "codes", "codes in use (perplexity)")
        legend.axis("off")
        handles, labels = size.get_legend_handles_labels()
        legend.legend(handles, labels, loc="center left", frameon=False)


def styles(runs: Sequence[Run]) -> itertools.chain[Any]:
    """Each run with its colour, line and marker."""
    cycles = (itertools.cycle(c) for c in (COLOURS, LINES, MARKERS))
    return itertools.chain(zip(runs, *cycles))  # noqa: B905


def bits(axes: Axes, runs: Sequence[Run], x: str, label: str, scale: Callable[..., float]) -> None:
    """Bits per byte, as trained (faint) and of held-out data (marked)."""
    top = []
    for run, colour, line, marker in styles(runs):
        for y, keywords in (
            ("train_bpb", {"alpha": 0.45, "linewidth": 1.2}),
            ("val_bpb", {"marker": marker, "markersize": 5, "linewidth": 2}),
        ):
            xs, ys = run.curve(x, y)
            kind = "train" if y == "train_bpb" else "held out"
            axes.plot([scale(v) for v in xs], ys, line, color=colour, label=f"{run.name}: {kind}",
                      **keywords)  # fmt: skip
            top += sorted(ys)[
                : max(1, round(0.9 * len(ys)))
            ]  # the very beginning would flatten all
    if top:
        axes.set_ylim(min(top) - 0.03 * max(top), max(top) * 1.05)
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)


def panel(axes: Axes, runs: Sequence[Run], y: str, label: str) -> None:
    """One figure against minutes."""
    for run, colour, line, _ in styles(runs):
        xs, ys = run.curve("seconds", y)
        axes.plot([s / 60 for s in xs], ys, line, color=colour)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
