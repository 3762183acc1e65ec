"""LoopPool: the time loops that are recorded as CUDA graphs, and who uses them."""

import functools
import logging
import threading
import weakref
from collections import OrderedDict, deque

_REMEMBERED = 256  # shapes whose calls are counted
_log = logging.getLogger("gpurnn")


class LoopPool:
    """The recorded loops. A shape that comes back gets a loop that is saved and recorded; others are dropped.

    The arrays of a saved loop belong to one call at a time, from its forward pass until nobody holds the call's
    ``Lease`` any more. Calls that overlap get a loop each. capacity: most loops that are saved. bytes: most memory of
    all of them. Past either limit, the least recently used loop is dropped. (Where a loop is large, launches cost
    little beside the work, so recording would gain little.)
    """

    def __init__(self, capacity, bytes=1 << 30):
        self.capacity, self.bytes = capacity, bytes
        self.seen = OrderedDict()  # key -> None
        self.free = OrderedDict()  # loop number -> (key, loop), the least recently used first
        # (key, loop) that came back while the lock was held: a lease may end at any moment, in any thread
        self.returned = deque()
        self._lock = threading.Lock()
        self.pooled = self.pooled_bytes = 0
        self.outcomes = OrderedDict()  # (schedules.Problem, name) -> why it is not recorded, or None where it is

    def take(self, key, make):
        """``(loop, lease)`` for this call. Hold the lease for as long as the loop's arrays are in use."""
        with self._lock:
            self._sort_in()
            number = next((number for number, (known, _) in self.free.items() if known == key), None)
            loop = None if number is None else self.free.pop(number)[1]
            again = key in self.seen
            self.seen[key] = None
            self.seen.move_to_end(key)
            if len(self.seen) > _REMEMBERED:
                self.seen.popitem(last=False)
        if loop is not None:
            return loop, self._lend(key, loop)
        loop = make()
        if not (again and self.capacity and loop.by_step):
            return loop, Lease(loop)
        with self._lock:
            self._sort_in()
            while not self._fits(loop) and self.free and loop.nbytes <= self.bytes:
                _, (_, dropped) = self.free.popitem(last=False)
                self._count(dropped, -1)
            fits = self._fits(loop)
            if fits:
                self._count(loop, 1)
            reason = (
                f"its arrays take {loop.nbytes / 1e6:.1f} MB; {self.pooled} loops with "
                f"{self.pooled_bytes / 1e6:.1f} MB are recorded and in use, "
                f"of {self.capacity} with {self.bytes / 1e6:.1f} MB at most"
            )
        if not fits:
            for name in loop.by_step:
                self.note(loop, name, reason)
            return loop, Lease(loop)
        loop.recorded, loop.note = True, functools.partial(self.note, loop)
        return loop, self._lend(key, loop)

    def clear(self):
        """Drop the loops that are not in use."""
        with self._lock:
            self._sort_in()
            for _, loop in self.free.values():
                self._count(loop, -1)
            self.free.clear()

    def note(self, loop, name, reason):
        """Store whether a loop was recorded, and log once why it was not."""
        key = loop.problems[name.partition(" ")[0]], name
        with self._lock:
            known = self.outcomes.get(key) == reason
            self.outcomes[key] = reason
            self.outcomes.move_to_end(key)
            if len(self.outcomes) > _REMEMBERED:
                self.outcomes.popitem(last=False)
        if reason and not known:
            _log.warning("the time loop of %s, %s, runs launch by launch: %s", loop, name, reason)

    def refusal(self, problem):
        """Why the schedule step of a ``schedules.Problem`` is not recorded, or None where it is or will be."""
        if not self.capacity:
            return "recording is off"
        with self._lock:
            return next((reason for (known, _), reason in self.outcomes.items() if known == problem and reason), None)

    def recordings(self):
        """As ``CudaOps.recordings``."""
        with self._lock:
            outcomes = list(self.outcomes.items())
        return [
            {"loop": str(problem), "pass": name, "recorded": reason is None, "reason": reason or ""}
            for (problem, name), reason in outcomes
        ]

    def _fits(self, loop):
        """Whether the limits leave room for one more loop."""
        return self.pooled < self.capacity and self.pooled_bytes + loop.nbytes <= self.bytes

    def _count(self, loop, sign):
        """Count a loop in (sign 1) or out (-1)."""
        self.pooled += sign
        self.pooled_bytes += sign * loop.nbytes

    def _lend(self, key, loop):
        """A lease whose end returns the loop to the pool."""
        lease = Lease(loop)
        weakref.finalize(lease, self._give_back, key, loop).atexit = False
        return lease

    def _give_back(self, key, loop):
        self.returned.append((key, loop))
        if self._lock.acquire(blocking=False):  # else the thread that holds the lock, or the next to take it, does this
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self):
        """Make the loops that came back available. The caller holds the lock."""
        while self.returned:
            key, loop = self.returned.popleft()
            self.free[id(loop)] = (key, loop)


class Lease:
    """Holds a loop for as long as its arrays are in use."""

    def __init__(self, loop):
        self.loop = loop
