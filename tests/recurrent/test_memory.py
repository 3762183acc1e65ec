"""``memory``: time in segments that backward runs again, with equal bits."""

import tracemalloc

import numpy as np
import pytest
from helpers import cuda_ops, host
from segmented import LAYERS, all_results, leaves, marks_of

import gpurnn
from gpurnn.backends import chunks
from gpurnn.backends.cpu import packing
from gpurnn.recurrent import checkpoints, dropout
from gpurnn.testing import check_gradients

OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True},
    "stack": {"num_layers": 3, "dropout": 0.3, "residual": True},
    "two directions": {"bidirectional": True, "num_layers": 2, "dropout": 0.4, "residual": True},
    "dropped weights": {"learn_state": True, "weight_dropout": 0.3, "num_layers": 2},
    "two, dropped weights": {"bidirectional": True, "weight_dropout": 0.3, "learn_state": True},
    "layer norm, zoneout": {"layer_norm": True, "zoneout": 0.2},
    "two, recurrent dropout": {"bidirectional": True, "recurrent_dropout": 0.3, "num_layers": 2},
    "repeat": {"masked_output": "repeat", "reset_to": "initial", "learn_state": True, "batch_first": True},
    "heads": {"heads": 5, "bidirectional": True, "num_layers": 2, "learn_state": True},
}


def assert_equal_bits(layer, x, **marks):
    """With and without ``memory``; the layer has several segments with it."""
    whole = all_results(layer, x, **marks)
    calls, layer.memory = layer.calls, "sqrt"
    again = all_results(layer, x, **marks)
    assert layer.calls == calls
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.long
@pytest.mark.parametrize("how", ["full", "lengths", "marks"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_segments_change_no_bit(backend, kind, options, how, small_chunks):
    """Batches below and above the size from which NumPy's arrays are feature-major; T even, odd, shorter than a chunk,
    and such that a single timestep would be left over."""
    rng = np.random.default_rng(0)
    dtypes = ("float32",) if options or how == "marks" else ("float32", "float64", "float16", "bfloat16")
    for dtype in dtypes:
        for B, T in ((1, 17), (3, 1), (3, 9), (3, 16), (9, 7)):
            layer = LAYERS[kind](4, 5, backend=backend, dtype=dtype, seed=1, **options)
            x = rng.standard_normal((B, T, 4) if layer.batch_first else (T, B, 4)).astype(layer.dtype)
            assert_equal_bits(layer, x, **marks_of(layer, how, T, B, rng))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("options", [{"proj_size": 2, "num_layers": 2}, {"peephole": True}, {"bidirectional": True}])
def test_segments_change_no_bit_in_short(backend, options, small_chunks):
    rng = np.random.default_rng(0)
    layer = gpurnn.LSTM(4, 5, backend=backend, seed=1, **options)
    assert_equal_bits(layer, rng.standard_normal((16, 3, 4)).astype("float32"))


@pytest.mark.long
def test_segments_of_the_size_that_calls_have():
    """The chunks of a real call, where BLAS multiplies many rows on several threads."""
    rng = np.random.default_rng(0)
    for backend in ("numpy", "cpu"):
        layer = gpurnn.LSTM(16, 24, backend=backend, seed=1)
        assert_equal_bits(layer, rng.standard_normal((1500, 7, 16)).astype("float32"))


@pytest.mark.emulated
@pytest.mark.parametrize("options", [{}, {"reverse": True, "num_layers": 2, "dropout": 0.3}, {"bidirectional": True}])
def test_segments_on_an_emulated_gpu(options, small_chunks):
    layer = gpurnn.LSTM(4, 5, backend=cuda_ops(), seed=1, **options)
    x = layer.xp.asarray(np.random.default_rng(0).standard_normal((9, 3, 4)).astype("float32"))
    found = []
    for memory in (None, "sqrt"):
        layer.memory, layer.calls = memory, 0
        layer.zero_grad()
        output, state, backward = layer.forward(x, lengths=[9, 0, 4])
        dx, dstate = backward(output, state)
        found.append([host(one) for one in (output, *state, dx, *dstate, layer.flat_grads.copy())])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_gradients_of_segments(small_chunks):
    """Finite differences, which know nothing of segments."""
    x = np.random.default_rng(0).standard_normal((9, 2, 3))
    for options in ({"num_layers": 2}, {"bidirectional": True}):
        layer = gpurnn.GRU(3, 4, backend="numpy", dtype="float64", memory="sqrt", seed=0, **options)
        check_gradients(layer, x)


def test_backward_twice(small_chunks):
    rng = np.random.default_rng(0)
    for options in ({"num_layers": 2}, {"bidirectional": True}):
        layer = gpurnn.LSTM(4, 5, backend="cpu", memory="sqrt", seed=1, **options)
        x = rng.standard_normal((17, 3, 4)).astype("float32")
        reset = rng.random((17, 3)) < 0.2
        output, _, backward = layer.forward(x, reset=reset, retain=True)
        found = []
        for _ in range(2):
            layer.zero_grad()
            found.append((backward(output)[0], layer.flat_grads.copy()))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)
        output, _, backward = layer.forward(x)
        backward(output)
        with pytest.raises(RuntimeError, match="backward ran already"):
            backward(output)


def test_inference_in_segments(small_chunks):
    x = np.random.default_rng(0).standard_normal((17, 3, 4)).astype("float32")
    for options in ({"num_layers": 2}, {"bidirectional": True}):
        layer = gpurnn.LSTM(4, 5, backend="numpy", seed=1, **options)
        whole = layer(x)
        layer.memory = "sqrt"
        for one, other in zip(leaves(layer(x)), leaves(whole), strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_wants_all_of_time_gets_it(small_chunks):
    layer, x = gpurnn.LSTM(3, 4, backend="cpu", memory="sqrt", seed=0), np.ones((20, 2, 3), "float32")
    assert layer(x, return_all=True)[2][0].h.shape == (20, 2, 4)
    with gpurnn.record_gradient_flow() as flow:
        output, _, backward = layer.forward(x)
        backward(output)
    assert flow["l0"].dh.shape == (20, 2)
    output, _, backward = layer.forward(x)
    with gpurnn.record_gradient_flow(), pytest.raises(RuntimeError, match="forward ran in segments"):
        backward(output)


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("square", ValueError, "memory should be None, 'sqrt', 'states', or bytes such as '1GiB'"),
        ("0", ValueError, "memory should be None"),
        ("1 apple", ValueError, "memory should be a number of bytes"),
        (0, ValueError, "memory should be at least 1"),
        (1.5, TypeError, "memory should be an int"),
        (True, TypeError, "memory should be an int"),
    ],
)
def test_what_memory_may_be(value, error, message):
    layer = gpurnn.GRU(3, 4, backend="numpy")
    with pytest.raises(error, match=message):
        layer.memory = value
    assert layer.memory is None
    with pytest.raises(error, match=message):
        gpurnn.GRU(3, 4, backend="numpy", memory=value)


