"""Class weights, probabilities as targets, and the other losses of the kit: parity with PyTorch, masks, refusals."""

import warnings

import numpy as np
import pytest
from helpers import assert_close
from optional import needs, optional

import gpurnn
from gpurnn import DtypeError, ShapeError, cross_entropy, huber, kl_div, mae, nll_loss, quantile_loss, smooth_l1
from gpurnn.dtypes import EPSILON, check_dtype
from gpurnn.testing import check_gradients

torch = optional("torch")
F = optional("torch.nn.functional")

REDUCTIONS = ["mean", "sum", "none"]
T, B, V = 5, 3, 7
LENGTHS = [2, 0, 5]
PADDED = np.arange(T)[:, None] >= np.array(LENGTHS)
WEIGHT = np.array([0.5, 0.0, 2.0, 1.0, 3.0, 0.25, 1.5])
LEVELS = [0.1, 0.5, 0.75]


pytestmark = pytest.mark.usefixtures("code")


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def close(ours, theirs):
    """Up to a rounding for each number that a mean over a batch adds up."""
    assert_close(ours, theirs, 2 * T * B * V)


def by_torch(function, x, *others, dloss=1.0, dtype=None, **options):
    """Loss and gradient of a function of torch. x: (N, V), as torch has no leading axes for classes."""
    dtype = dtype or torch.float64
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    given = [torch.tensor(other, dtype=dtype if other.dtype.kind == "f" else None) for other in others]
    options = {key: torch.tensor(v, dtype=dtype) if isinstance(v, np.ndarray) else v for key, v in options.items()}
    with warnings.catch_warnings():  # of kl_div: its "mean" is over elements, as ours is
        warnings.simplefilter("ignore", UserWarning)
        loss = function(x, *given, **options)
    loss.backward(torch.tensor(dloss, dtype=dtype))
    return loss.detach().numpy(), x.grad.numpy()


def pinball(x, y, reduction="mean"):
    """The quantile loss in torch's operations."""
    q, e = torch.tensor(LEVELS, dtype=x.dtype), y[..., None] - x
    loss = torch.maximum(q * e, (q - 1) * e)
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def draw(kind, rng, shape=(T, B)):
    """(our function, torch's, first argument, second) of each loss here."""
    logits, targets = 3 * rng.standard_normal((*shape, V)), rng.integers(0, V, shape)
    log_probs, probabilities = np.log(softmax(logits)), softmax(rng.standard_normal((*shape, V)))
    return {
        "weights": (cross_entropy, F.cross_entropy, logits, targets),
        "probabilities": (cross_entropy, F.cross_entropy, logits, probabilities),
        "nll": (nll_loss, F.nll_loss, log_probs, targets),
        "huber": (huber, F.huber_loss, logits, probabilities),
        "smooth_l1": (smooth_l1, F.smooth_l1_loss, logits, probabilities),
        "kl": (kl_div, F.kl_div, log_probs, probabilities),
        "quantiles": (
            lambda x, y, *mask, **options: quantile_loss(x, y, LEVELS, *mask, **options),
            pinball,
            logits[..., :3],
            probabilities[..., 0],
        ),
    }[kind]


