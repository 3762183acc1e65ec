"""Model files: ``save`` and ``load``.

A model file is a safetensors file. Its metadata has three texts:

    gpurnn      JSON: {"version", "dtype", "model", "random", "frozen"}; description.py says what "model" is
    run         JSON of the run that the model comes from; only in files of ``gpurnn export``
    sha256      of these texts and all arrays
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._typing import Array, Backend
from ..backends import get_backend
from ..checkpoint import CheckpointError, check_finite
from ..dtypes import DTYPES, check_dtype, is_float
from ..errors import MissingError, ShapeError, check_number, check_size, described
from ..files import check_room, file_size, one_line, open_regular, parse_json, write_bytes_atomic
from ..module import Module, without_values
from ..tensors import DTYPES as FILE_DTYPES
from ..tensors import Entry, read_array, read_header, to_bytes
from .description import build, describe

VERSION = 3  # 2 where products round nothing to 8 bits, 1 where no layer is quantized
_COST = 200  # bytes of memory for a byte of the description at worst: 60 of them are a layer without parameters
_KEY, _RUN, _DIGEST = "gpurnn", "run", "sha256"


def save(model: Module, path: str | os.PathLike[str]) -> None:
    """Save a whole model, its layers and its weights, to one file, for ``gpurnn.load``.

    The file is a safetensors file, which other libraries read, too, and holds no code. A cell of your own is saved as
    the graph of its equations. Saved are also running statistics, counters of random draws and which parameters are
    frozen; not gradients, an encoder-decoder's ``sampling``, or anything of an optimizer: for these there are
    ``fit(..., out=folder)`` and ``save_checkpoint``.

    Parameters
    ----------
    model : Module
        Any layer of gpurnn, a ``Sequential`` or an ``EncoderDecoder``; also the model of a run. A model that is a class
        of your own is code: for it there is ``save_weights``.
    path : path
        The .safetensors file. One that is there is replaced once the new one is complete.

    Raises
    ------
    TypeError, ValueError
        For a model that no file can hold; the message says what to do.
    CheckpointError
        If values are not finite, or the file cannot be written.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.GRU(2, 3), gpurnn.Linear(3, 1))
    >>> gpurnn.save(model, "model.safetensors")
    >>> twin = gpurnn.load("model.safetensors")
    >>> x = np.ones((5, 4, 2), "float32")
    >>> bool((twin(x)[0] == model(x)[0]).all())
    True
    """
    if isinstance(path, Module):
        raise TypeError("save: expected the model first and then the path: save(model, path)")
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a gpurnn layer or model, got {described(model)}")
    write(model, _checked_path(path, "save"))


def load(path: str | os.PathLike[str], backend: str | Backend | None = None, dtype: str | None = None) -> Module:
    """Load a model that ``gpurnn.save`` or ``gpurnn export RUN weights.safetensors`` wrote.

    Nothing in the file is run. Everything is checked before memory is taken for it.

    Parameters
    ----------
    path : path
        The .safetensors file.
    backend : str, optional
        As of a layer; None is the current one, whichever the model was saved on.
    dtype : str, optional
        Of the loaded model; None is that of the saved one. Parameters of 16-bit models are float32 in the file, too, so
        that nothing is rounded on the way.

    Returns
    -------
    Module
        In evaluation mode, whatever the mode of the saved model: ``model.train()`` before you train it by hand
        (``fit`` does so itself). Gradients are zero.

    Raises
    ------
    CheckpointError
        For a file that is damaged or of another kind; the message says what reads it.
    DtypeError, BackendError
        For a ``dtype`` or a ``backend`` that cannot work here.

    Examples
    --------
    >>> gpurnn.save(gpurnn.LSTM(2, 3, layer_norm=True), "layer.safetensors")
    >>> gpurnn.load("layer.safetensors", backend="numpy", dtype="float64")
    LSTM(2, 3, layer_norm=True; 114 parameters, numpy, float64)
    """
    ops, wanted = get_backend(backend), None if dtype is None else check_dtype(dtype)
    path = _checked_path(path, "load")
    return _read(path, ops, wanted)[0]


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a model file holds, for ``gpurnn info FILE``: JSON-ready. Raises as ``load``, which has to work."""
    path = _checked_path(path, "info")
    model, said = _read(path, get_backend("numpy"), None)
    run = said.run or {}
    lists = {name: run.get("facts", {}).get(name) for name in ("vocabulary", "source", "target", "classes")}
    lists = {name: found.get("entries") if isinstance(found, dict) else found for name, found in lists.items()}
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "dtype": said.document["dtype"],
        "parameters": model.parameter_count,
        "frozen": model.frozen,
        "quantized": model._int8_count(),
        "activations": "int8" if model._and_activations() else None,
        "layers": [
            {
                "name": name,
                "layer": type(layer).__name__,
                "parameters": layer.parameter_count,
                "shown": type(layer).__name__ + (f"({sizes})" if (sizes := layer._sizes_text()) else ""),
                "quantized": layer._int8_count(),
            }
            for name, layer in model.modules()
        ],
        "sizes": {name: len(found) for name, found in lists.items() if isinstance(found, (list, str))},
        "run": run or None,
    }


