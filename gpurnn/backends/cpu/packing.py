"""Weights in the order in which products read them: packed once, and used until they change."""

import ctypes
from typing import NamedTuple

import numpy as np

from ...cells.record import Cell
from ...dtypes import DTYPES, ITEMSIZE
from . import sharing
from .native import Stage, address, dtype_number

_AHEAD = 48  # AHEAD of layer.h
_ROWS = 2048  # with so many rows of x, packing anew takes less than a hundredth of the time loop
_LINE = 64  # bytes of a cache line, where packed weights begin
_FEW_ROWS = 8  # FEW_ROWS of gemm.h
_LARGE = 1 << 20  # bytes that the pool lends: for less the library's own memory is as fast


class PackedWeights(NamedTuple):
    """Packed weights that nobody changes.

    array: bytes, from a cache line on, at this address. cell, dtype: for which, as evaluation may run another cell, and
    float32 may be rounded to 16 bits. mark: the fingerprint of what was packed.
    """

    cell: Cell
    dtype: int
    mark: int
    array: np.ndarray
    address: int


def pack(ops, cell, job, mark=0):
    """The ``PackedWeights`` of a ``Pass``.

    Raises MemoryError where there is no room for them.
    """
    library = cell.struct and ops._generated(cell, np.dtype("float64" if DTYPES[job.dtype] == "float64" else "float32"))

    def call(to, threads, size):
        arguments = ctypes.byref(job), ctypes.c_void_p(to), threads, ctypes.byref(size)
        if not library:
            ops._call("pack", *arguments, ops.level, threads=threads)
        else:
            ops._raise(library.pack(*arguments), "pack", threads)

    array = _filled(ops, call)
    return PackedWeights(cell, job.dtype, mark, array, address(array))


def pack_linear(ops, stage):
    """The packed weight of a linear ``Stage``: bytes, from a cache line on. Raises MemoryError."""

    def call(to, threads, size):
        arguments = ctypes.byref(stage), ctypes.c_void_p(to), ctypes.byref(size)
        ops._call("pack_linear", *arguments, ops.level, threads=threads)

    return _filled(ops, call)


def packed_linear(ops, weight, dtype):
    """An ``Int8Matrix`` as products of this dtype read it: packed once, and remembered with it."""
    key = ops.level, dtype.itemsize
    if key not in weight.packed:
        (out, columns), number = weight.shape, dtype_number(dtype)
        arrays = [np.ascontiguousarray(array) for array in (weight.values, weight.scales)]
        stage = Stage(2, number, 0, columns, out, weight=address(arrays[0]), scales=address(arrays[1]))
        weight.packed[key] = pack_linear(ops, stage)
    return weight.packed[key]


