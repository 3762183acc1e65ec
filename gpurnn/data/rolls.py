"""Piano rolls from files of music: MIDI, JSON, .npz, and folders of them.

A roll is an array (T, 88) of 0 and 1: column k is the piano's key k, a row is a frame.
"""

from pathlib import Path

import numpy as np

from ..files import check_room, read_json
from .midi import KEYS, key_of, read_midi
from .npz import read_npz

SPLITS = ("train", "valid", "test")
_FRAMES = 1 << 16  # frames looked at at once
_PIECE_COST = 500  # bytes of memory for a piece besides its frames
_JSON_FACTOR = 64  # bytes of memory for a byte of JSON: "[]," is an empty list and a frame


def read_parts(files, step):
    """The pieces of all files: {"train": [...], "valid": [...], "test": [...]}, uint8 rolls (T, 88), T at least 1.

    Pieces of files that name no parts go to "train". Of a folder all files of music are read, in order of their names.
    step: length of a frame in quarter notes, for MIDI. Raises ValueError that names the file and what is wrong with it,
    FileNotFoundError.
    """
    parts = {name: [] for name in SPLITS}
    paths = []
    for file in map(Path, files):
        inside = (
            sorted(path for path in file.rglob("*") if path.suffix.lower() in _READERS) if file.is_dir() else [file]
        )
        if not inside:
            raise ValueError(f"{file}: the folder has no files of music ({', '.join(_READERS)})")
        paths += inside
    for file in paths:
        suffix = file.suffix.lower()
        if suffix == ".abc":
            raise ValueError(f"{file}: ABC tunes are text: gpurnn train text {file}")
        if suffix not in _READERS:
            raise ValueError(f"{file}: expected a file of music ({', '.join(_READERS)}), got {suffix or 'no suffix'!r}")
        for name, pieces in _READERS[suffix](file, step).items():
            parts[name] += [piece for piece in pieces if len(piece)]
    if not any(parts.values()):
        raise ValueError(f"{', '.join(map(str, files))}: no music in it: every piece is empty")
    return parts


def _read_npz(path, step):
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


def _read_json(path, step):
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
            roll[t, key_of(number, f"{place}, frame {t}")] = 1
    return roll


def _read_midi(path, step):
    return {"train": [read_midi(path, step)]}


_READERS = {".npz": _read_npz, ".json": _read_json, ".mid": _read_midi, ".midi": _read_midi}