def _version(model: Module) -> int:
    """The least version of a reader for the file of a model."""
    if not model._int8_count():
        return 1
    return VERSION if model._and_activations() else 2


def write(model: Module, path: Path, run: dict[str, Any] | None = None) -> None:
    """``save``, with what a run says of itself."""
    document = {
        "version": _version(model),
        "dtype": model.dtype.name,
        "model": describe(model),
        "random": model.random_state(),
        "frozen": model.frozen,
    }
    arrays = {name: np.asarray(array, order="C") for name, array in model.state_dict().items()}
    check_finite(path, arrays, ())
    texts = {_KEY: json.dumps(document, allow_nan=False)}
    if run is not None:
        texts[_RUN] = json.dumps(run, allow_nan=False)
    try:
        write_bytes_atomic(path, to_bytes(arrays, texts | {_DIGEST: _digest(texts, arrays)}))
    except OSError as error:
        raise CheckpointError(f"{path}: could not be saved: {one_line(error)}") from error


def _digest(texts: dict[str, str], arrays: dict[str, Array]) -> str:
    """SHA-256 of all that a file says, whatever the order in it."""
    found = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        found.update(array.reshape(-1).view(np.uint8))
    return found.hexdigest()


class _Described(NamedTuple):
    """What the metadata of a file says. run: None where there is none."""

    document: dict[str, Any]
    run: dict[str, Any] | None


def read(path: Path, ops: Any) -> tuple[Module, dict[str, Any] | None]:
    """The model of a file, and what it says of its run or None. Raises as ``load``."""
    model, said = _read(_checked_path(path, "import"), ops, None)
    return model, said.run


