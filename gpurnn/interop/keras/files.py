"""Files of Keras 3 from whoever wrote them: read within the limit of memory, and nothing executed; and such files made.

A .keras is a zip archive of ``config.json`` and ``model.weights.h5``; a .weights.h5 is the latter alone, an HDF5 file
in which the arrays of a layer are ``layers/lstm/cell/vars/0``, ``1``, ... Keras writes plain arrays. So arrays that are
compressed, in pieces, in other files or behind links are refused, and no array is larger than its file.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FileError, one_line
from ...files import JSON_FACTOR, check_room, file_size, open_regular, parse_json, read_bytes, write_bytes_atomic
from .library import OLDEST, h5py_library

_BYTES = 2  # bytes of memory for a byte of a file of arrays: itself, and what it is unpacked from
_NUMBER = 24  # bytes of memory for a number of 4 bytes: in the file, read, in a layer with its gradient, in a model's
_DRAWN = 44  # bytes for a number of the largest array: a layer first draws initial values for it
_ENTRY = 16  # bytes of memory for a byte of a zip archive's list of entries
_TAIL = (1 << 16) + 22  # bytes in which that list's place and size stand, at the end of a zip archive
_ENCRYPTED = 1  # of a zip entry's flags
_VERSION = "3.0.0"  # the oldest Keras that reads what is written here
_WRITTEN = (1980, 1, 1, 0, 0, 0)  # the date in archives: equal models make equal files
_CONFIG, _METADATA, _WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

Path_ = tuple[str, ...]  # the place of a layer in a model: ("layers", "lstm", "cell")


def snake_case(name: str) -> str:
    """``simple_rnn`` of ``SimpleRNN``, as Keras names the places of layers in its files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def place_names(classes: Sequence[str]) -> list[str]:
    """The names of layers of these classes that lie side by side in a file: lstm, lstm_1, ..."""
    counts: dict[str, int] = {}
    found = []
    for name in map(snake_case, classes):
        counts[name] = counts.get(name, -1) + 1
        found.append(f"{name}_{counts[name]}" if counts[name] else name)
    return found


# ---- reading


