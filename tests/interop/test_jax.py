"""Functions for JAX against gpurnn's layers, and everything that JAX does with its functions."""

import gc
import re
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from helpers import ROOT
from optional import needs, optional

import gpurnn

jax = optional("jax")
jnp = optional("jax.numpy")
export = optional("jax.export")
gj = optional("gpurnn.interop.jax")
ffi = optional("gpurnn.interop.jax.ffi")
passes = optional("gpurnn.interop.jax.passes")
pytestmark = needs("jax")

RANDOM = 8  # of 200 random layers that were compared


@pytest.fixture(autouse=True)
def doubles():
    """float64 is allowed, as it is not by default."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def normal(number, *shape, dtype="float64"):
    return np.random.default_rng(number).standard_normal(shape).astype(dtype)


def parameters(kind, *sizes, dtype="float64", **options):
    """Those of a layer of gpurnn. Most tests take NumPy arrays: JAX compiles each operation on its own arrays."""
    layer = getattr(gpurnn, kind)(*sizes, dtype=dtype, seed=4, backend="numpy", **options)
    return {name: np.array(one) for name, one in layer.params.items()}


def equal(got, expected):
    """Equal bits, after rounding to the dtype of ``got``."""
    got = np.asarray(got)
    np.testing.assert_array_equal(got.astype(float), np.asarray(expected).astype(got.dtype).astype(float))


def trees_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(equal, got, expected)


def close(got, expected, terms=100):
    """Equal but for the order of sums of so many terms, in float64."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(map(np.asarray, jax.tree.leaves(got)), map(np.asarray, jax.tree.leaves(expected)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == np.float64
        assert np.abs(a - b).max(initial=0) <= terms * 2.0**-52 * np.abs(b).max(initial=1)


def stacked(trees):
    return jax.tree.map(lambda *parts: np.stack(parts), *trees)


# ---- what layers of gpurnn compute

SIZES = (
    "hidden_size",
    "bidirectional",
    "heads",
    "bias",
    "learn_state",
    "proj_size",
    "cell",
)  # read from the parameters


def function(kind, options):
    """``call(params, x, ...)`` of a layer."""
    rest = {name: value for name, value in options.items() if name not in SIZES}
    first = [options["cell"]] if kind == "Recurrent" else []
    return partial(getattr(gj, kind.lower()), *first, **rest)


def compare(
    kind, options, *, sizes=(5, 4, 1), shape=(6, 3), dtype="float32", marks=(), state=False, key=None, jit=True
):
    """Equal bits of results and gradients of a call: of the function, and of the layer with the same parameters."""
    rng, (T, B), (I, H, L) = np.random.default_rng(sum(shape)), shape, sizes
    sized = {"input_size": I, "hidden_size": H, "num_layers": L} | options
    layer = getattr(gpurnn, kind)(**sized, dtype=dtype, seed=4)
    params = {name: np.array(one) for name, one in layer.params.items()}
    given = {"lengths": rng.integers(0, T + 1, B), "reset": rng.random((T, B)) < 0.3, "mask": rng.random((T, B)) < 0.7}
    given = {name: given[name] for name in marks}
    if key is None:
        layer.eval()
    else:
        layer.seed = passes.seed_of(np.asarray(jax.random.bits(key, (2,), "uint32")))
    x, initial = rng.standard_normal((T, B, I)).astype(layer.dtype), None
    if state:
        shapes = jax.tree.map(np.shape, layer(x)[1], is_leaf=lambda one: isinstance(one, np.ndarray))
        initial = jax.tree.map(
            lambda one: rng.standard_normal(one).astype(x.dtype), shapes, is_leaf=lambda one: isinstance(one[0], int)
        )
    layer.calls = 0
    output, final, backward = layer.forward(x, initial, **given)
    doutput = rng.standard_normal(output.shape).astype(x.dtype)
    dfinal = jax.tree.map(lambda one: rng.standard_normal(one.shape).astype(x.dtype), final)
    dx, dinitial = backward(doutput, dfinal)
    call = function(kind, options)

    def everything(params, x, state):
        def of(params, x, state):
            return call(params, x, state, key=key, **given)

        results, vjp = jax.vjp(of, params, x, state)
        return of(params, x, state), results, vjp((jnp.asarray(doutput), jax.tree.map(jnp.asarray, dfinal)))

    plain, results, gradients = (jax.jit(everything) if jit else everything)(params, x, initial)
    for got, got_final in (plain, results):
        assert all(one.dtype == x.dtype for one in (got, *as_tuple(got_final)))
        equal(got, output)
        trees_equal(got_final, final)
    equal(gradients[1], dx)
    if state:
        trees_equal(gradients[2], dinitial)
    for name, one in gradients[0].items():
        equal(one, layer.grads[name])


