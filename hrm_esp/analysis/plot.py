"""Curves of runs, from the ``metrics.jsonl`` in their folders."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import HRMError
from ..json_lines import describe_skipped, parse_entry
from ..streams import STDERR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE_TYPES = (".png", ".svg", ".pdf")
# Colors that the color-blind can tell apart (Okabe & Ito 2008), and lines for black and white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "x")
MAX_DRAWN = 1e100  # larger numbers are left out, as NaN is


class Run(NamedTuple):
    """The log entries of one stage of a run."""

    name: str
    entries: list[dict[str, Any]]

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """Returns the values of x and y in the entries that have a number for both."""
        entries = [e for e in self.entries if is_number(e.get(x)) and is_number(e.get(y))]
        return [float(e[x]) for e in entries], [float(e[y]) for e in entries]


def is_number(value: Any) -> bool:
    """Whether a value of a log is a number that can be drawn."""
    return type(value) in (int, float) and -MAX_DRAWN < value < MAX_DRAWN


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Reads the logs in some folders; a run per stage. Counts what is no entry on stderr.

    Raises:
        HRMError: a folder without a log, or an empty log.
    """
    runs = []
    for folder in map(Path, folders):
        path = folder / "metrics.jsonl" if folder.is_dir() else folder
        try:
            if not path.is_file():  # a device may have no end
                raise FileNotFoundError(path)
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise HRMError(f"no log of a run in {folder}: give the --out_dir of one") from error
        by_stage: dict[str, list[dict[str, Any]]] = {}
        n_foreign = 0
        for line in filter(bytes.strip, lines):
            if (entry := parse_entry(line)) is None:
                n_foreign += 1
            else:
                by_stage.setdefault(entry["stage"], []).append(entry)
        if n_foreign:
            print(describe_skipped(path, n_foreign), file=STDERR)
        if not by_stage:
            raise HRMError(f"nothing is logged in {path} yet")
        for stage, entries in by_stage.items():
            name = str(folder) if len(by_stage) == 1 else f"{folder}, {stage}"
            runs.append(Run(name, entries))
    return runs


@contextmanager
def figure(out: str, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Yields panels (rows, columns) to draw in, and saves them to a file.

    Args:
        out: the file; its name says the type.
        size: in inches.

    Raises:
        HRMError: matplotlib is missing, or the file type is unknown.
    """
    if not out.endswith(FILE_TYPES):
        raise HRMError(f"cannot draw {out}: give a file that ends in {', '.join(FILE_TYPES)}")
    try:
        import matplotlib
    except ImportError as error:
        raise HRMError("plotting needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.parse_math": False,  # the name of a folder may have two dollar signs
        }
    ):
        drawn, panels = pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        yield panels
        drawn.savefig(out, dpi=110)
        pyplot.close(drawn)


def plot(folders: Sequence[str], out: str) -> None:
    """Draws bits per byte, learning rate, speed and code perplexity of runs, over one another.

    Args:
        folders: of the runs.
        out: the file; its name says the type.

    Raises:
        HRMError: matplotlib is missing, a folder has no log, or the file type is unknown.
    """
    with figure(out, 2, 3, (13, 7)) as panels:
        runs = read_runs(folders)
        by_bytes, by_minutes, lr, speed, codes, legend = panels.flat
        plot_bits(by_bytes, runs, "bytes_seen", "million bytes seen", lambda n: n / 1e6)
        plot_bits(by_minutes, runs, "seconds", "minutes", lambda s: s / 60)
        plot_metric(lr, runs, "lr", "learning rate")
        plot_metric(speed, runs, "bytes_per_second", "bytes per second")
        plot_metric(codes, runs, "code_perplexity", "codes in use (perplexity)")
        legend.axis("off")
        handles, labels = by_bytes.get_legend_handles_labels()
        legend.legend(handles, labels, loc="center left", frameon=False)


def styled(runs: Sequence[Run]) -> Iterator[tuple[Run, str, str, str]]:
    """Yields each run with its color, line and marker."""
    return zip(runs, *map(itertools.cycle, (COLORS, LINES, MARKERS)))  # noqa: B905


def plot_bits(
    axes: Axes, runs: Sequence[Run], x: str, label: str, scale: Callable[[float], float]
) -> None:
    """Draws bits per byte of training (faint) and of held-out data (with markers)."""
    shown = []
    for run, color, line, marker in styled(runs):
        for y, style in (
            ("train_bpb", {"alpha": 0.45, "linewidth": 1.2}),
            ("val_bpb", {"marker": marker, "markersize": 5, "linewidth": 2}),
        ):
            xs, ys = run.curve(x, y)
            kind = "train" if y == "train_bpb" else "held out"
            axes.plot([scale(v) for v in xs], ys, line, color=color, label=f"{run.name}: {kind}",
                      **style)  # fmt: skip
            # The first values are so high that they would flatten the rest.
            shown += sorted(ys)[: max(1, round(0.9 * len(ys)))]
    if shown and max(shown) > 0:
        axes.set_ylim(min(shown) - 0.03 * max(shown), max(shown) * 1.05)
    axes.set_xlabel(label)
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)


def plot_metric(axes: Axes, runs: Sequence[Run], y: str, label: str) -> None:
    """Draws a metric against minutes."""
    for run, color, line, _ in styled(runs):
        xs, ys = run.curve("seconds", y)
        axes.plot([s / 60 for s in xs], ys, line, color=color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
