"""What all tests share: a test skips where it needs a GPU or a package that is not there, plots draw to no screen."""

import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from cuda_on_cpu import emulator
from helpers import cpu_levels
from optional import missing_package

import gpurnn
from gpurnn.backends import chunks
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.backends.cpu import sharing

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("KERAS_BACKEND", "torch")
# what cells are compiled to stays in the checkout, for the next run
os.environ.setdefault("GPURNN_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "gpurnn"))

# Cells are compiled for tests without optimization, in a quarter of the time. tests/backends/cpu/test_cells.py compiles
# as the library does.
if shutil.which("c++") and shutil.which("sh"):
    os.environ.setdefault("CXX", f"sh {shlex.quote(str(Path(__file__).with_name('quick_compiler.sh')))}")

# A shell's background job ignores Ctrl-C and hands that down; the tests that press it need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Mark -> why its tests cannot run here, or None.
NEEDS = {
    "gpu": ("a GPU", lambda: gpurnn.backends()["cuda"]),
    "emulated": ("the emulator", emulator.missing),
}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if not any(map(item.get_closest_marker, ("slow", "long", *NEEDS))):
            item.add_marker("fast")
    for mark, (what, missing) in NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        problem = marked and missing()
        if problem:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}: {problem}"))


@pytest.fixture(autouse=True)
def emulated_tests_say_so(request, monkeypatch):
    """A test that runs kernels on the emulator without the mark fails, so that ``-m "not emulated"`` stays fast."""
    if request.node.get_closest_marker("emulated"):
        return

    def refuse(*arguments, **options):
        pytest.fail("this test runs the emulator: mark it, or its file, with pytest.mark.emulated")

    monkeypatch.setattr(emulator.Emulator, "__init__", refuse)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of six rows, so that short calls have several segments."""
    monkeypatch.setattr(chunks, "ROWS", 6)
    monkeypatch.setattr(chunks, "ROWS_OF_GPU", 6)


def _skipping():
    """Around a test or its fixtures: where it ends because a package is not here, that is a skip."""
    try:
        return (yield)
    except Exception as error:
        package = missing_package(error)
        if package:
            pytest.skip(f"needs {package}")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    return (yield from _skipping())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    return (yield from _skipping())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with good files of every task; runs draw no pictures."""
    import hostile

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
    hostile.good_files(tmp_path)
    return tmp_path


# ---- the compiled code of the backend "cpu"


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads a time loop takes, however little there is to do, and whether they divide the units."""

    def choose(count, by_units=False):
        monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
        monkeypatch.setattr(sharing, "WORK", 0)
        monkeypatch.setattr(sharing, "_ROWS", 1 << 30 if by_units else 1)
        monkeypatch.setattr(sharing, "_UNITS", 1 if by_units else 1 << 30)
        monkeypatch.setattr(sharing, "_STEP", 0)
        monkeypatch.setattr(cpu_ops, "_SMALL", 0)

    return choose


@pytest.fixture(params=cpu_levels(), ids=lambda level: cpu_ops.LEVELS[level])
def level(request, monkeypatch):
    """Each kind of vectors that this processor has."""
    monkeypatch.setattr(gpurnn.get_backend("cpu"), "level", request.param)