OPTIONS = {
    "layer norm": ("LSTM", {"layer_norm": True, "backend": "numpy"}),
    "heads": ("GRU", {"heads": 2, "bidirectional": True}),
    "unmixed heads": ("LSTM", {"heads": 2, "mix_heads": False, "coupled": True, "backend": "numpy"}),
    "peephole": ("LSTM", {"peephole": True, "learn_state": True, "reset_to": "initial", "backend": "numpy"}),
    "reset_before": ("GRU", {"reset_after": False, "masked_output": "repeat", "backend": "numpy"}),
    "unequal layers": ("GRU", {"hidden_size": [4, 6], "bidirectional": True}),
    "projection": ("LSTM", {"proj_size": 2, "bidirectional": True}),
    "activation": ("RNN", {"nonlinearity": "relu", "bias": False, "reverse": True, "backend": "numpy"}),
    "own cell": ("Recurrent", {"cell": gpurnn.cells.slstm, "residual": True, "backend": "numpy"}),
    "cell without products": ("Recurrent", {"cell": gpurnn.cells.mingru, "backend": "numpy"}),
    "memory": ("LSTM", {"memory": "sqrt"}),
    "dropout": ("GRU", {"dropout": 0.5, "zoneout": 0.1, "backend": "numpy"}),
    "weight dropout": ("GRU", {"weight_dropout": 0.3, "heads": 2}),
}
DRAWS = ("dropout", "weight dropout")
MARKS = ("lengths", "reset", "mask")


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    key = jax.random.key(7) if name in DRAWS else None
    kind, options = OPTIONS[name]
    compare(kind, options, sizes=(4, 4, 2), dtype="float64", marks=MARKS, key=key)


@pytest.mark.parametrize("name", DRAWS)
def test_nothing_is_drawn_without_a_key(name):
    compare(*OPTIONS[name], sizes=(4, 4, 2))


@pytest.mark.long
def test_outside_of_jit():
    compare("LSTM", {}, sizes=(4, 4, 2), dtype="float64", marks=MARKS, state=True, jit=False)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype):
    compare("GRU", {"bidirectional": True}, sizes=(5, 4, 2), dtype=dtype, marks=MARKS, state=True)
    params = parameters("LSTM", 3, 4, dtype="float32")
    narrow, x = {name: one.astype(dtype) for name, one in params.items()}, jnp.asarray(normal(1, 5, 2, 3), dtype)

    @jax.jit
    def run(params, narrow, x):
        h, c = gj.lstm(params, x)[1]
        longer = gj.lstm(params, x, (h, c.astype("float32")))[1]  # a sequence in pieces is what it is in one call
        return h, c, *longer, jax.grad(lambda params: gj.lstm(params, x)[0].astype("float32").sum())(narrow)

    h, c, h_long, c_long, gradients = run(params, narrow, x)
    assert {one.dtype for one in (h, c, h_long, *gradients.values())} == {x.dtype} and c_long.dtype == jnp.float32


@pytest.mark.long
def test_random_layers():
    """Some of 200: sizes, options, marks, dtypes, with and without jit."""
    rng = np.random.default_rng(1)
    for number in range(RANDOM):
        random_layer(rng, jit=number % 8 > 0)


def random_layer(rng, jit):
    kind, (T, B, H) = ("LSTM", "GRU", "RNN")[rng.integers(3)], map(int, rng.integers(0, 8, 3))
    options = {
        "bidirectional": bool(rng.random() < 0.4), "bias": bool(rng.random() < 0.7),
        "learn_state": bool(rng.random() < 0.3), "backend": ("cpu", "numpy")[rng.integers(2)],
    }  # fmt: skip
    if kind == "LSTM" and H > 1 and rng.random() < 0.4:
        options["proj_size"] = int(rng.integers(1, H))
    marks = tuple(name for name in MARKS if rng.random() < 0.4)
    dtype = ("float32", "float64", "bfloat16")[rng.choice(3, p=[0.45, 0.45, 0.1])]
    sizes, state = (int(rng.integers(1, 6)), max(1, H), int(rng.integers(1, 4))), bool(rng.random() < 0.5)
    compare(kind, options, sizes=sizes, shape=(T, B), dtype=dtype, marks=marks, state=state, jit=jit)