KINDS = ["weights", "probabilities", "nll", "huber", "smooth_l1", "kl", "quantiles"]
CASES = [
    ("weights", {"weight": WEIGHT}),
    ("weights", {"weight": WEIGHT, "label_smoothing": 0.1}),
    ("weights", {"weight": WEIGHT, "label_smoothing": 1.0}),
    ("weights", {"weight": WEIGHT, "ignore_index": 2}),
    ("weights", {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": 2}),
    ("probabilities", {}),
    ("probabilities", {"label_smoothing": 0.1}),
    ("probabilities", {"weight": WEIGHT}),
    ("probabilities", {"weight": WEIGHT, "label_smoothing": 0.3}),
    ("nll", {}),
    ("nll", {"weight": WEIGHT}),
    ("nll", {"weight": WEIGHT, "ignore_index": 2}),
    ("huber", {}),
    ("huber", {"delta": 0.3}),
    ("huber", {"delta": 20.0}),
    ("smooth_l1", {}),
    ("smooth_l1", {"beta": 0.3}),
    ("smooth_l1", {"beta": 0.0}),
    ("kl", {}),
    ("kl", {"log_target": True}),
    ("quantiles", {}),
]
each_case = pytest.mark.parametrize("kind, options", CASES, ids=str)


def inputs(kind, options, rng):
    ours, theirs, x, y = draw(kind, rng)
    return ours, theirs, x, np.log(y) if options.get("log_target") else y


def draw_dloss(rng, reduction, loss):
    return rng.standard_normal(loss.shape) if reduction == "none" else 1.7


# ---- parity with PyTorch


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ragged", [False, True])
@each_case
def test_equal_to_torch(rng, block, kind, options, ragged, reduction):
    """Of a ragged batch: its valid part alone. NaN stands in the padding, in the gradients from behind, too."""
    ours, theirs, x, y = inputs(kind, options, rng)
    valid = ~PADDED if ragged else np.ones((T, B), bool)
    x[~valid] = np.nan
    y[~valid] = np.nan if y.dtype.kind == "f" else 10**12
    loss, backward = ours(x, y, lengths=LENGTHS if ragged else None, reduction=reduction, **options)
    dloss = draw_dloss(rng, reduction, loss)
    of_valid = dloss
    if reduction == "none":
        of_valid = dloss[valid]
        dloss[~valid] = np.nan
        assert np.all(loss[~valid] == 0)
        loss = loss[valid]
    expected, dexpected = by_torch(theirs, x[valid], y[valid], dloss=of_valid, reduction=reduction, **options)
    dx = backward(dloss)
    close(loss, expected)
    close(dx[valid], dexpected)
    assert np.all(dx[~valid] == 0)


@each_case
def test_float32_is_as_exact_as_torch(rng, kind, options):
    ours, theirs, x, y = draw(kind, rng, (40, 8))
    y = np.log(y) if options.get("log_target") else y
    x, y = (array.astype(np.float32) if array.dtype.kind == "f" else array for array in (x, y))
    whole, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, *y.shape[2:])
    exact, dexact = by_torch(theirs, whole, flat_y, reduction="sum", **options)
    plain, dplain = by_torch(theirs, whole, flat_y, dtype=torch.float32, reduction="sum", **options)
    loss, backward = ours(x, y, reduction="sum", **options)
    dx = backward().reshape(dexact.shape)
    assert loss.dtype == dx.dtype == np.float32
    eps, error = np.finfo(np.float32).eps, lambda value, right: np.abs(value - right).max()
    assert error(loss, exact) <= max(2 * error(plain, exact), eps * abs(exact))
    assert error(dx, dexact) <= max(2 * error(dplain, dexact), eps * max(1, np.abs(dexact).max()))


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_case
def test_16_bit_arrays_are_computed_in_float32(rng, kind, options, dtype):
    ours, _, x, y = inputs(kind, options, rng)
    dtype = gpurnn.dtypes.check_dtype(dtype)
    x, y = (array.astype(dtype) if array.dtype.kind == "f" else array for array in (x, y))
    plain = [array.astype("float32") if gpurnn.dtypes.is_float(array.dtype) else array for array in (x, y)]
    loss, backward = ours(x, y, lengths=LENGTHS, **options)
    expected, plain_backward = ours(*plain, lengths=LENGTHS, **options)
    assert loss == expected and loss.dtype == np.float32 and backward().dtype == dtype
    np.testing.assert_array_equal(backward(), plain_backward().astype(dtype))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
@each_case
def test_finite_differences(rng, kind, options, lengths):
    ours, _, x, y = inputs(kind, options, rng)
    check_gradients(lambda x: ours(x, y, lengths=lengths, **options), x)


# ---- what counts


@each_case
def test_masks_lengths_and_axes_say_the_same(rng, kind, options):
    ours, _, x, y = inputs(kind, options, rng)
    mask = rng.random((T, B)) < 0.6

    def both(x, y, *mask, **places):
        loss, backward = ours(x, y, *mask, **places, **options)
        return loss, backward()

    loss, dx = both(x, y, mask, lengths=LENGTHS)
    again, dagain = both(x, y, mask & ~PADDED)
    close(loss, again)
    close(dx, dagain)
    turned, dturned = both(x.swapaxes(0, 1), y.swapaxes(0, 1), mask.T, lengths=LENGTHS, batch_first=True)
    close(turned, loss)
    close(dturned.swapaxes(0, 1), dx)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_case
def test_nothing_counts(rng, kind, options, reduction):
    ours, _, x, y = inputs(kind, options, rng)
    for x_part, y_part, lengths in ((np.full_like(x, np.nan), y, [0] * B), (x[:, :0], y[:, :0], [])):
        loss, backward = ours(x_part, y_part, lengths=lengths, reduction=reduction, **options)
        assert np.all(loss == 0) and np.all(backward() == 0) and backward().shape == x_part.shape


def test_only_classes_of_weight_zero():
    """The mean over nothing is 0, not NaN as in torch."""
    for function in (cross_entropy, nll_loss):
        loss, backward = function(np.zeros((4, V)), np.ones(4, int), weight=WEIGHT)
        assert loss == 0 and not backward().any()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (2, 3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_leading_shape(rng, kind, shape):
    ours, theirs, x, y = draw(kind, rng, shape)
    loss, backward = ours(x, y)
    classes = kind in ("weights", "probabilities", "nll")
    flat_x, flat_y = (x.reshape(-1, V), y.reshape(-1, *y.shape[len(shape) :])) if classes else (x, y)
    expected, dexpected = by_torch(theirs, flat_x, flat_y)
    close(loss, expected)
    close(backward(), dexpected.reshape(x.shape))


@pytest.mark.parametrize("options", [{"lengths": LENGTHS}, {"mask": ~PADDED}, {}], ids=["lengths", "mask", "all"])
def test_quantiles_of_several_features(rng, options):
    x, y = rng.standard_normal((T, B, 4, 3)), rng.standard_normal((T, B, 4))
    valid = np.ones((T, B), bool) if not options else ~PADDED
    x[~valid] = y[~valid] = np.nan
    loss, backward = quantile_loss(x, y, LEVELS, **options)
    expected, dexpected = by_torch(pinball, x[valid], y[valid])
    close(loss, expected)
    close(backward()[valid], dexpected)
    features = rng.random((T, B, 4)) < 0.5
    loss, backward = quantile_loss(x, y, LEVELS, features & valid[..., None], reduction="none")
    assert loss.shape == x.shape and not loss[~features].any() and not backward()[~features].any()


# ---- numbers at the edge


def test_probabilities_equal_to_one_are_classes(rng):
    logits, targets = draw("weights", rng)[2:]
    for options in ({}, {"label_smoothing": 0.2}):
        loss, backward = cross_entropy(logits, targets, **options)
        soft, soft_backward = cross_entropy(logits, np.eye(V)[targets], **options)
        close(soft, loss)
        close(soft_backward(), backward())


def test_forbidden_classes_have_no_probability():
    """A logit of -inf, or a log-probability: where the target is 0, it adds nothing."""
    x, y = np.array([[0.3, -np.inf, 0.1]]), np.array([[0.25, 0.0, 0.75]])
    loss, backward = cross_entropy(x, y)
    expected, dexpected = cross_entropy(x[:, ::2], y[:, ::2])
    close(loss, expected)
    close(backward()[:, ::2], dexpected())
    assert backward()[0, 1] == 0
    assert kl_div(x, y, reduction="none")[0][0, 1] == 0
    assert kl_div(x, np.array([[0.0, -np.inf, 0.0]]), log_target=True, reduction="none")[0][0, 1] == 0
    assert cross_entropy(x, np.array([[0.0, 1.0, 0.0]]))[0] == np.inf


def test_extreme_logits_of_probabilities():
    logits, targets = np.array([[1e4, -1e4, 0], [1e30, -1e30, 0]]), np.array([[0, 1, 0], [1, 0, 0]], float)
    loss, backward = cross_entropy(logits, targets, reduction="none")
    np.testing.assert_array_equal(loss, [2e4, 0])
    np.testing.assert_array_equal(backward(), [[1, -1, 0], [0, 0, 0]])


def test_corners():
    """Where both arguments are equal the gradients are 0; delta and beta themselves lie where torch has them."""
    x = np.array([0.0, 0.5, -0.5, 2.0])
    for function, options in ((huber, {"delta": 0.5}), (smooth_l1, {"beta": 0.5}), (smooth_l1, {"beta": 0.0})):
        loss, backward = function(x, np.zeros(4), reduction="none", **options)
        assert backward()[0] == loss[0] == 0
    loss, backward = quantile_loss(np.zeros((1, 3)), np.zeros(1), LEVELS, reduction="none")
    assert not loss.any() and not backward().any()


@pytest.mark.parametrize("kind", ["huber", "smooth_l1", "kl", "quantiles", "weights", "probabilities"])
def test_nan_is_not_hidden(rng, kind):
    ours, _, x, y = draw(kind, rng)
    x[0, 0, 0] = np.nan
    loss, backward = ours(x, y)
    assert np.isnan(loss)
    assert np.isnan(backward()[0, 0, 0]) or kind == "kl"  # whose gradient does not depend on x


def test_half_the_absolute_error(rng):
    x, y = rng.standard_normal((2, T, B))
    loss, backward = quantile_loss(x[..., None], y, [0.5])
    expected, dexpected = mae(x, y)
    close(loss, expected / 2)
    close(backward()[..., 0], dexpected() / 2)


# ---- backward


@each_case
def test_backward_returns_fresh_arrays_and_changes_nothing(rng, kind, options):
    ours, _, x, y = inputs(kind, options, rng)
    before = x.copy(), y.copy()
    _, backward = ours(x, y, lengths=[1, 5, 3], **options)
    expected = backward().copy()
    backward().fill(np.nan)
    np.testing.assert_array_equal(backward(), expected)
    close(backward(-2.5), -2.5 * expected)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind, options", [case for case in CASES if case[0] in ("weights", "probabilities")], ids=str)
def test_the_gradient_goes_where_it_is_told(rng, kind, options, masked):
    _, _, x, y = inputs(kind, options, rng)
    mask = rng.random((T, B)) < 0.5 if masked else None
    _, backward = cross_entropy(x, y, mask, **options)
    expected = backward(2.0)
    strided = np.full((T, B, 2 * V), np.nan)[..., ::2]
    for out in (np.full_like(x, np.nan), strided, x):  # the logits themselves last: they are spent
        assert backward(2.0, out) is out
        np.testing.assert_array_equal(out, expected)


# ---- arguments


@pytest.mark.parametrize("function", [cross_entropy, nll_loss])
def test_wrong_weights_are_refused(function):
    x, y = np.zeros((T, B, V)), np.zeros((T, B), int)
    with pytest.raises(ShapeError, match=r"weight: expected shape \(7,\), got \(6,\)"):
        function(x, y, weight=np.ones(6))
    with pytest.raises(DtypeError, match="weight: expected numbers, got bool"):
        function(x, y, weight=np.ones(V, bool))
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="weight: expected finite numbers of at least 0, got"):
            function(x, y, weight=[1, 1, 1, wrong, 1, 1, 1])


def test_wrong_probabilities_are_refused():
    x = np.zeros((T, B, V))
    with pytest.raises(ShapeError, match=r"targets: expected shape \(5, 3, 7\), got \(5, 3, 6\)"):
        cross_entropy(x, np.zeros((T, B, 6)))
    with pytest.raises(DtypeError, match=r"targets: dtype \(float32\) does not match that of logits \(float64\)"):
        cross_entropy(x, np.zeros((T, B, V), "float32"))
    with pytest.raises(ValueError, match="ignore_index: targets that are probabilities have no class to ignore, got 2"):
        cross_entropy(x, x, ignore_index=2)
    with pytest.raises(DtypeError, match="logits: expected float32"):
        cross_entropy(x.astype(int), x)
    with pytest.raises(DtypeError, match="targets: expected integers"):
        cross_entropy(x, x[..., 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_what_a_softmax_rounds_is_a_distribution(rng, dtype):
    """A softmax computed in the dtype itself passes, of few classes and of many; twice the allowed error does not."""
    dtype = check_dtype(dtype)
    for V in (1, 2, 7, 1000):
        logits = rng.standard_normal((50, V)).astype(dtype)
        powers = np.exp(logits)
        total = np.zeros((50, 1), dtype)
        for column in powers.T:  # the worst order
            total += column[:, None]
        cross_entropy(logits, powers / total)
    stored = softmax(rng.standard_normal((50, 1000))).astype(check_dtype("bfloat16")).astype(dtype)
    cross_entropy(np.zeros((50, 1000), dtype), stored)
    targets = np.zeros((2, 3), dtype)
    targets[:, 0] = 1
    cross_entropy(np.zeros((2, 3), dtype), targets)
    targets[1, 0] += 2 * ((3 + 8) * EPSILON[dtype.name] + EPSILON["bfloat16"])
    with pytest.raises(ValueError, match="targets: expected probabilities of all 3 classes .* got a sum of 1.[01]"):
        cross_entropy(np.zeros((2, 3), dtype), targets)
    targets[1] = 5  # where no target counts there may be anything
    cross_entropy(np.zeros((2, 3), dtype), targets, np.array([True, False]))


def test_wrong_options_are_refused():
    x = np.zeros((T, B, 3))
    for delta in (0, -1, np.inf):
        with pytest.raises(ValueError, match="delta should be a finite number"):
            huber(x, x, delta=delta)
    with pytest.raises(ValueError, match="beta should be a finite number"):
        smooth_l1(x, x, beta=-1)
    with pytest.raises(TypeError, match="log_target should be True or False"):
        kl_div(x, x, log_target=1)
    with pytest.raises(ShapeError, match=r"prediction: expected shape \(\.\.\., 2\), one number for each of the quan"):
        quantile_loss(x, x[..., 0], [0.1, 0.9])
    with pytest.raises(ShapeError, match=r"target: expected shape \(5, 3\), got \(5, 3, 3\)"):
        quantile_loss(x, x, LEVELS)
    for wrong in (0.5, [], [[0.1]]):
        with pytest.raises(ShapeError, match="quantiles: expected a list of numbers"):
            quantile_loss(x, x[..., 0], wrong)
    with pytest.raises(ValueError, match=r"quantiles\[1\] should be a finite number in \(0, 1\), got 1.0"):
        quantile_loss(x, x[..., 0], [0.1, 1.0, 0.5])
    with pytest.raises(ShapeError, match=r"mask: expected the leading axes of \(5, 3\)"):
        quantile_loss(x, x[..., 0], LEVELS, np.ones((T, B, 3), bool))
