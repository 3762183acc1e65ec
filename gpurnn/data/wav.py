"""WAV files: samples of whole numbers or of floating point, read in pieces and within limits."""

import functools
import logging
from dataclasses import dataclass

import numpy as np

from ..errors import FileError
from ..files import check_room, file_size, open_regular

_log = logging.getLogger("gpurnn")
SAMPLE_COST = 10  # bytes of memory for a sample: its float32, and its part of the features and of what is resampled
PIECE = 1 << 18  # samples read at once
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # formats of samples; the last names one of the others later in its header
_GUID = bytes.fromhex("000000001000800000aa00389b71")  # what follows the format's number in an extensible header
_NAMES = {
    2: "Microsoft ADPCM", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 49: "GSM 6.10", 80: "MPEG", 85: "MP3",
    255: "AAC",
}  # fmt: skip
_CHUNKS = 1000  # chunks of a WAV file that may come before the samples
_UNKNOWN = 2**32 - 1  # the length that RF64, and writers that cannot seek, give the samples
_LOUDEST = 100.0  # the largest float sample that is accepted: 40 dB above full scale


@dataclass(frozen=True)
class _Header:
    """form: ``_PCM`` or ``_FLOAT``; width: bytes of a sample of one channel; frames: samples of each channel."""

    form: int
    channels: int
    rate: int
    width: int
    frames: int = 0


def read_wav(path):
    """The samples of a WAV file, and its sampling rate.

    Parameters
    ----------
    path : str or Path
        PCM of 8 to 32 bits, or floating point of 32 or 64; also WAVE_FORMAT_EXTENSIBLE with either, RF64 and BW64.

    Returns
    -------
    samples : (N,) float32
        Full scale is 1. Several channels are averaged to one, which is logged once.
    rate : int
        In Hz.

    Raises
    ------
    FileError
        Names the file, for one that is empty, damaged, shorter than its header says, of another format, too long for
        the memory that one file may take, or with samples that are not finite.
    OSError
        For one that cannot be read.
    """
    with open_regular(path) as file:
        header = _header(path, file)
        if header.rate < 1:
            raise FileError(f"{path}: has a sampling rate of {header.rate} Hz")
        block, frames = header.channels * header.width, header.frames
        held = (file_size(file) - file.tell()) // block
        if held < frames:
            pipe = (
                ". Its header has no length: it was written to a pipe, write it to a file" if _endless(header) else ""
            )
            raise FileError(f"{path}: is cut off: its header says {frames} samples, it holds {held}{pipe}")
        if not frames:
            raise FileError(f"{path}: holds no samples")
        check_room(path, SAMPLE_COST * frames, f"its {frames:,} samples")
        samples = np.empty(frames, np.float32)
        most = max(1, PIECE // header.channels)
        for start in range(0, frames, most):
            count = min(most, frames - start)
            data = file.read(count * block)
            if len(data) != count * block:
                raise FileError(f"{path}: changed while it was read")
            values = _pcm(data, header.width) if header.form == _PCM else _floats(path, data, header, start)
            samples[start : start + count] = values.reshape(count, header.channels).mean(axis=1)
    say_channels(header.channels)
    return samples, header.rate


def _endless(header):
    return header.frames == _UNKNOWN // (header.channels * header.width)


def _header(path, file):
    """The ``_Header`` of an open WAV file, which is then at its samples."""
    cut = FileError(f"{path}: is not a WAV file, or its header is cut off")
    head = file.read(12)
    if len(head) < 12:
        raise cut
    if head[:4] == b"RIFX":
        raise FileError(f"{path}: is a WAV file of big-endian numbers (RIFX), which is not read: convert it to RIFF")
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        raise FileError(f"{path}: is not a WAV file: it does not begin with RIFF and WAVE")
    found = long = None
    for _ in range(_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise cut
        name, length = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            break
        end = file.tell() + length + length % 2
        if name == b"ds64":  # the lengths of RF64, in 64 bits: of the file, then of the samples
            long = int.from_bytes(file.read(16)[8:], "little")
        if name == b"fmt ":
            found = _format(path, file.read(min(length, 40)), cut)
        file.seek(end)
    else:
        raise FileError(f"{path}: is not a WAV file that is read: no samples in its first {_CHUNKS} chunks")
    if found is None:
        raise FileError(f"{path}: is not a WAV file that is read: its format does not come before its samples")
    if length == _UNKNOWN and long is not None:
        length = long
    return _Header(**found, frames=length // (found["channels"] * found["width"]))


def _format(path, body, cut):
    """The contents of the chunk ``fmt``, by the names of ``_Header``."""
    if len(body) < 16:
        raise cut
    places = ((0, 2), (2, 4), (4, 8), (12, 14), (14, 16))
    form, channels, rate, block, bits = (int.from_bytes(body[a:b], "little") for a, b in places)
    if form == _EXTENSIBLE:
        if len(body) < 40:
            raise cut
        form = int.from_bytes(body[24:26], "little") if body[26:] == _GUID else _EXTENSIBLE
    if form not in (_PCM, _FLOAT):
        name = f"{form}, {_NAMES[form]}" if form in _NAMES else form
        raise FileError(
            f"{path}: is a WAV file of format {name}: PCM and floating point are read. Convert it, for example with "
            "ffmpeg -i FILE -c:a pcm_s16le NEW.wav"
        )
    if not channels or bits not in ((32, 64) if form == _FLOAT else range(1, 33)):
        kind = "floating point" if form == _FLOAT else "PCM"
        raise FileError(f"{path}: is damaged: its header says {channels} channels of {kind} of {bits} bits")
    width = (bits + 7) // 8
    if block != channels * width:
        raise FileError(
            f"{path}: is damaged: its header says {channels} channels of {bits} bits, but {block} bytes for one sample "
            "of all channels"
        )
    return {"form": form, "channels": channels, "rate": rate, "width": width}


def _pcm(data, width):
    """Whole numbers of ``width`` bytes as float32 in [-1, 1)."""
    if width == 1:
        return np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    if width == 3:  # as the upper three bytes of 32 bits
        words = np.zeros((len(data) // 3, 4), np.uint8)
        words[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (words.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{width}") / 2 ** (8 * width - 1)).astype(np.float32)


def _floats(path, data, header, start):
    """Floating-point samples, all of them finite and none far above full scale; start: the number of the first."""
    values = np.frombuffer(data, f"<f{header.width}")
    wrong = np.flatnonzero(~(np.abs(values) <= _LOUDEST))
    if len(wrong):
        value, place = values[wrong[0]], start + wrong[0] // header.channels
        if np.isfinite(value):
            raise FileError(
                f"{path}: sample {place} is {value:.6g}, where full scale is 1: divide the samples by their full scale"
            )
        raise FileError(f"{path}: sample {place} is {value}: the samples should be finite numbers")
    return values


def say_channels(channels):
    """Log that several channels become one, once for each number of channels."""
    if channels > 1:
        say_once(f"Sound with {channels} channels: averaged to one")


@functools.lru_cache(1024)
def say_once(message):
    _log.warning(message)
