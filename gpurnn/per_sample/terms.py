"""From the recorded terms of one parameter to its gradient for each sequence, to the norms of these, and to sums.

The norm of G = sum_t d_t x_t^T, (M, N), does not need G: |G|^2 = sum over t and s of (d_t . d_s)(x_t . x_s), from two
Gram matrices (T, T). That takes T^2 (M + N) multiplications, G itself T M N. The smaller number decides. Gram
matrices are made in float64: where terms cancel, their errors would be larger than the norm.
"""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 1 << 22  # numbers that are made at once


def gradients(ops, shape, terms, part=slice(None)):
    """The gradient of a parameter of this ``shape`` for each sequence of the slice ``part``: (B, *shape)."""
    xp, d = ops.xp, terms[0].d[part]
    out = xp.zeros((len(d), *shape), terms[0].d.dtype if terms[0].x is None else terms[0].x.dtype)
    for term in terms:
        d, x = term.d[part], None if term.x is None else term.x[part]
        rows = out if term.start == 0 else out[:, term.start :]
        if x is None:
            rows[:, : d.shape[2]] += d.sum(axis=1)
        elif _is_ids(d):
            for one, ids, values in zip(rows, d, x, strict=True):
                ops.accumulate_rows(one, ids[:, 0], values)
        else:
            product = d.swapaxes(1, 2) @ x
            rows[:, : d.shape[2]] += product if term.mask is None else product * term.mask
    return out


def squared_norms(ops, shape, terms):
    """The squared norm of the gradient of a parameter of this ``shape`` for each sequence: (B,), float64."""
    xp, B = ops.xp, len(terms[0].d)
    norms = xp.zeros(B, np.float64)
    for start in sorted({term.start for term in terms}):
        group = [term for term in terms if term.start == start]
        rows = shape if _is_ids(group[0].d) or group[0].x is None else (group[0].d.shape[2], *shape[1:])
        T = sum(term.d.shape[1] for term in group)
        by_gram = prefers_gram(group, rows, T)
        size = max(1, _BLOCK // max(1, T * T if by_gram else math.prod(rows)))
        for first in range(0, B, size):
            part = slice(first, first + size)
            if by_gram:
                norms[part] += _gram_norms(xp, group, part)
            else:
                whole = gradients(ops, rows, [term._replace(start=0) for term in group], part)
                norms[part] += xp.square(whole.reshape(len(whole), -1), dtype=np.float64).sum(axis=1)
    return norms


def prefers_gram(terms, shape, T):
    """Whether Gram matrices take fewer multiplications than the gradient of this ``shape`` itself."""
    if any(term.x is None or term.mask is not None for term in terms):
        return False
    M, N = shape
    ids = all(_is_ids(term.d) for term in terms)
    return T * (1 if ids else M) * T + T * N * T < (M * N if ids else T * M * N)


def _gram_norms(xp, terms, part):
    """The squared norms of the sum of some ``terms``, for the sequences of ``part``; rounding makes none negative."""
    total = 0.0
    parts = [(term.d[part], term.x[part]) for term in terms]
    for k, (d, x) in enumerate(parts):
        for n, (other_d, other_x) in enumerate(parts[: k + 1]):
            products = _dots(xp, d, other_d) * _dots(xp, x, other_x)
            total = total + (1 if n == k else 2) * products.sum(axis=(1, 2))
    return xp.maximum(total, 0)


def _dots(xp, a, b):
    """For each sequence the products of the rows of a (B, T, M) with those of b (B, S, M): (B, T, S), float64."""
    if _is_ids(a) and _is_ids(b):
        return (a == b.swapaxes(1, 2)).astype(np.float64)
    if _is_ids(b):
        return _dots(xp, b, a).swapaxes(1, 2)
    if _is_ids(a):
        places = xp.broadcast_to(a.swapaxes(1, 2), (len(b), b.shape[1], a.shape[1]))
        return xp.take_along_axis(b, places, axis=2).swapaxes(1, 2).astype(np.float64)
    return a.astype(np.float64, copy=False) @ b.astype(np.float64, copy=False).swapaxes(1, 2)


def add_weighted(ops, grad, terms, factors):
    """``grad += `` the sum over all sequences of their gradient times their factor. factors: (B,)."""
    xp = ops.xp
    for term in terms:
        d, x, factor = term.d, term.x, factors[:, None, None]
        rows = grad[term.start :] if _is_ids(d) else grad[term.start : term.start + d.shape[2]]
        if x is None:
            rows += ops.sum_steps((d * factor).astype(d.dtype, copy=False))
        elif _is_ids(d):
            scaled = (x * factor).astype(x.dtype, copy=False)
            ops.accumulate_rows(rows, d.reshape(-1), scaled.reshape(-1, x.shape[2]))
        else:
            scaled = (d * factor).astype(d.dtype, copy=False)
            if term.mask is None:
                ops.accumulate_product(rows, scaled, x)
            else:
                whole = xp.zeros(rows.shape, rows.dtype)
                ops.accumulate_product(whole, scaled, x)
                rows += whole * term.mask


def _is_ids(d):
    """Whether integers stand for rows that are 1 in one place."""
    return d.dtype.kind in "iu"
