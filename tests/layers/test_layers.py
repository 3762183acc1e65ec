"""The layers without a time loop, against torch and against finite differences; Sequential with and without state."""

import copy

import numpy as np
import pytest
from helpers import assert_close
from optional import optional

import gpurnn
from gpurnn import (
    GRU,
    LSTM,
    BatchNorm,
    Dropout,
    DtypeError,
    Embedding,
    LayerNorm,
    Linear,
    Pooling,
    Sequential,
    ShapeError,
    TiedLinear,
)
from gpurnn.testing import check_gradients, count_terms, draw_like, leaves

torch = optional("torch")

CPU = gpurnn.get_backend("cpu").name  # "numpy" where no compiler was found
F64 = {"backend": "cpu", "dtype": "float64", "seed": 1}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def feature_major(x):
    """x (T, B, F) with the same values and F outermost in memory, as the recurrent layers return it."""
    return np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)


def results_of(layer, x, dy):
    y, backward = layer.forward(x)
    np.testing.assert_array_equal(layer(x), y)
    dx = backward(dy)
    return {"y": y, **({} if dx is None else {"dx": dx})} | {name: grad.copy() for name, grad in layer.grads.items()}


def results_of_torch(module, x, dy):
    x = torch.from_numpy(x.copy())
    if x.is_floating_point():
        x.requires_grad_()
    y = module(x)
    y.backward(torch.from_numpy(dy))
    results = {"y": y.detach().numpy()} | ({} if x.grad is None else {"dx": x.grad.numpy()})
    return results | {name: p.grad.numpy() for name, p in module.named_parameters()}


def assert_no_worse(mine, other, exact):
    """float32: at most twice torch's error, and one rounding of the largest number."""
    rounding = np.finfo(np.float32).eps * np.abs(exact).max(initial=0)
    assert mine.dtype == np.float32
    assert np.abs(mine - exact).max(initial=0) <= 2 * np.abs(other - exact).max(initial=0) + rounding


def check_against_torch(layer_class, arguments, module, x, order=np.array, single=True):
    """Value and every gradient; in float64 equal, in float32 as exact as torch. Parameters come by the state_dict.

    order: how x and dy lie in memory. single=False leaves float32 out, where the exact answer is nothing but round-off.
    """
    module = module.float()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.from_numpy(0.5 * numbers(*p.shape, seed=5)))
    x = x.astype(np.float32) if x.dtype.kind == "f" else x
    exact = copy.deepcopy(module).double()
    floats = x.astype(np.float64) if x.dtype.kind == "f" else x
    y = exact(torch.from_numpy(floats))
    dy = numbers(*y.shape, seed=6).astype(np.float32)
    exact_results = results_of_torch(exact, floats, dy.astype(np.float64))
    single_results = results_of_torch(module, x, dy)
    both = (("float64", exact_results, floats), ("float32", single_results, x))
    terms = 2 * x.size + sum(p.numel() for p in module.parameters())  # sums over all rows, and over all features
    for dtype, results, inputs in both if single else both[:1]:
        layer = layer_class(*arguments, backend="cpu", dtype=dtype)
        layer.load_state_dict(module.state_dict())
        mine = results_of(layer, order(inputs), order(dy.astype(dtype)))
        assert set(mine) == set(results)
        for name, value in results.items():
            assert mine[name].shape == value.shape, name
            if dtype == "float64":
                assert_close(mine[name], value, terms, name)
            else:
                assert_no_worse(mine[name], value, exact_results[name])


@pytest.mark.long
def test_a_broken_gradient_is_seen():
    """Both checks can fail: one percent on one gradient must not pass."""

    class Broken(Linear):
        def forward(self, x):
            y, backward = super().forward(x)

            def wrong(dy):
                dx = backward(dy)
                self.grads["weight"] *= 1.01
                return dx

            return y, wrong

    with pytest.raises(AssertionError, match="^weight: the derivative .* off by"):
        check_gradients(Broken(3, 4, **F64), numbers(5, 3))
    with pytest.raises(AssertionError):
        check_against_torch(Broken, (3, 4), torch.nn.Linear(3, 4), numbers(5, 3))


# ---- Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (7, 3), (5, 4, 3), (2, 3, 4, 3), (0, 3), (5, 0, 3), (200, 3)])
def test_linear_equals_torch(shape, bias):
    check_against_torch(Linear, (3, 6, bias), torch.nn.Linear(3, 6, bias), numbers(*shape))


def test_linear_takes_feature_major_arrays():
    check_against_torch(Linear, (33, 17), torch.nn.Linear(33, 17), numbers(40, 9, 33), order=feature_major)


@pytest.mark.parametrize("make", [lambda: Linear(3, 3), lambda: LayerNorm(3), lambda: BatchNorm(3)])
def test_sums_over_many_steps_lose_nothing(make):
    """Rows added one by one in float32 would be wrong in the fourth digit."""
    with gpurnn.use_backend("cpu"):
        layer = make()
    dy = (1 + numbers(20000, 3)).astype("float32")
    layer.forward(numbers(20000, 3).astype("float32"))[1](dy)
    np.testing.assert_allclose(layer.grads["bias"], dy.sum(axis=0, dtype="float64"), rtol=np.finfo("float32").eps)


