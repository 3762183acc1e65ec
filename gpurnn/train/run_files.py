"""The folder that a training writes: its lock, its logs, its picture."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from .. import run_folder
from ..checkpoint import remove_checkpoint
from ..files import check_target, make_folder, open_log
from ..folder_lock import locked

_log = logging.getLogger("gpurnn")


class RunFiles:
    """The folder of one call of ``fit``. Without a folder nothing is written.

    Parameters
    ----------
    out : Path or None
        The folder.
    flow : bool
        Whether the gradient flow is logged.
    """

    def __init__(self, out: Path | None, flow: bool) -> None:
        self.out, self.flow = out, flow
        self._logs: dict[str, Any] = {}  # name of an open log -> file
        self._open = contextlib.ExitStack()  # closes the logs and releases the lock

    def claim(self, resume: bool, overwrite: bool) -> Path | None:
        """Lock the folder for this run; returns the checkpoint to continue from, if there is one.

        Raises ValueError for ``resume`` without a folder, FileError where ``out`` is no folder, FileExistsError and
        CheckpointError where it is in use or holds other files.
        """
        if self.out is None:
            if resume:
                raise ValueError("resume needs out, the folder of the run")
            return None
        make_folder(self.out)
        self._open.enter_context(locked(self.out))
        run_folder.sweep(self.out)
        for name in run_folder.FILES:
            check_target(self.out / name)
        saved = [self.out / name for name in run_folder.CHECKPOINTS if (self.out / name).exists()]
        if resume and saved:
            if saved[0].name != "last.json":
                _log.warning("%s: last.json is missing, training continues from %s", self.out, saved[0].name)
            return saved[0]
        if not (resume or overwrite):
            run_folder.check_free(self.out, FileExistsError, (run_folder.CONFIG,))
        run_folder.check_ours(self.out, (run_folder.CONFIG,))
        for name in run_folder.CHECKPOINTS:
            remove_checkpoint(self.out / name)
        return None

    def open_logs(self, sizes: dict[str, int] | None) -> None:
        """Open the logs and cut off what a checkpoint does not cover.

        sizes: bytes of each log at the checkpoint that was restored; None for a new run, whose logs start empty.
        """
        if self.out is None:
            return
        for name in ("history", "gradient_flow"):
            path = self.out / f"{name}.jsonl"
            if name == "history" or self.flow or path.exists():
                self._logs[name] = self._open.enter_context(open_log(path))
                self._logs[name].truncate(0 if sizes is None else self._end_of(name, sizes.get(name, 0)))

    def _end_of(self, log: str, size: int) -> int:
        """Where a log is cut: as at the checkpoint, or up to its last whole line if the log was shortened."""
        end = run_folder.whole_lines(self._logs[log], size)
        if end < size:
            _log.warning("%s: %s.jsonl was shortened: some of its records are missing", self.out, log)
        return end

    def write(self, log: str, record: dict[str, Any]) -> None:
        """Append a record to a log, if it is open."""
        if log in self._logs:
            self._logs[log].write(json.dumps(record).encode() + b"\n")
            self._logs[log].flush()

    def synced_sizes(self) -> dict[str, int]:
        """Write the logs to the disk; returns the bytes of each."""
        sizes = {}
        for log, file in self._logs.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[log] = os.fstat(file.fileno()).st_size
        return sizes

    def draw(self) -> None:
        """Draw ``history.png``, where Matplotlib is installed."""
        if self.out is None:
            return
        from ..plots import plot_run

        try:
            plot_run(self.out)
        except ImportError as error:
            _log.info("no history.png: %s", error)

    def close(self) -> None:
        """Close the logs and release the folder."""
        self._open.close()
