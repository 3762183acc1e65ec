"""Checkpoints that are whole or not there, and the atomic writes they stand on.

A checkpoint is a pair: ``name.json`` (the document) and ``name-<token>.safetensors`` (the arrays). The JSON file names
its tensor file with size and SHA-256, and every save writes a tensor file with a new name, so the one moment that
counts is the rename of the JSON file: before it the old pair is complete, after it the new one is. Tensor files that no
JSON names are removed afterwards, those of a process that was killed at the next save.

| to | call |
|---|---|
| save a model's weights, and give them to a model | ``save_weights``, ``load_weights`` (train/weights.py) |
| give a model the weights of a run of ``fit`` | ``load_weights`` |
| go on with a run of ``fit`` | ``fit(..., out=folder, resume=True)`` |
| load a run of a task with all that belongs to it | ``gpurnn.tasks.run.load(folder)`` |
| save arrays and a document of one's own, and read any checkpoint | ``save_checkpoint``, ``load_checkpoint`` |
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as tensors_to_bytes

from .arrays import host_array
from .dtypes import check_dtype, is_float
from .errors import DtypeError, FileError
from .files import (
    check_target,
    file_size,
    one_line,
    open_regular,
    parse_json,
    read_json,
    temporary_target,
    write_bytes_atomic,
    write_json_atomic,
)

_FORMAT, _VERSION = "gpurnn-checkpoint", 1
_READERS = {  # suffix of a file of others -> what makes a state dictionary of it
    ".safetensors": "safetensors.numpy.load_file(path)",
    ".pt": "torch.load(path)",
    ".pth": "torch.load(path)",
    ".npz": "numpy.load(path)",
}
_DTYPES = {  # what safetensors calls the dtypes that are saved and read
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip


class CheckpointError(FileError, RuntimeError):
    """A file of a run could not be written, or the one read is damaged or does not fit; the message names the file."""


def save_checkpoint(path, arrays, document, *, infinite=()):
    """Write the mapping ``arrays`` (name -> array) and the JSON-ready ``document`` as one checkpoint.

    path: the JSON file, ``run/last.json``; the arrays go beside it, ``run/last-<token>.safetensors``.
    arrays: of float64, float32, float16, bfloat16, complex64, bool and the integers of 8 to 64 bits.
    infinite: names of arrays that may hold positive infinity, such as squares that overflowed.

    Whatever happens, a checkpoint that was at ``path`` stays readable until the new one is complete. Raises
    CheckpointError, with nothing left behind, where the disk is full or another float array holds NaN or infinity (a
    checkpoint of a diverged model would replace a good one), DtypeError for an array of another dtype, TypeError for a
    document that is not JSON and a name that is not a string, ValueError for a name that no file can hold.

    >>> save_checkpoint("last.json", gpurnn.Linear(2, 1).state_dict(), {"epoch": 3})
    >>> arrays, document = load_checkpoint("last.json")
    >>> sorted(arrays), document["epoch"]
    (['bias', 'weight'], 3)
    """
    path = _json_path(path, save=True)
    if not isinstance(arrays, Mapping):
        hint = ". Give model.state_dict(), or call save_weights(model, path)" if hasattr(arrays, "state_dict") else ""
        raise TypeError(f"arrays: expected a mapping, name -> array, got {type(arrays).__name__}{hint}")
    arrays = {name: np.asarray(host_array(array, name), order="C") for name, array in arrays.items()}
    _check_saveable(path, arrays)
    infinite = [name for name in infinite if np.isposinf(arrays[name]).any()]
    _check_finite(path, arrays, infinite)
    try:
        text = _canonical(document)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{path}: the document cannot be written as JSON: {error}") from error
    try:
        data = tensors_to_bytes(arrays)
    except (SafetensorError, UnicodeError) as error:
        raise CheckpointError(f"{path}: the arrays cannot be written: {one_line(error)}") from error
    name = f"{path.stem}-{secrets.token_hex(8)}.safetensors"
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors": {"file": name, "size": len(data), "sha256": _sha256(data), "infinite": infinite},
        "sha256": _sha256(text.encode()),
        "document": json.loads(text),
    }
    if not path.parent.is_dir():
        fault = "is no folder" if path.parent.exists() else "does not exist: make it first"
        raise CheckpointError(f"{path}: could not be saved: the folder {path.parent} {fault}")
    try:
        check_target(path)
        write_bytes_atomic(path.with_name(name), data, path)
        write_json_atomic(path, header)  # its rename is the commit
    except OSError as error:
        if _tensor_file(path) != name:
            with contextlib.suppress(OSError):
                path.with_name(name).unlink()
        raise CheckpointError(f"{path}: could not be saved, the last good checkpoint stays: {error}") from error
    _remove_tensors(path, current=name)


def load_checkpoint(path):
    """Read a checkpoint; returns (arrays: name -> NumPy array, document).

    Raises CheckpointError, naming the file and what is wrong, unless both files are exactly what was saved.
    """
    path = _json_path(path)
    header = _read_header(path)
    data = None
    for _ in range(3):  # a running training may replace the pair between the two reads
        tensors = path.with_name(header["tensors"]["file"])
        try:
            with open_regular(tensors, CheckpointError) as file:
                _check_size(file, tensors, header, path)
                data = file.read(header["tensors"]["size"])
            break
        except FileNotFoundError:
            header = _read_header(path)
        except OSError as error:
            raise CheckpointError(f"{tensors}: cannot be read: {error}") from error
    if data is None:
        raise CheckpointError(f"{tensors}: is missing; {path} names it as its tensor file")
    if _sha256(data) != header["tensors"]["sha256"]:
        raise CheckpointError(f"{tensors}: is damaged: its SHA-256 is not the one in {path.name}")
    try:
        arrays = {name: _from_entry(tensors, name, entry) for name, entry in deserialize(data)}
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensors}: is not a safetensors file: {one_line(error)}") from error
    _check_finite(tensors, arrays, header["tensors"].get("infinite", ()))  # older files have none
    return arrays, header["document"]


def _from_entry(tensors, name, entry):
    """The array ``name`` of what safetensors says of it."""
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            f"{tensors}: array {name!r} is of the dtype {entry['dtype']}; what is read is {', '.join(_DTYPES)}"
        )
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]]) if entry["dtype"] != "BF16" else check_dtype("bfloat16")
    except DtypeError as error:
        raise CheckpointError(f"{tensors}: array {name!r} cannot be read: {error}") from error
    return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])


def _check_size(file, tensors, header, path):
    """Raise CheckpointError unless an open tensor file is as long as its JSON file says."""
    size, found = header["tensors"]["size"], file_size(file)
    if found != size:
        raise CheckpointError(f"{tensors}: is damaged: {found} bytes, {path.name} says {size}")


def checkpoint_shapes(path):
    """Name -> shape of a checkpoint's arrays; only the header of the tensor file is read. Raises CheckpointError."""
    path = _json_path(path)
    header = _read_header(path)
    tensors = path.with_name(header["tensors"]["file"])
    try:
        with open_regular(tensors, CheckpointError) as file:
            _check_size(file, tensors, header, path)
            length = int.from_bytes(file.read(8), "little")
            entries = parse_json(file.read(min(length, header["tensors"]["size"])), tensors, CheckpointError)
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except OSError as error:
        raise CheckpointError(f"{tensors}: cannot be read: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{tensors}: is not a safetensors file: {one_line(error)}") from error


