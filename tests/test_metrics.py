"""Metrics: accuracy of what counts, perplexity, bits per character."""

import math
import warnings

import numpy as np
import pytest

from gpurnn.errors import DtypeError, ShapeError
from gpurnn.metrics import accuracy, bits_per_character, edit_distance, error_rate, perplexity


@pytest.fixture
def batch():
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((6, 4, 3)).astype(np.float32)
    return logits, rng.integers(0, 3, (6, 4))


def test_accuracy_of_all(batch):
    logits, targets = batch
    expected = (logits.argmax(axis=-1) == targets).mean()
    assert accuracy(logits, targets) == expected
    assert accuracy(logits[0], targets[0]) == (logits[0].argmax(axis=-1) == targets[0]).mean()
    assert type(accuracy(logits, targets)) is float


def test_accuracy_of_one():
    assert accuracy(np.array([0.1, 0.9]), np.array(1)) == 1.0
    assert accuracy([0.1, 0.9], 0) == 0.0
    assert accuracy(np.zeros((1, 3)), np.array([0])) == 1.0  # of equal logits the first


def test_accuracy_of_more_than_one_block():
    rng = np.random.default_rng(3)
    logits, targets = rng.standard_normal((700, 400)), rng.integers(0, 400, 700)
    targets[::3] = logits[::3].argmax(axis=-1)
    assert accuracy(logits, targets) == (logits.argmax(axis=-1) == targets).mean()


def test_accuracy_of_what_counts(batch):
    logits, targets = batch
    lengths = [6, 0, 2, 5]
    valid = np.arange(6)[:, None] < np.array(lengths)
    right = logits.argmax(axis=-1) == targets
    logits[~valid], targets[~valid] = np.nan, 99
    assert accuracy(logits, targets, lengths=lengths) == right[valid].mean()
    assert accuracy(logits, targets, valid) == right[valid].mean()
    assert accuracy(logits, targets, ignore_index=99) == right[valid].mean()
    turned = logits.swapaxes(0, 1), targets.T
    assert accuracy(*turned, valid.T, lengths=lengths, batch_first=True) == right[valid].mean()


def test_accuracy_of_nothing(batch):
    logits, targets = batch
    assert math.isnan(accuracy(logits, targets, lengths=[0, 0, 0, 0]))
    assert math.isnan(accuracy(logits[:, :0], targets[:, :0]))


def test_accuracy_refuses_what_cross_entropy_refuses(batch):
    logits, targets = batch
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 2 .*got 3"):
        accuracy(logits, targets + 1 + (targets == 0))
    with pytest.raises(ShapeError, match="targets"):
        accuracy(logits, targets.T)
    with pytest.raises(DtypeError, match="targets"):
        accuracy(logits, targets.astype(float))
    with pytest.raises(ShapeError, match="mask"):
        accuracy(logits, targets, np.ones((4, 6), bool))


def test_perplexity():
    assert perplexity(math.log(50)) == pytest.approx(50, rel=1e-14)
    assert perplexity(np.float32(0)) == 1.0
    assert perplexity(np.array(1.0)) == math.e
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perplexity(1e4) == math.inf
        assert perplexity(np.float32(math.inf)) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_bits_per_character():
    assert bits_per_character(math.log(2)) == 1.0
    assert bits_per_character(np.float64(3 * math.log(2))) == pytest.approx(3, rel=1e-15)


def slow_edit_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    replaced = slow_edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, slow_edit_distance(a[1:], b) + 1, slow_edit_distance(a, b[1:]) + 1)


def test_edit_distance_by_its_definition():
    rng = np.random.default_rng(5)
    for _ in range(40):
        a, b = ("".join(rng.choice(list("ab"), rng.integers(0, 6))) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(list(a), list(b)) == slow_edit_distance(a, b)


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("", "") == 0
    assert edit_distance(["the", "cat", "sat"], ["the", "cat", "sat", "down"]) == 1
    assert type(edit_distance([1, 2], [2, 1])) is int


def test_error_rate():
    assert error_rate(["31", "4"], ["314", "4"]) == 0.25
    assert error_rate(["abcd"], ["x"]) == 4  # more than everything
    assert error_rate([[1, 2], []], [[1, 2], [3, 4]]) == 0.5  # weighs by length, not by sequence
    assert math.isnan(error_rate(["a"], [""])) and math.isnan(error_rate([], []))
    with pytest.raises(ShapeError, match="hypotheses: expected 2, as many as references, got 1"):
        error_rate(["a"], ["a", "b"])
