"""Weights of Flax's and equinox's cells, both ways: against their own results, and by names where they are absent."""

import dataclasses
import functools

import numpy as np
import pytest
from optional import needs, optional

import gpurnn

jax = optional("jax")
jnp = optional("jax.numpy")
gj = optional("gpurnn.interop.jax")
linen = optional("flax.linen")
nnx = optional("flax.nnx")
equinox = optional("equinox")
pytestmark = needs("jax")

T, B, I, H = 6, 3, 3, 4
TERMS = T * (I + 2 * H)  # roundings, one after another, of a result
KINDS = {"OptimizedLSTMCell": "LSTM", "LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleCell": "RNN"}


@pytest.fixture(autouse=True)
def doubles():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def normal(number, *shape):
    return np.random.default_rng(number).standard_normal(shape) / 2


def noise(tree):
    """Numbers for everything, biases included."""
    return jax.tree.map(lambda one: jnp.asarray(normal(int(np.sum(one.shape)), *one.shape)), tree)


def parameters(kind, seed=1, **options):
    layer = getattr(gpurnn, kind)(I, H, dtype="float64", seed=seed, backend="numpy", **options)
    return {name: np.array(one) for name, one in layer.params.items()}


def output(kind, params, x):
    return getattr(gj, kind.lower())(params, x)[0]


