"""What decides whether a result is right: inputs that are the same for everybody, what should come of them, and how far
a result may be from that."""

import functools
from dataclasses import replace

import numpy as np

from gpurnn.dtypes import EPSILON, check_dtype
from gpurnn.testing import nan_is_worst

from .results_file import in_int8
from .rivals.gpurnn import build, gpurnn_rival, unavailable

TF32 = 2.0**-10
INT8 = 2.0**-8
_DEVIATION = 1e-5**0.5  # the least that a batch normalization divides by


def inputs(case):
    """(weights by torch's names, x, doutput), or in a "step" (weights, words, targets): NumPy arrays, the same in every
    process, numbers in float32; in 16-bit numbers."""
    alone = replace(case, T=1, B=1, what="inference", dtype="float32", ragged=False, resets=0.0)
    weights = build(case, "numpy", "float32").state_dict() if case.what == "step" else _weights(alone)
    draw = np.random.default_rng(1)
    if case.what == "step":
        words, targets = draw.integers(0, case.V, (2, case.T, case.B))
        return weights, words, targets
    D = 2 if case.bidirectional else 1
    x = draw.standard_normal((case.T, case.B, case.I), dtype="float32")
    doutput = draw.standard_normal((case.T, case.B, D * case.H), dtype="float32")
    if case.dtype in ("float16", "bfloat16"):  # so that no rival differs by how it rounds what it is given
        dtype = check_dtype(case.dtype)
        weights = {name: value.astype(dtype).astype("float32") for name, value in weights.items()}
        x, doutput = (array.astype(dtype).astype("float32") for array in (x, doutput))
    return weights, x, doutput


@functools.lru_cache(maxsize=4)
def _weights(case):
    """Those of a layer, which cases of other batches and passes have, too."""
    return build(case, "numpy", "float32").state_dict()


def reference(case, weights, x, y):
    """Name -> float64 array: what every rival should find, by gpurnn's generic code in float64 (proven in its own
    tests), on NumPy; for cases that would take NumPy minutes on CuPy, where there is a GPU."""
    exact = replace(case, dtype="float64", precision="float32")
    large = case.flops > 5e10 and unavailable("cupy") is None
    return gpurnn_rival("cupy" if large else "numpy")(exact, weights, x, y).results()


def allowed(case, rival=""):
    """Error that results may have, as a share of an array's largest value: a rounding of the inputs' precision for each
    term of the sums of one step, and for each step that passes it on; in a whole step also one for each parameter,
    whose squares make the norm that all gradients are clipped by. What is normalized over the batch may be divided by
    next to nothing, where few sequences are nearly equal. Wrong results are wrong by 0.01 and more, so that is
    the most in float32; in tf32, 16 bits and int8 it is a few roundings of bfloat16, 2^-7, and of int8, 2^-8 of a
    row's largest weight. rival: its name, which says whether its weights are in int8."""
    int8 = in_int8(rival)
    eps = TF32 if case.precision == "tf32" else EPSILON[case.dtype]
    eps = max(eps, INT8) if int8 else eps
    terms = (case.H + case.I) ** 0.5 * case.steps**0.5 * len(case.record.gates)
    if case.record.over_batch:
        terms /= _DEVIATION
    if case.what == "step":
        terms += case.parameters**0.5
    rounded = case.dtype in ("float16", "bfloat16") or case.precision == "tf32" or int8
    return min(eps * terms, 0.05 if rounded else 0.01)


def furthest(got, expected):
    """(error, name) of the array that is furthest off, the error as a share of its largest value; NaN is worst."""
    worst, where = 0.0, ""
    for name, value in expected.items():
        share = nan_is_worst(np.abs(got[name] - value).max(initial=0) / np.abs(value).max(initial=1e-30))
        if share > worst:
            worst, where = share, name
    return worst, where
