"""WAV files of every kind, and hostile ones."""

import logging
import struct

import numpy as np
import pytest
from optional import given, optional
from sounds import tone, wav_bytes, write_wav

from gpurnn.data import wav
from gpurnn.data.wav import read_wav
from gpurnn.errors import FileError

st = optional("hypothesis.strategies")


@pytest.fixture(autouse=True)
def nothing_said_yet():
    wav.say_once.cache_clear()


# ---- what is read


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
    assert [record.getMessage() for record in caplog.records] == ["Sound with 2 channels: averaged to one"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"", "is not a WAV file, or its header is cut off"),
        (lambda data: data[:30], "is not a WAV file"),
        (lambda data: b"ID3" + data[3:], "is not a WAV file: it does not begin with RIFF and WAVE"),
        (lambda data: b"RIFX" + data[4:], r"big-endian numbers \(RIFX\)"),
        (
            lambda data: data[:20] + b"\x07" + data[21:],
            "is a WAV file of format 7, mu-law: PCM and floating point are read",
        ),
        (lambda data: data[:20] + b"\xfe\xff" + data[22:], "its header is cut off"),
        (lambda data: data[:20] + b"\x03" + data[21:], "1 channels of floating point of 16 bits"),
        (lambda data: data[:32] + b"\x04" + data[33:], "1 channels of 16 bits, but 4 bytes for one sample"),
        (lambda data: data[:22] + b"\0" + data[23:], "0 channels of PCM of 16 bits"),
        (lambda data: data[:12] + data[36:], "its format does not come before its samples"),
        (lambda data: data[:40] + b"\xff" * 4 + data[44:], "was written to a pipe"),
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


