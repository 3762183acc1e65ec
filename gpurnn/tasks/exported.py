"""What a file of an exported model says of the run that it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import run_folder
from ..checkpoint import checkpoint_document
from .trained import read_run

PROGRESS = {"epoch": 0, "step": 0, "seconds": 0, "best": None}  # what ``gpurnn info`` tells of a checkpoint; the least


def run_document(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Task, settings, facts, data and files of a trained run, and how far it is trained; JSON-ready."""
    _, config = read_run(folder)
    document = {name: config[name] for name in ("task", "settings", "data", "facts")}
    document["files"] = [Path(file).name for file in config["files"]]  # their places are nobody else's business
    found = (Path(folder, name) for name in reversed(run_folder.CHECKPOINTS))
    checkpoint = checkpoint_document(next(path for path in found if path.exists()))
    return document | {"progress": {name: checkpoint.get(name) for name in PROGRESS}}
