"""A user's cell by name, ``module:name`` or ``folder/file.py:name``, for ``gpurnn check --cell``."""

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from ..cells import TracedCell
from ..errors import one_line


def is_own_cell(text):
    """Whether the text names a user's cell, or what one is in; none of ours has a dot or a slash."""
    return any(sign in text for sign in (":", ".", "/", os.sep))


def differences_say_nothing(cell):
    """Whether its gradient differs from that of its equations on purpose."""
    return any(node.op in ("clip_gradient", "stop_gradient") for node in cell.graph.nodes)


def load_cell(text):
    """The cell that ``module:name`` or ``file.py:name`` names; the module runs.

    Raises ValueError, which says what is missing, or in which line of the user's file an error is.
    """
    if ":" not in text:
        raise ValueError(_without_colon(text))
    source, _, name = text.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(f"cells: expected module:name or file.py:name, got {text!r}")
    module = _module(source)
    found = getattr(module, name, None)
    if isinstance(found, TracedCell):
        return found
    others = _cells_in(module)
    if not hasattr(module, name):
        raise ValueError(f"cells: {source} has no {name!r}; cells in it: {others}")
    put = ": put @gpurnn.cell(gates=...) before the function" if callable(found) else ""
    raise ValueError(
        f"cells: {name} of {source} is no cell but of type {type(found).__name__}{put}; cells in it: {others}"
    )


def _without_colon(text):
    """What to write in place of a file alone, or of module.name."""
    if text.endswith(".py") or "/" in text or os.sep in text:
        return f"cells: write {text}:NAME; cells in it: {_cells_in(_module(text))}"
    source, _, name = text.rpartition(".")
    cells = _cells_in(_module(source))
    return f"cells: write {source}:{name if name in cells.split(', ') else 'NAME'}; cells in it: {cells}"


def _cells_in(module):
    """The names of a module's cells, for a message."""
    return ", ".join(name for name, value in vars(module).items() if isinstance(value, TracedCell)) or "none"


def _module(source):
    return _module_of_file(source) if source.endswith(".py") or os.sep in source else _module_by_name(source)


def _module_by_name(name):
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as python -m does
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(f"cells: there is no module {error.name!r} here, nor is one installed: {error}") from error
        raise _in_line(error, name) from error
    except Exception as error:
        raise _in_line(error, name) from error


def _module_of_file(path):
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"cells: there is no file {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for what the file imports
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pickle looks for the cell
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise _in_line(error, str(path)) from error
    return module


def _in_line(error, source):
    """A ValueError with the line of the user's file that ``error`` comes from."""
    package = str(Path(__file__).resolve().parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith((package, "<")) and _is_code(frame)]
    where = source
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}, line {error.lineno}"
    elif theirs:
        where = f"{theirs[-1].filename}, line {theirs[-1].lineno}"
    return ValueError(f"cells: {where}: {type(error).__name__}: {one_line(error)}")


def _is_code(frame):
    """Whether it is not Python's import machinery."""
    return "importlib" not in Path(frame.filename).parts
