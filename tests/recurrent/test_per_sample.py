"""Gradients of each sequence: against backward passes with the gradient of one sequence alone, and torch.func."""

import numpy as np
import pytest
from helpers import BACKENDS, assert_close, backend_of, host
from optional import optional

import gpurnn
from gpurnn.cells import library
from gpurnn.dtypes import EPSILON
from gpurnn.per_sample import terms as sums
from gpurnn.testing import allowed_rounding, count_terms, draw_like, leaves, map_leaves

torch = optional("torch")
T, B, I, H = 6, 4, 3, 5
LENGTHS = [6, 0, 3, 5]
LAYERS = {"rnn": gpurnn.RNN, "lstm": gpurnn.LSTM, "gru": gpurnn.GRU}
OPTIONS = {
    "plain": {},
    "stack of two directions": {"num_layers": 2, "bidirectional": True, "learn_state": True, "dropout": 0.3},
    "reverse without biases": {"reverse": True, "bias": False},
    "batch first": {"batch_first": True},
    "dropped weights": {"num_layers": 2, "weight_dropout": 0.4},
    "wavefront": {"num_layers": 3, "wavefront": 2},
    "residual": {"num_layers": 3, "residual": True},
    "sizes": {"num_layers": 2, "hidden": (4, 7), "bidirectional": True},
    "layer norm": {"layer_norm": True, "zoneout": 0.2},
    "heads": {"heads": 5, "num_layers": 2, "bidirectional": True, "learn_state": True, "weight_dropout": 0.3},
}
OF_ONE = {
    "projection": ("lstm", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    "own parameters": ("lstm", {"peephole": True, "layer_norm": True, "recurrent_dropout": 0.2}),
    "original": ("gru", {"reset_after": False, "num_layers": 2}),
    "original with options": ("gru", {"reset_after": False, "activation": "softsign", "recurrent_dropout": 0.1}),
    "relu": ("rnn", {"nonlinearity": "relu", "num_layers": 2}),
}
CASES = [(kind, options) for options in OPTIONS.values() for kind in LAYERS] + list(OF_ONE.values())


def build(kind, options, backend="numpy", dtype="float64", seed=1):
    options = dict(options)
    hidden = options.pop("hidden", H)
    layer = LAYERS[kind](I, hidden, backend=backend_of(backend), dtype=dtype, seed=seed, **options)
    noise = 0.2 * np.random.default_rng(5).standard_normal(layer.flat_params.shape)
    for name, array in layer._views(layer.xp.asarray(noise.astype(layer.compute_dtype))).items():
        layer.params[name] += array  # initial states and gains that are all alike would hide an error
    return layer


def call(model, *arguments, lengths=LENGTHS, **marks):
    """A forward pass, and (doutput, dstate) for its backward."""
    *returned, backward = model.forward(*arguments, lengths=lengths, retain=True, **marks)
    rng = np.random.default_rng(3)
    gradients = [map_leaves(lambda a: model.xp.asarray(rng.standard_normal(a.shape).astype(a.dtype)), one)
                 for one in returned]  # fmt: skip
    return backward, gradients


def of_sequence(gradients, b, batch_first=False):
    """Gradients that are zero for all sequences but b; outputs and states both have the sequences on their axis 1."""

    def alone(array, axis=1):
        part = array.copy()
        others = [n for n in range(part.shape[axis]) if n != b]
        part[(slice(None),) * axis + (others,)] = 0
        return part

    output, *states = gradients
    return [alone(output, 0 if batch_first else 1), *(map_leaves(alone, one) for one in states)]


def check(model, backward, gradients, terms, batch_first=False):
    """What is recorded is what backward adds for one sequence after the other, and ``grads`` stays as it is."""
    model.zero_grad()
    whole = backward(*gradients)
    summed = {name: host(array).copy() for name, array in model.grads.items()}
    one_by_one = []
    for b in range(B):
        model.zero_grad()
        backward(*of_sequence(gradients, b, batch_first))
        one_by_one.append({name: host(array).copy() for name, array in model.grads.items()})
    model.flat_grads[...] = 7
    with gpurnn.per_sample_gradients(model) as per_sample:
        again = backward(*gradients)
    assert (host(model.flat_grads) == 7).all()
    for first, second in zip(leaves(whole), leaves(again), strict=True):
        np.testing.assert_array_equal(host(first), host(second))
    dtype, frozen = model.compute_dtype.name, model.frozen
    found = per_sample.gradients()
    assert list(found) == [name for name in model.params if name not in frozen]
    expected = {name: np.stack([one[name] for one in one_by_one]) for name in found}
    for name, array in found.items():
        assert_close(array, expected[name], terms, name, dtype)
    check_norms(per_sample, expected, terms, dtype)
    model.zero_grad()
    per_sample.add()
    for name in found:
        assert_close(model.grads[name], summed[name], B * terms, name, dtype)
    check_clipped(model, per_sample, expected, terms)
    return per_sample, expected


def check_norms(per_sample, expected, terms, dtype):
    """The norm of an error of eps in each of n numbers is eps sqrt(n)."""
    squares = {name: (array.reshape(B, -1) ** 2).sum(axis=1) for name, array in expected.items()}
    room = {name: allowed_rounding(array, dtype, terms) * np.sqrt(array[0].size) for name, array in expected.items()}
    for name, norms in per_sample.norms_by_name().items():
        np.testing.assert_allclose(host(norms), np.sqrt(squares[name]), rtol=0, atol=room[name], err_msg=name)
    total = np.sqrt(sum(squares.values()))
    np.testing.assert_allclose(host(per_sample.norms()), total, rtol=0, atol=sum(room.values()))
    assert total.max() > 100 * sum(room.values())  # so that a wrong norm would be seen


def check_clipped(model, per_sample, expected, terms):
    norms, dtype = host(per_sample.norms()), model.compute_dtype.name
    limit = float(np.median(norms))
    model.zero_grad()
    before = per_sample.add_clipped(limit)
    np.testing.assert_array_equal(host(before), norms)
    factors = np.minimum(1, limit / np.maximum(norms, 1e-300))
    assert factors.min() < 1 and factors.max() == 1
    for name, array in expected.items():
        clipped = np.tensordot(factors, array.astype("float64"), 1)
        assert_close(model.grads[name], clipped, B * terms, name, dtype)


# ---- recurrent layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, options", CASES, ids=str)
def test_recurrent(kind, options, backend):
    layer = build(kind, options, backend)
    x = np.random.default_rng(0).standard_normal((B, T, I) if layer.batch_first else (T, B, I))
    backward, gradients = call(layer, layer.xp.asarray(x))
    check(layer, backward, gradients, count_terms(layer, T), layer.batch_first)


@pytest.mark.parametrize(
    "name", [name for name, one in vars(library).items() if isinstance(one, gpurnn.cells.TracedCell)]
)
def test_cells(name):
    layer = gpurnn.Recurrent(vars(library)[name], I, H, 2, bidirectional=True, backend="numpy", dtype="float64", seed=1)
    backward, gradients = call(layer, np.random.default_rng(0).standard_normal((T, B, I)))
    check(layer, backward, gradients, count_terms(layer, T))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("more", [{}, {"reset_to": "initial"}, {"heads": 5}])
@pytest.mark.parametrize("kind, options", [(kind, {}) for kind in LAYERS] + [("gru", {"reset_after": False})], ids=str)
def test_resets_and_masks(kind, options, more, backend):
    layer = build(kind, {"bidirectional": True, "learn_state": True, **options, **more}, backend)
    rng = np.random.default_rng(4)
    x, state = rng.standard_normal((T, B, I)), draw_like(layer(np.zeros((T, B, I)))[1], rng)
    marks = {"reset": rng.random((T, B)) < 0.4, "mask": rng.random((T, B)) < 0.7}
    check(layer, *call(layer, x, state, **marks), count_terms(layer, T))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes(kind, backend, dtype):
    """16-bit activations: each backward pass rounds the same numbers, so only sums in float32 differ."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    layer = build(kind, OPTIONS["stack of two directions"], backend, dtype)
    x = np.random.default_rng(0).standard_normal((T, B, I)).astype(layer.dtype)
    backward, gradients = call(layer, x)
    check(layer, backward, gradients, count_terms(layer, T))


@pytest.mark.parametrize("kind", LAYERS)
def test_against_torch(kind):
    """vmap(grad) of torch.func over the equations; it cannot take torch.nn's own layers."""
    from option_references import run

    layer = build(kind, {})
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((T, B, I)), draw_like(layer(np.zeros((T, B, I)))[1], rng)
    backward, (doutput, dstate) = call(layer, x, state, lengths=None)
    with gpurnn.per_sample_gradients(layer) as per_sample:
        backward(doutput, dstate)
    tensor = torch.from_numpy
    firsts, lasts = ([tensor(part[0]) for part in leaves(one)] for one in (state, dstate))

    def loss(p, x, first, doutput, last):
        output, final = run(kind, p, x[:, None], [part[None] for part in first], torch.tensor([T]), {})
        parts = [(output[:, 0] * doutput).sum(), *((one[0] * d).sum() for one, d in zip(final, last, strict=True))]
        return sum(parts)

    parameters = {name[:-3]: tensor(array) for name, array in layer.params.items()}
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1, 0, 1, 0))
    expected = of_each(parameters, tensor(x), firsts, tensor(doutput), lasts)
    for name, array in per_sample.gradients().items():
        assert_close(array, expected[name[:-3]], count_terms(layer, T), name)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_ragged_batch_is_its_sequences_one_by_one(kind):
    layer = build(kind, {"num_layers": 2, "bidirectional": True, "learn_state": True})
    x = np.random.default_rng(0).standard_normal((T, B, I))
    backward, gradients = call(layer, x)
    with gpurnn.per_sample_gradients(layer) as per_sample:
        backward(*gradients)
    found = per_sample.gradients()
    for b, length in enumerate(LENGTHS):
        layer.zero_grad()
        _, _, one = layer.forward(x[:length, b : b + 1])
        one(gradients[0][:length, b : b + 1], map_leaves(lambda a, b=b: a[:, b : b + 1], gradients[1]))
        for name, array in layer.grads.items():
            assert_close(found[name][b], array, count_terms(layer, T), name)


