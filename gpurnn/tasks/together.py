"""A run that several processes train: process 0 prepares it in its folder, the others build the same in memory."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from ..files import naming
from ..train.parallel import Group
from ..train.parallel.start import check_same
from . import get_task
from .run import Run
from .trained import as_json


def prepare_together(group: Group, prepare: Callable[[], Run]) -> Run:
    """The ``Run`` that ``prepare()`` makes on process 0, on all processes, to be trained by all of them.

    The others read the files anew, which must lie at the same paths there, and take the settings and facts of process
    0; they write nothing. What ``prepare`` raises is raised on all. Raises ValueError, on all, where the data differ.
    """
    if group.size == 1:
        return prepare()
    what = "the preparation of the run"
    run = group.first(prepare, what)
    document = group.send(run and run.document | {"resume": run.resume, "folder": str(run.folder)}, what)
    if run is None:
        run = _follower(document)
    run.group = group
    check_same(group, {"the data": lambda: as_json(run.data.fingerprint)})
    return run


def _follower(document):
    """The run of a process that is not the first."""
    task = get_task(document["task"])
    settings, files = task.Settings(**document["settings"]), document["files"]
    with tempfile.TemporaryDirectory(prefix="gpurnn-", ignore_cleanup_errors=True) as scratch, naming(files):
        data = task.read(files, settings, document["facts"], Path(scratch))
    model = task.build(settings, document["facts"], document["backend"])
    return Run(Path(document["folder"]), task, settings, files, data, model, document, document["resume"])
