"""Piano rolls from files of music: MIDI, JSON, .npz, and folders of them.

A roll is an array (T, 88) of 0 and 1: column k is the piano's key k, a row is a frame.
"""

from pathlib import Path

import numpy as np

from ..errors import FileError
from ..files import check_room, read_json
from .midi import KEYS, LOWEST, midi_roll, say_outside
from .npz import read_npz
from .skipped import Skipped

SPLITS = ("train", "valid", "test")
_FRAMES = 1 << 16  # frames that are checked at once
_PIECE_COST = 500  # bytes of memory for a piece besides its frames
_JSON_FACTOR = 64  # bytes of memory for a byte of JSON: "[]," is an empty list and a frame


def read_parts(files, step, strict=False):
    """The pieces of all files, part by part.

    Parameters
    ----------
    files : list of str or Path
        Files of music, or folders, of which all files of music are read, in order of their names. Pieces of files that
        name no parts go to "train".
    step : float
        Length of a frame in quarter notes, for MIDI.
    strict : bool
        Refuse a bad file among several, and a note that no piano has. They are left out otherwise, with a warning that
        counts them.

    Returns
    -------
    dict
        "train", "valid" and "test": lists of (T, 88) uint8 arrays, T at least 1.

    Raises
    ------
    ValueError
        Names the file and what is wrong with it.
    OSError
        For a file that cannot be read.
    """
    parts = {name: [] for name in SPLITS}
    paths = [path for file in map(Path, files) for path in (_files_in(file) if file.is_dir() else [file])]
    skipped = Skipped("files of music", strict=strict or len(paths) == 1)
    outside = {}  # file -> notes left out
    for file in paths:
        with skipped.catching():
            found, outside[file] = _read(file, step, strict)
            for name, pieces in found.items():
                parts[name] += [piece for piece in pieces if len(piece)]
    skipped.done()
    left_out = [file for file, notes in outside.items() if notes]
    if left_out:
        place = left_out[0] if len(left_out) == 1 else f"{len(left_out):,} of {len(paths):,} files of music"
        say_outside(place, sum(outside.values()))
    if not any(parts.values()):
        raise FileError(f"{', '.join(map(str, files))}: no music in it: every piece is empty")
    return parts


def _files_in(folder):
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileError(f"{folder}: the folder has no files of music ({', '.join(_SUFFIXES)})")
    return found


def _read(path, step, strict):
    """({part: rolls}, number of notes left out) of one file."""
    suffix = path.suffix.lower()
    if suffix in _MIDI:
        roll, outside = midi_roll(path, step, strict)
        return {"train": [roll]}, outside
    if suffix in _READERS:
        return _READERS[suffix](path), 0
    if suffix == ".abc":
        raise FileError(f"{path}: ABC tunes are text: gpurnn train text {path}")
    raise FileError(f"{path}: expected a file of music ({', '.join(_SUFFIXES)}), got {suffix or 'no suffix'!r}")


def _read_npz(path):
    found = read_npz(path, lambda name: name.endswith(("_roll", "_length")))
    parts = {}
    for split in SPLITS:
        roll, length = (found.get(f"{split}_{kind}") for kind in ("roll", "length"))
        if roll is None and length is None:
            continue
        if roll is None or length is None:
            raise ValueError(f"{path}: array {split}_{'roll' if roll is None else 'length'} is missing")
        if roll.ndim != 2 or roll.shape[1] != KEYS or not _binary(roll):
            raise ValueError(
                f"{path}: {split}_roll: expected 0 and 1, shape (frames, {KEYS}), got {roll.dtype} {roll.shape}"
            )
        check_room(path, _PIECE_COST * length.size, f"its {length.size:,} pieces")
        if length.ndim != 1 or length.dtype.kind not in "iu" or (length < 0).any() or length.sum() != len(roll):
            raise ValueError(
                f"{path}: {split}_length: expected the pieces' lengths, {len(roll)} frames in all, got {length.dtype} "
                f"{length.shape} with the sum {length.sum()}"
            )
        parts[split] = np.split(roll.astype(np.uint8, copy=False), np.cumsum(length)[:-1]) if len(length) else []
    if not parts:
        raise ValueError(f"{path}: expected arrays such as train_roll and train_length, found none")
    return parts


def _binary(roll):
    """Whether an array holds 0 and 1 only; looked at in pieces."""
    if roll.dtype.kind not in "biuf":
        return False
    parts = (roll[start : start + _FRAMES] for start in range(0, len(roll), _FRAMES))
    return all(((part == 0) | (part == 1)).all() for part in parts)


def _read_json(path):
    document = read_json(path, factor=_JSON_FACTOR)
    parts = document if isinstance(document, dict) else {"train": document}
    unknown = set(parts) - set(SPLITS)
    if unknown or not parts:
        raise ValueError(f"{path}: expected a list of pieces, or lists under {', '.join(SPLITS)}, got {sorted(parts)}")
    return {
        name: [_roll(piece, f"{path}: {name}, piece {n}") for n, piece in enumerate(_list(pieces, f"{path}: {name}"))]
        for name, pieces in parts.items()
    }


def _list(value, place):
    if not isinstance(value, list):
        raise ValueError(f"{place}: expected a list, got {type(value).__name__}")
    return value


def _roll(frames, place):
    """A piece, a list of lists of MIDI numbers, as a roll."""
    roll = np.zeros((len(_list(frames, place)), KEYS), np.uint8)
    for t, frame in enumerate(frames):
        for number in _list(frame, f"{place}, frame {t}"):
            roll[t, _key(number, f"{place}, frame {t}")] = 1
    return roll


def _key(number, place):
    """The column of a MIDI number, which has to be on the piano."""
    if not isinstance(number, int) or not LOWEST <= number < LOWEST + KEYS:
        raise ValueError(f"{place}: expected MIDI numbers from {LOWEST} to {LOWEST + KEYS - 1}, got {number!r}")
    return number - LOWEST


_READERS = {".npz": _read_npz, ".json": _read_json}
_MIDI = (".mid", ".midi")
_SUFFIXES = (*_READERS, *_MIDI)