# ---- other layers, and models


def model_of(backend, dtype="float64"):
    how = {"backend": backend_of(backend), "dtype": dtype}
    table = gpurnn.Embedding(7, 4, padding_idx=2, **how)
    layers = {
        "table": table,
        "norm": gpurnn.LayerNorm(4, **how),
        "drop": gpurnn.Dropout(0.2, variational=True, **how),
        "rnn": gpurnn.GRU(4, 4, learn_state=True, **how),
        "batch": gpurnn.BatchNorm(4, **how),
        "out": gpurnn.Linear(4, 4, **how),
        "tied": gpurnn.TiedLinear(table),
    }
    model = gpurnn.Sequential(layers)
    model["batch"].eval()
    noise = 0.3 * np.random.default_rng(5).standard_normal(model.flat_params.shape)
    for name, array in model._views(model.xp.asarray(noise.astype(model.compute_dtype))).items():
        model.params[name] += array
    return model


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_models(backend, dtype):
    """A table that is read and multiplied with has terms of both kinds."""
    model = model_of(backend, dtype)
    model.freeze("out.bias", "rnn.weight_hh_l0")
    ids = model.xp.asarray(np.random.default_rng(0).integers(0, 7, (T, B)))
    backward, gradients = call(model, ids)
    per_sample, expected = check(model, backward, gradients, count_terms(model, T))
    assert "out.bias" not in expected


