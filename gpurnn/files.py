"""Files: read with care, written whole or not at all. Whatever gpurnn reads or writes goes through here.

Reading takes regular files only and looks at sizes before it reads: what a file would take in memory is estimated and
compared with a limit, ``max_memory()``. Writing replaces a file in one moment, keeps its mode, follows no links, and
writes into devices and pipes instead of replacing them.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path

from .errors import DivergedError, FileError, one_line, show_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_MEMORY = 512 << 20  # bytes that one file may take in memory, where nobody says otherwise
JSON_FACTOR = 24  # bytes of memory for a byte of JSON at worst: "{}," is a dict of 64 bytes and a place in a list
_ABSURD = 1 << 44  # bytes that no machine has: who asks for more has no right file
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_STALE = 3600.0  # seconds after which a temporary file is thought abandoned, where files cannot be locked
_CLOEXEC, _BINARY = getattr(os, "O_CLOEXEC", 0), getattr(os, "O_BINARY", 0)
_NOFOLLOW, _NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)

# ---- limits

_chosen = None  # what ``--max-memory`` says


def parse_size(text, name="max_memory"):
    """Bytes of "800M", "2G" or "123456"; 0 is no limit, infinity. Raises ValueError that names ``name``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip().upper().replace("IB", "B"))
    size = float(found[1]) * _UNITS[found[2]] if found else math.inf
    if size == math.inf:  # no number, or one that no float holds
        got = one_line(repr(text), 60)
        raise ValueError(f"{name} should be a number of bytes such as 800M or 4G, or 0 for no limit, got {got}")
    return int(size) if size else math.inf


def max_memory():
    """Bytes that one file may take in memory: of ``set_max_memory``, else ``GPURNN_MAX_MEMORY``, else 512 MiB.

    Raises ValueError for a ``GPURNN_MAX_MEMORY`` that is no size.
    """
    if _chosen is not None:
        return _chosen
    return parse_size(os.environ.get("GPURNN_MAX_MEMORY") or MAX_MEMORY, "GPURNN_MAX_MEMORY")


def set_max_memory(size):
    """Set that limit for this process: bytes, or text such as "4G"; 0 for none; None for the default again."""
    global _chosen
    _chosen = None if size is None else parse_size(size)


def check_room(path, needed, what="it", *, own=False):
    """Raise FileError where ``what`` is in the file would take more memory than one file may, ``needed`` bytes.

    own: whether it is a file that gpurnn writes for itself: a limit that is set for data may raise its limit, no more.
    """
    limit = max(max_memory(), MAX_MEMORY) if own else max_memory()
    if needed > limit:
        text = f"{path}: {what} would take {show_size(int(needed))} of memory, the limit is {show_size(limit)}"
        if needed < _ABSURD:
            wanted = f"{-(-int(needed) >> 30)}G"
            text += f". If the file is right, allow more: --max-memory {wanted}, or GPURNN_MAX_MEMORY={wanted}"
        raise FileError(text)


# ---- reading


def open_regular(path, error=FileError):
    """A regular file opened for reading, in binary. Raises ``error`` for anything else, OSError where it is not there.

    Nothing else is opened even for a moment: a pipe would wait for its other end, a device may act.
    """
    _check_regular(path, os.stat(path).st_mode, error)
    file = open(os.open(path, os.O_RDONLY | _NONBLOCK | _CLOEXEC | _BINARY), "rb")  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode, error)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path, mode, error):
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is not a regular file but {_kind(mode)}: save what it gives to a file first")


def _kind(mode):
    kinds = {stat.S_IFREG: "a file", stat.S_IFLNK: "a link to nothing", stat.S_IFDIR: "a folder",
             stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
             stat.S_IFBLK: "a disk"}  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "something else")


def file_size(file):
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_bytes(path, *, factor=1, what="it", error=FileError, own=False):
    """All bytes of a regular file, if ``factor`` times its size is within the limit. Raises ``error`` and OSError.

    own: as of ``check_room``.
    """
    with open_regular(path, error) as file:
        size = file_size(file)
        check_room(path, factor * size, what, own=own)
        data = file.read(size + 1)
    if len(data) != size:
        raise error(f"{path}: changed while it was read")
    return data


def read_json(path, *, factor=JSON_FACTOR, error=FileError, own=False):
    """The document in a JSON file. Raises ``error`` that names file and place for what is no JSON, NaN and infinity
    included; OSError where the file cannot be read. own: as of ``check_room``."""
    return parse_json(read_bytes(path, factor=factor, what="its JSON", error=error, own=own), path, error)


