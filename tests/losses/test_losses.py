"""Losses: values and gradients against PyTorch, masks against the valid part alone, and what must be refused."""

import inspect
import warnings

import numpy as np
import pytest
from helpers import assert_close
from optional import given, needs, optional

import gpurnn
from gpurnn.errors import DtypeError, ShapeError
from gpurnn.losses import binary_cross_entropy_with_logits, cross_entropy, huber, kl_div, mae, mse, smooth_l1
from gpurnn.testing import check_gradients

torch = optional("torch")
F = optional("torch.nn.functional")
st = optional("hypothesis.strategies")

ELEMENTWISE = [
    pytest.param(mse, "mse_loss", id="mse"),
    pytest.param(mae, "l1_loss", id="mae"),
    pytest.param(binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits", id="bce"),
    pytest.param(huber, "huber_loss", id="huber"),
    pytest.param(smooth_l1, "smooth_l1_loss", id="smooth_l1"),
    pytest.param(kl_div, "kl_div", id="kl_div"),
]
OURS = [mse, mae, binary_cross_entropy_with_logits, huber, smooth_l1, kl_div]
REDUCTIONS = ["mean", "sum", "none"]
T, B, V = 5, 3, 7


pytestmark = pytest.mark.usefixtures("code")


def batch(rng, dtype=np.float64, shape=(T, B)):
    return 3 * rng.standard_normal((*shape, V)).astype(dtype), rng.integers(0, V, shape)


def pair(rng, dtype=np.float64, shape=(T, B, 4)):
    return 2 * rng.standard_normal(shape).astype(dtype), rng.random(shape).astype(dtype)


def torch_cross_entropy(logits, targets, dloss, ignore_index=None, **options):
    x = torch.tensor(logits, requires_grad=True)
    flat = x.reshape(-1, logits.shape[-1])
    index = -100 if ignore_index is None else ignore_index
    loss = F.cross_entropy(flat, torch.tensor(targets).reshape(-1), ignore_index=index, **options)
    loss = loss.reshape(np.shape(dloss))
    loss.backward(torch.tensor(dloss, dtype=x.dtype))
    return loss.detach().numpy(), x.grad.numpy()


def torch_elementwise(function, x, y, dloss, **options):
    x = torch.tensor(x, requires_grad=True)
    with warnings.catch_warnings():  # of torch's kl_div: its "mean" is over elements, as ours is
        warnings.simplefilter("ignore", UserWarning)
        loss = getattr(F, function)(x, torch.tensor(y), **options)
    loss.backward(torch.tensor(dloss, dtype=x.dtype))
    return loss.detach().numpy(), x.grad.numpy()


def draw_dloss(rng, reduction, shape):
    return rng.standard_normal(shape) if reduction == "none" else 1.7


def close(ours, theirs):
    """Up to a rounding for each number that a mean over a batch adds up."""
    assert_close(ours, theirs, 2 * T * B * V)


def error(value, exact):
    return np.abs(np.asarray(value, np.float64) - exact).max()


# ---- parity with PyTorch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [None, 2, -100])
def test_cross_entropy_equals_torch(rng, block, reduction, smoothing, ignore_index):
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    logits, targets = batch(rng)
    if ignore_index == -100:
        targets[1:3, 1] = -100
    dloss = draw_dloss(rng, reduction, (T, B))
    loss, backward = cross_entropy(logits, targets, **options)
    expected, dexpected = torch_cross_entropy(logits, targets, dloss, **options)
    close(loss, expected)
    close(backward(dloss), dexpected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ours, theirs", ELEMENTWISE)
def test_elementwise_equals_torch(rng, block, ours, theirs, reduction):
    x, y = pair(rng)
    y[0, 0] = x[0, 0]  # the corner of the absolute error
    dloss = draw_dloss(rng, reduction, x.shape)
    loss, backward = ours(x, y, reduction=reduction)
    expected, dexpected = torch_elementwise(theirs, x, y, dloss, reduction=reduction)
    close(loss, expected)
    close(backward(dloss), dexpected)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_float32_is_as_exact_as_torch(rng, scale, smoothing):
    logits = (scale * rng.standard_normal((40, 8, 100))).astype(np.float32)
    targets = rng.integers(0, 100, (40, 8))
    exact, dexact = cross_entropy(logits.astype(np.float64), targets, reduction="sum", label_smoothing=smoothing)
    dexact = dexact()
    plain, dplain = torch_cross_entropy(logits, targets, 1.0, reduction="sum", label_smoothing=smoothing)
    loss, backward = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    assert loss.dtype == backward().dtype == np.float32
    assert error(loss, exact) <= max(2 * error(plain, exact), np.finfo(np.float32).eps * abs(exact))
    assert error(backward(), dexact) <= max(2 * error(dplain, dexact), np.finfo(np.float32).eps)


@pytest.mark.parametrize("ours, theirs", ELEMENTWISE)
def test_elementwise_float32_is_as_exact_as_torch(rng, ours, theirs):
    x, y = pair(rng, np.float32, (60, 8, 20))
    exact, dexact = ours(x.astype(np.float64), y.astype(np.float64), reduction="sum")
    dexact = dexact()
    plain, dplain = torch_elementwise(theirs, x, y, 1.0, reduction="sum")
    loss, backward = ours(x, y, reduction="sum")
    assert loss.dtype == backward().dtype == np.float32
    assert error(loss, exact) <= max(2 * error(plain, exact), np.finfo(np.float32).eps * abs(exact))
    assert error(backward(), dexact) <= max(2 * error(dplain, dexact), np.finfo(np.float32).eps)


def test_float32_sums_do_not_drift():
    prediction = np.full((1000, 300), 0.1, np.float32)
    loss, _ = mae(prediction, np.zeros_like(prediction), reduction="sum")
    assert float(loss) == np.float32(float(np.float32(0.1)) * prediction.size)


# ---- finite differences


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 1}, {"lengths": [5, 0, 2]}], ids=str)
def test_cross_entropy_finite_differences(rng, options):
    logits, targets = batch(rng)
    check_gradients(lambda x: cross_entropy(x, targets, **options), logits)


