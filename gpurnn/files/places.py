"""Where files go: folders, names that are free, logs."""

import contextlib
import itertools
import os
import stat
from pathlib import Path

from ..errors import FileError
from .system import BINARY, CLOEXEC, NOFOLLOW, NONBLOCK, kind_of
from .writing import write_bytes_atomic


def make_folder(path):
    """Make a folder, and those above it, unless it is there. Raises FileError that names what stands in its place."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        for place in (Path(path), *Path(path).parents):
            if os.path.lexists(place):
                kind = kind_of((os.stat if place.exists() else os.lstat)(place).st_mode)
                raise FileError(f"{place}: is {kind}, not a folder: choose another place") from None
        raise


def fresh_path(stem, suffix="", *, folder=False):
    """Make and return the first of "stem", "stem-2", "stem-3", ... that does not exist. No other process gets the same.

    folder: a folder is made instead of a file.
    """
    for number in itertools.count(1):
        path = Path(f"{stem}{'' if number == 1 else f'-{number}'}{suffix}")
        try:
            if folder:
                path.mkdir()
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | CLOEXEC, 0o666))
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
    """Open a regular file for reading and appending; make it if there is none. Raises OSError for a link.

    A file that has another name as well, by a hard link, is replaced by a copy. What has the other name stays as it is.
    """
    if os.path.isfile(path) and os.stat(path).st_nlink > 1 and not os.path.islink(path):
        write_bytes_atomic(path, Path(path).read_bytes())
    if os.path.islink(path):
        raise OSError(f"{path}: is a link to {os.readlink(path)}. Links are not followed: move it away")
    how = os.O_RDWR | os.O_APPEND | os.O_CREAT | NOFOLLOW | NONBLOCK | CLOEXEC | BINARY
    descriptor = os.open(path, how, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"{path}: is {kind_of(mode)}, not a file: move it away")
    return open(descriptor, "ab+")
