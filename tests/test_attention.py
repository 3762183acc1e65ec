"""Attention against the same equations in torch, against finite differences, and its rules for lengths."""

import numpy as np
import pytest
from helpers import assert_close
from optional import optional

import gpurnn
from gpurnn import Attention, DtypeError, ShapeError, attention
from gpurnn.attention import SCORES
from gpurnn.rng import name_key
from gpurnn.testing import check_gradients, count_terms

torch = optional("torch")

F64 = {"backend": "cpu", "dtype": "float64", "seed": 3}
U, T, B = 4, 7, 5
LENGTHS = [7, 0, 3, 1, 6]


def numbers(*shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(score, **options):
    sizes = {"dot": (6, 6), "general": (5, 3), "additive": (5, 3)}[score]
    return Attention(*sizes, score, 9 if score == "additive" else None, **(F64 | {"scale": 0.7} | options))


def inputs(layer, dtype="float64"):
    return numbers(U, B, layer.query_size, seed=1, dtype=dtype), numbers(T, B, layer.memory_size, seed=2, dtype=dtype)


def in_torch(layer, queries, memory, lengths, dcontext, dweights):
    """The equations of the module's text, one sequence after another; gradients by torch."""
    arrays = {"queries": queries, "memory": memory} | {
        name: p.astype(queries.dtype) for name, p in layer.params.items()
    }
    leaves = {name: torch.from_numpy(np.array(array)).requires_grad_() for name, array in arrays.items()}
    context, weights = (
        torch.zeros(dcontext.shape).to(leaves["queries"]),
        torch.zeros(dweights.shape).to(leaves["queries"]),
    )
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        q, m = leaves["queries"][:, b], leaves["memory"][:length, b]
        if layer.score == "dot":
            scores = q @ m.T
        elif layer.score == "general":
            scores = q @ leaves["weight"] @ m.T
        else:
            hidden = torch.tanh((q @ leaves["weight_query"].T)[:, None] + m @ leaves["weight_memory"].T)
            scores = hidden @ leaves["weight_score"]
        softmax = torch.softmax(layer.scale * scores, dim=1)
        context[:, b], weights[:, b, :length] = softmax @ m, softmax
    ((context * torch.from_numpy(dcontext)).sum() + (weights * torch.from_numpy(dweights)).sum()).backward()
    results = {"context": context, "weights": weights}
    results |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().numpy() for name, value in results.items()}


def ours(layer, queries, memory, lengths, dcontext, dweights):
    layer.zero_grad()
    context, weights, backward = layer.forward(queries, memory, lengths)
    for one, other in zip(layer(queries, memory, lengths), (context, weights), strict=True):
        np.testing.assert_array_equal(one, other)
    dqueries, dmemory = backward(dcontext, dweights)
    results = {"context": context, "weights": weights, "dqueries": dqueries, "dmemory": dmemory}
    return results | {f"d{name}": grad.copy() for name, grad in layer.grads.items()}


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("score", SCORES)
def test_equals_torch(score, lengths):
    layer = make(score)
    queries, memory = inputs(layer)
    d = numbers(U, B, layer.memory_size, seed=3), numbers(U, B, T, seed=4)
    expected = in_torch(layer, queries, memory, lengths or [T] * B, *d)
    got = ours(layer, queries, memory, lengths, *d)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(got[name], value, count_terms(layer, T), name)


@pytest.mark.parametrize("score", SCORES)
def test_float32_is_as_exact_as_torch(score):
    exact, layer = make(score), make(score, dtype="float32")
    layer.load_state_dict({name: p.astype("float32") for name, p in exact.params.items()})
    exact.load_state_dict(layer.state_dict())
    arrays = (*inputs(layer, "float32"), LENGTHS, numbers(U, B, layer.memory_size, seed=3, dtype="float32"))
    arrays += (numbers(U, B, T, seed=4, dtype="float32"),)
    exact_arrays = [array if array is LENGTHS else array.astype("float64") for array in arrays]
    expected, other, got = in_torch(exact, *exact_arrays), in_torch(layer, *arrays), ours(layer, *arrays)
    for name, value in expected.items():
        rounding = np.finfo(np.float32).eps * np.abs(value).max()
        assert got[name].dtype == np.float32
        assert np.abs(got[name] - value).max() <= 2 * np.abs(other[name] - value).max() + rounding, name


