"""Utterances and their transcripts, from tables of sound files or from .npz files of features."""

import csv
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FileError
from ..files import check_room, naming
from .audio import is_silent, log_mel, read_audio, resample
from .encodings import read_lines
from .npz import read_npz
from .skipped import Skipped

_log = logging.getLogger("gpurnn")
_SOUND = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
_NPZ_FACTOR = 6  # memory for features and their statistics, in sizes of the features
_UTTERANCE_COST = 1000  # bytes of memory for an utterance besides its features


@dataclass
class Utterance:
    """features: (T, bands) float32, T of at least 1, not normalized. digest: a hash of the sound, or of the features
    where there is none."""

    features: np.ndarray
    text: str
    is_test: bool = False
    digest: bytes = b""

    def __post_init__(self):
        self.digest = self.digest or _digest(self.features)


def _digest(array):
    return hashlib.blake2b(np.ascontiguousarray(array), digest_size=32).digest()


def read_utterances(file, settings, rate=None):
    """The utterances of one file, and the sampling rate to which they are resampled.

    Parameters
    ----------
    file : str or Path
        A table with the path of a sound file (relative to the table's folder), a tab and its transcript in each line;
        a comma in a file that ends with .csv. A first line
        that names the columns is left out. Or an .npz of features; see ``SpeechTask``.
    settings : SpeechSettings
        How features are made, and ``strict``: whether a bad line or sound file is refused, instead of skipped with a
        warning that counts them.
    rate : int, optional
        None for the rate of the first sound file.

    Returns
    -------
    utterances : list of Utterance
    rate : int or None

    Raises
    ------
    ValueError
        Names the file, and in a table the line.
    """
    file = Path(file)
    if file.suffix.lower() == ".npz":
        return _read_features(file, settings, rate), rate
    if file.suffix.lower() in _SOUND:
        raise ValueError(f"{file}: give a table, with the path of a sound file, a tab and its transcript in each line")
    from tqdm import tqdm

    lines = [(n, line) for n, line in enumerate(read_lines(file, settings.encoding), 1) if line.strip()]
    if lines and _is_header(lines[0][1], file.parent):
        _log.warning("%s: line %d is taken for the names of the columns", file, lines.pop(0)[0])
    if not lines:
        raise FileError(f"{file}: is empty")
    utterances, silent = [], 0
    skipped = Skipped("lines", file, settings.strict)
    for n, line in tqdm(lines, desc="reading", unit=" files", leave=False, disable=None):
        with skipped.catching(f"line {n}"):
            path, text = _cells(line, file)
            samples, given = read_audio(file.parent / path.strip())
            features, rate = sound_features(samples, given, settings, rate, path.strip())
            silent += is_silent(samples)
            utterances.append(Utterance(features, text.strip(), digest=_digest(samples)))
    skipped.done()
    if silent:
        _log.warning("%s: silent recordings: %d of %d", file, silent, len(utterances))
    return utterances, rate


def _is_header(line, folder):
    """Whether the first line of a table has a name of a column where others have a path."""
    path, *others = re.split("[\t,]", line)
    path = path.strip(' "')
    return bool(others and path) and "\0" not in path and not Path(path).suffix and not (folder / path).exists()


def _cells(line, file):
    """The path and the transcript of a line of a table, which is CSV where its name says so and there is no tab.

    Raises FileError for what is no such line.
    """
    path, comma, text = line.partition("\t")
    if not comma and file.suffix.lower() == ".csv":
        cells = _comma_separated(line)
        if len(cells) != 2:
            raise FileError(
                f"expected a path, a comma and a transcript (in double quotes where it has commas), got {line[:60]!r}"
            )
        path, comma, text = cells[0], ",", cells[1]
    if not (comma and path.strip()) or "\0" in path:
        raise FileError(f"expected a path, a tab and a transcript, got {line[:60]!r}")
    if "\t" in text:
        raise FileError(
            f"expected two columns, a path and a transcript, got {2 + text.count(chr(9))}: leave out the others"
        )
    return path, text


def _comma_separated(line):
    """The cells of a line of CSV; none of one whose quotes are wrong."""
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error:
        return []


def sound_features(samples, given, settings, rate=None, name="the sound"):
    """Log-mel features (T, bands) of samples (N,), and the sampling rate that they are of.

    given: the rate of the samples; rate: the one to resample to, None for ``given``. name: what errors call the file.
    Raises ValueError.
    """
    rate = rate or given
    names = ("window", "hop", "fft", "bands", "fmin", "fmax", "floor")
    options = {name: getattr(settings, name) for name in names}
    with naming([name]):
        return log_mel(resample(samples, given, rate), rate, **options), rate


def _read_features(file, settings, rate):
    found = read_npz(file, {"frames", "length", "label", "is_test"}.__contains__, _NPZ_FACTOR)
    missing = [name for name in ("frames", "length", "label") if name not in found]
    if missing:
        raise ValueError(f"{file}: lacks the arrays {', '.join(missing)}")
    frames, length, label = found["frames"], found["length"], found["label"]
    check_room(file, _UTTERANCE_COST * label.size, f"its {label.size:,} utterances")
    is_test = found.get("is_test", np.zeros(label.shape, bool)).astype(bool)
    if frames.ndim != 2 or frames.dtype.kind != "f":
        raise ValueError(f"{file}: frames should be numbers (N, bands), got {frames.dtype} {frames.shape}")
    if not (length.shape == label.shape == is_test.shape == (label.size,)) or length.dtype.kind not in "iu":
        raise ValueError(
            f"{file}: length, label and is_test should be one for each utterance, got {length.dtype} {length.shape}, "
            f"{label.shape} and {is_test.shape}"
        )
    if not len(length) or length.min() < 1 or length.sum() != len(frames):
        raise ValueError(f"{file}: length should hold numbers of at least 1 that add up to the {len(frames)} frames")
    if not np.isfinite(frames).all():
        raise ValueError(f"{file}: frames holds numbers that are not finite")
    if rate is not None and frames.shape[1] != settings.bands:
        raise ValueError(f"{file}: has {frames.shape[1]} bands, but bands is {settings.bands}")
    parts = np.split(frames.astype(np.float32), np.cumsum(length)[:-1])
    return [Utterance(*each) for each in zip(parts, map(str, label.tolist()), is_test.tolist(), strict=True)]
