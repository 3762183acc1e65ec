"""The start of a training by several processes: all have the same code, data and settings, and the same weights."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Batch
from .group import Group, add_in_order

_PACKAGE = Path(__file__).resolve().parents[2]


def check_same(group: Group, about: dict[str, Callable[[], Any]]) -> None:
    """Raise ValueError, on all processes, unless each entry has the same value on all.

    about: what it is -> a function that returns it, JSON-ready; of a dict the message names the keys that differ.
    """
    if group.size == 1:
        return
    mine = {name: value() for name, value in about.items()}
    document = json.dumps(mine, sort_keys=True, default=str).encode()
    each = [json.loads(data) for data in group.gather(document, f"comparing {next(iter(about))}")]
    for name in mine:
        odd = [rank for rank, one in enumerate(each) if one[name] != each[0][name]]
        if odd:
            ranks = ", ".join(map(str, odd))
            raise ValueError(
                f"group: {name} must be the same on all processes. Different on {ranks} (of {group.size}) from "
                f"process 0: {'; '.join(_differences('', each[odd[0]][name], each[0][name]))}"
            )


def _differences(name, other, first):
    """What two JSON documents differ in, in words."""
    if isinstance(other, dict) and isinstance(first, dict):
        for key in sorted({*other, *first}):
            if other.get(key) != first.get(key) or (key in other) != (key in first):
                yield from _differences(f"{name}, {key}" if name else key, other.get(key), first.get(key))
    else:
        yield f"{name}{': ' * bool(name)}{_shown(other)} there, {_shown(first)} on process 0"


def _shown(value):
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}..."


def add_same(group: Group, digest: int, numbers: list[float]) -> list[float]:
    """The sums of numbers over all processes, as of a measurement on batches with this digest.

    Raises ValueError, on all, where the batches were different ones.
    """
    if group.size == 1:
        return numbers
    each = group.gather_numbers(digest, *numbers, what="the end of a measurement")
    check_batches(each[:, 0], "the batches that a measurement or a validation read")
    return [add_in_order(column) for column in each.T[1:]]


def check_batches(digests: Any, which: str) -> None:
    """Raise ValueError unless the processes, by rank, had batches with the same digest."""
    odd = np.flatnonzero(digests != digests[0])
    if odd.size:
        raise ValueError(
            f"group: the processes have different batches: {which} of process {', '.join(map(str, odd))} (of "
            f"{len(digests)}) differ from those of process 0. Read the same files in the same order on all, give a "
            "loader the same seed on all, and no part of the data: each process makes the whole batch, and fit takes "
            "its part"
        )


def code_digest() -> str:
    """A hash over the version of Python and NumPy, and all files of the package that decide what is computed."""
    digest = hashlib.sha256(f"{sys.version_info[:3]} {importlib.metadata.version('numpy')}".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        if "docs" not in path.parts:
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def function_facts(function: Any) -> Any:
    """What can be said of a function, JSON-ready: its name, and a CRC-32 of its code, constants, and values that it
    holds on to. Of a partial also what it was given."""
    if isinstance(function, functools.partial):
        given = {str(n): one for n, one in enumerate(function.args)} | function.keywords
        return {"of": function_facts(function.func), **{name: _value_facts(one) for name, one in given.items()}}
    code = getattr(function, "__func__", function)
    code = code if hasattr(code, "__code__") else type(function).__call__
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if not hasattr(code, "__code__"):
        return name
    held = [_value_facts(cell.cell_contents) for cell in code.__closure__ or () if _is_set(cell)]
    held += [_value_facts(one) for one in code.__defaults__ or ()]
    held += [_value_facts(one) for one in (code.__kwdefaults__ or {}).values()]
    return f"{name} (code {zlib.crc32(repr([_code_facts(code.__code__), held]).encode()):08x})"


def _is_set(cell):
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that has no value yet
        return False


def _code_facts(code):
    constants = [_code_facts(one) if isinstance(one, types.CodeType) else _value_facts(one) for one in code.co_consts]
    return [code.co_code.hex(), constants, code.co_names]


def _value_facts(value):
    """A number, text, array or function as something that is equal on all processes where it is; else its type."""
    if value is None or value is ... or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return list(map(_value_facts, value))
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, map(_value_facts, value)))
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _crc(value, 0)]
    if isinstance(value, types.FunctionType):
        return _code_facts(value.__code__)  # not what that one holds on to, which may be itself
    return str(type(value))


def model_facts(model: Any) -> dict[str, Any]:
    """What must be the same of a model: backend, dtype, layers and their options, parameters, frozen ones."""
    return {
        "type": type(model).__name__, "backend": model.ops.name, "dtype": str(model.dtype),
        "parameters": {name: list(array.shape) for name, array in model.params.items()},
        "frozen": model.frozen, "layers": str(model).splitlines(),
    }  # fmt: skip


def model_digest(model: Any) -> int:
    """CRC-32 over the weights and buffers of a model."""
    value = 0
    for _, array in sorted(model.state_dict().items()):
        value = _crc(array, value)
    return value


def data_facts(batches: Any) -> Any:
    """The number of batches, and shapes and a CRC-32 of the first one; None for what cannot be asked for one twice."""
    if batches is None or not batches.numbered:
        return None
    first = next(iter(batches.read(0, 0)))
    shapes = [list(np.shape(array)) for array in _arrays(first.inputs, first.targets)]
    return {
        "number of batches": batches.count, "shapes in the first batch": shapes[:8],
        "content of the first batch (CRC-32)": batch_digest(first),
    }  # fmt: skip


def batch_digest(batch: Batch, value: int = 0) -> int:
    """CRC-32 over all that a batch holds: shapes and contents of its arrays, options of the loss, weight."""
    several = batch.inputs, batch.targets, batch.lengths, batch.reset, batch.mask, batch.loss_options
    for array in _arrays(*several, batch.weight, batch.carry, batch.per_step):
        value = _crc(array, value)
    return value


def _crc(array, value):
    value = zlib.crc32(f"{array.dtype.str} {array.shape}".encode(), value)
    if array.dtype.hasobject:  # pointers: other numbers in each process
        return value
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), value)


def _is_nested(part):
    return isinstance(part, (tuple, list, dict)) or getattr(part, "ndim", 0) > 0


def _arrays(*things):
    for one in things:
        if isinstance(one, dict):
            one = list(one.values())
        if isinstance(one, (tuple, list)) and any(map(_is_nested, one)):
            yield from _arrays(*one)
        elif hasattr(one, "get") and hasattr(one, "device") and not isinstance(one, np.ndarray):
            yield one.get()  # of CuPy
        elif one is not None:
            yield np.asarray(one)
