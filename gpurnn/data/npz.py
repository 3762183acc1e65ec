"""Arrays from .npz files, which are zip archives of .npy files. Sizes are checked before anything is read.

No pickles are ever loaded: an array of Python objects is refused.
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
    """Arrays of an .npz file.

    Parameters
    ----------
    path : str or Path
    wanted : function
        Says of a name whether its array is read.
    factor : float
        How many times their own size the arrays take in memory until all is done with them; see ``check_room``.

    Returns
    -------
    dict
        name -> array.

    Raises
    ------
    FileError
        Names the file, and the array, if it is damaged, encrypted, too large or holds Python objects.
    OSError
        For a file that cannot be read.
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
        except Exception as error:  # zipfile, zlib and NumPy raise errors of many kinds on a damaged file
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
        # 3.0 differs from 2.0 in the encoding of the names of structured fields, which are not used here
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