def _read(path, ops, dtype):
    """(model, ``_Described``) of a file."""
    try:
        with open_regular(path, CheckpointError) as file:
            _refuse_pickle(file, path)
            metadata, entries = read_header(file, path, CheckpointError)
            said = _described(metadata, path)
            dtype = check_dtype(said.document["dtype"]) if dtype is None else dtype
            with _faults(path):
                model = _built(said.document, entries, ops, dtype)
            arrays = {name: read_array(file, name, entry, path, CheckpointError) for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    texts = {name: metadata[name] for name in (_KEY, _RUN) if name in metadata}
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(texts, arrays):
        raise CheckpointError(
            f"{path}: is damaged: its SHA-256 is not the one that it was saved with. Who changes it on purpose leaves "
            "the metadata 'sha256' out"
        )
    with _faults(path):
        model.load_state_dict(arrays)
    return model.eval(), said


def _checked_path(path, function):
    """``path`` as a Path. Raises TypeError or ValueError for one that is no model file's."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a .safetensors file, got {type(path).__name__}")
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    if function == "save":
        raise ValueError(f"path should end in .safetensors, got {str(path)!r}")
    raise ValueError(f"path should name a .safetensors file, got {str(path)!r}{_other(path)}")


def _other(path):
    """What reads a file or a folder that is no model file."""
    if path.is_dir():
        return ": gpurnn.tasks.run.load(folder) reads a run; 'gpurnn export RUN weights.safetensors' makes a model file"
    return {
        ".json": ": gpurnn.load_weights(model, path) reads a checkpoint into a model",
        ".onnx": ": gpurnn.interop.onnx.import_onnx(path) reads it",
    }.get(path.suffix, _PICKLE if path.suffix in (".pt", ".pth", ".pkl", ".pickle") else "")


_PICKLE = (
    ": a pickle can run any code when it is loaded, so gpurnn loads none. Load it where you trust it, and give its "
    "arrays to model.load_state_dict"
)


def _refuse_pickle(file, path):
    """Raise CheckpointError for a pickle, or an archive of torch with one in it, under a wrong name."""
    head = file.read(8)
    file.seek(0)
    if int.from_bytes(head, "little") > file_size(file) and (head[:1] == b"\x80" or head[:4] == b"PK\3\4"):
        raise CheckpointError(f"{path}: is no safetensors file, but a pickle or an archive{_PICKLE}")


@contextlib.contextmanager
def _faults(path) -> Iterator[None]:
    """A context in which what only a damaged or a hostile file causes is a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged, or no model file: {one_line(error, 2000)}") from error


def _described(metadata, path):
    """The ``_Described`` of a file's metadata."""
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path}: holds arrays, but not which model they are of: build that, then "
            "model.load_state_dict(safetensors.numpy.load_file(path)); for a checkpoint of a run "
            "gpurnn.load_weights(model, its .json file), or 'gpurnn export RUN weights.safetensors' first"
        )
    check_room(path, _COST * len(metadata[_KEY]), "its model")
    document = parse_json(metadata[_KEY], path, CheckpointError)
    run = metadata.get(_RUN)
    with _faults(path):
        version = check_size("version", document["version"])
        if version > VERSION:
            raise CheckpointError(
                f"{path}: has format version {version}, this gpurnn reads version {VERSION}: install a newer gpurnn"
            )
        if document["dtype"] not in DTYPES:
            raise ValueError(f"dtype should be one of {', '.join(DTYPES)}, got {document['dtype']!r}")
        run = None if run is None else parse_json(run, path, CheckpointError)
        if run is not None:
            _check_run(run)
    return _Described(document, run)


def _check_run(run):
    """Raise TypeError or LookupError for what is not ``gpurnn.tasks.exported.run_document`` of a run."""
    kinds = {"task": str, "settings": dict, "data": dict, "facts": dict, "files": list, "progress": dict}
    for name, kind in kinds.items():
        if not isinstance(run[name], kind):
            raise TypeError(f"run: {name} should be {kind.__name__}, got {described(run[name])}")
    check_number("run: epoch", run["progress"]["epoch"], 0)
    if not isinstance(run["data"]["summary"], str):
        raise TypeError("run: the summary of its data should be a text")


def _built(document: dict[str, Any], entries: Mapping[str, Entry], ops: Any, dtype: Any) -> Module:
    """The model of a document, its values still zero, which fits the arrays of its file."""
    numbers = sum(math.prod(entry.shape) for entry in entries.values())
    with without_values(numbers):
        model = build(document["model"], len(entries), numbers, backend=ops, dtype=dtype)
    targets = model._saved_arrays()
    for name in (*targets, *entries):
        if name not in targets or name not in entries:
            raise MissingError(f"the array {name!r} is {'unknown' if name in entries else 'missing'}")
    for name, target in targets.items():
        found = entries[name]
        if found.shape != target.shape:
            raise ShapeError(f"{name}: expected shape {target.shape}, got {found.shape}")
        if is_float(target.dtype) != (FILE_DTYPES[found.dtype].startswith(("float", "bfloat"))):
            raise ValueError(f"{name}: expected numbers as {target.dtype}, got {FILE_DTYPES[found.dtype]}")
    model.load_random_state(document["random"])
    for name in document["frozen"]:
        model.freeze(glob.escape(name))
    return model
