import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from optional import needs, optional

import gpurnn
from gpurnn.checkpoint import (
    CheckpointError,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from gpurnn.files import write_json_atomic, write_text_atomic

ml_dtypes = optional("ml_dtypes")


def example(value=1.0):
    arrays = {
        "w": np.full((3, 2), value, np.float32),
        "strided": np.arange(12.0).reshape(3, 4).T[::2],
        "scalar": np.array(value),
        "empty": np.zeros((0, 5)),
        "ids": np.arange(4, dtype=np.int64),
    }
    return arrays, {"epoch": 3, "lr": 0.1 + 0.2, "value": value, "name": "déjà", "none": None}


def tensor_files(folder):
    return sorted(folder.glob("*.safetensors"))


def test_round_trip_is_exact(tmp_path):
    arrays, document = example()
    save_checkpoint(tmp_path / "last.json", arrays, document)
    loaded, loaded_document = load_checkpoint(tmp_path / "last.json")
    assert loaded_document == document
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)


def test_second_save_replaces_and_leaves_only_its_own_files(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path / "last.json", *example(value))
        save_checkpoint(tmp_path / "last-2.json", *example(10 * value))
    assert load_checkpoint(tmp_path / "last.json")[1]["value"] == 2.0
    assert load_checkpoint(tmp_path / "last-2.json")[1]["value"] == 20.0
    assert len(list(tmp_path.iterdir())) == 4
    remove_checkpoint(tmp_path / "last.json")
    assert load_checkpoint(tmp_path / "last-2.json")[1]["value"] == 20.0
    assert len(list(tmp_path.iterdir())) == 2
    remove_checkpoint(tmp_path / "last.json")


def damage_truncate(folder):
    file = tensor_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-1])
    return file.name, "bytes"


def damage_flip_bit(folder):
    file = tensor_files(folder)[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file.name, "SHA-256"


def damage_missing_tensors(folder):
    file = tensor_files(folder)[0]
    file.unlink()
    return file.name, "missing"


def damage_missing_json(folder):
    (folder / "last.json").unlink()
    return "last.json", "cannot be read"


def damage_json_truncated(folder):
    file = folder / "last.json"
    file.write_bytes(file.read_bytes()[:-20])
    return "last.json", "not JSON"


def damage_json_nan(folder):
    file = folder / "last.json"
    file.write_text(file.read_text().replace('"epoch": 3', '"epoch": NaN'))
    return "last.json", "not JSON"


def damage_json_binary(folder):
    (folder / "last.json").write_bytes(b"\xff\x00\xfe")
    return "last.json", "not JSON"


def damage_json_nested(folder):
    (folder / "last.json").write_bytes(b"[" * 200_000)
    return "last.json", "not JSON"


def damage_document(folder):
    file = folder / "last.json"
    file.write_text(file.read_text().replace('"epoch": 3', '"epoch": 4'))
    return "last.json", "document"


def damage_other_json(folder):
    (folder / "last.json").write_text("[1, 2]")
    return "last.json", "not a gpurnn checkpoint"


def damage_version(folder):
    edit(folder, version=99)
    return "last.json", "version 99"


def damage_path_escape(folder):
    edit(folder, tensors={"file": "../secret.safetensors", "size": 1, "sha256": ""})
    return "last.json", "names no tensor file"


def damage_infinite_entry(folder):
    edit(folder, tensors=json.loads((folder / "last.json").read_text())["tensors"] | {"infinite": 3})
    return "last.json", "does not say"


def damage_tensors_entry(folder):
    edit(folder, tensors=None)
    return "last.json", "names no tensor file"


def edit(folder, **changes):
    header = json.loads((folder / "last.json").read_text())
    (folder / "last.json").write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    "damage", [value for name, value in list(globals().items()) if name.startswith("damage_")], ids=lambda f: f.__name__
)
def test_damage_is_named(tmp_path, damage):
    save_checkpoint(tmp_path / "last.json", *example())
    file, reason = damage(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "last.json")
    assert file in str(caught.value)
    assert reason in str(caught.value)
    save_checkpoint(tmp_path / "last.json", *example(7.0))  # a damaged checkpoint does not stop the next save
    assert load_checkpoint(tmp_path / "last.json")[1]["value"] == 7.0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, monkeypatch):
    save_checkpoint(tmp_path / "last.json", *example())
    arrays, document = example()
    arrays["w"][1, 1] = bad
    with pytest.raises(CheckpointError, match="'w'.*not finite"):
        save_checkpoint(tmp_path / "last.json", arrays, document)
    load_checkpoint(tmp_path / "last.json")
    with monkeypatch.context() as patch:  # written by something that did not check
        patch.setattr("gpurnn.checkpoint.check_finite", lambda *arguments: None)
        save_checkpoint(tmp_path / "last.json", arrays, document)
    with pytest.raises(CheckpointError, match=r"last-.*\.safetensors: array 'w'"):
        load_checkpoint(tmp_path / "last.json")


