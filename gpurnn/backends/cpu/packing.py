"""Weights in the order in which products read them: packed once, and used until they change."""

import ctypes
from typing import NamedTuple

import numpy as np

from ...cells.record import Cell
from . import sharing
from .native import address

_ROWS = 2048  # with so many rows of x, packing anew takes less than a hundredth of the time loop
_LINE = 64  # bytes of a cache line, where packed weights begin
_NAMES = ("weight_ih", "weight_hh", "weight_hr")


class PackedWeights(NamedTuple):
    """Packed weights that nobody changes.

    array: bytes, from a cache line on. cell: whose they are, as evaluation may run another. mark: the fingerprint of
    what was packed.
    """

    cell: Cell
    mark: int
    array: np.ndarray


def pack(ops, cell, job, mark=0):
    """The ``PackedWeights`` of a ``Pass``.

    Raises MemoryError where there is no room for them.
    """
    library = None if cell.struct is None else ops._generated(cell, job.is_double)

    def call(to, threads, size):
        arguments = ctypes.byref(job), ctypes.c_void_p(to), threads, ctypes.byref(size)
        if library is None:
            ops._call("pack", *arguments, ops.level, threads=threads)
        else:
            ops._raise(library.pack(*arguments), "pack", threads)

    return PackedWeights(cell, mark, _filled(ops, call))


def pack_linear(ops, stage):
    """The packed weight of a linear ``Stage``: bytes, from a cache line on. Raises MemoryError."""

    def call(to, threads, size):
        arguments = ctypes.byref(stage), ctypes.c_void_p(to), ctypes.byref(size)
        ops._call("pack_linear", *arguments, ops.level, threads=threads)

    return _filled(ops, call)


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
    if job.T == 1 or job.T * job.B > _ROWS or ready.arrays["scale_ih"] is not None:  # those in 8 bits are never packed
        return None
    mark = fingerprint(ops, ready)
    packed = ready.packed
    if packed is None or packed.mark != mark or packed.cell is not cell:
        try:
            packed = ready.packed = pack(ops, cell, job, mark)
        except MemoryError:
            return None
    return packed


def fingerprint(ops, ready):
    """A number that changes with the weights."""
    mark = ctypes.c_uint64()
    for name in _NAMES:
        array = ready.arrays[name]
        if array is not None:
            threads = 1 if array.nbytes < sharing.WORK // 4 else sharing.thread_count()
            ops._call(
                "fingerprint", address(array), array.nbytes, ctypes.byref(mark), threads, ops.level, threads=threads
            )
    return mark.value
