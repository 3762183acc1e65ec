"""Utterances and what is said in them, from tables of sound files or from .npz files of features."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import FileError
from ..files import check_room, naming
from .audio import log_mel, read_wav, resample
from .npz import read_npz
from .vocabulary import read_lines

_NPZ_FACTOR = 6  # how many times the features' size their statistics take in memory
_UTTERANCE_COST = 1000  # bytes of memory for an utterance besides its features


@dataclass
class Utterance:
    """features: (T, bands) float32, T of at least 1, not normalised."""

    features: np.ndarray
    text: str
    is_test: bool = False


def read_utterances(file, settings, rate=None):
    """(list of ``Utterance``, sampling rate) of a table of WAV files or an .npz of features; see ``SpeechTask``.

    rate: what sound is brought to, None for the rate of the first WAV file. Raises ValueError that names the file, and
    in a table the line.
    """
    file = Path(file)
    if file.suffix.lower() == ".npz":
        return _read_features(file, settings, rate), rate
    if file.suffix.lower() == ".wav":
        raise ValueError(f"{file}: give a table, with the path of a WAV file, a tab and its transcript in each line")
    from tqdm import tqdm

    lines = [(n, line) for n, line in enumerate(read_lines(file), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file}: is empty")
    utterances = []
    for n, line in tqdm(lines, desc="reading", unit=" files", leave=False, disable=None):
        path, tab, text = line.partition("\t")
        if not (tab and path.strip()) or "\0" in path:
            raise FileError(f"{file}: line {n} should be a path, a tab and a transcript, got {line[:60]!r}")
        try:
            features, rate = wav_features(file.parent / path.strip(), settings, rate)
        except (ValueError, OSError) as error:
            raise FileError(f"{file}: line {n}: {error}") from error
        utterances.append(Utterance(features, text.strip()))
    return utterances, rate


def wav_features(path, settings, rate=None):
    """(log-mel features (T, bands) of a WAV file, the sampling rate they are of)."""
    samples, given = read_wav(path)
    rate = rate or given
    names = ("window", "hop", "fft", "bands", "fmin", "fmax", "floor")
    options = {name: getattr(settings, name) for name in names}
    with naming([path]):
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
        raise ValueError(f"{file}: {len(frames)} frames, but lengths of at least 1 should add up to them")
    if not np.isfinite(frames).all():
        raise ValueError(f"{file}: frames that are not finite")
    if rate is not None and frames.shape[1] != settings.bands:
        raise ValueError(f"{file}: has {frames.shape[1]} bands, where bands is {settings.bands}")
    parts = np.split(frames.astype(np.float32), np.cumsum(length)[:-1])
    return [Utterance(*each) for each in zip(parts, map(str, label.tolist()), is_test.tolist(), strict=True)]
