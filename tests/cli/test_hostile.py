"""What a hostile file can do: an error of one line that names it, in bounded time and memory, and no traceback."""

import json
import os
import random
import struct
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import IMAGES, complaints
from optional import needs

from gpurnn.data.npz import read_npz
from gpurnn.errors import FileError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
SHORT = ["--epochs", 1, "--hidden", 4, "--batch", 4, "--backend", "cpu", "--no-progress", "--overwrite", "--out", "new"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with good files and tiny runs of all tasks, and the function that runs commands in it."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile.good_files(folder)
    with hostile.Commands(folder) as commands:
        hostile.train_all(commands.run)
        yield folder, commands.run


def write(path, data):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(data)
    return str(path)


# ---- C7: bombs


def bomb_npz_rolls(folder):
    hostile.zeros_npz(folder / "bomb.npz", train_roll=((13_000_000, 88), "u1"), train_length=((1,), "i8"))
    return ["train", "music", "bomb.npz", "--valid", 0, *SHORT]


def bomb_npz_one_piece(folder):
    roll = np.zeros((2_500_000, 88), np.uint8)
    write(folder / "bomb.npz", hostile.npz(train_roll=roll, train_length=np.array([len(roll)])))
    return ["train", "music", "bomb.npz", "--valid", 0, *SHORT]


def bomb_npz_pieces(folder):
    roll, length = np.zeros((10, 88), np.uint8), np.zeros(20_000_000, np.int64)
    length[0] = 10
    write(folder / "bomb.npz", hostile.npz(train_roll=roll, train_length=length))
    return ["train", "music", "bomb.npz", "--valid", 0, *SHORT]


def bomb_npz_images(folder):
    shapes = {"x_train": ((1_500_000, 28, 28), "u1"), "y_train": ((1_500_000,), "u1")}
    hostile.zeros_npz(folder / "bomb.npz", **shapes)
    return ["train", "longrange", "bomb.npz", "--problem", "rows", *SHORT]


def bomb_npz_features(folder):
    hostile.zeros_npz(folder / "bomb.npz", frames=((7_000_000, 40), "f4"), length=((1,), "i8"), label=((1,), "i8"))
    return ["train", "speech", "bomb.npz", *SHORT]


def bomb_npz_utterances(folder):
    ones = np.ones(8_000_000, np.int8)
    write(folder / "bomb.npz", hostile.npz(frames=np.zeros((8_000_000, 1), np.float16), length=ones, label=ones))
    return ["train", "speech", "bomb.npz", *SHORT]


def bomb_npz_header(folder):
    good = hostile.npz(compressed=False, train_roll=np.zeros((4, 88), np.uint8), train_length=np.array([4]))
    write(folder / "bomb.npz", good.replace(b"'shape': (4, 88), }         ", b"'shape': (400000000, 88), } ", 1))
    return ["train", "music", "bomb.npz", *SHORT]


def bomb_gzip_text(folder):
    hostile.zeros_gzip(folder / "bomb.txt.gz", b"a gate\n", 1200 << 20)
    return ["train", "text", "bomb.txt.gz", *SHORT]


def bomb_gzip_lines(folder):
    with hostile.gzip.open(folder / "bomb.tsv.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"a\tb\n" * (1 << 20))
    return ["train", "classify", "bomb.tsv.gz", *SHORT]


def bomb_gzip_images(folder):
    hostile.zeros_gzip(
        folder / "train.gz", bytes([0, 0, 8, 3]) + struct.pack(">3I", 1_200_000, 32, 32), 1_200_000 << 10
    )
    return ["train", "longrange", "train.gz", "--problem", "rows", *SHORT]


def bomb_gzip_more_than_it_says(folder):
    hostile.zeros_gzip(folder / "train.gz", bytes([0, 0, 8, 3]) + struct.pack(">3I", 10, 2, 2), 1200 << 20)
    return ["train", "longrange", "train.gz", "--problem", "rows", *SHORT]


def bomb_idx_header(folder):
    write(folder / "train-images", bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(20))
    return ["train", "longrange", "train-images", "--problem", "rows", *SHORT]


def _images(folder, shape):
    labels = np.arange(shape[0]) % 2
    hostile.zeros_npz(folder / "bomb.npz", x_train=(shape, "u1"), x_test=(shape, "u1"))
    with hostile.zipfile.ZipFile(folder / "bomb.npz", "a") as archive:
        for name in ("y_train", "y_test"):
            with archive.open(name + ".npy", "w") as member:
                np.lib.format.write_array(member, labels.astype(np.uint8))
    return ["train", "longrange", "bomb.npz", *SHORT]


def bomb_many_images(folder):
    return [*_images(folder, (20_000_000, 1, 1)), "--problem", "rows"]


def bomb_wide_images(folder):
    return [*_images(folder, (4, 1, 30_000_000)), "--problem", "rows"]


def bomb_long_images(folder):
    return [*_images(folder, (4, 5000, 5000)), "--problem", "pixels"]


def bomb_wav_rate(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(800), rate=2**32 - 1))
    write(folder / "bomb.tsv", b"bomb.wav\ta\n" * 4)
    return ["train", "speech", "bomb.tsv", *SHORT]


def bomb_wav_resampled(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(800), rate=2**32 - 1))
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_wav_upsampled(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(2_000_000), rate=1))
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_wav_length(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(800), data=2**32 - 1))
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_wav_of_64_bits(folder):
    data = hostile.wav(np.zeros(800), data=2**32 - 1)
    ds64 = b"ds64" + struct.pack("<IQQQI", 28, 2**63, 2**64 - 1, 2**63, 0)
    write(folder / "bomb.wav", b"RF64" + data[4:12] + ds64 + data[12:])
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_wav_channels(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(800_000), channels=2**16 - 1))
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_table_of_missing_sounds(folder):
    write(folder / "bomb.tsv", b"none.wav\ta\n" * 100_000)
    return ["train", "speech", "bomb.tsv", *SHORT]


