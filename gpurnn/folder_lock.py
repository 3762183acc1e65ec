"""The lock of a run's folder: one process at a time. The file ``.lock`` names it.

The system's lock on that file ends with its process, so a crash leaves nothing that stands in the way. The process and
the host in the file are for people, for file systems without such locks, and for folders that several hosts share.
"""

import contextlib
import contextvars
import json
import os
import socket
import stat
import threading
import time
import weakref
from pathlib import Path

from .files.system import CLOEXEC, NOFOLLOW, NONBLOCK, lock_file

NAME = ".lock"
_mutex = threading.RLock()
_held = {}  # the real path of a folder -> its FolderLock, of those that this process holds
_lent = contextvars.ContextVar("lent", default=None)


def _begin_anew():
    """After a fork, in the child: the locks belong to the parent, and a mutex held by another thread stays locked."""
    global _mutex
    _mutex = threading.RLock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


class FolderInUseError(FileExistsError):
    """Another process, or another run of this process, uses the folder of the run."""


class FolderLock:
    """The right to write in a run's folder, until ``close`` or the end of the process; made by ``lock_folder``.

    active: whether a training goes on; where not, this process may hand the folder to another of its runs, and
    ``taken`` is then True.
    """

    def __init__(self, folder):
        self.folder, self.path = Path(folder), Path(folder) / NAME
        self.active = self.taken = False
        self._descriptor = _acquire(self.path)
        self._finish = weakref.finalize(self, _release, self.path, self._descriptor, os.getpid())

    @property
    def closed(self):
        return not self._finish.alive

    def close(self):
        """Release the folder. A second call does nothing."""
        with _mutex:
            for key, lock in list(_held.items()):
                if lock() is self:
                    del _held[key]
            self._finish()

    @contextlib.contextmanager
    def lent(self):
        """A context in which ``locked`` of this folder gives this lock: for a run that calls ``fit``."""
        token, self.active = _lent.set(self), True
        try:
            yield self
        finally:
            self.active = False
            _lent.reset(token)


@contextlib.contextmanager
def locked(folder):
    """A context in which this process alone writes in the folder, which must exist; see ``lock_folder``."""
    borrowed = _lent.get()
    if borrowed is not None and not borrowed.closed and os.path.realpath(folder) == os.path.realpath(borrowed.folder):
        yield borrowed
        return
    lock = lock_folder(folder)
    lock.active = True
    try:
        yield lock
    finally:
        lock.close()


def lock_folder(folder):
    """Lock a folder that exists. Raises OSError, and FolderInUseError, which names the process that uses it."""
    key = os.path.realpath(folder)
    with _mutex:
        mine = _held[key]() if key in _held else None
        if mine is not None and not mine.closed:
            if mine.active:
                who = f"another training of this process, {os.getpid()}"
                raise FolderInUseError(f"{folder} is in use by {who}: wait for its end, or choose another folder")
            mine.taken = True
            mine.close()
        lock = FolderLock(folder)
        _held[key] = weakref.ref(lock)
        return lock


def _acquire(path):
    """Lock the lock file and return its descriptor."""
    for _ in range(100):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | NONBLOCK | CLOEXEC, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(f"{path}: is not a regular file: move it away")
            held = lock_file(descriptor)
            who = _read(descriptor)
            if held is False:
                raise FolderInUseError(_refusal(path, who))
            if who and who["host"] != socket.gethostname() and (who["boot"] is None or who["boot"] != _boot()):
                end = f"That host cannot be asked from here: if the process runs no more, remove {path}"
                raise FolderInUseError(f"{_refusal(path, who)}. {end}")
            if held is None and who and _alive(who):
                raise FolderInUseError(_refusal(path, who))
            if _same(descriptor, path) and os.fstat(descriptor).st_nlink > 1:
                os.unlink(path)  # under its other name it stays as it is
            if not _same(descriptor, path):  # its holder removed it between our two calls
                os.close(descriptor)
                continue
            _write(descriptor)
            return descriptor
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
    raise FolderInUseError(f"{path.parent} is in use: {path} is made and removed all the time")


def _release(path, descriptor, pid):
    if os.getpid() != pid:  # a forked child: the lock is its parent's
        return
    with contextlib.suppress(OSError):
        mine = _same(descriptor, path)
        if os.name != "posix":  # Windows removes no open file
            os.close(descriptor)
        if mine:
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _same(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _write(descriptor):
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
           "boot": _boot(), "born": _born("self")}  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(who).encode())


def _read(descriptor):
    """What a lock file says, or None if it says nothing because its writer was killed before it wrote."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        who = json.loads(os.read(descriptor, 4096))
        return {"pid": int(who["pid"]), "host": str(who["host"])[:200], "since": str(who["since"])[:40],
                "boot": who.get("boot"), "born": who.get("born")}  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _refusal(path, who):
    what_helps = "wait for its end, stop it, or choose another folder"
    if not who:
        return f"{path.parent} is in use by another process: {what_helps}"
    text = f"{path.parent} is in use by process {who['pid']} on host {who['host']} since {who['since']}"
    if who["host"] == socket.gethostname() and not _alive(who):
        text += f", or by one that it started ({who['pid']} itself has ended)"
    return f"{text}: {what_helps}"


def _alive(who):
    """Whether the process still runs, and its number was not given to a later one."""
    if os.name != "posix":
        return True
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return None in (who["born"], _born(who["pid"])) or who["born"] == _born(who["pid"])


def _born(pid):
    """When a process began, in the system's own units; None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return None


def _boot():
    """An identifier of this boot of the machine, the same in all its containers; None if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
