"""Where the machine code of traced cells lies, and what happens where it cannot be made, stored or loaded."""

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import gpurnn
from gpurnn.backends.cpu import cells
from gpurnn.backends.cpu import ops as cpu_ops

if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@gpurnn.cell(gates="z", states="h")
def small(ax, ah, s):
    return 0.5 * (ax.z + s.h)


RUN = """
import sys, numpy as np, gpurnn
sys.path.insert(0, sys.argv[1])
from test_cell_cache import small
layer = gpurnn.Recurrent(small, 3, 5, backend="cpu", seed=0)
print(layer(np.ones((2, 1, 3), "float32"))[0].tobytes().hex(), layer.plan(2, 1).schedule)
"""


# The compiler of these tests: it notes each compilation, does not optimize, which takes less time, and has at hand what
# it made of a text before.
QUICK = """#!/bin/sh
case "$*" in *" -o "*) ;; *) exec {compiler} "$@" ;; esac
echo >>{folder}/compilations
for out; do :; done
text=$(mktemp)
cat >"$text"
made={made}/$(cksum <"$text" | tr " " -)
if [ -f "$made" ]; then
    cp "$made" "$out"
else
    {compiler} "$@" -O0 <"$text" && cp "$out" "$made.$$" && mv "$made.$$" "$made"
fi
status=$?
rm "$text"
exit $status
"""


