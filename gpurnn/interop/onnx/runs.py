"""Runs as ONNX files, and runs of such files: ``gpurnn export`` and ``gpurnn import``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..._typing import Array
from ...errors import FileError, one_line
from ...files import write_bytes_atomic
from ...module import Module
from ...tasks.exported import checked_run, refuse_taken, run_document, write_imported
from ...tasks.trained import load
from .export import model_proto
from .reading import array_of, read_model
from .twin import DOCUMENT


def export_run(folder: str | os.PathLike[str], path: str | os.PathLike[str], **options: Any) -> None:
    """Write the model of a run to an ONNX file, with all that ``import_run`` needs.

    options: lengths, states, weights and part, as of ``export_onnx``. Raises what ``load`` and ``export_onnx`` raise.
    """
    options = {"lengths": True, "states": True, "weights": None, "part": None} | options
    trained = load(folder, "numpy")
    document = run_document(folder)
    facts = {
        name: trained.facts[name] for name in ("vocabulary", "classes", "source", "target") if name in trained.facts
    }
    metadata = {"task": document["task"]} | {name: json.dumps(value) for name, value in facts.items()}
    proto, _ = model_proto(trained.model, options, metadata, run=document)
    write_bytes_atomic(Path(path), proto.SerializeToString())


def import_run(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Any:
    """Make a run of an ONNX file that ``export_run`` wrote; returns its settings.

    The file may not have been changed since, as a run has the weights of its graph and the equations of its task.

    Raises FileError for another file, or a damaged one; ValueError where the folder holds a run already.
    """
    folder = Path(folder)
    refuse_taken(folder)
    proto, place = read_model(path)
    run, options = _described(proto, place)
    arrays = {one.name: one for one in proto.graph.initializer}
    largest = max((size for tensor in arrays.values() for size in tensor.dims), default=0)
    task, settings, document = checked_run(run, largest, len(arrays), place)
    try:
        model = task.build(settings, document["facts"], "numpy")
        expected, numbers = _numbered(model, options)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise FileError(f"{place}: its settings make no model: {one_line(error)}") from error
    if list(expected.graph.node) != list(proto.graph.node):
        raise FileError(f"{place}: its graph is not that of its settings: it was changed, or made by another version")
    model.load_state_dict(_state(model, numbers, arrays, place))
    write_imported(folder, document, model)
    return settings


def _described(proto, place):
    """(what it says of its run, options) of a file. Raises FileError."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        document = json.loads(metadata[DOCUMENT])
        run, options = document["run"], document["options"]
        options = {name: options[name] for name in ("lengths", "states", "weights", "part")}
    except (LookupError, ValueError, TypeError, RecursionError) as error:
        raise FileError(
            f"{place}: says nothing of a run, as those that 'gpurnn export RUN' writes do: "
            "gpurnn.interop.onnx.import_onnx(path) reads any model, for use in Python"
        ) from error
    if options["part"] is not None:
        raise FileError(f"{place}: holds the {options['part']} alone: a run needs the whole model")
    return run, options


def _numbered(model: Module, options: Mapping[str, Any]) -> tuple[Any, dict[str, Array]]:
    """The file that ``model`` would make, and for each of its weights where its numbers stand in the model.

    A number n > 0 is the n-th of all parameters and buffers; a negative one is it with the other sign; 0 is none.
    """
    prefixes, starts, start = {}, {}, 1
    for name, array in model._saved_arrays().items():
        starts[name], start = start, start + array.size
    for prefix, module in model.modules():
        prefixes[id(module)] = f"{prefix}." if prefix else ""

    def read(module, name):
        array = module.params[name] if name in module.params else module.buffers[name]
        first = starts[prefixes[id(module)] + name]
        return np.arange(first, first + array.size, dtype=np.float64).reshape(array.shape)

    with np.errstate(over="ignore"):  # the numbers of a 16-bit model
        proto, builder = model_proto(model, options, read=read)
    return proto, builder.weights


def _state(model, numbers, arrays, place):
    """The state dictionary of ``model`` with the weights of a file. Raises FileError."""
    state = model.state_dict()
    flat = np.concatenate([np.zeros(1), *(array.astype(np.float64).ravel() for array in state.values())])
    for name, places in numbers.items():
        if name not in arrays or tuple(arrays[name].dims) != places.shape:
            raise FileError(f"{place}: its weights {name!r} are missing, or of another shape than {places.shape}")
        values = array_of(arrays[name], place).astype(np.float64)
        if not np.isfinite(values).all():
            raise FileError(f"{place}: its weights {name!r} are not finite")
        flat[np.abs(places).astype(np.int64)] = values * np.sign(places)
    found, start = {}, 1
    for name, array in state.items():
        found[name] = flat[start : start + array.size].reshape(array.shape)
        start += array.size
    return found