@pytest.mark.parametrize("function", OURS)
@pytest.mark.parametrize("options", [{}, {"lengths": [5, 0, 2]}], ids=str)
def test_elementwise_finite_differences(rng, function, options):
    x, y = pair(rng)
    check_gradients(lambda x: function(x, y, **options), x)


# ---- what counts


def padded_steps(lengths):
    return np.arange(T)[:, None] >= np.array(lengths)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e300])
def test_cross_entropy_padding_never_leaks(rng, block, reduction, rubbish):
    logits, targets = batch(rng)
    lengths = [2, 0, 5]
    padded = padded_steps(lengths)
    logits[padded], targets[padded] = rubbish, 10**12
    dloss = 1.7
    if reduction == "none":
        dloss = np.where(padded, np.nan, rng.standard_normal((T, B)))
    loss, backward = cross_entropy(logits, targets, lengths=lengths, reduction=reduction, label_smoothing=0.1)
    dlogits = backward(dloss)
    assert np.all(dlogits[padded] == 0)
    dvalid = dloss[~padded] if reduction == "none" else dloss
    valid, dexpected = torch_cross_entropy(
        logits[~padded], targets[~padded], dvalid, reduction=reduction, label_smoothing=0.1
    )
    close(dlogits[~padded], dexpected)
    if reduction == "none":
        assert np.all(loss[padded] == 0)
        loss = loss[~padded]
    close(loss, valid)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("ours, theirs", ELEMENTWISE)
def test_elementwise_padding_never_leaks(rng, block, ours, theirs, reduction, rubbish):
    x, y = pair(rng)
    lengths = [2, 0, 5]
    padded = padded_steps(lengths)
    x[padded], y[padded] = rubbish, -rubbish
    dloss = 1.7
    if reduction == "none":
        dloss = np.where(padded[..., None], np.nan, rng.standard_normal(x.shape))
    loss, backward = ours(x, y, lengths=lengths, reduction=reduction)
    dx = backward(dloss)
    assert np.all(dx[padded] == 0)
    dvalid = dloss[~padded] if reduction == "none" else dloss
    valid, dexpected = torch_elementwise(theirs, x[~padded], y[~padded], dvalid, reduction=reduction)
    close(dx[~padded], dexpected)
    if reduction == "none":
        assert np.all(loss[padded] == 0)
        loss = loss[~padded]
    close(loss, valid)


def both(function, *arguments, **options):
    loss, backward = function(*arguments, **options)
    return loss, backward()


def same(left, right):
    assert_close(left[0], right[0], 4)  # the same sum of the same numbers, over the same count
    assert_close(left[1], right[1], 4)


