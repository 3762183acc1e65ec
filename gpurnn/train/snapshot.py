"""A training as a checkpoint, and back: everything that decides the next step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import run_folder
from .._typing import Array, State
from ..checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ..errors import check_number, check_size
from ..files import one_line
from ..optim import is_square
from .state import TrainingState
from .weights import is_of_fit, split_by_prefix

_log = logging.getLogger("gpurnn")
_NOT_RECORDED = object()  # checkpoints older than the loss scalers have no entry for one


def save_snapshot(training: TrainingState, path: Path) -> None:
    """Write a checkpoint of this moment, on process 0. Raises CheckpointError as ``save_checkpoint``, on all."""
    arrays, document = snapshot_of(training)
    squares = [name for name in arrays if name.startswith("optimizer/") and is_square(name.removeprefix("optimizer/"))]
    training.group.first(lambda: save_checkpoint(path, arrays, document(), infinite=squares), "a checkpoint")


def snapshot_of(training: TrainingState) -> tuple[dict[str, Array], Callable[[], dict[str, Any]]]:
    """This moment as (arrays, a function that makes the document), with the recurrent state of the whole batch."""
    model, schedule, scaler = training.model, training.settings.schedule, training.scaler
    optimizer = training.optimizer.state_dict()
    structure, states = _flatten(training.group.whole_state(training.state, model.ops.to_numpy))
    arrays = {f"state/{key}": model.ops.to_numpy(array) for key, array in states.items()}
    arrays |= {f"model/{key}": array for key, array in model.state_dict().items()}
    arrays |= {f"optimizer/{key}": array for key, array in optimizer["arrays"].items()}

    def document():
        return {
            "epoch": training.epoch, "index": training.index, "step": training.step, "sums": training.sums,
            "norm": training.norm, "best": training.best, "waited": training.waited, "seconds": training.elapsed(),
            "state": structure, "optimizer": optimizer["scalars"], "schedule": schedule and schedule.state_dict(),
            "scaler": scaler and scaler.state_dict(), "random": model.random_state(),
            "sizes": training.files.synced_sizes(), "frozen": model.frozen, "data": _data_of(training),
            "settings": settings_of(training), "extra": training.settings.extra, "machine": model.ops.machine(),
        }  # fmt: skip

    return arrays, document


def restore_snapshot(training: TrainingState, path: Path) -> None:
    """Take everything from a checkpoint, which process 0 reads. Raises CheckpointError; the model is unchanged then."""
    group, what = training.group, "reading the checkpoint"
    arrays, document = group.first(lambda: load_checkpoint(path), what) or ({}, None)
    arrays, document = group.send_arrays(arrays, what), group.send(document, what)
    if not is_of_fit(document):
        raise CheckpointError(
            f"{path}: holds no run that could be continued: load_weights(model, path) reads the weights in it"
        )
    before = training.model.state_dict()
    try:
        _check_settings(training, document)
        load_snapshot(training, arrays, document)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        training.model.load_state_dict(before)
        raise CheckpointError(f"{path}: does not fit this run: {one_line(error, 2000)}") from error
    if group.is_first:
        _say_differences(training, path, document)
    batches = training.settings.batches
    if training.index and not batches.numbered and training.index != batches.count:
        training.index, training.state, training.sums = 0, None, [0.0, 0]
        if group.is_first:
            _log.warning(
                "%s was made in the middle of epoch %d, and these batches cannot be asked for by number: the epoch "
                "begins anew, with the weights of the checkpoint. Batch sources and lists go on exactly where they "
                "were", path, training.epoch + 1,
            )  # fmt: skip
    log = path.parent / run_folder.HISTORY
    size = training.log_sizes.get("history", 0)
    records = group.first(lambda: run_folder.read_history(log, size) if log.exists() else [], what)
    training.history.extend(group.send(records, what))


def _say_differences(training: TrainingState, path: Path, document: dict[str, Any]) -> None:
    """Log other frozen parameters, and another machine, than those of a checkpoint."""
    frozen = document.get("frozen", training.model.frozen)
    if frozen != training.model.frozen:
        then, now = (", ".join(names) or "none" for names in (frozen, training.model.frozen))
        _log.warning("%s was made with frozen parameters: %s; this run has: %s", path, then, now)
    _warn_of_another_machine(training, path, document.get("machine"))


def _data_of(training: TrainingState) -> dict[str, int | None]:
    """What a resumed run must have in common with its checkpoint, so that (epoch, index) is the same batch."""
    return {"batches": training.settings.batches.count, "accumulate": training.settings.accumulate}


def settings_of(training: TrainingState) -> dict[str, Any]:
    """Arguments of ``fit`` that a resumed run repeats, JSON-ready; ``lr`` is None for an optimizer of the caller's."""
    settings = training.settings
    return {
        "watch": list(settings.watch), "validation": settings.validation is not None,
        "clip_norm": settings.clip_norm if math.isfinite(settings.clip_norm) else None,
        "clip_value": settings.clip_value, "weight_noise": settings.weight_noise, "lr": settings.lr,
        "schedule_every": None if settings.schedule is None else settings.schedule_every,
    }  # fmt: skip


