"""Tasks: what people do with recurrent networks, each a module with a ``TASK`` and the verbs it adds to ``gpurnn``.

The table names them without importing them. run.py is what they share: settings, and the life of a run's folder.
"""

import importlib

TASKS = {  # task, which is the module's name too -> the verbs of its trained models, besides evaluate and plot
    "text": ("sample",),
    "classify": ("classify",),
    "longrange": (),
    "speech": ("transcribe",),
    "translate": ("translate",),
    "music": ("compose",),
    "series": ("forecast",),
}


def get_task(name):
    """The ``Task`` of this name. Raises ValueError for one that there is not."""
    from ..errors import check_choice

    return importlib.import_module(f".{check_choice('task', name, TASKS)}", __name__).TASK
