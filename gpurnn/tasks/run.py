"""What every task shares: its settings, and the life of a run's folder: prepare, train, resume, load.

A task is a ``Task`` and the ``Settings`` that it adds; everything else, the command line included, is made from these
two. A run's folder holds ``config.json``, which is all that is needed to use the model later, beside what ``fit``
writes (train/fit.py).

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
import types
import typing
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from .. import optim, rng, run_folder
from ..backends import get_backend
from ..checkpoint import CheckpointError, checkpoint_shapes, document_digest, remove_checkpoint
from ..dtypes import DTYPES, check_dtype
from ..errors import DivergedError, DtypeError, check_choice, check_number, check_size
from ..files import check_room, check_target, make_folder, naming, one_line, read_json, refuse_same, write_json_atomic
from ..folder_lock import FolderLock, lock_folder, locked
from ..losses import cross_entropy
from ..recurrent import GRU, LSTM, RNN
from ..train import fit, load_weights
from . import get_task

CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "rmsprop": optim.RMSprop, "sgd": optim.SGD}
WEIGHT_COST = 96  # bytes of memory for a weight of each of four gates: itself, its gradient, Adam's two, and draws
_ENTRY_COST = 500  # for a character or word of a vocabulary, which config.json holds as well
_MAY_CHANGE = ("epochs", "patience")  # what a resumed run may have otherwise than the run it continues


# ---- settings


def setting(default, help, **limits):
    """A field of ``Settings``: its default, its help, and what it may be.

    choices: for a str. minimum: for an int, 1 where not given. low, high, low_open, high_open: for a float, as in
    ``check_number``. shown: what the help calls a default of None.
    """
    return field(default=default, metadata={"help": help, **limits})


def changed(settings, name, default, help=None, **limits):
    """A field of the class ``settings`` once more, with another default, and other help or limits where given."""
    old = next(f for f in fields(settings) if f.name == name).metadata
    return field(default=default, metadata={**old, **limits, "help": help or old["help"]})


def kind_of(f):
    """(type, whether None is allowed) of a dataclass field that is annotated ``int``, ``float | None`` and the like."""
    if isinstance(f.type, types.UnionType):
        (kind,) = (part for part in typing.get_args(f.type) if part is not types.NoneType)
        return kind, True
    return f.type, False


@dataclass
class Settings:
    """What decides a training run, whatever the task; a task adds its own in a subclass.

    Every field says its help and its limits by ``setting``: the check of its value and its option on the command line
    are made from them. Raises ValueError and TypeError, naming the setting. seed: None draws one.
    """

    cell: str = setting("lstm", "Recurrent cell.", choices=tuple(CELLS))
    layers: int = setting(1, "Recurrent layers on top of each other.")
    hidden: int = setting(256, "Hidden units in each layer.")
    dropout: float = setting(0.0, "Share of activations dropped between layers.", low=0, high=1, high_open=True)
    batch: int = setting(32, "Sequences trained side by side.")
    optimizer: str = setting("adam", "Optimiser.", choices=tuple(OPTIMIZERS))
    lr: float = setting(4e-3, "Learning rate at its highest.", low=0, low_open=True)
    weight_decay: float = setting(0.0, "Weight decay.", low=0)
    schedule: str = setting(
        "cosine",
        "How the learning rate falls: cosine to lr/20, step by 0.3 twice, plateau.",
        choices=("constant", "cosine", "step", "plateau"),
    )
    warmup: int = setting(0, "Optimiser steps in which the learning rate rises from 0.", minimum=0)
    clip: float = setting(1.0, "Largest norm of the gradient; 0: no limit.", low=0)
    weight_noise: float = setting(0.0, "Deviation of the noise added to the weights in every training step.", low=0)
    epochs: int = setting(5, "Passes over the data.")
    valid: float = setting(0.1, "Share of the data kept for validation.", low=0, high=1, high_open=True)
    patience: int | None = setting(None, "Stop after this many epochs without a better validation.")
    accumulate: int = setting(1, "Batches whose gradients make one optimiser step.")
    dtype: str = setting("float32", "Precision: of activations, and of weights in products.", choices=DTYPES)
    seed: int | None = setting(None, "Seed of all random draws.", minimum=0, shown="a fresh one, shown")

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, _checked(f, getattr(self, f.name)))
        self.seed = rng.check_seed(self.seed)
        if self.valid == 0 and (self.schedule == "plateau" or self.patience):
            raise ValueError("schedule 'plateau' and patience need a validation loss: valid should be above 0")
        if self.warmup and self.schedule == "plateau":
            raise ValueError("warmup counts optimiser steps, schedule 'plateau' epochs: choose another schedule")

    def seeds(self):
        """Endless different seeds, the same every time: each layer draws initial values of its own."""
        number = self.seed
        while True:
            yield number
            number = (number + 1) % 2**64


def _checked(f, value):
    kind, optional = kind_of(f)
    limits = f.metadata
    if value is None and optional:
        return None
    if limits.get("choices"):
        return check_choice(f.name, value, limits["choices"])
    if kind is int:
        return check_size(f.name, value, limits.get("minimum", 1))
    if kind is float:
        return check_number(f.name, value, **{k: v for k, v in limits.items() if k.startswith(("low", "high"))})
    if not isinstance(value, kind):
        raise TypeError(f"{f.name} should be {kind.__name__}, got {type(value).__name__}")
    return value


def recurrent(settings, input_size, seed, backend=None, **options):
    """The recurrent stack that ``settings`` describe: cell, layers, hidden, dropout between layers, dtype."""
    if settings.layers > 1:
        options["dropout"] = settings.dropout
    if settings.cell == "lstm":
        options.setdefault("forget_bias", 1.0)  # remember at first: Jozefowicz et al., ICML 2015
    return CELLS[settings.cell](
        input_size, settings.hidden, settings.layers, seed=seed, backend=backend, dtype=settings.dtype, **options
    )


# ---- a task


@dataclass
class Data:
    """What ``Task.read`` makes of the files.

    train, valid: batch sources (data.py), valid None for none. facts: JSON-ready, all that is needed beside settings
    and weights to use the model later: vocabulary, classes, scaling. fingerprint: JSON-ready, what a resumed run
    compares to see that the data are the same; see ``checksum``. summary: one line for people, without the files'
    names. rest: what ``Task.finish`` may want besides, such as a test set.
    """

    train: object
    valid: object
    facts: dict
    fingerprint: dict
    summary: str
    rest: object = None


@dataclass
class Trained:
    """A model in evaluation mode with all that belongs to it; made by ``load``."""

    folder: Path
    task: object
    settings: Settings
    facts: dict
    model: object


class Task:
    """A task's parts. A subclass overrides what it needs; an instance of it is the ``TASK`` of its module.

    The first paragraph of its docstring is the help of ``gpurnn train NAME``, ``examples`` the lines below the options.
    """

    name = ""
    Settings = Settings
    shows = "test"  # what ``finish`` makes with the model
    train_needs_files = evaluate_needs_files = True
    files_help = "FILE"  # what the command line calls one of the files
    without_files = "built in (give FILEs for your own)"  # what it calls the data where there are none
    examples = ""
    next = ()  # commands worth a try after training; {run} is the folder
    verbs = {}  # name -> click command, those that gpurnn.tasks.TASKS lists
    watch = ("loss", "min")  # what the best checkpoint and patience go by; see fit

    def __deepcopy__(self, memo):  # a task is there once: copies of a run have the same one, pickles its name
        return self

    def __reduce__(self):
        return get_task, (self.name,)

    def read(self, files, settings, facts=None, scratch=None):
        """``Data`` of the files (absolute paths as str); facts: those of the run that is resumed; scratch: a folder on
        the disk of the run, for what does not fit in memory. Raises ValueError that names the file."""
        raise NotImplementedError

    def build(self, settings, facts, backend=None):
        """The model, a Module."""
        raise NotImplementedError

    def check_facts(self, settings, facts):
        """Raise ValueError, TypeError or LookupError unless ``facts``, from a ``config.json``, are as ``read`` makes
        them. What ``build`` would notice need not be looked at."""

    def sizes(self, settings, facts):
        """Name -> size, of settings and facts: each is at most the longest axis among the arrays of ``build``."""
        return {}

    def loss(self, settings, facts):
        """What ``fit`` takes as ``loss``."""
        return cross_entropy

    def metrics(self, settings, facts):
        """What ``fit`` takes as ``metrics``."""
        return {}

    def finish(self, trained, data, history):
        """After training, with the best model: (numbers, text for people); the numbers go to config.json as
        ``result``."""
        losses = [r["train_loss"] if r["validation_loss"] is None else r["validation_loss"] for r in history.epochs]
        kind = "training" if data.valid is None else "validation"
        return {"loss": kind, "best": round(min(losses), 6)}, f"Best {kind} loss {min(losses):.4f}."

    def evaluate(self, trained, files):
        """How good the model is on other files: (numbers, text for people)."""
        raise NotImplementedError


def check_entries(files, count, settings, width, steps=0):
    """Raise FileError where a model of ``count`` characters or words, as many as the files have, would take too much
    memory. Where a setting says how many there are, nobody asks.

    width: weights that each has. steps: of a batch's sequences whose outputs have a logit for each, 0 where none have.
    """
    logit = 3 * max(4, check_dtype(settings.dtype).itemsize)  # itself, its exponential and its gradient
    each = _ENTRY_COST + WEIGHT_COST // 4 * width + logit * steps * settings.batch
    check_room(", ".join(map(str, files)), each * count, f"a model of its {count:,} characters or words")


def check_numbers(name, values, count=None, low=None, high=None):
    """Raise ValueError or TypeError unless ``values`` is a list, of ``count``, of finite numbers."""
    if not isinstance(values, list) or count not in (None, len(values)):
        raise ValueError(f"{name} should be a list of {'numbers' if count is None else f'{count} numbers'}")
    for value in values:
        check_number(name, value, low, high)


def check_strings(name, values):
    """Raise TypeError unless ``values`` is a list of strings."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{name} should be a list of strings")


