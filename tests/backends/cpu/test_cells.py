"""Traced cells, compiled at their first use, against array code."""

import copy
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import cpu_levels, results
from optional import needs

import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.backends.sources import kernel_dir
from gpurnn.cells import CELLS, dropout, exp, maximum, normalized, sigmoid, tanh, zoneout
from gpurnn.check.recurrent import Batch, jumps
from gpurnn.testing.allowed import count_terms, worst_error

pytestmark = pytest.mark.long
if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)
if not any(map(shutil.which, ("c++", "g++", "clang++"))):
    pytest.skip("there is no C++ compiler", allow_module_level=True)


@gpurnn.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole(ax, ah, s, p):
    i = sigmoid(ax.i + ah.i + p.p_i * s.c)
    f = sigmoid(ax.f + ah.f + p.p_f * s.c)
    c = f * s.c + i * tanh(ax.g + ah.g)
    o = sigmoid(ax.o + ah.o + p.p_o * c)
    return o * tanh(c), c


@gpurnn.cell(gates="z i f o", states="h c n m")
def four_states(ax, ah, s):
    """The sLSTM's: gates that are exponentials, with a state that holds their size."""
    log_i, log_f = ax.i + ah.i, ax.f + ah.f + s.m
    m = maximum(log_f, log_i)
    i, f = exp(log_i - m), exp(log_f - m)
    c, n = f * s.c + i * tanh(ax.z + ah.z), f * s.n + i
    return sigmoid(ax.o + ah.o) * c / maximum(n, 1.0), c, n, m


@gpurnn.cell(gates="i f g o", states="h c")
def drawing(ax, ah, s):
    """A mask for each timestep, another for each sequence."""
    i, f, g, o = sigmoid(ax.i + ah.i), sigmoid(ax.f + ah.f), tanh(ax.g + ah.g), sigmoid(ax.o + ah.o)
    c = zoneout(f * s.c + i * dropout(g, 0.3, each="sequence"), s.c, 0.2)
    return zoneout(o * tanh(c), s.h, 0.2), c


@gpurnn.cell(gates="z n", states="h", biases=False)
def no_product(ax, ah, s):
    z = sigmoid(ax.z)
    return s.h + z * (tanh(ax.n) - s.h)


@gpurnn.cell(gates="r z n e", states="h c", parameters="v w")
def two_products(ax, ah, s, p):
    """A second product whose vector depends on a parameter, and a gate without a product."""
    r, z = sigmoid(ax.r + ah.r + p.v * s.c), sigmoid(ax.z + ah.z)
    n = tanh(ax.n + ah.n(r * s.h * p.w))
    return n + z * (s.h - n), 0.5 * s.c + sigmoid(ax.e) * r


@gpurnn.cell(gates="a b c d e f g", states="h")
def seven_gates(ax, ah, s):
    """More than a tile of the product has."""
    left = tanh(ax.a + ah.a) * sigmoid(ax.b + ah.b) + tanh(ax.c + ah.c) * sigmoid(ax.d + ah.d)
    return sigmoid(ax.e + ah.e) * s.h + tanh(ax.f + ah.f) * sigmoid(ax.g + ah.g) + left


@gpurnn.cell(gates="i f g o", states="h c", parameters={"gain": "ones", "shift": "zeros"})
def with_means(ax, ah, s, p):
    """Layer norm, with stages forward and backward."""
    i, f, o = (sigmoid(normalized(getattr(ax, name) + getattr(ah, name))) for name in "ifo")
    c = zoneout(f * s.c + i * tanh(normalized(ax.g + ah.g)), s.c, 0.1)
    return o * tanh(p.gain * normalized(c) + p.shift), c


@pytest.fixture(autouse=True)
def compiled_as_for_users(request, monkeypatch):
    """Not by the quick compiler of conftest.py, so that the optimizer sees what it sees in the library: the cell with
    most states, the one that draws and the one with stages; in float64, which takes other widths of the same code, only
    the last. On smaller vectors the library's cells run in test_cpu_ops.py."""
    given = request.node.callspec.params
    cell, double = given["cell"], given.get("dtype") == "float64"
    quick = cell in TRACED and cell not in ((with_means,) if double else (four_states, drawing, with_means))
    if "quick_compiler" in os.environ.get("CXX", "") and not quick and request.function is not test_on_smaller_vectors:
        monkeypatch.delenv("CXX")


TRACED = (peephole, four_states, drawing, no_product, two_products, seven_gates, with_means)
NAMES = [cell.name for cell in TRACED]
SIZES = ((1, 1, 1), (16, 7, 9), (33, 2, 13), (40, 1, 9))  # H, T, B; the last in a single step: nothing is packed


def layers(cell, dtype, H, **options):
    """The compiled layer, and with the same weights that of array code in the same dtype and in float64."""
    made = [
        gpurnn.Recurrent(cell, 5, H, backend=backend, dtype=number, seed=3, **options)
        for backend, number in (("cpu", dtype), ("numpy", dtype), ("numpy", "float64"))
    ]
    for one in made[1:]:
        one.load_state_dict(made[0].state_dict())
    return made