def cases(rng):
    logits, targets = batch(rng)
    return [(cross_entropy, logits, targets), *((function, *pair(rng)) for function in OURS)]


def test_mask_and_lengths_say_the_same(rng):
    lengths = [2, 0, 5]
    for function, x, y in cases(rng):
        expected = both(function, x, y, lengths=lengths)
        same(both(function, x, y, ~padded_steps(lengths)), expected)
        same(both(function, x, y, (~padded_steps(lengths)).tolist(), lengths=[5, 5, 5]), expected)
        same(both(function, x, y, np.ones((T, B), bool), lengths=np.array(lengths, np.int8)), expected)


def test_mask_and_lengths_combine(rng):
    mask = rng.random((T, B)) < 0.6
    steps = rng.random(T) < 0.6
    lengths = [4, 1, 5]
    within = ~padded_steps(lengths)
    for function, x, y in cases(rng):
        same(both(function, x, y, mask, lengths=lengths), both(function, x, y, mask & within))
        same(both(function, x, y, steps, lengths=lengths), both(function, x, y, steps[:, None] & within))
        same(both(function, x, y, steps), both(function, x, y, np.repeat(steps[:, None], B, axis=1)))
        same(both(function, x, y, np.array(True)), both(function, x, y))


@pytest.mark.parametrize("function", OURS)
def test_mask_of_single_features(rng, function):
    x, y = pair(rng)
    mask = rng.random(x.shape) < 0.5
    lengths = [5, 3, 0]
    loss, dx = both(function, x, y, mask, lengths=lengths)
    valid = mask & ~padded_steps(lengths)[..., None]
    expected, dexpected = both(function, x[valid], y[valid])
    close(loss, expected)
    close(dx[valid], dexpected)
    assert np.all(dx[~valid] == 0)


def test_batch_first_is_the_transpose(rng):
    mask = rng.random((T, B)) < 0.7
    for function, x, y in cases(rng):
        loss, dx = both(function, x, y, mask, lengths=[2, 4, 5])
        x, y = x.swapaxes(0, 1), y.swapaxes(0, 1)
        turned, dturned = both(function, x, y, mask.T, lengths=[2, 4, 5], batch_first=True)
        close(turned, loss)
        close(dturned.swapaxes(0, 1), dx)
        assert dturned.flags.c_contiguous


def test_ignored_and_masked_targets_combine(rng):
    logits, targets = batch(rng)
    mask = rng.random((T, B)) < 0.7
    same(
        both(cross_entropy, logits, targets, mask, ignore_index=3),
        both(cross_entropy, logits, targets, mask & (targets != 3)),
    )


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (2, 3, 2)])
def test_cross_entropy_any_leading_shape(rng, shape):
    logits, targets = batch(rng, shape=shape)
    loss, dlogits = both(cross_entropy, logits, targets)
    expected, dexpected = torch_cross_entropy(logits, targets, 1.0)
    close(loss, expected)
    close(dlogits, dexpected)
    assert cross_entropy(logits, targets, reduction="none")[0].shape == shape


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1, 1), (2, 3, 2, 2)])
@pytest.mark.parametrize("ours, theirs", ELEMENTWISE)
def test_elementwise_any_shape(rng, ours, theirs, shape):
    x, y = np.asarray(rng.standard_normal(shape)), np.asarray(rng.random(shape))
    loss, dx = both(ours, x, y)
    expected, dexpected = torch_elementwise(theirs, x, y, 1.0)
    close(loss, expected)
    close(dx, dexpected)
    assert ours(x, y, reduction="none")[0].shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{"lengths": [0, 0, 0]}, {"mask": np.zeros((T, B), bool)}], ids=["lengths", "mask"])
def test_nothing_counts(rng, reduction, options):
    for function, x, y in cases(rng):
        loss, dx = both(function, np.full_like(x, np.nan), y, reduction=reduction, **options)
        assert np.all(loss == 0)
        assert dx.shape == x.shape and np.all(dx == 0)
    logits, targets = batch(rng)
    loss, dlogits = both(cross_entropy, logits, np.full_like(targets, -1), reduction=reduction, ignore_index=-1)
    assert np.all(loss == 0) and np.all(dlogits == 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"lengths": []}, {"mask": np.zeros((T, 0), bool)}], ids=str)