@pytest.mark.parametrize("score", SCORES)
def test_finite_differences(score):
    layer = make(score)
    check_gradients(layer, *inputs(layer), LENGTHS)


@pytest.mark.parametrize("part", ["queries", "memory", "parameters"])
def test_a_broken_gradient_is_seen(part):
    class Broken(Attention):
        def forward(self, queries, memory, lengths=None):
            context, weights, backward = super().forward(queries, memory, lengths)

            def wrong(*gradients):
                dqueries, dmemory = backward(*gradients)
                self.flat_grads *= 1.01 if part == "parameters" else 1
                return dqueries * (1.01 if part == "queries" else 1), dmemory * (1.01 if part == "memory" else 1)

            return context, weights, wrong

    layer = Broken(5, 3, "additive", **F64)
    name = "weight_" if part == "parameters" else part
    with pytest.raises(AssertionError, match=f"^{name}.*: the derivative .* off by"):
        check_gradients(layer, *inputs(layer), LENGTHS)


@pytest.mark.parametrize("score", SCORES)
def test_what_lies_past_the_end_is_not_read(score):
    layer = make(score)
    queries, memory = inputs(layer)
    d = numbers(U, B, layer.memory_size, seed=3), numbers(U, B, T, seed=4)
    expected = ours(layer, queries, memory, LENGTHS, *d)
    past = np.arange(T)[:, None] >= np.array(LENGTHS)
    memory[past] = np.nan
    got = ours(layer, queries, memory, LENGTHS, *d)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert not got["dmemory"][past].any() and not got["weights"].transpose(2, 1, 0)[past].any()
    assert not got["context"][:, 1].any() and not got["dqueries"][:, 1].any()  # nothing to read
    np.testing.assert_allclose(got["weights"].sum(axis=2)[:, [0, 2, 3, 4]], 1, rtol=1e-14)


def test_large_scores_overflow_nothing():
    layer = make("dot")
    memory = np.zeros((3, 1, 6))
    memory[1, 0, 0], memory[2, 0, 0] = 1e4, -1e4
    _, weights = layer(memory[1:2], memory)
    np.testing.assert_array_equal(weights[0, 0], [0, 1, 0])


def test_additive_in_blocks(monkeypatch):
    layer = make("additive")
    arrays = (*inputs(layer), LENGTHS, numbers(U, B, 3, seed=3), numbers(U, B, T, seed=4))
    expected = ours(layer, *arrays)
    monkeypatch.setattr(attention, "_BLOCK", 3 * T * B * 9)  # three of the four queries at once
    got = ours(layer, *arrays)
    for name, value in expected.items():
        assert_close(got[name], value, count_terms(layer, T), name)


@pytest.mark.parametrize("score", SCORES)
def test_one_query_after_another_is_the_same(score):
    layer = make(score)
    queries, memory = inputs(layer)
    context, weights = layer(queries, memory, LENGTHS)
    ready = layer.remember(memory, LENGTHS)
    for u in range(U):
        one = layer.attend(queries[u : u + 1], ready)
        for got, expected in zip(one, (context, weights), strict=True):
            assert_close(got[0], expected[u], count_terms(layer, T))


@pytest.mark.parametrize("sizes", [(0, T, B), (U, 0, B), (U, T, 0), (1, 1, 1)])
@pytest.mark.parametrize("score", SCORES)
def test_empty_and_smallest(score, sizes):
    layer, (u, t, b) = make(score), sizes
    queries, memory = numbers(u, b, layer.query_size), numbers(t, b, layer.memory_size, seed=1)
    context, weights, backward = layer.forward(queries, memory, [t] * b)
    dqueries, dmemory = backward(np.ones_like(context))
    assert context.shape == (u, b, layer.memory_size) and weights.shape == (u, b, t)
    assert dqueries.shape == queries.shape and dmemory.shape == memory.shape
    if t == 1:
        np.testing.assert_array_equal(weights, 1)
        np.testing.assert_allclose(context, memory)
    elif t == 0:
        assert not context.any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("score", SCORES)
