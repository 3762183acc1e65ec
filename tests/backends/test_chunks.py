"""Chunks of timesteps."""

import numpy as np
import pytest
from helpers import assert_close, backend_of

import gpurnn
from gpurnn.backends import chunks
from gpurnn.testing import count_terms


@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 8, 9, 10, 17])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_chunks_cover_every_timestep_once(T, steps):
    parts = chunks.time_chunks(T, steps, reverse=True)
    assert [t for part in parts for t in range(part.start, part.stop)] == list(range(T))
    assert all(part.start % steps == 0 for part in parts)
    assert T == 1 or all(part.stop - part.start != 1 for part in parts)
    assert chunks.time_chunks(T, steps) == parts[::-1]


@pytest.mark.parametrize("T", [6, 7, 8, 9, 10, 13])
def test_whole_chunks_have_the_same_borders_as_a_part(T):
    for start in range(0, T, 4):
        if T - start == 1:
            continue
        inside = [slice(p.start + start, p.stop + start) for p in chunks.time_chunks(T - start, 4, reverse=True)]
        assert inside == [part for part in chunks.time_chunks(T, 4, reverse=True) if part.start >= start]


def test_a_chunk_has_as_many_timesteps_as_its_rows_fill():
    assert [chunks.chunk_steps(100, B) for B in (0, 1, 3, 50, 1000)] == [100, 100, 34, 2, 2]


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 2}])
def test_chunks_change_no_gradient_beyond_rounding(backend, options, monkeypatch):
    """float64: a sum of T * B terms in another order is off by so many roundings at most."""
    T, B = 13, 3
    rng = np.random.default_rng(0)
    x = rng.standard_normal((T, B, 4))
    found = []
    for rows in (1, 6, 1000):
        monkeypatch.setattr(chunks, "ROWS", rows)
        layer = gpurnn.LSTM(4, 5, backend=backend_of(backend), dtype="float64", seed=0, **options)
        output, _, backward = layer.forward(x)
        dx, _ = backward(np.cos(output))
        found.append((output, dx, layer.flat_grads.copy()))
    for other in found[:2]:
        for one, two in zip(other, found[2], strict=True):
            assert_close(one, two, count_terms(layer, T * B))