def parse_json(data, place, error=FileError, *, finite=True):
    """The document in bytes or text; ``place`` begins the message of the ``error`` that is raised where it is none.

    finite: whether NaN and infinity are refused, which JSON does not have.
    """
    checks = {"parse_constant": _refuse_constant, "parse_float": _finite} if finite else {}
    try:
        return json.loads(data, **checks)
    except (ValueError, RecursionError) as cause:
        raise error(f"{place}: is not JSON: {one_line(cause)}") from cause


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


def _finite(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


@contextlib.contextmanager
def naming(files):
    """Inside, an error that reading ``files`` raises names them, if it does not already: it becomes a FileError.

    Errors of arithmetic and of look-ups are those that only a damaged or hostile file causes: they become one too.
    """
    names = [str(file) for file in files]
    max_memory()  # where the variable is wrong, no file is
    try:
        yield
    except DivergedError:  # no file's fault
        raise
    except (ValueError, ArithmeticError, LookupError, RecursionError, TypeError) as error:
        if not names or any(name in str(error) for name in names):
            raise
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text = f"{shown}: {one_line(error, 2000)}"
        kind = type(error) if type(error).__module__.startswith("gpurnn") else FileError
        raise kind(text) from error


# ---- writing


def write_json_atomic(path, document):
    """``write_bytes_atomic`` of an indented JSON text. Raises ValueError for NaN and infinity: JSON has neither."""
    write_text_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text_atomic(path, text):
    """``write_bytes_atomic`` of a text in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path, data, like=None):
    """Write a file so that ``path`` holds all of ``data`` or what it held before, even after a power cut.

    A temporary file in the same folder is written, flushed to the disk and renamed; on an error it is removed, and one
    that a killed process has left is removed by the next write to ``path``. A file that was there keeps its mode and
    owner; a new one takes those of the file ``like``, where that is given and exists. Devices and pipes are written
    into. Raises OSError; for a link, which is not followed, and for a file that may not be written, before anything
    is done.
    """
    path = Path(path)
    before = check_target(path)
    if before is not None and not stat.S_ISREG(before.st_mode):
        return _write_into(path, data)
    if before is None and like is not None:
        with contextlib.suppress(OSError):
            before = os.stat(like)
    _sweep(path)
    for last in (False, False, True):
        try:
            _write_and_rename(path, data, before)
            break
        except FileNotFoundError:  # the folder is gone, or another process took the file for an abandoned one
            if last or not path.parent.is_dir():
                raise
    _sync_folder(path.parent)


def check_target(path):
    """What ``os.stat`` says of the file that a write to ``path`` would replace or write into; None where there is none.

    Raises OSError where there must be no write: a link to a file, a folder, a disk, a file that is read-only.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path)
        if stat.S_ISLNK(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
            if _descriptor(path) is not None:
                return os.stat(os.devnull)  # a stream, whatever it goes to
            target = os.readlink(path)
            raise OSError(f"{path}: is a link to {target}. Links are not followed: name {target} itself")
    if stat.S_ISDIR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        raise IsADirectoryError(f"{path}: is {_kind(found.st_mode)}, not a file: choose another name")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: is read-only: choose another name, or allow it to be written")
    return found


def is_stream(path):
    """Whether a write to ``path`` goes into a device or a pipe. Raises what ``check_target`` raises."""
    found = check_target(path)
    return found is not None and not stat.S_ISREG(found.st_mode)


def _descriptor(path):
    """The number of the open file that a path such as /dev/stdout stands for, or None."""
    path = os.fspath(path)
    for _ in range(10):
        folder, name = os.path.split(os.path.abspath(path))
        folder = os.path.realpath(folder)
        if re.fullmatch(rf"/proc/(self|{os.getpid()})(/task/\d+)?/fd|/dev/fd", folder) and name.isdigit():
            return int(name)
        try:
            path = os.path.join(folder, os.readlink(os.path.join(folder, name)))
        except OSError:
            return None
    return None


def _write_into(path, data):
    """Write to a device, a pipe or an open stream."""
    number = _descriptor(path)
    for stream in (sys.stdout, sys.stderr) if number is not None else ():
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    opened = os.dup(number) if number is not None else os.open(path, os.O_WRONLY | _CLOEXEC | _BINARY)
    try:
        _write_all(opened, data)
    finally:
        os.close(opened)


def _write_all(descriptor, data):
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _write_and_rename(path, data, before):
    mode = None if before is None else stat.S_IMODE(before.st_mode)
    temporary = path.with_name(f".{_stem(path)}.{secrets.token_hex(4)}.tmp")
    how = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NOFOLLOW | _CLOEXEC | _BINARY
    descriptor = os.open(temporary, how, 0o666 if mode is None else mode & 0o600)
    try:
        try:
            lock_file(descriptor)
            _write_all(descriptor, data)
            if mode is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # not the owner, or a file system without modes
                    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                        os.fchown(descriptor, before.st_uid, before.st_gid)
                with contextlib.suppress(OSError):
                    os.fchmod(descriptor, mode)
            os.fsync(descriptor)
            if fcntl:
                os.replace(temporary, path)
        finally:
            os.close(descriptor)
        if not fcntl:  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _stem(path):
    """The name of a file, as the names of its temporary files have it: these may not get too long."""
    encoded = os.fsencode(path.name)
    return path.name if len(encoded) <= 230 else hashlib.sha256(encoded).hexdigest()


def lock_file(descriptor):
    """Whether this process now holds an open file alone; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def temporary_target(name):
    """The name that a temporary file of ``write_bytes_atomic`` was to get, or None for another file."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name)
    return found[1] if found else None


def sweep_folder(folder, names):
    """Remove the temporary files of ``names`` in a folder that nobody else writes in."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if temporary_target(entry.name) in names and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _sweep(path):
    """Remove the temporary files that earlier writes to ``path`` have left, but not one that is being written."""
    stem = _stem(path)
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if temporary_target(entry.name) == stem and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    if _abandoned(entry.path):
                        os.unlink(entry.path)


def _abandoned(path):
    """Whether nobody writes a temporary file any more: its writer would hold it locked."""
    descriptor = os.open(path, os.O_RDONLY | _NOFOLLOW | _NONBLOCK | _CLOEXEC)
    try:
        held = lock_file(descriptor)
        old = time.time() - os.fstat(descriptor).st_mtime > _STALE
    finally:
        os.close(descriptor)
    return old if held is None else held


def _sync_folder(folder):
    """Make renames in ``folder`` survive a power cut (Windows cannot open folders and needs nothing)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(path):
    """Make a folder, and those above it, unless it is there. Raises FileError that names what stands in its place."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        for place in (Path(path), *Path(path).parents):
            if os.path.lexists(place):
                kind = _kind((os.stat if place.exists() else os.lstat)(place).st_mode)
                raise FileError(f"{place}: is {kind}, not a folder: choose another place") from None
        raise


def fresh_path(stem, suffix="", *, folder=False):
    """The first of "stem", "stem-2", "stem-3", ... that is not there, made at once, empty: no other process gets it.

    folder: a folder is made instead of a file.
    """
    for number in itertools.count(1):
        path = Path(f"{stem}{'' if number == 1 else f'-{number}'}{suffix}")
        try:
            if folder:
                path.mkdir()
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _CLOEXEC, 0o666))
            return path
        except FileExistsError:
            pass


def refuse_same(target, files, what="out"):
    """Raise ValueError where writing ``target`` would destroy one of ``files``, which are read."""
    for file in files:
        with contextlib.suppress(OSError):
            same = os.path.samefile(target, file) and stat.S_ISREG(os.stat(target).st_mode)
            if same:
                raise ValueError(f"{what}: {target} is a file that is read: choose another name, so that it stays")


def open_log(path):
    """A regular file opened to be read and appended to, made where there is none. Raises OSError for a link.

    One that has another name as well, by a hard link, is replaced by a copy: under that name it stays as it is.
    """
    if os.path.isfile(path) and os.stat(path).st_nlink > 1 and not os.path.islink(path):
        write_bytes_atomic(path, Path(path).read_bytes())
    if os.path.islink(path):
        raise OSError(f"{path}: is a link to {os.readlink(path)}. Links are not followed: move it away")
    how = os.O_RDWR | os.O_APPEND | os.O_CREAT | _NOFOLLOW | _NONBLOCK | _CLOEXEC | _BINARY
    descriptor = os.open(path, how, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"{path}: is {_kind(mode)}, not a file: move it away")
    return open(descriptor, "ab+")