def test_linear_initial_values():
    layer = Linear(100, 50, backend="cpu", seed=7)
    assert layer.params["weight"].shape == (50, 100) and layer.params["bias"].shape == (50,)
    assert 0.099 < np.abs(layer.flat_params).max() <= 0.1
    np.testing.assert_array_equal(layer.flat_params, Linear(100, 50, backend="cpu", seed=7).flat_params)
    double = Linear(100, 50, backend="cpu", dtype="float64", seed=7)
    np.testing.assert_array_equal(layer.flat_params, double.flat_params.astype("float32"))
    other = Linear(100, 50, backend="cpu", seed=8)
    assert all((values != other.params[name]).all() for name, values in layer.params.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(3, 3, **F64),
        lambda: LayerNorm(3, **F64),
        lambda: BatchNorm(3, **F64),
        lambda: Dropout(0.5, **F64),
        lambda: Dropout(0.5, **F64).eval(),
        lambda: Sequential(Linear(3, 3, **F64), Dropout(0.5, **F64)),
    ],
)
def test_wrong_inputs_are_refused(make):
    layer = make()
    before = layer.state_dict()
    if not isinstance(layer, Dropout):
        for shape in ((5, 4), ()):
            with pytest.raises(ShapeError, match=rf"x: expected .*3\), got \({str(shape)[1:-1]}\)"):
                layer.forward(numbers(*shape) if shape else np.array(1.0))
    for call in (layer, layer.forward):
        with pytest.raises(DtypeError, match=r"x: dtype \(float32\) .*float64.*x.astype\('float64'\)"):
            call(numbers(5, 3).astype("float32"))
    y, backward = layer.forward(numbers(5, 3))
    with pytest.raises(ShapeError, match=r"doutput: expected shape \(5, 3\), got \(4, 3\)"):
        backward(numbers(4, 3))
    with pytest.raises(DtypeError, match="doutput: dtype"):
        backward(numbers(5, 3).astype("float32"))
    assert not layer.flat_grads.any()
    if not isinstance(layer, BatchNorm):
        assert all((before[name] == value).all() for name, value in layer.state_dict().items())


def _where(layer):
    """Where in the flat buffers the parameters lie."""
    starts = [(grad.ctypes.data - layer.flat_grads.ctypes.data) // grad.itemsize for grad in layer.grads.values()]
    return [slice(start, start + grad.size) for start, grad in zip(starts, layer.grads.values(), strict=True)]


@pytest.mark.parametrize(
    "make", [lambda: Linear(3, 3, **F64), lambda: LayerNorm(3, **F64), lambda: BatchNorm(3, **F64)]
)
def test_gradients_accumulate_and_closures_are_independent(make):
    layer = make()
    layer.flat_params += 0.1
    x, dy = numbers(5, 3), numbers(5, 3, seed=1)
    _, first = layer.forward(x)
    _, second = layer.forward(numbers(7, 3, seed=2))
    dx = first(dy)
    once = layer.flat_grads.copy()
    second(numbers(7, 3, seed=3))
    after_two = layer.flat_grads.copy()
    np.testing.assert_array_equal(first(dy), dx)
    np.testing.assert_allclose(layer.flat_grads, after_two + once, rtol=1e-14)
    assert once.any() and all((after_two != once)[grad].all() for grad in _where(layer))


# ---- Embedding


@pytest.mark.parametrize("padding", [None, 0, 4])
@pytest.mark.parametrize("shape", [(), (9,), (6, 5), (2, 3, 4), (0,), (4, 0), (300,)])
def test_embedding_equals_torch(shape, padding):
    ids = np.random.default_rng(2).integers(0, 5, shape)  # few rows, so they repeat
    check_against_torch(Embedding, (5, 3, padding), torch.nn.Embedding(5, 3, padding), ids)


@pytest.mark.parametrize("V, N", [(65, 2000), (700, 500), (1, 5), (300, 1)])
def test_embedding_gradient_of_every_size(V, N):
    ids = np.random.default_rng(3).integers(0, V, N)
    check_against_torch(Embedding, (V, 20), torch.nn.Embedding(V, 20), ids)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int32", "uint64"])
def test_embedding_ids_of_every_integer_type(dtype):
    layer = Embedding(100, 4, 99, **F64)
    ids = np.array([[3, 99], [3, 0]])
    dy = numbers(2, 2, 4)
    expected = results_of(layer, ids, dy)
    layer.zero_grad()
    for name, value in results_of(layer, ids.astype(dtype), dy).items():
        np.testing.assert_array_equal(value, expected[name])
    assert expected["weight"][3].any() and not expected["weight"][99].any()
    np.testing.assert_array_equal(layer(ids.tolist()), expected["y"])


def test_embedding_padding_above_the_type_of_the_ids():
    layer = Embedding(400, 2, 399, **F64)
    layer.forward(np.array([1, 143], np.uint8))[1](np.ones((2, 2)))  # 143 is 399 mod 256
    assert layer.grads["weight"][[1, 143]].all()


def test_embedding_initial_values():
    layer = Embedding(50, 40, 3, backend="cpu", seed=1)
    assert not layer.params["weight"][3].any() and layer.params["weight"][2].all()
    assert 0.9 < layer.params["weight"].std() < 1.1


def test_embedding_gradient_is_deterministic_and_accumulates():
    ids = np.random.default_rng(0).integers(0, 7, (50, 9))
    dy = numbers(50, 9, 16).astype("float32")
    gradients = []
    for _ in range(2):
        layer = Embedding(7, 16, backend="cpu", seed=1)
        _, backward = layer.forward(ids)
        assert backward(dy) is None
        gradients.append(layer.flat_grads.copy())
    np.testing.assert_array_equal(*gradients)
    backward(dy)
    np.testing.assert_array_equal(layer.flat_grads, 2 * gradients[0])


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([[0, 5]], ValueError, "ids: expected numbers from 0 to 4, got 5"),
        ([-1, 2], ValueError, "ids: expected numbers from 0 to 4, got -1"),
        (np.array([2**64 - 1], np.uint64), ValueError, f"got {2**64 - 1}"),
        ([1.0], DtypeError, "ids: expected integers, got float64"),
        ([True], DtypeError, "ids: expected integers, got bool"),
    ],
)
def test_embedding_refuses_ids(ids, error, message):
    layer = Embedding(5, 3, **F64)
    for call in (layer, layer.forward):
        with pytest.raises(error, match=message):
            call(ids)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Linear(0, 3), ValueError, "in_features should be at least 1"),
        (lambda: Linear(3, 2.0), TypeError, "out_features should be an int"),
        (lambda: Embedding(0, 3), ValueError, "num_embeddings should be at least 1"),
        (lambda: Embedding(5, 0), ValueError, "embedding_dim should be at least 1"),
        (lambda: Embedding(5, 3, 5), ValueError, "padding_idx should be below num_embeddings 5, got 5"),
        (lambda: Embedding(5, 3, -1), ValueError, "padding_idx should be at least 0"),
        (lambda: Dropout(1.1), ValueError, r"rate should be a finite number in \[0, 1\], got 1.1"),
        (lambda: Dropout(float("nan")), ValueError, "rate should be a finite number .* got nan"),
        (lambda: Dropout("0.5"), TypeError, "rate should be a number"),
        (lambda: LayerNorm(0), ValueError, "features should be at least 1"),
        (lambda: LayerNorm(3, eps=-1), ValueError, "eps should be"),
        (lambda: BatchNorm(3, momentum=2), ValueError, "momentum should be"),
        (lambda: Linear(3, 2, dtype="int8"), DtypeError, "dtype should be one of float32, float64, .* got int8"),
        (lambda: Linear(3, 2, backend="tpu"), ValueError, "unknown backend 'tpu'"),
        (lambda: Linear(3, 2, seed=-1), ValueError, "seed should be at least 0"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("bias", [True, False])
def test_tied_linear_shares_the_table(bias):
    """The gradient is that of an embedding and a linear layer with equal weights, summed; Press & Wolf 2017."""
    embedding = Embedding(7, 4, std=0.5, **F64)
    tied = Sequential({"in": embedding, "rnn": LSTM(4, 4, **F64), "out": TiedLinear(embedding, bias)})
    twin = Embedding(7, 4, std=0.5, **F64)
    apart = Sequential({"in": twin, "rnn": LSTM(4, 4, **F64), "out": Linear(4, 7, bias, **F64)})
    apart["out"].params["weight"][...] = twin.params["weight"]
    if bias:
        apart["out"].params["bias"][...] = 0
    assert tied.parameter_count == apart.parameter_count - 28
    ids, dy = np.random.default_rng(0).integers(0, 7, (5, 3)), numbers(5, 3, 7)
    results = []
    for model in (tied, apart):
        y, _, backward = model.forward(ids)
        np.testing.assert_array_equal(model(ids)[0], y)
        backward(dy)
        results.append(y)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-14)
    both = apart.grads["in.weight"] + apart.grads["out.weight"]
    assert_close(tied.grads["in.weight"], both, count_terms(tied, 5))
    assert_close(tied.grads["rnn.weight_hh_l0"], apart.grads["rnn.weight_hh_l0"], count_terms(tied, 5))
    if bias:
        np.testing.assert_allclose(tied.grads["out.bias"], dy.sum(axis=(0, 1)), rtol=1e-12)


