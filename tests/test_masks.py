"""Lengths: what is taken, what is refused, and the mask of valid steps."""

import numpy as np
import pytest

from gpurnn import DtypeError, ShapeError
from gpurnn.masks import check_lengths, valid_steps


@pytest.mark.parametrize(
    "lengths",
    [
        [3, 0, 4],
        (3, 0, 4),
        [np.int32(3), 0, 4],
        *(np.array([3, 0, 4], dtype) for dtype in ("int8", "int64", "uint8", "uint16", "uint64")),
    ],
)
def test_host_lengths_of_every_kind(lengths):
    checked = check_lengths(lengths, T=4, B=3)
    assert checked.dtype == np.int64 and checked.tolist() == [3, 0, 4]


def test_unsigned_lengths_with_more_steps_than_they_can_count():
    assert check_lengths(np.array([255], np.uint8), T=300, B=1).tolist() == [255]


def test_lengths_on_a_device_are_fetched():
    class Device:
        def get(self):
            return np.array([1, 2])

    assert check_lengths(Device(), T=2, B=2).tolist() == [1, 2]


def test_lengths_are_not_the_callers_array():
    lengths = np.array([1, 2])
    check_lengths(lengths, 2, 2)[0] = 9
    assert lengths.tolist() == [1, 2]


def test_valid_steps():
    expected = np.array([[1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    valid = valid_steps([3, 0, 1, 2], T=3, B=4)
    assert valid.dtype == bool
    np.testing.assert_array_equal(valid, expected)


@pytest.mark.parametrize("lengths", [[], (), np.array([], np.int32), np.zeros(0)])
def test_empty_batch(lengths):
    assert valid_steps(lengths, T=3, B=0).shape == (3, 0)
    assert valid_steps([0, 0], T=0, B=2).shape == (0, 2)


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        ([1.0, 2.0], DtypeError, r"got float64. Convert them: sizes = np.asarray\(sizes, int\)$"),
        ([1.5, 2.0], DtypeError, "sizes: expected integers, got float64$"),
        ([1.0, np.nan], DtypeError, "sizes: expected integers, got float64$"),
        ([True, False], DtypeError, "sizes: expected integers, got bool$"),
        (np.ones((3, 2), bool), DtypeError, r"got bool. Of a mask give how many steps count: mask.sum\(axis=0\)"),
        (["1", "2"], DtypeError, "sizes: expected integers, got a list of str$"),
        ("1 2", DtypeError, "sizes: expected integers, got '1 2'$"),
        (None, DtypeError, "sizes: expected integers, got None$"),
        ([1], ShapeError, r"sizes: expected one length for each of the 2 sequences, got shape \(1,\)"),
        ([], ShapeError, r"got shape \(0,\)"),
        (3, ShapeError, r"got shape \(\)"),
        ([[1, 2]], ShapeError, r"got shape \(1, 2\)"),
        ([1, 4], ShapeError, r"sizes: expected lengths from 0 to 3 \(the number of steps\), got 4"),
        ([-1, 2], ShapeError, "from 0 to 3 .*, got -1"),
        (np.array([1, 2**64 - 1], np.uint64), ShapeError, f"got {2**64 - 1}"),
    ],
)
def test_refused_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        check_lengths(lengths, T=3, B=2, name="sizes")
    with pytest.raises(error, match=message):
        valid_steps(lengths, T=3, B=2, name="sizes")
