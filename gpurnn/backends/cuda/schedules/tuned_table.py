"""The table of ``gpurnn tune`` on disk: times measured on this machine, which replace the estimates."""

import hashlib
import logging
import os
from pathlib import Path

from ....errors import FileError
from ....files import cache_folder, make_folder, one_line, read_json, write_json_atomic

_FORMAT = 1
_log = logging.getLogger("gpurnn")


class Table:
    """Measured times.

    ``entries`` maps (device, cell, H, batch, directions, dtype, tf32, backward) to {candidate: (seconds per timestep,
    seconds before the first)}. The batch is rounded up to a power of two. ``estimates`` has what the cost model said of
    the same candidates when they were measured; tables of older versions lack it.
    """

    def __init__(self, entries=(), estimates=()):
        self.entries, self.estimates = dict(entries), dict(estimates)

    def __or__(self, other):
        """Both tables; ``other`` wins."""
        return Table(self.entries | other.entries, self.estimates | other.estimates)

    def known(self, problem, device):
        """{``Candidate.key``: (seconds, before)} of a ``schedules.Problem``, empty where nothing was measured."""
        return self.entries.get(key(problem, device), {})


def key(problem, device):
    """The key of a problem in ``Table.entries``."""
    return (
        device.name,
        known_as(problem.cell),
        problem.H,
        bucket(problem.B),
        problem.directions,
        problem.dtype,
        problem.tf32,
        problem.backward,
    )


def known_as(cell):
    """What a cell is called in the table: its name, and where it was generated a hash of its equations."""
    if cell.struct is None:
        return cell.name
    return f"{cell.name} {hashlib.sha256(cell.struct.encode()).hexdigest()[:12]}"


def bucket(B):
    """A batch size rounded up to a power of two."""
    return 1 << max(B - 1, 0).bit_length()


# ---- on disk


def path():
    """The path of the table: ``GPURNN_TUNED``, else ``gpurnn/tuned.json`` in the user's cache folder."""
    if os.environ.get("GPURNN_TUNED"):
        return Path(os.environ["GPURNN_TUNED"])
    return cache_folder() / "tuned.json"


def read():
    """The ``Table`` on disk; an empty one where there is none, or with a warning where it cannot be read."""
    try:
        document = read_json(path(), own=True)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, expected {_FORMAT}")
        return Table(*(_times(document["entries"], field) for field in ("ways", "estimates")))
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is not used, schedules are estimated: %s", path(), one_line(error))
        return Table()


def _times(entries, field):
    """Key -> {candidate: (seconds, before)} of the entries that have this field; the times measured must be there."""
    return {
        tuple(entry["work"]): {candidate: (float(a), float(b)) for candidate, (a, b) in entry[field].items()}
        for entry in entries
        if field == "ways" or field in entry
    }


def check_file():
    """Raise FileError where the file at ``path()`` is not a table: it is neither replaced nor removed."""
    if path().exists() and not {"format", "entries"} <= set(_document() or ()):
        raise FileError(f"{path()} is not a table of gpurnn tune, and stays: move it away, or set GPURNN_TUNED")


def _document():
    """The JSON at ``path()``, or None where it cannot be read."""
    try:
        return read_json(path(), own=True)
    except (OSError, ValueError):
        return None


def write(table):
    """Put the table on disk, whole or not at all."""
    make_folder(path().parent)
    entries = [
        {"work": list(problem), "ways": candidates, "estimates": table.estimates.get(problem, {})}
        for problem, candidates in table.entries.items()
    ]
    write_json_atomic(path(), {"format": _FORMAT, "entries": entries})
