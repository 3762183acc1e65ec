"""WAV files of every kind, resampling, and log-mel features against their definition and against stored ones."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from sounds import tone, write_wav

from gpurnn.data import audio
from gpurnn.data.audio import log_mel, read_wav, resample
from gpurnn.errors import ShapeError


@pytest.fixture(autouse=True)
def nothing_said_yet():
    audio._say_once.cache_clear()


# ---- WAV


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width(tmp_path, width):
    exact = np.array([0, 0.5, -0.5, -1, 127 / 128, 0.3, -0.7])
    samples, rate = read_wav(write_wav(tmp_path / "a.wav", exact, 11025, width))
    assert samples.dtype == np.float32 and rate == 11025
    assert np.abs(samples - exact).max() <= 2.0 ** -(8 * width) + 2**-25  # half a step of the file, one of float32


def test_channels_are_averaged_and_that_is_said_once(tmp_path, caplog):
    left, right = tone(200), tone(300)
    path = write_wav(tmp_path / "a.wav", np.stack([left, right], axis=1))
    with caplog.at_level(logging.WARNING, "gpurnn"):
        samples, _ = read_wav(path)
        read_wav(path)
    assert np.abs(samples - (left + right) / 2).max() < 2**-15
    assert [record.getMessage() for record in caplog.records] == ["WAV files with 2 channels: averaged to one"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "is not a WAV file, or its header is cut off"),
        (lambda data: data[:30], "is not a WAV file"),
        (lambda data: b"ID3" + data[3:], "is not a WAV file of PCM samples"),
        (lambda data: data[:20] + b"\x03" + data[21:], r"is not a WAV file of PCM samples \(unknown format: 3\)"),
        (lambda data: data[:44], "its header says 400 samples, it holds 0"),
        (lambda data: data[:-300], "is cut off: its header says 400 samples, it holds 250"),
        (lambda data: data[:24] + bytes(4) + data[28:], "sampling rate of 0 Hz"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = write_wav(tmp_path / "a.wav", tone(200, 0.05))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"a.wav: .*{message}"):
        read_wav(path)


def test_no_samples(tmp_path):
    with pytest.raises(ValueError, match="a.wav: holds no samples"):
        read_wav(write_wav(tmp_path / "a.wav", np.zeros(0)))
    with pytest.raises(FileNotFoundError):
        read_wav(tmp_path / "b.wav")


@pytest.mark.long
@pytest.mark.parametrize("rate, wanted", [(44100, 8000), (8000, 16000), (22050, 8000)])
def test_resampling_keeps_a_tone(rate, wanted, caplog):
    with caplog.at_level(logging.WARNING, "gpurnn"):
        found = resample(tone(440, rate=rate), rate, wanted)
        resample(tone(440, rate=rate), rate, wanted)
    assert found.dtype == np.float32
    expected = tone(440, rate=wanted)
    assert len(found) == len(expected)
    middle = slice(len(found) // 4, -len(found) // 4)
    assert np.abs(found - expected)[middle].max() < 0.005  # ripple of the filter that resample_poly has by itself
    assert [record.getMessage() for record in caplog.records] == [f"WAV files of {rate} Hz: resampled to {wanted}"]


def test_the_same_rate_is_left_alone(caplog):
    samples = tone(440)
    assert resample(samples, 8000, 8000) is samples and not caplog.records


# ---- log-mel


def test_log_mel_by_its_definition():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(700)
    found = log_mel(samples, 8000, window=25, hop=10, fft=512, bands=7, fmin=100, fmax=3000, floor=1e-3)
    size, step, T = 200, 80, 8  # 7 whole frames, and 20 samples that start an eighth
    assert found.shape == (T, 7) and found.dtype == np.float32
    samples = np.concatenate([samples, np.zeros(60)])
    mel = np.linspace(2595 * np.log10(1 + 100 / 700), 2595 * np.log10(1 + 3000 / 700), 9)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.arange(257)
    turns = np.exp(-2j * np.pi * np.outer(bins, np.arange(size)) / 512)
    for t in range(T):
        frame = samples[t * step : t * step + size] * np.sin(np.pi * np.arange(size) / size) ** 2
        power = np.abs(turns @ frame) ** 2
        for band in range(7):
            weights = np.interp(bins * 8000 / 512, edges[band : band + 3], [0, 1, 0])
            assert found[t, band] == pytest.approx(np.log(weights @ power + 1e-3), rel=1e-6, abs=1e-6)


def test_a_tone_is_loudest_in_its_band():
    low, high = (log_mel(tone(f), 8000, bands=20).mean(axis=0).argmax() for f in (300, 2500))
    assert 2 <= low <= 4 and 14 <= high <= 17


@pytest.mark.parametrize("count, frames", [(1, 1), (199, 1), (200, 1), (201, 2), (280, 2), (281, 3)])
def test_number_of_frames(count, frames):
    assert log_mel(np.ones(count), 8000).shape == (frames, 40)
    assert np.all(log_mel(np.zeros(count), 8000) == np.float32(np.log(1e-6)))


def test_what_is_refused():
    with pytest.raises(ShapeError, match="at least one sample"):
        log_mel(np.zeros(0), 8000)
    with pytest.raises(ValueError, match="fft should be at least the window's 200 samples, got 128"):
        log_mel(np.zeros(10), 8000, fft=128)
    with pytest.raises(ValueError, match="fmax should be .* 4000"):
        log_mel(np.zeros(10), 8000, fmax=5000)
    with pytest.raises(ValueError, match="fmin should be"):
        log_mel(np.zeros(10), 8000, fmin=4000)


def test_the_spoken_digits_come_out_as_they_are_stored():
    folder = Path(os.environ.get("GPURNN_DATA", Path(__file__).parents[2] / "shared" / "data")) / "spoken_digits"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set GPURNN_DATA")
    with np.load(folder / "logmel.npz") as z:
        stored = {name: z[name] for name in ("frames", "length", "label", "speaker", "index", "speaker_names")}
    ends = np.cumsum(stored["length"])
    seen = 0
    for n, (label, speaker, index) in enumerate(zip(*(stored[k] for k in ("label", "speaker", "index")), strict=True)):
        path = folder / "wav" / f"{label}_{stored['speaker_names'][speaker]}_{index}.wav"
        if not path.exists():
            continue
        found = log_mel(*read_wav(path), bands=32, fmin=60, fmax=4000)
        exact = stored["frames"][ends[n] - stored["length"][n] : ends[n]].astype(np.float64)
        assert found.shape == exact.shape
        assert np.abs(found - exact).max() <= 1 / 64 + 1e-6  # stored in steps of 1/32; float32 of numbers below 16
        seen += 1
    assert seen == 120
