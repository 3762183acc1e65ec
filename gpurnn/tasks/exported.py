"""What a file of an exported model says of the run that it comes from, and a run made of such a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import run_folder
from ..checkpoint import checkpoint_document, save_checkpoint
from ..errors import FileError, check_number, one_line
from ..files import make_folder
from ..folder_lock import locked
from . import get_task
from .seen import check_trained_on
from .task import check_strings
from .trained import read_run, write_config

PROGRESS = {"epoch": 0, "step": 0, "seconds": 0, "best": None}  # what ``gpurnn info`` tells of a checkpoint; the least


def run_document(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Task, settings, facts, data and files of a trained run, and how far it is trained; JSON-ready."""
    _, config = read_run(folder)
    document = {name: config[name] for name in ("task", "settings", "data", "facts")}
    document["files"] = [Path(file).name for file in config["files"]]  # their places are nobody else's business
    found = (Path(folder, name) for name in reversed(run_folder.CHECKPOINTS))
    checkpoint = checkpoint_document(next(path for path in found if path.exists()))
    return document | {"progress": {name: checkpoint.get(name) for name in PROGRESS}}


def refuse_taken(folder: Path) -> None:
    """Raise ValueError where a folder holds a run already."""
    if run_folder.taken(folder):
        raise ValueError(f"RUN: {folder} already holds a run, or files with the names of one: choose another folder")


def checked_run(run: dict[str, Any], largest: int, arrays: int, place: str) -> tuple[Any, Any, dict[str, Any]]:
    """(task, settings, document) of what a file says of its run.

    largest: the longest axis of its arrays. arrays: how many it has. place: of the file, for messages. Raises FileError
    for what is damaged, and for settings of a larger model than the file's, before anything is built.
    """
    try:
        task = get_task(run["task"])
        settings = task.Settings(**run["settings"])
        task.check_facts(settings, run["facts"])
        check_trained_on(run["facts"])
        check_strings("data and files", [run["data"]["summary"], *run["files"]])
        run["data"]["fingerprint"]
        progress = {name: check_number(name, run["progress"][name], low) for name, low in PROGRESS.items()}
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise FileError(f"{place}: what it says of its run is damaged: {one_line(error)}") from error
    wrong = [name for name, size in task.sizes(settings, run["facts"]).items() if size > largest]
    wrong += ["hidden"] * (settings.hidden > largest) + ["layers"] * (settings.layers > arrays)
    if wrong:
        raise FileError(f"{place}: {wrong[0]} of its settings is not what its weights have")
    return task, settings, run | {"progress": progress}


def write_imported(folder: Path, document: dict[str, Any], model: Any) -> None:
    """``config.json`` and the checkpoint of a run."""
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    checkpoint = document["progress"] | {"optimizer": {}, "random": model.random_state(), "data": {}}
    config = {name: document[name] for name in ("task", "settings", "data", "facts", "files")}
    make_folder(folder)
    with locked(folder):
        save_checkpoint(folder / run_folder.CHECKPOINTS[1], arrays, checkpoint)
        write_config(folder, config | {"backend": model.ops.name})
