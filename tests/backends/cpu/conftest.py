"""What the tests of the backend "cpu" set: the number of threads, and the kind of vectors."""

import pytest
from helpers import cpu_levels

import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads a time loop takes, however little there is to do."""

    def choose(count):
        monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
        monkeypatch.setattr(cpu_ops, "_WORK", 0)
        monkeypatch.setattr(cpu_ops, "_ROWS", 1)
        monkeypatch.setattr(cpu_ops, "_SMALL", 0)

    return choose


@pytest.fixture(params=cpu_levels(), ids=lambda level: cpu_ops.LEVELS[level])
def level(request, monkeypatch):
    monkeypatch.setattr(gpurnn.get_backend("cpu"), "level", request.param)