def test_memory_and_what_excludes_it():
    assert gpurnn.RNN(3, 4, memory="1.5KiB", backend="numpy").memory == 1536
    with pytest.raises(ValueError, match="memory: a wavefront"):
        gpurnn.GRU(3, 4, 2, wavefront=3, memory="sqrt", backend="numpy")
    layer = gpurnn.GRU(3, 4, 2, memory="sqrt", backend="numpy")
    assert "memory='sqrt'" in repr(layer) and layer.save == "all"
    states = gpurnn.GRU(3, 4, 2, save="states", backend="numpy")
    assert states.save == states.memory == "states"
    assert layer.plan(10**5, 4).peak_bytes < states.plan(10**5, 4).peak_bytes
    with pytest.raises(ValueError, match="save: memory says what is saved"):
        gpurnn.GRU(3, 4, save="states", memory="sqrt", backend="numpy")
    with pytest.raises(ValueError, match="save"):
        gpurnn.GRU(3, 4, save="gates", backend="numpy")
    with pytest.raises(ValueError, match="wavefront: memory has segments"):
        layer.wavefront = 3
    with pytest.raises(ValueError, match="memory: batch_norm counts timesteps"):
        gpurnn.GRU(3, 4, batch_norm=True, memory="sqrt", backend="numpy")


# ---- budgets, and what plan says


