"""Compiled kernels on disk, so that a process does not compile what an earlier one has: ``gpurnn warmup`` fills it.

One folder for each kernel, named by a hash of all that decides its machine code: source, options, architecture,
NVRTC's version. It appears whole or not at all; one that does not hold what was written is compiled anew.
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

from . import _nvrtc
from .files import read_bytes, read_json

_REPORT = ("-Xptxas", "-v")  # the log tells what does not fit into registers


def folder():
    """Where compiled kernels are kept: in ``GPURNN_CACHE``, by default ``gpurnn`` in the user's cache folder."""
    chosen = os.environ.get("GPURNN_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpurnn"
    return (Path(chosen) if chosen else home) / "kernels"


def find(source, expression, arch, file="kernel.cu"):
    """``(path, name, spilled)`` of a kernel, compiled where that is needed.

    path: the file of its machine code; name: its name there; spilled: bytes of registers that a thread keeps in memory.

    source: the whole text. expression: the kernel, such as ``step_forward<LstmCell, float>``. arch: compute capability.
    Raises ``_nvrtc.CompileError``, and OSError where NVRTC is missing.
    """
    options = (*_nvrtc.OPTIONS, _nvrtc.target(arch), *_REPORT, *_nvrtc.include_options())
    key = hashlib.sha256(repr((_nvrtc.version(), options, source, expression)).encode()).hexdigest()
    place = folder() / key[:40]
    about = _about(place)
    if about is None:
        program = _nvrtc.compile(source, options, (expression,), file)
        code = program.cubin or program.ptx.encode()
        spilled = sum(map(int, re.findall(r"(\d+) bytes stack frame", program.log)))
        about = {"name": program.lowered[expression], "spilled": spilled, "sha256": hashlib.sha256(code).hexdigest()}
        place = _store(place, about, code)
    return place / "kernel.cubin", about["name"], about["spilled"]


def _about(place):
    """What is known of the kernel in a folder of the cache, or None where the folder is missing or damaged."""
    try:
        about = read_json(place / "about.json", own=True)
        whole = about["sha256"] == hashlib.sha256(read_bytes(place / "kernel.cubin", own=True)).hexdigest()
        return about if whole and isinstance(about["name"], str) and isinstance(about["spilled"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(place, about, code):
    """Write a kernel's folder and return where it is: ``place``, or one of this process where that is impossible."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = Path(tempfile.mkdtemp(dir=place.parent))
    except OSError:  # a cache that cannot be written: the code is needed all the same
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
