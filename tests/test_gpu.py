"""What only a GPU can show: the checks on the real device, CuPy's side of the loader, memory that stays flat."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import gpurnn
from gpurnn.check import CELLS, Batch, run_checks, twins
from gpurnn.cli import main
from gpurnn.errors import BackendError

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
@pytest.mark.parametrize("schedule", ["auto", "step", "block", "grid"])
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


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_products_in_every_layout(ops, dtype, batch):
    rng, xp = np.random.default_rng(0), ops.xp
    dtype = gpurnn.module.check_dtype(dtype)
    wide = gpurnn.ops.wide_dtype(dtype)

    def layouts(shape, of):
        values = rng.normal(size=shape).astype(of)
        yield xp.asarray(values)
        yield xp.ascontiguousarray(xp.asarray(values).swapaxes(-1, -2)).swapaxes(-1, -2)

    for a in layouts((*batch, 5, 7), dtype):
        for b in layouts((*batch, 7, 3), dtype):
            for out in layouts((*batch, 5, 3), wide):
                for accumulate in (False, True):
                    before = out.get().astype(float) if accumulate else 0
                    expected = before + a.get().astype(float) @ b.get().astype(float)
                    ops.device.gemm(a, b, out, accumulate)
                    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-5)


def test_a_broken_kernel_names_its_line(ops, monkeypatch):
    from gpurnn import _kernels

    text = _kernels.kernel_source("dropout.cu") + '\n#line 7 "broken.cu"\n__global__ void broken() { nothing; }\n'
    monkeypatch.setattr(_kernels, "kernel_source", lambda file: text)
    with pytest.raises(BackendError, match=r"broken\.cu\(7\).*nothing"):
        ops.device.load("dropout.cu", "broken")


def test_loops_are_recorded_and_replayed(ops):
    layer, plain, exact = twins("lstm", "cuda", "float32", num_layers=2, bidirectional=True)
    for call in range(4):
        batch = Batch(exact, 6, 5, ragged=True, seed=call)
        got, expected = batch.run(layer), batch.run(plain)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name}, call {call}")
    assert any(loop.graphs for _, loop in ops.pool.free.values()), "nothing was recorded"


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