class H5Arrays:
    """The arrays in the bytes of an HDF5 file, by the places of their layers. place: what messages call the file."""

    def __init__(self, data: bytes, place: str) -> None:
        self._place, self._size = place, len(data)
        self._read, self._largest = 0, 0  # numbers; of 8 bytes each counts for two
        self._h5py = h5py_library()
        try:
            self._file = self._h5py.File(io.BytesIO(data), "r")
        except Exception as error:  # OSError, and others for damaged files
            raise FileError(f"{place}: is no HDF5 file, or is damaged: {one_line(error)}") from error

    def arrays(self, path: Path_) -> list[np.ndarray]:
        """The arrays of the layer at ``path``, in Keras's order; none where it has none there. Raises FileError."""
        try:
            group = self._group((*path, "vars"))
            if group is None:
                return []
            return [self._array(group, str(number), path) for number in range(len(group))]
        except FileError:
            raise
        except Exception as error:  # h5py raises errors of many kinds on damaged files
            if isinstance(error, MemoryError):
                raise
            raise FileError(f"{self._place}: {_shown(path)} is damaged: {one_line(error)}") from error

    def _group(self, path):
        group = self._file
        for part in path:
            group = self._inside(group, part, self._h5py.Group)
            if group is None:
                return None
        return group

    def _inside(self, group, name, kind):
        """What ``group`` itself holds under a name; None where it has no such name. Links to elsewhere are refused."""
        link = group.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, self._h5py.HardLink):
            raise FileError(f"{self._place}: {group.name}/{name} is a link to elsewhere, which Keras does not write")
        found = group[name]
        if not isinstance(found, kind):
            raise FileError(f"{self._place}: {group.name}/{name}: expected a {kind.__name__.lower()}")
        return found

    def _array(self, group, name, path):
        found = self._inside(group, name, self._h5py.Dataset)
        shown = f"{self._place}: {_shown(path)}: array {name}"
        if found is None:
            raise FileError(f"{shown} is missing")
        plist, dtype = found.id.get_create_plist(), found.dtype
        layouts = (self._h5py.h5d.CONTIGUOUS, self._h5py.h5d.COMPACT)
        if plist.get_layout() not in layouts or plist.get_external_count() or plist.get_nfilters():
            raise FileError(f"{shown} is compressed, in pieces or in another file, as Keras writes none")
        bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and not dtype.fields
        if not bfloat16 and (dtype.kind != "f" or dtype.itemsize not in (2, 4, 8)):
            raise FileError(f"{shown}: expected floating-point numbers, got {one_line(str(dtype), 40)}")
        count = math.prod(found.shape or (0,))
        needed = count * dtype.itemsize
        if needed > self._size:
            raise FileError(f"{shown} is said to have {needed} bytes, its file has {self._size}")
        count *= max(1, dtype.itemsize // 4)
        self._read, self._largest = self._read + count, max(self._largest, count)
        check_room(self._place, _NUMBER * self._read + _DRAWN * self._largest, "its arrays")
        array = found[()]
        if bfloat16:
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return array


def read_keras(path: Path) -> tuple[Any, H5Arrays]:
    """(config, arrays) of a .keras file. Raises FileError and OSError."""
    with open_regular(path) as file:
        _check_entries(file, path)
        try:
            with zipfile.ZipFile(file) as archive:
                metadata = parse_json(_entry(archive, _METADATA, path, JSON_FACTOR), f"{path}: {_METADATA}")
                _check_version(metadata, path)
                config = parse_json(_entry(archive, _CONFIG, path, JSON_FACTOR), f"{path}: {_CONFIG}")
                data = _entry(archive, _WEIGHTS, path, _BYTES)
        except FileError:
            raise
        except Exception as error:  # zipfile and zlib raise errors of many kinds on a damaged file
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
                raise
            raise FileError(f"{path}: is no .keras file, or is damaged: {one_line(error)}") from error
    return config, H5Arrays(data, str(path))


def _check_entries(file, path):
    """Raise FileError for a list of entries that would take too much memory: zipfile reads all of it at once."""
    size = file_size(file)
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    end = tail.rfind(b"PK\5\6")
    if 0 <= end <= len(tail) - 22:
        check_room(path, _ENTRY * int.from_bytes(tail[end + 12 : end + 16], "little"), "its list of entries")
    file.seek(0)


def _entry(archive, name, path, factor):
    """The bytes of an entry of a .keras file."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise FileError(f"{path}: is no .keras file: it has no {name}") from None
    if info.flag_bits & _ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileError(f"{path}: {name} is encrypted or compressed in a way that Keras does not write")
    check_room(path, factor * info.file_size, name)
    with archive.open(info) as member:
        data = member.read(info.file_size + 1)  # to its end, where the checksum is compared
    if len(data) != info.file_size:
        raise FileError(f"{path}: {name} has {len(data)} bytes, the archive says {info.file_size}")
    return data


def _check_version(metadata, path):
    version = metadata.get("keras_version") if isinstance(metadata, dict) else None
    major = re.match(r"\d{1,9}", version) if isinstance(version, str) else None
    if major is None or int(major[0]) < OLDEST:
        got = one_line(repr(version), 40)
        raise FileError(f"{path}: expected a file of Keras 3 or later, got one of {got}: save the model with Keras 3")


def read_weights(path: Path) -> H5Arrays:
    """The arrays of a .weights.h5 file. Raises FileError and OSError."""
    return H5Arrays(read_bytes(path, factor=_BYTES, what="its arrays"), str(path))


def _shown(path):
    return one_line("/".join(path), 80)


# ---- writing


def write_weights(path: str | os.PathLike[str], arrays: Mapping[Path_, Sequence[np.ndarray]]) -> None:
    """Write a .weights.h5 file, whole or not at all. arrays: by the places of their layers."""
    write_bytes_atomic(Path(path), _h5(arrays))


def write_keras(path: str | os.PathLike[str], config: Any, arrays: Mapping[Path_, Sequence[np.ndarray]]) -> None:
    """Write a .keras file, whole or not at all."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        metadata = {"keras_version": _VERSION, "date_saved": "1980-01-01@00:00:00"}
        for name, data in (
            (_METADATA, json.dumps(metadata)),
            (_CONFIG, json.dumps(config)),
            (_WEIGHTS, _h5(arrays)),
        ):
            archive.writestr(zipfile.ZipInfo(name, _WRITTEN), data)
    write_bytes_atomic(Path(path), target.getvalue())


def _h5(arrays):
    target = io.BytesIO()
    with h5py_library().File(target, "w") as file:
        file.create_group("vars")  # as the first versions of Keras 3 have it at every place, arrays or not
        for path, several in arrays.items():
            for end in range(2, len(path) + 1):
                file.require_group("/".join((*path[:end], "vars")))
            for number, array in enumerate(several):
                file["/".join((*path, "vars", str(number)))] = array
    return target.getvalue()