def test_infinity_where_it_is_allowed(tmp_path):
    arrays = {"w": np.ones(3, np.float32), "squares": np.array([1, np.inf], np.float32), "fine": np.ones(2)}
    save_checkpoint(tmp_path / "last.json", arrays, {}, infinite=["squares", "fine"])
    loaded, _ = load_checkpoint(tmp_path / "last.json")
    np.testing.assert_array_equal(loaded["squares"], arrays["squares"])
    for wrong in ({"squares": np.array([np.nan])}, {"squares": np.array([-np.inf])}, {"w": np.array([np.inf])}):
        with pytest.raises(CheckpointError, match=f"'{next(iter(wrong))}'.*not finite"):
            save_checkpoint(tmp_path / "last.json", arrays | wrong, {}, infinite=["squares"])
    header = json.loads((tmp_path / "last.json").read_text())
    assert header["tensors"].pop("infinite") == ["squares"]
    (tmp_path / "last.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="'squares'.*not finite"):
        load_checkpoint(tmp_path / "last.json")


def test_bfloat16_round_trips_with_equal_bits(tmp_path):
    bfloat16 = ml_dtypes.bfloat16
    arrays = {"s": np.linspace(-3, 3, 24).reshape(2, 3, 4).astype(bfloat16), "empty": np.zeros((0, 5), bfloat16)}
    save_checkpoint(tmp_path / "last.json", arrays, {})
    loaded, _ = load_checkpoint(tmp_path / "last.json")
    for name, array in arrays.items():
        assert loaded[name].dtype == bfloat16
        np.testing.assert_array_equal(loaded[name], array)
    for bad in (np.nan, np.inf):
        arrays["s"][0, 0, 0] = bad
        with pytest.raises(CheckpointError, match="'s'.*not finite"):
            save_checkpoint(tmp_path / "last.json", arrays, {})
    load_checkpoint(tmp_path / "last.json")


def test_bfloat16_without_ml_dtypes(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.json", {"s": np.zeros(3, ml_dtypes.bfloat16)}, {})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(CheckpointError, match=r"last-.*\.safetensors: array 's' cannot be read.*pip install ml_dtypes"):
        load_checkpoint(tmp_path / "last.json")


@needs("ml_dtypes")  # registers its dtypes' names
@pytest.mark.parametrize(
    ("name", "dtype", "error", "message"),
    [
        ("a", "complex128", gpurnn.DtypeError, "array 'a' should be of one of the dtypes .*bfloat16.* got complex128"),
        ("a", "float8_e4m3fn", gpurnn.DtypeError, "'a'.* got float8_e4m3fn"),
        ("a", "float8_e5m2", gpurnn.DtypeError, "'a'.* got float8_e5m2"),
        ("a", object, gpurnn.DtypeError, "'a'.* got object"),
        ("a", "M8[s]", gpurnn.DtypeError, "'a'.* got datetime64"),
        ("__metadata__", "float32", ValueError, "'__metadata__'"),
        (1, "float32", TypeError, "names of arrays should be strings, got 1"),
        ("\ud800", "float32", CheckpointError, "cannot be written"),
    ],
)
def test_what_could_not_be_read_again_is_refused_before_anything_is_touched(tmp_path, name, dtype, error, message):
    save_checkpoint(tmp_path / "last.json", *example())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "last.json", {"w": np.ones(3), name: np.zeros(2, dtype)}, {})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_array_of_a_dtype_that_is_not_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("gpurnn.checkpoint._check_saveable", lambda path, arrays: None)
    save_checkpoint(tmp_path / "last.json", {"w": np.ones(3, ml_dtypes.float8_e4m3fn)}, {})
    with pytest.raises(CheckpointError, match=r"last-.*\.safetensors: array 'w' is of the dtype F8_E4M3"):
        load_checkpoint(tmp_path / "last.json")


def test_what_is_not_json_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="document"):
        save_checkpoint(tmp_path / "last.json", {}, {"path": tmp_path})
    with pytest.raises(TypeError, match="document"):
        save_checkpoint(tmp_path / "last.json", {}, {"loss": float("nan")})
    with pytest.raises(ValueError, match=r"\.json"):
        save_checkpoint(tmp_path / "last", {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize("first", [True, False])
def test_disk_full_at_any_flush(tmp_path, monkeypatch, call, first):
    """The fsync calls of a save: tensor file, folder, JSON file, folder. The fourth comes after the commit."""
    path = tmp_path / "last.json"
    if not first:
        save_checkpoint(path, *example(1.0))
    before = sorted(tmp_path.iterdir())
    calls = 0
    fsync = os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="last.json.*No space left") as caught:
            save_checkpoint(path, *example(2.0))
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not list(tmp_path.glob(".*"))
    if call < 4:
        assert sorted(tmp_path.iterdir()) == before
    if call == 4 or not first:
        assert load_checkpoint(path)[1]["value"] == (2.0 if call == 4 else 1.0)
    save_checkpoint(path, *example(3.0))
    assert len(list(tmp_path.iterdir())) == 2


CRASH = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from gpurnn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

def content(value):
    return {"w": np.full(100, value)}, {"value": value}

def child(folder, n):
    "Save, and die at the n-th system call that changes the disk."
    calls = 0
    def wrap(function):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapped
    for name in ("open", "write", "fsync", "replace", "unlink"):
        setattr(os, name, wrap(getattr(os, name)))
    save_checkpoint(folder / "last.json", *content(2.0))

seen = set()
for n in range(1, 50):
    folder = Path(sys.argv[1]) / str(n)
    folder.mkdir()
    save_checkpoint(folder / "last.json", *content(1.0))
    pid = os.fork()
    if pid == 0:
        child(folder, n)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    arrays, document = load_checkpoint(folder / "last.json")
    assert (arrays["w"] == document["value"]).all()
    seen.add(document["value"])
    save_checkpoint(folder / "last.json", *content(3.0))
    assert load_checkpoint(folder / "last.json")[1]["value"] == 3.0
    assert len(list(folder.iterdir())) == 2, list(folder.iterdir())
    if not killed:
        break
assert n > 7 and seen == {1.0, 2.0}, (n, seen)

# a write that really fails: the process may write no file longer than 2000 bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    save_checkpoint(folder / "last.json", {"w": np.zeros(10000)}, {})
except CheckpointError as error:
    assert "too large" in str(error), error
else:
    raise AssertionError("no error")
assert load_checkpoint(folder / "last.json")[1]["value"] == 3.0
assert len(list(folder.iterdir())) == 2
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_at_every_system_call(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_load_while_another_process_saves(tmp_path, monkeypatch):
    """The pair is replaced after the JSON was read: the reader takes the new one."""
    from gpurnn import checkpoint

    path = tmp_path / "last.json"
    save_checkpoint(path, *example(1.0))
    read, reads = checkpoint._read_header, []

    def read_then_replace(path):
        header = read(path)
        reads.append(header)
        if len(reads) == 1:
            save_checkpoint(path, *example(2.0))
        return header

    monkeypatch.setattr(checkpoint, "_read_header", read_then_replace)
    assert load_checkpoint(path)[1]["value"] == 2.0
    assert len(reads) == 2


def test_text_and_json(tmp_path, monkeypatch):
    write_json_atomic(tmp_path / "config.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": [1, 2]}
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(tmp_path / "config.json", {"a": float("nan")})
    write_text_atomic(tmp_path / "note.txt", "first\n")

    def fail(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        write_text_atomic(tmp_path / "note.txt", "second\n")
    assert (tmp_path / "note.txt").read_text() == "first\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "note.txt"]
