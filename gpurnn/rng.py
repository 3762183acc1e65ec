"""Counter-based random numbers: Philox4x32-10, equal bit for bit on every backend.

A draw is a pure function of (seed, layer, call, element). There is no state between draws, so a dropout mask does not
depend on which layer drew first, on the backend, or on how often the program was stopped and resumed.

In every function here ``seed`` is an int below 2^64, ``layer`` and ``call`` are ints (their low 32 bits count), and
``xp`` is NumPy or CuPy.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The counter of element
group n (four 32-bit words each) is (n mod 2^32, n div 2^32, layer, call); the key is the 64-bit seed.
"""

from __future__ import annotations

import secrets
import zlib
from types import ModuleType
from typing import Any

import numpy as np

from ._typing import Array
from .errors import check_size

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of the rounds, and what the key grows by between them: from the paper
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_BLOCK = 1 << 15  # counters in one pass: the temporaries of a round stay in cache


def fresh_seed() -> int:
    """A seed below 2^63 from the operating system, for layers built without one."""
    return secrets.randbits(63)


def short_seed() -> int:
    """A fresh seed of at most six digits, short enough to type again."""
    return fresh_seed() % 1_000_000


def check_seed(seed: int | None) -> int:
    """``seed`` as an int in [0, 2^64), or a fresh one for None; raises TypeError or ValueError for anything else."""
    if seed is None:
        return fresh_seed()
    seed = check_size("seed", seed, minimum=0)
    if seed >= 1 << 64:
        raise ValueError(f"seed should be below 2**64, got {seed}")
    return seed


def name_key(name: str) -> int:
    """The 32-bit key of a layer's or parameter's name: its CRC-32, the same in every process."""
    return zlib.crc32(name.encode())


def philox(counter: tuple, key: tuple[int, int], xp: ModuleType = np) -> tuple[Array, Array, Array, Array]:
    """Ten Philox4x32 rounds.

    Parameters
    ----------
    counter : tuple of four
        uint64 arrays or ints, all with values below 2^32.
    key : tuple of two int
        Below 2^32.

    Returns
    -------
    tuple of four Array
        uint64, with values below 2^32.
    """
    c0, c1, c2, c3 = (xp.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    m0, m1 = np.uint64(_MULTIPLIERS[0]), np.uint64(_MULTIPLIERS[1])
    mask, half = np.uint64(_MASK), np.uint64(32)
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (
            (p1 >> half) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            (p0 >> half) ^ c3 ^ np.uint64(k1),
            p0 & mask,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(count: int, seed: int, layer: int = 0, call: int = 0, xp: ModuleType = np) -> Array:
    """``count`` uniform 32-bit words: uint32 (count,)."""
    groups = -(-count // 4)
    out = xp.empty((groups, 4), dtype=np.uint32)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    for start in range(0, groups, _BLOCK):
        n = xp.arange(start, min(start + _BLOCK, groups), dtype=np.uint64)
        counter = (n & np.uint64(_MASK), n >> np.uint64(32), layer & _MASK, call & _MASK)
        for column, word in enumerate(philox(counter, key, xp)):
            out[start : start + _BLOCK, column] = word
    return out.reshape(-1)[:count]


def words_of_rows(
    rows: int, part: tuple[int, int, int], seed: int, layer: int = 0, call: int = 0, xp: ModuleType = np
) -> Array:
    """The same part of each row of ``words(rows * length)``, without drawing the rest: uint32 (rows, count).

    part: (first, count, length) of a row.
    """
    first, count, length = part
    place = xp.arange(rows, dtype=np.uint64)[:, None] * np.uint64(length) + np.uint64(first)
    groups = (count + 6) // 4  # of four words, which a part may begin and end within
    n = (place // np.uint64(4) + xp.arange(groups, dtype=np.uint64)).reshape(-1)
    key, out = (seed & _MASK, (seed >> 32) & _MASK), xp.empty((n.size, 4), dtype=np.uint32)
    for start in range(0, n.size, _BLOCK):
        some = n[start : start + _BLOCK]
        counter = (some & np.uint64(_MASK), some >> np.uint64(32), layer & _MASK, call & _MASK)
        for column, word in enumerate(philox(counter, key, xp)):
            out[start : start + _BLOCK, column] = word
    inside = (place % np.uint64(4)).astype(np.int64) + xp.arange(count)
    return xp.take_along_axis(out.reshape(rows, 4 * groups), inside, axis=1)


def dropout_mask(
    shape: tuple[int, ...], rate: float, seed: int, layer: int = 0, call: int = 0, xp: ModuleType = np
) -> Array:
    """Booleans of ``shape``, False with probability ``rate``. Integers are compared: all backends have equal masks."""
    drawn = words(int(np.prod(shape, dtype=np.int64)), seed, layer, call, xp)
    return (drawn.astype(np.uint64) >= np.uint64(dropout_threshold(rate))).reshape(shape)


def dropout_threshold(rate: float) -> int:
    """An element is dropped where its 32-bit word is below this: 0 to 2^32."""
    return min(round(rate * 2.0**32), 2**32)


def uniform(
    shape: tuple[int, ...],
    low: float,
    high: float,
    seed: int,
    layer: int = 0,
    call: int = 0,
    dtype: Any = np.float32,
    xp: ModuleType = np,
) -> Array:
    """Uniform numbers in [low, high) with 53 random bits, rounded to ``dtype``."""
    count = int(np.prod(shape, dtype=np.int64))
    drawn = words(2 * count, seed, layer, call, xp).reshape(count, 2).astype(np.uint64)
    bits = (drawn[:, 0] << np.uint64(21)) ^ (drawn[:, 1] >> np.uint64(11))
    unit = bits.astype(np.float64) * 2.0**-53
    return (low + (high - low) * unit).astype(dtype).reshape(shape)


def normal(
    shape: tuple[int, ...],
    seed: int,
    layer: int = 0,
    call: int = 0,
    dtype: Any = np.float32,
    xp: ModuleType = np,
) -> Array:
    """Standard normal numbers, computed in float64 by the Box-Muller transform and rounded to ``dtype``."""
    count = int(np.prod(shape, dtype=np.int64))
    pairs = uniform((-(-count // 2), 2), 0.0, 1.0, seed, layer, call, np.float64, xp)
    radius = xp.sqrt(-2.0 * xp.log1p(-pairs[:, 0]))
    angle = 2.0 * np.pi * pairs[:, 1]
    drawn = xp.stack([radius * xp.cos(angle), radius * xp.sin(angle)], axis=1)
    return drawn.reshape(-1)[:count].astype(dtype).reshape(shape)
