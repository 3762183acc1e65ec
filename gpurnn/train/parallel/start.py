"""The start of a training by several processes: all have the same code, data and settings, and the same weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...data import Batch
from .group import Group

_PACKAGE = Path(__file__).resolve().parents[2]


def check_same(group: Group, about: dict[str, Callable[[], Any]]) -> None:
    """Raise ValueError, on all processes, unless each entry has the same value on all.

    about: what it is -> a function that returns it, JSON-ready; small values are shown in the message.
    """
    if group.size == 1:
        return
    mine = {name: value() for name, value in about.items()}
    each = [json.loads(data) for data in group.gather(json.dumps(mine, sort_keys=True, default=str).encode())]
    mine = json.loads(json.dumps(mine, default=str))
    for name in mine:
        odd = [rank for rank, one in enumerate(each) if one.get(name) != each[0][name]]
        if odd:
            ranks, first, other = ", ".join(map(str, odd)), each[0][name], each[odd[0]].get(name)
            raise ValueError(
                f"group: {name} must be the same on all processes, and differs on {ranks} (of {group.size}) from "
                f"process 0: {_shown(other)} there, {_shown(first)} on process 0"
            )


def _shown(value):
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:300]}..."


def code_digest() -> str:
    """A hash over the version of Python and NumPy, and all files of the package that decide what is computed."""
    digest = hashlib.sha256(f"{sys.version_info[:3]} {importlib.metadata.version('numpy')}".encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        if "docs" not in path.parts:
            digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_digest(batches: Any) -> Any:
    """The number of batches, and a hash over the first one; None for what cannot be asked for a batch twice."""
    if batches is None or not batches.numbered:
        return None
    return [batches.count, batch_digest(next(iter(batches.read(0, 0))))]


def batch_digest(batch: Batch) -> int:
    """CRC-32 over the arrays of a batch."""
    value = 0
    for array in _arrays(batch.inputs, batch.targets, batch.lengths, batch.reset, batch.mask):
        value = zlib.crc32(f"{array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes(), value)
    return value


def _arrays(*things):
    for one in things:
        if isinstance(one, dict):
            one = list(one.values())
        if isinstance(one, (tuple, list)):
            yield from _arrays(*one)
        elif hasattr(one, "get") and hasattr(one, "device") and not isinstance(one, np.ndarray):
            yield one.get()  # of CuPy
        elif one is not None:
            yield np.asarray(one)
