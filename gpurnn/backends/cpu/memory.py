"""MemoryPool: memory of arrays that are gone, for the next ones."""

import collections
import math
import os
import threading
import weakref

import numpy as np

_PATIENCE = 0.01  # seconds to wait for the lock: fresh memory takes less than that
_STRETCH = 256  # arrays after which the oldest peak of use is forgotten: some training steps
_PAGES = 1 << 17  # bytes of the smallest array whose memory is worth saving


class MemoryPool:
    """Memory of arrays that are gone, for the next ones.

    Fresh memory is made of fresh pages, each of which the system clears at its first use: for arrays that live as long
    as one training step that is up to a fifth of the step's time. What is kept unused is no more than ``limit``, nor
    than one and a half times of what has lately been in use at once: arrays of different sizes that a step needs one
    after another are each kept.

    An array may end at any moment, in any thread, even in the one that is at work here: what comes back waits in a
    queue. Nobody waits long for the lock, as whoever holds it may be the one that asks, in a signal handler: memory
    then comes from the system.
    """

    def __init__(self, limit=1 << 29):
        self.limit = limit
        self.peaks = [0, 0]  # the most bytes in use at once, in this stretch of _STRETCH arrays and in the one before
        self.count = 0  # arrays of this stretch
        self.in_use = 0
        self.reset()
        _pools.add(self)

    def reset(self):
        """Forget all memory and whoever was at work: for a new process, where other threads are gone."""
        self.lock, self.returned = threading.Lock(), collections.deque()
        self.unused, self.bytes = collections.OrderedDict(), 0  # bytes -> list of memories, the longest unused first
        self.generation = object()  # of the memories that may come back

    def empty(self, shape, dtype):
        """As ``np.empty``; the memory comes back when the last view of the array is gone."""
        size = math.prod(shape) * dtype.itemsize
        if not _PAGES <= size <= self.limit:
            return np.empty(shape, dtype)
        step = 1 << (size.bit_length() - 6)
        room = -(-size // step) * step  # up to 3 % more, so that T and T + 1 steps share one memory
        if not self.lock.acquire(timeout=_PATIENCE):
            return np.empty(shape, dtype)
        try:
            self._sort_in()
            memory = self._take(room)
            generation = self.generation
        finally:
            self.lock.release()
        if memory is None:
            try:
                memory = np.empty(room, np.uint8)
            except MemoryError:  # what is unused may be what is missing
                self.in_use -= room
                self.clear()
                return np.empty(shape, dtype)
        owner = _Block(memory)
        weakref.finalize(owner, self._take_back, memory, generation).atexit = False
        return np.asarray(owner)[:size].view(dtype).reshape(shape)  # a dtype of ml_dtypes does not come through _Owner

    def clear(self):
        """Give back to the system what is unused."""
        if self.lock.acquire(timeout=_PATIENCE):
            try:
                self._sort_in()
                self._drop(self.bytes)
                self.peaks = [self.in_use, 0]
            finally:
                self.lock.release()

    def _take(self, room):
        """A memory of so many bytes, or None where there is none; it counts as in use from now on."""
        some = self.unused.get(room)
        memory = some.pop() if some else None
        if memory is not None:
            self.bytes -= room
            if not some:
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
        if self.lock.acquire(blocking=False):  # else whoever holds it, or the next one, sorts this in
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self):
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
        return self.bytes - min(self.limit, max(self.peaks) * 3 // 2)

    def _drop(self, excess):
        """Give back at least so many bytes of what is unused, the longest unused first."""
        while excess > 0 and self.unused:
            room, some = next(iter(self.unused.items()))
            some.pop()
            if not some:
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
    """What the arrays over one memory of bytes hold on to: NumPy makes it their base."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
