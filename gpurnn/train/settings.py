"""The arguments of ``fit``, checked."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import BatchSource
from ..errors import check_choice, check_flag, check_number, check_size, refuse_unknown
from ..loss_scale import LossScaler
from ..module import Module
from ..optim import SGD, Adam, AdamW, Optimizer, RMSprop, Schedule
from .callbacks import Callbacks
from .parallel import Group
from .parallel.launchers import joined
from .sources import Numbered, as_source

_log = logging.getLogger("gpurnn")
OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "rmsprop": RMSprop, "sgd": SGD}
_WORDS = {  # other libraries' argument -> a sentence on what fit takes instead
    "batch_size": "The batch source has the batch size: gpurnn.SequenceBatches(inputs, targets, batch_size)",
    "class_weight": "Give it to the loss: functools.partial(gpurnn.cross_entropy, weight=...)",
    "device": "The model has one: backend='cuda' at the construction of each layer",
    "early_stopping": "Here it is called patience",
    "gradient_clip_val": "Here it is called clip_norm",
    "initial_epoch": "epochs counts those before a resume: give out= and resume=True",
    "learning_rate": "Here it is called lr, with optimizer='adam'",
    "lr_scheduler": "Here it is called schedule",
    "max_epochs": "Here it is called epochs",
    "sample_weight": "Give it to the loss: a function that calls one with mask= or reduction='none'",
    "scheduler": "Here it is called schedule",
    "shuffle": "The batch source shuffles: gpurnn.SequenceBatches(inputs, targets, batch_size, shuffle=True)",
    "val_data": "Here it is called validation",
    "validation_data": "Here it is called validation, a batch source as batches is",
    "validation_split": "Split the data first and give a part as validation",
    "verbose": "Here it is called progress",
}


@dataclass(eq=False)
class FitSettings:
    """What ``fit`` was called with; see there. Building one checks everything before anything is changed."""

    model: Module
    loss: Callable[..., Any]
    batches: BatchSource | Iterable[Any] | Numbered
    optimizer: Optimizer | str
    lr: float | None
    epochs: int
    validation: BatchSource | Iterable[Any] | Numbered | None
    schedule: Schedule | Callable[[Optimizer], Schedule] | None
    schedule_every: str
    clip_norm: float | None
    clip_value: float | None
    weight_noise: float
    accumulate: int
    out: Path | None
    checkpoint_every: int | None
    patience: int | None
    metrics: Mapping[str, Callable[..., Any]] | None
    watch: tuple[str, str]
    callbacks: Iterable[Any]
    progress: bool
    flow: bool
    extra: Any
    loss_scaler: LossScaler | str | None
    group: Group | None
    graph: bool | None = None

    def __post_init__(self) -> None:
        check_flag("progress", self.progress)
        check_flag("flow", self.flow)
        if self.graph is not None:
            check_flag("graph", self.graph)
        self.group = check_group(self.group)
        self._check_objects()
        self.epochs = check_size("epochs", self.epochs)
        check_choice("schedule_every", self.schedule_every, ("epoch", "step"))
        if self.clip_norm is None:
            self.clip_norm = math.inf
        else:
            self.clip_norm = check_number("clip_norm", self.clip_norm, 0, low_open=True)
        if self.clip_value is not None:
            self.clip_value = check_number("clip_value", self.clip_value, 0, low_open=True)
        self.weight_noise = check_number("weight_noise", self.weight_noise, 0)
        self.accumulate = check_size("accumulate", self.accumulate)
        self.out = None if self.out is None else Path(self.out)
        for name in ("checkpoint_every", "patience"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else check_size(name, value))
        self._check_watch()
        if self.validation is None and self.patience is not None:
            raise ValueError("patience watches the validation loss: give validation batches")
        if self.validation is None and self.metrics:
            raise ValueError("metrics are measured on validation batches, and there are none: give validation")
        self.loss_scaler = _scaler_for(self.loss_scaler, self.model)
        named = isinstance(self.optimizer, str)
        self.optimizer = optimizer_for(self.optimizer, self.lr, self.model)
        self.lr = self.optimizer.lr if named else None
        self.schedule = _schedule_for(self.schedule, self.optimizer)

    def _check_objects(self) -> None:
        """Model, loss, data, metrics and callbacks, which are objects and functions of the caller."""
        if not isinstance(self.model, Module):
            raise TypeError(f"model: expected a gpurnn layer or model, got {type(self.model).__name__}")
        if not callable(self.loss):
            raise TypeError(
                f"loss: expected a function such as gpurnn.cross_entropy, got {self.loss!r}"
                if isinstance(self.loss, str)
                else f"loss: expected a function such as gpurnn.cross_entropy, got {type(self.loss).__name__}"
            )
        _say_axes(self.model, self.batches)
        self.batches = as_source(self.batches, "batches")
        if self.validation is not None:
            self.validation = as_source(self.validation, "validation")
        self.metrics = check_metrics(self.metrics)
        if isinstance(self.callbacks, (str, bytes)) or not isinstance(self.callbacks, Iterable):
            raise TypeError(f"callbacks: expected a list, such as [show], got {type(self.callbacks).__name__}")
        self.callbacks = tuple(self.callbacks)
        Callbacks(self.callbacks)

    def _check_watch(self) -> None:
        """Raise unless ``watch`` is a pair such as ("loss", "min")."""
        if isinstance(self.watch, str) or not isinstance(self.watch, (tuple, list)) or len(self.watch) != 2:
            raise TypeError(
                f"watch: expected a pair such as ('loss', 'min') or ('accuracy', 'max'), got {self.watch!r}"
            )
        name = self.watch[0]
        if name not in ("loss", *self.metrics) and isinstance(name, str):
            raise ValueError(
                f"watch: expected 'loss' or the name of a metric, got {name!r}: metrics={{{name!r}: ...}} measures it"
            )
        check_choice("watch", self.watch[1], ("min", "max"))


def check_group(group: Any) -> Group:
    """An argument ``group`` as a group; None is this process alone."""
    if group is None:
        return Group()
    if not isinstance(group, Group):
        raise TypeError(f"group: expected what gpurnn.train.parallel.init() returns, got {type(group).__name__}")
    return group


def guard_of(group: Any, out: Any) -> Group:
    """The group whose processes hear of it where a training of this one fails.

    Without a group that is this process alone; but one that joined a group, and trains to a folder without naming it,
    shares the folder with the others: its failure must end them.
    """
    others = next((one for one in joined if one.size > 1), None)
    if group is not None or others is None:
        return check_group(group)
    if others.is_first and not others.warned:
        others.warned = True
        _log.warning(
            "fit: without group= each of the %d processes trains a model of its own. To train one together give "
            "group=group, what init() returned; where each should train alone, group=gpurnn.train.parallel.Group()",
            others.size,
        )
    return Group() if out is None else others


def _say_axes(model: Module, batches: Any) -> None:
    """Log where a DataLoader as torch makes it, which puts the sequences first, meets layers that take timesteps first.

    A model of one's own may swap the axes itself.
    """
    collate = getattr(getattr(batches, "collate_fn", None), "__name__", None)
    orders = {layer.batch_first for _, layer in model.modules() if hasattr(layer, "batch_first")}
    if collate == "default_collate" and orders == {False} and type(model).__module__.startswith("gpurnn."):
        _log.warning(
            "batches: this DataLoader gives (B, T, ...), sequences first, and the model takes (T, B, ...): build its "
            "layers with batch_first=True"
        )


def check_metrics(metrics: Any) -> Mapping[str, Callable[..., Any]]:
    """An argument ``metrics`` as a mapping.

    Raises TypeError unless it is one of names and functions, ValueError where one is called "loss".
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics: expected a mapping such as {{'accuracy': gpurnn.accuracy}}, got {type(metrics).__name__}"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or not callable(metric):
            raise TypeError(f"metrics: expected names and functions, got {name!r}: {type(metric).__name__}")
    if "loss" in metrics:
        raise ValueError("metrics: 'loss' is the name of the loss itself, which is always measured: choose another")
    return metrics


