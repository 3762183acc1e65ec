"""What the backend "cpu" is where the compiled library is missing or does not load."""

import logging
from pathlib import Path

from ...dtypes import ITEMSIZE
from ..ops import Ops
from . import native

_log = logging.getLogger("gpurnn")
_warned = set()  # what the log has said


def why_uncompiled():
    """Why there is no compiled library, what that costs, and what to do."""
    checkout = (Path(__file__).parents[3] / "pyproject.toml").is_file()
    path = native.library_path()
    problem = None if path is None else native.opened(path)[1]
    cure = "install its wheel for this platform with pip install --force-reinstall"
    if problem is not None:
        why = f"its compiled code does not load here ({problem})"
    elif checkout:
        why = "this checkout was not built"
    else:
        why = "gpurnn was installed without a C++ compiler"
        cure += ", or g++ or clang++ and then gpurnn from its sources"
    if checkout:
        cure = "run pip install -e . with a C++ compiler here"
    # Measured with T = 50 on one thread: H = 64 at B = 1, H = 256 at B = 64; inference and training.
    return f"{why}. Compiled, small layers are 5 to 8 times as fast and large ones 1.1 to 1.4 times: {cure}"


def in_16_bits(dtype):
    """What array code in 16 bits costs, to be added to a reason; an empty text for the other dtypes. dtype: a name."""
    if ITEMSIZE[dtype] > 2:
        return ""
    # Measured with LSTMs of H = 64 at B = 1 to H = 512 at B = 8 on one thread, inference and training.
    return (
        f". In {dtype} array code takes 1.1 to 2.8 times as long as in float32 and saves no memory, since it converts "
        "every array: use dtype='float32'"
    )


def warn_of_16_bits(cell, dtype):
    """Say once for a cell and dtype that it runs as array code, if that is slower than in float32."""
    if in_16_bits(dtype) and (cell.name, dtype) not in _warned:
        _warned.add((cell.name, dtype))
        _log.warning("the cell %s runs as array code%s", cell.name, in_16_bits(dtype))


class UncompiledOps(Ops):
    """Array code whose plans say what is missing."""

    def schedule(self, problem, wanted="auto"):
        return "array code", f"one timestep after another: {why_uncompiled()}{in_16_bits(problem.dtype)}"
