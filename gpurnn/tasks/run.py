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
from ..checkpoint import CheckpointError, checkpoint_document, remove_checkpoint
from ..errors import DivergedError, refuse_unknown
from ..files import check_target, make_folder, naming, refuse_same
from ..folder_lock import FolderLock, lock_folder, locked
from ..train import find_lr, fit
from ..train.parallel import Group
from . import get_task
from .settings import OPTIMIZERS, Settings
from .start import read_start, start_again
from .task import Data, Task
from .trained import as_json, check_sizes, config_path, load, read_run, write_config

_MAY_CHANGE = ("epochs", "patience")  # settings in which a resumed run may differ from the run that it continues


@dataclass
class Run:
    """A run about to be trained: what is trained on what. Made by ``prepare``.

    files: absolute paths. document: what ``config.json`` holds. resume: whether ``train`` continues from the last
    checkpoint. The folder is locked until ``train`` ends, ``close`` is called, or the run is garbage-collected; as a
    context manager the run closes itself. group: the processes that train it, see together.py; None for this one alone.
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
    group: Group | None = None

    def __getstate__(self):
        return self.__dict__ | {"lock": None}  # a copy locks the folder when it trains

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Release the lock on the folder."""
        if self.lock is not None:
            self.lock.close()

    def train(self, *, checkpoint_every=None, progress=True, flow=False, callbacks=()):
        """Train to the end, writing to ``folder``; returns ``fit``'s History and raises what ``fit`` raises."""
        if self.group is not None and not self.group.is_first:
            with np.errstate(over="ignore", invalid="ignore"):
                return self._fit(checkpoint_every, progress, flow, callbacks)
        if self.lock is None or self.lock.closed:
            if self.lock is not None and self.lock.taken:
                raise ValueError(f"another run was prepared in {self.folder} since: prepare this one again")
            self.lock = lock_folder(self.folder)
        try:
            with self.lock.lent(), np.errstate(over="ignore", invalid="ignore"):  # fit says what is not finite
                return self._fit(checkpoint_every, progress, flow, callbacks)
        finally:
            self.close()

    def _optimizer(self):
        settings = self.settings
        return OPTIMIZERS[settings.optimizer](self.model, lr=settings.lr, weight_decay=settings.weight_decay)

    def _fit(self, checkpoint_every, progress, flow, callbacks):
        settings, data = self.settings, self.data
        optimizer = self._optimizer()
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
            metrics=self.task.metrics(settings, data.facts) if data.valid is not None else None,
            watch=self.task.watch if data.valid is not None else ("loss", "min"),
            callbacks=callbacks,
            progress=progress,
            flow=flow,
            group=self.group,
        )

    def find_lr(self):
        """Take the learning rate that ``gpurnn.train.find_lr`` suggests into the settings; returns it."""
        loss, limit = self.task.loss(self.settings, self.data.facts), self.settings.clip or None
        with np.errstate(over="ignore", invalid="ignore"):
            curve = find_lr(self.model, loss, self.data.train, optimizer=self._optimizer(), clip_norm=limit)
        self.settings = replace(self.settings, lr=curve.lr)
        self.document |= {"settings": asdict(self.settings)}
        write_config(self.folder, self.document)
        return curve.lr

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
            if not numbers:  # neither a validation nor a test part
                numbers, text = Task.finish(self.task, trained, self.data, history)
            if not _is_finite(numbers):
                raise DivergedError
        except DivergedError:
            numbers, text = Task.finish(self.task, trained, self.data, history)
            numbers["diverged"] = True
            text += f"\nNo {self.task.shows}: the model has diverged (its logits are not finite)."
        uniform = self.task.uniform_loss(self.settings, self.data.facts)
        best = min(_loss_of(record) for record in history.epochs)
        if uniform is not None and not best < uniform + 1:  # an untrained model is within a fraction of a nat of it
            numbers["diverged"] = True
            text += f"\nThe model has diverged: its best loss is {best:.4g}, that of blind guessing {uniform:.4g}."
        lost = history.epochs[-1]["epoch"] - len(history.epochs)
        if lost:
            text += f"\n{log}: the records of {lost} epoch{'s' * (lost > 1)} are missing: this is told of the others."
        with locked(self.folder):
            write_config(self.folder, self.document | {"result": numbers})
        return numbers, text


