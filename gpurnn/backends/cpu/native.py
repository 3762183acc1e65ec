"""The compiled library ``gpurnn._native`` through ctypes: its structs, and which instruction set it runs with.

Its source is kernels/cpu/api.cpp: the cells of kernels/cells under a schedule for the CPU. It is built when gpurnn is
installed and a C++ compiler is there.
"""

import ctypes
import functools
import importlib.machinery
import os
import struct
from pathlib import Path

import numpy as np

from ...dtypes import DTYPES
from ...errors import BackendError, check_choice
from ..int8 import parts_of

LEVELS = ("vectors of 128 bits", "AVX2", "AVX-512")
ISAS = ("baseline", "avx2", "avx512")  # what GPURNN_ISA calls the levels
_TEMPLATES = 64  # most shapes whose ``Pass`` is remembered with the weights
_INTERFACE = 17  # of gpurnn_native_bytes in api.cpp

_pointer, _stride = ctypes.c_void_p, ctypes.c_ssize_t


class Pass(ctypes.Structure):
    """``Pass`` of interface.h."""

    _fields_ = [
        ("cell", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in (
            "dtype", "weights_dtype", "T", "B", "I", "H", "P", "reverse", "save", "by_units", "bits", "flat",
        )),
        *((name, _stride) for name in ("gates_row", "output_row", "doutput_row", "state_stride", "mask_step")),
        *((name, _pointer) for name in (
            "lengths", "x", "weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh", "scale_ih", "scale_hh",
            "scale_hr", "own", "masks", "marks", "reset_h", "reset_others", "gates", "h", "others", "output", "doutput",
            "dh", "dothers", "dh_steps", "dreset_h", "dreset_others", "packed", "room",
        )),
        ("room_bytes", ctypes.c_size_t),
    ]  # fmt: skip


class Matrices:
    """Arrays as ``fingerprint`` reads them. bytes: of all."""

    def __init__(self, arrays):
        arrays = [array for array in arrays if array is not None]
        sizes, count = [array.nbytes for array in arrays], len(arrays)
        self.arguments = (_pointer * count)(*map(address, arrays)), (ctypes.c_size_t * count)(*sizes), count
        self.bytes = sum(sizes)


class NativeWeights:
    """The weights of one pass as the library reads them, and a ``Pass`` with their addresses for each shape of a call.

    They are remembered in ``Weights.ready``, unless one had to be copied: a copy holds for one call only. dtype: of all
    weights but the biases.
    """

    def __init__(self, w):
        given = {"bias_ih": w.bias_ih, "bias_hh": w.bias_hh}
        for name, weights in (("ih", w.ih), ("hh", w.hh), ("hr", w.hr)):
            given[f"weight_{name}"], given[f"scale_{name}"] = parts_of(weights)
        self.bits = 0 if given["scale_ih"] is None else w.ih.bits  # of weights in 8 bits, which have no dtype
        self.dtype = 0 if self.bits else dtype_number(w.ih.dtype)
        self.arrays = {name: None if array is None else np.ascontiguousarray(array) for name, array in given.items()}
        self.templates = {}  # what ``template`` was asked for -> Pass
        self.loops = {}  # the shape of a call -> ``InferenceLoop`` of the layer whose first strand this is
        self.packed = None  # the latest ``PackedWeights``
        self.matrices = Matrices([self.arrays[name] for name in ("weight_ih", "weight_hh", "weight_hr")])
        self._addresses = {name: address(array) for name, array in self.arrays.items()}
        if all(self.arrays[name] is array for name, array in given.items()):
            w.ready = self

    def template(self, cell, T, B, dtype, reverse, save):
        """A ``Pass`` to copy: what every pass with these weights and of this shape has."""
        key = T, B, reverse, save, cell, dtype  # evaluation may run another cell, which saves other blocks
        template = self.templates.get(key)
        if template is None:
            if len(self.templates) >= _TEMPLATES:
                self.templates.clear()
            H, hr = len(self.arrays["weight_ih"]) // len(cell.gates), self.arrays["weight_hr"]
            template = self.templates[key] = Pass(
                cell=struct_name(cell.name), dtype=dtype_number(dtype), weights_dtype=self.dtype, bits=self.bits, T=T,
                B=B, H=H, P=H if hr is None else len(hr), reverse=reverse, save=save, gates_row=cell.saved_blocks * H,
                **self._addresses,
            )  # fmt: skip
        return template


class Product(ctypes.Structure):
    """``Product`` of interface.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("dtype", "c_dtype", "accumulate")),
        *((name, _stride) for name in ("M", "N", "K", "a_row", "a_column", "b_row", "b_column", "c_row")),
        *((name, _pointer) for name in ("A", "B", "C")),
        ("bits", ctypes.c_int),
        ("room", _pointer),
        ("room_bytes", ctypes.c_size_t),
    ]


class Update(ctypes.Structure):
    """``Update`` of interface.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("rule", "is_double")),
        ("N", _stride),
        ("scalars", ctypes.c_double * 8),
        *((name, _pointer) for name in ("grads", "params")),
        ("arrays", _pointer * 3),
    ]


