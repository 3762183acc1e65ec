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
    array = room[-address(room) % _LINE :][: size.value]
    call(address(array), 1 if size.value < sharing.WORK // 8 else sharing.thread_count(), size)
    return array


def packed_weights(ops, cell, ready, job):
    """The ``PackedWeights`` for a forward pass that saves nothing, or None where it packs them itself.

    A write through an array is seen: each call compares a fingerprint of all weights, which takes a tenth of the time
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
    size, half = (8 if problem.dtype == "float64" else 4), ITEMSIZE[problem.dtype] == 2
    lanes, cell = (16 << ops.level) // size, problem.cell
    B, H, I, D = problem.B, problem.H, problem.I, problem.directions
    G, first, second = len(cell.gates), cell.first, len(cell.hidden) - cell.first

    def row(outputs, gates=1):
        """Numbers in a packed row: whole blocks of ``Packed`` in gemm.h."""
        units = lanes if gates > 1 else 2 * lanes
        return -(-outputs // units) * units * gates

    weights = row(H, G) * I + row(H, first) * P + row(H, second) * H + (row(P) * H if P < H else 0)
    threads, by_units = sharing.share(T, B, sharing.units_to_share(cell, P < H, H), T * B * G * H * (P + I), D)
    rows_ahead = min(T * B, max(B, threads * _AHEAD))
    ahead = rows_ahead * (row(H, G) + half * I)  # W_ih x of some timesteps; of 16 bits x as floats
    at_once = threads if by_units else min(D, threads)  # how many have room for all sequences
    products = max(row(H, first), row(P)) + row(H, second) + half * (max(H, P) + H * bool(second))
    forward = (weights if T > 1 else 0) * D // (1 + half) + (products * B + ahead) * at_once
    backward = row(P) * first * H + row(P) * second * H + (row(H) * P if P < H else 0)
    copies = half * max(H, P, first * H, second * H)  # of what a product reads, as floats
    through_time = backward * D // (1 + half) + B * (max(row(P), row(H)) + copies) * at_once
    rows = B * max((part.stop - part.start for part in ops.time_chunks(T, B)), default=0)
    gradients = rows * max(row(I), row(P))  # x and h, for the weight gradients
    return size * max(forward, through_time, gradients, G * H * row(I))
