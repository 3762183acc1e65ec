"""Sound as features: files of any usual format read, resampled, and turned into log-mel frames.

>>> samples, rate = np.sin(0.3 * np.arange(16000)), 16000                       # or read_audio("hello.flac")
>>> log_mel(samples, rate).shape                                                # (T, bands)
(99, 40)
"""

import functools
import math
from pathlib import Path

import numpy as np

from ..errors import FileError, ShapeError, check_number, check_size
from ..files import check_room, open_regular
from .wav import SAMPLE_COST, read_wav, say_channels, say_once

_COMPRESSED = {b"fLaC": "FLAC", b"OggS": "OGG", b"ID3": "MP3"}  # first bytes -> what soundfile reads
_MP3_SLACK = 2 * 1152  # samples by which the header of an MP3 may be wrong: two of its frames
_ENDLESS = 1 << 62  # more samples than any file has: libsndfile gives this number if the header has none
_FRAMES_ROOM = 64 << 20  # bytes that the frames of one Fourier transform may take
_TAPS = 20  # taps of SciPy's filter for each step of the finer rate


def read_audio(path):
    """The samples of a sound file, float32 (N,), and its sampling rate in Hz, an int.

    The first bytes tell the format, whatever the file's name. WAV is read by ``read_wav``; FLAC, OGG (Vorbis, Opus) and
    MP3 by soundfile. Several channels are averaged to one, which is logged once.

    Raises
    ------
    FileError
        Names the file, for one that is damaged, cut off, without samples, of another format, or too long for the memory
        that one file may take.
    ImportError
        Without soundfile, for what needs it.
    OSError
        For one that cannot be read.
    """
    with open_regular(path) as file:
        head = file.read(12)
        if not head:
            raise FileError(f"{path}: is empty")
        kind = next((kind for start, kind in _COMPRESSED.items() if head.startswith(start)), None)
        if kind is None and head[0] == 0xFF and len(head) > 1 and head[1] & 0xE6 == 0xE2:  # a frame of MPEG, layer III
            kind = "MP3"
        if kind:
            file.seek(0)
            return _read_compressed(path, file, kind)
    if head[:4] not in (b"RIFF", b"RIFX", b"RF64", b"BW64") and Path(path).suffix.lower() != ".wav":
        raise FileError(
            f"{path}: is not WAV, FLAC, OGG or MP3 by its first bytes. Convert it, for example with ffmpeg -i FILE "
            "NEW.wav"
        )
    return read_wav(path)