@pytest.mark.parametrize("mode", ["last", "attention"])
def test_pooled_models(mode):
    layers = (gpurnn.LSTM(I, H), gpurnn.Pooling(H, mode), gpurnn.Linear(H, 2))
    model = gpurnn.Sequential(*layers)
    for layer in layers:
        layer.flat_params += 0.1
    x = np.random.default_rng(0).standard_normal((T, B, I)).astype("float32")
    y, state, backward = model.forward(x, lengths=LENGTHS)
    dy = np.random.default_rng(1).standard_normal(y.shape).astype("float32")
    with gpurnn.per_sample_gradients(model) as per_sample:
        backward(dy)
    found = per_sample.gradients()
    for b in range(B):
        model.zero_grad()
        *_, one = model.forward(x[:, b : b + 1], lengths=LENGTHS[b : b + 1])
        one(dy[b : b + 1])
        for name, array in model.grads.items():
            assert_close(found[name][b], array, count_terms(model, T), name, "float32")


def prefer(monkeypatch, gram):
    """Norms by Gram matrices wherever there are two factors, or nowhere."""
    monkeypatch.setattr(sums, "prefers_gram", lambda terms, *sizes: gram and terms[0].x is not None)


@pytest.mark.parametrize("gram", [True, False])
def test_a_table_with_two_uses(gram, monkeypatch):
    """Ids that occur several times, and the products of both uses, by both ways to a norm."""
    prefer(monkeypatch, gram)
    model = model_of("numpy")
    backward, gradients = call(model, np.random.default_rng(0).integers(0, 7, (T, B)))
    per_sample, expected = check(model, backward, gradients, count_terms(model, T))
    per_sample._recording.terms["table.weight"].reverse()  # as where the table is read after it was multiplied with
    check_norms(per_sample, expected, count_terms(model, T), "float64")


