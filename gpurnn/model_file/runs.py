"""Runs as model files, and runs of such files: ``gpurnn export`` and ``gpurnn import``."""

from __future__ import annotations

import os
from pathlib import Path

from ..backends import get_backend
from ..errors import FileError, one_line
from ..tasks.exported import checked_run, refuse_taken, run_document, write_imported
from ..tasks.trained import load
from .description import describe
from .file import read, write


def export_run(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write the model of a run, and what the run says of itself, to a model file; no moments of an optimizer.

    Raises what ``gpurnn.tasks.run.load`` and ``gpurnn.save`` raise.
    """
    write(load(folder, "numpy").model, Path(path), run_document(folder))


def import_run(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Make a run of a model file that ``export_run`` wrote.

    Raises FileError for another file, or a damaged one; ValueError where the folder holds a run already.
    """
    folder = Path(folder)
    refuse_taken(folder)
    model, run = read(Path(path), get_backend("numpy"))
    if run is None:
        raise FileError(f"{path}: holds a model and says nothing of a run: gpurnn.load(path) reads it in Python")
    state = model.state_dict()
    largest = max((size for array in state.values() for size in array.shape), default=0)
    task, settings, document = checked_run(run, largest, len(state), str(path))
    try:
        expected = task.build(settings, document["facts"], "numpy")
        same = describe(expected.eval()) == describe(model)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise FileError(f"{path}: its settings make no model: {one_line(error)}") from error
    if not same:
        raise FileError(f"{path}: its model is not that of its settings: it was changed, or made by another version")
    write_imported(folder, document, model)