def _check_settings(training: TrainingState, document: dict[str, Any]) -> None:
    """Raise ValueError where the checkpoint was made with other data, settings, schedule or loss scale."""
    if document["data"] != _data_of(training):
        raise ValueError(f"it was made with {document['data']}, this run has {_data_of(training)}")
    schedule = training.settings.schedule
    if (document["schedule"] is None) != (schedule is None):
        raise ValueError("it was made without a schedule" if schedule else "it was made with a schedule")
    scaler = document.get("scaler", _NOT_RECORDED)
    if scaler is not _NOT_RECORDED and (scaler is None) != (training.scaler is None):
        raise ValueError(f"it was made {'without' if training.scaler else 'with'} a loss scale (loss_scaler)")
    then, now = document.get("settings", {}), settings_of(training)  # older checkpoints have none
    different = [name for name in now if name in then and then[name] != now[name]]
    if None in (then.get("lr"), now["lr"]):  # an optimizer of the caller's may be at any point of its schedule
        different = [name for name in different if name != "lr"]
    if not now["validation"]:  # then it is the loss in training that is watched
        different = [name for name in different if name != "watch"]
    if different:
        was, has = (", ".join(f"{name}={values[name]!r}" for name in different) for values in (then, now))
        raise ValueError(f"it was made with {was}, this run has {has}. Give the same, or begin a new run")


def load_snapshot(training: TrainingState, arrays: dict[str, Array], document: dict[str, Any]) -> None:
    """Give the arrays and the document of a checkpoint to the training and the objects in it."""
    parts = split_by_prefix(arrays)
    training.model.load_state_dict(parts.get("model", {}))
    training.optimizer.load_state_dict({"scalars": document["optimizer"], "arrays": parts.get("optimizer", {})})
    if training.settings.schedule is not None:
        training.settings.schedule.load_state_dict(document["schedule"])
    scaler = document.get("scaler", _NOT_RECORDED)
    if training.scaler is not None and scaler is not _NOT_RECORDED:
        training.scaler.load_state_dict(scaler)
    state = _unflatten(document["state"], parts.get("state", {}), training.model.xp)
    training.state = training.group.own_state(state)
    training.model.load_random_state(document["random"])
    training.epoch, training.index, training.step = (check_size(n, document[n], 0) for n in ("epoch", "index", "step"))
    for number in (*document["sums"], document["seconds"], document["norm"] or 0.0, document["best"] or 0.0):
        check_number("sums, seconds, norm and best", number)
    training.sums, training.norm = list(document["sums"]), document["norm"]
    training.best, training.waited, training.seconds = document["best"], document["waited"], document["seconds"]
    training.log_sizes = {str(log): check_size("sizes", size, 0) for log, size in document["sizes"].items()}


def _warn_of_another_machine(training: TrainingState, path: Path, then: Any) -> None:
    """Log the differences from the machine of the checkpoint that change the last bits."""
    now = training.model.ops.machine()
    other = [name for name in now if isinstance(then, dict) and then.get(name) != now[name]]
    if other:
        differences = ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in other)
        _log.warning(
            "%s: the run goes on, but not to the same bits as without a stop: %s", path, one_line(differences, 2000)
        )


def _flatten(state: State, path: str = "s") -> tuple[Any, dict[str, Array]]:
    """A recurrent state as (JSON-ready structure with keys or None in place of arrays, key -> array)."""
    if state is None:
        return None, {}
    if isinstance(state, (tuple, list)):
        structure, arrays = [], {}
        for number, part in enumerate(state):
            inner, more = _flatten(part, f"{path}.{number}")
            structure.append(inner)
            arrays |= more
        return structure, arrays
    return path, {path: state}


def _unflatten(structure: Any, arrays: dict[str, Array], xp: Any) -> State:
    """The recurrent state that ``_flatten`` took apart."""
    if structure is None:
        return None
    if isinstance(structure, list):
        return tuple(_unflatten(part, arrays, xp) for part in structure)
    return xp.asarray(np.asarray(arrays[structure]))
