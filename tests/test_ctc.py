"""CTC: loss and gradient against PyTorch and against all paths one by one; decoders against all label sequences."""

import itertools
import math

import numpy as np
import pytest
from helpers import assert_close
from optional import optional

import gpurnn
from gpurnn.ctc import ctc_beam_search, ctc_greedy, ctc_loss
from gpurnn.errors import DtypeError, ShapeError

torch = optional("torch")
F = optional("torch.nn.functional")

REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def draw(rng, T=None, B=None, V=None, S=None):
    """A batch with everything that may come: (logits, targets (B, S), options); lengths of 0 and too long targets."""
    T, B = T or rng.integers(1, 12), B or rng.integers(1, 5)
    V, S = V or rng.integers(2, 6), rng.integers(0, 7) if S is None else S
    blank = int(rng.integers(V))
    logits = rng.standard_normal((T, B, V)) * rng.choice([1, 10])
    targets = rng.integers(0, V - 1, (B, S))
    targets += targets >= blank
    lengths, target_lengths = rng.integers(0, T + 1, B), rng.integers(0, S + 1, B)
    return logits, targets, {"lengths": lengths, "target_lengths": target_lengths, "blank": blank}


def torch_ctc(logits, targets, dloss, lengths, target_lengths, **options):
    x = torch.tensor(logits, requires_grad=True)
    lengths, target_lengths = torch.tensor(lengths), torch.tensor(target_lengths)
    loss = F.ctc_loss(F.log_softmax(x, 2), torch.tensor(targets), lengths, target_lengths, **options)
    loss.backward(torch.tensor(dloss, dtype=x.dtype))
    return loss.detach().numpy(), x.grad.numpy()


def collapse(path, blank):
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def all_sequences(logits, blank):
    """Label sequence -> probability, summed over every path of logits (T, V)."""
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    totals = {}
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        labels = collapse(path, blank)
        totals[labels] = totals.get(labels, 0) + math.prod(p[t, label] for t, label in enumerate(path))
    return totals


# ---- loss and gradient


@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch(reduction, zero_infinity):
    impossible = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        logits, targets, options = draw(rng)
        options |= {"reduction": reduction, "zero_infinity": zero_infinity}
        dloss = rng.standard_normal(logits.shape[1]) if reduction == "none" else 1.7
        expected, dexpected = torch_ctc(logits, targets, dloss, **options)
        loss, backward = ctc_loss(logits, targets, **options)
        dlogits = backward(dloss)
        assert_close(loss, expected, 2 * logits.size)
        # where a target does not fit PyTorch's gradient is nan, ours zero
        unfit = np.isnan(dexpected).any(axis=(0, 2))
        impossible += unfit.sum()
        assert np.all(dlogits[:, unfit] == 0)
        assert_close(dlogits[:, ~unfit], dexpected[:, ~unfit], 2 * logits.size)
    assert zero_infinity or impossible > 10


@pytest.mark.parametrize("blank", [0, 2])
def test_equals_the_sum_over_all_paths(rng, blank):
    logits = 2 * rng.standard_normal((4, 1, 3))
    for labels, p in all_sequences(logits[:, 0], blank).items():
        loss, _ = ctc_loss(logits, [labels], blank=blank, reduction="sum")
        assert float(loss) == pytest.approx(-math.log(p), abs=1e-12)


def test_finite_differences(rng):
    logits = rng.standard_normal((9, 3, 5))
    targets, options = [[1, 1, 2], [], [4, 3, 4, 2]], {"lengths": [7, 3, 9]}
    _, backward = ctc_loss(logits, targets, **options)
    direction, step = rng.standard_normal(logits.shape), 1e-6
    plus, minus = (float(ctc_loss(logits + s * direction, targets, **options)[0]) for s in (step, -step))
    exact = (backward() * direction).sum()
    assert abs((plus - minus) / (2 * step) - exact) < 1e-6 * abs(exact)