def _read_compressed(path, file, kind):
    """``read_audio`` of an open file that soundfile reads."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without the C library that it needs
        raise ImportError(f'{path}: {kind} needs soundfile: pip install "gpurnn[audio]"') from error
    damaged = FileError(f"{path}: is damaged: it cannot be read as {kind}")
    try:
        with soundfile.SoundFile(file) as sound:
            channels, rate, said = sound.channels, sound.samplerate, sound.frames
            if said >= _ENDLESS:
                raise FileError(f"{path}: its header has no length: it was written to a pipe, write it to a file")
            check_room(path, (SAMPLE_COST + 4 * channels) * said, f"its {said:,} samples")
            # all at once: after each read soundfile seeks, and Opus and MP3 do not go on there with the same samples
            samples = sound.read(said, "float32", always_2d=True)
    except RuntimeError as error:  # of soundfile
        raise damaged from error
    if len(samples) < said - (_MP3_SLACK if kind == "MP3" else 0):
        raise FileError(f"{path}: is cut off: its header says {said} samples, it holds {len(samples)}")
    if not len(samples):
        raise FileError(f"{path}: holds no samples")
    if rate < 1 or not np.isfinite(samples).all():
        raise damaged
    say_channels(channels)
    return samples.mean(axis=1), rate


def is_silent(samples):
    """Whether all samples (N,) of a recording are within 0.001 of their mean, 60 dB below full scale."""
    return bool(np.abs(samples - samples.mean(dtype=np.float64)).max() < 0.001)


def resample(samples, rate, wanted):
    """Samples at another sampling rate, by SciPy's polyphase filter; logged once for each pair of rates.

    samples: (N,) of ``rate`` Hz. Returns (ceil(N wanted / rate),) float32. Raises ImportError without SciPy, FileError
    if the filter or the result would take more memory than one file may.
    """
    rate, wanted = check_size("rate", rate), check_size("wanted", wanted)
    if rate == wanted:
        return samples
    common = math.gcd(rate, wanted)
    taps = _TAPS * max(rate, wanted) // common
    check_room(f"sound of {rate} Hz at {wanted} Hz", 24 * taps + 8 * (len(samples) * wanted // rate), "it")
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(
            f'resampling {rate} Hz to {wanted} Hz for the model needs SciPy: pip install "gpurnn[speech]"'
        ) from error
    say_once(f"Sound of {rate} Hz: resampled to {wanted}")
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


def log_mel(samples, rate, *, window=25.0, hop=10.0, fft=None, bands=40, fmin=60.0, fmax=None, floor=1e-6):
    """Logarithm of the power in ``bands`` bands of the mel scale, frame by frame: float32 (T, bands).

    Every frame is weighted by a periodic Hann window, and the samples are padded with zeros to whole frames. The bands
    are triangles over frequency, 1 in their middle. Their middles and ends are equally spaced between ``fmin`` and
    ``fmax`` on the scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987).

    Parameters
    ----------
    samples : (N,) array
        N of at least 1.
    rate : int
        Sampling rate, Hz.
    window, hop : float
        Length of a frame, and time from one frame to the next, ms.
    fft : int, optional
        Points of the transform; None for the next power of 2.
    bands : int
    fmin, fmax : float
        Lowest and highest frequency, Hz; None for rate / 2.
    floor : float
        Power that is added before the logarithm.

    Raises
    ------
    ShapeError, ValueError
    FileError
        If a window at such a rate would take more memory than one file may.
    """
    size, step, fft, banks = _frame_sizes(rate, window, hop, fft, bands, fmin, fmax)
    check_number("floor", floor, 0, low_open=True)
    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size:
        raise ShapeError(f"samples: expected shape (N,) with at least one sample, got {samples.shape}")
    T = 1 + max(0, -(-(len(samples) - size) // step))
    check_room("its features", 8 * T * bands, f"{T:,} frames")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    found = np.empty((T, bands), np.float32)
    most = max(1, _FRAMES_ROOM // (16 * size + 32 * (fft // 2 + 1)))
    for start in range(0, T, most):
        count = min(most, T - start)
        padded = np.zeros(size + step * (count - 1))
        part = samples[start * step : start * step + len(padded)]
        padded[: len(part)] = part
        frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::step]
        power = np.square(np.abs(np.fft.rfft(frames * hann, fft)))
        found[start : start + count] = np.log(power @ banks + floor)
    return found


@functools.lru_cache(8)
def _frame_sizes(rate, window, hop, fft, bands, fmin, fmax):
    """(samples of a window, of a hop, points of the transform, weights of the bands (fft / 2 + 1, bands))."""
    rate, bands = check_size("rate", rate), check_size("bands", bands)
    size, step = (
        max(1, round(rate * check_number(name, value, 0, low_open=True) / 1000))
        for name, value in (("window", window), ("hop", hop))
    )
    fft = 1 << (size - 1).bit_length() if fft is None else check_size("fft", fft)
    if fft < size:
        raise ValueError(f"fft should be at least the window's {size} samples, got {fft}")
    check_room(f"sound of {rate} Hz", 16 * size + (32 + 48 * bands) * (fft // 2 + 1), f"a window of {size:,} samples")
    fmax = check_number("fmax", rate / 2 if fmax is None else fmax, 0, rate / 2, low_open=True)
    fmin = check_number("fmin", fmin, 0, fmax, high_open=True)
    low, high = (2595 * math.log10(1 + f / 700) for f in (fmin, fmax))
    edges = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    frequencies = np.arange(fft // 2 + 1)[:, None] * rate / fft
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return size, step, fft, np.maximum(0, np.minimum(rising, falling))
