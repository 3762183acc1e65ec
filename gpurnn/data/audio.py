"""Sound as features: WAV files read, resampled, and turned into log-mel frames.

>>> samples, rate = np.sin(0.3 * np.arange(16000)), 16000                       # or read_wav("hello.wav")
>>> log_mel(samples, rate).shape                                                # (T, bands)
(99, 40)
"""

import functools
import logging
import math

import numpy as np

from ..errors import FileError, ShapeError, check_number, check_size
from ..files import check_room, file_size, open_regular

_log = logging.getLogger("gpurnn")
_PCM, _EXTENSIBLE = 1, 0xFFFE  # formats of WAV files; the second names its format later in its header
_CHUNKS = 1000  # parts of a WAV file that may come before the samples
_PIECE = 1 << 18  # samples read at once
_SAMPLE_COST = 10  # bytes of memory for a sample: its float32, and its part of the features and of what is resampled
_FRAMES_ROOM = 64 << 20  # bytes that the frames may take that are transformed at once
_TAPS = 20  # of SciPy's filter for each step of the finer rate


def read_wav(path):
    """The samples of a PCM WAV file of 8, 16, 24 or 32 bits: (float32 (N,) in [-1, 1), sampling rate in Hz).

    Several channels are averaged to one; that is said once. Raises FileError, naming the file, for one that is empty,
    damaged, shorter than its header says, too long for the memory that one file may take, or not PCM; OSError for one
    that cannot be read.
    """
    with open_regular(path) as file:
        channels, width, rate, frames = _wav_header(path, file)
        if rate < 1:
            raise FileError(f"{path}: has a sampling rate of {rate} Hz")
        block = channels * width
        held = (file_size(file) - file.tell()) // block
        if held < frames:
            raise FileError(f"{path}: is cut off: its header says {frames} samples, it holds {held}")
        if not frames:
            raise FileError(f"{path}: holds no samples")
        check_room(path, _SAMPLE_COST * frames, f"its {frames:,} samples")
        samples = np.empty(frames, np.float32)
        most = max(1, _PIECE // channels)
        for start in range(0, frames, most):
            count = min(most, frames - start)
            data = file.read(count * block)
            if len(data) != count * block:
                raise FileError(f"{path}: changed while it was read")
            values = _pcm(data, width)
            samples[start : start + count] = values if channels == 1 else values.reshape(count, channels).mean(axis=1)
    if channels > 1:
        _say_once(f"WAV files with {channels} channels: averaged to one")
    return samples, rate


def _wav_header(path, file):
    """(channels, bytes of a sample, sampling rate, samples) of an open WAV file, which is then at its samples."""
    cut = FileError(f"{path}: is not a WAV file, or its header is cut off")
    head = file.read(12)
    if len(head) < 12:
        raise cut
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        raise FileError(f"{path}: is not a WAV file of PCM samples (it does not begin with RIFF and WAVE)")
    found = None
    for _ in range(_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise cut
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            break
        behind = file.tell() + length + length % 2
        if name == b"fmt ":
            body = file.read(min(length, 40))
            if len(body) < 16:
                raise cut
            numbers = [int.from_bytes(body[a:b], "little") for a, b in ((0, 2), (2, 4), (4, 8), (14, 16), (24, 26))]
            form, channels, rate, bits, inner = numbers
            form = inner if form == _EXTENSIBLE else form
            found = channels, (bits + 7) // 8, rate
            if form != _PCM:
                raise FileError(f"{path}: is not a WAV file of PCM samples (unknown format: {form})")
            if not channels or not 1 <= bits <= 32:
                raise FileError(f"{path}: is not a WAV file of PCM samples ({channels} channels of {bits} bits)")
        file.seek(behind)
    else:
        raise FileError(f"{path}: is not a WAV file of PCM samples (no samples in its first {_CHUNKS} parts)")
    if found is None:
        raise FileError(f"{path}: is not a WAV file of PCM samples (its format comes behind the samples)")
    return *found, length // (found[0] * found[1])


def _pcm(data, width):
    """Samples of ``width`` bytes as float32 in [-1, 1)."""
    if width == 1:
        return np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    if width == 3:  # as the upper three bytes of 32 bits
        words = np.zeros((len(data) // 3, 4), np.uint8)
        words[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (words.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)


def resample(samples, rate, wanted):
    """``samples`` (N,) of ``rate`` Hz at ``wanted`` Hz, (ceil(N wanted / rate),); said once for each pair of rates.

    A polyphase filter by SciPy. Raises ImportError without it, FileError where the filter, or what comes of it, would
    take more memory than one file may.
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
            f"a sampling rate of {rate} Hz where the model has {wanted} needs SciPy: pip install 'gpurnn[speech]'"
        ) from error
    _say_once(f"WAV files of {rate} Hz: resampled to {wanted}")
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
    before the logarithm. Raises ShapeError and ValueError, FileError where a window of such a rate would take more
    memory than one file may.
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
