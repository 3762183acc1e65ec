"""Compiled kernels on disk, so that a process does not compile what an earlier one has: ``gpurnn warmup`` fills it.

One folder for each kernel, named by a hash of all that decides its machine code: source, options, architecture,
NVRTC's version. It appears whole or not at all; one that does not hold what was written is compiled anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from . import _nvrtc


def folder():
    """Where compiled kernels are kept: in ``GPURNN_CACHE``, by default ``gpurnn`` in the user's cache folder."""
    chosen = os.environ.get("GPURNN_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpurnn"
    return (Path(chosen) if chosen else home) / "kernels"


def find(source, expression, arch, file="kernel.cu"):
    """``(path, name)``: the file with the machine code of a kernel, and the kernel's name in it; compiled where needed.

    source: the whole text. expression: the kernel, such as ``step_forward<LstmCell, float>``. arch: compute capability.
    Raises ``_nvrtc.CompileError``, and OSError where NVRTC is missing.
    """
    options = (*_nvrtc.OPTIONS, _nvrtc.target(arch), *_nvrtc.include_options())
    key = hashlib.sha256(repr((_nvrtc.version(), options, source, expression)).encode()).hexdigest()
    place = folder() / key[:40]
    name = _name(place)
    if name is None:
        program = _nvrtc.compile(source, options, (expression,), file)
        name, code = program.lowered[expression], program.cubin or program.ptx.encode()
        place = _keep(place, name, code)
    return place / "kernel.cubin", name


def _name(place):
    """The kernel's name in a folder of the cache, or None where the folder is missing or damaged."""
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        code = (place / "kernel.cubin").read_bytes()
        return about["name"] if about["sha256"] == hashlib.sha256(code).hexdigest() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(place, name, code):
    """Write a kernel's folder and return where it is: ``place``, or one of this process where that is impossible."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = Path(tempfile.mkdtemp(dir=place.parent))
    except OSError:  # a cache that cannot be written: the code is needed all the same
        new = place = Path(tempfile.mkdtemp(prefix="gpurnn-kernel-"))
    (new / "kernel.cubin").write_bytes(code)
    about = {"name": name, "sha256": hashlib.sha256(code).hexdigest()}
    (new / "about.json").write_text(json.dumps(about), encoding="utf-8")
    if new == place:
        return place
    try:
        new.rename(place)
    except OSError:  # another process was faster, or a damaged folder is in the way
        if _name(place) is None:
            with contextlib.suppress(OSError):
                shutil.rmtree(place)
                new.rename(place)
        if new.exists() and _name(place) is None:
            return new
        shutil.rmtree(new, ignore_errors=True)
    return place
