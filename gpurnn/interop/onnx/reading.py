"""An ONNX file from whoever wrote it: read within the limit of memory, checked, and nothing executed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...errors import FileError, one_line
from ...files import check_room, open_regular, read_bytes
from .library import OLDEST, onnx_library

_FACTOR = 4  # bytes of memory for a byte of a file: itself, the parsed message, its copy for the checker, the arrays
OPERATORS = ("", "ai.onnx")  # the names of the domain of ONNX's own operators


def read_model(source: Any) -> tuple[Any, str]:
    """(ModelProto, what messages call it) of a path, or of a ModelProto. Raises FileError, OSError, TypeError."""
    onnx = onnx_library()
    if isinstance(source, onnx.ModelProto):
        return checked(_copied(source), "the model", None), "the model"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a file or an onnx.ModelProto, got {type(source).__name__}")
    path, model = Path(source), onnx.ModelProto()
    data = read_bytes(path, factor=_FACTOR, what="its graph")
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf has errors of its own for each of its implementations
        raise FileError(f"{path}: is no ONNX file, or is cut short: {one_line(error)}") from error
    if not model.HasField("graph"):
        raise FileError(f"{path}: is no ONNX file: it has no graph")
    return checked(model, str(path), path.parent), str(path)


def _copied(model):
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def checked(model: Any, place: str, folder: Path | None) -> Any:
    """``model`` with its external data inside, after onnx's own checks. Raises FileError that begins with ``place``."""
    onnx = onnx_library()
    opset_of(model, place)
    if model.functions or any(graph.sparse_initializer for graph in graphs_of(model.graph)):
        what = "functions of its own" if model.functions else "sparse weights"
        raise FileError(f"{place}: it has {what}, which gpurnn does not read: write it without, by onnx's own tools")
    room = 0
    for tensor in tensors_of(model.graph):
        room += _tensor_size(tensor, place)
        check_room(place, _FACTOR * room, "its tensors")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _take_in(tensor, place, folder)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and what its C++ throws for messages that are no UTF-8
        raise FileError(f"{place}: is no valid ONNX model: {one_line(error)}") from error
    return model


def opset_of(model: Any, place: str) -> int:
    """The version of ONNX's operators that a model uses. Raises FileError for one that is not read."""
    newest = onnx_library().defs.onnx_opset_version()
    versions = [entry.version for entry in model.opset_import if entry.domain in OPERATORS]
    if len(versions) != 1 or not OLDEST <= versions[0] <= newest:
        got = ", ".join(map(str, versions)) or "none"
        raise FileError(f"{place}: expected one opset of ONNX from {OLDEST} to {newest}, got {got}")
    return versions[0]


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and all graphs in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs_of(inner)


def tensors_of(graph: Any) -> Iterator[Any]:
    """All tensors that a graph holds."""
    for inner in graphs_of(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def array_of(tensor: Any, place: str) -> np.ndarray:
    """A tensor as an array of its own. Raises FileError where it holds another number of bytes than it says."""
    onnx = onnx_library()
    _tensor_size(tensor, place)
    try:
        return np.array(onnx.numpy_helper.to_array(tensor))
    except Exception as error:
        raise FileError(f"{place}: tensor {tensor.name[:80]!r} is damaged: {one_line(error)}") from error


def _tensor_size(tensor, place):
    """Bytes of a tensor, by its dimensions. Raises FileError where they make no sense."""
    onnx = onnx_library()
    if any(size < 0 for size in tensor.dims):
        raise FileError(f"{place}: tensor {tensor.name[:80]!r} has a negative size: {list(tensor.dims)[:8]}")
    try:
        each = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{place}: tensor {tensor.name[:80]!r} is of an unknown type: {tensor.data_type}") from error
    needed = each * math.prod(tensor.dims)
    check_room(place, needed, f"its tensor {tensor.name[:80]!r}")
    return needed


def _take_in(tensor, place, folder):
    """Make the external data of a tensor its own. Raises FileError for a file that is not beside the model's."""
    onnx = onnx_library()
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location, what = facts.get("location", ""), f"{place}: tensor {tensor.name[:80]!r}: its external data"
    parts = PurePosixPath(location.replace("\\", "/"))
    if folder is None or not location or parts.is_absolute() or ".." in parts.parts or ":" in location:
        raise FileError(f"{what} should be in a file in the folder of the model, got {location[:80]!r}")
    path = Path(os.path.realpath(folder / Path(*parts.parts)))
    if not path.is_relative_to(os.path.realpath(folder)):
        raise FileError(f"{what} is outside the folder of the model: {location[:80]!r} is a link")
    needed = _tensor_size(tensor, place)
    try:
        offset, length = int(facts.get("offset", 0)), int(facts.get("length", needed))
    except ValueError as error:
        raise FileError(f"{what}: offset and length should be numbers") from error
    if offset < 0 or length != needed:
        raise FileError(f"{what}: expected {needed} bytes from an offset of at least 0, got {length} from {offset}")
    try:
        with open_regular(path) as file:
            file.seek(offset)
            data = file.read(needed)
    except (OSError, OverflowError, FileError) as error:
        raise FileError(f"{what}: {one_line(error)}") from error
    if len(data) != needed:
        raise FileError(f"{what}: {location[:80]!r} ends after {len(data)} of {needed} bytes")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.DEFAULT
    tensor.raw_data = data
