"""How much memory one file may take."""

import math
import os
import re

from ..errors import FileError, one_line, show_size

MAX_MEMORY = 512 << 20  # bytes that one file may take in memory, where nobody says otherwise
_ABSURD = 1 << 44  # bytes that no machine has: who asks for more has no right file
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

_chosen = None  # what ``--max-memory`` says


def parse_size(text, name="max_memory"):
    """The number of bytes in "800M", "2G" or "123456"; infinity for 0. Raises a ValueError that names ``name``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip().upper().replace("IB", "B"))
    size = float(found[1]) * _UNITS[found[2]] if found else math.inf
    if size == math.inf:  # no number, or one that no float holds
        got = one_line(repr(text), 60)
        raise ValueError(f"{name} should be a number of bytes such as 800M or 4G, or 0 for no limit, got {got}")
    return int(size) if size else math.inf


def max_memory():
    """Bytes that one file may take in memory: of ``set_max_memory``, else ``GPURNN_MAX_MEMORY``, else 512 MiB.

    Raises ValueError for a ``GPURNN_MAX_MEMORY`` that is no size.
    """
    if _chosen is not None:
        return _chosen
    return parse_size(os.environ.get("GPURNN_MAX_MEMORY") or MAX_MEMORY, "GPURNN_MAX_MEMORY")


def set_max_memory(size):
    """Set that limit for this process: bytes, or text such as "4G". 0 means no limit, None the default."""
    global _chosen
    _chosen = None if size is None else parse_size(size)


def check_room(path, needed, what="it", *, own=False):
    """Raise FileError where ``what`` is in the file would take more memory than one file may, ``needed`` bytes.

    own: whether gpurnn wrote the file for itself. A limit that is set for data can raise that of such a file, and
    cannot lower it.
    """
    limit = max(max_memory(), MAX_MEMORY) if own else max_memory()
    if needed > limit:
        text = f"{path}: {what} would take {show_size(int(needed))} of memory, the limit is {show_size(limit)}"
        if needed < _ABSURD:
            wanted = f"{-(-int(needed) >> 30)}G"
            text += f". If the file is right, allow more: --max-memory {wanted}, or GPURNN_MAX_MEMORY={wanted}"
        raise FileError(text)
