"""Compiles the time loop of a traced cell for this processor, at the cell's first use.

The compiler is found at run time (compiler.py). What it makes lies in the folder ``cells`` of ``GPURNN_CACHE``, by
default of ``gpurnn`` in the user's cache folder, so that no process compiles what an earlier one has. A file's name has
a hash of everything that decides its content (all sources, the struct, the compiler, its options), and a hash of its
content: one that is damaged is made again. ``GPURNN_CPU_CELLS=0`` switches this off. Where nothing is compiled, the
cell is array code.

A compiled cell gives the same bits as one of kernels/cells with the same equations where both were built by the same
version of the same compiler; other compilers contract other products and sums.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...dtypes import C_NAMES
from ...errors import one_line
from ...files import cache_folder, make_folder, write_bytes_atomic
from ..sources import kernel_source
from . import compiler
from .compiler import CompilerError
from .native import ISAS, LEVELS, Pass

_PLACE = "//@ the struct\n"  # in cell.cpp
_log = logging.getLogger("gpurnn")
_lock = threading.Lock()
_known = {}  # (struct, name, dtype, level) -> its function, or the reason why there is none


class Generated(NamedTuple):
    """What a library of one cell can do, as ctypes functions. pack: as gpurnn_native_pack, without the level."""

    time_loop: Callable[..., int]
    pack: Callable[..., int]


def generated(cell, dtype, level):
    """The ``Generated`` of a cell that has a ``struct``, or None where it is array code.

    dtype: "float32" or "float64". level: index in ``LEVELS``. The first call for a cell compiles it, or loads what an
    earlier process has compiled.
    """
    key = cell.struct, cell.name, dtype, level
    found = _known.get(key)
    if found is None:
        with _lock:
            found = _known.get(key)
            if found is None:
                found = _known[key] = _first_use(cell, dtype, level)
    return None if isinstance(found, str) else found


def refusal(cell, dtype, level):
    """Why a cell is not compiled, as far as it is known without compiling it; None where nothing speaks against it."""
    if cell.array_only:
        return f"the cell {cell.name} is array code on every backend, because {cell.array_only}"
    if cell.struct is None:
        return None
    found = _known.get((cell.struct, cell.name, dtype, level))
    if found is not None:
        return found if isinstance(found, str) else None
    try:
        compiler.find()
    except CompilerError as problem:
        return f"the cell {cell.name} is not compiled: {problem}"
    return None


def _first_use(cell, dtype, level):
    """The function of a cell, or the reason why there is none, which the log tells once."""
    try:
        return _load(cell, dtype, level)
    except (CompilerError, OSError, ValueError, RuntimeError) as problem:  # no home, no folder for temporary files, ...
        reason = f"the cell {cell.name} is not compiled: {one_line(problem, 1000)}"
        _log.warning("%s. It runs as array code, which is slower", reason)
        return reason


# ---- the cache


def folder():
    """The folder of compiled cells."""
    chosen = os.environ.get("GPURNN_CACHE")
    return (Path(chosen).expanduser() if chosen else cache_folder()) / "cells"


def _load(cell, dtype, level):
    """The function of a cell, from the cache or compiled. Raises CompilerError."""
    command, version = compiler.find()
    text = f"#define CELL {cell.name}\n#define REAL {C_NAMES[dtype]}\n" + _sources().replace(_PLACE, cell.struct)
    command = (*command, *compiler.options(version, level))
    key = hashlib.sha256(repr((command, version, platform.machine(), text)).encode()).hexdigest()[:32]
    place = _usable_folder()
    suffix = compiler.library_suffix()
    stem = f"{cell.name[:40]}-{dtype}-{ISAS[level]}-{key}"
    for path in sorted(place.glob(f"{stem}-*{suffix}")) if place else ():
        function = _opened(path)
        if function:
            return function
        with contextlib.suppress(OSError):  # Windows removes no library that is loaded
            path.unlink()  # damaged: it is made again
    where = f"it is then in {place}" if place else "for this process alone"
    _log.info("compiling the cell %s for %s and %s; %s", cell.name, dtype, LEVELS[level], where)
    with tempfile.TemporaryDirectory(prefix="gpurnn-cell-", ignore_cleanup_errors=True) as temporary:
        made = Path(temporary, f"cell{suffix}")
        compiler.run((*command, "-o", str(made)), text.encode())
        code = made.read_bytes()
        path = place and _stored(place / f"{stem}-{hashlib.sha256(code).hexdigest()[:32]}{suffix}", code)
        function = (path and _opened(path)) or _function(made)  # a loaded library needs no file
    if function is None:
        raise CompilerError("what the compiler made cannot be loaded")
    return function


@functools.cache
def _sources():
    """The text of cell.cpp with all headers."""
    return kernel_source("cell.cpp")


def _usable_folder():
    """The folder of compiled cells, made where it is missing; None, with a warning, where it must not be used.

    What lies there is run. So nobody else may own it or write into it.
    """
    place = folder()
    try:
        make_folder(place.parent)
        place.mkdir(mode=0o700, exist_ok=True)
        found = os.lstat(place)
    except OSError as error:
        _log.warning("compiled cells are not stored: %s", one_line(error))
        return None
    if _only_ours(found) and stat.S_ISDIR(found.st_mode):
        return place
    _log.warning("%s is not used: somebody else owns it or may write into it", place)
    return None


def _only_ours(found):
    """Whether nobody else can write what ``os.stat`` describes. On Windows its folder is the user's own."""
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)


def _stored(path, code):
    """Write a library into the cache. Returns its path, or None where that fails."""
    try:
        write_bytes_atomic(path, code)
        path.chmod(0o600)
        return path
    except OSError as error:
        if path.is_file():  # of another process, which has loaded it: Windows then does not replace it
            return path
        _log.warning("compiled cells are not stored: %s", one_line(error))
        return None


def _opened(path):
    """The function of a library in the cache; None where it is damaged or somebody else may have written it."""
    try:
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode) or not _only_ours(found):
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest()[:32] != path.stem.rpartition("-")[2]:
            return None  # a short file would crash the process when it is loaded
    except OSError:
        return None
    return _function(path)


def _function(path):
    """The ``Generated`` of a library, or None."""
    try:
        library = ctypes.CDLL(str(path))
        if library.gpurnn_cell_bytes() != ctypes.sizeof(Pass):
            return None
        return Generated(library.gpurnn_cell_time_loop, library.gpurnn_cell_pack)
    except (OSError, AttributeError):
        return None