def prepare(
    task, files=(), folder=None, settings=None, *, backend=None, resume=False, overwrite=False, start=None, **more
):
    """Read the data, build the model and write ``config.json``; returns the ``Run`` to ``train()``.

    task: a name. files: paths, or one. folder: of the run, else ``runs/TASK``; one that holds a run already is refused
    unless ``resume`` or ``overwrite``, and files that are not a run's are never replaced. From here on it is locked:
    see ``Run``. settings: of the task's class; more: single ones, in place of ``settings`` or on top.

    resume: files, settings and backend may be left out; what is given and differs from the run in the folder, other
    than ``epochs`` and ``patience``, raises ValueError, and so do other data.

    start: the folder of another run of the task, whose model is trained further on these files: its weights, settings,
    and what it knows of data (vocabulary, classes, scaling); the optimizer and the learning-rate schedule start afresh.
    A setting that decides one of these (``of_model`` in settings.py) raises ValueError where it differs.

    Raises what the task's ``read`` raises besides, FolderInUseError, CheckpointError; a folder that was made for the
    run is then removed.
    """
    task, files = get_task(task), [files] if isinstance(files, (str, os.PathLike)) else files
    names = [f.name for f in fields(task.Settings)]
    refuse_unknown(f"prepare, task {task.name}", [name for name in more if name not in names], names)
    folder, files = Path(folder or Path("runs", task.name)), [os.path.abspath(file) for file in files]
    if resume and start is not None:
        raise ValueError("resume and start exclude each other: a resumed run has its own weights")
    if resume:
        config_path(folder)
    made = _make_folder(folder)
    lock = None
    try:
        lock = lock_folder(folder)
        run_folder.sweep(folder)
        request = _Request(task, files, folder, backend, resume, overwrite)
        if resume:
            return _resumed(request, settings, more, lock)
        return _new(request, settings, more, start, lock)
    except BaseException:
        if lock is not None:
            lock.close()
        for new in made:
            with contextlib.suppress(OSError):
                new.rmdir()
        raise


@dataclass
class _Request:
    """What ``prepare`` was asked for, whatever the settings."""

    task: Task
    files: list
    folder: Path
    backend: str | None
    resume: bool
    overwrite: bool

    def check_targets(self):
        """Raise where the run would replace one of its own files, or what is no file."""
        for name in run_folder.FILES:
            check_target(self.folder / name)
            refuse_same(self.folder / name, self.files, "folder")

    def read(self, settings, facts):
        """The task's ``Data``."""
        if self.task.train_needs_files and not self.files:
            raise ValueError(f"the task {self.task.name} needs files to train on")
        if facts is None:
            self.task.check_new(settings)
        with naming(self.files):
            return self.task.read(self.files, settings, facts, self.folder.resolve())

    def run(self, settings, data, model, lock, start=None):
        """The ``Run``, with its ``config.json`` written. start: what that says of another run, if it began from one."""
        document = {
            "task": self.task.name,
            "backend": model.ops.name,
            "settings": asdict(settings),
            "files": self.files,
            "data": {"summary": data.summary, "fingerprint": data.fingerprint},
            "facts": data.facts,
        } | ({"start": start} if start else {})
        with naming(self.files):
            write_config(self.folder, document)
        return Run(self.folder, self.task, settings, self.files, data, model, document, self.resume, lock)


def _new(request, settings, more, start, lock):
    """A run from the beginning, with fresh weights or those of ``start``."""
    task, folder = request.task, request.folder
    if not request.overwrite:
        run_folder.check_free(folder, ValueError)
    else:
        run_folder.check_ours(folder)
    request.check_targets()
    if start is not None:
        start = read_start(start, task.name, folder)
        settings = settings or start.settings
    settings = replace(settings, **more) if settings else task.Settings(**more)
    if start is not None:
        start.check_settings(settings)
    data = request.read(settings, start and start.facts)
    model = task.build(settings, data.facts, request.backend)
    if start is not None:
        start.give_weights(model, settings)
    if request.overwrite:
        for name in run_folder.CHECKPOINTS:  # before config.json says what no longer fits them
            remove_checkpoint(folder / name)
    return request.run(settings, data, model, lock, start and start.document())


