"""What operating systems differ in: how a file is opened and replaced, what it may be, locks, the folder of caches."""

import os
import stat
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt  # of Windows alone
except ImportError:
    msvcrt = None

CLOEXEC, BINARY = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_BINARY", 0)
NOFOLLOW, NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


def kind_of(mode):
    """What a file is, in words, from its mode."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFLNK: "a link to nothing", stat.S_IFDIR: "a folder",
             stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
             stat.S_IFBLK: "a disk"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


_LOCKED_BYTE = 1 << 40  # behind the end of any file that is locked: what Windows locks, nobody else can read
_PATIENCE = 2.0  # seconds


def lock_file(descriptor):
    """Try to lock an open file: whether this process now holds it; None where files cannot be locked."""
    if fcntl is None:
        return None if msvcrt is None else _lock_byte(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _lock_byte(descriptor):
    """``lock_file`` of Windows, which locks bytes from the current place on."""
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError:  # another process holds it
        return False
    except OSError:  # a file system without locks
        return None
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)
    return True


def replace(source, target):
    """``os.replace``. Windows refuses it while anybody reads the target, such as a virus scanner: this waits for it."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > end:
                raise
        time.sleep(0.05)


def cache_folder():
    """gpurnn's folder in the user's folder of caches. Raises RuntimeError where there is no home."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if not chosen and sys.platform == "win32":
        chosen = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif not chosen:
        chosen = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(chosen) / "gpurnn"


def write_all(descriptor, data):
    """Write all of ``data``; one ``os.write`` may write only a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder):
    """Make renames in ``folder`` survive a power cut (Windows cannot open folders and needs nothing)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
