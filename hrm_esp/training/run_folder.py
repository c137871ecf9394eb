"""The folder of a run: its lock, names of its checkpoints, which are kept, and what to say when the
disk is full."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import launch
from ..config import TrainConfig
from ..distributed import rank
from ..errors import HRMError
from ..files import PathLike, remove_partial_files
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint

CACHES = ("corpus.", "ngrams.")  # beginnings of the names of files that pretraining builds


@contextmanager
def open_run(options: TrainConfig, stage: str) -> Iterator[Checkpoint | None]:
    """Locks the folder of a run inside the block, and creates it. If nothing is written to a new
    folder, it is removed again.

    Yields:
        The state of the run to resume, or ``None`` for a new run.

    Raises:
        HRMError: another run has the folder; the state is missing or damaged; or the folder holds a
            run of this stage, and neither --resume nor --overwrite was given.
    """
    folder = Path(options.out_dir)
    if folder.exists() and not folder.is_dir():
        raise HRMError(f"{folder} is a file: give another --out_dir")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_folder(folder):
            yield read_state(options, stage)
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                folder.rmdir()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lets one run at a time write to a folder. The system releases the lock when the process ends,
    however it ends. On Windows nothing is locked.

    Raises:
        HRMError: another process has the lock.
    """
    if sys.platform == "win32" or rank() != 0:
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise HRMError(
            f"another run is writing to {folder}: wait for its end, or give another --out_dir"
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def read_state(options: TrainConfig, stage: str) -> Checkpoint | None:
    """Returns what `open_run` yields."""
    folder = Path(options.out_dir)
    if options.resume:
        path = folder / f"{stage}_state.pt"
        if not path.is_file():
            raise HRMError(f"no saved state of a {stage} run in {folder}: start without --resume")
        return load_checkpoint(path)
    if any(folder.glob(f"{stage}_*.pt")) and not options.overwrite:
        raise HRMError(
            f"{folder} holds a {stage} run: give --resume, --overwrite or another --out_dir"
        )
    return None


class RunFolder:
    """Writes the checkpoints of one stage of a run.

    Args:
        stage: ``pretrain`` or ``finetune``; file names begin with it.
        origin: see `Checkpoint`; of this stage, date and command are added.
    """

    def __init__(self, path: PathLike, stage: str, origin: dict[str, Any] | None = None) -> None:
        self.root, self.stage = Path(path), stage
        date = datetime.now(timezone.utc).date().isoformat()
        made = {"date": date, "command": launch.command_line}
        self.origin = origin or {}
        self.origin = self.origin | {stage: self.origin.get(stage, {}) | made}
        # Files of an overwritten run. They stay until the new run has its first checkpoint.
        self.overwritten: list[Path] = []

    def checkpoint(self, name: str) -> Path:
        return self.root / f"{self.stage}_{name}.pt"

    def prepare(self, resume: bool) -> None:
        """Creates the folder, and removes what a killed process left behind."""
        self.root.mkdir(parents=True, exist_ok=True)
        caches = CACHES if self.stage == "pretrain" else ()
        remove_partial_files(self.root, f"{self.stage}_", "metrics.", *caches)
        if not resume:
            self.overwritten = list(self.root.glob(f"{self.stage}_*.pt"))

    def save(self, name: str, content: Checkpoint) -> None:
        """Writes a checkpoint; with the first one the files of an overwritten run go."""
        path = self.checkpoint(name)
        content.origin = self.origin
        save_checkpoint(content, path)
        for old in self.overwritten:
            if old != path:
                old.unlink(missing_ok=True)
        self.overwritten = []

    def rotate_epochs(self, keep: int) -> None:
        """Deletes all epoch checkpoints but the newest."""
        epochs = self.root.glob(f"{self.stage}_epoch*.pt")
        for old in sorted(epochs, key=lambda p: p.stat().st_mtime)[:-keep]:
            old.unlink()

    @contextmanager
    def report_write_errors(self) -> Iterator[None]:
        """Turns an OSError inside the block into an HRMError that says what is saved."""
        try:
            yield
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> HRMError:
        saved = list(self.root.glob(f"{self.stage}_*.pt"))
        left = "nothing of this run is saved"
        if not self.overwritten and saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
            left = f"the newest checkpoint is {newest}"
        if not self.overwritten and self.checkpoint("state").is_file():
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            left += f"; {'free some space and ' if is_full else ''}continue with --resume"
        return HRMError(f"{error.filename or self.root}: {error.strerror or error}; {left}")
