"""Recorded calls of the compiled library give the same on every instruction set: replay.cpp, by which wheels for other
systems are tested where there is no Python for them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpurnn.backends.cpu import native

HERE = Path(__file__).parent


@pytest.mark.long
@pytest.mark.skipif(native.library_path() is None, reason="gpurnn._native was not built")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(sys.platform != "linux", reason="the driver is built for Linux here")
def test_recorded_calls(tmp_path):
    calls, driver = tmp_path / "calls", tmp_path / "replay"
    run = subprocess.run([sys.executable, HERE / "recorded.py", calls], capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout.split()[0]) > 50, run.stderr
    subprocess.run(["g++", "-std=c++17", "-O0", HERE / "replay.cpp", "-o", driver, "-ldl", "-pthread"], check=True)
    found = subprocess.run([driver, native.library_path(), calls], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.splitlines()[-1].endswith(" passed, 0 failed"), found.stdout
    damaged = calls.read_bytes()
    calls.write_bytes(damaged[:-300] + bytes(300))  # the recorded masks, which must be equal to the bit
    found = subprocess.run([driver, native.library_path(), calls], capture_output=True, text=True)
    assert found.returncode == 1 and "inf of what is allowed" in found.stdout