def test_empty_batch(reduction, options):
    x = np.zeros((T, 0, V), np.float32)
    for function, y in ((cross_entropy, np.zeros((T, 0), int)), *((function, x) for function in OURS)):
        loss, dx = both(function, x, y, reduction=reduction, **options)
        assert loss.shape == (() if reduction == "mean" or reduction == "sum" else y.shape)
        assert np.all(loss == 0) and loss.dtype == np.float32
        assert dx.shape == x.shape


@pytest.mark.long
@given(lambda: st.data(), max_examples=40)
def test_ragged_batches_equal_their_valid_parts(data):
    steps, size, classes = (data.draw(st.integers(1, high)) for high in (6, 4, 5))
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=size, max_size=size))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits, targets = rng.standard_normal((steps, size, classes)), rng.integers(0, classes, (steps, size))
    valid = np.arange(steps)[:, None] < np.array(lengths)
    logits[~valid], targets[~valid] = np.nan, -1
    y = rng.random(logits.shape)
    for function, second in ((cross_entropy, targets), (mse, y), (binary_cross_entropy_with_logits, y)):
        loss, dx = both(function, logits, second, lengths=lengths)
        expected, dexpected = both(function, logits[valid], second[valid])
        close(loss, expected)
        close(dx[valid], dexpected)
        assert np.all(dx[~valid] == 0)


# ---- numbers at the edge


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_extreme_logits(dtype):
    logits = np.array([[1e4, -1e4, 0], [1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e30, -1e30, 0]], dtype)
    targets = np.array([0, 1, 2, 0])
    loss, backward = cross_entropy(logits, targets, reduction="none")
    np.testing.assert_allclose(loss, np.array([0, 2e4, np.log(3), 0], dtype), rtol=1e-7)
    third = 1 / 3
    expected = [[0, 0, 0], [1, -1, 0], [third, third, third - 1], [0, 0, 0]]
    assert_close(backward(), np.array(expected, dtype), 3, dtype=np.dtype(dtype).name)


def test_cross_entropy_forbidden_classes():
    """A logit of -inf is a class of probability 0."""
    logits = np.array([[0.3, -np.inf, 0.1], [0.3, -np.inf, 0.1]])
    loss, backward = cross_entropy(logits, np.array([0, 1]), reduction="none")
    open_loss, dopen = cross_entropy(logits[:1, ::2], np.array([0]), reduction="none")
    close(loss[0], open_loss[0])
    close(backward()[0, ::2], dopen()[0])
    assert loss[1] == np.inf
    assert backward()[0, 1] == 0


def test_large_logits_keep_their_float32_probabilities():
    """A shift of all logits, exact in float32, changes no gradient: the log of the sum is not rounded to float32."""
    logits = np.array([[0.5, 1.25, -0.75]], np.float32)
    _, near = cross_entropy(logits, np.array([0]))
    _, far = cross_entropy(logits + np.float32(2**20), np.array([0]))
    np.testing.assert_array_equal(near(), far())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_cross_entropy_extreme_logits(dtype):
    x, y = np.array([1e4, -1e4, 1e4, -1e4, 1e30], dtype), np.array([1, 1, 0, 0, 1], dtype)
    loss, backward = binary_cross_entropy_with_logits(x, y, reduction="none")
    np.testing.assert_array_equal(loss, np.array([0, 1e4, 1e4, 0, 0], dtype))
    np.testing.assert_array_equal(backward(), np.array([0, -1, 1, 0, 0], dtype))


def test_small_probabilities_keep_their_digits():
    loss, backward = binary_cross_entropy_with_logits(np.array([-100.0]), np.array([0.0]))
    close(float(loss) / np.exp(-100.0), 1.0)
    close(float(backward()[0]) / np.exp(-100.0), 1.0)


def test_a_loss_that_is_not_finite_says_so_by_its_value():
    big, rubbish = np.full((2, 1, 2), 3e38, np.float32), np.array([[[np.nan, np.inf]], [[np.inf, 0.0]]], np.float32)
    assert both(mse, big, -big)[0] == np.inf
    for function in OURS:
        loss, dx = both(function, rubbish, np.full_like(rubbish, np.inf))
        assert not np.isfinite(loss) and dx.shape == rubbish.shape
    assert np.isnan(both(cross_entropy, rubbish, np.zeros((2, 1), int))[0])


# ---- backward


