"""Checkpoints that are either complete or absent.

A checkpoint is a pair: ``name.json`` (the document) and ``name-<token>.safetensors`` (the arrays). The JSON file names
its tensor file with size and SHA-256, and every save writes a tensor file with a new name. So a save takes effect when
the JSON file is renamed: before that the old pair is complete, after it the new one is. Tensor files that no JSON file
names are removed afterwards; those of a killed process are removed by the next save.

| to | call |
|---|---|
| save a whole model, and make it again | ``gpurnn.save``, ``gpurnn.load`` (model_file/) |
| save a model's weights, and give them to a model | ``save_weights``, ``load_weights`` (train/weights.py) |
| give a model the weights of a run of ``fit`` | ``load_weights`` |
| continue a run of ``fit`` | ``fit(..., out=folder, resume=True)`` |
| load a run of a task with all that belongs to it | ``gpurnn.tasks.run.load(folder)`` |
| save arrays and a document of your own, and read any checkpoint | ``save_checkpoint``, ``load_checkpoint`` |
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as tensors_to_bytes

from ._typing import Array
from .arrays import host_array
from .dtypes import is_float
from .errors import DtypeError, FileError
from .files import (
    check_target,
    file_size,
    one_line,
    open_regular,
    read_json,
    temporary_target,
    write_bytes_atomic,
    write_json_atomic,
)
from .tensors import DTYPES, array_of, read_header

_FORMAT, _VERSION = "gpurnn-checkpoint", 1
_READERS = {  # suffix of another library's file -> the call that makes a state dictionary of it
    ".safetensors": "safetensors.numpy.load_file(path)",
    ".pt": "torch.load(path)",
    ".pth": "torch.load(path)",
    ".npz": "numpy.load(path)",
}


class CheckpointError(FileError, RuntimeError):
    """A file of a run or of a model cannot be written, is damaged, or does not fit. The message names the file."""


def save_checkpoint(
    path: str | os.PathLike[str], arrays: Mapping[str, Array], document: Any, *, infinite: Iterable[str] = ()
) -> None:
    """Save arrays and a document of your own as one checkpoint; ``save_weights`` saves a model.

    Whatever happens, a checkpoint that was at ``path`` stays readable until the new one is complete.

    Parameters
    ----------
    path : path
        The JSON file, ``run/last.json``. The arrays go beside it, into ``run/last-<token>.safetensors``.
    arrays : mapping
        Name -> array of float64, float32, float16, bfloat16, complex64, bool or an integer of 8 to 64 bits.
    document : object
        Anything JSON-ready.
    infinite : iterable of str
        Names of arrays that may hold positive infinity, such as averages of squares that overflowed.

    Raises
    ------
    CheckpointError
        If the disk is full, or another float array holds NaN or infinity (a checkpoint of a diverged model would
        replace a good one). No partial file remains.
    DtypeError
        For an array of another dtype.
    TypeError
        For a document that is not JSON-ready, or a name that is not a string.
    ValueError
        For a name that no file can hold.

    Examples
    --------
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
    check_finite(path, arrays, infinite)
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
    _write_pair(path, name, data, header)
    _remove_tensors(path, current=name)


def _write_pair(path: Path, name: str, data: bytes, header: dict[str, Any]) -> None:
    """Write the tensor file ``name``, then the JSON file. Raises CheckpointError; the old pair then stays."""
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


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Array], Any]:
    """Read the arrays and the document of a checkpoint, without a model; ``load_weights`` gives them to a model.

    Parameters
    ----------
    path : path
        The JSON file of ``save_checkpoint``, ``save_weights`` or ``fit``.

    Returns
    -------
    arrays : dict
        Name -> NumPy array.
    document : object
        The document that was saved.

    Raises
    ------
    CheckpointError
        Unless both files are exactly as they were saved; the message names the file and the fault.
    ValueError, TypeError
        For a ``path`` that is no JSON file's; the message says what reads the file.

    Examples
    --------
    >>> gpurnn.save_weights(gpurnn.Linear(2, 1), "model.json")
    >>> arrays, document = load_checkpoint("model.json")
    >>> arrays["weight"].shape, document["model"]
    ((1, 2), 'Linear')
    """
    path = _json_path(path)
    header = _read_header(path)
    data = None
    for _ in range(3):  # a training in another process may replace the pair between the two reads
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
        arrays = {name: array_of(name, entry, tensors, CheckpointError) for name, entry in deserialize(data)}
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{tensors}: is not a safetensors file: {one_line(error)}") from error
    check_finite(tensors, arrays, header["tensors"].get("infinite", ()))  # older files have none
    return arrays, header["document"]


