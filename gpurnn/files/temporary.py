"""The temporary files beside a file that is written, and what killed processes have left of them."""

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time

from .system import BINARY, CLOEXEC, NOFOLLOW, NONBLOCK, fcntl, lock_file, replace, write_all

_STALE = 3600.0  # seconds; an older temporary file counts as abandoned where files cannot be locked


def write_and_rename(path, data, before):
    """Write ``data`` to a temporary file beside ``path``, then rename it; on an error it is removed.

    before: what ``os.stat`` says of the file whose mode and owner the new one gets, or None.
    """
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o600
    temporary = path.with_name(f".{stem_of(path)}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | NOFOLLOW | CLOEXEC | BINARY, mode)
    try:
        try:
            lock_file(descriptor)
            write_all(descriptor, data)
            if before is not None:
                _set_owner_and_mode(descriptor, before)
            os.fsync(descriptor)
            if fcntl:
                replace(temporary, path)
        finally:
            os.close(descriptor)
        if not fcntl:  # Windows renames no open file
            replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _set_owner_and_mode(descriptor, like):
    """Give an open file the owner and mode in ``like``, an ``os.stat``, as far as the system allows."""
    if not hasattr(os, "fchmod"):  # Windows
        return
    with contextlib.suppress(OSError):
        if (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(descriptor, like.st_uid, like.st_gid)
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, stat.S_IMODE(like.st_mode))


def stem_of(path):
    """What the names of a file's temporary files begin with: its name, or a hash if that is too long."""
    encoded = os.fsencode(path.name)
    return path.name if len(encoded) <= 230 else hashlib.sha256(encoded).hexdigest()


def temporary_target(name):
    """The name that a temporary file was going to get, or None if the file is no temporary one."""
    found = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", name)
    return found[1] if found else None


def sweep_folder(folder, names):
    """Remove the temporary files of ``names`` in a folder that nobody else writes in. Raises OSError without it."""
    for path in _temporaries(folder, names):
        with contextlib.suppress(OSError):
            os.unlink(path)


def sweep(path):
    """Remove the temporary files that earlier writes to ``path`` have left, but not one that is being written."""
    with contextlib.suppress(OSError):
        for temporary in _temporaries(path.parent, {stem_of(path)}):
            with contextlib.suppress(OSError):
                if _abandoned(temporary):
                    os.unlink(temporary)


def _temporaries(folder, names):
    """The paths of all temporary files in a folder that were to become one of ``names``."""
    with os.scandir(folder) as entries:
        return [
            entry.path
            for entry in entries
            if temporary_target(entry.name) in names and entry.is_file(follow_symlinks=False)
        ]


def _abandoned(path):
    """Whether nobody writes a temporary file any more. Its writer would hold it locked."""
    descriptor = os.open(path, os.O_RDONLY | NOFOLLOW | NONBLOCK | CLOEXEC)
    try:
        held = lock_file(descriptor)
        old = time.time() - os.fstat(descriptor).st_mtime > _STALE
    finally:
        os.close(descriptor)
    return old if held is None else held