def test_backward_returns_fresh_arrays_and_changes_nothing(rng):
    for function, x, y in cases(rng):
        x_before, y_before = x.copy(), y.copy()
        _, backward = function(x, y, lengths=[1, 5, 3])
        first = backward()
        expected = first.copy()
        first.fill(np.nan)
        np.testing.assert_array_equal(backward(), expected)
        close(backward(-2.5), -2.5 * expected)
        np.testing.assert_array_equal(x, x_before)
        np.testing.assert_array_equal(y, y_before)


def test_backward_takes_numbers_and_arrays(rng):
    for function, x, y in cases(rng):
        _, backward = function(x, y)
        np.testing.assert_array_equal(backward(np.float32(2)), backward(2))
        np.testing.assert_array_equal(backward(np.array(2.0)), backward(2))
        loss, backward = function(x, y, reduction="none")
        np.testing.assert_array_equal(backward(), backward(np.ones_like(loss)))
        _, dsum = both(function, x, y, reduction="sum")
        np.testing.assert_array_equal(backward(), dsum)


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_backward_takes_gradients_of_the_arrays_dtype(rng, dtype):
    dtype = gpurnn.dtypes.check_dtype(dtype)
    for function, x, y in cases(rng):
        x, y = (array.astype(dtype) if array.dtype.kind == "f" else array for array in (x, y))
        loss, backward = function(x, y, reduction="none")
        dloss = rng.standard_normal(loss.shape).astype(dtype)
        np.testing.assert_array_equal(backward(dloss), backward(dloss.astype("float32")))
        assert backward(dloss).dtype == dtype
        _, backward = function(x, y)
        np.testing.assert_array_equal(backward(dtype.type(2)), backward(2))


def test_backward_refuses_wrong_dloss(rng):
    for function, x, y in cases(rng):
        _, backward = function(x, y)
        with pytest.raises(ShapeError, match=r"dloss: expected shape \(\), got \(1,\)"):
            backward(np.ones(1))
        with pytest.raises(DtypeError, match="dloss: expected numbers, got bool"):
            backward(True)
        _, backward = function(x, y, reduction="none")
        with pytest.raises(ShapeError, match=r"dloss: expected shape \(5, 3.*got \(3, 5\)"):
            backward(np.ones((B, T)))


# ---- arguments


def test_lists_and_torch_tensors_are_arrays(rng):
    logits, targets = batch(rng)
    mask = rng.random((T, B)) < 0.5
    expected = both(cross_entropy, logits, targets, mask)
    same(both(cross_entropy, logits.tolist(), targets.tolist(), mask.tolist()), expected)
    x = torch.tensor(logits)
    same(both(cross_entropy, x, torch.tensor(targets), torch.tensor(mask)), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64])
def test_any_integer_targets(rng, dtype):
    logits, targets = batch(rng)
    expected = both(cross_entropy, logits, targets, ignore_index=-100)
    same(both(cross_entropy, logits, targets.astype(dtype), ignore_index=-100), expected)


@pytest.mark.parametrize("wrong", [-1, V, 10**12])
def test_cross_entropy_refuses_targets_out_of_range(rng, wrong):
    logits, targets = batch(rng)
    targets[3, 1] = wrong
    with pytest.raises(ValueError, match=rf"targets: expected classes from 0 to 6 .*got {wrong};"):
        cross_entropy(logits, targets)
    cross_entropy(logits, targets, ignore_index=wrong)
    cross_entropy(logits, targets, lengths=[5, 3, 5])


@pytest.mark.parametrize("targets", [np.zeros((T, B)), np.zeros((T, B), bool)], ids=["float", "bool"])
def test_cross_entropy_refuses_targets_that_are_no_classes(targets):
    with pytest.raises(DtypeError, match="targets: expected integers"):
        cross_entropy(np.zeros((T, B, V)), targets)


def test_cross_entropy_refuses_wrong_shapes():
    logits, targets = np.zeros((T, B, V)), np.zeros((T, B), int)
    with pytest.raises(ShapeError, match=r"targets: expected shape \(5, 3\), got \(3, 5\)"):
        cross_entropy(logits, targets.T)
    with pytest.raises(ShapeError, match=r"targets: expected shape \(5, 3\), got \(5, 3, 7\)"):
        cross_entropy(logits, logits.astype(int))
    with pytest.raises(ShapeError, match=r"logits: expected shape \(\.\.\., V\), got \(\)"):
        cross_entropy(np.array(1.0), np.array(0))