def test_tied_linear_finite_differences():
    embedding = Embedding(7, 4, std=0.5, **F64)
    model = Sequential({"in": embedding, "rnn": GRU(4, 4, **F64), "out": TiedLinear(embedding)})
    check_gradients(model, np.random.default_rng(0).integers(0, 7, (5, 3)))


def test_tied_linear_refuses():
    with pytest.raises(TypeError, match="expected an Embedding, got Linear"):
        TiedLinear(Linear(3, 4, **F64))


def test_embedding_std():
    small, plain = Embedding(50, 20, std=0.1, **F64), Embedding(50, 20, **F64)
    np.testing.assert_allclose(small.params["weight"], 0.1 * plain.params["weight"], rtol=1e-15)
    with pytest.raises(ValueError, match="std"):
        Embedding(5, 2, std=-1, **F64)


# ---- Dropout


@pytest.mark.parametrize("shape", [(1000, 50), (50000,), (20, 50, 50)])
def test_dropout_zeroes_and_scales(shape):
    layer = Dropout(0.3, **F64)
    x, dy = numbers(*shape), numbers(*shape, seed=1)
    y, backward = layer.forward(x)
    dropped = y == 0
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.21 / x.size)
    np.testing.assert_allclose(y, np.where(dropped, 0, x / 0.7), rtol=1e-15)
    np.testing.assert_allclose(backward(dy), np.where(dropped, 0, dy / 0.7), rtol=1e-15)


