"""Philox against published known answers, and what the layers' draws promise."""

import numpy as np
import pytest

from gpurnn import rng

# From Random123's kat_vectors file, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(word) for word in rng.philox(counter, key)) == answer


def test_philox_takes_arrays():
    counters = np.array([known[0] for known in KNOWN_ANSWERS[:2]], np.uint64).T
    drawn = np.stack(rng.philox(tuple(counters), (0, 0)), axis=1)
    assert tuple(drawn[0]) == KNOWN_ANSWERS[0][2]
    assert drawn.shape == (2, 4)
    assert tuple(drawn[1]) == tuple(rng.philox((0xFFFFFFFF,) * 4, (0, 0)))


def test_words_are_philox_of_group_layer_and_call():
    seed, layer, call = 0x299F31D0_A4093822, 7, 11
    drawn = rng.words(12, seed, layer, call)
    expected = [word for group in range(3) for word in rng.philox((group, 0, layer, call), (0xA4093822, 0x299F31D0))]
    assert drawn.dtype == np.uint32
    np.testing.assert_array_equal(drawn, np.array(expected, np.uint32))


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 99])
def test_words_prefix(count):
    """An element's draw does not depend on how many are drawn."""
    np.testing.assert_array_equal(rng.words(count, 5, 1, 2), rng.words(100, 5, 1, 2)[:count])


def test_words_across_blocks():
    """Blocks are only an order of work: the draws on both sides of a border are those of their own counters."""
    groups = 2 * 32768 + 3
    drawn = rng.words(4 * groups, 9, 2, 3).reshape(groups, 4)
    for group in (0, 32767, 32768, 65535, 65536, groups - 1):
        np.testing.assert_array_equal(drawn[group], np.array(rng.philox((group, 0, 2, 3), (9, 0)), np.uint32))


@pytest.mark.parametrize("changed", [{"seed": 2}, {"seed": 1 + (1 << 32)}, {"layer": 1}, {"call": 1}])
def test_every_part_of_the_key_matters(changed):
    base = rng.words(64, **{"seed": 1, "layer": 0, "call": 0})
    other = rng.words(64, **({"seed": 1, "layer": 0, "call": 0} | changed))
    assert (base == other).sum() <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniform(dtype):
    drawn = rng.uniform((300, 400), -2.0, 6.0, seed=1, dtype=dtype)
    assert drawn.shape == (300, 400) and drawn.dtype == dtype
    assert drawn.min() >= -2 and drawn.max() <= 6
    count, deviation = drawn.size, 8 / np.sqrt(12)
    assert abs(drawn.mean() - 2) < 4 * deviation / np.sqrt(count)
    # the variance of a uniform's sample variance is (1/80 - 1/144) width^4 / count
    assert abs(drawn.var(dtype=np.float64) - 64 / 12) < 4 * 64 * np.sqrt((1 / 80 - 1 / 144) / count)
    in_bins = np.histogram(drawn, bins=8, range=(-2, 6))[0]
    assert (np.abs(in_bins - count / 8) < 4 * np.sqrt(count / 8 * 7 / 8)).all()


def test_uniform_uses_53_bits():
    drawn = rng.uniform((1000,), 0.0, 1.0, seed=2, dtype=np.float64)
    assert drawn.max() < 1
    scaled = drawn * 2.0**53
    np.testing.assert_array_equal(scaled, np.floor(scaled))
    assert 400 < (scaled % 2).sum() < 600  # the last bit is in use


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normal(dtype):
    drawn = rng.normal((251, 401), seed=3, dtype=dtype)
    assert drawn.shape == (251, 401) and drawn.dtype == dtype
    drawn, count = drawn.astype(np.float64), drawn.size
    # standard errors of the first four moments of a standard normal sample
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - moment) < 4 * np.sqrt(variance / count)
    neighbours = (drawn.reshape(-1)[:-1:2] * drawn.reshape(-1)[1::2]).mean()  # of one Box-Muller pair
    assert abs(neighbours) < 4 / np.sqrt(count / 2)
    np.testing.assert_array_equal(rng.normal((7,), 3, dtype=dtype), rng.normal((8,), 3, dtype=dtype)[:7])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.97])
def test_mask_rate(rate):
    mask = rng.dropout_mask((200, 1000), rate, seed=4, layer=5, call=6)
    assert mask.shape == (200, 1000) and mask.dtype == bool
    assert abs((~mask).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / mask.size)
    np.testing.assert_array_equal(mask, rng.dropout_mask((200, 1000), rate, seed=4, layer=5, call=6))


def test_mask_threshold_is_exact(monkeypatch):
    """An element is dropped by the rate * 2^32 smallest words, no more and no fewer."""
    monkeypatch.setattr(rng, "words", lambda count, *key: np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32))
    assert rng.dropout_mask((4,), 0.5, seed=1).tolist() == [False, False, True, True]
    assert rng.dropout_mask((4,), 1.0, seed=1).tolist() == [False] * 4
    assert rng.dropout_mask((4,), 0.0, seed=1).tolist() == [True] * 4
    assert rng.dropout_mask((4,), 2.0**-32, seed=1).tolist() == [False, True, True, True]


def test_mask_rates_of_zero_and_one_are_exact():
    assert rng.dropout_mask((1000,), 0.0, seed=1).all()
    assert not rng.dropout_mask((1000,), 1.0, seed=1).any()
    assert rng.dropout_mask((0, 3), 0.5, seed=1).shape == (0, 3)
    assert rng.dropout_mask((), 0.0, seed=1).shape == ()


def test_seeds():
    assert rng.check_seed(np.int64(5)) == 5
    assert rng.check_seed(2**64 - 1) == 2**64 - 1
    assert rng.check_seed(None) != rng.check_seed(None)
    assert 0 <= rng.fresh_seed() < 2**63
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"seed should be .*, got {wrong}"):
            rng.check_seed(wrong)
    for wrong in (1.0, "1", True):
        with pytest.raises(TypeError, match="seed should be an int"):
            rng.check_seed(wrong)


def test_name_key_is_the_same_in_every_process():
    assert rng.name_key("") == 0
    assert rng.name_key("123456789") == 0xCBF43926  # the check value of CRC-32
