"""gpurnn check --cell module:name: a user's cell, found by name, checked, and what is wrong said in words."""

import json
import re
import sys

import pytest
from click.testing import CliRunner

import gpurnn
from gpurnn.cells import derivatives
from gpurnn.check import load_cell, run_checks
from gpurnn.cli import main

CELLS = """
import gpurnn
from gpurnn.cells import clip_gradient, dropout, log, maximum, relu, sigmoid, tanh

@gpurnn.cell(gates="i f g o", states="h c", parameters="p_i")
def peephole(ax, ah, s, p):
    i = sigmoid(ax.i + ah.i + p.p_i * s.c)
    c = sigmoid(ax.f + ah.f) * s.c + i * tanh(ax.g + ah.g)
    return dropout(sigmoid(ax.o + ah.o) * tanh(c), 0.2), c

@gpurnn.cell("z", "h n")
def positive(ax, ah, s):
    n = 0.5 * s.n + 1
    return relu(ax.z + ah.z) + log(n), n

@gpurnn.cell("z")
def without_numbers(ax, ah, s):
    return log(tanh(ax.z + ah.z))

@gpurnn.cell("z")
def clipped(ax, ah, s):
    return clip_gradient(tanh(ax.z + ah.z), 0.01)

def plain(ax, ah, s):
    return tanh(ax.z + ah.z)

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "my_cells.py").write_text(CELLS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def check(*cells, options=("--quick", "--backend", "numpy", "--dtype", "float64")):
    return CliRunner().invoke(main, ["check", *options, *(word for cell in cells for word in ("--cell", cell))])


def test_a_cell_is_found_by_module_and_by_file(folder):
    (folder / "deeper").mkdir()
    (folder / "deeper" / "other.py").write_text("from helping import scale\n" + CELLS)
    (folder / "deeper" / "helping.py").write_text("scale = 1\n")
    (folder / "a_package").mkdir()
    (folder / "a_package" / "inner.py").write_text(CELLS)
    for name in ("my_cells:peephole", "my_cells.py:peephole", "deeper/other.py:peephole", "a_package.inner:peephole"):
        cell = load_cell(name)
        assert isinstance(cell, gpurnn.cells.TracedCell) and cell.name == "peephole"
    assert load_cell("gpurnn.cells:mgu") is gpurnn.cells.mgu


@pytest.mark.long
def test_right_cells_pass():
    done = check("my_cells:peephole", "my_cells.py:positive", "my_cells:clipped")
    assert done.exit_code == 0, done.output
    assert re.search(r"^11 of 11 right", done.output, re.M)  # four checks, but no differences of a clipped gradient
    line = next(line for line in done.output.splitlines() if line.startswith("numpy clipped"))
    assert line.split()[3] == "-"
    assert "numpy runs peephole as: array code, one timestep after another" in done.output


@pytest.mark.long
def test_every_option_of_cells_that_have_draws_and_kinks():
    cells = [load_cell("my_cells:peephole"), load_cell("my_cells:positive"), gpurnn.cells.slstm, gpurnn.cells.indrnn]
    results = run_checks(["numpy"], cells, ["float64", "float32", "float16"])
    assert [result for result in results if not result.right] == []
    assert {result.check for result in results} == {"gradient", "reference", "repeat", "ragged", "pieces"}


def test_a_wrong_derivative_is_named(monkeypatch):
    right = derivatives._backward

    def wrong(node, d):
        return tuple(1.001 * g for g in right(node, d)) if node.op == "sigmoid" else right(node, d)

    monkeypatch.setattr(derivatives, "_backward", wrong)
    done = check("my_cells:peephole")
    assert done.exit_code == 1
    found = re.search(r"WRONG numpy, peephole, float64, gradient: (.*)", done.output, re.S)[1]
    assert "the derivative along a random direction is" in found and "weight" in found.replace("\n", "")


def test_equations_without_numbers_are_said_once():
    done = check("my_cells:without_numbers", options=("--quick", "--json"))
    assert done.exit_code == 1
    (row,) = json.loads(done.output)["results"]
    assert not row["right"] and row["detail"].startswith(
        "the equations themselves, in float64, give NaN or infinity in"
    )


MISTAKES = {
    "my_cells:plain": "plain of my_cells is no cell but of type function: put @gpurnn.cell(gates=...) before the "
    "function; cells in it: peephole, positive, without_numbers, clipped",
    "my_cells:number": "number of my_cells is no cell but of type int; cells in it: peephole",
    "my_cells.py:nothing": "my_cells.py has no 'nothing'; cells in it: peephole, positive",
    "no_module_here:x": "there is no module 'no_module_here' here, nor is one installed",
    "my_cells.deeper:x": "there is no module 'my_cells.deeper' here",
    "no_file.py:x": "there is no file no_file.py",
    "my_cells.py": "write my_cells.py:NAME; cells in it: peephole, positive, without_numbers, clipped",
    "deeper/cells.py": "write deeper/cells.py:NAME; cells in it: none",
    "my_cells.positive": "write my_cells:positive; cells in it: peephole, positive, without_numbers, clipped",
    "my_cells.nothing": "write my_cells:NAME; cells in it: peephole, positive",
    "no_file.py": "there is no file no_file.py",
    "no_module_here.x": "there is no module 'no_module_here' here",
    "my_cells:": "expected module:name or file.py:name, got 'my_cells:'",
    ":x": "expected module:name or file.py:name, got ':x'",
    "empty.py:x": "empty.py has no 'x'; cells in it: none",
    "wrong_gate.py:x": "wrong_gate.py, line 5: AttributeError: cell x: ax has no 'q'; it has z",
    "wrong_gate:x": "wrong_gate.py, line 5: AttributeError: cell x: ax has no 'q'; it has z",
    "imports_it.py:x": "wrong_gate.py, line 5: AttributeError: cell x: ax has no 'q'; it has z",
    "syntax.py:x": "syntax.py, line 2: SyntaxError: ",
    "missing.py:x": "missing.py, line 1: ModuleNotFoundError: No module named 'a_module_that_is_not_here'",
    "missing:x": "missing.py, line 1: ModuleNotFoundError: No module named 'a_module_that_is_not_here'",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_2_and_say_where(name, folder):
    (folder / "empty.py").write_text("")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "cells.py").write_text("")
    (folder / "wrong_gate.py").write_text('import gpurnn\n\n@gpurnn.cell("z")\ndef x(ax, ah, s):\n    return ax.q\n')
    (folder / "imports_it.py").write_text("import wrong_gate\n")
    (folder / "syntax.py").write_text("x = 1\ndef f(:\n")
    (folder / "missing.py").write_text("import a_module_that_is_not_here\n")
    done = check(name)
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert text.startswith("Error: --cell: ") and MISTAKES[name] in text


def test_a_name_without_a_colon_is_one_of_ours():
    done = check("peephole")
    assert done.exit_code == 2 and "--cell should be one of 'rnn tanh'" in done.output
