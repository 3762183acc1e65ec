"""A group whose processes are threads of this one: what they compute together, without a launcher.

Each thread has its own context, so its layers compute its part. What MPI and NCCL carry is tested elsewhere.
"""

import threading

import numpy as np

from gpurnn.train.parallel import Group


class Meeting:
    """Where the threads of one group meet."""

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size), [None] * size
        self.reported = []


class ThreadGroup(Group):
    kind = "threads"

    def __init__(self, rank, meeting):
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def gather_equal(self, data):
        meeting = self.meeting
        meeting.slots[self.rank] = data
        meeting.barrier.wait()
        received = list(meeting.slots)
        meeting.barrier.wait()
        return received

    def start_sum(self, array):
        """A sum is made at once, whatever else goes on."""
        total = None
        for part in self.gather_equal(array.copy()):
            total = part.copy() if total is None else total + part
        array[...] = total
        return super().start_sum(array)

    def all_fail(self, seconds):
        """The others wait where this thread will never come: they fail by that."""
        return True


def together(size, function):
    """``function(group)`` in each of ``size`` threads; returns their results by rank, or raises the first error.

    A thread that raises breaks the barrier, so that no other waits for it.
    """
    meeting = Meeting(size)
    results, errors = [None] * size, []

    def run(rank):
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                results[rank] = function(ThreadGroup(rank, meeting))
        except BaseException as error:
            errors.append((isinstance(error, threading.BrokenBarrierError), rank, error))
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise min(errors, key=lambda one: one[:2])[2]
    return results
