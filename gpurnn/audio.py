"""Sound as features: WAV files read, resampled, and turned into log-mel frames.

>>> samples, rate = read_wav("hello.wav")
>>> frames = log_mel(resample(samples, rate, 16000), 16000)                     # (T, 40)
"""

import functools
import logging
import math
import wave

import numpy as np

from .errors import ShapeError, check_number, check_size

_log = logging.getLogger("gpurnn")


def read_wav(path):
    """The samples of a PCM WAV file of 8, 16, 24 or 32 bits: (float32 (N,) in [-1, 1), sampling rate in Hz).

    Several channels are averaged to one; that is said once. Raises ValueError, naming the file, for one that is empty,
    damaged, shorter than its header says, or not PCM; OSError for one that cannot be read.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            data = file.readframes(frames)
    except EOFError:
        raise ValueError(f"{path}: is not a WAV file, or its header is cut off") from None
    except wave.Error as error:
        raise ValueError(f"{path}: is not a WAV file of PCM samples ({error})") from None
    if rate < 1:
        raise ValueError(f"{path}: has a sampling rate of {rate} Hz")
    if len(data) < frames * channels * width:
        raise ValueError(
            f"{path}: is cut off: its header says {frames} samples, it holds {len(data) // (channels * width)}"
        )
    if not frames:
        raise ValueError(f"{path}: holds no samples")
    if width == 1:
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:  # as the upper three bytes of 32 bits
        words = np.zeros((frames * channels, 4), np.uint8)
        words[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = (words.view("<i4")[:, 0] / 2**31).astype(np.float32)
    else:
        samples = (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)
    if channels > 1:
        _say_once(f"WAV files with {channels} channels: averaged to one")
        samples = samples.reshape(frames, channels).mean(axis=1)
    return samples, rate


def resample(samples, rate, wanted):
    """``samples`` (N,) of ``rate`` Hz at ``wanted`` Hz, (ceil(N wanted / rate),); said once for each pair of rates.

    A polyphase filter by SciPy. Raises ImportError without it.
    """
    rate, wanted = check_size("rate", rate), check_size("wanted", wanted)
    if rate == wanted:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(
            f"a sampling rate of {rate} Hz where the model has {wanted} needs SciPy: pip install 'gpurnn[speech]'"
        ) from error
    _say_once(f"WAV files of {rate} Hz: resampled to {wanted}")
    common = math.gcd(rate, wanted)
    return resample_poly(samples, wanted // common, rate // common).astype(np.float32)


@functools.lru_cache(1024)
def _say_once(message):
    _log.warning(message)


def log_mel(samples, rate, *, window=25.0, hop=10.0, fft=None, bands=40, fmin=60.0, fmax=None, floor=1e-6):
    """Logarithm of the power in ``bands`` bands of the mel scale, frame by frame: float32 (T, bands).

    samples: (N,), N of at least 1, of ``rate`` Hz. window, hop: milliseconds; every frame is weighted by a Hann window
    (periodic), and the samples are padded with zeros to whole frames. fft: points of the transform, None for the next
    power of 2. The bands are triangles over frequency, 1 in their middle; middles and ends are equally spaced between
    ``fmin`` and ``fmax`` (None: rate / 2) on the scale 2595 log10(1 + f / 700) (O'Shaughnessy 1987). floor: is added
    before the logarithm. Raises ShapeError and ValueError.
    """
    size, step, fft, banks = _frame_sizes(rate, window, hop, fft, bands, fmin, fmax)
    check_number("floor", floor, 0, low_open=True)
    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size:
        raise ShapeError(f"samples: expected shape (N,) with at least one sample, got {samples.shape}")
    T = 1 + max(0, -(-(len(samples) - size) // step))
    padded = np.zeros(size + step * (T - 1))
    padded[: len(samples)] = samples[: len(padded)]
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::step]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    power = np.square(np.abs(np.fft.rfft(frames * hann, fft)))
    return np.log(power @ banks + floor).astype(np.float32)


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
    fmax = check_number("fmax", rate / 2 if fmax is None else fmax, 0, rate / 2, low_open=True)
    fmin = check_number("fmin", fmin, 0, fmax, high_open=True)
    low, high = (2595 * math.log10(1 + f / 700) for f in (fmin, fmax))
    edges = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    frequencies = np.arange(fft // 2 + 1)[:, None] * rate / fft
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return size, step, fft, np.maximum(0, np.minimum(rising, falling))
