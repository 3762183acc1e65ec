"""Packed weights in inference: used as long as the weights are the same, with the results of weights packed anew."""

import threading

import numpy as np
import pytest

import gpurnn
from gpurnn.backends.cpu import packing
from gpurnn.backends.cpu.native import Matrices
from gpurnn.check import CELLS, OPTIONS, build

cpu = gpurnn.get_backend("cpu")
if not hasattr(cpu, "library"):
    pytest.skip("gpurnn._native was not built", allow_module_level=True)

SHAPE = (6, 3)  # T, B


def x_of(layer, T=SHAPE[0], B=SHAPE[1]):
    shape = (B, T, layer.input_size) if layer.batch_first else (T, B, layer.input_size)
    return np.random.default_rng(0).normal(size=shape).astype(layer.dtype)


def packed_anew(layer, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_ROWS", 0)
        return layer(x)


def all_bits(result):
    """The bytes of all arrays in nested tuples."""
    return [all_bits(part) for part in result] if isinstance(result, tuple) else result.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_weights_packed_anew(cell, dtype, level, threads, monkeypatch):
    for count, options in zip((1, 2, 3) * 3, OPTIONS.values(), strict=True):
        threads(count, by_units=count == 3)
        layer = build(cell, "cpu", dtype, H=19, **options).eval()
        x = x_of(layer)
        expected = all_bits(packed_anew(layer, x, monkeypatch))
        assert all_bits(layer(x)) == expected, options
        assert all_bits(layer(x)) == expected, options


def counted(monkeypatch):
    """Counts how often weights are packed to be used again."""
    found, before = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *arguments: found.append(1) or before(*arguments))
    return found


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "weight_hr"])
def test_they_are_packed_once_until_a_weight_is_written_through_its_array(name, monkeypatch):
    layer = gpurnn.LSTM(5, 33, proj_size=7, backend="cpu", seed=0).eval()
    x, packed = x_of(layer), counted(monkeypatch)
    before = all_bits(layer(x))
    layer(x)
    layer(x_of(layer, 9, 2))
    assert len(packed) == 1
    weight = layer.params[f"{name}_l0"]
    for write in (
        lambda: np.negative(weight, out=weight),
        lambda: weight.__setitem__(slice(0, 2), weight[1::-1].copy()),  # two rows change places
        lambda: weight.__setitem__((-1, -1), 3),
    ):
        write()
        now = all_bits(layer(x))
        assert now == all_bits(packed_anew(layer, x, monkeypatch))
        assert now != before
        before = now
    assert len(packed) == 4


def test_they_are_packed_anew_after_a_training_step(monkeypatch):
    layer = gpurnn.LSTM(5, 33, backend="cpu", seed=0)
    x = x_of(layer)
    for _ in range(2):
        layer.eval()
        assert all_bits(layer(x)) == all_bits(packed_anew(layer, x, monkeypatch))
        layer.train()
        output, _, backward = layer.forward(x)
        backward(np.ones_like(output))
        gpurnn.optim.SGD(layer, 0.1).step()


def test_another_cell_packs_them_for_itself(monkeypatch):
    """Evaluation may run another cell with the same weights."""
    layer, seen = gpurnn.LSTM(5, 33, backend="cpu", seed=0).eval(), []
    before = packing.packed_weights
    monkeypatch.setattr(packing, "packed_weights", lambda *arguments: seen.append(arguments[2]) or before(*arguments))
    x = x_of(layer)
    expected = all_bits(layer(x))
    (ready,) = seen
    ready.packed = ready.packed._replace(cell=None, array=np.zeros_like(ready.packed.array))
    assert all_bits(layer(x)) == expected


