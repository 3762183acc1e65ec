"""What only a GPU can show: the checks on the real device, CuPy's side of the loader, memory that stays flat."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import gpurnn
from gpurnn.backends.cuda.device import CupyDevice
from gpurnn.backends.cuda.ops import CudaOps
from gpurnn.check import CELLS, Batch, compare, run_checks, twins
from gpurnn.cli import main
from gpurnn.errors import BackendError
from gpurnn.testing import worst_error

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops():
    return gpurnn.get_backend("cuda")


@pytest.mark.parametrize("cell", [*CELLS, "other layers"])
@pytest.mark.parametrize("backend", ["cuda", "cupy"])
def test_everything_is_right(backend, cell):
    assert [r for r in run_checks([backend], [cell]) if not r.right] == []


def test_the_command():
    done = CliRunner().invoke(main, ["check", "--quick", "--json", "--backend", "cuda"])
    assert done.exit_code == 0 and json.loads(done.stdout)["right"]


def test_warmup():
    done = CliRunner().invoke(main, ["warmup", "--dtype", "float32"])
    assert done.exit_code == 0 and f"sm_{gpurnn.get_backend('cuda').device.arch}" in done.output


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("H", [32, 65, 256, 1000])
@pytest.mark.parametrize("schedule", ["auto", "step", "block", "grid", "fused"])
def test_larger_sizes(cell, H, schedule):
    options = {"proj_size": H // 2} if cell == "lstm projected" else {}
    layer, plain, exact = twins(cell, "cuda", "float32", I=48, H=H, schedule=schedule, **options)
    try:
        layer.plan(33, 17)
    except ValueError as error:  # this schedule does not take this layer
        pytest.skip(str(error))
    batch = Batch(exact, 33, 17, ragged=True)
    got, allowed, expected = batch.run(layer), batch.run(plain), batch.run(exact)
    if cell == "rnn relu" and ((got["output"] > 0) != (expected["output"] > 0)).any():
        expected = {"output": expected["output"]}
    for name, value in expected.items():
        bound = 2 * np.abs(allowed[name] - value).max() + 2 * 2.0**-23 * np.abs(value).max(initial=1)
        assert np.abs(got[name] - value).max() <= bound, name


@pytest.mark.parametrize("cell", ["rnn tanh", "lstm", "gru"])
@pytest.mark.parametrize("H", [65, 256, 500])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("schedule", ["cluster", "fused"])
def test_larger_sizes_on_tensor_cores(cell, H, dtype, schedule):
    dtype, options = ("float32", {"precision": "tf32"}) if dtype == "tf32" else (dtype, {})
    try:
        worst, detail = compare(
            cell, "cuda", dtype, 33, 17, True, H=H, bidirectional=True, schedule=schedule, **options
        )
    except ValueError as error:  # no clusters here
        pytest.skip(str(error))
    assert worst <= 1, detail


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_products_in_every_layout(ops, dtype, batch):
    rng, xp = np.random.default_rng(0), ops.xp
    dtype = gpurnn.dtypes.check_dtype(dtype)
    wide = gpurnn.dtypes.compute_dtype(dtype)

    def layouts(shape, of):
        values = rng.normal(size=shape).astype(of)
        yield xp.asarray(values)
        yield xp.ascontiguousarray(xp.asarray(values).swapaxes(-1, -2)).swapaxes(-1, -2)

    for a in layouts((*batch, 5, 7), dtype):
        for b in layouts((*batch, 7, 3), dtype):
            for out in layouts((*batch, 5, 3), wide):
                for accumulate in (False, True):
                    before = out.get().astype(float) if accumulate else 0
                    left, right = (array.get().astype(float) for array in (a, b))
                    # 7 products, 7 additions: each is off by a rounding of the sum of all sizes at most
                    sizes = np.abs(before) + np.abs(left) @ np.abs(right)
                    allowed = 14 * gpurnn.dtypes.EPSILON[wide.name] * sizes
                    ops.device.gemm(a, b, out, accumulate)
                    assert (np.abs(out.get() - (before + left @ right)) <= allowed).all()


def test_a_broken_kernel_names_its_line(ops, monkeypatch):
    from gpurnn.backends import sources

    text = sources.kernel_source("dropout.cu") + '\n#line 7 "broken.cu"\n__global__ void broken() { nothing; }\n'
    monkeypatch.setattr(sources, "kernel_source", lambda file, struct: text)
    with pytest.raises(BackendError, match=r"broken\.cu\(7\).*nothing"):
        ops.device.load("dropout.cu", "broken")


@pytest.mark.parametrize("schedule, T", [("step", 6), ("fused", 6), ("fused", 150)])
def test_loops_are_recorded_and_replayed(ops, schedule, T):
    layer, plain, exact = twins("lstm", "cuda", "float32", schedule=schedule, num_layers=2, bidirectional=True)
    for call in range(4):
        batch = Batch(exact, T, 5, ragged=True, seed=call)
        share, detail = worst_error(batch.run(layer), batch.run(plain), batch.run(exact), "float32", None)
        assert share <= 1, f"call {call}: {detail}"
    assert any(loop.graphs for _, loop in ops.pool.free.values()), ops.recordings()
    assert ops.device.dependent is None or ops.device.dependent.usable


def test_products_are_recorded_and_replayed(ops):
    """CuPy's own wrapper of cuBLAS refuses this."""
    xp = ops.xp
    a, b = (xp.asarray(np.random.default_rng(seed).normal(size=(2, 40, 40)).astype("float32")) for seed in (0, 1))
    out = xp.zeros((2, 40, 40), "float32")
    graph = ops.device.record(ops.device.product(a, b, out))
    assert not out.get().any()
    a *= 2
    graph.launch()
    exact = a.get().astype(float) @ b.get().astype(float)
    bound = 40 * 2.0**-23 * (np.abs(a.get()).astype(float) @ np.abs(b.get()).astype(float))
    assert (np.abs(out.get() - exact) <= bound).all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_graph_that_is_launched_again_gives_the_bits_of_single_launches(cell):
    """T 150 is twice a graph of 64 timesteps and one of the rest."""
    ops = CudaOps(CupyDevice(gpurnn.get_backend("cuda").xp))
    layer, _, exact = twins(cell, ops, "float32", schedule="step", bidirectional=True)
    once, _, _ = twins(cell, CudaOps(ops.device, graphs=0), "float32", schedule="step", bidirectional=True)
    for call in range(4):
        batch = Batch(exact, 150, 5, ragged=True, seed=call)
        got, expected = batch.run(layer), batch.run(once)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{name}, call {call}")
    assert [row["reason"] for row in ops.recordings() if not row["recorded"]] == [] and ops.recordings()