def _check_size(file: Any, tensors: Path, header: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError unless an open tensor file is as long as its JSON file says."""
    size, found = header["tensors"]["size"], file_size(file)
    if found != size:
        raise CheckpointError(f"{tensors}: is damaged: {found} bytes, {path.name} says {size}")


def checkpoint_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a checkpoint's arrays, from the header of the tensor file alone. Raises CheckpointError."""
    path = _json_path(path)
    header = _read_header(path)
    tensors = path.with_name(header["tensors"]["file"])
    try:
        with open_regular(tensors, CheckpointError) as file:
            _check_size(file, tensors, header, path)
            _, entries = read_header(file, tensors, CheckpointError, own=True)
        return {name: entry.shape for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(f"{tensors}: cannot be read: {error}") from error


def checkpoint_document(path: str | os.PathLike[str]) -> Any:
    """The document of a checkpoint, without a look at its arrays. Raises CheckpointError."""
    return _read_header(_json_path(path))["document"]


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file is the JSON file of a checkpoint; its tensor file may be damaged."""
    try:
        _read_header(_json_path(path))
    except (CheckpointError, ValueError):
        return False
    return True


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint, the JSON file first, if there is one."""
    path = _json_path(path)
    path.unlink(missing_ok=True)
    _remove_tensors(path, current=None)


def _json_path(path: Any, save: bool = False) -> Path:
    """``path`` as a Path, if it names a JSON file to read, or with ``save`` to write; otherwise raises."""
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
        more = "; gpurnn.load(path) makes the model of one by gpurnn.save" if path.suffix == ".safetensors" else ""
        raise ValueError(
            f"{path}: is no checkpoint of gpurnn: model.load_state_dict({_READERS[path.suffix]}) reads it{more}"
        )
    raise ValueError(f"path should name the checkpoint's .json file, got {str(path)!r}")


def _read_header(path: Path) -> dict[str, Any]:
    """The contents of the JSON file, checked. The tensor file is not read."""
    try:
        header = read_json(path, error=CheckpointError, own=True)
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


def _tensor_file(path: Path) -> str | None:
    """Name of the tensor file that the checkpoint at ``path`` refers to; None without a checkpoint."""
    try:
        return _read_header(path)["tensors"]["file"]
    except CheckpointError:
        return None


def _is_tensor_name(path: Path, name: Any) -> bool:
    """Whether a save to ``path`` could have made a tensor file called ``name``."""
    return isinstance(name, str) and bool(re.fullmatch(re.escape(path.stem) + r"-[0-9a-f]{16}\.safetensors", name))


def _remove_tensors(path: Path, current: str | None) -> None:
    """Remove what earlier saves to ``path`` left: tensor files other than ``current``, unfinished temporary files."""
    for file in path.parent.glob(f"*{glob.escape(path.stem)}*"):
        target = temporary_target(file.name) or file.name
        unfinished = target != file.name and target == path.name
        if file.name != current and (unfinished or _is_tensor_name(path, target)):
            with contextlib.suppress(OSError):
                file.unlink()


def _check_saveable(path: Path, arrays: dict[str, Array]) -> None:
    """Raise for an array that could not be read again; the message names it."""
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"{path}: names of arrays should be strings, got {name!r}")
        if name == "__metadata__":
            raise ValueError(
                f"{path}: no array can be called '__metadata__', which the file format reserves: rename it"
            )
        if array.dtype.name not in DTYPES.values():
            raise DtypeError(
                f"{path}: array {name!r} should be of one of the dtypes {', '.join(DTYPES.values())}, got "
                f"{array.dtype}: convert it"
            )


def check_finite(path: Path, arrays: dict[str, Array], infinite: Iterable[str]) -> None:
    """Raise CheckpointError for NaN or infinity, other than +inf in the arrays named in ``infinite``."""
    for name, array in arrays.items():
        if not is_float(array.dtype):
            continue
        legal = np.isfinite(array)
        if name in infinite:
            legal |= np.isposinf(array)
        if not legal.all():
            raise CheckpointError(f"{path}: array {name!r} holds values that are not finite")


def document_digest(document: Any) -> str | None:
    """SHA-256 of a JSON-ready document, independent of the order of its keys; None for one that is not JSON-ready."""
    try:
        return _sha256(_canonical(document).encode())
    except (ValueError, RecursionError, UnicodeEncodeError):
        return None


def _canonical(document: Any) -> str:
    """A document as JSON with sorted keys."""
    return json.dumps(document, sort_keys=True, allow_nan=False)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
