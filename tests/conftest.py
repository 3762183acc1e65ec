"""What all tests share: GPU tests skip where there is no GPU, plots draw to no screen, hypothesis repeats itself."""

import os
import signal

import pytest
from hypothesis import settings

import gpurnn.backend

os.environ.setdefault("MPLBACKEND", "Agg")

# A shell's background job ignores Ctrl-C and hands that down; the tests that press it need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A shared machine is slow at times, and a test that fails today must fail again tomorrow.
settings.register_profile("gpurnn", deadline=None, derandomize=True)
settings.load_profile("gpurnn")


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    problem = gpu_tests and gpurnn.backend.backends()["cuda"]
    if problem:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))