def test_axes():
    params, x = parameters("LSTM", 3, 4, 2, bidirectional=True), normal(1, 5, 2, 3)
    reset, lengths = np.arange(10).reshape(5, 2) % 3 == 0, [5, 3]

    @jax.jit
    def run(x, length):
        output, state = gj.lstm(params, x, lengths=lengths, reset=reset)
        one = jax.tree.map(lambda part: part[:, 1], state)
        first = gj.lstm(params, x.swapaxes(0, 1), lengths=lengths, reset=reset.T, batch_first=True)
        longer = gj.lstm(params, x, state, lengths=lengths, reset=reset)
        single = gj.lstm(params, x[:, 1], one, lengths=3, reset=reset[:, 1])
        traced = gj.lstm(params, x[:, 1], one, lengths=length, reset=reset[:, 1])
        return (output, state), first, longer, single, traced

    (output, state), first, (longer, final), single, traced = run(x, 3)
    trees_equal(traced, single)
    trees_equal((first[0].swapaxes(0, 1), first[1]), (output, state))
    close(single, (longer[:, 1], jax.tree.map(lambda part: part[:, 1], final)))


# ---- derivatives


def checked():
    marks = {"reset": normal(8, 3, 2) > 0.6, "mask": normal(9, 3, 2) > -0.5}
    own = {"cell": gpurnn.cells.slstm, "learn_state": True, "backend": "numpy"}
    return {
        "LSTM": ("LSTM", {"proj_size": 1}, (2, 2, 1), {}, True),
        "GRU with lengths": ("GRU", {"bidirectional": True}, (2, 2, 2), {"lengths": [3, 0]}, True),
        "RNN with resets and masks": ("RNN", {"reverse": True}, (2, 2, 2), marks, True),
        "own cell": ("Recurrent", own, (2, 2, 1), {}, False),
        "draws": ("GRU", {"dropout": 0.5, "weight_dropout": 0.3}, (2, 2, 2), {"key": jax.random.key(2)}, False),
        "memory": ("LSTM", {"memory": "states"}, (2, 2, 2), {}, True),
    }  # fmt: skip


CHECKED = ["LSTM", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "GRU with lengths", "RNN with resets and masks", "own cell", "draws", "memory",
))]  # fmt: skip
STEP = 2.0**-17  # the cube root of a rounding: central differences of this step have the least error


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKED)
def test_first_and_second_derivatives(name):
    """JAX's own check, under jit."""
    from jax.test_util import check_grads

    kind, options, (I, H, L), given, with_state = checked()[name]
    layer = getattr(gpurnn, kind)(
        input_size=I, hidden_size=H, num_layers=L, dtype="float64", seed=1, **options | {"backend": "numpy"}
    )
    params, x = {name: np.array(one) for name, one in layer.params.items()}, normal(1, 3, 2, I)
    state = jax.tree.map(lambda part: normal(2, *part.shape), layer(x)[1]) if with_state else None
    call = function(kind, options)
    check_grads(jax.jit(lambda *all: call(*all, **given)), (params, x, state), order=2, modes=["rev"], eps=STEP)


def test_only_what_is_wanted_is_computed():
    """Neither the gradient with respect to an x that is data, nor those of weights that are not trained."""
    params, x = parameters("GRU", 3, 4, 2), normal(1, 5, 2, 3)

    def loss(some, x):
        return jnp.square(gj.gru(params | some, x)[0]).sum()

    chosen = [["weight_hh_l0"], ["bias_ih_l1", "weight_ih_l0"], []]

    @jax.jit
    def run(params, x):
        each = [jax.grad(loss)({name: params[name] for name in names}, x) for names in chosen]
        return jax.grad(loss, (0, 1))(params, x), each, jax.grad(loss, 1)({}, x)

    (expected, dx), each, dx_alone = run(params, x)
    equal(dx_alone, dx)
    for names, got in zip(chosen, each, strict=True):
        trees_equal(got, {name: expected[name] for name in names})
        text = str(jax.make_jaxpr(jax.grad(loss))({name: params[name] for name in names}, x))
        wanted = re.findall(r"wanted=\((.*?)\)", text)
        assert [one.count("True") for one in wanted] == ([len(names)] if names else [])


