"""Files of weights: ``save_weights`` and ``load_weights``. checkpoint.py has a table of what saves and loads what."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._typing import Array
from ..checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ..module import Module


def save_weights(model: Module, path: str | os.PathLike[str]) -> None:
    """Save the weights and running statistics of ``model`` to a file, for ``load_weights``.

    Parameters
    ----------
    model : Module
        The model to save.
    path : path
        The .json file to write. The arrays go into a .safetensors file beside it.

    Raises
    ------
    CheckpointError
        As ``save_checkpoint`` does.
    TypeError
        For a ``model`` that is no Module.

    Examples
    --------
    >>> model = gpurnn.GRU(2, 3)
    >>> gpurnn.save_weights(model, "model.json")
    >>> gpurnn.load_weights(model, "model.json")
    """
    _check_order("save_weights", model, path)
    save_checkpoint(path, model.state_dict(), {"kind": "weights", "model": type(model).__name__})


def load_weights(model: Module, path: str | os.PathLike[str]) -> None:
    """Load the weights and running statistics from a file into ``model``.

    ``load_checkpoint`` reads a file without a model; ``model.load_state_dict`` takes arrays that are in memory.

    Parameters
    ----------
    model : Module
        The model that receives the values.
    path : path
        The .json file of ``save_weights``, of ``save_checkpoint(path, model.state_dict(), ...)`` or of a checkpoint of
        ``fit``; or the folder of a run, for its best checkpoint, or its last if there is no best.

    Raises
    ------
    CheckpointError
        For a file that is damaged or belongs to another model.
    ValueError
        For a file of another kind; the message says what reads it.
    TypeError
        For a ``model`` that is no Module.

    Nothing changes on an error.
    """
    _check_order("load_weights", model, path)
    path = Path(path)
    if path.is_dir():
        folder = path
        path = next((folder / name for name in ("best.json", "last.json") if (folder / name).exists()), None)
        if path is None:
            raise CheckpointError(f"{folder}: holds no best.json and no last.json: it is no folder of a run of fit")
    arrays, document = load_checkpoint(path)
    if is_of_fit(document):
        arrays = split_by_prefix(arrays).get("model", {})
    expected = list(model.state_dict())
    if expected and not set(arrays) & set(expected):
        raise CheckpointError(
            f"{path}: holds no weights of this model: its arrays are {_some(arrays)}, the model's {_some(expected)}. "
            "load_checkpoint(path) reads arrays of any kind"
        )
    try:
        model.load_state_dict(arrays)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: does not fit this model: {error}") from error


def is_of_fit(document: Any) -> bool:
    """Whether a checkpoint's document is one that ``fit`` wrote."""
    return isinstance(document, dict) and {"epoch", "step", "optimizer", "random", "data"} <= set(document)


def split_by_prefix(arrays: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """{"model/a": x} -> {"model": {"a": x}}."""
    parts: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        prefix, _, rest = name.partition("/")
        parts.setdefault(prefix, {})[rest] = array
    return parts


def _check_order(function: str, model: Any, path: Any) -> None:
    """Raise TypeError unless ``model`` is a Module and ``path`` the name of a file."""
    if isinstance(path, Module):
        raise TypeError(f"{function}: expected the model first and then the path: {function}(model, path)")
    if not isinstance(model, Module):
        hint = ". Arrays are what save_checkpoint(path, arrays, document) saves" if isinstance(model, Mapping) else ""
        raise TypeError(f"model: expected a gpurnn layer or model, got {type(model).__name__}{hint}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a file, got {type(path).__name__}")


def _some(names: Iterable[str]) -> str:
    """The first three names, and the number of the others, in words."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