def optimizer_for(optimizer: Any, lr: float | None, model: Module) -> Optimizer:
    """The optimizer that the arguments ``optimizer`` and ``lr`` mean."""
    if isinstance(optimizer, str):
        kind = OPTIMIZERS[check_choice("optimizer", optimizer, tuple(OPTIMIZERS))]
        if lr is None and kind is SGD:
            raise ValueError("lr: optimizer='sgd' has no usual rate: give one, such as lr=0.1")
        return kind(model) if lr is None else kind(model, lr=lr)
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        got = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"optimizer: expected one built for the model, such as gpurnn.Adam(model, lr=0.001), or a name of "
            f"{', '.join(OPTIMIZERS)}, got {got}"
        )
    if optimizer.model is not model:
        raise ValueError(
            "optimizer: was built for another model: build one for this one, or give a name such as 'adam'"
        )
    if lr is not None:
        raise ValueError("lr: belongs to an optimizer that is given by name; this one has a rate: set optimizer.lr")
    return optimizer


def _schedule_for(schedule: Any, optimizer: Optimizer) -> Schedule | None:
    """The learning-rate schedule that an argument ``schedule`` means."""
    if schedule is None or isinstance(schedule, Schedule):
        return schedule
    made = schedule(optimizer) if callable(schedule) else schedule
    if not isinstance(made, Schedule):
        raise TypeError(
            "schedule: expected a learning-rate schedule such as gpurnn.CosineSchedule(optimizer, total=10), or a "
            f"function of the optimizer that returns one, got {type(made).__name__}"
        )
    return made


def explain_foreign_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of ``fit``: for an argument of another library's ``fit`` the error names the one to use here."""
    known = list(function.__kwdefaults__ or ()) + ["optimizer", "epochs"]

    @functools.wraps(function)
    def answering(*arguments: Any, **options: Any) -> Any:
        if len(arguments) > 3:
            raise TypeError(
                "fit takes model, loss and batches, and the rest by name. Arrays become batches: "
                "fit(model, loss, gpurnn.SequenceBatches(inputs, targets, batch_size=32), ...), or "
                "fit(model, loss, [(x, y)], ...) for one batch"
            )
        for name, example in (("optimizer", "'adam'"), ("epochs", "10")):
            if name not in options:
                raise TypeError(f"fit: {name} is missing: give {name}={example}, for example")
        unknown = [name for name in options if name not in known and name not in ("model", "loss", "batches")]
        for name in unknown:
            refuse_unknown("fit", [name], known, _WORDS.get(name))
        return function(*arguments, **options)

    return answering


def _scaler_for(scaler: Any, model: Module) -> LossScaler | None:
    """The loss scaler that an argument ``loss_scaler`` means."""
    if scaler is None or isinstance(scaler, LossScaler):
        return scaler
    if not isinstance(scaler, str) or scaler != "auto":
        raise TypeError(f"loss_scaler should be a LossScaler, None or 'auto', got {scaler!r}")
    return LossScaler() if model.dtype == np.float16 else None