def test_the_longest_segments_that_fit(small_chunks):
    layer = gpurnn.LSTM(4, 16, backend="numpy", seed=0)
    T, B = 60, 3
    all_of_it = layer.plan(T, B).peak_bytes
    layer.memory = all_of_it
    plan = layer.plan(T, B)
    assert plan.recompute == 0 and plan.peak_bytes == all_of_it and "one segment" in plan.reason
    layer.memory = all_of_it - 1
    plan = layer.plan(T, B)
    assert 0 < plan.recompute < 0.2 and plan.steps_again == 0 and plan.peak_bytes < all_of_it
    assert "4 segments of up to 54 timesteps. All states are saved; backward rebuilds the gates" in plan.reason
    layer.memory = 1
    with pytest.raises(ValueError, match="takes at least (.*) bytes") as caught:
        layer.plan(T, B)
    with pytest.raises(ValueError, match="memory: a training call with T = 60, B = 3"):
        layer.forward(np.ones((T, B, 4), "float32"))
    least = int(str(caught.value).partition("at least ")[2].split()[0])
    layer.memory = least - 1
    with pytest.raises(ValueError, match=f"takes at least {least} bytes"):
        layer.plan(T, B)
    layer.memory = least
    assert layer.plan(T, B).peak_bytes == least
    assert_equal_bits_at(layer, np.ones((T, B, 4), "float32"), least)


