"""Sounds for tests: tones, words made of tones, and WAV files of any kind."""

import struct
import wave

import numpy as np

PITCH = {"a": 300, "b": 700, "c": 1300}  # Hz


def tone(frequency, seconds=0.5, rate=8000):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def word(letters, rng, rate=4000):
    """A tone for each letter of "abc", of another length, pitch and loudness every time, and noise."""
    parts = []
    for letter in letters:
        sound = tone(PITCH[letter] * rng.uniform(0.95, 1.05), rng.uniform(0.08, 0.14), rate)
        parts += [rng.uniform(0.4, 1.2) * np.hanning(len(sound)) * sound, np.zeros(round(0.03 * rate))]
    samples = np.concatenate(parts)
    return samples + 0.01 * rng.standard_normal(len(samples))


def write_wav(path, samples, rate=8000, width=2):
    """samples: (N,) or (N, channels) in [-1, 1); width: bytes of one."""
    samples = np.asarray(samples)
    whole = np.round(samples * 2 ** (8 * width - 1)).astype(np.int64)
    data = (
        (whole + 128).astype(np.uint8) if width == 1 else whole.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width]
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(data).tobytes())
    return path


def wav_bytes(samples, rate, *, bits=16, floats=False, extensible=False, chunks=b"", long=None):
    """A WAV file of any format, byte by byte.

    samples: (N,) or (N, channels), full scale 1. extensible: with WAVE_FORMAT_EXTENSIBLE. chunks: put before the
    format. long: b"RF64" or b"BW64" for lengths of 64 bits.
    """
    samples = np.asarray(samples, np.float64).reshape(len(samples), -1)
    channels, width = samples.shape[1], bits // 8
    if floats:
        data = samples.astype(f"<f{width}").tobytes()
    else:
        whole = np.minimum(np.round(samples * 2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1).astype("<i8")
        whole += 128 * (bits == 8)
        data = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    form = 3 if floats else 1
    head = struct.pack("<HHIIHH", 0xFFFE if extensible else form, channels, rate, rate * channels * width,
                       channels * width, bits)  # fmt: skip
    if extensible:  # its size, valid bits, places of the speakers, and the format as a GUID
        head += struct.pack("<HHIH", 22, bits, 0, form) + bytes.fromhex("000000001000800000aa00389b71")
    said = 2**32 - 1 if long else len(data)
    body = chunks + b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", said) + data
    if long:
        body = b"ds64" + struct.pack("<IQQQI", 28, len(body) + 40, len(data), len(samples), 0) + body
    return (long or b"RIFF") + struct.pack("<I", (4 + len(body)) % 2**32) + b"WAVE" + body


def write_words(folder, texts, seed, rate=4000):
    """A WAV file for each text, and the table ``words.tsv`` of them, whose path is returned."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for n, text in enumerate(texts):
        write_wav(folder / f"{n}.wav", word(text.replace(" ", ""), rng, rate), rate)
    table = folder / "words.tsv"
    table.write_text("".join(f"{n}.wav\t{text}\n" for n, text in enumerate(texts)), encoding="utf-8")
    return table