def test_forward_mode_is_refused():
    params, x = parameters("RNN", 3, 4), normal(1, 5, 2, 3)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: gj.rnn(params, x)[0], (x,), (x,))


def test_third_derivatives_are_refused():
    params, x = parameters("RNN", 2, 2), normal(1, 3, 1, 2)

    def along(function):
        return lambda x: (jax.grad(function)(x) * x).sum()

    with pytest.raises(NotImplementedError, match="third ones.*product of the gradient with a constant vector"):
        jax.jit(jax.grad(along(along(lambda x: gj.rnn(params, x)[0].sum()))))(x)


@pytest.mark.long
def test_a_hessian():
    params, x, v = parameters("GRU", 2, 2), normal(1, 3, 2), normal(2, 3, 2)

    def loss(x):
        return jnp.square(gj.gru(params, x)[0]).sum()

    hessian = np.asarray(jax.jit(jax.jacrev(jax.grad(loss)))(x))
    product = jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) * v).sum()))(x)
    close(np.tensordot(hessian, v, 2), product)
    close(hessian, hessian.transpose(2, 3, 0, 1))


@pytest.mark.parametrize("jit", [False, True])
def test_a_backward_pass_that_runs_twice(jit):
    """What is saved is worked in, and is still there for the next one."""
    params, x = parameters("LSTM", 3, 4, 2), normal(1, 5, 2, 3)
    reset, along = np.arange(10).reshape(5, 2) % 3 == 0, normal(2, 5, 2, 4)

    def results(params, x):
        return jax.vjp(lambda params, x: gj.lstm(params, x, reset=reset)[0], params, x)[1]

    def three(vjp):
        return vjp(along), vjp(2 * along), vjp(along)

    first, second, third = (
        jax.jit(lambda *given: three(results(*given)))(params, x) if jit else three(results(params, x))
    )
    trees_equal(first, third)
    trees_equal(jax.tree.map(lambda one: 2 * np.asarray(one), first), second)


@pytest.mark.long
def test_rematerialization():
    params, x = parameters("LSTM", 3, 4, 2), normal(1, 5, 2, 3)

    def loss(params, x):
        return jnp.square(gj.lstm(params, x, dropout=0.5, key=jax.random.key(4))[0]).sum()

    again = jax.jit(jax.grad(jax.checkpoint(loss)))
    trees_equal(again(params, x), jax.jit(jax.grad(loss))(params, x))
    assert str(jax.make_jaxpr(again)(params, x)).count("gpurnn_forward") == 2


@pytest.mark.long
def test_nothing_is_left_behind():
    params, x = parameters("LSTM", 3, 4, 2), normal(1, 5, 2, 3)

    def run():
        output, vjp = jax.vjp(lambda x: gj.lstm(params, x)[0], x)  # and no backward pass
        jax.block_until_ready(output)
        del output, vjp
        gc.collect()
        return len(jax.live_arrays())

    run()
    before = run()
    assert [run() for _ in range(3)] == [before] * 3


# ---- vmap and scan


def loss_of(results):
    output, (h, c) = results
    return jnp.square(output).sum() + (h * c).sum()


@pytest.mark.long
@pytest.mark.parametrize("marks", [False, True])
def test_a_batch_of_batches(marks):
    """Where the weights are shared: one larger batch, of the forward and of the backward pass."""
    params, x = parameters("LSTM", 3, 4, 2, bidirectional=True), normal(1, 4, 5, 2, 3)
    given = {"lengths": np.array([[5, 0], [1, 3], [2, 2], [5, 5]]), "reset": normal(2, 5, 4, 2) > 1} if marks else {}
    axes = {"lengths": 0, "reset": 1} if marks else {}
    h, c = normal(3, 4, 4, 2, 4), normal(4, 4, 2, 4)  # h for each batch, c for all

    def of(x, h, given):
        return gj.lstm(params, x, (h, c), **given)

    def loss(x, h, given):
        return loss_of(of(x, h, given))

    @jax.jit
    def together(x, h, given):
        batched = jax.vmap(of, in_axes=(0, 1, axes))
        inside = jax.grad(lambda x, h: loss_of(batched(x, h, given)), (0, 1))(x, h)
        outside = jax.vmap(jax.grad(loss, (0, 1)), in_axes=(0, 1, axes), out_axes=(0, 1))(x, h, given)
        return batched(x, h, given), inside, outside

    @jax.jit
    def alone(x, h, given):
        return of(x, h, given), jax.grad(loss, (0, 1))(x, h, given)

    each = [alone(x[k], h[:, k], {name: np.take(one, k, axes[name]) for name, one in given.items()}) for k in range(4)]
    expected = stacked([one for one, _ in each])
    gradients = stacked([dx for _, (dx, _) in each]), np.stack([dh for _, (_, dh) in each], 1)
    got, inside, outside = together(x, h, given)
    close(got, expected)
    close(inside, gradients)
    close(outside, gradients)
    text = str(jax.make_jaxpr(together)(x, h, given))
    assert text.count("gpurnn_backward") == 2 and "scan" not in text