def language_model(dtype, schedule):
    how = {"backend": "cuda", "dtype": dtype}
    return gpurnn.Sequential(
        gpurnn.Embedding(50, 32, seed=1, **how),
        gpurnn.LSTM(32, 256, 2, dropout=0.2, schedule=schedule, seed=2, **how),
        gpurnn.Dropout(0.2, seed=3, **how),
        gpurnn.Linear(256, 50, seed=4, **how),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("schedule", ["step", "grid"])
def test_updates_are_recorded_and_replayed(schedule, dtype):
    """Whole updates of ``fit``, with and without graphs: the same bits, whatever memory is given to others between."""
    text, found = gpurnn.TextBatches(np.random.default_rng(0).integers(0, 50, 2001), batch_size=8, steps=20), []
    for graph in (False, True):
        model = language_model(dtype, schedule)
        history = gpurnn.fit(
            model, gpurnn.cross_entropy, text, optimizer="adam", epochs=3, validation=text, clip_norm=1.0,
            progress=False, graph=graph,
        )  # fmt: skip
        records = [{name: value for name, value in one.items() if name != "seconds"} for one in history]
        found.append((records, model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, array in found[0][1].items():
        np.testing.assert_array_equal(found[1][1][name], array, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_steps_of_a_stepper_are_recorded(dtype):
    steppers = [language_model(dtype, "auto").stepper(4) for _ in range(2)]
    steppers[1]._graph_refused = True
    for k in range(20):
        found, plain = (stepper.step(np.arange(4) + k).get() for stepper in steppers)
        np.testing.assert_array_equal(found, plain)
        assert [stepper.recorded for stepper in steppers] == [k > 0, False]


@pytest.mark.parametrize("schedule", ["block", "grid"])
def test_parameters_behind_three_numbers(schedule):
    """Where weights did not start at 16 bytes, a load of four numbers ended the context."""
    layer, plain, exact = twins("lstm", "cuda", "float32", I=3, H=128 if schedule == "grid" else 32, schedule=schedule)
    x, found = np.random.default_rng(0).normal(size=(9, 5, 3)), []
    for one in (layer, plain, exact):
        norm = gpurnn.LayerNorm(3, backend=one.ops, dtype=one.dtype, seed=1)
        output, _, backward = (model := gpurnn.Sequential(norm, one)).forward(model.xp.asarray(x.astype(one.dtype)))
        backward(output)
        found.append([one.ops.to_numpy(array).astype(float) for array in (output, model.flat_grads)])
    for got, allowed, expected in zip(*found, strict=True):
        bound = 2 * np.abs(allowed - expected).max() + 2 * 2.0**-23 * np.abs(expected).max(initial=1)
        assert np.abs(got - expected).max() <= bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_ragged_sixteen_bits_keep_their_dtype(dtype):
    layer = gpurnn.LSTM(8, 16, num_layers=2, bidirectional=True, backend="cuda", dtype=dtype, seed=0)
    x = layer.xp.ones((7, 3, 8), dtype)
    x[3:, 1] = float("nan")
    output, (h, _), backward = layer.forward(x, lengths=[7, 3, 0])
    dx, _ = backward(output)
    assert {output.dtype.name, h.dtype.name, dx.dtype.name} == {dtype}
    assert np.isfinite(output.get().astype(float)).all() and np.isfinite(layer.flat_grads.get()).all()


def test_memory_stays_flat(ops):
    layer = gpurnn.LSTM(32, 64, num_layers=2, bidirectional=True, backend="cuda", seed=0)
    pool = ops.xp.get_default_memory_pool()
    rng = np.random.default_rng(0)
    used = []
    for step in range(1000):
        T = int(rng.integers(1, 60))
        output, _, backward = layer.forward(ops.xp.zeros((T, 8, 32), "float32"))
        backward(output)
        del output, backward
        if step % 100 == 99:
            used.append(pool.used_bytes())
    assert max(used[3:]) <= 1.5 * max(used[:3]), used