def checksum(*arrays):
    """CRC-32 over arrays, bytes and strings, one after another; for a fingerprint."""
    value = 0
    for array in arrays:
        value = zlib.crc32(array.encode() if isinstance(array, str) else array, value)
    return value


# ---- a run


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
            _write_config(self.folder, self.document | {"result": numbers})
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
        _config_path(folder)
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
    if saved and _as_json(data.fingerprint) != saved["data"]["fingerprint"]:
        raise ValueError(
            f"the data are not those that {folder} was trained on ({saved['data']['summary']} then, {data.summary} "
            "now): a resumed run needs the same data"
        )
    if saved:
        _check_sizes(folder, task, settings, data.facts)
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
        _write_config(folder, document)
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


def _as_json(document):
    return json.loads(json.dumps(document))


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


def _config_path(folder):
    path = Path(folder) / run_folder.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: {path} is missing")
    return path


def _write_config(folder, document):
    """``config.json``, with the SHA-256 of what it says."""
    document = _as_json(document)
    write_json_atomic(Path(folder) / run_folder.CONFIG, document | {"sha256": document_digest(document)})


def read_run(folder, task=None):
    """(Settings of its task, whole document) of a run's ``config.json``.

    task: the name of the one task it may be of. Raises FileNotFoundError where there is no run, CheckpointError for a
    damaged one, ValueError for one of another task. The first edition wrote no SHA-256: such a file is taken as it is.
    """
    if Path(folder).is_file():
        raise FileNotFoundError(
            f"{folder} is a file: give the folder of the run; gpurnn.load_weights(model, path) reads a checkpoint alone"
        )
    path = _config_path(folder)
    document = read_json(path, error=CheckpointError, own=True)
    try:
        found = dict(document)
        if "sha256" in found and found.pop("sha256") != document_digest(found):
            raise ValueError("its SHA-256 is not the one of what it says")
        unknown = set(found) - {*_CONFIG_KEYS, "result"}
        if unknown:
            raise ValueError(f"it has {', '.join(map(repr, sorted(unknown)[:3]))}, which no run has")
        document = {name: _typed(found[name], name, kind) for name, kind in _CONFIG_KEYS.items()} | found
        if not all(isinstance(file, str) for file in document["files"]):
            raise TypeError("files should be a list of paths")
        document["data"]["summary"], document["data"]["fingerprint"]
        found_task = get_task(document["task"])
        settings = found_task.Settings(**document["settings"])
        found_task.check_facts(settings, document["facts"])
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: is damaged, or is not of a run: {one_line(error)}") from error
    if task not in (None, document["task"]):
        raise ValueError(f"{folder} holds a run of the task {document['task']}, not {task}")
    return settings, document