@pytest.mark.long
def test_gradients_of_weights_in_vmap():
    """Their sum inside of ``grad``, in one pass; those of each batch outside."""
    params, x = parameters("GRU", 3, 4), normal(1, 3, 5, 2, 3)

    def loss(params, x):
        return jnp.square(gj.gru(params, x)[0]).sum()

    alone = jax.jit(jax.grad(loss))
    each = jax.vmap(jax.grad(loss), (None, 0))
    total = jax.grad(lambda params, x: jax.vmap(loss, (None, 0))(params, x).sum())
    expected = stacked([alone(params, one) for one in x])
    close(jax.jit(each)(params, x), expected)
    close(jax.jit(total)(params, x), jax.tree.map(lambda one: one.sum(0), expected))
    text = str(jax.make_jaxpr(total)(params, x))
    assert text.count("gpurnn_backward") == 1 and "scan" not in text


@pytest.mark.long
def test_vmap_over_parameters_and_keys():
    """One after another: an ensemble, and masks of each key."""
    keys, x, xs = jax.random.split(jax.random.key(0), 3), normal(1, 5, 2, 3), normal(2, 3, 5, 2, 3)

    def drawn(params, key, x):
        return gj.gru(params, x, key=key, dropout=0.5)[0]

    @jax.jit
    def run(keys, x, xs):
        params = jax.vmap(lambda key: gj.init_gru(key, 3, 4, 2, dtype="float64"))(keys)
        one = jax.tree.map(lambda part: part[1], params)
        by_key, by_x = jax.vmap(drawn, (None, 0, None)), jax.vmap(drawn, (None, None, 0))
        return params, jax.vmap(gj.gru, (0, None))(params, x), by_key(one, keys, x), by_x(one, keys[0], xs)

    params, ensemble, by_key, by_x = run(keys, x, xs)
    one = {name: np.asarray(part[1]) for name, part in params.items()}
    made, output = jax.jit(lambda key, x: (gj.init_gru(key, 3, 4, 2, dtype="float64"), gj.gru(one, x)))(keys[1], x)
    trees_equal(one, made)
    trees_equal(jax.tree.map(lambda part: part[1], ensemble), output)
    alone = jax.jit(drawn)
    for k in range(3):
        equal(by_key[k], alone(one, keys[k], x))
        equal(by_x[k], alone(one, keys[0], xs[k]))
    assert not np.array_equal(by_key[0], by_key[1])


def test_nested_and_empty_vmaps():
    params, x = parameters("RNN", 3, 4), normal(1, 2, 5, 3, 3)

    def of(x):
        return gj.rnn(params, x)[0]

    nested = jax.jit(jax.vmap(jax.jit(jax.vmap(of, 1, 1))))
    alone = jax.jit(of)
    close(nested(x), np.stack([np.stack([alone(some[:, m]) for m in range(3)], 1) for some in x]))
    assert jax.jit(jax.vmap(of))(np.zeros((0, 5, 3))).shape == (0, 5, 4)
    assert alone(np.zeros((0, 3))).shape == (0, 4)


@pytest.mark.long
def test_scan_over_a_sequence_in_pieces():
    """The state is carried from piece to piece; gradients go back through all of them."""
    params, x = parameters("LSTM", 3, 4), normal(1, 12, 2, 3)

    def pieces(params, x):
        def piece(state, x):
            output, state = gj.lstm(params, x, state)
            return state, output

        state, output = jax.lax.scan(piece, (np.zeros((1, 2, 4)), np.zeros((1, 2, 4))), x.reshape(3, 4, 2, 3))
        return output.reshape(12, 2, 4), state

    def all_of(run):
        return jax.jit(lambda *given: (run(*given), jax.grad(lambda *given: loss_of(run(*given)), (0, 1))(*given)))

    close(all_of(pieces)(params, x), all_of(gj.lstm)(params, x))