def assert_equal_bits_at(layer, x, memory):
    layer.memory = None
    whole = all_results(layer, x)
    layer.memory = memory
    for one, other in zip(all_results(layer, x), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_plan_says_of_two_directions(small_chunks):
    layer = gpurnn.GRU(4, 16, 2, bidirectional=True, memory="sqrt", backend="numpy")
    plan = layer.plan(60, 3)
    assert plan.recompute == 1 and "in each direction. The inputs of all layers" in plan.reason
    assert gpurnn.GRU(4, 16, backend="numpy").plan(60, 3).recompute == 0


def test_inference_needs_no_room_for_gates(small_chunks):
    layer = gpurnn.LSTM(4, 4, memory=5000, backend="numpy", seed=0)
    x = np.random.default_rng(0).standard_normal((50, 3, 4)).astype("float32")
    with pytest.raises(ValueError, match="memory: a training call"):
        layer.forward(x)
    output, _ = layer(x)
    layer.memory = None
    np.testing.assert_array_equal(layer(x)[0], output)


def test_plan_without_timesteps():
    for memory in (None, "sqrt", 10**6):
        layer = gpurnn.GRU(4, 16, memory=memory, backend="numpy")
        assert layer.plan(0, 3).recompute == 0
        layer.forward(np.ones((0, 3, 4), "float32"))[2]()


SHAPES = {  # cell, options, I, H, T, B
    "lstm": (gpurnn.LSTM, {}, 64, 128, 400, 16),
    "gru": (gpurnn.GRU, {}, 64, 128, 400, 16),
    "gru, long": (gpurnn.GRU, {}, 16, 64, 8000, 1),
    "rnn": (gpurnn.RNN, {}, 64, 256, 400, 16),
    "stack": (gpurnn.LSTM, {"num_layers": 3}, 64, 128, 500, 8),
    "residual": (gpurnn.LSTM, {"num_layers": 2, "dropout": 0.3, "residual": True}, 64, 128, 500, 8),
    "two directions": (gpurnn.LSTM, {"bidirectional": True}, 64, 128, 400, 16),
    "stack of two": (gpurnn.GRU, {"bidirectional": True, "num_layers": 2, "dropout": 0.3}, 64, 128, 500, 8),
    "projected": (gpurnn.LSTM, {"proj_size": 64}, 64, 128, 400, 16),
    "zoneout": (gpurnn.LSTM, {"zoneout": 0.2}, 64, 128, 400, 16),
    "wide x": (gpurnn.GRU, {}, 256, 64, 400, 16),
    "float64": (gpurnn.RNN, {"num_layers": 2, "dtype": "float64"}, 64, 128, 500, 8),
    "float16": (gpurnn.LSTM, {"num_layers": 2, "dropout": 0.3, "dtype": "float16"}, 64, 128, 500, 8),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "name, backend",
    [(name, "cpu") for name in SHAPES] + [(name, "numpy") for n, name in enumerate(SHAPES) if n % 4 == 0 and n < 12],
)
def test_peak_is_what_plan_says(name, backend, monkeypatch):
    """Of the first call, to 5 %: with everything saved, in segments of the square root, and in a budget. What compiled
    code packs is allocated where Python cannot see it."""
    monkeypatch.setattr(chunks, "ROWS", 1024)
    monkeypatch.setattr(packing, "_LARGE", 1 << 60)  # none of it is lent by the pool, whose memory Python sees
    kind, options, I, H, T, B = SHAPES[name]
    layer = kind(I, H, backend=backend, seed=0, **options)
    x = np.zeros((T, B, I), layer.dtype)
    doutput = np.zeros(layer(x[:1])[0].shape[1:], layer.dtype)[None].repeat(T, 0)
    layer.forward(x[:2])[2](doutput[:2])  # first-call effects outside the measurement
    most = layer.plan(T, B).peak_bytes
    layer.memory = "sqrt"
    budget = (most + layer.plan(T, B).peak_bytes) // 2
    for memory in (None, "sqrt", "states", budget) if backend == "cpu" else (None, "states", budget):
        layer.memory = memory
        layer.ops.empty_cache()
        plan = layer.plan(T, B)
        tracemalloc.start()
        output, _, backward = layer.forward(x)
        dx, _ = backward(doutput)
        _, measured = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        predicted = plan.peak_bytes - plan.packed_bytes
        assert abs(predicted - measured) <= 0.05 * measured, f"memory={memory}: {predicted} instead of {measured}"
        assert memory != budget or measured <= budget
        del output, backward, dx
    if name in ("lstm", "stack"):
        marked(layer, x, doutput)


def marked(layer, x, doutput):
    """The peak with resets and a mask, in a budget."""
    rng, (T, B, _) = np.random.default_rng(0), x.shape
    reset, mask = rng.random((T, B)) < 0.1, rng.random((T, B)) < 0.9
    layer.memory = "sqrt"
    layer.memory = budget = layer.plan(T, B, marked=True).peak_bytes * 5 // 4
    layer.ops.empty_cache()
    plan = layer.plan(T, B, marked=True)
    tracemalloc.start()
    output, _, backward = layer.forward(x, reset=reset, mask=mask)
    backward(doutput)
    _, measured = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(plan.peak_bytes - plan.packed_bytes - measured) <= 0.05 * measured, (plan.peak_bytes, measured)
    assert measured <= budget


# ---- training


def test_a_training_has_the_same_bits(small_chunks):
    """Weights after some updates, with dropout whose draws are counted, and with a carried state."""
    found = []
    for memory in (None, "sqrt"):
        text = gpurnn.TextBatches(np.arange(201) % 5, batch_size=4, steps=10)
        lstm = gpurnn.LSTM(8, 16, 2, dropout=0.3, zoneout=0.1, memory=memory, seed=1, backend="cpu")
        layers = gpurnn.Embedding(5, 8, seed=1, backend="cpu"), lstm, gpurnn.Linear(16, 5, seed=1, backend="cpu")
        model = gpurnn.Sequential(*layers)
        adam = gpurnn.Adam(model, lr=0.01)
        gpurnn.fit(model, gpurnn.cross_entropy, text, optimizer=adam, epochs=2, progress=False)
        found.append(model.flat_params.copy())
    assert lstm.plan(10, 4).recompute > 0
    np.testing.assert_array_equal(*found)


# ---- planted errors: what these tests are for


def test_other_masks_in_the_second_run_are_noticed(small_chunks, monkeypatch):
    layer = gpurnn.LSTM(4, 5, recurrent_dropout=0.5, backend="numpy", seed=1)
    x = np.ones((16, 2, 4), "float32")
    rebuild = checkpoints.Border.rebuild

    def drawn_anew(self, layer, segment, call):
        call.cell_masks = dropout.cell_masks(layer, 16, 2)  # backward's layer has counted the call
        return rebuild(self, layer, segment, call)

    monkeypatch.setattr(checkpoints.Border, "rebuild", drawn_anew)
    with pytest.raises(AssertionError):
        assert_equal_bits(layer, x)


def test_states_of_the_wrong_border_are_noticed(small_chunks, monkeypatch):
    layer = gpurnn.LSTM(4, 5, backend="numpy", seed=1)
    rebuild, seen = checkpoints.Border.rebuild, []

    def of_the_segment_after(self, layer, segment, call):
        seen.append(self)
        return rebuild(seen[-2] if len(seen) > 1 else self, layer, segment, call)

    monkeypatch.setattr(checkpoints.Border, "rebuild", of_the_segment_after)
    with pytest.raises(AssertionError):
        assert_equal_bits(layer, np.ones((24, 2, 4), "float32"))
