"""The structs of traced cells, compiled by a C++ compiler into one program, against array code in float64."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, assert_close
from random_cells import random_cell

import gpurnn
from gpurnn.cells import HiddenWeights, Scratch, library
from gpurnn.cells.names import RESERVED

pytestmark = pytest.mark.long
COMPILER = next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)
H, B = 5, 3


def draw_cells():
    """The library's, some options of the layers, and 20 of random equations, each under a name of its own."""
    found = {name: value for name, value in vars(library).items() if isinstance(value, gpurnn.cells.TracedCell)}
    found |= {"elman_silu": library.elman("silu"), "cornn": library.cornn()}
    for name, layer in {
        "layer_norm": gpurnn.LSTM(2, 2, layer_norm=True, peephole=True, zoneout=0.1, backend="numpy"),
        "norm_of_gru": gpurnn.GRU(2, 2, layer_norm=True, backend="numpy"),
        "dropout": gpurnn.LSTM(2, 2, recurrent_dropout=0.3, coupled=True, cell_clip=1.0, backend="numpy"),
    }.items():
        found[name] = layer.cell
    source = random.Random(7)
    while len(found) < 36:
        cell = random_cell(source, f"random{len(found)}")
        if cell.struct:
            found[cell.name] = cell
    return {cell.name: cell for cell in found.values()}


CELLS = draw_cells()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    text = (Path(__file__).parent / "struct_runner.cpp").read_text()
    calls = "\n    ".join(f"if (which == {k}) run<generated::{name}<double>>(H, B);" for k, name in enumerate(CELLS))
    text = text.replace("//@ the structs", "\n".join(cell.struct for cell in CELLS.values())).replace(
        "//@ the calls", calls
    )
    folder = tmp_path_factory.mktemp("structs")
    (folder / "run.cpp").write_text(text)
    command = [COMPILER, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror=uninitialized", "-ffp-contract=off"]
    command += ["-I", str(ROOT / "kernels"), "-o", str(folder / "run"), str(folder / "run.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # a value that nobody reads is work for nothing
    unused = [line for line in done.stderr.splitlines() if "unused variable" in line]
    assert not unused, "\n".join(unused)
    return folder / "run"


def by_array_code(cell, weights, ax, states, masks, dstates):
    """New states, saved blocks, d and dstates of one timestep, feature-major."""
    new = tuple(np.zeros((H, B)) for _ in states)
    scratch = Scratch(np.zeros((cell.saved_blocks * H, B)), np.zeros((H, B)), masks=masks)
    cell.forward(np, weights, ax, states, new, scratch)
    saved = scratch.z[: len(cell.saved) * H].copy()
    d, running = np.zeros((len(cell.preactivations) * H, B)), tuple(one.copy() for one in dstates)
    cell.backward(np, weights, states, new, running, scratch._replace(d=d), lambda *gradients: None)
    return np.concatenate([*new, saved, d, *running])


@pytest.mark.parametrize("name", CELLS)
def test_the_struct_computes_what_array_code_does(name, program):
    cell, rng = CELLS[name], np.random.default_rng(list(CELLS).index(name))
    rows, G, S = len(cell.hidden), len(cell.gates), len(cell.states)
    hh, ax = rng.standard_normal((rows * H, H)), rng.standard_normal((G * H, B))
    states, dstates = (tuple(rng.standard_normal((H, B)) for _ in range(S)) for _ in range(2))
    if "n" in cell.states:
        states[cell.states.index("n")][...] = rng.random((H, B)) + 0.5  # of the sLSTM
    own = rng.standard_normal((cell.vectors, H))
    masks = (rng.random((len(cell.draws) * H, B)) < 0.5).astype(float)
    apart = rng.standard_normal((len([g for g in cell.apart if g < rows]) * H, 1)) if cell.biases else np.zeros((0, 1))
    started = np.zeros((rows * H, B))  # b_hh of the gates whose ax and ah are apart: of the last ones
    started[len(started) - len(apart) :] += apart
    weights = HiddenWeights(hh, apart if cell.biases else None, None, tuple(vector[:, None] for vector in own))
    given = [hh, ax, started, *states, own, masks, *dstates]
    done = subprocess.run(
        [program, str(list(CELLS).index(name)), str(H), str(B)],
        input=b"".join(np.ascontiguousarray(part).tobytes() for part in given),
        capture_output=True,
    )
    assert done.returncode == 0
    got = np.frombuffer(done.stdout).reshape(-1, B)
    expected = by_array_code(cell, weights, ax, states, masks, dstates)
    assert got.shape == expected.shape
    used = np.repeat([True] * S + [not one.startswith("unused") for one in cell.saved], H)
    used = np.concatenate([used, np.ones(len(got) - len(used), bool)])
    assert_close(got[used], expected[used], len(cell.graph.nodes) + 2 * H, name)  # a rounding for each operation


def test_the_structs_are_many_and_different():
    assert len(CELLS) == 36
    for what in (
        [cell for cell in CELLS.values() if cell.means],
        [cell for cell in CELLS.values() if cell.draws],
        [cell for cell in CELLS.values() if cell.inner_node is not None],
        [cell for cell in CELLS.values() if cell.vectors],
        [cell for cell in CELLS.values() if cell.separate],
        [cell for cell in CELLS.values() if not cell.products],
    ):
        assert len(what) >= 2


def test_every_function_that_a_struct_calls_is_a_reserved_name():
    called = {word for cell in CELLS.values() for word in re.findall(r"\b([a-z]\w*)\(", cell.struct)}
    called -= {"if", "means_of", "back_means_of", "forward", "backward", "forward_inner", "backward_inner"}
    assert called - {"constexpr", "real"} <= RESERVED
    assert {"sigmoid", "tanh", "where_greater", "dsigmoid", "larger"} <= called