@pytest.mark.long
def test_training_inside_of_one_graph():
    """A loop of updates under jit learns a sum over time."""
    x = normal(1, 8, 64, 1, dtype="float32")
    target = x.cumsum(axis=0)
    params = {"rnn": parameters("GRU", 1, 16, dtype="float32"), "head": np.zeros((16, 1), "float32")}

    def loss(params):
        return jnp.square(gj.gru(params["rnn"], x)[0] @ params["head"] - target).mean()

    def update(params, _):
        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda param, gradient: param - 0.1 * gradient, params, gradients), value

    losses = jax.jit(lambda params: jax.lax.scan(update, params, length=60)[1])(params)
    assert losses[-1] < 0.3 * losses[0]


# ---- initial values, exported programs, threads


def test_initial_values():
    key, options = jax.random.key(5), {"forget_bias": 1.0, "dtype": "float64"}
    params = gj.init_lstm(key, 3, 4, 2, **options)
    seed = passes.seed_of(np.asarray(jax.random.bits(key, (2,), "uint32")))
    layer = gpurnn.LSTM(3, 4, 2, **options, seed=seed, backend="numpy")
    for name, one in layer.params.items():
        equal(params[name], one)
    trees_equal(jax.jit(lambda key: gj.init_lstm(key, 3, 4, 2, **options))(key), params)
    shapes = jax.eval_shape(lambda key: gj.init_rnn(key, 3, 4, dtype="bfloat16"), key)
    assert shapes["weight_ih_l0"].shape == (4, 3) and shapes["weight_ih_l0"].dtype == jnp.bfloat16


def test_an_exported_program():
    params, x = parameters("GRU", 3, 4), normal(1, 5, 2, 3)
    allowed = [export.DisabledSafetyCheck.custom_call("gpurnn_forward")]
    exported = export.export(jax.jit(gj.gru), disabled_checks=allowed)(params, x)
    trees_equal(exported.call(params, x), gj.gru(params, x))


def test_threads_that_train_at_the_same_time():
    params, x = parameters("LSTM", 16, 32, dtype="float32"), normal(1, 20, 8, 16, dtype="float32")
    gradient = jax.jit(jax.grad(lambda params: jnp.square(gj.lstm(params, x)[0]).sum()))
    expected, found = gradient(params), []

    def train():
        for _ in range(10):
            found.append(gradient(params))

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 30
    for one in found:
        trees_equal(one, expected)


# ---- mistakes


