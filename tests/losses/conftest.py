"""Fixtures of the tests of losses: array code and compiled code, a generator, blocks of different size."""

import numpy as np
import pytest

import gpurnn
from gpurnn import losses


@pytest.fixture(params=["numpy", "cpu"])
def code(request, monkeypatch):
    """Everything by array code, and by what is compiled; a file asks for it with ``pytestmark``."""
    monkeypatch.setattr(losses.common, "array_ops", lambda *arrays: gpurnn.get_backend(request.param))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture(params=["one block", "many blocks"])
def block(request, monkeypatch):
    """Run with the real block size, and with blocks of two rows."""

    def two_rows(rows, count, width, xp):
        for start in range(0, count, 2):
            part = slice(start, min(start + 2, count))
            yield part, part if rows is None else rows[part]

    if request.param == "many blocks":
        monkeypatch.setattr(losses.common, "blocks", two_rows)
