"""Reading: regular files only, and within the limit."""

import contextlib
import json
import math
import os
import stat

from ..errors import DivergedError, FileError, one_line
from .limits import check_room, max_memory
from .system import BINARY, CLOEXEC, NONBLOCK, kind_of

JSON_FACTOR = 24  # bytes of memory for a byte of JSON at worst: "{}," is a dict of 64 bytes and a place in a list


def open_regular(path, error=FileError):
    """Open a regular file for reading, in binary. Raises ``error`` for anything else, OSError if it does not exist.

    Nothing else is opened even for a moment: a pipe would wait for its other end, a device may act.
    """
    _check_regular(path, os.stat(path).st_mode, error)
    file = open(os.open(path, os.O_RDONLY | NONBLOCK | CLOEXEC | BINARY), "rb")  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode, error)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path, mode, error):
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is not a regular file but {kind_of(mode)}: save what it gives to a file first")


def file_size(file):
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_bytes(path, *, factor=1, what="it", error=FileError, own=False):
    """Read a whole regular file, if ``factor`` times its size is within the limit. Raises ``error`` and OSError.

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
    """A context in which every error of reading names ``files``, and is a FileError.

    That includes errors of arithmetic and of look-ups, which only a damaged or hostile file causes.
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
