"""The C++ compiler of this machine, which makes the time loops of traced cells: where it is, and its options.

It is ``CXX``, else c++, g++ or clang++.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys

from ...errors import one_line

# Those of gpurnn._native in pyproject.toml, and what makes a shared library. -ffp-contract=fast is what GCC does by
# itself: with it Clang makes of a cell what it made of the library's.
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fwrapv",
    "-Wno-psabi",
    "-w",
    "-shared",
)
_SETS = (
    (),
    ("-mavx2", "-mfma", "-mf16c"),
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
)  # of each level
_FROM_TEXT = ("-x", "c++", "-")  # the source is standard input
_PATIENCE = 300  # seconds for one compilation, on a machine that is busy


class CompilerError(Exception):
    """Why nothing can be compiled."""


def find():
    """``(command, what it says of itself)``. Raises CompilerError where there is none, or it is switched off."""
    if os.environ.get("GPURNN_CPU_CELLS", "1").strip().lower() in ("0", "false", "no", "off"):
        raise CompilerError("GPURNN_CPU_CELLS switches it off")
    named = os.environ.get("CXX", "").strip()
    for command in [_words(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path and not _is_offer(path):
            return _described((path, *command[1:]), os.stat(path).st_mtime_ns)
    problem = f"CXX names {named}, which is not there" if named else "no C++ compiler was found"
    raise CompilerError(f"{problem}: install one, such as {_usual()}, or set CXX")


def library_suffix():
    """What the name of a shared library ends with on this system."""
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def options(version, level):
    """The compiler's options. version: what it says of itself. On other processors than x86-64 there is one level."""
    return (*_SETS[level], *_FLAGS, *_of_system(version), *_FROM_TEXT)


def run(command, text=b""):
    """Run the compiler. Raises CompilerError where it fails, with the first line that says why."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=_PATIENCE, check=False)
    except OSError as error:
        raise CompilerError(f"{command[0]} failed: {one_line(error)}") from error
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} took more than {_PATIENCE} s") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines() or [f"exit code {done.returncode}"]
        what = next((line for line in lines if "error" in line), lines[-1])
        raise CompilerError(f"{command[0]} failed: {one_line(what)}")
    return done


def _words(text):
    """A command as a list. A path of Windows has backslashes, and may have spaces: then it is the whole text."""
    if sys.platform != "win32":
        return shlex.split(text)
    return [text] if shutil.which(text) else [word.strip('"') for word in shlex.split(text, posix=False)]


def _is_offer(path):
    """Whether a program of macOS only opens a window that offers to install the compiler."""
    if sys.platform != "darwin" or not path.startswith("/usr/bin/"):
        return False
    try:
        return subprocess.run(["/usr/bin/xcode-select", "-p"], capture_output=True, check=False).returncode != 0
    except OSError:
        return True


def _usual():
    return {"darwin": "that of 'xcode-select --install'", "win32": "g++ of MSYS2"}.get(sys.platform, "g++")


def _of_system(version):
    """Options that systems differ in."""
    if sys.platform != "win32":
        return "-pthread", "-fPIC"
    # Python does not search the folders of PATH for the compiler's own libraries
    if b"clang" in version:
        return ("-static",)
    # GCC aligns the stack to 16 bytes there, and uses instructions for AVX that need 32
    return "-static", "-pthread", "-Wa,-muse-unaligned-vector-move"


@functools.cache
def _described(command, changed):
    """``(command, version)``. changed: when the compiler's file was, as an update may bring another version."""
    return command, run((*command, "--version")).stdout