def mistakes():
    params, x, h = parameters("LSTM", 3, 4, dtype="float32"), normal(1, 5, 2, 3, dtype="float32"), np.zeros((1, 2, 4))
    peephole, x64 = parameters("LSTM", 3, 4, dtype="float32", peephole=True), x.astype("float64")
    flags, jitted = np.zeros((5, 2), bool), jax.jit(gj.lstm)
    return {
        "nothing": (lambda: gj.lstm({}, x), "params: expected weight_ih_l0.* got none"),
        "foreign": (lambda: gj.lstm({"kernel": x}, x), "params: expected weight_ih_l0.* got kernel"),
        "missing": (lambda: gj.lstm({n: a for n, a in params.items() if n != "bias_hh_l0"}, x), "lacks bias_hh_l0"),
        "more": (lambda: gj.lstm(params | {"gain_l0": h}, x), "this one has gain_l0"),
        "an option that is missing": (lambda: gj.lstm(peephole, x), "this one has p_f_l0"),
        "shape": (lambda: gj.lstm(params | {"weight_hh_l0": x[:, 0]}, x), r"expected weight_hh_l0 of shape \(16, 4\)"),
        "dtype of params": (lambda: gj.lstm(params, x64), "params: expected weight_ih_l0 of dtype float64"),
        "another cell": (lambda: gj.gru(params, x), "params: expected"),
        "axes": (lambda: gj.lstm(params, x[0, 0]), r"x: expected \(T, B, 3\)"),
        "features": (lambda: gj.lstm(params, x[..., :2]), r"x: expected \(T, B, 3\)"),
        "dtype": (lambda: gj.lstm(params, x.astype(int)), "x: expected dtype float32"),
        "no tuple": (lambda: gj.lstm(params, x, h), r"state: expected 2 arrays \(h, c\)"),
        "shape of state": (lambda: gj.lstm(params, x, (h, h[:, :1])), r"state: expected c of shape \(1, 2, 4\)"),
        "dtype of state": (lambda: gj.lstm(params, x, (h, h.astype(int))), "state: expected dtype"),
        "lengths": (lambda: gj.lstm(params, x, lengths=[5, 6]), "lengths: expected lengths from 0 to 5"),
        "shape of lengths": (lambda: jitted(params, x, lengths=np.arange(3)), "lengths: expected 2 integers"),
        "reset": (lambda: gj.lstm(params, x, reset=flags * 1.0), "reset: expected booleans"),
        "mask": (lambda: gj.lstm(params, x, mask=flags.T), r"mask: expected shape \(5, 2\)"),
        "batch_first": (lambda: gj.lstm(params, x, batch_first=1), "batch_first"),
        "read": (lambda: gj.lstm(params, x, num_layers=2), "num_layers: the parameters tell it"),
        "traced": (lambda: jitted(params, x, zoneout=0.5), "zoneout: .*static_argnames"),
        "seed": (lambda: gj.lstm(params, x, seed=1), "seed.*key"),
        "backend": (lambda: gj.lstm(params, x, backend="cuda"), "backend"),
        "batch_norm": (lambda: gj.init_gru(jax.random.key(0), 3, 4, batch_norm=True), "batch_norm: running statistics"),
        "unknown": (lambda: gj.lstm(params, x, peepholes=True), "peepholes"),
        "dtype of init": (lambda: gj.init_rnn(jax.random.key(0), 3, 4, dtype="int32"), "dtype: expected dtype float32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "nothing", "foreign", "missing", "more", "an option that is missing", "shape", "dtype of params", "another cell",
    "axes", "features", "dtype", "no tuple", "shape of state", "dtype of state", "lengths", "shape of lengths", "reset",
    "mask", "batch_first", "read", "traced", "seed", "backend", "batch_norm", "unknown", "dtype of init",
])  # fmt: skip
def test_mistakes(name):
    call, message = mistakes()[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_float64_where_jax_has_none():
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(gpurnn.DtypeError, match="dtype: float64 is off in JAX.*jax_enable_x64"):
        gj.init_lstm(jax.random.key(0), 3, 4, dtype="float64")


def test_lengths_that_only_a_compiled_call_knows():
    """The error comes from inside of XLA, and the next call is right."""
    params, x = parameters("GRU", 3, 4), normal(1, 5, 2, 3)
    call = jax.jit(lambda lengths: gj.gru(params, x, lengths=lengths)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="ShapeError: lengths: expected lengths from 0 to 5"):
        jax.block_until_ready(call(np.array([5, 6])))
    equal(call(np.array([5, 2])), gj.gru(params, x, lengths=[5, 2])[0])


@pytest.mark.parametrize("length", [2**32 + 2, 2**63 - 1, 2 - 2**32, -(2**63), np.uint64(2**32 + 2), np.uint32(2**31)])
def test_lengths_of_more_than_32_bits_are_not_cut(length):
    params, x = parameters("GRU", 3, 4), normal(1, 5, 2, 3)
    call = jax.jit(lambda lengths: gj.gru(params, x, lengths=lengths)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="ShapeError: lengths: expected lengths from 0 to 5"):
        jax.block_until_ready(call(np.array([5, length], getattr(length, "dtype", "int64"))))
    equal(call(np.array([5, 2], np.uint64)), gj.gru(params, x, lengths=[5, 2])[0])


def test_another_interface_of_xla(monkeypatch, tmp_path):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
    monkeypatch.setattr(ffi.jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match="version 0 of XLA's foreign function interface.*version 1"):
        ffi.register("gpurnn_nothing", None)


@pytest.mark.long
def test_only_this_package_imports_jax():
    script = """
import sys, gpurnn, gpurnn.interop
assert "jax" not in sys.modules
sys.modules["jax"] = None
try:
    import gpurnn.interop.jax
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'gpurnn.interop.jax needs jax. Run pip install "gpurnn[jax]"\n'