EXACT = np.array([0, 0.5, -0.5, -1, 127 / 128, 0.3, -0.7])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("extensible", [False, True])
def test_floating_point(tmp_path, bits, extensible):
    exact = np.append(EXACT, [1.5, -3])  # above full scale, as a mix before its limiter
    (tmp_path / "a.wav").write_bytes(wav_bytes(exact, 48000, bits=bits, floats=True, extensible=extensible))
    samples, rate = read_wav(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and rate == 48000
    assert np.array_equal(samples, exact.astype(np.float32))


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_extensible_headers_hold_the_same(tmp_path, bits):
    for name, extensible in (("a.wav", False), ("b.wav", True)):
        (tmp_path / name).write_bytes(wav_bytes(EXACT, 8000, bits=bits, extensible=extensible))
    (plain, _), (other, rate) = read_wav(tmp_path / "a.wav"), read_wav(tmp_path / "b.wav")
    assert np.array_equal(plain, other) and rate == 8000 and len(plain) == len(EXACT)
    assert np.abs(plain - EXACT).max() <= 2.0**-(bits) + 2**-25


@pytest.mark.parametrize("floats, bits", [(False, 24), (True, 32), (True, 64)])
def test_channels_of_every_width_are_averaged(tmp_path, floats, bits):
    channels = np.stack([EXACT, EXACT[::-1], np.zeros(7)], axis=1)
    (tmp_path / "a.wav").write_bytes(wav_bytes(channels, 8000, bits=bits, floats=floats))
    samples, _ = read_wav(tmp_path / "a.wav")
    assert np.abs(samples - channels.mean(axis=1)).max() <= 2**-23


def test_chunks_around_format_and_samples_are_passed_over(tmp_path):
    """Of odd length, which a byte makes even, of none, and with the name of another format."""
    chunks = b"LIST\x03\0\0\0abc\0" + b"fake\0\0\0\0" + b"bext\x02\0\0\0hi"
    (tmp_path / "a.wav").write_bytes(wav_bytes(EXACT, 8000, chunks=chunks) + b"junk after the samples")
    (tmp_path / "b.wav").write_bytes(wav_bytes(EXACT, 8000))
    assert np.array_equal(read_wav(tmp_path / "a.wav")[0], read_wav(tmp_path / "b.wav")[0])


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_lengths_of_64_bits(tmp_path, name):
    (tmp_path / "a.wav").write_bytes(wav_bytes(EXACT, 8000, long=name))
    (tmp_path / "b.wav").write_bytes(wav_bytes(EXACT, 8000))
    assert np.array_equal(read_wav(tmp_path / "a.wav")[0], read_wav(tmp_path / "b.wav")[0])
    data = wav_bytes(EXACT, 8000, long=name)
    (tmp_path / "a.wav").write_bytes(data.replace(struct.pack("<Q", 14), struct.pack("<Q", 2**63), 1))
    with pytest.raises(FileError, match=f"a.wav: is cut off: its header says {2**62} samples, it holds 7"):
        read_wav(tmp_path / "a.wav")


def test_a_long_file_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(wav, "PIECE", 16)
    exact = np.random.default_rng(0).uniform(-1, 1, (101, 3))
    for floats, bits in ((False, 16), (True, 32)):
        (tmp_path / "a.wav").write_bytes(wav_bytes(exact, 8000, bits=bits, floats=floats))
        samples, _ = read_wav(tmp_path / "a.wav")
        assert np.abs(samples - exact.mean(axis=1)).max() < 2**-15
    exact[90] = np.inf
    (tmp_path / "a.wav").write_bytes(wav_bytes(exact, 8000, bits=32, floats=True))
    with pytest.raises(FileError, match="a.wav: sample 90 is inf"):
        read_wav(tmp_path / "a.wav")


# ---- what is refused


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(
    "value, words",
    [
        (np.nan, "sample 3 is nan: the samples should be finite numbers"),
        (-np.inf, "sample 3 is -inf: the samples should be finite"),
        (32767.0, "sample 3 is 32767, where full scale is 1"),
        (-101.0, "sample 3 is -101, where full scale is 1"),
    ],
)
def test_samples_that_are_none(tmp_path, bits, value, words):
    samples = np.zeros((9, 2))
    samples[3, 1] = value
    (tmp_path / "a.wav").write_bytes(wav_bytes(samples, 8000, bits=bits, floats=True))
    with pytest.raises(FileError, match=f"a.wav: {words}"):
        read_wav(tmp_path / "a.wav")


def test_an_extensible_header_of_another_kind(tmp_path):
    data = wav_bytes(EXACT, 8000, extensible=True)
    (tmp_path / "a.wav").write_bytes(data.replace(b"\xaa\x008\x9bq", b"\xaa\x008\x9br", 1))
    with pytest.raises(FileError, match="is a WAV file of format 65534: PCM and floating point are read"):
        read_wav(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(data.replace(b"\x01\0\0\0\0\0\x10", b"\x06\0\0\0\0\0\x10", 1))
    with pytest.raises(FileError, match="format 6, A-law"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "form, name", [(2, "2, Microsoft ADPCM"), (17, "17, IMA ADPCM"), (85, "85, MP3"), (300, "300")]
)
def test_other_formats_are_named(tmp_path, form, name):
    data = wav_bytes(EXACT, 8000)
    (tmp_path / "a.wav").write_bytes(data[:20] + struct.pack("<H", form) + data[22:])
    with pytest.raises(FileError, match=f"a.wav: is a WAV file of format {name}: PCM and floating point are read"):
        read_wav(tmp_path / "a.wav")


def headers():
    """WAV files with numbers of any size in their headers, some of them cut."""
    number = st.one_of(st.sampled_from([0, 1, 2, 3, 8, 16, 24, 32, 64, 0xFFFE]), st.integers(0, 2**16 - 1))
    length = st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1))
    chunk = st.builds(
        lambda name, said, data: name + struct.pack("<I", said) + data,
        st.sampled_from([b"fmt ", b"data", b"ds64", b"LIST"]), length, st.binary(max_size=64),
    )  # fmt: skip
    form = st.builds(
        lambda form, channels, rate, block, bits, rest: b"fmt " + struct.pack(
            "<IHHIIHH", 16 + len(rest), form, channels, rate, 0, block, bits
        ) + rest,
        number, number, length, number, number, st.sampled_from([b"", b"\x16\0" + bytes(22), bytes(40)]),
    )  # fmt: skip
    parts = st.lists(st.one_of(form, chunk), max_size=5)
    return st.builds(
        lambda name, parts, cut: (name + bytes(4) + b"WAVE" + b"".join(parts))[: cut or None],
        st.sampled_from([b"RIFF", b"RF64", b"RIFX", b"BW64"]), parts, st.integers(0, 200),
    )  # fmt: skip


def changed_files():
    """Good files with some bytes replaced, or cut."""
    good = [
        wav_bytes(EXACT, 8000, bits=bits, floats=floats, extensible=extensible, long=long)
        for bits, floats in ((8, False), (16, False), (24, False), (32, False), (32, True), (64, True))
        for extensible in (False, True)
        for long in (None, b"RF64")
    ]
    change = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=4)

    def apply(data, changes, cut):
        data = bytearray(data)
        for place, value in changes:
            data[place % len(data)] = value
        return bytes(data[: cut or None])

    return st.builds(apply, st.sampled_from(good), change, st.integers(0, 160))


@pytest.mark.long
@pytest.mark.parametrize("strategy", [lambda: st.binary(max_size=200), headers, changed_files])
def test_no_bytes_raise_anything_but_a_file_error(tmp_path, strategy):
    path, outcomes = tmp_path / "a.wav", set()

    @given(strategy, max_examples=300)
    def check(data):
        path.write_bytes(data)
        try:
            samples, rate = read_wav(path)
        except FileError as error:
            outcomes.add("refused")
            assert str(error).startswith(f"{path}: ")
        else:
            outcomes.add("read")
            assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples) and rate >= 1
            assert np.isfinite(samples).all() and np.abs(samples).max() <= 100

    check()
    assert "refused" in outcomes and ("read" in outcomes or strategy is not changed_files)
