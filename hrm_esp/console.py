"""Messages and progress bars, all on stderr: stdout is for results."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm

from .distributed import rank
from .streams import STDERR


def print0(text: str) -> None:
    """Prints a line on stderr, from process 0 only; a progress bar moves out of its way."""
    if rank() == 0:
        tqdm.write(text, file=STDERR)


def progress_bar(total: int, unit: str, show: bool = True, task: str = "scoring") -> tqdm[NoReturn]:
    """Returns a bar for a task, shown on a terminal only and cleared at the end."""
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        desc=task,
        leave=False,
        file=STDERR,
        dynamic_ncols=True,
        disable=None if show else True,
    )
