"""Writing: a file is replaced in one moment, or written into where it is a device or a pipe."""

import contextlib
import json
import os
import re
import stat
import sys
from pathlib import Path

from .system import BINARY, CLOEXEC, kind_of, sync_folder, write_all
from .temporary import sweep, write_and_rename


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
    sweep(path)
    for last in (False, False, True):
        try:
            write_and_rename(path, data, before)
            break
        except FileNotFoundError:  # the folder is gone, or another process took the file for an abandoned one
            if last or not path.parent.is_dir():
                raise
    sync_folder(path.parent)


def check_target(path):
    """``os.stat`` of the file that a write to ``path`` would replace or write into; None if there is none.

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
        raise IsADirectoryError(f"{path}: is {kind_of(found.st_mode)}, not a file: choose another name")
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
    opened = os.dup(number) if number is not None else os.open(path, os.O_WRONLY | CLOEXEC | BINARY)
    try:
        write_all(opened, data)
    finally:
        os.close(opened)
