"""Compiled kernels on disk, so that no process compiles what an earlier one has compiled. ``gpurnn warmup`` fills it.

Each kernel has a folder, named by a hash of everything that decides its machine code: source, options, architecture,
NVRTC's version. A folder appears whole or not at all. A kernel whose folder is damaged is compiled again.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from ...files import cache_folder, read_bytes, read_json
from . import nvrtc

_REPORT = ("-Xptxas", "-v")  # the log then says what is spilled


def folder():
    """The folder of compiled kernels: in ``GPURNN_CACHE``, by default in ``gpurnn`` in the user's cache folder."""
    chosen = os.environ.get("GPURNN_CACHE")
    return (Path(chosen) if chosen else cache_folder()) / "kernels"


def find(source, expression, arch, file="kernel.cu"):
    """Find a kernel's machine code, and compile it where it is missing.

    source: the whole text. expression: the kernel, such as ``step_forward<lstm, float>``. arch: compute capability,
    90 for 9.0. file: the name that messages show.

    Returns ``(path, name, spilled)``: the file of the machine code, the kernel's name in it, and bytes per thread that
    are spilled to memory. Raises ``nvrtc.CompileError``, and OSError where NVRTC is missing.
    """
    options = (*nvrtc.OPTIONS, nvrtc.target(arch), *_REPORT, *nvrtc.include_options())
    key = hashlib.sha256(repr((nvrtc.version(), options, source, expression)).encode()).hexdigest()
    place = folder() / key[:40]
    about = _about(place)
    if about is None:
        program = nvrtc.compile(source, options, (expression,), file)
        code = program.cubin or program.ptx.encode()
        spilled = sum(map(int, re.findall(r"(\d+) bytes stack frame", program.log)))
        about = {"name": program.lowered[expression], "spilled": spilled, "sha256": hashlib.sha256(code).hexdigest()}
        place = _store(place, about, code)
    return place / "kernel.cubin", about["name"], about["spilled"]


def _about(place):
    """The dictionary in a kernel's folder, or None where the folder is missing or damaged."""
    try:
        about = read_json(place / "about.json", own=True)
        whole = about["sha256"] == hashlib.sha256(read_bytes(place / "kernel.cubin", own=True)).hexdigest()
        return about if whole and isinstance(about["name"], str) and isinstance(about["spilled"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(place, about, code):
    """Write a kernel's folder and return its path: ``place``, or a temporary one where ``place`` cannot be written."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = Path(tempfile.mkdtemp(dir=place.parent))
    except OSError:  # the cache cannot be written, but the code is needed
        new = place = Path(tempfile.mkdtemp(prefix="gpurnn-kernel-"))
        atexit.register(shutil.rmtree, new, ignore_errors=True)
    (new / "kernel.cubin").write_bytes(code)
    (new / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if new == place:
        return place
    try:
        new.rename(place)
    except OSError:  # another process was faster, or a damaged folder is in the way
        if _about(place) is None:
            with contextlib.suppress(OSError):
                shutil.rmtree(place)
                new.rename(place)
        if new.exists() and _about(place) is None:
            return new
        shutil.rmtree(new, ignore_errors=True)
    return place