_CONFIG_KEYS = {"task": str, "backend": str, "settings": dict, "files": list, "data": dict, "facts": dict}


def _typed(value, name, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{name} should be {kind.__name__}, got {type(value).__name__}")
    return value


def _check_sizes(folder, task, settings, facts):
    """Raise CheckpointError where a model by these settings is not the one of the folder's checkpoint, if it has one.

    Before anything is built, as that may take more memory than there is. What differs otherwise is found on loading.
    """
    path, config = _checkpoint_path(folder), folder / run_folder.CONFIG
    if path is None:
        return
    shapes = {name: shape for name, shape in checkpoint_shapes(path).items() if name.startswith("model/")}
    most = max((size for shape in shapes.values() for size in shape), default=0)
    states = {shape[-1] for name, shape in shapes.items() if "weight_hh" in name and shape}
    try:
        wrong = [f"{name} {size}" for name, size in task.sizes(settings, facts).items() if size > most]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{config}: is damaged: {one_line(error)}") from error
    if settings.layers > len(shapes) or (states and not {settings.hidden, settings.hidden // 2} & states):
        wrong.append(f"{settings.layers} layers of {settings.hidden} hidden units")
    if wrong:
        raise CheckpointError(f"{config}: {wrong[0]} is not what {path.name} holds")


def _checkpoint_path(folder):
    """The best checkpoint of a run, else its last, else None."""
    paths = (Path(folder, name) for name in reversed(run_folder.CHECKPOINTS))
    return next((path for path in paths if path.exists()), None)


def load(folder, backend=None, task=None):
    """The ``Trained`` model of a run: its best checkpoint, else its last; task as in ``read_run``.

    Raises FileNotFoundError where there is none, CheckpointError for a damaged one.
    """
    folder = Path(folder)
    settings, document = read_run(folder, task)
    path = _checkpoint_path(folder)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: train it to the end of an epoch first")
    task, facts = get_task(document["task"]), document["facts"]
    _check_sizes(folder, task, settings, facts)
    ops = get_backend(backend)  # what is wrong with that, or with its variables, is no damage
    try:
        model = task.build(settings, facts, ops)
    except DtypeError:  # needs a package that this machine lacks
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / run_folder.CONFIG}: is damaged: {one_line(error)}") from error
    load_weights(model, path)
    return Trained(folder, task, settings, facts, model.eval())