class CrossEntropy(ctypes.Structure):
    """``CrossEntropy`` of interface.h."""

    _fields_ = [
        ("is_double", ctypes.c_int),
        *((name, _stride) for name in ("count", "V")),
        ("smoothing", ctypes.c_double),
        *((name, _pointer) for name in ("logits", "rows", "labels", "losses", "highest", "total", "scale", "dlogits")),
    ]


class Stage(ctypes.Structure):
    """``Stage`` of interface.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("kind", "dtype", "rows", "in_", "out", "directions", "threads", "bits")),
        *((name, _pointer) for name in ("x", "weight", "scales", "packed", "bias", "y")),
        ("passes", ctypes.POINTER(Pass)),
        ("generated", _pointer),
    ]


@functools.cache
def dtype_number(dtype):
    """A dtype as the library counts it."""
    return DTYPES.index(dtype.name)


@functools.cache
def struct_name(name):
    """The name of a cell's struct as the library takes it. It stays alive: copies of a ``Pass`` hold its address."""
    return name.encode()


def library_path():
    """The library's file, or None where it was not built.

    A build on this machine names it as Python names its extensions. A wheel has one name for all versions of Python,
    some of which (those without a lock for all threads) know no ``.abi3.so``.
    """
    folder = Path(__file__).parents[2]  # the package gpurnn
    suffixes = (*importlib.machinery.EXTENSION_SUFFIXES, ".abi3.so", ".dylib", ".dll")
    return next(filter(Path.is_file, (folder / f"_native{suffix}" for suffix in suffixes)), None)


def opened(path):
    """The library of a file, and why it does not load: one of the two is None."""
    try:
        _check_whole(path)
        return ctypes.CDLL(str(path)), None
    except OSError as error:
        return None, str(error)


def _check_whole(path):
    """Raise OSError for an ELF file that ends too early: where pages of it are missing, loading ends the process."""
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:6] == b"\x7fELF\2\1" and len(head) == 64:  # 64 bits, the lowest byte first
            start, (size, count) = struct.unpack_from("<Q", head, 40)[0], struct.unpack_from("<HH", head, 58)
            if start + size * count > file.seek(0, os.SEEK_END):  # the table of sections is the last thing in it
                raise OSError(f"{path}: the file ends too early")


@functools.cache
def load_native():
    """Load the library.

    Returns ``(library, level)``, or None where it was not built or does not load. level: index in LEVELS, the best of
    this processor or that of ``GPURNN_ISA``. Raises BackendError for a library of another version of gpurnn, and as
    ``chosen_level``.
    """
    path = library_path()
    library = None if path is None else opened(path)[0]
    if library is None:
        return None
    number = ctypes.c_int
    structs = (Pass, Product, Update, CrossEntropy, Stage)
    expected = (*map(ctypes.sizeof, structs), _INTERFACE)
    sizes = getattr(library, "gpurnn_native_bytes", None)
    if sizes is None or any(sizes(n) != size for n, size in enumerate(expected)):
        raise BackendError(
            f"{path} was built from other sources than these: install gpurnn again, with --force-reinstall"
        )
    library.gpurnn_native_add_rows.argtypes = [_pointer, _stride, number, _stride, number, _pointer, number, number]
    library.gpurnn_native_round.argtypes = [_pointer, _stride, number, _pointer, number, number]
    library.gpurnn_native_add_squares.argtypes = [_pointer, _stride, number, _pointer, number, number]
    word, long = ctypes.c_uint32, ctypes.c_uint64
    library.gpurnn_native_dropout_mask.argtypes = [_stride, long, word, word, long, _pointer, number, number]
    return library, chosen_level(library.gpurnn_native_level())


def chosen_level(best):
    """``GPURNN_ISA`` as an index in LEVELS, or ``best`` where it is not set. Bits of results differ between levels.

    Raises ValueError for a word that is not in ISAS, BackendError where this processor lacks it.
    """
    name = os.environ.get("GPURNN_ISA")
    if not name:
        return best
    level = ISAS.index(check_choice("GPURNN_ISA", name, ISAS))
    if level > best:
        raise BackendError(f"GPURNN_ISA={name}: this processor has no {LEVELS[level]}; it can do {ISAS[best]}")
    return level


def address(array):
    """Address of an array's first number; None for None."""
    if array is None:
        return None
    try:  # a quarter of the time that ctypes.data takes
        return ctypes.addressof(_first_byte(array if array.flags.c_contiguous else array.T))
    except (BufferError, TypeError, ValueError):  # read-only, or with strides
        return array.ctypes.data


_first_byte = (ctypes.c_char * 0).from_buffer