@pytest.mark.parametrize("gram", [True, False])
def test_a_layer_that_runs_twice(gram, monkeypatch):
    """The norm of a sum of two uses has products of both."""
    prefer(monkeypatch, gram)

    class Twice(gpurnn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cell = gpurnn.Linear(3, 3, dtype="float64"), gpurnn.GRUCell(3, 3, dtype="float64")

        def forward(self, x):
            first, first_backward = self.linear.forward(x)
            h, cell_backward = self.cell.forward(first)
            second, second_backward = self.linear.forward(h)
            return second, lambda dy: first_backward(cell_backward(second_backward(dy))[0])

    model, rng = Twice(), np.random.default_rng(0)
    y, backward = model.forward(rng.standard_normal((B, 3)))
    dy = rng.standard_normal(y.shape)
    *_, backward = model.forward(rng.standard_normal((B, 3)))
    with gpurnn.per_sample_gradients(model) as per_sample:
        backward(dy)
    check_norms(per_sample, {n: host(a) for n, a in per_sample.gradients().items()}, count_terms(model, 2), "float64")
    before = per_sample.gradients()
    per_sample.add()
    for name, array in before.items():
        assert_close(model.grads[name], array.sum(axis=0), B * count_terms(model, 2), name)


# ---- norms in two ways


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(4, 30, 40), (50, 3, 2)], ids=["few timesteps", "many"])
def test_both_ways_to_a_norm_agree(shape, dtype, monkeypatch):
    steps, M, N = shape
    layer = gpurnn.Linear(N, M, dtype=dtype)
    y, backward = layer.forward(np.random.default_rng(0).standard_normal((steps, B, N)).astype(dtype))
    with gpurnn.per_sample_gradients(layer) as per_sample:
        backward(np.random.default_rng(1).standard_normal(y.shape).astype(dtype))
    chosen = sums.prefers_gram(per_sample._recording.terms["weight"], (M, N), steps)
    assert chosen == (steps < M * N / (M + N))
    found = {}
    for way in (True, False):
        prefer(monkeypatch, way)
        found[way] = per_sample.norms_by_name()["weight"]
    allowed = count_terms(layer, steps) * EPSILON[dtype] * np.sqrt(M * N)
    np.testing.assert_allclose(found[True], found[False], rtol=allowed)


def test_terms_that_cancel_have_no_norm():
    """Gram matrices in float32 would leave the square root of a rounding."""
    layer = gpurnn.Linear(40, 40, bias=False)
    x = np.repeat(np.random.default_rng(0).standard_normal((1, B, 40)), 3, axis=0).astype("float32")
    y, backward = layer.forward(x)
    d = np.random.default_rng(1).standard_normal(y.shape[1:]).astype("float32")
    dy = np.stack([np.float32(0.3) * d, np.float32(0.7) * d, -d])
    with gpurnn.per_sample_gradients(layer) as per_sample:
        backward(dy)
    assert sums.prefers_gram(per_sample._recording.terms["weight"], (40, 40), 3)
    size = np.sqrt((dy**2).sum(axis=(0, 2)) * (x**2).sum(axis=(0, 2)))
    assert (per_sample.norms() <= 3 * EPSILON["float32"] * size).all()  # a rounding in each of three terms