def compare(cell, dtype, H, T, B, ragged, **options):
    compiled, plain, exact = layers(cell, dtype, H, **options)
    batch = Batch(exact, T, B, ragged, seed=T + 31 * B)
    got, usual, expected = (batch.run(layer) for layer in (compiled, plain, exact))
    terms = B * count_terms(exact, T) if dtype == "float64" else None
    worst, detail = worst_error(got, usual, expected, dtype, terms)
    assert worst <= 1, (cell.name, H, T, B, options, detail)
    assert compiled.plan(T, B).schedule == "compiled"
    got, usual, expected = (_inferred(layer, batch) for layer in (compiled, plain, exact))
    worst, detail = worst_error(got, usual, expected, dtype, terms)
    assert worst <= 1, (cell.name, H, T, B, options, "inference", detail)


def _inferred(layer, batch):
    """Output and state of evaluation mode, float64."""
    layer.eval()
    output, state = layer(batch.x.astype(layer.dtype), lengths=batch.lengths)
    state = state if isinstance(state, tuple) else (state,)
    return {str(n): array.astype(np.float64) for n, array in enumerate((output, *state))}


# Where a derivative jumps, a rounding of bfloat16 may carry a unit to the other side, in array code, too
BFLOAT = [
    pytest.param(cell, "bfloat16", marks=needs("ml_dtypes"), id=f"{cell.name}-bfloat16")
    for cell in TRACED
    if not jumps(cell)
]


@pytest.mark.parametrize(
    "cell, dtype", [*((cell, dtype) for cell in TRACED for dtype in ("float32", "float64", "float16")), *BFLOAT]
)
def test_a_compiled_cell_is_no_worse_than_array_code(cell, dtype, threads):
    """On one to three threads, both ways in time, ragged with sequences of length 0."""
    for count, (H, T, B) in enumerate(SIZES, 1):
        threads(min(count, 3))
        compare(cell, dtype, H, T, B, ragged=count % 2 == 0, bidirectional=count % 2 == 0, reverse=count == 3)


@pytest.mark.slow
@pytest.mark.parametrize("cell, level", [
    pytest.param(cell, level, id=f"{cell.name}-{cpu_ops.LEVELS[level]}")
    for level in cpu_levels()[:-1] for cell in (TRACED if level == 0 else (drawing, with_means))
])  # fmt: skip
def test_on_smaller_vectors(cell, level, threads, monkeypatch):
    monkeypatch.setattr(gpurnn.get_backend("cpu"), "level", level)
    threads(2)
    for dtype in ("float32", "float64", "float16"):
        compare(cell, dtype, 33, 3, 9, ragged=True, bidirectional=True)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("cell", TRACED, ids=NAMES)
def test_equal_bits_for_any_number_of_threads(cell, T, threads):
    """Which share sequences or units."""
    rng = np.random.default_rng(0)
    layer = gpurnn.Recurrent(cell, 5, 37, bidirectional=True, backend="cpu", seed=1)
    x = rng.standard_normal((T, 9, 5)).astype(np.float32)
    doutput = rng.standard_normal(layer(x)[0].shape).astype(np.float32)
    lengths = rng.integers(0, T + 1, 9)
    found = []
    for count, by_units in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        threads(count, by_units)
        layer.calls = 0  # the same masks
        found.append(results(layer, x, doutput, lengths))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("cell", TRACED, ids=NAMES)
def test_what_was_in_memory_does_not_matter(cell, monkeypatch):
    """Past a sequence's end the loop leaves gates as they were: nothing may come of them."""
    ops, found = gpurnn.get_backend("cpu"), []
    x = np.random.default_rng(0).standard_normal((6, 4, 3)).astype(np.float32)
    for number in (0.0, 1e38, np.nan):
        monkeypatch.setattr(ops, "empty", lambda T, B, F, dtype, number=number: np.full((T, B, F), number, dtype))
        layer = gpurnn.Recurrent(cell, 3, 5, 2, bidirectional=True, backend="cpu", seed=1)
        found.append(results(layer, x, np.ones((6, 4, 10), np.float32), [6, 0, 2, 5]))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def compiler_of(path):
    """What GCC or Clang has written of itself into a library."""
    return set(re.findall(rb"(?:GCC: \(|clang version )[^\0]*", Path(path).read_bytes()))


@pytest.mark.parametrize("cell", ["lstm", "gru_original"])
def test_the_same_struct_compiled_here_gives_the_same_bits(cell, threads, tmp_path, monkeypatch):
    """As in the library: where a cell was compiled does not show, but which compiler it was may."""
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path))
    threads(2)
    file = cell[:4].rstrip("_")
    here = copy.copy(CELLS[cell])
    here.struct = (kernel_dir() / "cells" / f"{file}.cuh").read_text(encoding="utf-8")
    kind, own = (gpurnn.LSTM, {}) if cell == "lstm" else (gpurnn.GRU, {"reset_after": False})
    x = np.random.default_rng(0).standard_normal((6, 9, 5)).astype(np.float32)
    found = []
    for record in (CELLS[cell], here):
        monkeypatch.setattr(kind, "cell", record)
        layer = kind(5, 37, bidirectional=True, backend="cpu", seed=1, **own)
        found.append(
            results(layer, x, np.cos(np.arange(6 * 9 * 74.0)).reshape(6, 9, 74).astype(np.float32), [6] * 8 + [0])
        )
    (made,) = (tmp_path / "cells").glob("*.so")
    if compiler_of(made) != compiler_of(cpu_ops.load_native()[0]._name):
        pytest.skip("another compiler has built the library")
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)
