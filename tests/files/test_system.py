"""What Windows and macOS do differently, on stand-ins for their modules."""

import errno
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpurnn
from gpurnn.backends import switch
from gpurnn.backends.cpu import native, ops, threads, uncompiled
from gpurnn.errors import BackendError
from gpurnn.files import cache_folder, system, write_bytes_atomic
from gpurnn.folder_lock import FolderInUseError, lock_folder


class Msvcrt:
    """Locks of Windows: one holder for each byte of a file, and nobody else may read it."""

    LK_NBLCK = 2

    def __init__(self):
        self.holders = {}

    def locking(self, descriptor, mode, count):
        assert mode == self.LK_NBLCK and count == 1
        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        if place < 1 << 31:
            raise AssertionError("others could not read what is in the file")
        key = os.fstat(descriptor).st_ino, place
        if self.holders.setdefault(key, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr("gpurnn.files.temporary.fcntl", None)
    stand_in = Msvcrt()
    monkeypatch.setattr(system, "msvcrt", stand_in)
    return stand_in


def test_a_lock_of_windows(windows, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    first, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    os.lseek(first, 3, os.SEEK_SET)
    assert system.lock_file(first) is True and system.lock_file(second) is False and system.lock_file(first) is True
    assert os.lseek(first, 0, os.SEEK_CUR) == 3  # what follows is written where it was going to be
    windows.locking = lambda *arguments: (_ for _ in ()).throw(OSError(errno.EINVAL, "no locks here"))
    assert system.lock_file(second) is None
    os.close(first), os.close(second)


def test_a_folder_is_locked_on_windows(windows, tmp_path):
    lock = lock_folder(tmp_path)
    assert (tmp_path / ".lock").read_bytes().startswith(b'{"pid"')
    other = os.open(tmp_path / ".lock", os.O_RDWR)
    assert system.lock_file(other) is False
    os.close(other)
    lock.active = True
    with pytest.raises(FolderInUseError):
        lock_folder(tmp_path)
    lock.close()
    assert not (tmp_path / ".lock").exists()


def test_a_file_is_written_on_windows(windows, tmp_path):
    write_bytes_atomic(tmp_path / "file", b"one")
    write_bytes_atomic(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_replacing_waits_for_readers_on_windows(monkeypatch):
    """A virus scanner reads the target for a moment."""
    refused = [PermissionError("in use")] * 3
    now = [0.0]
    calls = SimpleNamespace(
        name="nt", replace=lambda source, target: (_ for _ in ()).throw(refused.pop()) if refused else "done"
    )
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(system, "os", calls)
    monkeypatch.setattr(system, "time", clock)
    assert system.replace("a", "b") == "done" and not refused and now[0] == pytest.approx(0.15)
    refused.extend([PermissionError("in use")] * 100)
    with pytest.raises(PermissionError):
        system.replace("a", "b")
    assert 2 < now[0] < 3
    calls.name, now[0] = "posix", 0.0
    with pytest.raises(PermissionError):  # there it has another reason, which does not pass
        system.replace("a", "b")
    assert now[0] == 0


@pytest.mark.parametrize("platform, variables, folder", [
    ("linux", {}, "home/.cache"), ("darwin", {}, "home/Library/Caches"),
    ("win32", {}, "home/AppData/Local"), ("win32", {"LOCALAPPDATA": "D:/caches"}, "D:/caches"),
    ("darwin", {"XDG_CACHE_HOME": "mine"}, "mine"), ("linux", {"XDG_CACHE_HOME": "mine", "LOCALAPPDATA": "D:"}, "mine"),
])  # fmt: skip
def test_the_folder_of_caches(platform, variables, folder, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert cache_folder() == Path(folder) / "gpurnn"


def test_processors_without_affinity(monkeypatch):
    """On a Mac the slow processors are left out: every thread gets the same work."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert threads.processors() == 10

    results = [0, -1]

    def sysctlbyname(name, value, size, new, length):
        assert name == b"hw.perflevel0.logicalcpu"
        value._obj.value = 6
        return results.pop(0)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda path: SimpleNamespace(sysctlbyname=sysctlbyname))
    for expected in (6, 10):  # the system says so; it does not say
        threads._fast_processors.cache_clear()
        assert threads.processors() == expected
    threads._fast_processors.cache_clear()


@pytest.mark.parametrize("name", ["_native.abi3.so", "_native.so", "_native.dylib", "_native.dll"])
def test_every_name_of_the_library_is_found(name, monkeypatch, tmp_path):
    """Also by a Python that knows no .abi3.so, as those without a global lock do not."""
    package = tmp_path / "gpurnn"
    (package / "backends" / "cpu").mkdir(parents=True)
    monkeypatch.setattr(native, "__file__", str(package / "backends" / "cpu" / "native.py"))
    monkeypatch.setattr(native.importlib.machinery, "EXTENSION_SUFFIXES", [".cpython-313t-x86_64-linux-gnu.so", ".so"])
    assert native.library_path() is None
    (package / name).touch()
    assert native.library_path() == package / name


def elf(pages, sections):
    """A file that says it is ELF, as long as pages, with its table of sections from byte 1000 on."""
    head = b"\x7fELF\2\1\1".ljust(40, b"\0") + struct.pack("<Q", 1000) + bytes(10) + struct.pack("<HH", 64, sections)
    return head.ljust(pages, b"\0")


@pytest.mark.parametrize("content, early", [
    (b"", False),
    (b"\xcf\xfa\xed\xfe" + bytes(200), False),  # of macOS
    (elf(62, 3), False),
    (elf(1191, 3), True),  # loading a library that lacks pages would end the process
    (elf(1192, 3), False),
], ids=("empty", "of macOS", "half a head", "cut off", "of nothing"))  # fmt: skip
def test_a_library_that_does_not_load(content, early, monkeypatch, tmp_path, caplog):
    """The backend is array code then, and says why; the others and "gpurnn info" work."""
    package = tmp_path / "gpurnn"
    (package / "backends" / "cpu").mkdir(parents=True)
    (package / "_native.so").write_bytes(content)
    native.load_native.cache_clear()
    for module in (native, uncompiled):
        monkeypatch.setattr(module, "__file__", str(package / "backends" / "cpu" / "native.py"))
    monkeypatch.setattr(switch, "_built", {})
    try:
        x = np.ones((3, 1, 2), np.float32)
        outputs = [gpurnn.GRU(2, 3, seed=0, backend=backend)(x)[0] for backend in ("cpu", "numpy")]
        assert np.array_equal(*outputs)
        said = ops.describe()
    finally:
        native.load_native.cache_clear()
    assert said.startswith("array code, as 'numpy': its compiled code does not load here (")
    assert ("the file ends too early" in said) == early
    assert "with pip install --force-reinstall" in said and said.partition(": ")[2] in caplog.text


def test_a_library_of_something_else_is_refused(monkeypatch):
    native.load_native.cache_clear()
    monkeypatch.setattr(native, "opened", lambda path: (SimpleNamespace(), None))
    monkeypatch.setattr(native, "library_path", lambda: Path("_native.so"))
    try:
        with pytest.raises(BackendError, match="_native.so was built from other sources than these"):
            native.load_native()
    finally:
        native.load_native.cache_clear()


def test_no_signal_is_needed_that_windows_lacks():
    """Only Ctrl-C and SIGTERM are used by the library."""
    import re

    root = Path(gpurnn.__file__).parent
    used = {
        name
        for path in root.rglob("*.py")
        for name in re.findall(r"signal\.(SIG[A-Z1-9]+)", path.read_text(encoding="utf-8"))
    }
    assert used <= {"SIGINT", "SIGTERM", "SIG"}, used