def close(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TERMS * 2.0**-52 * np.abs(expected).max(initial=1)


# ---- with their own cells


@needs("flax")
@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_flax_linen(name):
    cell, x = getattr(linen, name)(H, param_dtype="float64"), normal(9, T, B, I)
    theirs = linen.RNN(cell, time_major=True)
    tree = noise(theirs.init(jax.random.key(0), x))
    inner, kind = tree["params"]["cell"], KINDS[name]
    close(output(kind, gj.from_flax(inner), x), theirs.apply(tree, x))
    params = parameters(kind)
    close(theirs.apply({"params": {"cell": gj.to_flax(params, inner)}}, x), output(kind, params, x))


@needs("flax")
@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_flax_nnx(name):
    cell, x = getattr(nnx, name)(I, H, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64), normal(9, T, B, I)
    theirs, kind = nnx.RNN(cell, time_major=True), KINDS[name]
    tree = noise(nnx.to_pure_dict(nnx.state(cell)))
    nnx.update(cell, tree)
    close(output(kind, gj.from_flax(tree), x), theirs(x))
    params = parameters(kind)
    if kind == "GRU":  # nnx's has no bias beside r
        with pytest.raises(ValueError, match="no place for both biases"):
            gj.to_flax(params, tree)
        params["bias_hh_l0"][-H:] = 0
    nnx.update(cell, gj.to_flax(params, tree))
    close(theirs(x), output(kind, params, x))


@needs("equinox")
@pytest.mark.long
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_equinox(kind, bias):
    cell = getattr(equinox.nn, f"{kind}Cell")(I, H, use_bias=bias, dtype=jnp.float64, key=jax.random.key(0))
    cell, x = noise(cell), normal(9, T, B, I)

    def theirs(cell):
        def step(state, x):
            state = cell(x, state)
            return state, state[0] if kind == "LSTM" else state

        zeros = (jnp.zeros(H), jnp.zeros(H)) if kind == "LSTM" else jnp.zeros(H)
        return jax.vmap(lambda x: jax.lax.scan(step, zeros, x)[1], 1, 1)(x)

    close(output(kind, gj.from_equinox(cell), x), theirs(cell))
    params = parameters(kind, bias=bias)
    made = gj.to_equinox(params, cell)
    assert type(made) is type(cell) and made.use_bias is bias
    close(theirs(made), output(kind, params, x))


@needs("equinox")
def test_models_of_equinox_hold_parameters():
    """A module whose field is a dictionary of them: equinox's own transforms find them."""

    class Model(equinox.Module):
        rnn: dict
        head: equinox.nn.Linear

        def __call__(self, x):
            return self.head(gj.gru(self.rnn, x)[1][0])

    model = Model(parameters("GRU"), equinox.nn.Linear(H, 2, key=jax.random.key(0)))
    x = normal(9, B, T, I)
    gradients = equinox.filter_jit(equinox.filter_grad(lambda model: jnp.square(jax.vmap(model)(x)).sum()))(model)
    assert gradients.rnn["weight_hh_l0"].shape == (3 * H, H) and np.abs(gradients.rnn["weight_hh_l0"]).max() > 0


# ---- by names and shapes


def dense(inputs, outputs, bias=False):
    return {"kernel": normal(1, inputs, outputs)} | ({"bias": normal(2, outputs)} if bias else {})


TREES = {
    "LSTM": lambda: {f"i{g}": dense(I, H) for g in "ifgo"} | {f"h{g}": dense(H, H, True) for g in "ifgo"},
    "nnx LSTM": lambda: (
        {f"i{g}": dense(I, H) for g in ("i", "f_", "g", "o")} | {f"h{g}": dense(H, H, True) for g in "ifgo"}
    ),
    "fused LSTM": lambda: {"dense_i": dense(I, 4 * H), "dense_h": dense(H, 4 * H, True)},
    "GRU": lambda: {f"i{g}": dense(I, H, True) for g in "rzn"} | {f"h{g}": dense(H, H, g == "n") for g in "rzn"},
    "fused GRU": lambda: {"dense_i": dense(I, 3 * H, True), "dense_h": dense(H, 3 * H)},
    "RNN": lambda: {"i": dense(I, H, True), "h": dense(H, H)},
    "fused RNN": lambda: {"dense_i": dense(I, H, True), "dense_h": dense(H, H)},
}


@pytest.mark.parametrize("name", TREES)
def test_flax_and_back(name):
    tree, kind = TREES[name](), name.split()[-1]
    params = gj.from_flax(tree)
    assert set(params) == set(parameters(kind))
    jax.tree.map(np.testing.assert_array_equal, gj.to_flax(params, tree), tree)
    wrapped = gj.to_flax(params, {"params": tree})
    assert set(wrapped) == {"params"} and set(wrapped["params"]) == set(tree)
    jax.tree.map(np.testing.assert_array_equal, gj.from_flax(wrapped), params)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_both_biases_become_one(name):
    """The results stay, though one of the cell's biases is the sum of two."""
    params, x = parameters(name), normal(9, T, B, I)
    back = gj.from_flax(gj.to_flax(params, TREES[name]()))
    assert not np.array_equal(back["bias_hh_l0"], params["bias_hh_l0"])
    close(output(name, back, x), output(name, params, x))


def test_blocks_of_a_flax_gru():
    """Row by row where each part goes."""
    tree = TREES["GRU"]()
    params = gj.from_flax(tree, layer=1, reverse=True)
    for k, gate in enumerate("rzn"):
        rows = slice(k * H, (k + 1) * H)
        np.testing.assert_array_equal(params["weight_ih_l1_reverse"][rows], tree[f"i{gate}"]["kernel"].T)
        np.testing.assert_array_equal(params["weight_hh_l1_reverse"][rows], tree[f"h{gate}"]["kernel"].T)
        np.testing.assert_array_equal(params["bias_ih_l1_reverse"][rows], tree[f"i{gate}"]["bias"])
    np.testing.assert_array_equal(params["bias_hh_l1_reverse"], np.append(np.zeros(2 * H), tree["hn"]["bias"]))


@functools.cache
def cell_class():
    """A tree of JAX with the fields of equinox's cells."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Cell:
        weight_ih: object
        weight_hh: object
        bias: object
        bias_n: object

    return Cell


def equinox_cell(gates, bias=True):
    arrays = [normal(1, gates * H, I), normal(2, gates * H, H), normal(3, gates * H), normal(4, H)]
    has = [True, True, bias, bias and gates == 3]
    return cell_class()(*(jnp.asarray(one) if there else None for one, there in zip(arrays, has, strict=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gates", [3, 4])
def test_equinox_and_back(gates, bias):
    cell = equinox_cell(gates, bias)
    params = gj.from_equinox(cell, layer=2)
    assert set(params) == {
        f"{name}_l2" for name in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ()))
    }
    jax.tree.map(np.testing.assert_array_equal, gj.to_equinox(params, cell, layer=2), cell)
    first, second = gj.from_equinox(cell), gj.from_equinox(cell, reverse=True)
    assert {name.replace("_l0", "_l2") for name in first} == set(params)
    assert set(second) == {f"{name}_reverse" for name in first}
    jax.tree.map(np.testing.assert_array_equal, gj.to_equinox(first, cell), cell)
    jax.tree.map(np.testing.assert_array_equal, gj.to_equinox(second, cell, reverse=True), cell)


def test_a_stack_of_cells():
    """Layers and directions, one cell for each."""
    first = {"i": dense(I, H, True), "h": dense(H, H)}
    second = {"i": dense(2 * H, H, True), "h": dense(H, H)}
    params = gj.from_flax(first) | gj.from_flax(first, reverse=True)
    params |= gj.from_flax(second, layer=1) | gj.from_flax(second, layer=1, reverse=True)
    x = normal(9, T, B, I)
    layer = gpurnn.RNN(I, H, 2, bidirectional=True, dtype="float64", backend="numpy")
    layer.load_state_dict({name: np.asarray(one) for name, one in params.items()})
    close(output("RNN", params, x), layer(x)[0])
    jax.tree.map(np.testing.assert_array_equal, gj.to_flax(params, second, layer=1, reverse=True), second)


def test_dtypes_are_those_of_the_cell():
    tree = jax.tree.map(lambda one: one.astype("float32"), TREES["GRU"]())
    assert {one.dtype.name for one in gj.from_flax(tree).values()} == {"float32"}
    assert {one.dtype.name for one in jax.tree.leaves(gj.to_flax(parameters("GRU"), tree))} == {"float32"}


def mistakes():
    gru, lstm = parameters("GRU"), parameters("LSTM")
    mgu = {f"{side}{gate}": dense(I, H) for side in "ih" for gate in "fn"}
    wider = gpurnn.GRU(I, H + 1, backend="numpy").params
    heads = gpurnn.GRU(I, H, heads=2, backend="numpy").params
    return {
        "another cell of Flax": (lambda: gj.from_flax(mgu), "cell: expected the parameters of .* hf, hn, if, in"),
        "nothing": (lambda: gj.from_flax({}), "of nothing"),
        "a fused cell of other gates": (
            lambda: gj.from_flax({"dense_i": dense(I, 5 * H), "dense_h": dense(H, 5 * H)}), "cell: expected",
        ),
        "a layer that is not there": (lambda: gj.to_flax(gru, TREES["GRU"](), layer=1), "expected weight_ih_l1"),
        "a projection": (lambda: gj.to_flax(lstm | {"weight_hr_l0": 0}, TREES["LSTM"]()), "has weight_hr_l0, too"),
        "heads": (lambda: gj.to_flax(heads, TREES["GRU"]()), "a layer with heads"),
        "sizes": (lambda: gj.to_flax(wider, TREES["GRU"]()), r"ir kernel of shape \(3, 4\), and this layer \(3, 5\)"),
        "no bias": (lambda: gj.to_equinox(lstm, equinox_cell(4, bias=False)), "the cell has no bias"),
        "no bias beside r": (lambda: gj.to_flax(gru, TREES["fused GRU"]()), "no place for both biases"),
        "no cell of equinox": (lambda: gj.from_equinox(3), "cell: expected an LSTMCell or a GRUCell .* got int"),
        "neither to": (lambda: gj.to_equinox(lstm, {}), "cell: expected an LSTMCell .* got dict"),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "another cell of Flax", "nothing", "a fused cell of other gates", "a layer that is not there", "a projection",
    "heads", "sizes", "no bias", "no bias beside r", "no cell of equinox", "neither to",
])  # fmt: skip
def test_mistakes(name):
    call, message = mistakes()[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