def bomb_wav_chunks(folder):
    write(folder / "bomb.wav", b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 400_000)
    return ["transcribe", "run-speech", "bomb.wav"]


def bomb_midi(folder):
    data = hostile.midi([(0, 0x90, 60, 64), (0x0FFFFFFF, 0x80, 60, 0)], ticks=1)
    assert len(data) <= 40
    write(folder / "bomb.mid", data)
    return ["train", "music", "bomb.mid", "--valid", 0, *SHORT]


def bomb_midi_endless(folder):
    write(folder / "bomb.mid", hostile.midi([(0, 0x90, 60, 64), (1 << 7000, 0x80, 60, 0)], ticks=1))
    return ["train", "music", "bomb.mid", "--valid", 0, *SHORT]


def bomb_midi_events(folder):
    write(folder / "bomb.mid", hostile.midi([(0, 0x90, 60, 64)] * 2_000_000))
    return ["train", "music", "bomb.mid", "--valid", 0, *SHORT]


EVERY = "".join(chr(point) for point in range(32, 0x110000) if not 0xD800 <= point < 0xE000)


def bomb_text_of_every_character(folder):
    write(folder / "bomb.txt", EVERY.encode())
    return ["train", "text", "bomb.txt", *SHORT]


def bomb_table_of_every_character(folder):
    lines = (f"{EVERY[n : n + 1000]}\t{'ab'[n // 1000 % 2]}\n" for n in range(0, len(EVERY), 1000))
    write(folder / "bomb.tsv", "".join(lines).encode())
    return ["train", "classify", "bomb.tsv", "--level", "characters", *SHORT]


def bomb_pairs_of_many_words(folder):
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c + d for a in "abcd" for b in letters for c in letters for d in letters]
    lines = [" ".join(words[n : n + 40]) for n in range(0, len(words), 40)] * 2
    write(folder / "bomb.tsv", "".join(f"{line}\t{line}\n" for line in lines).encode())
    return ["train", "translate", "bomb.tsv", *SHORT, "--hidden", 400]


def bomb_transcripts_of_every_character(folder):
    write(folder / "bomb.wav", hostile.wav(np.zeros(800)))
    lines = (f"bomb.wav\t{EVERY[n : n + 100_000]}x\n" for n in range(1000, len(EVERY), 100_000))
    write(folder / "bomb.tsv", ("".join(lines) + "bomb.wav\tx\n" * 40).encode())
    return ["train", "speech", "bomb.tsv", *SHORT]


