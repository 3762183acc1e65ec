"""A run's folder: which files belong to the run, which are somebody else's, and the records of its logs."""

import contextlib
import os
import re
from pathlib import Path

from .checkpoint import CheckpointError, is_checkpoint
from .files import is_stream, open_regular, parse_json, read_bytes, refuse_same, sweep_folder

CONFIG, HISTORY, FLOW = "config.json", "history.jsonl", "gradient_flow.jsonl"
CHECKPOINTS = ("last.json", "best.json")
PICTURES = ("history.png", "gradient_flow.png")
FILES = (CONFIG, *CHECKPOINTS, HISTORY, FLOW, *PICTURES)
_DRAWN = {"plot", "attention"}  # options that name a picture
_DRAWN_AS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")
SOFTWARE = "gpurnn"  # what pictures and tunes say of who made them
_MARKED = (b"\x89PNG", b"MThd")  # how the files begin that say it
_TENSORS = re.compile(r"(last|best)-[0-9a-f]{16}\.safetensors")
_CONFIG_KEYS = {"task", "backend", "settings", "files", "data", "facts"}
_RECORDS = {  # kind of a record of the history -> the numbers it has at least
    "step": ("step", "epoch", "loss", "lr", "grad_norm"),
    "epoch": ("step", "epoch", "train_loss", "lr", "grad_norm"),
}
_RECORD_FACTOR = 8  # bytes of memory for a byte of a log


# ---- whose files they are