@pytest.mark.parametrize("batch_first", [False, True])
def test_variational_dropout_keeps_one_mask_over_time(batch_first):
    layer = Dropout(0.5, variational=True, batch_first=batch_first, **F64)
    x = np.ones((12, 9, 40))
    y, backward = layer.forward(x.swapaxes(0, 1) if batch_first else x)
    dx = backward(y)
    y, dx = (a.swapaxes(0, 1) if batch_first else a for a in (y, dx))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:1], y.shape))
    np.testing.assert_array_equal(dx, 2 * y)
    assert set(np.unique(y)) == {0, 2}
    assert len(np.unique(y[0], axis=0)) == 9  # every sequence has its own mask
    with pytest.raises(ShapeError, match=r"x: variational dropout expects 3-D input .* got shape \(9, 40\)"):
        layer(x[0])
    np.testing.assert_array_equal(layer.eval()(x[0]), x[0])


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_rates_zero_and_one(variational):
    x = numbers(4, 5, 6)
    y, backward = Dropout(0, variational, **F64).forward(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(backward(x), x)
    y, backward = Dropout(1, variational, **F64).forward(x)
    assert not y.any() and not backward(x).any()


def test_dropout_is_the_identity_in_evaluation():
    layer = Dropout(0.5, **F64).eval()
    x = numbers(4, 5)
    y, backward = layer.forward(x)
    dx = backward(x)
    for array in (y, dx, layer(x)):
        np.testing.assert_array_equal(array, x)
        assert not np.shares_memory(array, x)
    assert layer.calls == 0


def test_dropout_masks_follow_seed_key_and_call():
    x = np.ones((30, 40))

    def masks(seed=1, key=0, count=3):
        layer = Dropout(0.5, backend="cpu", dtype="float64", seed=seed)
        layer.key = key
        return [layer.forward(x)[0] for _ in range(count)]

    first, second, third = masks()
    assert (first != second).any() and (second != third).any() and (first != third).any()
    np.testing.assert_array_equal(masks(), [first, second, third])
    assert (masks(seed=2)[0] != first).any()
    assert (masks(key=3)[0] != first).any()
    single = Dropout(0.5, backend="cpu", seed=1)
    np.testing.assert_array_equal(single.forward(x.astype("float32"))[0], first)


def test_dropout_counts_calls_in_training_mode():
    layer = Dropout(0.5, **F64)
    x = np.ones((30, 40))
    layer(x)
    assert layer.calls == 1
    layer.forward(x)
    assert layer.calls == 2
    layer.eval().forward(x)
    assert layer.calls == 2
    with pytest.raises(DtypeError):
        layer.train().forward(x.astype("float32"))
    assert layer.calls == 2


def test_dropout_backward_keeps_its_own_mask():
    layer = Dropout(0.5, **F64)
    x = np.ones((30, 40))
    first, backward = layer.forward(x)
    second, _ = layer.forward(x)
    layer.eval()
    np.testing.assert_array_equal(backward(x), first)
    assert (second != first).any()


# ---- LayerNorm


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (6, 5, 7), (0, 7), (500, 7), (4, 5, 128)])
def test_layer_norm_equals_torch(shape, bias, eps):
    module = torch.nn.LayerNorm(shape[-1], eps=eps, bias=bias)
    check_against_torch(LayerNorm, (shape[-1], eps, bias), module, 2 + numbers(*shape))


def test_layer_norm_takes_feature_major_arrays():
    check_against_torch(LayerNorm, (200,), torch.nn.LayerNorm(200), 2 + numbers(20, 9, 200), order=feature_major)


@pytest.mark.parametrize("features", [1, 2, 9])
def test_layer_norm_finite_differences(features):
    layer = LayerNorm(features, **F64)
    layer.flat_params += 0.3 * numbers(*layer.flat_params.shape, seed=8)
    check_gradients(layer, numbers(4, 3, features))


# ---- BatchNorm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("N", [2, 30, 3000])
def test_batch_norm_equals_torch(N, affine, training):
    module = torch.nn.BatchNorm1d(7, eps=1e-4, affine=affine, momentum=0.2)
    with torch.no_grad():
        module.running_mean += torch.from_numpy(numbers(7, seed=9)).float()
        module.running_var *= torch.from_numpy(0.5 + numbers(7, seed=9) ** 2).float()

    def build(**options):
        return BatchNorm(7, 1e-4, 0.2, affine, **options).train(training)

    check_against_torch(build, (), module.train(training), 1 + 3 * numbers(N, 7), single=N > 2)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_running_statistics_equal_torch(training, momentum):
    module = torch.nn.BatchNorm1d(4, momentum=momentum).double().train(training)
    layer = BatchNorm(4, momentum=momentum, **F64)
    layer.train(training)
    for seed in range(3):
        x = 1 + 2 * numbers(6, 4, seed=seed)
        module(torch.from_numpy(x))
        layer.forward(x)
        before = layer.state_dict()
        layer(x)  # a call without backward leaves the statistics alone
        for name, value in module.state_dict().items():
            assert_close(layer.state_dict()[name], value.numpy(), count_terms(layer, 6), name)
            np.testing.assert_array_equal(layer.state_dict()[name], before[name])
    assert int(layer.buffers["num_batches_tracked"]) == (3 if training else 0)
    assert_close(layer.eval()(x), module.eval()(torch.from_numpy(x)).detach().numpy(), count_terms(layer, 6))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batch_norm_without_momentum_averages_all_batches(dtype):
    """Ragged batches, one of them not finite; the averages are those of the finite ones, each counting the same."""
    layer = BatchNorm(3, momentum=None, dtype=dtype, backend="numpy")
    means, variances = [], []
    for seed, lengths in enumerate(([6, 2], [1, 5], [6, 6], [3, 1])):
        x = numbers(6, 2, 3, seed=seed).astype(dtype)
        valid = np.arange(6)[:, None] < lengths
        x[~valid] = np.nan
        layer.forward(x, lengths)
        means.append(x[valid].astype(np.float64).mean(axis=0))
        variances.append(x[valid].astype(np.float64).var(axis=0, ddof=1))
        if seed == 1:
            layer.forward(np.full((6, 2, 3), np.nan, dtype))
    assert int(layer.buffers["num_batches_tracked"]) == 4
    # float32: the roundings of the statistics of up to 12 steps, and of four averages
    assert_close(layer.buffers["running_mean"], np.mean(means, axis=0), 12 + 8, dtype="float32")
    assert_close(layer.buffers["running_var"], np.mean(variances, axis=0), 12 + 8, dtype="float32")
    assert "momentum=None" in repr(layer)
    layer.momentum = 0.5
    layer.momentum = None
    with pytest.raises(ValueError, match="momentum should be"):
        layer.momentum = 2