def bomb_csv_columns(folder):
    row = ",".join(str(n % 7) for n in range(300_000))
    write(folder / "bomb.csv", "\n".join([",".join(f"c{n}" for n in range(300_000)), *[row] * 12]).encode())
    return ["train", "series", "bomb.csv", "--inputs", "all", "--window", 2, "--horizon", 1, *SHORT]


def bomb_json_lists(folder):
    write(folder / "bomb.json", b"[[" + b"[]," * 7_000_000 + b"[]]]")
    return ["train", "music", "bomb.json", "--valid", 0, *SHORT]


def bomb_json_line(folder):
    write(folder / "bomb.jsonl", b'{"text": [' + b"[]," * 18_000_000 + b'[]], "label": 1}\n')
    return ["train", "classify", "bomb.jsonl", *SHORT]


def bomb_json_fields(folder):
    lines = (json.dumps({"text": "a", f"f{n}": 1}) + "\n" for n in range(2000))
    write(folder / "bomb.tsv", "".join(lines).encode())
    return ["train", "classify", "bomb.tsv", *SHORT]


def bomb_csv_quote(folder):
    write(folder / "bomb.csv", b'text,label\n"a' + b"a," * 20_000_000)
    return ["train", "classify", "bomb.csv", *SHORT]


def bomb_json_deep(folder):
    write(folder / "bomb.json", b"[" * 5_000_000)
    return ["train", "music", "bomb.json", *SHORT]


def bomb_table_lines(folder):
    write(folder / "bomb.tsv", b"a\tb\n" * 20_000_000)
    return ["train", "classify", "bomb.tsv", *SHORT]


def bomb_table_pairs(folder):
    write(folder / "bomb.tsv", b"\n" * 100_000_000)
    return ["train", "translate", "bomb.tsv", *SHORT]


def bomb_csv_cells(folder):
    write(folder / "bomb.csv", b"a,b\n" + b"," * 100_000_000)
    return ["train", "series", "bomb.csv", *SHORT]


def bomb_history(folder):
    write(folder / "bomb" / "history.jsonl", b"{}\n" * 60_000_000)
    return ["plot", "bomb"]


def bomb_flow(folder):
    write(folder / "bomb" / "history.jsonl", (folder / "run-text" / "history.jsonl").read_bytes())
    write(folder / "bomb" / "gradient_flow.jsonl", b'{"layers": {"a": {"dh": [' + b"1," * 60_000_000 + b"1]}}}\n")
    return ["plot", "bomb"]


def _run(folder, **changes):
    """A copy of a run without the SHA-256 of its settings, with other settings."""
    (folder / "bomb").mkdir(exist_ok=True)
    for file in (folder / "run-text").iterdir():
        write(folder / "bomb" / file.name, file.read_bytes())
    document = json.loads((folder / "bomb" / "config.json").read_text())
    document.pop("sha256", None)
    document["settings"] |= changes
    write(folder / "bomb" / "config.json", json.dumps(document).encode())


def bomb_hidden(folder):
    _run(folder, hidden=6000)
    return ["sample", "bomb"]


def bomb_hidden_resumed(folder):
    _run(folder, hidden=6000)
    return ["train", "text", "--out", "bomb", "--resume", "--epochs", 2, "--no-progress"]


def bomb_embedding(folder):
    _run(folder, embedding=20_000_000)
    return ["sample", "bomb"]


def bomb_layers(folder):
    _run(folder, layers=10**7)
    return ["sample", "bomb"]


def _npy(header, version, data=bytes(4)):
    header = header.encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


BOMBS = [value for name, value in list(globals().items()) if name.startswith("bomb_")]
SPARSE = {
    "huge.txt": ["train", "classify", "huge.txt", *SHORT], "huge.json": ["train", "music", "huge.json", *SHORT],
    "huge.mid": ["train", "music", "huge.mid", *SHORT], "huge.csv": ["train", "series", "huge.csv", *SHORT],
    "huge.npz": ["train", "music", "huge.npz", *SHORT], "huge.wav": ["transcribe", "run-speech", "huge.wav"],
    "train-huge": ["train", "longrange", "train-huge", "--problem", "rows", *SHORT],
}  # fmt: skip


