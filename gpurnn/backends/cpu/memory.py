"""MemoryPool: memory of arrays that are gone, for the next ones."""

import collections
import contextlib
import ctypes
import math
import mmap
import os
import threading
import tracemalloc
import weakref

import numpy as np

from .native import address

_PATIENCE = 0.01  # seconds to wait for the lock: fresh memory takes less than that
_STRETCH = 256  # arrays after which the oldest peak of use is forgotten: some training steps
_LIMIT = 1 << 29  # bytes that a pool may hold unused
_PAGES = 1 << 17  # bytes of the smallest array whose memory is worth saving
_HUGE = 1 << 21  # bytes of the system's large pages; of memory of two or more we ask for them
_DOMAIN = 0x47505552  # of our memory in tracemalloc


def pool_room(size, limit=_LIMIT):
    """Bytes of the memory in a pool that an array of ``size`` bytes takes; None for one that is not pooled.

    It is up to 3 % more, so that arrays of T and T + 1 timesteps fit into the same memory.
    """
    if not _PAGES <= size <= limit:
        return None
    step = 1 << (size.bit_length() - 6)
    return -(-size // step) * step


def fresh_memory(size):
    """``size`` bytes from the system. Raises MemoryError.

    Where it can, Linux gives them in pages of 2 MB: with pages of 4 KB a time loop that reads 12 MB of weights in each
    timestep takes a third longer. They are mapped for this array alone, as what ``malloc`` gives may be memory that
    another array had, in small pages.
    """
    if size < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(size, np.uint8)
    try:
        mapped = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"Unable to map {size} bytes: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(mapped, np.uint8)
    if tracemalloc.is_tracing():  # it knows of what malloc gives by itself
        ctypes.pythonapi.PyTraceMalloc_Track(_DOMAIN, ctypes.c_size_t(address(array)), ctypes.c_size_t(size))
        untrack = ctypes.pythonapi.PyTraceMalloc_Untrack
        weakref.finalize(mapped, untrack, _DOMAIN, ctypes.c_size_t(address(array))).atexit = False
    return array[-address(array) % _HUGE :][:size]


class MemoryPool:
    """Memory of arrays that are gone, for the next ones.

    The system clears each page of fresh memory at its first use. For arrays that live for one training update, that
    takes up to a fifth of the update's time. The pool holds at most ``limit`` bytes that are not in use, and at most
    one and a half times the bytes that have lately been in use at once. So it can hold arrays of several sizes, which
    an update needs one after another.

    An array may end at any moment and in any thread, even in one that runs a method of the pool. So its memory comes
    back through a queue. A method waits for the lock only briefly, because the same thread may hold it already, below a
    signal handler; then it takes memory from the system.
    """

    def __init__(self, limit=_LIMIT):
        self.limit = limit
        self.peaks = [
            0,
            0,
        ]  # most bytes in use at once, among the last _STRETCH arrays or fewer and among the _STRETCH before
        self.count = 0  # arrays since the peaks were moved on
        self.in_use = 0
        self.reset()
        _pools.add(self)

    def reset(self):
        """Forget all memory and locks: for a forked process, where the other threads are gone."""
        self.lock, self.returned = threading.Lock(), collections.deque()
        self.unused, self.bytes = (
            collections.OrderedDict(),
            0,
        )  # bytes -> list of memories, the least recently used first
        self.generation = object()  # memory of an earlier generation is not taken back

    def empty(self, shape, dtype, larger=False):
        """As ``np.empty``. The memory comes back when the last view of the array is gone.

        larger: whether unused memory of any larger size will do, as for what lives only for one call.
        """
        size = math.prod(shape) * dtype.itemsize
        room = pool_room(size, self.limit)
        if room is None:
            return np.empty(shape, dtype)
        if not self.lock.acquire(timeout=_PATIENCE):
            return np.empty(shape, dtype)
        try:
            self._sort_in()
            if larger:
                room = min((one for one in self.unused if one >= room), default=room)
            memory = self._take(room)
            generation = self.generation
        finally:
            self.lock.release()
        if memory is None:
            try:
                memory = fresh_memory(room)
            except MemoryError:  # the unused memory may suffice
                self.in_use -= room
                self.clear()
                return np.empty(shape, dtype)
        owner = _Block(memory)
        weakref.finalize(owner, self._take_back, memory, generation).atexit = False
        return np.asarray(owner)[:size].view(dtype).reshape(shape)  # __array_interface__ knows no dtype of ml_dtypes

    def clear(self):
        """Return the unused memory to the system."""
        if self.lock.acquire(timeout=_PATIENCE):
            try:
                self._sort_in()
                self._drop(self.bytes)
                self.peaks = [self.in_use, 0]
            finally:
                self.lock.release()

    def _take(self, room):
        """Unused memory of ``room`` bytes, or None. Either way ``room`` bytes count as in use from now on."""
        memories = self.unused.get(room)
        memory = memories.pop() if memories else None
        if memory is not None:
            self.bytes -= room
            if not memories:
                del self.unused[room]
        self.in_use += room
        self.count += 1
        if self.count == _STRETCH:
            self.count, self.peaks = 0, [0, self.peaks[0]]
        self.peaks[0] = max(self.peaks[0], self.in_use)
        self._drop(self._excess())
        return memory

    def _take_back(self, memory, generation):
        self.returned.append((memory, generation))
        if self.lock.acquire(blocking=False):  # else the thread that holds the lock, or the next to take it, does this
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self):
        """Make the memory that came back available. The caller holds the lock."""
        while self.returned:
            memory, generation = self.returned.popleft()
            if generation is not self.generation:
                continue
            room = memory.nbytes
            self.in_use -= room
            self.bytes += room
            self.unused.setdefault(room, []).append(memory)
            self.unused.move_to_end(room)
            self._drop(self._excess())

    def _excess(self):
        """Unused bytes beyond what the pool may hold."""
        return self.bytes - min(self.limit, max(self.peaks) * 3 // 2)

    def _drop(self, excess):
        """Drop at least ``excess`` bytes of unused memory, the least recently used first."""
        while excess > 0 and self.unused:
            room, memories = next(iter(self.unused.items()))
            memories.pop()
            if not memories:
                del self.unused[room]
            self.bytes -= room
            excess -= room


_pools = weakref.WeakSet()


def _reset_pools():
    for pool in list(_pools):
        pool.in_use = 0
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pools)


class _Block:
    """The NumPy base of all arrays over one memory: it lives as long as they do."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
