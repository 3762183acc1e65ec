"""Inference through loops that are prepared once for each shape: the bits of a training call, whatever came before."""

import gc
import threading
import weakref

import numpy as np
import pytest

import gpurnn
from gpurnn.backends.cpu import inference
from gpurnn.backends.records import RunOptions
from gpurnn.check import CELLS, OPTIONS, build

cpu = gpurnn.get_backend("cpu")
if not hasattr(cpu, "library"):
    pytest.skip("gpurnn._native was not built", allow_module_level=True)


def x_of(layer, T, B, seed=0):
    shape = (B, T, layer.input_size) if layer.batch_first else (T, B, layer.input_size)
    return np.random.default_rng(seed).normal(size=shape).astype(layer.dtype)


def all_bits(result):
    """The bytes of all arrays in nested tuples."""
    return [all_bits(part) for part in result] if isinstance(result, tuple) else (result.shape, result.tobytes())


def loops_run(monkeypatch):
    """The loops that are run, one after another."""
    found, before = [], inference.InferenceLoop.run
    monkeypatch.setattr(
        inference.InferenceLoop, "run", lambda self, *arguments: found.append(self) or before(self, *arguments)
    )
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_are_those_of_a_training_call(cell, dtype):
    for options in OPTIONS.values():
        layer = build(cell, "cpu", dtype, H=5, **options).eval()
        states = [None]
        for T, B in ((7, 3), (2, 3), (7, 1), (7, 3)):
            x = x_of(layer, T, B, seed=T)
            for state in states if B == 3 else (None,):
                expected = layer.forward(x, state)[:2]
                assert all_bits(layer(x, state)) == all_bits(expected), (options, T, B)
            states += [expected[1]] * (B == 3)


def test_a_loop_is_made_once_for_a_shape_and_runs_with_weights_as_they_are(monkeypatch):
    run = loops_run(monkeypatch)
    layer = gpurnn.LSTM(4, 6, bidirectional=True, backend="cpu", seed=0).eval()
    x = x_of(layer, 5, 2)
    for factor in (1, 2):
        layer.params["weight_hh_l0_reverse"][...] *= factor
        layer.params["bias_ih_l0"][...] *= factor
        assert all_bits(layer(x)) == all_bits(layer.forward(x)[:2])
    layer.load_state_dict({name: array * 2 for name, array in layer.state_dict().items()})
    assert all_bits(layer(x)) == all_bits(layer.forward(x)[:2])
    assert len(run) == 3 and run[0] is run[1]


def test_a_layer_that_moves_into_a_model_runs_with_its_new_arrays():
    layer = gpurnn.GRU(4, 6, num_layers=2, bidirectional=True, backend="cpu", seed=0).eval()
    x = x_of(layer, 5, 2)
    layer(x)
    model = gpurnn.Sequential(layer, gpurnn.Linear(12, 3, backend="cpu", seed=1)).eval()
    for array in model.params.values():
        array *= 2
    assert all_bits(layer(x)) == all_bits(layer.forward(x)[:2])


def test_an_output_is_not_written_by_the_next_call():
    layer = gpurnn.LSTM(4, 6, backend="cpu", seed=0).eval()
    first = layer(x_of(layer, 5, 2))
    before = all_bits(first)
    layer(x_of(layer, 5, 2, seed=1))
    assert all_bits(first) == before
    first[0][...] = 0  # nor are the states part of it
    assert all_bits(first[1]) == before[1]


@pytest.mark.parametrize("option", ["lengths", "reset", "mask", "dropout", "weight_dropout", "memory", "heads", "own"])
def test_a_call_with_something_else(option, monkeypatch):
    run = loops_run(monkeypatch)
    more = {
        "dropout": {"dropout": 0.5, "num_layers": 2}, "weight_dropout": {"weight_dropout": 0.5},
        "memory": {"memory": "sqrt"}, "heads": {"heads": 2},
    }.get(option, {})  # fmt: skip
    layer = gpurnn.LSTM(4, 6, backend="cpu", seed=0, **more)
    if option == "own":
        layer = gpurnn.Recurrent(gpurnn.cells.indrnn, 4, 6, backend="cpu", seed=0)
    given = {
        "lengths": {"lengths": [3, 5]}, "reset": {"reset": np.eye(5, 2, dtype=bool)},
        "mask": {"mask": ~np.eye(5, 2, dtype=bool)},
    }.get(option, {})  # fmt: skip
    x = x_of(layer, 5, 2)
    layer.calls = 0
    found = all_bits(layer(x, **given))
    layer.calls = 0
    assert found == all_bits(layer.forward(x, **given)[:2])
    assert not (run and given)


def test_threads_of_the_caller_may_run_one_loop_at_once():
    layer = gpurnn.LSTM(16, 64, num_layers=2, backend="cpu", seed=0).eval()
    xs = [x_of(layer, 20, 3, seed) for seed in range(4)]
    expected, wrong = [all_bits(layer(x)) for x in xs], []

    def call(x, bits):
        wrong.extend(1 for _ in range(25) if all_bits(layer(x)) != bits)

    callers = [threading.Thread(target=call, args=both) for both in zip(xs, expected, strict=True)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong


def test_it_forgets_shapes(monkeypatch):
    monkeypatch.setattr(inference, "_LOOPS", 3)
    layer = gpurnn.GRU(4, 6, backend="cpu", seed=0).eval()
    for T in range(1, 9):
        layer(x_of(layer, T, 2))
    assert 1 <= len(layer._weights(0)[0].ready.loops) <= 3


def test_weights_go_when_the_last_reference_goes():
    layer = gpurnn.GRU(4, 6, bidirectional=True, backend="cpu", seed=0).eval()
    layer(x_of(layer, 5, 2))
    ready = [weakref.ref(w.ready) for w in layer._weights(0)]
    gc.disable()
    try:
        layer._made.clear()
        assert [one() for one in ready] == [None, None]
    finally:
        gc.enable()


def test_a_loop_is_not_run_with_other_weights_of_the_second_direction():
    first, second = (gpurnn.GRU(4, 6, bidirectional=True, backend="cpu", seed=seed).eval() for seed in (0, 1))
    x, options = x_of(first, 5, 2), RunOptions((False, True), False, True, inference=True)

    def output(weights):
        return cpu.layer_forward(first.cell, x, weights, [(0.0,), (0.0,)], None, options)[2]

    forward = first._weights(0)[0]
    assert output(first._weights(0)).tobytes() == first(x)[0].tobytes()
    mixed = output([forward, second._weights(0)[1]])
    assert mixed[..., 6:].tobytes() == second(x)[0][..., 6:].tobytes()