def test_batch_norm_over_time_is_batch_norm_over_all_steps():
    x, dy = numbers(6, 5, 3), numbers(6, 5, 3, seed=1)
    for order in (np.ascontiguousarray, feature_major):
        layer, flat = BatchNorm(3, **F64), BatchNorm(3, **F64)
        mine, expected = results_of(layer, order(x), order(dy)), results_of(flat, x.reshape(30, 3), dy.reshape(30, 3))
        for name, value in expected.items():
            assert_close(mine[name].reshape(value.shape), value, count_terms(layer, 30), name)


RAGGED = [4, 6, 0, 1, 3]


def ragged_rows(T=6):
    return np.arange(T)[:, None] < np.array(RAGGED)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["lengths", "mask", "both", "batch_first", "batch_first mask"])
def test_batch_norm_of_ragged_steps_is_that_of_the_valid_rows(form, training):
    """NaN in the padding, of x and of dy, goes nowhere."""
    valid = ragged_rows()
    extra = numbers(6, 5, seed=4) > -0.3
    if form == "both":
        valid &= extra
    x, dy = numbers(6, 5, 3), numbers(6, 5, 3, seed=1)
    alone = BatchNorm(3, **F64).train(training)
    expected = results_of_rows(alone, x[valid], dy[valid])
    x[~valid] = np.nan
    dy[~valid] = np.nan
    layer = BatchNorm(3, batch_first="batch_first" in form, **F64).train(training)
    turn = (lambda a: a.swapaxes(0, 1)) if layer.batch_first else (lambda a: a)
    lengths = RAGGED if form in ("lengths", "both", "batch_first") else None
    mask = {"mask": valid, "both": extra, "batch_first mask": valid.T}.get(form)
    called = layer(turn(x), lengths, mask)
    y, backward = layer.forward(turn(x), lengths, mask)
    np.testing.assert_array_equal(called, y)
    dx = backward(turn(dy))
    for mine, name in ((turn(y), "y"), (turn(dx), "dx")):
        assert_close(mine[valid], expected[name], count_terms(layer, 30), name)
        assert (mine[~valid] == 0).all()
    assert_close(layer.flat_grads, alone.flat_grads, count_terms(layer, 30))
    for name, value in layer.state_dict().items():
        assert_close(value, alone.state_dict()[name], count_terms(layer, 30), name)


def results_of_rows(layer, x, dy):
    y, backward = layer.forward(x)
    return {"y": y, "dx": backward(dy)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [None, RAGGED])
def test_batch_norm_finite_differences(lengths, training):
    layer = BatchNorm(3, **F64).train(training)
    layer.flat_params += 0.3 * numbers(*layer.flat_params.shape, seed=8)
    layer.buffers["running_mean"] += numbers(3)
    check_gradients(layer, numbers(6, 5, 3), lengths=lengths)


def test_batch_norm_needs_two_steps_and_changes_nothing():
    layer = BatchNorm(3, **F64)
    before = layer.state_dict()
    for arguments, count in (((numbers(1, 3),), 1), ((numbers(0, 3),), 0), ((numbers(4, 2, 3), [1, 0]), 1)):
        for call in (layer, layer.forward):
            with pytest.raises(ValueError, match=f"at least 2 valid steps in training mode, got {count}"):
                call(*arguments)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    layer.eval()
    assert layer(numbers(0, 3)).shape == (0, 3)
    y, backward = layer.forward(numbers(4, 2, 3), [1, 0])
    assert np.count_nonzero(y.any(axis=2)) == 1 and np.count_nonzero(backward(y).any(axis=2)) == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((numbers(3),), ShapeError, r"x: expected \(T, B, 3\) or \(N, 3\), got \(3,\)"),
        ((numbers(2, 2, 2, 3),), ShapeError, "x: expected"),
        ((numbers(4, 3), [1]), ShapeError, "lengths: need a 3-D x with a time axis"),
        ((numbers(4, 2, 3), [5, 1]), ShapeError, "lengths: expected lengths from 0 to 4"),
        ((numbers(4, 2, 3), [1.0, 1.0]), DtypeError, "lengths: expected integers"),
        ((numbers(4, 2, 3), None, np.ones((4, 2))), DtypeError, "mask: expected booleans, got float64"),
        ((numbers(4, 2, 3), None, np.ones((2, 4), bool)), ShapeError, r"mask: expected shape \(4, 2\), got \(2, 4\)"),
    ],
)
def test_batch_norm_refuses(arguments, error, message):
    layer = BatchNorm(3, **F64)
    with pytest.raises(error, match=message):
        layer.forward(*arguments)
    assert int(layer.buffers["num_batches_tracked"]) == 0


# ---- Pooling

POOLINGS = [("last", 1), ("last", 2), ("mean", 1), ("max", 1), ("attention", 1)]