def test_16_bit(score, dtype):
    """Computed in float32 from rounded numbers: off by at most a rounding of each result and of each projection."""
    layer, exact = make(score, dtype=dtype), make(score)
    exact.load_state_dict({name: p.astype(layer.dtype).astype("float64") for name, p in layer.params.items()})
    arrays = (*inputs(layer, layer.dtype), LENGTHS, numbers(U, B, layer.memory_size, seed=3).astype(layer.dtype))
    arrays += (numbers(U, B, T, seed=4).astype(layer.dtype),)
    expected = ours(exact, *[a if a is LENGTHS else a.astype("float64") for a in arrays])
    got = ours(layer, *arrays)
    eps = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    for name, value in expected.items():
        wanted = np.float32 if name.removeprefix("d") in layer.params else layer.dtype
        assert got[name].dtype == wanted, name
        # scores of up to about 10, rounded to eps, change a weight by 10 eps of itself, and gradients by twice that
        assert np.abs(got[name].astype("float64") - value).max() <= 20 * eps * np.abs(value).max(), name


def test_gradients_accumulate():
    layer = make("additive")
    arrays = inputs(layer)
    backward = layer.forward(*arrays)[2]
    backward(np.ones((U, B, 3)))
    once = layer.flat_grads.copy()
    backward(np.ones((U, B, 3)))
    assert once.any()
    np.testing.assert_allclose(layer.flat_grads, 2 * once, rtol=1e-14)


def test_initial_values():
    layer = Attention(100, 64, "additive", 20, backend="cpu", seed=7)
    for name, inside in (("weight_query", 100), ("weight_memory", 64), ("weight_score", 20)):
        largest = np.abs(layer.params[name]).max()
        assert 0.8 * inside**-0.5 < largest <= inside**-0.5
    np.testing.assert_array_equal(
        layer.params["weight_query"],
        gpurnn.rng.uniform((20, 100), -0.1, 0.1, 7, name_key("weight_query"), dtype="float64").astype("float32"),
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda a: Attention(3, 4, "dot"), ValueError, "one size, got 3 and 4"),
        (lambda a: Attention(3, 4, "cosine"), ValueError, "score should be one of 'dot', 'general', 'additive'"),
        (lambda a: Attention(3, 4, "general", 5), ValueError, "attention_size belongs to score 'additive'"),
        (lambda a: Attention(3, 4, scale=0), ValueError, "scale should be a finite number in"),
        (lambda a: Attention(0, 4), ValueError, "query_size should be at least 1"),
        (lambda a: a(numbers(U, B, 5), numbers(T, B, 4)), ShapeError, r"memory: expected shape \(T, B, 3\)"),
        (lambda a: a(numbers(U, B, 4), numbers(T, B, 3)), ShapeError, r"queries: expected shape \(U, 5, 5\)"),
        (lambda a: a(numbers(U, B + 1, 5), numbers(T, B, 3)), ShapeError, r"queries: expected shape \(U, 5, 5\)"),
        (lambda a: a(numbers(U, B, 5, dtype="float32"), numbers(T, B, 3)), DtypeError, "queries: dtype"),
        (lambda a: a(numbers(U, B, 5), numbers(T, B, 3), [8] * B), ShapeError, "lengths: expected lengths from 0 to 7"),
        (lambda a: a.forward(numbers(U, B, 5), numbers(T, B, 3))[2](numbers(U, B, 4)), ShapeError, "dcontext"),
        (
            lambda a: a.forward(numbers(U, B, 5), numbers(T, B, 3))[2](numbers(U, B, 3), numbers(U, B, 3)),
            ShapeError,
            "dweights",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, message):
    layer = make("general")
    with pytest.raises(error, match=message):
        call(layer)
    assert not layer.flat_grads.any()