def is_checkpoint(path):
    """Whether a file is the JSON file of a checkpoint, however damaged its tensors may be."""
    try:
        _read_header(_json_path(path))
    except (CheckpointError, ValueError):
        return False
    return True


def remove_checkpoint(path):
    """Remove a checkpoint, JSON file first; nothing happens where there is none."""
    path = _json_path(path)
    path.unlink(missing_ok=True)
    _remove_tensors(path, current=None)


def _json_path(path, save=False):
    """``path`` of a JSON file, as a Path; raises for what is none. save: whether it is to be written, not read."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a .json file, got {type(path).__name__}")
    path = Path(path)
    if path.suffix == ".json":
        return path
    own = re.fullmatch(r"(.*)-[0-9a-f]{16}\.safetensors", path.name)
    if own:
        raise ValueError(
            f"{path} holds the arrays of a checkpoint: give its .json file, {path.with_name(own[1] + '.json')}"
        )
    if save:
        raise ValueError(f"path should end in .json, with the arrays in a file beside it, got {str(path)!r}")
    if path.suffix in _READERS:
        raise ValueError(f"{path}: is no checkpoint of gpurnn: model.load_state_dict({_READERS[path.suffix]}) reads it")
    raise ValueError(f"path should name the checkpoint's .json file, got {str(path)!r}")


def _read_header(path):
    """The JSON file, checked; everything but the tensors."""
    try:
        header = read_json(path, error=CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if isinstance(header, dict) and "task" in header and "format" not in header:
        raise CheckpointError(
            f"{path}: describes a run of the task {header['task']}: gpurnn.tasks.run.load(folder) reads it"
        )
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not a gpurnn checkpoint")
    if header.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: has format version {header.get('version')!r}, this gpurnn reads version {_VERSION}"
        )
    tensors = header.get("tensors")
    if not isinstance(tensors, dict) or not _is_tensor_name(path, tensors.get("file")):
        raise CheckpointError(f"{path}: is damaged: it names no tensor file of its own")
    size = tensors.get("size")
    known = isinstance(tensors.get("sha256"), str) and isinstance(tensors.get("infinite", []), list)
    if type(size) is not int or size < 0 or not known:
        raise CheckpointError(f"{path}: is damaged: it does not say size and SHA-256 of its tensor file")
    digest = document_digest(header.get("document"))
    if "document" not in header or digest is None or header.get("sha256") != digest:
        raise CheckpointError(f"{path}: is damaged: its document does not have the SHA-256 it was saved with")
    return header


def _tensor_file(path):
    """Name of the tensor file that ``path`` refers to, None where it does not."""
    try:
        return _read_header(path)["tensors"]["file"]
    except CheckpointError:
        return None


def _is_tensor_name(path, name):
    """Whether ``name`` is one that a save to ``path`` would make: no folders, no other checkpoint's."""
    return isinstance(name, str) and bool(re.fullmatch(re.escape(path.stem) + r"-[0-9a-f]{16}\.safetensors", name))