@pytest.fixture(scope="module")
def made_before(tmp_path_factory):
    """The folder of the libraries that the compiler has made."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path, made_before):
    """No cell is known, and the cache is empty."""
    monkeypatch.setattr(cells, "_known", {})
    monkeypatch.setenv("GPURNN_CACHE", str(tmp_path / "cache"))
    if COMPILER:
        quick = tmp_path / "quick"
        quick.write_text(QUICK.format(compiler=COMPILER, folder=tmp_path, made=made_before))
        quick.chmod(0o700)
        monkeypatch.setenv("CXX", str(quick))


@pytest.fixture
def compilations(tmp_path):
    """Counts what was compiled."""
    return lambda: (tmp_path / "compilations").read_text().count("\n")


@pytest.fixture
def made(tmp_path):
    """Lists the compiled files."""
    return lambda: sorted((tmp_path / "cache" / "cells").iterdir())


def start():
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-c", RUN, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process):
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return told.split()


def expected(backend="numpy"):
    layer = gpurnn.Recurrent(small, 3, 5, backend=backend, seed=0)
    return layer(np.ones((2, 1, 3), "float32"))[0]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "gpurnn"]


@pytest.mark.long
@needs_compiler
def test_two_processes_at_once_then_others(made, compilations):
    """One that compiles nothing, and one that finds a damaged file: it makes it again, rather than crash."""
    first, second = [output(process) for process in (start(), start())]
    assert first == second == [expected().tobytes().hex(), "compiled"]
    (file,) = {path.name.rpartition("-")[0] for path in made()}  # one cell, and no temporary files
    assert file.startswith("small-float32-") and all(path.suffix == ".so" for path in made())
    assert os.stat(made()[0].parent).st_mode & 0o777 == 0o700
    before = compilations()
    assert output(start()) == first and compilations() == before
    for path in made():
        path.write_bytes(path.read_bytes()[:5000])
    assert output(start()) == first and compilations() == before + 1
    assert len(made()) == 1 and made()[0].stat().st_size > 5000


@pytest.mark.long
@needs_compiler
def test_compiling_is_announced_once(caplog, made):
    with caplog.at_level(logging.INFO, "gpurnn"):
        expected("cpu"), expected("cpu")
    (told,) = messages(caplog)
    assert told.startswith("compiling the cell small for float32") and told.endswith(
        f"it is then in {made()[0].parent}"
    )
    assert cells.refusal(small, "float32", gpurnn.get_backend("cpu").level) is None


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("problem", ["a file in its place", "others may write", "a link"])
def test_a_folder_that_must_not_be_used(problem, tmp_path, caplog):
    """The cell is compiled for this process alone."""
    place = tmp_path / "cache" / "cells"
    place.parent.mkdir()
    if problem == "a file in its place":
        place.write_text("")
    elif problem == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod(0o777)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.WARNING, "gpurnn"):
        np.testing.assert_array_equal(expected("cpu"), expected())
    assert gpurnn.Recurrent(small, 3, 5, backend="cpu").plan(2, 1).schedule == "compiled"
    (told,) = messages(caplog)
    assert "is not used" in told or "are not stored" in told
    assert sorted({*tmp_path.rglob("*")} - {tmp_path / "compilations"}) == before


@pytest.mark.long
@needs_compiler
def test_a_cache_that_is_read_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cells, "write_bytes_atomic", refuse)
    with caplog.at_level(logging.WARNING, "gpurnn"):
        np.testing.assert_array_equal(expected("cpu"), expected())
    assert messages(caplog) == ["compiled cells are not stored: [Errno 30] Read-only file system"]


def refuse(*arguments):
    raise OSError(30, "Read-only file system")


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("problem", ["longer", "others may write it", "a link"])
def test_a_file_that_is_not_what_was_made(problem, made, tmp_path):
    expected("cpu")
    (path,) = made()
    copy = tmp_path / path.name
    shutil.copy(path, copy)
    copy.chmod(0o600)
    assert cells._opened(copy)
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    if problem == "a link":
        other.symlink_to(copy)
    else:
        other.write_bytes(copy.read_bytes() + b"x" * (problem == "longer"))
        other.chmod(0o666 if problem == "others may write it" else 0o600)
    assert cells._opened(other) is None


REFUSALS = {  # environment -> what the reason says
    ("CXX", "/nowhere/c++"): "the cell small is not compiled: CXX names /nowhere/c++, which is not there: install one",
    ("CXX", "false"): "false failed: exit code 1",
    ("GPURNN_CPU_CELLS", "0"): "the cell small is not compiled: GPURNN_CPU_CELLS switches it off",
    (
        "PATH",
        "/nowhere",
    ): "the cell small is not compiled: no C++ compiler was found: install one, such as g++, or set CXX",
}


@pytest.mark.parametrize("change", REFUSALS, ids=" ".join)
def test_without_a_compiler_a_cell_is_array_code(change, monkeypatch, caplog):
    """Its bits, and the reason in the log once, and in each plan."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(*change)
    x = np.random.default_rng(0).standard_normal((4, 9, 3)).astype(np.float32)
    found = []
    with caplog.at_level(logging.INFO, "gpurnn"):
        for backend in ("cpu", "numpy"):
            layer = gpurnn.Recurrent(small, 3, 5, 2, bidirectional=True, backend=backend, seed=0)
            output, state, backward = layer.forward(x, lengths=[4, 0, 1, 2, 3, 4, 4, 2, 1])
            found.append((output, state, *backward(output), layer.flat_grads.copy()))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=32 * np.finfo(np.float32).eps * np.abs(two).max())
    (told,) = messages(caplog)
    assert REFUSALS[change] in told and told.endswith("It runs as array code, which is slower")
    layer = gpurnn.Recurrent(small, 3, 5, backend="cpu")
    plan = layer.plan(2, 1)
    assert plan.schedule == "array code" and REFUSALS[change] in plan.reason


@needs_compiler
def test_a_struct_that_does_not_compile(monkeypatch, caplog):
    wrong = type(small)(small.function, small.gates, small.states, name="wrong")
    wrong.struct = wrong.struct.replace("out.state[0] =", "out.status[0] =")
    layer = gpurnn.Recurrent(wrong, 3, 5, backend="cpu", seed=0)
    np.testing.assert_array_equal(layer(np.ones((2, 1, 3), "float32"))[0], expected())
    (told,) = messages(caplog)
    assert "the cell wrong is not compiled" in told and "status" in told
    assert layer.plan(2, 1).schedule == "array code"