def test_norms_in_blocks(monkeypatch):
    """A block holds at least one sequence."""
    layer = build("lstm", {})
    backward, gradients = call(layer, np.random.default_rng(0).standard_normal((T, B, I)))
    with gpurnn.per_sample_gradients(layer) as per_sample:
        backward(*gradients)
    whole = per_sample.norms()
    for size in (1, 3 * T * T):
        monkeypatch.setattr(sums, "_BLOCK", size)
        np.testing.assert_allclose(per_sample.norms(), whole, rtol=count_terms(layer, T) * EPSILON["float64"])


# ---- what is refused


def test_batch_normalization_is_refused_and_leaves_everything_as_it_was():
    layer = build("lstm", {"batch_norm": True})
    x = np.random.default_rng(0).standard_normal((T, B, I))
    y, _, backward = layer.forward(x)
    with gpurnn.per_sample_gradients(layer), pytest.raises(ValueError, match="LSTM normalized over the batch"):
        backward(y)
    assert not layer.flat_grads.any()
    backward(y)  # it has not run yet
    model = gpurnn.Sequential(gpurnn.BatchNorm(I, dtype="float64"), gpurnn.Linear(I, 2, dtype="float64"))
    y, backward = model.forward(x)
    with gpurnn.per_sample_gradients(model), pytest.raises(ValueError, match="0 normalized over the batch"):
        backward(y)
    assert not model.flat_grads.any()


def test_batch_normalization_in_evaluation_mode():
    layer = build("gru", {"batch_norm": True}).eval()
    backward, gradients = call(layer, np.random.default_rng(0).standard_normal((T, B, I)))
    check(layer, backward, gradients, count_terms(layer, T))


def test_layers_that_do_not_say_what_they_add():
    class Gain(gpurnn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.parameter("gain", np.ones(2))

        def forward(self, x):
            return super().forward(x)

    model = gpurnn.Sequential({"gain": Gain(), "out": gpurnn.Linear(2, 2)})
    with pytest.raises(TypeError, match="gain is a Gain, which adds to the gradient of weight itself"):
        gpurnn.per_sample_gradients(model).__enter__()
    model.freeze("gain")
    with gpurnn.per_sample_gradients(model) as per_sample:
        y, backward = model.forward(np.ones((B, 2), "float32"))
        backward(y)
    assert list(per_sample.gradients()) == ["out.weight", "out.bias"]


def test_errors():
    layer, other = gpurnn.Linear(2, 3), gpurnn.Linear(2, 3)
    with gpurnn.per_sample_gradients(layer) as per_sample:
        with pytest.raises(RuntimeError, match="no backward pass"):
            per_sample.norms()
        for one, rows in ((layer, 4), (other, 5)):
            y, backward = one.forward(np.ones((rows, 2), "float32"))
            backward(y)
        y, backward = layer.forward(np.ones((3, 2), "float32"))
        with pytest.raises(gpurnn.ShapeError, match="weight was used for 3 sequences, other parameters for 4"):
            backward(y)
    assert other.flat_grads.any() and not layer.flat_grads.any()  # a layer outside adds as ever
    with pytest.raises(gpurnn.ShapeError, match="factors: expected one for each of 4 sequences"):
        per_sample.add(np.ones(3))
    with pytest.raises(ValueError, match="max_norm"):
        per_sample.add_clipped(0)
    with pytest.raises(TypeError, match="batch_first"):
        gpurnn.per_sample_gradients(layer, batch_first="yes").__enter__()


def test_axes():
    """Arrays of three and more axes have the sequences on the second, or on the first with ``batch_first``."""
    rng = np.random.default_rng(0)
    for batch_first, shape in (
        (None, (T, B, 3, 2)),
        (False, (T, B, 2)),
        (True, (B, T, 2)),
        (True, (B, 2)),
        (None, (2,)),
    ):
        layer = gpurnn.Linear(2, 3, dtype="float64")
        x = rng.standard_normal(shape)
        y, backward = layer.forward(x)
        dy = rng.standard_normal(y.shape)
        with gpurnn.per_sample_gradients(layer, batch_first=batch_first) as per_sample:
            backward(dy)
        axes = {4: "tbkm,tbkn->bmn", 3: "btm,btn->bmn" if batch_first else "tbm,tbn->bmn", 2: "bm,bn->bmn"}
        expected = np.outer(dy, x)[None] if x.ndim == 1 else np.einsum(axes[x.ndim], dy, x)
        assert_close(per_sample.gradients()["weight"], expected, 3 * T)
