"""The life of a run's folder: prepare, train, resume.

A task is a ``Task`` (task.py) and the ``Settings`` that it adds (settings.py); everything else, the command line
included, is made from these two. A run's folder holds ``config.json``, which is all that is needed to use the model
later, beside what ``fit`` writes (train/fit.py).

>>> Path("book.txt").write_text("Once upon a time. " * 300, encoding="utf-8")
5400
>>> run = prepare("text", ["book.txt"], "runs/book", hidden=16, epochs=1)
>>> history = run.train()
>>> trained = load("runs/book")
>>> trained.settings.hidden, "vocabulary" in trained.facts
(16, True)
"""

import contextlib
import itertools
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from .. import optim, run_folder
from ..checkpoint import CheckpointError, remove_checkpoint
from ..errors import DivergedError
from ..files import check_target, make_folder, naming, refuse_same
from ..folder_lock import FolderLock, lock_folder, locked
from ..train import fit
from . import get_task
from .settings import OPTIMIZERS, Settings
from .task import Data, Task
from .trained import as_json, check_sizes, config_path, load, read_run, write_config

_MAY_CHANGE = ("epochs", "patience")  # what a resumed run may have otherwise than the run it continues


@dataclass
class Run:
    """A run about to be trained: what is trained on what. Made by ``prepare``.

    files: absolute paths. document: what ``config.json`` holds. resume: whether ``train`` goes on from the last
    checkpoint. The folder is locked until ``train`` ends, ``close`` is called, or nobody has the run any more; as a
    context manager the run closes itself.
    """

    folder: Path
    task: Task
    settings: Settings
    files: list
    data: Data
    model: object
    document: dict
    resume: bool = False
    lock: FolderLock | None = None

    def __getstate__(self):
        return self.__dict__ | {"lock": None}  # a copy locks the folder when it trains

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Give the folder free."""
        if self.lock is not None:
            self.lock.close()

    def train(self, *, checkpoint_every=None, progress=True, flow=False):
        """Train to the end, writing to ``folder``; returns ``fit``'s History and raises what ``fit`` raises."""
        if self.lock is None or self.lock.closed:
            if self.lock is not None and self.lock.taken:
                raise ValueError(f"another run was prepared in {self.folder} since: prepare this one again")
            self.lock = lock_folder(self.folder)
        try:
            with self.lock.lent(), np.errstate(over="ignore", invalid="ignore"):  # fit says what is not finite
                return self._fit(checkpoint_every, progress, flow)
        finally:
            self.close()

    def _fit(self, checkpoint_every, progress, flow):
        settings, data = self.settings, self.data
        optimizer = OPTIMIZERS[settings.optimizer](self.model, lr=settings.lr, weight_decay=settings.weight_decay)
        updates = -(-len(data.train) // settings.accumulate)
        return fit(
            self.model,
            self.task.loss(settings, data.facts),
            data.train,
            optimizer=optimizer,
            epochs=settings.epochs,
            validation=data.valid,
            schedule=_schedule(settings, optimizer, updates),
            schedule_every="epoch" if settings.schedule == "plateau" else "step",
            clip_norm=settings.clip or None,
            weight_noise=settings.weight_noise,
            accumulate=settings.accumulate,
            out=self.folder,
            resume=self.resume,
            overwrite=not self.resume,
            checkpoint_every=checkpoint_every,
            patience=settings.patience,
            metrics=self.task.metrics(settings, data.facts),
            watch=self.task.watch,
            progress=progress,
            flow=flow,
        )

    def finish(self, history):
        """(numbers, text for people) of the best model, by the task; the numbers go to ``config.json`` as well.

        Where the model has diverged they are its loss, and ``diverged``, True. Raises CheckpointError where the
        history, which is what the folder's log holds, has no epoch.
        """
        log = self.folder / run_folder.HISTORY
        if not history.epochs:
            raise CheckpointError(
                f"{log}: no record of an epoch is left to tell a result. The model is whole: it can be used"
            )
        trained = load(self.folder, self.model.ops.name)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                numbers, text = self.task.finish(trained, self.data, history)
            if not _is_finite(numbers):
                raise DivergedError
        except DivergedError:
            numbers, text = Task.finish(self.task, trained, self.data, history)
            numbers["diverged"] = True
            text += f"\nNo {self.task.shows}: the model has diverged (its logits are not finite)."
        lost = history.epochs[-1]["epoch"] - len(history.epochs)
        if lost:
            text += f"\n{log}: the records of {lost} epoch{'s' * (lost > 1)} are missing: this is told of the others."
        with locked(self.folder):
            write_config(self.folder, self.document | {"result": numbers})
        return numbers, text


def prepare(task, files=(), folder=None, settings=None, *, backend=None, resume=False, overwrite=False, **more):
    """Read the data, build the model and write ``config.json``; returns the ``Run`` to ``train()``.

    task: a name. folder: of the run, else ``runs/TASK``; one that holds a run already is refused unless ``resume`` or
    ``overwrite``, and files that are not a run's are never replaced. From here on it is locked: see ``Run``. settings:
    of the task's class; more: single ones, in place of ``settings`` or on top. resume: files, settings and backend may
    be left out; what is given and differs from the run in the folder, other than ``epochs`` and ``patience``, raises
    ValueError, and so do other data. Raises what the task's ``read`` raises besides, FolderInUseError, CheckpointError;
    a folder that was made for the run is then removed.
    """
    task = get_task(task)
    folder, files = Path(folder or Path("runs", task.name)), [os.path.abspath(file) for file in files]
    if resume:
        config_path(folder)
    made = _make_folder(folder)
    lock = None
    try:
        lock = lock_folder(folder)
        run_folder.sweep(folder)
        return _prepare(task, files, folder, settings, backend, resume, overwrite, more, lock)
    except BaseException:
        if lock is not None:
            lock.close()
        for new in made:
            with contextlib.suppress(OSError):
                new.rmdir()
        raise


def _prepare(task, files, folder, settings, backend, resume, overwrite, more, lock):
    saved = None
    if resume:
        old, saved = read_run(folder, task.name)
        settings = replace(settings or old, **more)
        different = [f.name for f in fields(old) if getattr(old, f.name) != getattr(settings, f.name)]
        refused = [name for name in different if name not in _MAY_CHANGE]
        if refused:
            was = ", ".join(f"{name} {getattr(old, name)}" for name in refused)
            raise ValueError(f"a resumed run keeps its settings, {folder} has {was}: leave out what differs")
        files, backend = files or saved["files"], backend or saved["backend"]
    elif not overwrite:
        run_folder.check_free(folder, ValueError)
    else:
        run_folder.check_ours(folder)
    for name in run_folder.FILES:
        check_target(folder / name)
        refuse_same(folder / name, files, "folder")
    settings = replace(settings, **more) if settings else task.Settings(**more)
    if task.train_needs_files and not files:
        raise ValueError(f"the task {task.name} needs files to train on")
    with naming(files):
        data = task.read(files, settings, saved and saved["facts"], folder.resolve())
    if saved and as_json(data.fingerprint) != saved["data"]["fingerprint"]:
        raise ValueError(
            f"the data are not those that {folder} was trained on ({saved['data']['summary']} then, {data.summary} "
            "now): a resumed run needs the same data"
        )
    if saved:
        check_sizes(folder, task, settings, data.facts)
    model = task.build(settings, data.facts, backend)
    document = {
        "task": task.name,
        "backend": model.ops.name,
        "settings": asdict(settings),
        "files": files,
        "data": {"summary": data.summary, "fingerprint": data.fingerprint},
        "facts": data.facts,
    }
    if overwrite:
        for name in run_folder.CHECKPOINTS:  # before config.json says what no longer fits them
            remove_checkpoint(folder / name)
    with naming(files):
        write_config(folder, document)
    return Run(folder, task, settings, files, data, model, document, resume, lock)


def fresh_folder(task):
    """A new folder ``runs/TASK-N``, made at once, so that no other process gets the same."""
    make_folder("runs")
    for number in itertools.count(1):
        folder = Path("runs", f"{task}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def _make_folder(folder):
    """Make a folder and those above it; those that are new, the innermost first, as long as they are empty."""
    new = []
    for place in (folder, *folder.parents):
        if place.is_dir():
            break
        new.append(place)
    make_folder(folder)
    return new


def _is_finite(document):
    """Whether there is no NaN and no infinity in a document that is JSON-ready otherwise."""
    try:
        return bool(json.dumps(document, allow_nan=False))
    except ValueError:
        return False


def _schedule(settings, optimizer, updates):
    """The learning-rate schedule of ``settings`` for ``updates`` optimiser steps an epoch."""
    total = settings.epochs * updates
    if settings.schedule == "plateau":
        return optim.PlateauSchedule(optimizer, factor=0.5, patience=1)
    after = None
    if settings.schedule == "cosine":
        after = optim.CosineSchedule(optimizer, total=max(1, total - settings.warmup), min_lr=settings.lr / 20)
    if settings.schedule == "step":
        after = optim.StepSchedule(optimizer, max(1, total // 3), 0.3)
    return optim.WarmupSchedule(optimizer, settings.warmup, after=after) if settings.warmup else after
