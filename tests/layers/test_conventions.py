"""Where libraries differ and ours has chosen: what users of ONNX Runtime, TensorFlow and torch should know."""

import numpy as np
import pytest
from helpers import BACKENDS, backend_of, host, values

from gpurnn import check
from gpurnn.check import CELLS
from gpurnn.testing import leaves

LENGTHS = np.array([3, 0, 5])
DIRECTIONS = [{}, {"reverse": True}, {"bidirectional": True}, {"num_layers": 2}]


def states(layer, B, seed):
    rng = np.random.default_rng(seed)
    _, state = layer(layer.xp.asarray(np.zeros((1, B, 4), layer.dtype)))
    parts = [
        rng.normal(size=part.shape).astype(layer.dtype)
        for part in leaves(state if isinstance(state, tuple) else (state,))
    ]
    moved = tuple(map(layer.xp.asarray, parts))
    return parts, moved if isinstance(state, tuple) else moved[0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_without_steps_and_what_comes_past_an_end(backend, kind, dtype):
    """The final state of a sequence of length 0 is its initial state (ONNX Runtime: zeros); outputs past a sequence's
    end are zero (TensorFlow repeats the last one)."""
    ops = backend_of(backend)
    past = np.arange(5)[:, None] >= LENGTHS
    for options in DIRECTIONS:
        layer = check.build(kind, ops, dtype, **options)
        x = layer.xp.asarray(values((5, 3, 4)).astype(layer.dtype))
        for given in (True, False):
            parts, state = states(layer, 3, 1)
            output, final = layer(x, state if given else None, LENGTHS)
            trained, last, _ = layer.forward(x, state if given else None, LENGTHS)
            for got, ends in ((output, final), (trained, last)):
                assert not host(got)[past].any() and host(got)[~past].any()
                for part, initial in zip(leaves(ends if isinstance(ends, tuple) else (ends,)), parts, strict=True):
                    expected = initial[:, 1] if given else np.zeros_like(initial[:, 1])
                    np.testing.assert_array_equal(host(part)[:, 1], expected)


def test_a_learned_initial_state_is_the_final_one_too():
    layer = check.build("lstm", "cpu", "float32", learn_state=True)
    layer.params["initial_h_l0"], layer.params["initial_c_l0"] = 0.25, -2.0
    _, (h, c), backward = layer.forward(values((5, 3, 4)), lengths=LENGTHS)
    assert (h[:, 1] == 0.25).all() and (c[:, 1] == -2.0).all()
    dh, dc = values(h.shape), values(c.shape)
    layer.zero_grad()
    _, (dh0, dc0) = backward(None, (dh, dc))
    np.testing.assert_array_equal(dh0[:, 1], dh[:, 1])
    np.testing.assert_array_equal(dc0[:, 1], dc[:, 1])


def test_step_by_step_the_same_state_comes_out():
    """A batch in which some sequences get no new steps goes on from where they were."""
    layer = check.build("gru", "cpu", "float64")
    x = values((5, 3, 4)).astype("float64")
    _, whole = layer(x, None, LENGTHS)
    _, first = layer(x[:2], None, np.minimum(LENGTHS, 2))
    _, second = layer(x[2:], first, np.maximum(LENGTHS - 2, 0))
    np.testing.assert_allclose(second, whole, rtol=1e-12)