def taken(folder, besides=()):
    """The files in a folder that have the name of a run's file; ``besides`` are left out."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(name for name in names if (name in FILES or _TENSORS.fullmatch(name)) and name not in besides)


def check_free(folder, error, besides=()):
    """Raise ``error`` where a run that begins in this folder would replace files."""
    found = taken(folder, besides)
    if found:
        raise error(
            f"{folder} already holds a run, or files with the names of one ({', '.join(found[:4])}): continue it with "
            "--resume, replace it with --overwrite (in Python resume=True, overwrite=True), or choose another folder"
        )


def check_ours(folder, besides=()):
    """Raise CheckpointError for a file that has the name of a run's file and was not written by a run.

    A damaged file counts as the run's where another file shows that there is one.
    """
    folder, found = Path(folder), taken(folder, besides)
    whose = {name: _is_ours(folder / name) for name in found}
    a_run = any(whose[name] for name in found if name not in PICTURES)
    foreign = [name for name in found if whose[name] is False or (whose[name] is None and not a_run)]
    if foreign:
        raise CheckpointError(
            f"{folder / foreign[0]} has the name of a run's file and is none: it is not replaced. Move it away, or "
            "choose another folder"
        )


def _is_ours(path):
    """True: gpurnn wrote the file. False: somebody else did. None: the file does not say."""
    if path.is_symlink() or not path.is_file():
        return False
    if _TENSORS.fullmatch(path.name):
        return True
    if path.name in PICTURES:
        return True if is_our_file(path) else None
    if path.name in CHECKPOINTS and is_checkpoint(path):
        return True
    try:
        if path.name in (HISTORY, FLOW):
            with open_regular(path, CheckpointError) as file:
                line = file.readline(1 << 20)
            if not line:
                return True  # of a run that was killed before it wrote
            document = parse_json(line, path, CheckpointError, finite=False)
            keys = {"kind"} if path.name == HISTORY else {"layers"}
        else:
            document = parse_json(read_bytes(path, factor=24, error=CheckpointError, own=True), path, CheckpointError)
            keys = _CONFIG_KEYS if path.name == CONFIG else {"format", "tensors"}
    except (CheckpointError, OSError):
        return None  # damaged
    return isinstance(document, dict) and keys <= set(document)


def is_our_file(path):
    """Whether gpurnn made this PNG or MIDI file, as its first bytes say. True if there is none, False for a link."""
    if os.path.islink(path):
        return False
    try:
        with open_regular(path) as file:
            begin = file.read(512)
        return begin.startswith(_MARKED) and SOFTWARE.encode() in begin
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def check_outputs(folder, reads, overwrite, ours=is_our_file, **outputs):
    """Raise ValueError where a file to write, name of its option -> path or None, is one that is read or another one
    of them, belongs to the run in ``folder``, or is a picture of a kind that is not drawn; OSError where it may not be
    written. Returns the names of those that are ordinary files, or will be.

    overwrite: False refuses a file that is there, is not empty, and is not by ``ours``, a function of its path, one
    that may be replaced. A picture may be replaced if gpurnn drew it.
    """
    given = {name: Path(path) for name, path in outputs.items() if path}
    if dashes := [name for name in given if str(outputs[name]) == "-"]:
        raise ValueError(f"--{dashes[0]}: '-' is not standard output here: expected the name of a file, or /dev/stdout")
    for name in _DRAWN & set(given):
        suffix = given[name].suffix.lower()
        if suffix not in ("", *_DRAWN_AS):
            raise ValueError(
                f"--{name}: {given[name]} would be a picture: expected a name that ends with one of "
                f"{', '.join(_DRAWN_AS)}, got {suffix}"
            )
    ordinary = set()
    for name, path in given.items():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"--{name}: {path}: the folder {path.parent} does not exist: make it first")
        if not is_stream(path):
            ordinary.add(name)
        refuse_same(path, [*reads, *(Path(folder, file) for file in taken(folder))], name)
        free = overwrite or name not in ordinary or not path.exists() or not path.stat().st_size
        if not free and not (is_our_file if name in _DRAWN else ours)(path):
            raise ValueError(
                f"--{name}: {path} is there already and was not written by this command: choose another name, or "
                "replace it with --overwrite"
            )
    places = [os.path.realpath(given[name]) for name in ordinary]
    if len(set(places)) < len(places):
        raise ValueError(f"{' and '.join(sorted(ordinary))} name the same file, {places[0]}: give each one of its own")
    return ordinary


def sweep(folder):
    """Remove the temporary files that a killed run has left; the folder is locked."""
    with contextlib.suppress(OSError):
        sweep_folder(folder, FILES)


# ---- logs


def read_history(path, size=None):
    """The records of a ``history.jsonl``, or of its first ``size`` bytes, without a last line that has no end.

    Raises CheckpointError that names file and line for what is no record, OSError where it cannot be read.
    """
    records = []
    for place, record in _records(path, size):
        kind = record.get("kind")
        if not isinstance(kind, str):
            raise CheckpointError(f"{place}: expected a record with its kind, got {sorted(record)[:8]}")
        for name in _RECORDS.get(kind, ()):
            if name != "grad_norm" or name not in record or record[name] is not None:  # none before the first update
                _check_number(place, name, record.get(name))
        for name, value in record.items():
            if name.startswith("validation_") and value is not None:
                _check_number(place, name, value)
        records.append(record)
    return records


def read_flow(path):
    """The records of a ``gradient_flow.jsonl``; errors as of ``read_history``."""
    records = []
    for place, record in _records(path):
        layers = record.get("layers")
        if not isinstance(layers, dict) or not all(isinstance(norms, dict) for norms in layers.values()):
            raise CheckpointError(f"{place}: expected layers, each with the norms of dh and dc")
        if records and list(layers) != list(records[0]["layers"]):
            raise CheckpointError(f"{place}: expected the layers {', '.join(records[0]['layers'])}")
        for layer, norms in layers.items():
            for kind in ("dh", "dc"):
                values = norms.get(kind)
                if values is not None and not isinstance(values, list):
                    raise CheckpointError(f"{place}: {kind} of {layer}: expected a list, got {type(values).__name__}")
                for value in values or ():
                    _check_number(place, f"{kind} of {layer}", value)
        records.append(record)
    return records


def _records(path, size=None):
    """(place for messages, record) of each whole line."""
    data = read_bytes(path, factor=_RECORD_FACTOR, what="its records", error=CheckpointError, own=True)
    whole = size is not None and len(data) >= size  # else it is being written, or was shortened
    *lines, rest = data[:size].split(b"\n")
    if whole and rest:
        lines.append(rest)
    for number, line in enumerate(lines, 1):
        place = f"{path}: line {number}"
        record = parse_json(line, place, CheckpointError, finite=False)
        if not isinstance(record, dict):
            raise CheckpointError(f"{place}: expected a JSON object, got {type(record).__name__}")
        yield place, record


def _check_number(place, name, value):
    odd = isinstance(value, bool) or not isinstance(value, (int, float))
    if odd or (isinstance(value, int) and abs(value) > 2**63):  # which Matplotlib could not draw
        shown = "nothing" if value is None else repr(value)[:40]
        raise CheckpointError(f"{place}: {name}: expected a number, got {shown}")


def whole_lines(file, size):
    """Where to cut a log that should be ``size`` bytes long: there, or after its last whole line if it is shorter."""
    end = file.seek(0, os.SEEK_END)
    if end >= size:
        return size
    file.seek(0)
    return file.read(end).rfind(b"\n") + 1