def test_cross_entropy_refuses_wrong_options():
    logits, targets = np.zeros((T, B, V)), np.zeros((T, B), int)
    for smoothing in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="label_smoothing"):
            cross_entropy(logits, targets, label_smoothing=smoothing)
    with pytest.raises(TypeError, match="ignore_index should be an int, got float"):
        cross_entropy(logits, targets, ignore_index=1.0)


@pytest.mark.parametrize("function", OURS)
def test_elementwise_refuses_unequal_arguments(function):
    first, second = list(inspect.signature(function).parameters)[:2]
    x = np.zeros((T, B, 4))
    with pytest.raises(ShapeError, match=rf"{second}: expected shape \(5, 3, 4\), got \(5, 3\)"):
        function(x, x[..., 0])
    with pytest.raises(DtypeError, match=rf"{second}: dtype \(float32\) does not match that of {first} \(float64\)"):
        function(x, x.astype(np.float32))
    with pytest.raises(DtypeError, match=f"{first}: expected float32, float64, float16, bfloat16, got int64"):
        function(x.astype(int), x.astype(int))


@pytest.mark.parametrize("function", [cross_entropy, *OURS])
def test_all_refuse_wrong_masks(function):
    x = np.zeros((T, B, V))
    y = np.zeros((T, B), int) if function is cross_entropy else x
    with pytest.raises(DtypeError, match="expected float32, float64, float16, bfloat16, got complex128"):
        function(x.astype(complex), y)
    with pytest.raises(DtypeError, match="mask: expected booleans, got float64"):
        function(x, y, np.ones((T, B)))
    with pytest.raises(ShapeError, match=r"mask: expected the leading axes of .*got \(3, 5\)"):
        function(x, y, np.ones((B, T), bool))
    with pytest.raises(ShapeError, match=r"mask: expected the leading axes of .*got \(5, 3, 7, 1\)"):
        function(x, y, np.ones((T, B, V, 1), bool))
    with pytest.raises(ShapeError, match="lengths: expected lengths from 0 to 5"):
        function(x, y, lengths=[6, 1, 1])
    with pytest.raises(ShapeError, match="lengths: expected one length for each of the 5 sequences"):
        function(x, y, lengths=[1, 1, 1], batch_first=True)
    with pytest.raises(DtypeError, match="lengths: expected integers"):
        function(x, y, lengths=[1.0, 1.0, 1.0])
    flat = (x[:, 0, :], y[:, 0]) if function is cross_entropy else (x[:, 0, 0], y[:, 0, 0])
    with pytest.raises(ShapeError, match="lengths: expected steps and sequences"):
        function(*flat, lengths=[1])
    with pytest.raises(ValueError, match="reduction should be one of 'mean', 'sum', 'none', got 'avg'"):
        function(x, y, reduction="avg")


@pytest.mark.parametrize("function", [cross_entropy, *OURS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_arrays_are_computed_in_float32(function, dtype):
    dtype = gpurnn.dtypes.check_dtype(dtype)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(T, B, V)).astype(dtype)
    y = draw.integers(0, V, (T, B)) if function is cross_entropy else draw.random((T, B, V)).astype(dtype)
    loss, backward = function(x, y)
    expected, plain_backward = function(x.astype("float32"), y if function is cross_entropy else y.astype("float32"))
    assert loss == expected and loss.dtype == np.float32
    assert backward().dtype == dtype
    np.testing.assert_array_equal(backward(), plain_backward().astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_goes_where_it_is_told(masked, dtype):
    dtype = gpurnn.dtypes.check_dtype(dtype)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(T, B, V)).astype(dtype), draw.integers(0, V, (T, B))
    mask = draw.random((T, B)) < 0.5 if masked else None
    loss, backward = cross_entropy(x, y, mask, label_smoothing=0.1)
    expected = backward(2.0)
    strided = np.full((T, B, 2 * V), np.nan).astype(dtype)[..., ::2]
    for out in (np.full_like(x, np.nan), strided, x):  # the logits themselves last: they are spent
        assert backward(2.0, out) is out
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(DtypeError, match="out: expected an array of"):
        backward(1.0, x.astype(np.float16))
    with pytest.raises(ShapeError, match="out: expected shape"):
        backward(1.0, x[:1])
