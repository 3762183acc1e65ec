"""Tasks: what people do with recurrent networks. Each is a module with a ``TASK``.

The table names them without importing them. run.py is what they share: settings, and the life of a run's folder.
"""

import importlib

TASKS = ("text", "classify", "longrange", "speech", "translate", "music", "series")  # also the names of their modules


def get_task(name):
    """The ``Task`` of this name. Raises ValueError for an unknown name."""
    from ..errors import check_choice

    return importlib.import_module(f".{check_choice('task', name, TASKS)}", __name__).TASK
