"""The compiled time loop on the CPU against array code and float64: cells, odd sizes, threads, strided products."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import OPTIMIZERS, compare, results

import gpurnn
from gpurnn import BackendError, get_backend, rng
from gpurnn.backends import switch
from gpurnn.backends.cpu import native
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.check import CELLS, OPTIONS
from gpurnn.recurrent.dropout import draw_mask

if cpu_ops.load_native() is None and not shutil.which("c++"):
    pytest.skip("gpurnn._native was not built: there is no C++ compiler", allow_module_level=True)


def test_it_was_built():
    assert cpu_ops.load_native(), "there is a C++ compiler: run pip install -e ."


SIZES = ((1, 1, 1), (16, 5, 7), (33, 3, 13), (40, 1, 3))  # H, T, B; the last in a single step: nothing is packed
RUNS = {  # option -> threads for each of SIZES, whether ragged
    "plain": ((2, 2, 1, 2), (False, True, True, False)),
    "no bias": ((3, 3, 2, 3), (False, True, False, True)),
    "bidirectional": ((1, 1, 3, 1), (False, True, True, False)),
    "reverse": ((2, 2, 1, 2), (False, True, False, True)),
    "two layers": ((3, 3, 2, 3), (False, True, True, False)),
    "two sizes, bidirectional": ((1, 1, 3, 1), (False, True, False, True)),
    "batch first": ((2, 2, 1, 2), (False, True, True, False)),
    "learned state": ((3, 3, 2, 3), (False, True, False, True)),
    "wavefront": ((1, 1, 3, 1), (False, True, True, False)),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_and_option_is_no_worse_than_array_code(cell, dtype, level, threads):
    """At sizes on both sides of a vector, of a group of rows and of a column block, on one to three threads."""
    assert RUNS.keys() == OPTIONS.keys()
    for name, options in OPTIONS.items():
        for (H, T, B), count, ragged in zip(SIZES, *RUNS[name], strict=True):
            threads(count)
            sized = {} if "hidden_size" in options else {"H": max(H, 5) if "projected" in cell else H}
            compare(cell, "cpu", dtype, T, B, ragged, name != "learned state", **options, **sized)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_columns_past_one_chunk(cell, level, threads):
    """H above CHUNK_COLUMNS of gemm.h, so that sums are added up from several chunks."""
    threads(2)
    compare(cell, "cpu", "float32", 3, 5, H=300)


@pytest.mark.parametrize(
    "T, B, H", [(6, 11, 19), *(pytest.param(1, B, H, marks=pytest.mark.long) for B, H in [(11, 19), (1, 150)])]
)
@pytest.mark.parametrize("bidirectional", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("cell", CELLS)
def test_equal_bits_for_any_number_of_threads(cell, bidirectional, T, B, H, level, threads):
    """Which share sequences or units."""
    rng, (layer_class, own) = np.random.default_rng(0), CELLS[cell]
    layer = layer_class(5, H, 2, bidirectional=bidirectional, backend="cpu", seed=1, **own)
    x = rng.standard_normal((T, B, 5)).astype(np.float32)
    doutput = rng.standard_normal(layer(x)[0].shape).astype(np.float32)
    lengths = rng.integers(0, T + 1, B) if B > 1 else None
    found = []
    for count, by_units in ((1, False), (2, False), (2, True), (3, False), (3, True), (16, False), (16, True)):
        threads(count, by_units)
        found.append(results(layer, x, doutput, lengths))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert np.array_equal(one, two)


FORK = """
import os, threading
import numpy as np
import gpurnn
from gpurnn.backends.cpu import sharing

sharing.WORK, sharing._ROWS = 0, 1
lstm = gpurnn.LSTM(20, 30, backend="cpu", seed=0)
x = np.random.default_rng(0).standard_normal((9, 12, 20)).astype("float32")
expected = lstm(x)[0]
right = lambda: all(np.array_equal(lstm(x)[0], expected) for _ in range(20))
child = os.fork()
if child == 0:
    os._exit(0 if right() else 3)  # helpers of its own
assert os.waitpid(child, 0)[1] == 0, "the child was wrong or died"
child = os.fork()
if child == 0:
    raise SystemExit(0)  # ends as a program does, without helpers