def _remove_tensors(path, current):
    """Remove what earlier saves to ``path`` left: tensor files other than ``current``, unfinished temporary files."""
    for file in path.parent.glob(f"*{glob.escape(path.stem)}*"):
        target = temporary_target(file.name) or file.name
        unfinished = target != file.name and target == path.name
        if file.name != current and (unfinished or _is_tensor_name(path, target)):
            with contextlib.suppress(OSError):
                file.unlink()


def _check_saveable(path, arrays):
    """Raise, naming the array, for what could not be read again."""
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"{path}: names of arrays should be strings, got {name!r}")
        if name == "__metadata__":
            raise ValueError(f"{path}: no array can be called '__metadata__', a word of the file's own: rename it")
        if array.dtype.name not in _DTYPES.values():
            raise DtypeError(
                f"{path}: array {name!r} should be of one of the dtypes {', '.join(_DTYPES.values())}, got "
                f"{array.dtype}: convert it"
            )


def _check_finite(path, arrays, infinite):
    for name, array in arrays.items():
        if not is_float(array.dtype):
            continue
        legal = np.isfinite(array)
        if name in infinite:
            legal |= np.isposinf(array)
        if not legal.all():
            raise CheckpointError(f"{path}: array {name!r} holds values that are not finite")


def document_digest(document):
    """SHA-256 of a JSON-ready document, whatever the order of its keys; None where it cannot be written as JSON."""
    try:
        return _sha256(_canonical(document).encode())
    except (ValueError, RecursionError, UnicodeEncodeError):
        return None


def _canonical(document):
    return json.dumps(document, sort_keys=True, allow_nan=False)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()
