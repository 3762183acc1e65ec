"""``Group``: the processes that train one model together, and what they say to each other.

Everything else of ``gpurnn.train.parallel`` is written on two operations of a group: ``start_sum``, which adds an array
over all processes, and ``gather``, which collects bytes. A group of one process does neither.

Every exchange begins with a head of a fixed size, which names what it is for: processes that are at different places of
a program learn it there, all of them, instead of taking one thing for another. Few bytes travel in the head itself.

A sum has two parts. Every process gets its slice of the array from all others and adds these in the order of the
ranks; then every process gets the finished slices of all others. So a sum has the same bits on all processes and in
every run, and (N - 1) / N of the array crosses the link twice, which is the least that is possible.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ... import checkpoint, errors, folder_lock
from ..._typing import Array, State
from .. import history

_NAME, _INSIDE = 56, 80  # bytes of a head: the name of the exchange, and data that need no second message
GRACE = 5.0  # seconds in which all processes must fail to call it an error of all, and in which a hung one may answer


class PeerError(RuntimeError):
    """The first process failed in what it does for all of them; raised on the others."""


class Sum:
    """A sum over all processes that is on its way; ``finish`` waits for it. Of one process it is done."""

    def advance(self) -> None:
        """Do what can be done without waiting."""

    def finish(self) -> None:
        """Wait until the array holds the sum."""


class Group:
    """A process on its own, and the base of the groups that ``init`` makes.

    Attributes
    ----------
    rank, size : int
        The number of this process and of all. Process 0 writes files, draws bars and calls callbacks.
    kind : str
        "none", "mpi" or "nccl".
    quiet : bool
        Whether a failure is printed as one line, as commands do, instead of with its traceback.
    """

    kind = "none"
    rank, size = 0, 1
    quiet = False
    _heard: BaseException | None = None  # an error with which all have failed: it need not be asked about again
    warned = False  # that a training does not name the group
    at = "the start"  # the exchange that this process has reached

    # ---- what a kind of group overrides

    def start_sum(self, array: Array) -> Sum:
        """Begin to add a 1-D array over all processes, in place. All must begin their sums in the same order."""
        return Sum()

    def gather_equal(self, data: bytes) -> list[bytes]:
        """The bytes of every process, by rank; as many from each."""
        return [data]

    def gather_counted(self, data: bytes, counts: list[int]) -> list[bytes]:
        """The bytes of every process, of which there are so many by rank."""
        each = self.gather_equal(data.ljust(max(counts), b"\0"))
        return [one[:count] for one, count in zip(each, counts, strict=True)]

    def all_fail(self, seconds: float) -> bool:
        """Whether within so many seconds all processes call this."""
        return True

    def abort(self, code: int) -> None:
        """End all processes at once."""

    # ---- the rest

    def close(self) -> None:
        """Wait until all processes are here. Called once, at the end: it ends no process, and frees nothing."""
        self.gather(b"", "the end of the group")

    def gather(self, data: bytes, what: str = "an exchange") -> list[bytes]:
        """The bytes of every process, by rank. Raises ValueError, on all, unless all name the same ``what``."""
        if self.size == 1:
            return [data]
        self.at = what
        name = what.encode()[:_NAME]
        head = len(data).to_bytes(8, "little") + name.ljust(_NAME, b"\0") + data[:_INSIDE].ljust(_INSIDE, b"\0")
        heads = self.gather_equal(head)
        names = [one[8 : 8 + _NAME].rstrip(b"\0").decode(errors="replace") for one in heads]
        odd = next((rank for rank, one in enumerate(names) if one != names[0]), None)
        if odd is not None:
            raise ValueError(
                f"group: the processes are at different places of the program: process {odd} is at {names[odd]}, "
                f"process 0 at {names[0]}. All must call the same functions in the same order, with as many batches"
            )
        counts = [int.from_bytes(one[:8], "little") for one in heads]
        parts = [one[8 + _NAME :][:count] for one, count in zip(heads, counts, strict=True)]
        more = [max(0, count - _INSIDE) for count in counts]
        if any(more):
            parts = [one + rest for one, rest in zip(parts, self.gather_counted(data[_INSIDE:], more), strict=True)]
        return parts

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes, prints and calls callbacks."""
        return self.rank == 0

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: Any, error: Any, *_: Any) -> None:
        if kind is None or (kind is SystemExit and not error.code):
            with self.guarded():
                self.close()
        else:
            self._end_unless_all_fail(error)

    def add(self, array: Array) -> Array:
        """Add a 1-D array over all processes, in place, in the order of the ranks; returns it."""
        self.start_sum(array).finish()
        return array

    def gather_numbers(self, *numbers: float, what: str = "an exchange of numbers") -> Array:
        """The numbers of every process, float64: a row for each rank."""
        row = np.array(numbers, np.float64)
        return np.stack([np.frombuffer(data, np.float64) for data in self.gather(row.tobytes(), what)])

    def add_numbers(self, *numbers: float, what: str = "a sum of numbers") -> list[float]:
        """The sums of numbers over all processes, in the order of the ranks."""
        if self.size == 1:
            return list(numbers)
        return [add_in_order(column) for column in self.gather_numbers(*numbers, what=what).T]

    def send(self, document: Any = None, what: str = "a message") -> Any:
        """What process 0 gives here, JSON-ready, on all processes."""
        if self.size == 1:
            return document
        return json.loads(self.gather(json.dumps(document).encode() if self.is_first else b"", what)[0])

    def send_arrays(self, arrays: dict[str, Array] | None = None, what: str = "arrays") -> dict[str, Array]:
        """The NumPy arrays that process 0 gives here, on all processes."""
        if self.size == 1:
            return arrays or {}
        arrays = arrays or {}
        shapes = self.send([[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()], what)
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        data, start, received = self.gather(data if self.is_first else b"", what)[0], 0, {}
        for name, dtype, shape in shapes:
            count = int(np.prod(shape, dtype=np.int64))
            received[name] = np.frombuffer(data, dtype, count, start).reshape(shape).copy()
            start += received[name].nbytes
        return received

    def first(self, function: Callable[[], Any], what: str = "a call of process 0") -> Any:
        """Call a function on process 0 alone; returns its result there and None on the others.

        What it raises is raised on all processes: on the others the same kind of error with the same message.
        """
        if self.size == 1:
            return function()
        result, failure = None, None
        if self.is_first:
            try:
                result = function()
            except BaseException as error:
                failure = error
        name = failure if failure is None else [type(failure).__name__, str(failure)]
        try:
            name = self.send(name, what)
        except ValueError as elsewhere:
            raise elsewhere from failure
        if failure is not None:
            raise failure
        if name is not None:
            raise _error_of(*name)
        return result

    # ---- sequences by position

    def bounds(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """The sequences (first, one past the last) of ``count`` that a process computes; the first ranks get more."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.size)
        first = rank * each + min(rank, more)
        return first, first + each + (rank < more)

    def whole_state(self, state: State, to_host: Callable[[Array], Array]) -> State:
        """The recurrent state of the whole batch, of NumPy arrays, from those of all processes."""
        if self.size == 1 or state is None:
            return state
        if isinstance(state, (tuple, list)):
            return tuple(self.whole_state(part, to_host) for part in state)
        part = np.ascontiguousarray(to_host(state))
        axis = part.ndim - 2
        what, parts = "the recurrent state for a checkpoint", []
        counts = [int(data) for data in self.gather(str(part.shape[axis]).encode(), what)]
        for data, count in zip(self.gather(part.tobytes(), what), counts, strict=True):
            shape = (*part.shape[:axis], count, *part.shape[axis + 1 :])
            parts.append(np.frombuffer(data, part.dtype).reshape(shape))
        return np.concatenate(parts, axis)

    def own_state(self, state: State) -> State:
        """This process's part of the recurrent state of a whole batch."""
        if self.size == 1 or state is None:
            return state
        if isinstance(state, (tuple, list)):
            return tuple(map(self.own_state, state))
        axis = state.ndim - 2
        first, last = self.bounds(state.shape[axis])
        return state[(slice(None),) * axis + (slice(first, last),)].copy()

    # ---- failures

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A block in which no process is left waiting for one that has failed.

        Where all processes raise, each raises its own error. Otherwise the one that failed says so on standard error,
        and all are ended.
        """
        try:
            yield
        except BaseException as error:
            self._end_unless_all_fail(error)
            raise

    def _end_unless_all_fail(self, error):
        if self.size == 1 or error is self._heard:
            return
        if not self.all_fail(GRACE):
            self._report(error)
            self.abort(1)
        self._heard = error

    def _report(self, error: BaseException) -> None:
        what = f"process {self.rank} of {self.size} failed, and all were ended"
        if self.quiet:
            text = f"Error: {what}: {type(error).__name__}: {errors.one_line(error, 2000)}\n"
        else:
            text = "".join(traceback.format_exception(error)) + f"{what}\n"
        say_at_once(text)


def say_at_once(text: str) -> None:
    """Write to standard error, past what holds it back."""
    with contextlib.suppress(OSError, AttributeError):
        sys.__stderr__.write(text)
        sys.__stderr__.flush()


def add_in_order(numbers: Array) -> float:
    """The sum of numbers, one after another."""
    return float(np.add.accumulate(numbers)[-1])


def _error_of(name: str, message: str) -> BaseException:
    """An error like the one that process 0 raised."""
    for module in (errors, checkpoint, folder_lock, history, builtins):
        kind = getattr(module, name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            with contextlib.suppress(Exception):
                return kind(message)
    return PeerError(f"{name}: {message}")
