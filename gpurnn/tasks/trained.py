"""A trained model with its settings, read from the folder of its run."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .. import run_folder
from ..backends import get_backend
from ..checkpoint import CheckpointError, checkpoint_shapes, document_digest
from ..errors import DtypeError
from ..files import one_line, read_json, write_json_atomic
from ..train import load_weights
from . import get_task
from .seen import check_trained_on
from .settings import Settings


@dataclass
class Trained:
    """A model in evaluation mode with all that belongs to it; made by ``load``. result: what ``Task.finish`` found."""

    folder: Path
    task: object
    settings: Settings
    facts: dict
    model: object
    result: dict = field(default_factory=dict)


def as_json(document):
    return json.loads(json.dumps(document))


def config_path(folder):
    path = Path(folder) / run_folder.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: {path} is missing")
    return path


def write_config(folder, document):
    """``config.json``, with the SHA-256 of what it says."""
    document = as_json(document)
    write_json_atomic(Path(folder) / run_folder.CONFIG, document | {"sha256": document_digest(document)})


def read_run(folder, task=None):
    """(Settings of its task, whole document) of a run's ``config.json``.

    task: the name of the one task it may be of. Raises FileNotFoundError where there is no run, CheckpointError for a
    damaged one, ValueError for one of another task. Files without a SHA-256 (of the first version) are accepted.
    """
    if Path(folder).is_file():
        raise FileNotFoundError(
            f"{folder} is a file: give the folder of the run; gpurnn.load_weights(model, path) reads a checkpoint alone"
        )
    path = config_path(folder)
    document = read_json(path, error=CheckpointError, own=True)
    try:
        found = dict(document)
        if "sha256" in found and found.pop("sha256") != document_digest(found):
            raise ValueError("its SHA-256 is not the one of what it says")
        unknown = set(found) - {*_CONFIG_KEYS, "result", "start"}
        if unknown:
            raise ValueError(f"it has {', '.join(map(repr, sorted(unknown)[:3]))}, which no run has")
        document = {name: _typed(found[name], name, kind) for name, kind in _CONFIG_KEYS.items()} | found
        if not all(isinstance(file, str) for file in document["files"]):
            raise TypeError("files should be a list of paths")
        document["data"]["summary"], document["data"]["fingerprint"]
        if "start" in document:
            _typed(document["start"]["run"], "start", str), _typed(document["start"]["crc32"], "start", int)
        found_task = get_task(document["task"])
        settings = found_task.Settings(**document["settings"])
        found_task.check_facts(settings, document["facts"])
        check_trained_on(document["facts"])
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


def check_sizes(folder, task, settings, facts):
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
    check_sizes(folder, task, settings, facts)
    ops = get_backend(backend)  # what is wrong with that, or with its variables, is no damage
    try:
        model = task.build(settings, facts, ops)
    except DtypeError:  # needs a package that this machine lacks
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / run_folder.CONFIG}: is damaged: {one_line(error)}") from error
    load_weights(model, path)
    return Trained(folder, task, settings, facts, model.eval(), document.get("result", {}))
