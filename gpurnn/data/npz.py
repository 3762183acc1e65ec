"""Arrays from .npz files, which are zip archives of .npy files: sizes are looked at before anything is read.

No pickles are loaded, whoever asks: an array of Python objects is refused.
"""

import math
import zipfile

import numpy as np

from ..errors import FileError
from ..files import check_room, one_line, open_regular

_PIECE = 1 << 20  # bytes read at once
_ENCRYPTED = 1  # of a zip entry's flags
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_npz(path, wanted, factor=2):
    """Name -> array of those in an .npz file whose name the function ``wanted`` takes.

    factor: how many times their size what is done with them takes in memory, see ``check_room``. Raises FileError that
    names the file, and the array, for what is damaged, encrypted, too large or of Python objects; OSError.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                chosen = {name: info for name, info in entries.items() if wanted(name)}
                check_room(path, factor * sum(info.file_size for info in chosen.values()), "its arrays")
                return {name: _array(archive, info, name) for name, info in chosen.items()}
        except FileError:
            raise
        except Exception as error:  # whatever zipfile, zlib and NumPy meet in a damaged file
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
                raise
            raise FileError(f"{path}: is not an .npz file of arrays, or is damaged: {one_line(error)}") from error


def _array(archive, info, name):
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name} is encrypted")
    if info.compress_type not in _METHODS:
        raise ValueError(f"{name} is compressed by method {info.compress_type}, expected stored or deflated")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"{name} has version {version} of the format, expected 1.0 to 3.0")
        # 3.0 is 2.0 but for the encoding of the names of a structure's fields, which nobody asks for
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, fortran, dtype = read(member)
        except (MemoryError, RecursionError) as error:  # of Python's parser
            raise ValueError(f"{name} has a header that is nested too deeply") from error
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not loaded")
        if min(shape, default=0) < 0:
            raise ValueError(f"{name} has the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        if size != info.file_size - member.tell():
            raise ValueError(f"{name}: {info.file_size - member.tell()} bytes, shape {shape} of {dtype} takes {size}")
        data = np.empty(size, np.uint8)
        rest = memoryview(data)
        while rest:
            count = member.readinto(rest[:_PIECE])
            if not count:
                raise ValueError(f"{name} is cut off")
            rest = rest[count:]
        if member.read(1):  # to the end, where the checksum is compared
            raise ValueError(f"{name} is longer than the archive says")
    return data.view(dtype).reshape(shape, order="F" if fortran else "C")
