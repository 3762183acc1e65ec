"""The group over NCCL on a stand-in for CuPy and NCCL: what is sent to whom, and that sums are right.

That proves nothing of NCCL itself, of GPUs, or of how fast it is.
"""

import ctypes
import queue
import threading
import types

import numpy as np
import pytest
from group_of_threads import together

import gpurnn
from gpurnn.train import parallel
from gpurnn.train.parallel.launchers import Place
from gpurnn.train.parallel.nccl import NcclGroup, Store


class FakeArray(np.ndarray):
    """A NumPy array that says where it lies, as CuPy's do."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


def fake_cupy():
    def empty(shape, dtype):
        return np.empty(shape, dtype).view(FakeArray)

    event = type("Event", (), {"record": lambda self: None, "done": True})
    stream = types.SimpleNamespace(ptr=7)
    cuda = types.SimpleNamespace(Event=event, get_current_stream=lambda: stream)
    return types.SimpleNamespace(
        empty=empty, add=np.add, asarray=lambda a: a.copy().view(FakeArray), asnumpy=np.asarray, cuda=cuda
    )


def memory(pointer, count):
    return (ctypes.c_uint8 * count).from_address(pointer)


class FakeNccl:
    """NCCL among threads. A send or receive outside a group, or of another stream or kind, is an error."""

    NCCL_UINT8 = 1

    def __init__(self, size):
        self.size, self.barrier, self.slots = size, threading.Barrier(size), [None] * size
        self.mail = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.local = threading.local()

    def get_unique_id(self):
        return (3, 1, 4)

    def groupStart(self):  # noqa: N802
        self.local.calls = []

    def groupEnd(self):  # noqa: N802
        calls, self.local.calls = self.local.calls, None
        for deliver in calls:  # sends first: a receive waits
            deliver()

    def NcclCommunicator(self, size, id, rank):  # noqa: N802
        assert (size, id) == (self.size, (3, 1, 4))
        fake = self

        class Communicator:
            def send(self, pointer, count, kind, peer, stream):
                assert (kind, stream) == (fake.NCCL_UINT8, 7) and peer != rank and count
                data = bytes(memory(pointer, count))
                fake.local.calls.insert(0, lambda: fake.mail[rank, peer].put(data))

            def recv(self, pointer, count, kind, peer, stream):
                assert (kind, stream) == (fake.NCCL_UINT8, 7) and peer != rank and count
                fake.local.calls.append(lambda: receive(pointer, count, peer))

            def allGather(self, sent, into, count, kind, stream):  # noqa: N802
                fake.slots[rank] = bytes(memory(sent, count))
                fake.barrier.wait()
                memory(into, count * size)[:] = b"".join(fake.slots)
                fake.barrier.wait()

        def receive(pointer, count, peer):
            data = fake.mail[peer, rank].get(timeout=20)
            assert len(data) == count
            memory(pointer, count)[:] = data

        return Communicator()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_exchanges(size):
    nccl = FakeNccl(size)

    def run(control):
        group = NcclGroup(fake_cupy(), nccl, control, 60)
        for count in (1, 2, 1000):
            array = ((np.arange(count) / 3).astype("float32") + np.float32(group.rank)).view(FakeArray)
            expected = (np.arange(count) / 3).astype("float32")
            for other in range(1, size):
                expected = expected + ((np.arange(count) / 3).astype("float32") + np.float32(other))
            assert group.add(array).tobytes() == expected.tobytes()
        assert group.gather(b"x" * group.rank) == [b"x" * k for k in range(size)]
        assert group.gather(b"") == [b""] * size
        assert group.send([1, 2] if group.is_first else None) == [1, 2]
        return group.add_numbers(0.1, 1)

    assert together(size, run) == [[pytest.approx(0.1 * size), size]] * size


class Shared(dict):
    """torch's store, as far as it is used."""

    def __init__(self):
        self.ready, self.count = threading.Event(), 0
        self.lock = threading.Lock()

    def set(self, key, value):
        self[key] = value.encode()
        self.ready.set()

    def get(self, key):
        while key not in self:
            self.ready.wait(20)
        return self[key]

    def add(self, key, more):
        with self.lock:
            self.count += more
            return self.count


def test_torchrun_s_store_carries_the_id_and_counts_failures():
    shared = Shared()
    shared["gpurnn/0/id"] = b"2,7,1"

    def run(group):
        store = Store(shared, Place("torchrun", group.rank, 2), "1")
        assert store.send([3, 1, 4] if group.rank == 0 else None) == [3, 1, 4], "not the id before the restart"
        return store.all_fail(20)

    assert together(2, run) == [True, True]
    assert not Store(Shared(), Place("torchrun", 0, 2)).all_fail(0.1), "the other one did not fail"


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(gpurnn.BackendError, match=r'pip install "gpurnn\[cuda12\]"'):
        parallel.init("nccl")