def pooled(x, layer):
    """One sequence (T, F) by the definition of its mode."""
    if not len(x):
        return np.zeros(x.shape[1])
    if layer.mode == "last":
        half = x.shape[1] // layer.directions
        return np.concatenate([x[-1, :half], x[0, half:]])
    if layer.mode == "attention":
        p = layer.params
        score = np.exp(np.tanh(x @ p["weight"].T + p["bias"]) @ p["query"])
        return score @ x / score.sum()
    return x.mean(axis=0) if layer.mode == "mean" else x.max(axis=0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode, directions", POOLINGS)
def test_pooling_reads_the_valid_steps_alone(mode, directions, batch_first):
    layer = Pooling(4, mode, directions, 3 if mode == "attention" else None, batch_first=batch_first, **F64)
    layer.flat_params += 0.5 * numbers(*layer.flat_params.shape, seed=9)
    lengths = [5, 0, 7, 1, 3]
    x = numbers(7, 5, 4)
    expected = [pooled(x[:n, b], layer) for b, n in enumerate(lengths)]
    for b, n in enumerate(lengths):
        x[n:, b] = np.nan
    turned = x.swapaxes(0, 1) if batch_first else x
    y, backward = layer.forward(turned, lengths)
    assert_close(y, expected, count_terms(layer, 7))
    np.testing.assert_array_equal(layer(turned, lengths), y)
    dx = backward(numbers(5, 4, seed=1))
    dx = dx.swapaxes(0, 1) if batch_first else dx
    assert all(not dx[n:, b].any() for b, n in enumerate(lengths)) and np.isfinite(layer.flat_grads).all()
    assert dx[:5, 0].any() and dx[0, 3].any()


@pytest.mark.parametrize("lengths", [None, [5, 0, 7, 1, 3], [0, 0, 1, 0, 0]])
@pytest.mark.parametrize("mode, directions", POOLINGS)
def test_pooling_finite_differences(mode, directions, lengths):
    layer = Pooling(4, mode, directions, 3 if mode == "attention" else None, **F64)
    layer.flat_params += 0.5 * numbers(*layer.flat_params.shape, seed=9)
    check_gradients(layer, numbers(7, 5, 4), lengths=lengths)


@pytest.mark.parametrize("mode, directions", POOLINGS)
@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (1, 1)])
def test_pooling_of_nothing_and_of_one_step(mode, directions, T, B):
    layer = Pooling(2, mode, directions, backend="cpu", seed=1)
    x = numbers(T, B, 2).astype(np.float32)
    y, backward = layer.forward(x)
    np.testing.assert_allclose(y, x[0] if T else np.zeros((B, 2)), rtol=1e-6)
    assert y.dtype == np.float32 and backward(y).shape == x.shape


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode, directions", POOLINGS)
def test_pooling_in_narrow_dtypes(mode, directions, dtype):
    """Computed in float32: one rounding of input and output away from float64."""
    exact = Pooling(4, mode, directions, **F64)
    layer = Pooling(4, mode, directions, backend="cpu", dtype=dtype, seed=1)
    x = numbers(7, 5, 4).astype(layer.dtype)
    y, backward = layer.forward(x, [5, 0, 7, 1, 3])
    want, exact_backward = exact.forward(x.astype(np.float64), [5, 0, 7, 1, 3])
    dx, dwant = backward(y), exact_backward(y.astype(np.float64))
    eps = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    for mine, other in ((y, want), (dx, dwant)):
        assert mine.dtype == layer.dtype
        # half a last place for the rounding, and 40 float32 operations before it
        limit = (eps / 2 + 40 * 2**-23) * np.abs(other).max()
        assert np.abs(mine.astype(np.float64) - other).max() <= limit


def test_pooling_at_the_end_of_a_model():
    """The last valid state of both directions is what the recurrent layer returns as its state."""
    lengths = [5, 0, 7, 1, 3]
    gru = GRU(3, 4, bidirectional=True, **F64)
    model = Sequential({"gru": gru, "pool": Pooling(8, "last", 2, **F64), "out": Linear(8, 2, **F64)})
    x = numbers(7, 5, 3)
    output, state = model(x, None, lengths)
    np.testing.assert_array_equal(output, model["out"](np.concatenate(list(state[0]), axis=1)))
    check_gradients(model, x, lengths=lengths)


def test_pooling_refuses():
    for make, message in (
        (lambda: Pooling(4, "median", **F64), "mode should be one of"),
        (lambda: Pooling(5, "last", 2, **F64), "multiple of directions"),
        (lambda: Pooling(4, "attention", 1, 0, **F64), "attention_size"),
        (lambda: Pooling(4, **F64)(numbers(3, 4)), "expected .T, B, 4."),
        (lambda: Pooling(4, **F64)(numbers(3, 2, 4), [4, 1]), "lengths from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- Sequential


def test_sequential_names_and_indexing():
    first, second = Linear(3, 4, **F64), Linear(4, 2, **F64)
    model = Sequential(first, second)
    assert list(model.params) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert len(model) == 2 and list(model) == [first, second]
    assert model[0] is first and model[-1] is second and model["1"] is second and model[:1] == [first]
    for wrong, error in ((2, IndexError), ("2", KeyError)):
        with pytest.raises(error):
            model[wrong]
    named = Sequential({"inside": Linear(3, 4, **F64), "outside": Linear(4, 2, **F64)})
    assert list(named.params) == ["inside.weight", "inside.bias", "outside.weight", "outside.bias"]
    assert named["inside"].name == "inside"


def test_sequential_has_one_flat_buffer():
    model = Sequential(Linear(3, 4, **F64), Sequential(LayerNorm(4, **F64), Linear(4, 2, **F64)))
    assert list(model.params)[2:4] == ["1.0.weight", "1.0.bias"]
    model.flat_params[...] = np.arange(model.flat_params.size)
    layers = model[0], model[1][0], model[1][1]
    together = [values for layer in layers for values in layer.params.values()]
    for values, place in zip(together, _where(model), strict=True):
        np.testing.assert_array_equal(values.reshape(-1), model.flat_params[place])
    y, backward = model.forward(numbers(5, 3))
    backward(numbers(5, 2))
    assert model.flat_grads.any()
    together = [values for layer in layers for values in layer.grads.values()]
    for values, place in zip(together, _where(model), strict=True):
        np.testing.assert_array_equal(values.reshape(-1), model.flat_grads[place])
    model.zero_grad()
    assert not model[1][1].grads["weight"].any()


def test_sequential_equals_torch():
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 8),
        torch.nn.LayerNorm(8),
        torch.nn.Linear(8, 8, False),
        torch.nn.BatchNorm1d(8),
        torch.nn.Linear(8, 2),
    )

    def build(backend, dtype):
        options = {"backend": backend, "dtype": dtype}
        inner = (LayerNorm(8, **options), Linear(8, 8, False, **options), BatchNorm(8, **options))
        return Sequential(Linear(3, 8, **options), *inner, Linear(8, 2, **options))

    check_against_torch(build, (), module, numbers(11, 3))