def test_float32_is_as_exact_as_torch(rng):
    logits = (5 * rng.standard_normal((200, 4, 20))).astype(np.float32)
    targets, options = rng.integers(1, 20, (4, 30)), {"lengths": [200, 150, 61, 90], "reduction": "sum"}
    options["target_lengths"] = [30, 10, 30, 1]
    exact, backward = ctc_loss(logits.astype(np.float64), targets, **options)
    dexact = backward()
    plain, dplain = torch_ctc(logits, targets, 1.0, **options)
    loss, backward = ctc_loss(logits, targets, **options)
    assert loss.dtype == backward().dtype == np.float32
    eps = np.finfo(np.float32).eps
    assert abs(loss - exact) <= max(2 * abs(plain - exact), eps * abs(exact))
    assert np.abs(backward() - dexact).max() <= max(2 * np.abs(dplain - dexact).max(), eps)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_computed_in_float32(rng, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    logits = rng.standard_normal((10, 2, 5)).astype(dtype)
    targets = [[1, 2, 2], [3]]
    loss, backward = ctc_loss(logits, targets)
    exact, dexact = ctc_loss(logits.astype(np.float32), targets)
    assert loss.dtype == np.float32 and loss == exact
    assert backward().dtype == logits.dtype
    assert np.array_equal(backward(), dexact().astype(dtype))


def test_the_three_forms_of_targets_are_one(rng):
    logits = rng.standard_normal((9, 3, 5))
    as_list = [[1, 1, 2], [], [4, 3, 4, 2]]
    padded = np.array([[1, 1, 2, 99], [-5, -5, 0, 0], [4, 3, 4, 2]])
    joined = np.array([1, 1, 2, 4, 3, 4, 2])
    expected, dexpected = ctc_loss(logits, as_list)
    for targets in (padded, joined):
        loss, backward = ctc_loss(logits, targets, target_lengths=[3, 0, 4])
        assert loss == expected and np.array_equal(backward(), dexpected())
    full, _ = ctc_loss(logits[:, :2], np.array([[1, 2], [3, 3]]))
    assert full == ctc_loss(logits[:, :2], [[1, 2], [3, 3]])[0]
    loss, backward = ctc_loss(logits.swapaxes(0, 1), as_list, batch_first=True)
    assert loss == expected and np.array_equal(backward(), dexpected().swapaxes(0, 1))


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf, 1e300])
def test_padding_never_leaks(rng, rubbish):
    logits = rng.standard_normal((6, 2, 4))
    logits[4:, 0] = rubbish
    loss, backward = ctc_loss(logits, [[1, 2], [3, 3]], lengths=[4, 6], reduction="none")
    first, dfirst = ctc_loss(logits[:4, :1], [[1, 2]], reduction="none")
    assert loss[0] == pytest.approx(first[0], abs=1e-12)
    dlogits = backward()
    assert np.all(dlogits[4:, 0] == 0)
    assert_close(dlogits[:4, :1], dfirst(), 2 * logits.size)


def test_classes_that_are_ruled_out_give_no_nan(rng):
    logits = rng.standard_normal((5, 2, 4))
    logits[:, :, 3] = -np.inf
    loss, backward = ctc_loss(logits, [[1, 2], [3]], reduction="none")
    expected, dexpected = ctc_loss(logits[:, :, :3], [[1, 2], [1]], reduction="none")
    assert loss[0] == pytest.approx(expected[0], abs=1e-12) and loss[1] == np.inf
    dlogits = backward()
    assert_close(dlogits[:, 0, :3], dexpected()[:, 0], 2 * logits.size)
    assert np.all(dlogits[:, 0, 3] == 0) and np.all(dlogits[:, 1] == 0)


def test_a_broken_sequence_stays_alone(rng):
    logits = rng.standard_normal((5, 3, 4))
    expected, dexpected = ctc_loss(logits, [[1], [2], [3]], reduction="none")
    logits[2, 1] = np.nan
    loss, backward = ctc_loss(logits, [[1], [2], [3]], reduction="none")
    assert np.isnan(loss[1]) and np.array_equal(loss[[0, 2]], expected[[0, 2]])
    assert np.array_equal(backward()[:, [0, 2]], dexpected()[:, [0, 2]])


def test_nothing_at_all():
    loss, backward = ctc_loss(np.zeros((4, 0, 3)), [])
    assert loss == 0 and backward().shape == (4, 0, 3)
    loss, backward = ctc_loss(np.zeros((0, 2, 3)), [[], [1]], reduction="none")
    assert loss.tolist() == [0, np.inf] and backward().shape == (0, 2, 3)
    assert math.copysign(1, loss[0]) == 1  # not -0.0


@pytest.mark.long
def test_long_sequences_keep_their_digits(rng):
    logits = rng.standard_normal((3000, 1, 30)).astype(np.float32)
    targets = rng.integers(1, 30, (1, 400))
    exact, dexact = ctc_loss(logits.astype(np.float64), targets)
    loss, backward = ctc_loss(logits, targets)
    assert np.isfinite(exact) and loss == np.float32(exact)
    assert np.abs(backward() - dexact()).max() < np.finfo(np.float32).eps


def test_backward_again_and_nothing_is_changed(rng):
    logits, targets, options = draw(rng, 8, 3, 4, 2)
    before = logits.copy()
    loss, backward = ctc_loss(logits, targets, reduction="sum", **options)
    assert np.array_equal(backward(3.0), 3 * backward()) and np.array_equal(logits, before)