@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_of_arrays(tmp_path, version):
    """Of all versions of the format; one that is nested deeper than Python parses is no lack of memory."""
    path = tmp_path / "x.npz"
    for descr, value in (("'<f4'", 0.0), ("[('caf\u00e9', '<f4')]" if version == 3 else "[('a', '<f4')]", (0.0,))):
        with hostile.zipfile.ZipFile(path, "w") as archive:
            header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}"
            archive.writestr("x.npy", _npy(header, version))
        assert read_npz(path, lambda name: True)["x"].tolist() == [value]
    for deep in ("-" * 9000 + "1", "(" * 3000, "[" * 200 + "]" * 200):
        with hostile.zipfile.ZipFile(path, "w") as archive:
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({deep},), }}"
            archive.writestr("x.npy", _npy(header, version))
        with pytest.raises(FileError, match="x.npz"):
            read_npz(path, lambda name: True)


@pytest.mark.long
@needs("mido")
@needs("scipy")
@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_bombs(place, bomb):
    folder, run = place
    for file in folder.glob("bomb/*"):
        file.unlink()
    arguments = bomb(folder)
    assert complaints(run(*arguments), "bomb", "train.gz", "train-images", refused=True) == []


@pytest.mark.long
@needs("mido")
def test_half_a_million_events_of_midi_are_read(place):
    """In three times what mido needs to parse the file, and a start: its merging of tracks took five times as long."""
    import mido

    folder, run = place
    write(folder / "many.mid", hostile.midi([(0, 0x90, 60, 64), (1, 0x80, 60, 0)] * 250_000, ticks=960))
    start = time.process_time()
    mido.MidiFile(folder / "many.mid")
    parsing = time.process_time() - start
    done = run("train", "music", "many.mid", "--valid", 0, *SHORT)
    assert done["code"] == 0 and complaints(done, seconds=3 * parsing + 3) == []


@pytest.mark.long
@needs("mido")
@pytest.mark.parametrize("name", SPARSE)
def test_files_of_fifty_gigabytes(place, name):
    folder, run = place
    heads = {"huge.wav": hostile.wav(np.zeros(4), data=2**32 - 2), "train-huge": b"\0\0\x08\x03" + b"\xff" * 12}
    hostile.sparse(folder / name, heads.get(name, b""))
    assert complaints(run(*SPARSE[name]), name, refused=True) == []


@pytest.mark.long
@pytest.mark.parametrize("name", ["config.json", "best.json", "history.jsonl", "gradient_flow.jsonl", "tensors"])
@pytest.mark.parametrize("what", ["fifo", "sparse", "folder"])
def test_odd_files_in_a_run(place, name, what):
    """A link to a pipe would make a reader wait for ever."""
    folder, run = place
    for file in folder.glob("bomb/*"):
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
    _run(folder)
    path = next((folder / "bomb").glob("best-*.safetensors")) if name == "tensors" else folder / "bomb" / name
    path.unlink()
    if what == "fifo":
        if not (folder / "pipe").exists():
            os.mkfifo(folder / "pipe")
        path.symlink_to(folder / "pipe")
    elif what == "folder":
        path.mkdir()
    else:
        hostile.sparse(path)
    arguments = ["plot", "bomb"] if "jsonl" in name else ["sample", "bomb"]
    done = run(*arguments)
    optional = name == "gradient_flow.jsonl" and what != "sparse"  # not drawn then
    assert complaints(done, "bomb", refused=not optional) == []


@pytest.mark.long
@needs("mido")
@pytest.mark.parametrize("suffix", [".txt", ".tsv", ".csv", ".json", ".npz", ".mid", ".wav", "-train"])
def test_links_to_pipes(place, suffix):
    folder, run = place
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    link = folder / f"link{suffix}"
    link.symlink_to(folder / "pipe")
    task = {".txt": "text", ".tsv": "translate", ".csv": "series", "-train": "longrange"}.get(suffix, "music")
    more = ["--problem", "rows"] if task == "longrange" else []
    arguments = ["transcribe", "run-speech"] if suffix == ".wav" else ["train", task, *more, *SHORT]
    assert complaints(run(*arguments, link.name), link.name, refused=True) == []


