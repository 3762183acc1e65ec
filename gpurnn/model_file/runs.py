"""The model of a run as a model file: ``gpurnn export RUN weights.safetensors``."""

from __future__ import annotations

import os
from pathlib import Path

from ..tasks.exported import run_document
from ..tasks.trained import load
from .file import write


def export_run(folder: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write the model of a run, and what the run says of itself, to a model file; no moments of an optimizer.

    Raises what ``gpurnn.tasks.run.load`` and ``gpurnn.save`` raise.
    """
    write(load(folder, "numpy").model, Path(path), run_document(folder))
