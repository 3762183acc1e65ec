"""Compressed sound, resampling, and log-mel features against their definition and against stored ones."""

import io
import logging
import sys

import numpy as np
import pytest
from helpers import DATA
from optional import given, needs, optional
from sounds import tone, write_wav

from gpurnn.data import wav
from gpurnn.data.audio import is_silent, log_mel, read_audio, resample
from gpurnn.errors import FileError, ShapeError

soundfile, st = optional("soundfile"), optional("hypothesis.strategies")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    wav.say_once.cache_clear()


# ---- formats


FORMATS = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


def compressed(kind, subtype, samples, rate=16000):
    data = io.BytesIO()
    soundfile.write(data, samples, rate, format=kind, subtype=subtype)
    return data.getvalue()


@needs("soundfile")
@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_compressed_sound_is_heard_alike(tmp_path, kind, subtype, caplog):
    """Under any name; two channels become one, which is said once."""
    sound = tone(440, 1.0, 16000)
    (tmp_path / "a.dat").write_bytes(compressed(kind, subtype, np.stack([1.5 * sound, 0.5 * sound], axis=1)))
    samples, rate = read_audio(tmp_path / "a.dat")
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == 16000
    assert abs(len(samples) - 16000) < 1152  # a frame of MP3
    peaks = np.abs(np.fft.rfft(samples))
    assert abs(peaks.argmax() * 16000 / len(samples) - 440) < 2
    if kind == "FLAC":
        assert np.abs(samples - sound).max() < 2**-15
    read_audio(tmp_path / "a.dat")
    assert [record.getMessage() for record in caplog.records] == ["Sound with 2 channels: averaged to one"]


@needs("soundfile")
@pytest.mark.parametrize("kind, subtype", FORMATS)
def test_damaged_compressed_sound(tmp_path, kind, subtype):
    data = compressed(kind, subtype, tone(300, 1.0, 16000))
    for broken in (data[: len(data) // 2], data[:20], data[:4] + bytes(500)):
        (tmp_path / "a.flac").write_bytes(broken)
        with pytest.raises(FileError, match=rf"a.flac: is (damaged: it cannot be read as {kind}|cut off)"):
            read_audio(tmp_path / "a.flac")


@needs("soundfile")
def test_compressed_sound_within_the_memory_that_a_file_may_take(tmp_path, monkeypatch):
    """A minute of silence is a small file. A header of FLAC that was written to a pipe has no length."""
    data = compressed("FLAC", "PCM_16", np.zeros(60 * 16000))
    assert len(data) < 20_000
    endless = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]  # 36 bits in the block STREAMINFO
    for name, content in (("a.flac", data), ("b.flac", endless)):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("GPURNN_MAX_MEMORY", "8M")
    with pytest.raises(FileError, match="a.flac: its 960,000 samples would take .* the limit is 8.39 MB"):
        read_audio(tmp_path / "a.flac")
    with pytest.raises(FileError, match="b.flac: its header has no length"):
        read_audio(tmp_path / "b.flac")
    monkeypatch.setenv("GPURNN_MAX_MEMORY", "16M")
    assert len(read_audio(tmp_path / "a.flac")[0]) == 60 * 16000


@pytest.mark.long
@needs("soundfile")
@pytest.mark.parametrize("start", [b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"RIFF", b""])
def test_no_bytes_raise_anything_but_a_file_error(tmp_path, start):
    path = tmp_path / "a.wav"

    @given(lambda: st.binary(max_size=300), max_examples=60)
    def check(data):
        path.write_bytes(start + data)
        try:
            samples, _ = read_audio(path)
        except FileError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert len(samples) and np.isfinite(samples).all()

    check()


@pytest.mark.long
@needs("soundfile")
def test_changed_bytes_raise_nothing_but_a_file_error(tmp_path):
    path = tmp_path / "a.wav"
    good = [compressed(kind, subtype, tone(300, 0.2, 16000)) for kind, subtype in FORMATS]

    @given(lambda: st.tuples(st.sampled_from(good), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)))))
    def check(drawn):
        data = bytearray(drawn[0])
        for place, value in drawn[1]:
            data[place % len(data)] = value
        path.write_bytes(data)
        try:
            samples, _ = read_audio(path)
        except FileError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert len(samples) and np.isfinite(samples).all()

    check()


def test_what_is_no_sound(tmp_path):
    for name, data, words in [
        ("a.mp3", b"", "a.mp3: is empty"),
        ("a.mp3", b"....ftypM4A ", "is not WAV, FLAC, OGG or MP3 by its first bytes. Convert it"),
        ("a.wav", b"....ftypM4A ", "is not a WAV file: it does not begin with RIFF"),
        ("a.mp3", b"RIFF....WAVE", "is not a WAV file, or its header is cut off"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileError, match=words):
            read_audio(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_audio(tmp_path / "none.flac")


def test_without_soundfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(ImportError, match=r'a.flac: FLAC needs soundfile: pip install "gpurnn\[audio\]"'):
        read_audio(tmp_path / "a.flac")
    samples, _ = read_audio(write_wav(tmp_path / "a.wav", tone(200)))
    assert len(samples) == 4000


@pytest.mark.parametrize("samples, silent", [
    (np.zeros(10), True), (np.full(10, 0.25), True), (0.0009 * np.sin(np.arange(100)), True),
    (0.0015 * np.sin(np.arange(100)), False), (np.array([0.0, 0.0, 0.01]), False), (np.array([0.5]), True),
])  # fmt: skip
def test_silence(samples, silent):
    assert is_silent(samples.astype(np.float32)) is silent


# ---- resampling


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
    assert [record.getMessage() for record in caplog.records] == [f"Sound of {rate} Hz: resampled to {wanted}"]


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
    folder = DATA / "spoken_digits"
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
        found = log_mel(*read_audio(path), bands=32, fmin=60, fmax=4000)
        exact = stored["frames"][ends[n] - stored["length"][n] : ends[n]].astype(np.float64)
        assert found.shape == exact.shape
        assert np.abs(found - exact).max() <= 1 / 64 + 1e-6  # stored in steps of 1/32; float32 of numbers below 16
        seen += 1
    assert seen == 120
