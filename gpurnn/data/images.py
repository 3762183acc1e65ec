"""Images and their classes, from an .npz or from IDX files, the format in which MNIST is distributed."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from ..errors import DtypeError, FileError, ShapeError
from ..files import check_room, file_size, one_line, open_regular
from .npz import read_npz

_IMAGE_COST = 300  # bytes of memory for an image besides its pixels


def read_images(files, parts=("train", "test")):
    """Images and their classes.

    Parameters
    ----------
    files : list of str
        One .npz with x_train, y_train, x_test and y_test; or IDX files, compressed by gzip or not, whose names have
        train, test or t10k in them.
    parts : tuple of str
        Which of "train" and "test" are read.

    Returns
    -------
    dict
        part -> (images (N, R, C) uint8, labels (N,) int64).

    Raises
    ------
    ValueError, ShapeError, DtypeError
        Name the file or the array, and what is wrong with it.
    """
    if not files:
        raise ValueError(
            "no files of images: give one .npz with x_train, y_train, x_test and y_test, or the four IDX files"
        )
    arrays = {}
    for file in files:
        if Path(file).is_dir():
            raise FileError(f"{file}: is a folder: give the files in it")
        more = _read_npz(file) if file.endswith(".npz") else _read_idx(file)
        twice = sorted(arrays.keys() & more.keys())
        if twice:
            raise FileError(f"{file}: has {twice[0]}, which another file has already (images are x, their classes y)")
        arrays |= more
    found = {}
    for part in parts:
        missing = [what for what in (f"x_{part}", f"y_{part}") if what not in arrays]
        if missing:
            given = ", ".join(Path(file).name for file in files)
            raise ValueError(f"{given}: no {' and no '.join(missing)} (images are x, their classes y)")
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8:
            raise DtypeError(f"x_{part}: expected uint8, pixels from 0 to 255, got {images.dtype}")
        if images.ndim != 3 or not images.size:
            raise ShapeError(f"x_{part}: expected (images, rows, columns), none of them 0, got {images.shape}")
        check_room(", ".join(files), _IMAGE_COST * len(images), f"its {len(images):,} images")
        if labels.dtype.kind not in "iu":
            raise DtypeError(f"y_{part}: expected integers, got {labels.dtype}")
        if labels.shape != images.shape[:1]:
            raise ShapeError(f"y_{part}: expected ({len(images)},), a class for each image, got {labels.shape}")
        if labels.min() < 0 or labels.max() > 999:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"y_{part}: expected classes from 0 to 999, got {wrong}")
        found[part] = np.ascontiguousarray(images), labels.astype(np.int64)
    return found


def _read_npz(file):
    """{name: array} of the arrays that ``read_images`` looks for."""
    return read_npz(file, lambda name: name[:2] in ("x_", "y_"))


def _read_idx(file):
    """{"x_train": array} or the like of one IDX file.

    The format of the MNIST distribution (LeCun, Cortes, Burges): bytes 0, 0, 8 for uint8, the number of axes, each axis
    as a big-endian 32-bit number, then the pixels or labels.
    """
    with open_regular(file) as opened:
        packed = opened.read(2) == b"\x1f\x8b"
        opened.seek(0)
        try:
            return _read_unpacked(file, gzip.GzipFile(fileobj=opened) if packed else opened, packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileError(f"{file}: cannot be decompressed: {one_line(error)}") from error


def _read_unpacked(file, stream, packed):
    head = stream.read(4)
    axes = head[3] if len(head) > 3 else 0
    if head[:3] != b"\0\0\x08" or axes not in (1, 3):
        raise FileError(f"{file}: is neither an .npz nor an IDX file of images or labels")
    shape = np.frombuffer(stream.read(4 * axes).ljust(4 * axes, b"\0"), ">u4").tolist()
    start, size = 4 + 4 * axes, math.prod(shape)
    if not packed and file_size(stream) != start + size:
        raise FileError(f"{file}: {file_size(stream)} bytes, its header says {start + size}")
    check_room(file, 2 * size + _IMAGE_COST * shape[0], f"what its header says, {' x '.join(map(str, shape))} bytes,")
    data = stream.read(size + 1)
    if len(data) != size:
        more = "more" if len(data) > size else f"{start + len(data)}"
        raise FileError(f"{file}: {more} bytes, its header says {start + size}")
    name = Path(file).name.lower()
    part = "train" if "train" in name else "test" if "test" in name or "t10k" in name else None
    if part is None:
        raise FileError(f"{file}: the name should have train, test or t10k in it")
    array = np.frombuffer(data, np.uint8).reshape(shape)
    return {f"{'y' if axes == 1 else 'x'}_{part}": array}
