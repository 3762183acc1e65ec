"""A trained model as the start of another run: its settings, its facts and its weights, on other data."""

from dataclasses import dataclass, fields
from pathlib import Path

from .. import run_folder
from ..checkpoint import CheckpointError
from ..errors import one_line
from ..files import read_bytes
from ..train import load_weights
from .task import checksum
from .trained import read_run


@dataclass
class Start:
    """A run's model, which another run starts from; made by ``read_start``.

    folder: of that run. settings, facts: its own. crc32: of the checkpoint whose weights are taken.
    """

    folder: Path
    settings: object
    facts: dict
    crc32: int

    def document(self):
        """What ``config.json`` of the new run records about it."""
        return {"run": str(self.folder), "crc32": self.crc32}

    def check_settings(self, settings):
        """Raise ValueError where a setting of the model differs: its weights and facts are already made.

        A value that was found in the data, such as the column that is forecast, may be given if it is the same.
        """
        for f in fields(settings):
            old, new = getattr(self.settings, f.name), getattr(settings, f.name)
            found = self.facts.get(f.name, old)
            if f.metadata.get("of_model") and new not in (old, found):
                expected = found if old is None else old
                raise ValueError(
                    f"{f.name}: expected {expected!r}, as the model of {self.folder} has, got {new!r}: leave it out, "
                    "or train a new model"
                )

    def give_weights(self, model, settings):
        """Load the weights into a model that was built by ``settings``. Raises ValueError where they do not fit it."""
        try:
            load_weights(model, self.folder)
        except CheckpointError as error:
            changed = [
                f"{f.name}={getattr(self.settings, f.name)!r}"
                for f in fields(settings)
                if getattr(settings, f.name) != getattr(self.settings, f.name)
            ]
            if not changed:
                raise
            raise ValueError(
                f"the model of {self.folder} was built with {', '.join(changed)}: leave out what decides its size "
                f"({one_line(error).partition(': ')[2]})"
            ) from error


def read_start(start, task, folder=None):
    """The ``Start`` that the run in the folder ``start`` is for a run of ``task`` in ``folder``.

    Raises FileNotFoundError where there is no trained model, ValueError for a run of another task or ``folder`` itself,
    CheckpointError for a damaged run.
    """
    start = Path(start).resolve()
    if folder is not None and start == Path(folder).resolve():
        raise ValueError(f"start: {start} is the folder of the new run itself: give that another folder, or resume it")
    settings, document = read_run(start, task)
    found = next((start / name for name in reversed(run_folder.CHECKPOINTS) if (start / name).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{start} holds no checkpoint yet: train it to the end of an epoch first")
    return Start(start, settings, document["facts"], checksum(read_bytes(found, own=True)))


def start_again(saved, task):
    """The ``Start`` of a run that was begun from another one and stopped before its first checkpoint.

    saved: what its ``config.json`` says of it. Raises ValueError where the other run has changed since.
    """
    start = read_start(saved["run"], task)
    if start.crc32 != saved["crc32"]:
        raise ValueError(f"{start.folder} was trained on since this run began from it: begin it anew")
    return start
