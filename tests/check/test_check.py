"""gpurnn check: passes where all is right, sees what is not, and says so in its exit code."""

import importlib.util
import json
import re
import sys

import pytest
from click.testing import CliRunner
from helpers import cuda_ops
from optional import needs

import gpurnn
from gpurnn import cells
from gpurnn.backends.cpu.memory import MemoryPool
from gpurnn.backends.ops import Ops
from gpurnn.check import CELLS, OTHERS, run_checks
from gpurnn.cli import main


def run(*args):
    return CliRunner().invoke(main, ["check", *args])


@pytest.mark.slow
@needs("ml_dtypes")
def test_numpy_is_right():
    results = run_checks(["numpy"])
    assert {(r.cell, r.dtype) for r in results} == {(c, d) for c in (*CELLS, OTHERS) for d in gpurnn.dtypes.DTYPES}
    assert [r for r in results if not r.right] == []
    assert all(r.worst > 0 for r in results if r.check == "gradient")


@pytest.mark.emulated
def test_the_cuda_backend_is_right_on_the_emulated_device(monkeypatch):
    ops = cuda_ops()
    monkeypatch.setattr(
        gpurnn.losses.common,
        "array_ops",
        lambda *arrays: ops if isinstance(arrays[0], ops.xp.ndarray) else gpurnn.get_backend("numpy"),
    )
    dtypes = ["float32", "float64"]  # test_cuda_layers.py has the others, and every option
    results = run_checks([ops], dtypes=dtypes, quick=True)
    assert [r for r in results if not r.right] == []
    gated = [cell for cell in CELLS if not cell.startswith("rnn")]
    assert len(results) == len(dtypes) * (4 * len(CELLS) + len(gated) + 2) + len(CELLS)  # gradient in float64 only


@pytest.mark.long
def test_a_wrong_derivative_is_named(monkeypatch):
    backward = cells.GRUStep.backward

    def wrong(self, xp, w, old, new, dstate, scratch, hook):
        backward(self, xp, w, old, new, dstate, scratch, hook)
        scratch.d[...] *= 1.01

    monkeypatch.setattr(cells.GRUStep, "backward", wrong)
    results = run_checks(["numpy"], ["gru", "lstm"], ["float64"], quick=True)
    assert {r.cell for r in results if not r.right} == {"gru"}
    done = run("--quick", "--backend", "numpy", "--cell", "gru", "--dtype", "float64")
    assert done.exit_code == 1
    assert re.search(r"WRONG numpy, gru, float64, gradient: (two layers|bidirectional)", done.output)


def wrong_checks(*arguments):
    return {(r.cell, r.check) for r in run_checks(*arguments, quick=True) if not r.right}


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])  # float16 ends where the fault begins
def test_gates_that_are_right_only_near_0_are_seen(dtype, monkeypatch):
    """(1 + tanh(z / 2)) / 2 as the logistic function, which this library once had."""

    def halves(xp, z):
        z[...] = 0.5 + 0.5 * xp.tanh(0.5 * z)

    monkeypatch.setattr(cells.gru, "sigmoid_", halves)
    assert wrong_checks(["numpy"], ["gru", "rnn tanh"], [dtype]) == {("gru", "gates")}


@pytest.mark.long
@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_c_that_is_rounded_between_calls_is_seen(dtype, monkeypatch):
    monkeypatch.setattr(gpurnn.recurrent.state, "state_dtype", lambda layer, kind: layer.dtype)
    assert wrong_checks(["numpy"], ["lstm", "gru"], [dtype]) == {("lstm", "pieces")}


@pytest.mark.long
@needs("ml_dtypes")
@pytest.mark.skipif(gpurnn.get_backend("cpu").name != "cpu", reason="gpurnn._native was not built")
def test_a_pool_that_forgets_bfloat16_is_seen(monkeypatch):
    empty = MemoryPool.empty

    def forgetful(self, shape, dtype):
        array = empty(self, shape, dtype)
        return array.view("V2") if array.nbytes >= 1 << 17 and dtype.name == "bfloat16" else array

    monkeypatch.setattr(MemoryPool, "empty", forgetful)
    assert wrong_checks(["cpu"], ["lstm"], ["bfloat16", "float16"]) == {("lstm", "reference")}


def test_padding_that_leaks_is_seen(monkeypatch):
    monkeypatch.setattr(Ops, "zero_past_end", lambda self, steps, lengths: steps)
    results = run_checks(["numpy"], ["lstm"], ["float32"], quick=True)
    assert [r.check for r in results if not r.right] == ["ragged"]


def test_an_error_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(Ops, "layer_forward", lambda self, *arguments, **options: 1 / 0)
    results = run_checks(["numpy"], ["lstm"], ["float32"], quick=True)
    assert all("ZeroDivisionError" in r.detail and not r.right for r in results)


def test_the_table_fits_and_is_right():
    done = run("--quick", "--backend", "numpy", "--cell", "lstm", "--cell", "other layers", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "7 of 7 right" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def test_json_is_one_document():
    done = run("--quick", "--backend", "cpu", "--cell", "rnn relu", "--dtype", "float16", "--json")
    document = json.loads(done.stdout)
    assert document["right"] is True and {r["check"] for r in document["results"]} == {
        "reference", "repeat", "ragged", "pieces",
    }  # fmt: skip


@pytest.mark.long
def test_bfloat16_is_left_out_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # import raises ImportError
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert {r.dtype for r in run_checks(["numpy"], ["lstm"], quick=True)} == {"float32", "float64", "float16"}
    done = run("--dtype", "bfloat16", "--quick")
    assert done.exit_code == 2 and "pip install ml_dtypes" in done.output


@pytest.mark.parametrize(
    "args, code", [(["--cell", "transformer"], 2), (["--backend", "tpu"], 2), (["--dtype", "x"], 2)]
)
def test_wrong_arguments(args, code):
    assert run(*args).exit_code == code


@pytest.mark.skipif(gpurnn.backends()["cuda"] is None, reason="there is a GPU here")
def test_a_missing_backend_is_no_pass():
    done = run("--quick", "--backend", "cuda")
    assert done.exit_code == 1 and "backend 'cuda' cannot work here" in done.output
    done = CliRunner().invoke(main, ["warmup"])
    assert done.exit_code == 1 and "backend 'cuda' cannot work here" in done.output


@pytest.mark.parametrize("columns", [45, 80])
def test_the_lines_fit_into_the_window(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("--quick", "--backend", "numpy", "--cell", "gru", "--dtype", "float32").output.splitlines()
    assert max(map(len, lines)) <= columns and (" on " in f" {lines[0]} ") is (columns == 80)
    assert all(name in " ".join(lines) for name in ("reference", "repeat", "ragged", "pieces", "gates"))