def test_not_where_it_does_not_pay(monkeypatch):
    packed = counted(monkeypatch)
    layer = gpurnn.GRU(4, 8, backend="cpu", seed=0)
    for memory in (None, "sqrt"):  # which runs parts of the time loop without saving them
        layer.memory = memory
        layer.forward(x_of(layer, 70))  # training changes the weights
    layer.eval()
    layer(x_of(layer, 1))  # a single timestep reads them where they lie
    layer(x_of(layer, packing._ROWS // 4 + 1, 4))
    assert not packed


def test_weights_that_change_while_they_are_packed_are_not_remembered(monkeypatch):
    layer = gpurnn.GRU(4, 8, backend="cpu", seed=0).eval()
    x, weight, before = x_of(layer), layer.params["weight_hh_l0"], packing.pack
    expected = all_bits(packed_anew(layer, x, monkeypatch))

    def disturbed(*arguments):  # as by another thread
        np.negative(weight, out=weight)
        return before(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", disturbed)
        layer(x)
    np.negative(weight, out=weight)
    assert all_bits(layer(x)) == expected


def test_without_room_for_them_it_runs_as_before(monkeypatch):
    layer = gpurnn.GRU(4, 8, backend="cpu", seed=0).eval()
    x = x_of(layer)
    expected = all_bits(layer(x))

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(packing, "pack", full)
    layer.params["weight_hh_l0"][...] *= 1
    twin = gpurnn.GRU(4, 8, backend="cpu", seed=0).eval()
    assert all_bits(twin(x)) == expected


def test_threads_of_the_caller_may_share_a_layer():
    layer = gpurnn.LSTM(16, 64, backend="cpu", seed=0).eval()
    x = x_of(layer)
    expected, found = all_bits(layer(x)), []

    def call():
        twin = None
        for _ in range(50):
            twin = all_bits(layer(x))
            found.append(twin == expected)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert len(found) == 200 and all(found)


def mark(array):
    return packing.fingerprint(cpu, Matrices([None, array]))


@pytest.mark.parametrize("size", [1, 3, 8, 63, 64, 65, 200, 999, 1 << 14, (1 << 14) + 1, 50_001])
def test_any_bit_that_changes_changes_the_fingerprint(size, level, threads):
    array = np.random.default_rng(size).normal(size=size).astype("float32")
    first = mark(array)
    assert mark(array.copy()) == first
    threads(3)
    assert mark(array) == first
    words, seen = array.view("uint32"), {first}
    places = sorted({0, size // 2, size - 1})
    for place in places:
        for bit in (0, 22, 31):
            words[place] ^= np.uint32(1 << bit)
            seen.add(mark(array))
            words[place] ^= np.uint32(1 << bit)
    assert len(seen) == 1 + 3 * len(places)
    assert mark(array) == first
    if size == 999:  # two signs, at any distance in the vectors that are read in turn
        pairs = [(one, other) for one in (0, 1) for other in range(one + 1, size)]
        for pair in pairs:
            array[list(pair)] *= -1
            seen.add(mark(array))
            array[list(pair)] *= -1
        assert len(seen) == 1 + 3 * len(places) + len(pairs)
    if size > 1:
        assert mark(array[::-1].copy()) not in seen
        assert mark(-array) not in seen
        assert mark(array[:-1].copy()) not in seen


def lent_by(monkeypatch, share):
    """Every room that passes and products get from now on, however small, filled with 7. share: of what they need, how
    much they are told it is."""
    rooms = []

    def lend(ops, job, size):
        room = np.full(size + 64, 7, np.uint8)
        begin = -room.ctypes.data % 64
        job.room, job.room_bytes = room.ctypes.data + begin, int(size * share)
        rooms.append(room[begin : begin + size])
        return room

    monkeypatch.setattr(packing, "lend_room", lend)
    return rooms


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_memory_that_is_lent_changes_no_bits(cell, dtype, level, monkeypatch):
    """What is packed for one call lies in memory of the pool. Where that is too little the library takes its own."""
    for options in OPTIONS.values():
        results = []
        for share in (None, 1, 0.5):
            with monkeypatch.context() as patch:
                rooms = [] if share is None else lent_by(patch, share)
                layer = build(cell, "cpu", dtype, H=19, **options)
                output, _, backward = layer.forward(x_of(layer))
                dx, _ = backward(np.ones_like(output))
                results.append((all_bits((output, dx)), [grad.tobytes() for grad in layer.grads.values()]))
                assert any((room != 7).any() for room in rooms) == (share == 1), options
        assert results[0] == results[1] == results[2], options
