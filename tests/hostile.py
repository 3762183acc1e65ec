"""Hostile files: seeded mutations of good ones, bombs, and a process that runs ``gpurnn`` on them within limits.

``Commands`` starts one process that imports all there is and then forks for each command, so that one takes hundredths
of a second and cannot harm the next; it says how the command ended, how long it took and how much memory it had.
"""

import gzip
import io
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
TINY_TASKS = {  # task -> the files of ``good_files`` and the settings of a tiny run
    "text": (["book.txt"], {"steps": 8}),
    "classify": (["labelled.tsv"], {"valid": 0.2, "test": 0.2}),
    "translate": (["pairs.tsv"], {}),
    "speech": (["sounds.tsv"], {"valid": 0.25}),
    "music": (["tunes.json"], {}),
    "series": (["series.csv"], {"window": 6, "horizon": 2}),
    "longrange": ([], {"steps": 5, "sequences": 40}),
}
SECONDS = 60  # after which a command is killed
IMAGES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]
ROOM = 3 << 30  # bytes of address space that a command may take besides what it begins with

# ---- running commands


class Commands:
    """``run(*arguments)`` in a folder; a context manager. root: the checkout whose gpurnn is used."""

    def __init__(self, folder, root=ROOT, room=ROOM):
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GPURNN_NUM_THREADS"), "1")
        environment = os.environ | one | {"PYTHONPATH": str(root), "MPLBACKEND": "Agg"}
        command = [sys.executable, str(Path(__file__).resolve()), str(room)]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, *arguments, stdin=""):
        """{"code", "out", "err", "seconds", "bytes"}: exit code (negative: a signal), what was printed, seconds of the
        processor, peak memory."""
        self.process.stdin.write(json.dumps({"arguments": list(map(str, arguments)), "stdin": stdin}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer | {"command": " ".join(map(str, arguments))[:300]}


def complaints(done, *names, refused=False, seconds=10):
    """What is wrong with how a command ended: a list of sentences. names: of which its error should name one.

    refused: whether it had to refuse. seconds: of the processor that it may take; a busy machine doubles what an idle
    one needs, and the slowest of these files takes 3 s there.
    """
    wrong = []
    errors = [line for line in done["err"].splitlines() if line.startswith("Error: ")]
    if "Traceback" in done["err"] + done["out"]:
        wrong.append("a traceback: " + done["err"].strip().splitlines()[-1][:200])
    if done["code"] not in (0, 1, 2):
        wrong.append(f"exit code {done['code']}")
    if refused and not done["code"]:
        wrong.append("it was not refused")
    if done["code"]:
        if len(errors) != 1:
            wrong.append(f"{len(errors)} lines of errors: {done['err'][-300:]}")
        elif not any(name in errors[0] for name in (*names, "[Errno ")):  # the system's own errors name theirs
            wrong.append(f"names no file: {errors[0][:300]}")
    if len(done["err"]) > 8000:
        wrong.append(f"{len(done['err'])} characters of errors")
    if any(ord(c) < 32 and c not in "\n\t\r" or 127 <= ord(c) < 160 for c in done["err"] + done["out"]):
        wrong.append("control characters")
    if done["seconds"] > seconds:
        wrong.append(f"{done['seconds']:.1f} s")
    if done["bytes"] > 10**9:
        wrong.append(f"{done['bytes'] / 1e6:,.0f} MB")
    return [f"{done['command']}: {sentence}" for sentence in wrong]


def _serve(room):
    """The process of ``Commands``: orders from standard input, answers to standard output."""
    import contextlib
    import importlib
    import resource
    import signal
    import traceback

    from gpurnn.cli import main

    names = [f"gpurnn.tasks.{name}" for name in ("text", "classify", "translate", "speech", "music", "series",
                                                 "longrange")]  # fmt: skip
    for name in (*names, "gpurnn.train", "gpurnn.plots", "mido", "scipy.signal", "matplotlib.figure"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers, orders = os.dup(1), sys.stdin.buffer
    while line := orders.readline():
        order = json.loads(line)
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
        files[0].write(order["stdin"].encode())
        files[0].seek(0)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                for number, file in enumerate(files):
                    os.dup2(file.fileno(), number)
                sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.alarm(SECONDS)
                size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
                main(order["arguments"], prog_name="gpurnn")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        seconds = usage.ru_utime + usage.ru_stime  # of the processor: others may be at work here
        said = []
        for file in files[1:]:
            file.seek(0)
            said.append(file.read(1 << 20).decode("utf-8", "replace"))
        for file in files:
            file.close()
        answer = {"code": os.waitstatus_to_exitcode(status), "out": said[0], "err": said[1], "seconds": seconds,
                  "bytes": usage.ru_maxrss * 1024}  # fmt: skip
        os.write(answers, json.dumps(answer).encode() + b"\n")


# ---- good files


def good_files(folder):
    """Write a small good file of each format into a folder: {name: bytes}."""
    rng = np.random.default_rng(0)
    files = {
        "book.txt": "a gate keeps the state, a state opens the gate.\n" * 12,
        "labelled.tsv": "".join(f"text {n} {['good', 'bad'][n % 2]}\t{['pos', 'neg'][n % 2]}\n" for n in range(24)),
        "pairs.tsv": "".join(f"word {n % 7} here\tmot {n % 7} ici\n" for n in range(30)),
        "series.csv": "month,sales,other\n"
        + "".join(f"{1950 + n // 12}-{n % 12 + 1:02},{np.sin(n) + 3:.4f},{n}\n" for n in range(60)),
        "tunes.json": json.dumps({"train": [[[60 + (n + t) % 5, 64] for t in range(4)] for n in range(12)]}),
        "sounds.tsv": "".join(f"tone.wav\t{'ab'[n % 2]}\n" for n in range(8)),
    }
    files = {name: text.encode() for name, text in files.items()}
    files["tone.wav"] = wav(np.sin(np.arange(800) / 3))
    files["tune.mid"] = midi([(0, 0x90, 60, 64), (96, 0x80, 60, 0), (0, 0x90, 64, 64), (96, 0x90, 64, 0)] * 6)
    roll = (rng.random((36, 88)) < 0.1).astype(np.uint8)
    files["rolls.npz"] = npz(train_roll=roll, train_length=np.full(12, 3))
    pixels = rng.integers(0, 255, (12, 4, 4)).astype(np.uint8)
    files["images.npz"] = npz(x_train=pixels, y_train=np.arange(12) % 2, x_test=pixels, y_test=np.arange(12) % 2)
    files["features.npz"] = npz(
        frames=rng.standard_normal((48, 3)).astype(np.float32), length=np.full(8, 6), label=np.arange(8) % 2
    )
    files["train-images-idx3-ubyte"] = idx(pixels)
    files["train-labels-idx1-ubyte"] = idx(np.arange(12, dtype=np.uint8) % 2)
    files["t10k-images-idx3-ubyte.gz"] = gzip.compress(idx(pixels), mtime=0)
    files["t10k-labels-idx1-ubyte"] = idx(np.arange(12, dtype=np.uint8) % 2)
    for name, data in files.items():
        Path(folder, name).write_bytes(data)
    return files


def npz(compressed=True, **arrays):
    data = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(data, **arrays)
    return data.getvalue()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def wav(samples, rate=8000, **changes):
    """A WAV file of 16 bits. changes: of the numbers in its header."""
    data = np.round(32000 * np.asarray(samples)).astype("<i2").tobytes()
    n = {"form": 1, "channels": 1, "rate": rate, "bits": 16, "fmt": 16, "data": len(data)} | changes
    head = struct.pack("<HHIIHH", n["form"], n["channels"], n["rate"], (2 * n["rate"]) % 2**32, 2, n["bits"])
    chunks = b"fmt " + struct.pack("<I", n["fmt"]) + head + b"data" + struct.pack("<I", n["data"]) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def midi(events, ticks=96):
    """A MIDI file of one track. events: (ticks since the one before, status, number, velocity)."""
    track = b"".join(variable(wait) + bytes(rest) for wait, *rest in events) + b"\0\xff\x2f\0"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, ticks) + b"MTrk" + struct.pack(">I", len(track)) + track


def variable(number):
    """A number in MIDI's form, seven bits in each byte."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127 | 128)
    return bytes(reversed(digits))


def train_all(run, folder=""):
    """Train a tiny run of each task with the function ``run``; returns what each is evaluated on: run -> files."""
    shared = ["--epochs", 1, "--hidden", 4, "--seed", 1, "--backend", "cpu", "--no-progress"]
    batch = ["--batch", 4]
    for name, task, files, more in (
        ("run-text", "text", ["book.txt"], [*batch, "--steps", 8, "--flow"]),
        ("run-classify", "classify", ["labelled.tsv"], batch),
        ("run-translate", "translate", ["pairs.tsv"], batch),
        ("run-series", "series", ["series.csv"], ["--window", 6, "--horizon", 2]),
        ("run-music", "music", ["tunes.json"], batch),
        ("run-speech", "speech", ["sounds.tsv"], [*batch, "--valid", 0.25, "--stack", 1]),
        ("run-rows", "longrange", IMAGES, [*batch, "--problem", "rows", "--valid", 0.25]),
    ):
        done = run("train", task, *files, "--out", name, *shared, *more)
        assert done["code"] == 0, done


# ---- mutations


def mutated(data, name, draw):
    """One mutation of a good file's bytes; draw: a ``random.Random``."""
    kinds = [_flip, _flip, _cut, _byte, _insert, _repeat, _zero, _word]
    if name.endswith((".json", ".jsonl")):
        kinds += 3 * [_json_value, _json_key, _deep]
    elif name.endswith((".txt", ".tsv", ".csv")):
        kinds += 2 * [_text]
    elif name.endswith(".npz"):
        kinds += 2 * [_zip_flag]
    elif name.endswith(".gz"):
        return (
            gzip.compress(mutated(gzip.decompress(data), name[:-3], draw), mtime=0)
            if draw.random() < 0.5
            else _flip(data, draw)
        )
    return draw.choice(kinds)(data, draw)


def _place(data, draw, room=1):
    """Heads are where the numbers are: half of all places lie in the first 64 bytes."""
    end = max(len(data) - room, 0)
    return draw.randint(0, min(end, 64) if draw.random() < 0.5 else end)


def _flip(data, draw):
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        changed[_place(data, draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(data, draw):
    return data[: _place(data, draw)]


def _byte(data, draw):
    changed = bytearray(data)
    changed[_place(data, draw)] = draw.choice((0, 127, 128, 255, 10, 27, 34))
    return bytes(changed)


def _insert(data, draw):
    place = _place(data, draw)
    return data[:place] + draw.randbytes(draw.choice((1, 4, 100))) + data[place:]


def _repeat(data, draw):
    a = _place(data, draw)
    b = min(len(data), a + draw.choice((1, 4, 16, 200)))
    return data[:b] + data[a:b] * draw.choice((1, 2, 50)) + data[b:]


def _zero(data, draw):
    a = _place(data, draw)
    b = min(len(data), a + draw.choice((4, 16, 64)))
    return data[:a] + bytes(b - a) + data[b:]


def _word(data, draw):
    a = _place(data, draw, 4)
    number = draw.choice((0, 1, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, draw.getrandbits(32)))
    return data[:a] + struct.pack(draw.choice("<>") + "I", number) + data[a + 4 :]


_VALUES = (
    None, True, False, 0, 1, -1, 2, 10**9, -(10**9), 2**63, 10**400, 0.5, 1e308, math.nan, math.inf, "", "x", "lstm",
    "\x1b[31m",
    "9" * 5000, [], {}, [[]], [None], {"a": 1}, ["x"] * 100,
)  # fmt: skip


def _documents(data):
    """(documents, how to put them together again) of a JSON file or one of JSON lines."""
    try:
        return [json.loads(data)], lambda found: json.dumps(found[0]).encode()
    except ValueError:
        lines = [json.loads(line) for line in data.splitlines()]
        return lines, lambda found: b"".join(json.dumps(line).encode() + b"\n" for line in found)


def _somewhere(document, draw):
    """A container inside a document, and one of its keys."""
    while True:
        keys = list(document) if isinstance(document, dict) else range(len(document))
        if not keys:
            return None, None
        key = draw.choice(keys)
        if not isinstance(document[key], (dict, list)) or not document[key] or draw.random() < 0.3:
            return document, key
        document = document[key]


def _json_value(data, draw):
    found, joined = _documents(data)
    place, key = _somewhere(draw.choice(found), draw)
    if place is not None:
        place[key] = draw.choice(_VALUES)
    return joined(found)


def _json_key(data, draw):
    found, joined = _documents(data)
    place, key = _somewhere(draw.choice(found), draw)
    if place is not None:
        value = place.pop(key)
        if draw.random() < 0.3 and isinstance(place, dict):
            place["another"] = value
    return joined(found)


def _deep(data, draw):
    depth = draw.choice((100, 990, 5000, 100000))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    nested = opening * depth + (b"1" + closing * depth if draw.random() < 0.7 else b"")
    if draw.random() < 0.5:
        return nested
    number = data.find(b":") + 1
    return data[:number] + nested + b"," + data[number:] if draw.random() < 0.5 else data[:number] + nested


def _text(data, draw):
    place = _place(data, draw)
    added = draw.choice((
        b"\n", b"\t", b",", b"\r", b"\0", b"\xff\xfe", b'"', b";", b"\n\n\n", b"nan", b"1e999", b"-1", b"\x1b[2J",
        b"9" * 400,
        "\u2028\u202e\x85".encode(), b"=cmd|' /C calc'!A0", b"../../../etc/passwd", b"x" * 200000, b"9999-12", b"1e308",
        b"$\\frac{",
    ))  # fmt: skip
    return data[:place] + added + data[place + draw.choice((0, 0, len(added))) :]


def _zip_flag(data, draw):
    """A field of an entry in the zip archive: flags, method, checksum, sizes, offsets."""
    changed = bytearray(data)
    signature, fields = draw.choice(
        ((b"PK\3\4", (4, 6, 8, 14, 18, 22, 26, 28)), (b"PK\1\2", (6, 8, 10, 16, 20, 24, 28, 42)))
    )
    places = [n for n in range(len(data) - 46) if data[n : n + 4] == signature]
    if places:
        start = draw.choice(places) + draw.choice(fields)
        changed[start : start + 2] = struct.pack("<H", draw.choice((1, 9, 12, 99, 255, 0xFFFF, 0)))
    return bytes(changed)


# ---- bombs


def zeros_npz(path, **shapes):
    """A compressed .npz whose arrays of zeros are never in memory: name -> (shape, dtype)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (shape, dtype) in shapes.items():
            with archive.open(name + ".npy", "w", force_zip64=True) as member:
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                    "fortran_order": False,
                    "shape": shape,
                }
                np.lib.format.write_array_header_1_0(member, header)
                left = math.prod(shape) * np.dtype(dtype).itemsize
                while left:
                    left -= member.write(bytes(min(left, 1 << 24)))


def zeros_gzip(path, head, size):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head)
        while size:
            size -= file.write(bytes(min(size, 1 << 24)))


def sparse(path, head=b"", size=50 << 30):
    """A file of 50 GB that takes no place on the disk."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
