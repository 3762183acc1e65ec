"""The compiled CPU code under AddressSanitizer and UndefinedBehaviorSanitizer: the tests of it once more, in a copy."""

import os
import shutil
import signal
import subprocess
import sys

import mutate
import pytest

from gpurnn.backends.cpu.native import load_native

# As in pyproject.toml, but not optimised: the compiler takes minutes for watched code that is. What is undefined ends
# the process by an illegal instruction, which compiles in two thirds of the time of messages; to read those, put
# -fno-sanitize-recover=undefined in place of the last flag.
FLAGS = (
    "-std=c++17 -O0 -g0 -fvisibility=hidden -fno-math-errno -ffp-contract=fast -pthread -Wno-psabi -fPIC -shared "
    "-fsanitize=address,undefined -fsanitize-undefined-trap-on-error"
)


def run(place, *arguments, **environment):
    environment = os.environ | {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def library(name):
    """A library of the compiler's, or None."""
    asked = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return asked if os.path.isabs(asked) else None


@pytest.fixture(scope="module")
def place():
    """A copy of the project whose compiled library is watched."""
    if sys.platform != "linux" or not shutil.which("g++") or not library("libasan.so") or load_native() is None:
        pytest.skip("needs g++ with libasan, and the compiled library")
    copies = mutate.Copies(1)
    place = copies.free[0]
    (built,) = (place / "gpurnn").glob("_native*")
    built.unlink()
    command = ["g++", *FLAGS.split(), str(place / "kernels/cpu/api.cpp"), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield place
    copies.close()


def watched(place, *arguments, **environment):
    preload = " ".join(filter(None, (library("libasan.so"), library("libubsan.so"))))
    # Python itself keeps memory to its end; what the library leaks shows in the tests of its pool
    environment |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return run(place, *arguments, **environment)


@pytest.mark.slow
def test_the_compiled_code_reads_and_writes_what_is_its_own(place):
    # of each kind of vectors one dtype: what is read and written depends on their 2, 8 or 16 numbers
    other = "128 and float32 or AVX2 and float64 or AVX-512 and float64"
    chosen = f"not fork and not no_vector and not (every_cell_and_option and ({other}))"
    tests = "tests/backends/cpu/test_cpu_ops.py", "-k", chosen
    code, told = watched(place, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    assert code == 0 and "passed" in told, told[-6000:]
    assert "runtime error" not in told and "AddressSanitizer" not in told, told[-6000:]


@pytest.mark.slow
def test_cells_compiled_at_their_first_use_do_so_too(place, tmp_path):
    compiler = tmp_path / "watching"
    watch = " ".join(flag for flag in FLAGS.split() if "sanitize" in flag or flag == "-O0")
    compiler.write_text(f'#!/bin/sh\nexec g++ "$@" {watch}\n')
    compiler.chmod(0o700)
    # all that `peephole` and `no_product` read and write `two_products` and `drawing` do, too
    tests = "tests/backends/cpu/test_cells.py", "-k", "no_worse and float32 and not peephole and not no_product"
    code, told = watched(
        place, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests,
        CXX=str(compiler), GPURNN_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert code == 0 and "passed" in told, told[-6000:]
    assert "runtime error" not in told and "AddressSanitizer" not in told, told[-6000:]


@pytest.mark.slow
def test_weights_in_8_bits_are_read_to_their_end(place):
    chosen = "overflow or infinity or contiguous or stepper and not means and not four or nan"
    code, told = watched(
        place, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        "tests/backends/cpu/test_int8.py", "-k", chosen,
    )  # fmt: skip
    assert code == 0 and "passed" in told, told[-6000:]
    assert "runtime error" not in told and "AddressSanitizer" not in told, told[-6000:]


@pytest.mark.slow
def test_a_read_past_the_end_is_seen(place):
    """The watch itself: a matrix one row shorter than the library is told."""
    code, told = watched(
        place, "-c",
        "import numpy as np, ctypes\n"
        "from gpurnn.backends.cpu.native import load_native\n"
        "library, _ = load_native()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p\n"
        "memory = libc.malloc(ctypes.c_size_t(4 * 99))\n"
        "out = np.zeros(1)\n"
        "library.gpurnn_native_add_squares(memory, 100, 0, out.ctypes.data, 1, library.gpurnn_native_level())\n",
    )  # fmt: skip
    assert code != 0 and "heap-buffer-overflow" in told, told[-3000:]


@pytest.mark.slow
def test_an_overflow_is_seen(tmp_path):
    """The other watch: what C++ leaves undefined."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    (tmp_path / "add.cpp").write_text("int main(int n, char **) { int most = 0x7fffffff; most += n; return most > 0; }")
    flags = [flag for flag in FLAGS.split() if flag not in ("-shared", "-fPIC")]
    command = ["g++", *flags, str(tmp_path / "add.cpp"), "-o", str(tmp_path / "add")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([str(tmp_path / "add")], capture_output=True).returncode == -signal.SIGILL
