"""What every example (``>>>``) of docstrings and pages finds: a pytest plugin, named in pyproject.toml.

An example knows ``gpurnn`` and ``np``, computes on the CPU, writes to an empty folder and logs nothing.
"""

import logging

import numpy as np
import pytest

import gpurnn


@pytest.fixture(autouse=True)
def _example(request):
    if isinstance(request.node, pytest.DoctestItem):
        prepare_example(request.getfixturevalue("monkeypatch"), request.getfixturevalue("tmp_path"))
        request.getfixturevalue("doctest_namespace").update(gpurnn=gpurnn, np=np)


def prepare_example(monkeypatch, folder):
    """Until the test ends: work in ``folder``, on the CPU, without a log and without a screen."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GPURNN_BACKEND", "cpu")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr(logging.getLogger("gpurnn"), "disabled", True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """An example that needs a package that is not here is skipped, as a test is (conftest.py)."""
    try:
        return (yield)
    except Exception as error:
        from optional import (
            missing_package,
        )  # late: it looks at what is here, and this is loaded before test_optional's -p

        cause = getattr(error, "exc_info", (None, error))[1]  # doctest's UnexpectedException does not chain it
        package = isinstance(item, pytest.DoctestItem) and missing_package(cause)
        if package:
            pytest.skip(f"needs {package}")
        raise
