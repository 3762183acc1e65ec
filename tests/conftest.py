"""What all tests share: a test skips where it needs a GPU or a package that is not there, plots draw to no screen."""

import os
import signal

import pytest
from optional import missing_package

import gpurnn

os.environ.setdefault("MPLBACKEND", "Agg")

# A shell's background job ignores Ctrl-C and hands that down; the tests that press it need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    problem = gpu_tests and gpurnn.backends()["cuda"]
    if problem:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))


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
