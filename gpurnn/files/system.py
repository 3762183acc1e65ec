"""What operating systems differ in: how a file is opened, what it may be, locks."""

import os
import stat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CLOEXEC, BINARY = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_BINARY", 0)
NOFOLLOW, NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


def kind_of(mode):
    """What a file is, in words, from its mode."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFLNK: "a link to nothing", stat.S_IFDIR: "a folder",
             stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
             stat.S_IFBLK: "a disk"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


def lock_file(descriptor):
    """Try to lock an open file: whether this process now holds it; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


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