@pytest.mark.long
def test_an_option_lifts_the_limit(place):
    folder, run = place
    write(folder / "many.tsv", (folder / "labelled.tsv").read_bytes() * 100)
    small = ["train", "classify", "many.tsv", "--max-memory", "100K", *SHORT]
    refused = run(*small)
    assert complaints(refused, "many.tsv", refused=True) == [] and "--max-memory 1G" in refused["err"]
    for enough in ("1G", "0"):
        done = run(*(enough if word == "100K" else word for word in small))
        assert done["code"] == 0, done
    assert "max_memory should be" in run(*("many" if word == "100K" else word for word in small))["err"]


# ---- C6: mutations


COMMANDS = {
    "book.txt": ["evaluate", "run-text", "book.txt"],
    "labelled.tsv": ["evaluate", "run-classify", "labelled.tsv"],
    "pairs.tsv": ["train", "translate", "pairs.tsv", *SHORT],
    "series.csv": ["train", "series", "series.csv", *SHORT[:-1], "new", "--window", 6, "--horizon", 2],
    "tunes.json": ["evaluate", "run-music", "tunes.json"],
    "sounds.tsv": ["evaluate", "run-speech", "sounds.tsv"],
    "tone.wav": ["transcribe", "run-speech", "tone.wav"],
    "tune.mid": ["evaluate", "run-music", "tune.mid"],
    "rolls.npz": ["evaluate", "run-music", "rolls.npz"],
    "images.npz": ["evaluate", "run-rows", "images.npz"],
    "features.npz": ["train", "speech", "features.npz", *SHORT, "--valid", 0.25, "--stack", 1],
    "train-images-idx3-ubyte": ["train", "longrange", *IMAGES, "--problem", "rows", "--valid", 0.25, *SHORT],
    "t10k-images-idx3-ubyte.gz": ["train", "longrange", *IMAGES, "--problem", "rows", "--valid", 0.25, *SHORT],
    "t10k-labels-idx1-ubyte": ["train", "longrange", *IMAGES, "--problem", "rows", "--valid", 0.25, *SHORT],
    "run-text/config.json": ["sample", "run-text", "--length", 5],
    "run-music/config.json": ["evaluate", "run-music", "tunes.json"],
    "run-speech/config.json": ["transcribe", "run-speech", "tone.wav"],
    "run-series/config.json": ["forecast", "run-series"],
    "run-translate/config.json": ["translate", "run-translate", "word"],
    "run-classify/config.json": ["classify", "run-classify", "word"],
    "run-rows/config.json": ["evaluate", "run-rows", "images.npz"],
    "run-text/best.json": ["sample", "run-text", "--length", 5],
    "run-text/last.json": ["train", "text", "--out", "run-text", "--resume", "--epochs", 2, "--no-progress"],
    "run-text/history.jsonl": ["plot", "run-text"],
    "run-text/gradient_flow.jsonl": ["plot", "run-text"],
    "run-text/tensors": ["sample", "run-text", "--length", 5],
}


def mutate_all(place, count, seed):
    """Complaints about ``count`` mutations of each file; every file is put back."""
    folder, run = place
    wrong, codes = [], {}
    for name, arguments in COMMANDS.items():
        path = next((folder / "run-text").glob("best-*.safetensors")) if name.endswith("tensors") else folder / name
        good = path.read_bytes()
        around = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} if "run-" in name else {}
        draw = random.Random(f"{seed} {name}")
        for number in range(count):
            data = hostile.mutated(good, path.name, draw)
            if "config.json" in name and number % 2:
                data = without_digest(data)
            path.write_bytes(data)
            done = run(*arguments)
            codes[done["code"]] = codes.get(done["code"], 0) + 1
            found = complaints(done, path.name, path.name.partition(".")[0], "run-")
            if found:
                wrong.append(f"{name} {number}: {found}")
            for file, content in around.items():
                if not file.exists() or file.read_bytes() != content:
                    file.write_bytes(content)
            path.write_bytes(good)
    return wrong, codes


def without_digest(data):
    """As of the first edition: its settings had no checksum, so that mutations reach what reads them."""
    try:
        document = json.loads(data)
        document.pop("sha256", None)
        return json.dumps(document).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


@pytest.mark.slow
@needs("mido")
@needs("scipy")
@needs("matplotlib")
def test_many_mutations(place):
    wrong, codes = mutate_all(place, int(os.environ.get("GPURNN_MUTATIONS", 15)), int(os.environ.get("GPURNN_SEED", 2)))
    assert wrong == [], "\n".join(wrong)
    assert codes[2] and codes[1]
