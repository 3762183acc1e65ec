"""The safetensors format: the header of a file, checked before anything is read, and one array at a time.

A file is 8 bytes, which say how long the header is, the header in JSON, name -> {"dtype", "shape", "data_offsets"}, and
the numbers of all arrays. It holds no code. Under ``__metadata__`` there may be texts by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._typing import Array
from .dtypes import check_dtype
from .errors import DtypeError, FileError
from .files import JSON_FACTOR, check_room, file_size, one_line, parse_json

DTYPES = {  # name of a dtype in safetensors -> in NumPy
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip
_METADATA = "__metadata__"


class Entry(NamedTuple):
    """What a header says of an array. start, stop: of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(
    file: Any, place: Path, error: type[FileError] = FileError, *, own: bool = False
) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, name -> ``Entry``) of an open file. Raises ``error`` unless the arrays fill the file exactly.

    own: as of ``check_room``.
    """
    size = file_size(file)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise error(f"{place}: is not a safetensors file, or is cut off: it has {size} bytes")
    check_room(place, JSON_FACTOR * length, "its header", own=own)
    header = parse_json(file.read(length), place, error)
    try:
        metadata = header.pop(_METADATA, {})
        entries = {name: _entry(found, 8 + length) for name, found in header.items()}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError(f"{_METADATA} should be texts by name")
    except (ValueError, TypeError, LookupError, AttributeError) as cause:
        raise error(f"{place}: is not a safetensors file: {one_line(cause)}") from cause
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda one: one[1][2:]):
        if entry.start != end:
            raise error(f"{place}: is damaged: array {name!r} does not begin where the one before it ends")
        end = entry.stop
    if end != size:
        raise error(f"{place}: is damaged: {size} bytes, its header says {end}")
    return metadata, entries


def _entry(found, start):
    dtype, shape, (first, last) = found["dtype"], found["shape"], found["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError("sizes should be whole numbers of at least 0")
    if dtype not in DTYPES:
        raise ValueError(f"the dtype {dtype!r} should be one of {', '.join(DTYPES)}")
    if last - first != math.prod(shape) * _itemsize(dtype):
        raise ValueError(f"an array {tuple(shape)} of {dtype} should not have {last - first} bytes")
    return Entry(dtype, tuple(shape), start + first, start + last)


def _itemsize(dtype):
    return 2 if dtype == "BF16" else np.dtype(DTYPES[dtype]).itemsize


def to_bytes(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A file of C-contiguous arrays; the same bytes each time, which safetensors' own writer does not promise."""
    names = {numpy: name for name, numpy in DTYPES.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that each begins at a multiple of it
    header, end = {_METADATA: dict(metadata)}, 0
    for name in order:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype.name], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(arrays[name].tobytes() for name in order)])


def read_array(file: Any, name: str, entry: Entry, place: Path, error: type[FileError] = FileError) -> Array:
    """One array of an open file. Raises ``error`` where the file has become shorter, or this machine lacks bfloat16."""
    file.seek(entry.start)
    data = file.read(entry.stop - entry.start)
    if len(data) != entry.stop - entry.start:
        raise error(f"{place}: changed while it was read")
    return array_of(name, {"dtype": entry.dtype, "shape": entry.shape, "data": data}, place, error)


def array_of(name: str, entry: dict[str, Any], place: Path, error: type[FileError] = FileError) -> Array:
    """The array ``name`` from its entry in a safetensors file: dtype, shape and bytes."""
    if entry["dtype"] not in DTYPES:
        raise error(f"{place}: array {name!r} is of the dtype {entry['dtype']}; expected one of {', '.join(DTYPES)}")
    try:
        dtype = np.dtype(DTYPES[entry["dtype"]]) if entry["dtype"] != "BF16" else check_dtype("bfloat16")
    except DtypeError as cause:
        raise error(f"{place}: array {name!r} cannot be read: {cause}") from cause
    return np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
