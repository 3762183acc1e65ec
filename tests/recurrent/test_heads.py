"""Heads: each is a layer of its own size beside the others, and all are one layer with zeros between them."""

import copy
import pickle

import numpy as np
import pytest
from piecewise import case, compare, flat, whole

import gpurnn
from gpurnn.recurrent import with_heads
from gpurnn.testing import check_gradients, count_terms, draw_like, leaves, worst_error

N, H = 3, 6
KINDS = {
    "rnn": lambda size, **more: gpurnn.RNN(3, size, **more),
    "lstm": lambda size, **more: gpurnn.LSTM(3, size, **more),
    "gru": lambda size, **more: gpurnn.GRU(3, size, **more),
    "gru original": lambda size, **more: gpurnn.GRU(3, size, reset_after=False, **more),
    "peephole": lambda size, **more: gpurnn.LSTM(3, size, peephole=True, **more),
    "layer norm": lambda size, **more: gpurnn.GRU(3, size, layer_norm=True, **more),
    "batch norm": lambda size, **more: gpurnn.LSTM(3, size, batch_norm=True, **more),
    "random": lambda size, **more: gpurnn.LSTM(3, size, zoneout=0.2, recurrent_dropout=0.3, weight_dropout=0.2, **more),
    "slstm": lambda size, **more: gpurnn.Recurrent(gpurnn.cells.slstm, 3, size, **more),
}
STACKS = {
    "one": {},
    "both, two": {"bidirectional": True, "num_layers": 2, "learn_state": True},
    "segments": {"num_layers": 2, "residual": True, "wavefront": 3},
    "own inputs": {"mix_heads": False, "bidirectional": True, "num_layers": 2, "memory": "sqrt"},
}


def build(name, **more):
    layer = KINDS[name](H, **{"heads": N, "dtype": "float64", "seed": 1} | more)
    for noise, array in zip(np.random.default_rng(5).standard_normal((99, 999)), layer.params.values(), strict=False):
        array += (0.3 * noise[: array.size].reshape(array.shape)).astype(array.dtype)
    return layer


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", KINDS)
def test_gradients(name, stack, backend):
    if name == "batch norm" and stack in ("segments", "own inputs"):
        pytest.skip("batch norm has no segments")
    layer = build(name, backend=backend, **STACKS[stack])
    x, state, lengths, reset, mask, *_ = case(copy.deepcopy(layer).eval())
    marks = {} if name == "batch norm" else {"reset": reset, "mask": mask}
    check_gradients(layer, x, state, lengths=lengths, **marks)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", [name for name in KINDS if name != "batch norm"])
def test_resets_piece_by_piece(name, backend):
    layer = build(name, backend=backend, **STACKS["both, two"]).eval()
    compare(layer, case(layer))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("batch norm", "random")])
def test_each_head_alone(name, dtype):
    """A head has the bits of a layer of its size with its parameters."""
    layer = build(name, backend="cpu", bidirectional=True, dtype=dtype)
    x, state, lengths, reset, mask, doutput, dstate = case(layer)
    together = whole(layer, x, state, lengths, reset, mask, doutput, dstate)
    options = {"bidirectional": True, "backend": "cpu", "dtype": dtype}
    h = H // N
    for n in range(N):
        alone = KINDS[name](h, **options)
        alone.load_state_dict({key: array[n] for key, array in layer.params.items()})
        mine = slice(n * h, (n + 1) * h)
        part = [tuple(one[..., mine] for one in leaves(each)) for each in (state, dstate)]
        part = [one if len(one) > 1 else one[0] for one in part]
        columns = np.r_[mine, n * h + H : (n + 1) * h + H]
        got = whole(alone, x, part[0], lengths, reset, mask, doutput[..., columns].copy(), part[1])
        np.testing.assert_array_equal(together["output"][..., columns], got["output"])
        for a, b in zip(leaves(together["state"]), leaves(got["state"]), strict=True):
            np.testing.assert_array_equal(a[..., mine], b)
        for key in layer.params:
            np.testing.assert_array_equal(together[f"d {key}"][n], got[f"d {key}"], key)


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "gru original", "peephole", "slstm"])
@pytest.mark.parametrize("stack", STACKS)
def test_dense(name, stack):
    """A dense layer with zeros between the heads has the same results; its blocks are the heads again."""
    layer = build(name, backend="cpu", **STACKS[stack])
    dense = with_heads(layer, 1)
    x, state, *rest = case(layer)
    got, expected = (flat(whole(one, x, state, *rest)) for one in (dense, layer))
    same = {key: value for key, value in expected.items() if not key.startswith("d ")}
    share, detail = worst_error(got, None, same, "float64", count_terms(dense, len(x)))
    assert share <= 1, detail
    mixes = {"mix_heads": layer.mix_heads}
    for back in (with_heads(dense, N, **mixes), with_heads(layer, N, **mixes)):
        for key, array in layer.params.items():
            np.testing.assert_array_equal(back.params[key], array, key)
    gradients = with_heads(dense, 1)  # the blocks of the dense layer's gradient are those of the heads
    for key in gradients.params:
        gradients.params[key][...] = dense.grads[key]
    for key, array in with_heads(gradients, N, **mixes).params.items():
        allowed = count_terms(dense, len(x)) * np.finfo("f8").eps * max(1, np.abs(array).max())
        assert np.abs(array - layer.grads[key]).max() <= allowed, key
    assert layer.heads == N and with_heads(dense, 2).params["weight_hh_l0"].shape[0] == 2