assert os.waitpid(child, 0)[1] == 0, "the child did not end"
found = []
threads = [threading.Thread(target=lambda: found.append(right())) for _ in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert found == [True] * 5 and right()
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_go_on_in_a_fork_and_beside_one_another():
    environment = os.environ | {"GPURNN_NUM_THREADS": "3", "PYTHONWARNINGS": "ignore"}  # of a fork beside threads
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_sequence_does_not_depend_on_its_neighbours(threads):
    threads(2)
    rng = np.random.default_rng(0)
    lstm = gpurnn.LSTM(4, 10, backend="cpu", seed=1)
    x = rng.standard_normal((5, 9, 4)).astype(np.float32)
    whole = lstm(x)[0]
    for b in (0, 4, 8):
        assert np.array_equal(lstm(x[:, b : b + 1].copy())[0][:, 0], whole[:, b])


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_what_was_in_memory_does_not_matter(cell, watched, monkeypatch):
    """Past a sequence's end the loop leaves gates as they were: nothing may come of them, nor a warning."""
    ops, drawn = get_backend("cpu"), np.random.default_rng(0)
    x, lengths = drawn.standard_normal((6, 4, 3)).astype(np.float32), [6, 0, 2, 5]
    found = []
    for number in (0.0, 1e38, np.nan):
        monkeypatch.setattr(
            ops, "empty", lambda T, B, F, dtype, number=number: np.full((T, B, F), number, dtype), raising=True
        )
        kind, own = CELLS[cell]
        layer = kind(3, 5, 2, bidirectional=True, backend="cpu", seed=1, **own)
        doutput = np.ones_like(layer(x)[0])
        with gpurnn.record_gradient_flow() if watched else contextlib.nullcontext():
            found.append(results(layer, x, doutput, lengths))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def activated(dtype, x, **options):
    """tanh or relu of numbers, as the time loop computes it: an RNN with no recurrent weights."""
    rnn = gpurnn.RNN(1, 1, bias=False, backend="cpu", dtype=dtype, **options)
    rnn.params["weight_ih_l0"], rnn.params["weight_hh_l0"] = 1, 0
    return rnn(x.astype(dtype)[None, :, None])[0][0, :, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tanh(dtype):
    """Within four last places everywhere, near zero too; and what has no number."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-25, 25, 20000), rng.uniform(-1, 1, 20000), np.geomspace(1e-37, 30, 5000)])
    x = x.astype(dtype).astype(np.longdouble)
    exact = np.tanh(x)
    got = activated(dtype, x)
    spacing = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    assert np.max(np.abs(got - exact) / spacing) <= 4
    assert np.abs(got).max() <= 1
    odd = np.array([0.0, np.inf, -np.inf, np.nan, 1e30, -1e30])
    assert np.array_equal(activated(dtype, odd), [0, 1, -1, np.nan, 1, -1], equal_nan=True)


def test_relu():
    x = np.array([-2.0, -0.0, 0.0, 3.0, np.nan, np.inf])
    expected = [0, 0, 0, 3, np.nan, np.inf]
    assert np.array_equal(activated("float32", x, nonlinearity="relu"), expected, equal_nan=True)


STRIDES = {
    "plain": lambda a: a,
    "turned": lambda a: np.ascontiguousarray(a.T).T,
    "part of a wider one": lambda a: np.pad(a, ((0, 0), (2, 3)))[:, 2 : a.shape[1] + 2],
    "every second row": lambda a: np.repeat(a, 2, axis=0)[::2],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "M, K, N",
    [(1, 1, 1), (5, 3, 17), (49, 40, 16), (100, 1100, 33), (13, 0, 4), (13, 0, 32), (7, 300, 1), (50, 300, 64)],
)
def test_products_of_any_strides(M, K, N, accumulate, dtype, threads):
    rng = np.random.default_rng(M + K + N)
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (K, N), (M, N)))
    exact = a.astype(np.longdouble) @ b.astype(np.longdouble) + (c if accumulate else 0)
    plain = a @ b + (c if accumulate else 0)
    usual = np.abs(plain - exact).max()
    rounding = np.finfo(dtype).eps * max(1, np.abs(exact).max()) * (2 + K**0.5)  # where NumPy is exact by luck
    for name, of_output, count in (
        ("plain", "plain", 1), ("turned", "turned", 2), ("part of a wider one", "part of a wider one", 3),
        ("every second row", "plain", 1),
    ):  # fmt: skip
        threads(count)
        out = STRIDES[of_output](c.copy())
        get_backend("cpu").product(STRIDES[name](a), STRIDES[name](b), out, accumulate=accumulate)
        assert np.abs(out - exact).max() <= 2 * usual + rounding, name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("K", [0, 1, 15, 16, 33, 300])
def test_products_of_a_few_rows_with_weights(K, dtype, level, threads):
    """As a Linear has them for one step: rows of the weights lie side by side in K, and are read where they stand."""
    rng = np.random.default_rng(K)
    for M, N, count in ((1, 1, 1), (3, 17, 2), (8, 64, 1), (9, 64, 2)):
        threads(count)
        a, weights, c = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (N, K), (M, N)))
        exact = a.astype(np.longdouble) @ weights.T.astype(np.longdouble)
        for accumulate in (False, True):
            out = c.copy()
            get_backend("cpu").product(a, weights.T, out, accumulate=accumulate)
            allowed = np.finfo(dtype).eps * max(1, np.abs(exact).max()) * (2 + K**0.5)
            assert np.abs(out - exact - (c if accumulate else 0)).max() <= allowed


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, which lists the functions of a library")
def test_no_vector_crosses_a_call():
    """What takes or returns vectors is inlined: GCC 12 clears the upper parts of those that a function returns.

    It did in the time loop for AVX-512, which was wrong from the fifth unit on, on machines that the tests were not run
    on.
    """
    library, _ = cpu_ops.load_native()
    names = subprocess.run(["nm", "-C", library._name], check=True, capture_output=True, text=True).stdout
    assert "run_layer<float" in names
    assert not [name for name in names.splitlines() if "Vec<" in name]


def test_sums_over_steps():
    d = np.random.default_rng(0).standard_normal((50, 40, 24)).astype(np.float32)
    exact = d[:, :, :9].astype(np.float64).sum(axis=(0, 1))
    sums = get_backend("cpu").sum_steps(d[:, :, :9])
    assert sums.dtype == np.float32
    assert np.abs(sums - exact).max() <= np.finfo(np.float32).eps * np.abs(exact).max()


def optimised(name, backend, dtype, features, grads):
    """Parameters and states after a step for each of ``grads``, as float64."""
    model = gpurnn.Linear(features, features, backend=backend, dtype=dtype, seed=1)
    optimizer = OPTIMIZERS[name](model)
    for grad in grads:
        model.grads["weight"], model.grads["bias"] = grad[:-features].reshape(features, features), grad[-features:]
        optimizer.step()
    return [
        array.astype(np.float64).ravel() for array in (model.flat_params, *optimizer.state_dict()["arrays"].values())
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_is_no_worse_than_array_code(name, dtype, level, threads):
    """With 2, 72 and 1,056 parameters: parts of a vector, whole ones, and one to four threads with the same bits."""
    for features in (1, 8, 32):
        grads = np.random.default_rng(features).standard_normal((4, features * (features + 1))).astype(dtype)
        grads[1, ::2] = 0
        threads(1)
        exact, plain, found = (
            optimised(name, backend, number, features, grads)
            for backend, number in (("numpy", "float64"), ("numpy", dtype), ("cpu", dtype))
        )
        for got, usual, right in zip(found, plain, exact, strict=True):
            allowed = 2 * np.abs(usual - right).max() + 4 * np.finfo(dtype).eps * np.abs(right).max()
            assert np.abs(got - right).max() <= allowed
        for count in (2, 4):
            threads(count)
            for one, other in zip(found, optimised(name, "cpu", dtype, features, grads), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_squares_are_added_in_one_order(dtype, level, threads):
    """Of fewer numbers than a vector has, of whole sums and of rests; in double."""
    ops = get_backend("cpu")
    for size in (1, 7, 31, 4096, 4097, 20000):
        numbers = np.random.default_rng(size).standard_normal(size).astype(dtype)
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(ops.sum_squares(numbers))
        assert found[0] == found[1] == found[2]
        assert found[0] == pytest.approx(float(np.square(numbers.astype(np.longdouble)).sum()), rel=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("V", [1, 7, 16, 33, 1000])
def test_cross_entropy_is_no_worse_than_array_code(V, dtype, smoothing, level, threads):
    """All rows and some, in place and not, with logits that leave nothing of others; the same bits on three threads."""
    rng = np.random.default_rng(V)
    N = 9
    logits = (rng.standard_normal((N, V)) * np.geomspace(0.1, 300, N)[:, None]).astype(dtype)
    logits[2, 1:] = -np.inf if not smoothing else -1e4
    scale = rng.standard_normal((N, 1)).astype(dtype)
    for rows in (None, np.array([1, 2, 3, 5, 8])):
        labels = rng.integers(0, V, N if rows is None else len(rows))
        found = []
        for backend, number, count in (
            ("numpy", "longdouble", 1), ("numpy", dtype, 1), ("cpu", dtype, 1), ("cpu", dtype, 3),
        ):  # fmt: skip
            threads(count)
            ops, z = get_backend(backend), logits.astype(number)
            losses, highest, total = ops.softmax_forward(z, rows, labels, smoothing)
            place = z.copy() if count == 3 else None
            d = ops.softmax_backward(
                z if place is None else place, rows, labels, smoothing, highest, total, scale, place
            )
            assert place is None or d is place
            found.append([losses, total, d])
        for exact, plain, got, again in zip(*found, strict=True):
            np.testing.assert_array_equal(got, again)
            finite = np.isfinite(exact)
            np.testing.assert_array_equal(np.isfinite(got), finite)
            exact, plain, got = exact[finite], plain[finite], got[finite]
            allowed = 2 * np.abs(plain - exact).max() + 4 * np.finfo(dtype).eps * max(1, np.abs(exact).max())
            assert np.abs(got - exact).max() <= allowed


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_masks_are_the_array_codes(rate, level, threads):
    for number, shape in enumerate([(1,), (5, 7), (3, 4, 8), (0, 3), (9, 101), (64, 64)]):
        threads(1 + number)
        key = (2**64 - 5, 2**33 + 7, number)  # a seed of 64 bits; a layer of which 32 count
        np.testing.assert_array_equal(
            get_backend("cpu").dropout_mask(shape, rate, *key), rng.dropout_mask(shape, rate, *key)
        )
    np.testing.assert_array_equal(
        get_backend("numpy").dropout_mask((9, 7), 0.3, 1, 2, 3), rng.dropout_mask((9, 7), 0.3, 1, 2, 3)
    )


def test_a_mask_has_the_memory_order_of_what_it_drops():
    """Else NumPy goes through one of them against its order: dropout took up to 1.6 times as long for that."""
    for B in (3, 20):
        layer = gpurnn.LSTM(3, 50, 2, dropout=0.4, backend="numpy", seed=1)
        outputs = layer.ops.empty_steps(7, B, 50, layer.dtype)
        mask = draw_mask(layer, 0, outputs.shape, 5)
        assert [stride * 4 for stride in mask.strides] == list(outputs.strides)
        key = rng.name_key(".between0")
        np.testing.assert_array_equal(mask, rng.dropout_mask(outputs.shape, 0.4, 1, key, 5))


def test_denormal_numbers_count_as_zero(level, threads):
    """They would take a processor many times as long. In the caller's own thread they are numbers again afterwards."""
    tiny = np.float32(1e-40)
    for count in (1, 3):
        threads(count)
        layer = gpurnn.RNN(2, 40, nonlinearity="relu", bias=False, backend="cpu", seed=1)
        layer.flat_params[...] = 1
        state = np.full((1, 6, 40), tiny)
        output, _, backward = layer.forward(np.zeros((3, 6, 2), "float32"), state)
        assert not output.any()
        state[...] = 1
        _, _, backward = layer.forward(np.zeros((3, 6, 2), "float32"), state)
        dx, dstate = backward(np.full((3, 6, 40), tiny))
        assert not dx.any() and not dstate.any()
        assert tiny * np.float32(1.5) > tiny


def test_plan_says_which_loop_runs(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    plan = gpurnn.LSTM(64, 128, backend="cpu").plan(50, 32)
    assert plan.schedule == "compiled" and "3 threads" in plan.reason
    assert "3 threads that divide the units" in gpurnn.LSTM(512, 512, backend="cpu").plan(50, 1).reason
    assert gpurnn.LSTM(8, 8, backend="cpu", dtype="float16").plan(5, 2).schedule == "compiled"


def test_threads_come_from_the_environment(monkeypatch):
    """test_robust.py has what makes no sense, and the limits of containers."""
    monkeypatch.delenv("GPURNN_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert cpu_ops.thread_count() == 5
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    assert cpu_ops.thread_count() == 2


def test_without_the_library_the_backend_is_numpy(monkeypatch, tmp_path, caplog):
    cpu_ops.load_native.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "gpurnn/backends/cpu/native.py"))
    try:
        assert cpu_ops.load_native() is None
    finally:
        cpu_ops.load_native.cache_clear()
    monkeypatch.setattr(switch, "_built", {})
    monkeypatch.setattr(native, "load_native", lambda: None)
    for _ in range(2):
        assert get_backend("cpu").name == "numpy"
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once
    assert "backend 'cpu' is array code: this checkout was not built" in caplog.text
    reason = gpurnn.LSTM(3, 4, backend="cpu").plan(5, 2).reason
    assert "this checkout was not built" in reason and "run pip install -e . with a C++ compiler here" in reason


def test_a_library_of_other_sources_is_refused(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*native.Pass._fields_, ("more", ctypes.c_int)]

    cpu_ops.load_native.cache_clear()
    monkeypatch.setattr(native, "Pass", Longer)
    try:
        with pytest.raises(BackendError, match="was built from other sources than these: install gpurnn again"):
            cpu_ops.load_native()
    finally:
        cpu_ops.load_native.cache_clear()


def test_memory_comes_back_when_the_last_view_is_gone():
    store = cpu_ops.MemoryPool(limit=1 << 20)
    float32 = np.dtype(np.float32)
    first = store.empty((300, 400), float32)
    address, view = first.ctypes.data, first[5:, ::2].T
    del first
    second = store.empty((300, 400), float32)
    assert second.ctypes.data != address and store.bytes == 0  # the view still shows it
    del view
    room = store.bytes
    assert 480_000 <= room <= 1.04 * 480_000
    third = store.empty((401, 299), float32)  # nearly the size
    assert third.ctypes.data == address and third.shape == (401, 299) and store.bytes == 0
    del second, third
    assert store.bytes == 2 * room
    assert store.empty((2, 2), float32).base is None  # too small to be worth it
    store.empty((400, 400), float32)  # comes back at once, and past the limit
    assert room not in store.unused and 640_000 <= store.bytes <= 1.04 * 640_000


def test_results_stay_while_somebody_holds_them():
    """Whatever later calls do with the memory of earlier ones."""
    lstm = gpurnn.LSTM(16, 64, 2, backend="cpu", seed=0)
    x = np.random.default_rng(0).standard_normal((40, 20, 16)).astype(np.float32)
    output, state, backward = lstm.forward(x)
    kept = [output.copy(), backward(output)[0]]
    again = [part.copy() for part in kept]
    for scale in (2, 3):
        other, _, back = lstm.forward(scale * x)
        back(other)
    assert np.array_equal(output, again[0]) and np.array_equal(kept[1], again[1])


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_plan_says_that_a_schedule_has_no_effect(backend, dtype):
    layer = gpurnn.LSTM(4, 8, num_layers=2, backend=backend, dtype=dtype, schedule="grid")
    says = "schedule='grid' has no effect here: schedules are of the backend 'cuda'"
    assert layer.plan(5, 2).reason.endswith(f". {says}")
    layer.schedule = "auto"
    assert "schedule=" not in layer.plan(5, 2).reason


@pytest.mark.long
def test_products_with_millions_of_outputs(level):
    """So many blocks that their number times that of their groups is more than an int holds."""
    a, b = np.array([[2, 3]], "float32"), np.arange(2 * 3_000_000, dtype="float32").reshape(2, -1) % 1000
    out = np.zeros((1, b.shape[1]), "float32")
    gpurnn.get_backend("cpu").product(a, b, out)
    np.testing.assert_array_equal(out, a @ b)