# ---- decoding


def test_greedy_merges_repeats_then_drops_blanks():
    path = np.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 0, 0, 3, 1, 2]]).T
    logits = np.eye(4)[path]
    assert ctc_greedy(logits) == [[1, 1, 2], [3, 3, 1, 2]]
    assert ctc_greedy(logits, lengths=[3, 0]) == [[1], []]
    assert ctc_greedy(logits.swapaxes(0, 1), blank=3, batch_first=True) == [[0, 1, 0, 1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("blank", [0, 2])
def test_beam_search_finds_the_likeliest_of_all(rng, blank):
    logits = 2 * rng.standard_normal((5, 3, 3))
    lengths = [5, 0, 4]
    for b, found in enumerate(ctc_beam_search(logits, 1000, lengths=lengths, blank=blank)):
        exact = all_sequences(logits[: lengths[b], b], blank)
        assert {tuple(labels) for labels, _ in found} == set(exact)
        for labels, score in found:
            assert math.exp(score) == pytest.approx(exact[tuple(labels)], abs=1e-12)
        assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_a_constant_added_to_all_logits_changes_no_beam(rng):
    logits = rng.standard_normal((5, 2, 3))
    for (labels, score), (moved, other) in zip(
        *(ctc_beam_search(x, 2)[0] for x in (logits, logits + 4096)), strict=True
    ):
        assert labels == moved and score == pytest.approx(other, abs=1e-10)  # exp(4096) is infinite


def test_a_beam_is_better_than_the_best_path():
    # the path of blanks alone is the likeliest, 0.36, yet "1" is likelier as a sequence, 0.64 (Graves 2006, figure 2)
    logits = np.log(np.array([[[0.6, 0.4]], [[0.6, 0.4]]]))
    assert ctc_greedy(logits) == [[]]
    ((labels, score), (_, other)) = ctc_beam_search(logits, 2)[0]
    assert labels == [1] and math.exp(score) == pytest.approx(0.64) and math.exp(other) == pytest.approx(0.36)


def test_a_narrow_beam_drops_and_never_raises_a_probability(rng):
    logits = rng.standard_normal((6, 8, 4))
    for b, found in enumerate(ctc_beam_search(logits, 3)):
        exact = all_sequences(logits[:, b], 0)
        assert len(found) == 3
        assert all(math.exp(score) <= exact[tuple(labels)] + 1e-12 for labels, score in found)


# ---- what is refused


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": np.zeros((4, 3))}, ShapeError, r"logits: expected shape \(T, B, V\), got \(4, 3\)"),
        ({"logits": np.zeros((4, 2, 3), int)}, DtypeError, "logits: expected float32"),
        ({"targets": [[1], [3]]}, ValueError, r"targets\[1\]: expected classes from 0 to 2 .* got 3"),
        ({"targets": [[1], [0]]}, ValueError, "other than the blank 0, got 0"),
        ({"targets": [[1], [-1]]}, ValueError, "got -1"),
        ({"targets": [[1.0], [2.0]]}, DtypeError, "targets: expected integers"),
        ({"targets": [[1]]}, ShapeError, "targets: expected 2 sequences, as logits have, got 1"),
        ({"targets": [[[1]], [[2]]]}, ShapeError, r"targets\[0\]: expected shape \(S,\), got \(1, 1\)"),
        ({"targets": np.array([1, 2])}, ShapeError, "expected a list of B sequences"),
        (
            {"targets": np.array([1, 2]), "target_lengths": [1, 0]},
            ShapeError,
            "a sum of 2, the number of labels, got 1",
        ),
        ({"targets": np.array([[1], [2]]), "target_lengths": [1, 2]}, ShapeError, "target_lengths: .* got 2"),
        ({"lengths": [5, 1]}, ShapeError, "lengths: expected lengths from 0 to 4"),
        ({"blank": 3}, ValueError, "blank: expected a class from 0 to 2"),
        ({"reduction": "average"}, ValueError, "reduction should be one of"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"logits": np.zeros((4, 2, 3)), "targets": [[1], [2]]} | change
    with pytest.raises(error, match=message):
        ctc_loss(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_dloss_of_another_shape_is_refused():
    _, backward = ctc_loss(np.zeros((4, 2, 3)), [[1], [2]], reduction="none")
    with pytest.raises(ShapeError, match="dloss"):
        backward(np.ones(3))


def test_public_names():
    assert gpurnn.ctc_loss is ctc_loss and gpurnn.ctc_greedy is ctc_greedy
    assert gpurnn.ctc_beam_search is ctc_beam_search