def _filled(ops, call):
    """What ``call(address, threads, size)`` writes; without an address it sets the size alone."""
    size = ctypes.c_size_t()
    call(None, 1, size)
    room = ops.store.empty((size.value + _LINE,), np.dtype(np.uint8))
    array = _from_line(room, size.value)
    call(address(array), 1 if size.value < sharing.WORK // 8 else sharing.thread_count(), size)
    return array


def _from_line(room, size):
    """The ``size`` bytes of an array from a cache line on."""
    return room[-address(room) % _LINE :][:size]


def lend_room(ops, job, size):
    """Give a ``Pass`` or ``Product`` memory of ``size`` bytes of the pool to pack in, if that is much.

    The system clears fresh memory page by page, for a large matrix in each call anew. Returns what is to live as long.
    """
    if size < _LARGE:
        return None
    try:
        room = ops.store.empty((size + _LINE,), np.dtype(np.uint8), larger=True)
    except MemoryError:  # the library tries in turn, and says what for
        return None
    job.room, job.room_bytes = address(_from_line(room, size)), size
    return room


def pass_bytes(ops, cell, job, back):
    """The bytes that a ``Pass`` packs, forward or back."""
    if job.packed or job.T == 1 and not job.flat and not back:
        return 0
    sizes = Sizes(ops.level, DTYPES[job.dtype])
    P = job.P if job.weight_hr else None
    return sizes.size * (sizes.backward(cell, job.H, P) if back else sizes.forward(cell, job.H, job.I, P))


def product_bytes(ops, job):
    """The bytes that a ``Product`` packs: B, in the dtype that it computes in."""
    if job.M <= _FEW_ROWS and job.a_column == job.b_row == 1:  # most of those read B as it lies
        return 0
    sizes = Sizes(ops.level, "float64" if DTYPES[job.dtype] == "float64" else "float32")
    return sizes.size * sizes.matrix(job.N, job.K)


class Sizes:
    """The numbers that ``Packed`` of gemm.h takes, of ``size`` bytes each."""

    def __init__(self, level, dtype):
        self.size, self.half = (8 if dtype == "float64" else 4), ITEMSIZE[dtype] == 2
        self.lanes = (16 << level) // self.size

    def row(self, outputs, gates=1):
        """A row of products: whole blocks."""
        units = self.lanes if gates > 1 else 2 * self.lanes
        return -(-outputs // units) * units * gates

    def matrix(self, outputs, columns, gates=1):
        return self.row(outputs, gates) * (-(-columns // 2) if self.half else columns)

    def forward(self, cell, H, I, P=None):
        """All weights of one direction. P: of a projection."""
        first, second = cell.first, len(cell.hidden) - cell.first
        projection = 0 if P is None else self.matrix(P, H)
        hidden = self.matrix(H, H if P is None else P, first) + self.matrix(H, H, second)
        return self.matrix(H, I, len(cell.gates)) + hidden + projection

    def backward(self, cell, H, P=None):
        first, second = cell.first, len(cell.hidden) - cell.first
        outputs, projection = (H, 0) if P is None else (P, self.matrix(H, P))
        return self.matrix(outputs, first * H) + self.matrix(outputs, second * H) + projection


def packed_weights(ops, cell, ready, job):
    """The ``PackedWeights`` for a forward pass that saves nothing, or None where it packs them itself.

    A write through an array is seen: each call compares a fingerprint of all weights, which takes a fifth of the time
    that packing does. ready: their ``NativeWeights``; calls in other threads may use the ones before meanwhile.
    """
    if not ready.bits and (job.T == 1 or job.T * job.B > _ROWS):
        return None
    mark = 0 if ready.bits else fingerprint(ops, ready.matrices)  # those in 8 bits are forgotten when they change
    packed = ready.packed
    if packed is None or packed.mark != mark or packed.cell is not cell or packed.dtype != job.dtype:
        try:
            packed = pack(ops, cell, job, mark)
        except MemoryError:
            return None
        if ready.bits or fingerprint(ops, ready.matrices) == mark:  # else another thread has written meanwhile
            ready.packed = packed
    return packed


def fingerprint(ops, matrices):
    """A number that changes with the weights. matrices: their ``Matrices``."""
    mark = ctypes.c_uint64()
    threads = 1 if matrices.bytes < sharing.WORK // 4 else sharing.thread_count()
    ops._call("fingerprint", *matrices.arguments, ctypes.byref(mark), threads, ops.level, threads=threads)
    return mark.value


def packed_bytes(ops, problem, P, T):
    """The most bytes that a call of T timesteps takes for packed weights, products and copies; see ``Ops``."""
    sizes, cell = Sizes(ops.level, problem.dtype), problem.cell
    size, half, row = sizes.size, sizes.half, sizes.row
    B, H, I, D = problem.B, problem.H, problem.I, problem.directions
    G, first, second = len(cell.gates), cell.first, len(cell.hidden) - cell.first
    projected = P if P < H else None
    weights = sizes.forward(cell, H, I, projected) if T > 1 else 0
    threads, by_units = sharing.share(T, B, sharing.units_to_share(cell, P < H, H), T * B * G * H * (P + I), D)
    rows_ahead = min(T * B, max(B, threads * _AHEAD))
    ahead = rows_ahead * (row(H, G) + half * I)  # W_ih x of some timesteps; of 16 bits x as floats
    at_once = threads if by_units else min(D, threads)  # how many have room for all sequences
    products = max(row(H, first), row(P)) + row(H, second) + half * (max(H, P) + H * bool(second))
    forward = weights * D + (products * B + ahead) * at_once
    copies = half * max(H, P, first * H, second * H)  # of what a product reads, as floats
    through_time = sizes.backward(cell, H, projected) * D + B * (max(row(P), row(H)) + copies) * at_once
    rows = B * max((part.stop - part.start for part in ops.time_chunks(T, B)), default=0)
    gradients = rows * max(row(I), row(P))  # x and h, for the weight gradients
    return size * max(forward, through_time, gradients, G * H * row(I))