def _resumed(request, settings, more, lock):
    """The run in the folder, to be continued from its last checkpoint."""
    task, folder = request.task, request.folder
    old, saved = read_run(folder, task.name)
    settings = replace(settings or old, **more)
    different = [f.name for f in fields(old) if getattr(old, f.name) != getattr(settings, f.name)]
    refused = [name for name in different if name not in _MAY_CHANGE]
    if refused:
        was = ", ".join(f"{name}={getattr(old, name)!r}" for name in refused)
        raise ValueError(
            f"a resumed run keeps its settings, {folder} has {was}: leave out what differs, or begin a new run from "
            f"its model, start={str(folder)!r}, in another folder"
        )
    reached = epochs_reached(folder)
    if settings.epochs < reached:
        raise ValueError(
            f"epochs should be at least {reached}, as many as {folder} has had already, got {settings.epochs}"
        )
    request.files, request.backend = request.files or saved["files"], request.backend or saved["backend"]
    request.check_targets()
    data = request.read(settings, saved["facts"])
    if as_json(data.fingerprint) != saved["data"]["fingerprint"]:
        raise ValueError(
            f"the data are not those that {folder} was trained on ({saved['data']['summary']} then, {data.summary} "
            "now): a resumed run needs the same data. To train its model on other data begin a new run from it, "
            f"start={str(folder)!r}, in another folder"
        )
    check_sizes(folder, task, settings, data.facts)
    model = task.build(settings, data.facts, request.backend)
    if "start" in saved and not _last_document(folder):
        start_again(saved["start"], task.name).give_weights(model, settings)
    return request.run(settings, data, model, lock, saved.get("start"))


def _last_document(folder):
    """The document of a run's last checkpoint, else of its best, else an empty one; damage is found by ``fit``."""
    for name in run_folder.CHECKPOINTS:
        with contextlib.suppress(CheckpointError):
            if (Path(folder) / name).exists():
                return checkpoint_document(Path(folder) / name)
    return {}


def epochs_reached(folder):
    """Whole epochs that the run in a folder has had."""
    return int(_last_document(folder).get("epoch") or 0)


def schedule_ends(folder, settings):
    """The epoch in which the learning-rate schedule of a run ends; None where it never does.

    A resumed run continues with the schedule that it began with, even if its number of epochs has changed.
    """
    if settings.schedule not in ("cosine", "step"):
        return None
    document = _last_document(folder)
    schedule, data = document.get("schedule") or {}, document.get("data") or {}
    warmup = schedule.get("steps", 0) if "after" in schedule else 0
    schedule = schedule.get("after", schedule)
    total = schedule.get("total") or 3 * schedule.get("step_size", 0)
    if not total or not data.get("batches"):
        return settings.epochs
    return round((warmup + total) / -(-data["batches"] // data["accumulate"]))


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


def _loss_of(record):
    """The loss of an epoch's record that decides: of validation, where there is one."""
    return record["train_loss"] if record["validation_loss"] is None else record["validation_loss"]


def _is_finite(document):
    """Whether there is no NaN and no infinity in a document that is JSON-ready otherwise."""
    try:
        return bool(json.dumps(document, allow_nan=False))
    except ValueError:
        return False


def _schedule(settings, optimizer, updates):
    """The learning-rate schedule of ``settings`` for ``updates`` updates an epoch."""
    total = settings.epochs * updates
    if settings.schedule == "plateau":
        return optim.PlateauSchedule(optimizer, factor=0.5, patience=1)
    after = None
    if settings.schedule == "cosine":
        after = optim.CosineSchedule(optimizer, total=max(1, total - settings.warmup), min_lr=settings.lr / 20)
    if settings.schedule == "step":
        after = optim.StepSchedule(optimizer, max(1, total // 3), 0.3)
    return optim.WarmupSchedule(optimizer, settings.warmup, after=after) if settings.warmup else after