def test_evaluation_masks_and_draws():
    """Random masks are those of the dense layer: heads do not change what is drawn."""
    layer = build("random", backend="numpy")
    dense = with_heads(layer, 1)
    dense.weight_dropout = layer.weight_dropout = 0.0  # the weights are others
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    (a, *_), (b, *_) = layer.forward(x), dense.forward(x)
    assert np.abs(a - b).max() <= count_terms(dense, 5) * np.finfo("f8").eps


def test_steps_copies_and_16_bits():
    layer = build("lstm", backend="cpu", bidirectional=True)
    x, state, lengths, *_ = case(layer)
    output, _, _, steps = layer.forward(x, state, lengths, return_all=True)
    assert len(steps) == 2 and steps[1].gates["f"].shape == (8, 5, H)
    np.testing.assert_array_equal(np.concatenate([one.h for one in steps], axis=2), output)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other(x, state, lengths)[0], output)
    assert repr(layer).startswith("LSTM(3, 6, bidirectional=True, heads=3; 336 parameters")
    for dtype in ("float16", "bfloat16"):
        small = build("gru", backend="numpy", dtype=dtype)
        y, h, backward = small.forward(x.astype(small.dtype), lengths=lengths)
        assert backward(draw_like(y, np.random.default_rng(0)).astype(small.dtype))[1].shape == h.shape


def test_streaming_and_flow():
    layer = build("gru", backend="cpu", num_layers=2).eval()
    x, state, *_ = case(layer)
    output, final = layer(x, state)
    for t in range(len(x)):
        y, state = layer.step(x[t], state)
    terms = count_terms(layer, len(x))
    share, detail = worst_error({"y": y, "h": state}, None, {"y": output[-1], "h": final}, "float64", terms)
    assert share <= 1, detail
    with gpurnn.record_gradient_flow() as flow:
        *_, backward = layer.forward(x)
        backward(np.ones_like(output))
    dense = with_heads(layer, 1)  # norms are of all heads together
    with gpurnn.record_gradient_flow() as expected:
        *_, backward = dense.forward(x)
        backward(np.ones_like(output))
    assert set(flow) == set(expected) == {"l0", "l1"}
    for name, one in flow.items():
        share, detail = worst_error({"dh": one.dh}, None, {"dh": expected[name].dh}, "float64", 2 * terms)
        assert share <= 1, detail


def test_sizes_that_are_zero():
    layer = build("random", backend="numpy")
    for shape in ((0, 3, 3), (4, 0, 3)):
        y, _, backward = layer.forward(np.zeros(shape))
        assert backward(y)[0].shape == shape


def test_what_is_settled():
    layer = build("lstm", backend="numpy")
    for name in ("heads", "mix_heads", "bidirectional", "num_layers", "hidden_size", "reverse", "learn_state"):
        with pytest.raises(AttributeError, match=f"{name}: parameters and sizes follow from it"):
            setattr(layer, name, 2)
    with pytest.raises(TypeError, match="layer: expected a recurrent layer"):
        with_heads(gpurnn.Linear(3, 4, backend="numpy"), 2)
    with pytest.raises(TypeError, match="layer: expected a recurrent layer"):
        with_heads(gpurnn.LSTMCell(3, 4, backend="numpy"), 2)


def test_refusals():
    with pytest.raises(ValueError, match="heads: hidden_size = 6 cannot be divided into 4 heads"):
        gpurnn.LSTM(3, 6, heads=4, backend="numpy")
    with pytest.raises(ValueError, match="mix_heads: the 3 inputs of layer 0 cannot be divided into 2 parts"):
        gpurnn.LSTM(3, 6, heads=2, mix_heads=False, backend="numpy")
    with pytest.raises(ValueError, match="heads: proj_size mixes"):
        gpurnn.LSTM(3, 6, heads=2, proj_size=4, backend="numpy")
    with pytest.raises(ValueError, match="heads: the cell"):
        with_heads(build("layer norm", backend="numpy"), 1)
    with pytest.raises(ValueError, match="3 and 2 heads have no common blocks"):
        with_heads(build("lstm", backend="numpy"), 2)