def test_a_layer_placed_twice_shares_its_parameters():
    shared = Linear(4, 4, **F64)
    model = Sequential(Linear(3, 4, **F64), shared, LayerNorm(4, **F64), shared)
    assert list(model.params) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert model[1] is model[3] and shared.name == "1"
    check_gradients(model, numbers(5, 3))
    recurrent = GRU(4, 4, **F64)
    model = Sequential(recurrent, Dropout(0.0, **F64), recurrent)
    state = tuple(numbers(1, 3, 4, seed=seed) for seed in (1, 2))
    check_gradients(model, numbers(6, 3, 4), state)


def language_model(batch_first=False, **between):
    layers = {"embedding": Embedding(7, 4, **F64), "lstm": LSTM(4, 5, batch_first=batch_first, **F64)}
    return Sequential(layers | between | {"linear": Linear(5, 7, **F64)})


@pytest.mark.parametrize("ragged", [False, True])
def test_finite_differences_through_embedding_lstm_batch_norm_linear(ragged):
    ids = np.random.default_rng(0).integers(0, 7, (6, 5))
    model = language_model(norm=BatchNorm(5, **F64))
    state = draw_like(model(ids)[1], np.random.default_rng(7))
    check_gradients(model, ids, state, lengths=RAGGED if ragged else None)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_finite_differences_through_stacked_recurrent_layers(ragged, batch_first):
    order = {"batch_first": batch_first}
    inner = Sequential(LayerNorm(6, **F64), GRU(6, 5, **order, **F64), BatchNorm(5, **order, **F64))
    model = Sequential(LSTM(4, 3, bidirectional=True, **order, **F64), inner, gpurnn.RNN(5, 4, **order, **F64))
    x = numbers(5, 6, 4) if batch_first else numbers(6, 5, 4)
    state = draw_like(model(x)[1], np.random.default_rng(7))
    assert [np.shape(part) for part in leaves(state)] == [(2, 5, 3), (2, 5, 3), (1, 5, 5), (1, 5, 4)]
    check_gradients(model, x, state, lengths=RAGGED if ragged else None)
    check_gradients(model, x, lengths=RAGGED if ragged else None)


def test_state_is_a_tuple_with_one_entry_for_each_stateful_layer():
    """None stands for zeros, whole or in part, and a state continues where the last call ended."""
    model = Sequential(LSTM(3, 4, **F64), Linear(4, 4, **F64), GRU(4, 5, **F64))
    x = numbers(8, 2, 3)
    whole, final = model(x)
    assert model.stateful and len(final) == 2 and len(final[0]) == 2 and final[1].shape == (1, 2, 5)
    for zeros in ((None, None), [None, np.zeros((1, 2, 5))], ((np.zeros((1, 2, 4)),) * 2, None)):
        np.testing.assert_array_equal(model(x, zeros)[0], whole)
    first, state = model(x[:3])
    second, state = model(x[3:], state)
    assert_close(np.concatenate([first, second]), whole, count_terms(model, 8))
    for mine, expected in zip(leaves(state), leaves(final), strict=True):
        assert_close(mine, expected, count_terms(model, 8))


def test_wrong_states_are_refused():
    model = Sequential(LSTM(3, 4, **F64), GRU(4, 5, **F64))
    x = numbers(6, 2, 3)
    message = "state: expected a tuple with one entry for each of 2 stateful layers, got"
    for wrong, got in (((None,), "1 entries"), ((None,) * 3, "3 entries"), (np.zeros((2, 2, 5)), "ndarray")):
        for call in (model, model.forward, model.step):
            with pytest.raises(ShapeError, match=f"{message} {got}"):
                call(x, wrong)
    output, _, backward = model.forward(x)
    with pytest.raises(ShapeError, match="dstate: expected a tuple .* got 1 entries"):
        backward(output, (None,))
    assert not model.flat_grads.any()
    with pytest.raises(ShapeError, match="each of 0 stateful layers, got 1 entries"):
        Sequential(Linear(3, 4, **F64))(x, (None,))


def test_lengths_reach_every_layer_that_takes_them():
    """Padding, NaN in it included, changes nothing: each sequence alone gives the same output."""
    for nested in (False, True):
        norm = BatchNorm(4, **F64)
        middle = Sequential(Linear(4, 4, **F64), norm) if nested else norm
        model = Sequential(LSTM(3, 4, **F64), middle, GRU(4, 5, **F64)).eval()
        norm.buffers["running_mean"] += numbers(4)
        x = numbers(6, 5, 3)
        alone = [model(x[:length, b : b + 1]) for b, length in enumerate(RAGGED)]
        x[~ragged_rows()] = np.nan
        output, state = model(x, lengths=RAGGED)
        for b, length in enumerate(RAGGED):
            assert_close(output[:length, b], alone[b][0][:, 0], count_terms(model, 6))
            assert not output[length:, b].any()
            assert_close(state[1][:, b], alone[b][1][1][:, 0], count_terms(model, 6))
        model.train()
        before = norm.buffers["running_mean"].copy()
        output, _, _ = model.forward(x, lengths=RAGGED)
        assert np.isfinite(output).all() and np.isfinite(norm.buffers["running_mean"]).all()
        assert (norm.buffers["running_mean"] != before).all()


def test_lengths_without_a_recurrent_layer():
    x = numbers(6, 5, 3)
    x[~ragged_rows()] = np.nan
    model = Sequential(BatchNorm(3, **F64))
    y, backward = model.forward(x, lengths=RAGGED)
    assert np.isfinite(y).all() and not y[~ragged_rows()].any()
    np.testing.assert_array_equal(model(x, lengths=RAGGED), y)
    assert np.isfinite(backward(np.where(ragged_rows()[:, :, None], x, np.nan))).all()


@pytest.mark.parametrize("batch_first", [False, True])
def test_steps_equal_the_sequence(batch_first):
    between = {"norm": BatchNorm(5, **F64), "drop": Dropout(0.5, True, **F64), "deep": Sequential(GRU(5, 5, **F64))}
    model = language_model(batch_first, **({} if batch_first else between)).eval()
    ids = np.random.default_rng(0).integers(0, 7, (6, 5))
    whole, final = model(ids.T if batch_first else ids)
    state = None
    for t in range(6):
        output, state = model.step(ids[t], state)
        assert_close(output, whole[:, t] if batch_first else whole[t], count_terms(model, 6))
    for mine, expected in zip(leaves(state), leaves(final), strict=True):
        assert_close(mine, expected, count_terms(model, 8))


def test_dropout_layers_with_equal_seeds_get_masks_of_their_own():
    model = Sequential(Dropout(0.5, **F64), Dropout(0.5, **F64), Sequential(Dropout(0.5, **F64)))
    x = np.ones((30, 40))
    masks = [layer.forward(x)[0] for layer in (model[0], model[1], model[2][0])]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.4 < (masks[a] == masks[b]).mean() < 0.6
    again = Sequential(Dropout(0.5, **F64), Dropout(0.5, **F64))
    np.testing.assert_array_equal(again[1].forward(x)[0], masks[1])


def test_train_and_eval_reach_every_layer():
    model = Sequential(Sequential(Dropout(0.5, **F64)), BatchNorm(3, **F64), Linear(3, 3, **F64))
    assert model.eval() is model
    assert [module.training for _, module in model.modules()] == [False] * 5
    assert model.train() is model
    assert [module.training for _, module in model.modules()] == [True] * 5


def test_layers_without_a_time_axis_go_with_either_order():
    for order in (True, False):
        Sequential(LSTM(3, 4, batch_first=order, **F64), Dropout(0.1, **F64), LayerNorm(4, **F64), Linear(4, 2, **F64))


def test_sequential_is_readable_in_print():
    model = Sequential({"rnn": LSTM(3, 4, **F64), "head": Sequential(Linear(4, 2, **F64))})
    lines = repr(model).splitlines()
    assert lines[0] == f"Sequential(154 parameters, {CPU}, float64)"
    assert lines[1] == f"  rnn: LSTM(3, 4; 144 parameters, {CPU}, float64)"
    assert lines[2] == f"  head: Sequential(10 parameters, {CPU}, float64)"
    assert lines[3] == f"    0: Linear(4, 2; 10 parameters, {CPU}, float64)"
    assert len(lines) == 4


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Sequential(), ValueError, "at least one layer"),
        (lambda: Sequential({}), ValueError, "at least one layer"),
        (lambda: Sequential("linear"), TypeError, "0: expected a gpurnn layer, got str"),
        (lambda: Sequential(Linear(3, 4, **F64), None), TypeError, "1: expected a gpurnn layer, got NoneType"),
        (lambda: Sequential({"a.b": Linear(3, 4, **F64)}), ValueError, "without a dot, got 'a.b'"),
        (lambda: Sequential({"": Linear(3, 4, **F64)}), ValueError, "non-empty"),
        (lambda: Sequential(LSTM(3, 4, batch_first=True, **F64), BatchNorm(4, **F64)), ValueError, "batch_first: some"),
        (
            lambda: Sequential(Sequential(GRU(3, 4, **F64)), Dropout(0.1, True, batch_first=True, **F64)),
            ValueError,
            "batch_first: some",
        ),
        (lambda: Sequential(gpurnn.GRUCell(3, 4, **F64)), TypeError, "0: GRUCell has no sequence form"),
        (lambda: Sequential({1: Linear(3, 4, **F64)}), TypeError, "names of layers should be strings, got int"),
        (
            lambda: Sequential(Linear(3, 4, **F64), Linear(4, 5, backend="cpu")),
            ValueError,
            f"1 is {CPU}/float32, the module around it {CPU}/float64",
        ),
    ],
)
def test_sequential_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_which_layers_take_lengths():
    """``fit`` and ``Sequential`` give them to these and to no other."""
    options = {"backend": "cpu", "seed": 1}
    takers = [gpurnn.LSTM(2, 3, **options), gpurnn.GRU(2, 3, **options), gpurnn.RNN(2, 3, **options),
              gpurnn.BatchNorm(2, **options), gpurnn.Pooling(2, "mean", **options),
              Sequential(gpurnn.Linear(2, 2, **options))]  # fmt: skip
    others = [gpurnn.Linear(2, 3, **options), gpurnn.Embedding(5, 2, **options), gpurnn.Dropout(0.1, **options),
              gpurnn.LayerNorm(2, **options)]  # fmt: skip
    assert all(getattr(layer, "takes_lengths", False) for layer in takers)
    assert not any(getattr(layer, "takes_lengths", False) for layer in others)
