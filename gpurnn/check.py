"""Does this machine compute rightly? What ``gpurnn check`` runs: every backend, cell, option and dtype against NumPy.

Six checks of each recurrent layer, two of everything else:

- ``gradient`` (float64): the derivative along a random direction of x, the states and all parameters against finite
  differences, as ``gpurnn.testing.check_gradient`` has it.
- ``reference``: output, final state, dx, dstate and every parameter's gradient against the NumPy backend in float64.
  Errors count as a share of an array's largest value, or of 1. Allowed is twice the largest of the NumPy backend in the
  same dtype, plus two roundings (exp and tanh differ between libraries in their last place). Where that says nothing,
  for NumPy itself and in float64: one rounding for each term of each sum in each step.
- ``repeat``: two runs give equal bits.
- ``ragged``: sequences of different lengths in one batch are what each is on its own; outputs past the end are zero,
  and NaN there, in the derivatives there, and in the initial state of a sequence without steps changes nothing.
- ``pieces``: a sequence that is cut into steps and pieces, the state going from one to the next, and one that runs as
  a wavefront, against NumPy in float64: off by no more than twice what one call is, and a rounding.
- ``gates`` (LSTM, GRU): the logistic function over its whole range, in relative terms: four last places in float32 and
  float64, one rounding in 16 bits.

``reference`` has, among others, one call that is large enough for the memory pool of the backend ``cpu``. Of everything
else "padding in front" has NaN in the padding that Linear and LayerNorm read before a recurrent layer.
"""

import importlib.util
import itertools
from dataclasses import dataclass

import numpy as np

from .attention import Attention
from .backends import backends as available_backends
from .backends import get_backend
from .dtypes import DTYPES, EPSILON, check_dtype
from .errors import check_choice
from .layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential
from .losses import cross_entropy
from .optim import SGD, Adam, AdamW, RMSprop, clip_grad_norm
from .recurrent import GRU, LSTM, RNN
from .testing import draw_like, equal_bits, gradient_error, leaves, ragged_error, results, worst_error

CELLS = {
    "rnn tanh": (RNN, {}),
    "rnn relu": (RNN, {"nonlinearity": "relu"}),
    "lstm": (LSTM, {}),
    "lstm projected": (LSTM, {"proj_size": 3}),
    "gru": (GRU, {}),
    "gru original": (GRU, {"reset_after": False}),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "reverse": {"reverse": True},
    "two layers": {"num_layers": 2, "dropout": 0.3},
    "two sizes, bidirectional": {"num_layers": 2, "bidirectional": True, "hidden_size": [7, 5]},
    "batch first": {"batch_first": True},
    "learned state": {"learn_state": True},
    "wavefront": {"num_layers": 2, "dropout": 0.3, "wavefront": 2},
}
QUICK = ("bidirectional", "two layers")
OTHERS = "other layers"


@dataclass
class Result:
    """One check: ``worst`` is the largest error as a share of what is allowed, so right is 1 or less; ``detail`` names
    where that was."""

    backend: str
    cell: str
    dtype: str
    check: str
    worst: float
    detail: str

    @property
    def right(self):
        """NaN is wrong."""
        return bool(self.worst <= 1)


# ---- recurrent layers


def build(cell, backend, dtype, I=4, H=7, seed=5, **options):
    """A layer of ``CELLS`` with options of ``OPTIONS``."""
    layer, more = CELLS[cell]
    options = {"hidden_size": H} | more | options
    return layer(I, options.pop("hidden_size"), backend=backend, dtype=dtype, seed=seed, **options)


class Batch:
    """Random inputs of a layer, float64 on the host; ``run`` gives every result of one training call."""

    def __init__(self, layer, T, B, ragged, given_state=True, seed=0):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(B, T, layer.input_size) if layer.batch_first else (T, B, layer.input_size))
        self.lengths = rng.integers(0, T + 1, B) if ragged else None
        output, state = layer(self.x)
        self.doutput = rng.normal(size=output.shape)
        self.state = draw_like(state, rng) if given_state else None
        self.dstate = draw_like(state, rng)

    def run(self, layer):
        """Name -> float64 NumPy array: output, state, dx, dstate, and ``d`` + name of every parameter."""
        layer.calls = 0  # the same dropout in every run
        return results(layer, (self.x, self.state), (self.doutput, self.dstate), lengths=self.lengths)


def twins(cell, backend, dtype, **options):
    """The layer on a backend, and with the same weights on NumPy in the same dtype and in float64.

    tf32 keeps as many bits of what it multiplies as float16: that is its like.
    """
    layer = build(cell, backend, dtype, **options)
    like = "float16" if options.pop("precision", None) == "tf32" else dtype
    others = [build(cell, "numpy", other, **options) for other in (like, "float64")]
    for other in others:
        other.load_state_dict(layer.state_dict())
    return layer, *others


def compare(cell, backend, dtype, T, B, ragged=False, given_state=True, **options):
    """``(worst, detail)`` of one layer against the reference."""
    layers = twins(cell, backend, dtype, **options)
    first = _compare_once(cell, layers, dtype, T, B, ragged, given_state, seed=T + 31 * B)
    if first[0] <= 1:
        return first
    # NumPy may have been exact by luck where there are few numbers: the middle one of three draws counts.
    more = [_compare_once(cell, layers, dtype, T, B, ragged, given_state, seed) for seed in (1, 2)]
    return sorted([first, *more], key=lambda found: found[0] if found[0] <= float("inf") else float("inf"))[1]


def _compare_once(cell, layers, dtype, T, B, ragged, given_state, seed):
    layer, plain, exact = layers
    batch = Batch(exact, T, B, ragged, given_state, seed)
    got, plain_got, expected = batch.run(layer), batch.run(plain), batch.run(exact)
    like = plain.dtype.name
    hidden = layer.num_layers > 1 and plain.dtype.itemsize == 2  # units that may have done so unseen
    if cell == "rnn relu" and (hidden or ((got["output"] > 0) != (expected["output"] > 0)).any()):
        expected = {"output": expected["output"]}  # rounding carried a unit over relu's kink: another derivative there
    terms = T * (B + 2 * plain._sizes(0)[1] + 4) * layer.num_layers
    counted = terms if dtype == "float64" or layer.ops.name == "numpy" else None
    return worst_error(got, plain_got, expected, like, counted)


def check_gradient(cell, backend, ragged, given_state=True, **options):
    """``(worst, detail)`` of the derivative along a random direction, float64."""
    layer = build(cell, backend, "float64", **options)
    batch = Batch(build(cell, "numpy", "float64", **options), 4, 3, ragged, given_state, seed=1)
    return gradient_error(layer, (batch.x, batch.state), seed=2, lengths=batch.lengths)


def check_repeat(cell, backend, dtype, **options):
    """``(worst, detail)``: 0 where two runs give equal bits, else infinity."""
    layer = build(cell, backend, dtype, **options)
    batch = Batch(build(cell, "numpy", "float64", **options), 5, 3, ragged=True)
    return equal_bits(batch.run(layer), batch.run(layer))


def check_ragged(cell, backend, dtype, **options):
    """``(worst, detail)``: a ragged batch against each of its sequences alone, with NaN in all that is not used."""
    layer = build(cell, backend, dtype, **options)
    batch = Batch(build(cell, "numpy", "float64", **options), 5, 3, ragged=False)
    terms = 5 * (2 * layer._sizes(0)[1] + 8) * layer.num_layers
    return ragged_error(layer, batch.x, [3, 0, 5], batch.state, terms)


def check_pieces(cell, backend, dtype):
    """``(worst, detail)`` of a sequence in pieces. An LSTM hardly forgets here, so that its c grows."""
    layers = twins(cell, backend, dtype, num_layers=2, H=11)
    rng, T = np.random.default_rng(3), 120
    x = np.abs(rng.normal(size=(T, 2, 4)))
    names, found = ("output", "h", "c"), []
    for layer in layers:
        if isinstance(layer, LSTM):
            for name in ("bias_ih_l0", "bias_ih_l1"):
                layer.params[name][...] = layer.xp.asarray(
                    np.repeat([1.0, 9.0, 1.0, 0.0], 11).astype(layer.compute_dtype)
                )
    layer, plain, exact = layers

    def in_pieces(x):
        parts, state = [], None
        for t in range(T - 20):
            y, state = layer.step(x[t], state)
            parts.append(y[None])
        for t in range(T - 20, T, 7):
            y, state = layer(x[t : t + 7], state)
            parts.append(y)
        return layer.xp.concatenate(parts), state

    def wavefront(x):
        layer.wavefront = 7
        try:
            return layer(x)
        finally:
            layer.wavefront = 0

    for one, run in ((exact, exact), (plain, plain), (layer, layer), (layer, in_pieces), (layer, wavefront)):
        output, state = run(one.xp.asarray(x.astype(plain.dtype).astype(one.dtype)))
        arrays = output, *leaves(state)
        found.append([one.ops.to_numpy(array).astype(np.float64) for array in arrays])
    (expected, *usual), tried = found[:3], found[3:]
    worst, detail = 0.0, ""
    for how, got in zip(("in pieces", "as a wavefront"), tried, strict=True):
        for k, (mine, right) in enumerate(zip(got, expected, strict=True)):
            size = np.abs(right).max()
            # what one call is off, its rounding to the layer's dtype, and an order of sums of its own; c is not rounded
            terms = 2 * EPSILON[plain.dtype.name] if k < 2 else EPSILON[plain.dtype.name] / 8
            if plain.dtype.itemsize > 2:
                terms = T * 32 * EPSILON[dtype]
            allowed = 2 * max(np.abs(one[k] - right).max() for one in usual) + terms * size
            error = np.abs(mine - right).max()
            if not error / allowed <= worst:
                worst, detail = float(error / allowed), f"{names[k]} {how}: off by {error:.3g}, allowed {allowed:.3g}"
    return worst, detail


# What float32 and bfloat16, float64 and float16 may count as zero.
_SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022, "float16": 2.0**-24, "bfloat16": 2.0**-126}
_SATURATED = {"float32": 88.0, "float64": 708.0, "float16": 80.0, "bfloat16": 80.0}


def check_gates(cell, backend, dtype):
    """``(worst, detail)`` of every logistic gate: an error in last places."""
    layer = build(cell, backend, dtype, I=1, H=11, bias=False)
    layer.flat_params[...] = 0
    layer.params["weight_ih_l0"] = 1
    most = _SATURATED[dtype]
    x = np.concatenate([np.linspace(-most, most, 300), np.linspace(-20, 20, 100)]).astype(layer.dtype)
    _, _, steps = layer(layer.xp.asarray(x[None, :, None]), return_all=True)
    exact = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    worst, detail = 0.0, ""
    for name in sorted(steps[0].gates.keys() & set("ifo" if isinstance(layer, LSTM) else "rz")):
        got = layer.ops.to_numpy(steps[0].gates[name])[0].astype(np.longdouble)
        allowed = (4 if layer.dtype.itemsize > 2 else 0.51) * EPSILON[dtype] * exact + _SMALLEST[dtype]
        shares = np.abs(got - exact[:, None]).max(axis=1) / allowed
        k = int(np.argmax(shares))
        if not shares[k] <= worst:
            worst, detail = float(shares[k]), f"gate {name} of {float(x[k]):.4g} is {float(got[k, 0]):.8g}"
    return worst, detail


# ---- everything else: name -> function(backend, dtype) -> name -> array


def _layer(make, ids=False, **context):
    def run(backend, dtype):
        layer = make({"backend": backend, "dtype": dtype, "seed": 3})
        rng = np.random.default_rng(2)
        x = rng.integers(0, 9, (7, 4)) if ids else rng.normal(size=(7, 4, 6)).astype(layer.dtype)
        y, backward = layer.forward(layer.xp.asarray(x), **context)
        dx = backward(layer.xp.asarray(rng.normal(size=y.shape).astype(layer.dtype)))
        return {"y": y, "gradients": layer.flat_grads} | ({} if dx is None else {"dx": dx})

    return run


def _padding_in_front(backend, dtype):
    options, rng = {"backend": backend, "dtype": dtype, "seed": 3}, np.random.default_rng(2)
    model = Sequential(Linear(6, 5, **options), LayerNorm(5, **options), GRU(5, 4, **options))
    x, lengths = rng.normal(size=(7, 4, 6)).astype(model.dtype), np.array([7, 0, 3, 5])
    x[np.arange(7)[:, None] >= lengths] = np.nan
    y, _, backward = model.forward(model.xp.asarray(x), lengths=lengths)
    dx, _ = backward(model.xp.asarray(rng.normal(size=y.shape).astype(model.dtype)))
    return {"y": y, "dx": dx, "gradients": model.flat_grads}


def _attention(score):
    def run(backend, dtype):
        layer, rng = Attention(6, 6, score, backend=backend, dtype=dtype, seed=3), np.random.default_rng(2)

        def draw(steps):
            return layer.xp.asarray(rng.normal(size=(steps, 4, 6)).astype(layer.dtype))

        context, weights, backward = layer.forward(draw(5), draw(7), [7, 0, 3, 5])
        dqueries, dmemory = backward(draw(5))
        results = {"context": context, "weights": weights, "dqueries": dqueries, "dmemory": dmemory}
        return results | ({} if score == "dot" else {"gradients": layer.flat_grads})

    return run


def _loss(**options):
    def run(backend, dtype):
        ops, rng = get_backend(backend), np.random.default_rng(4)
        logits = ops.xp.asarray((3 * rng.normal(size=(7, 4, 33))).astype(check_dtype(dtype)))
        targets = ops.xp.asarray(rng.integers(0, 33, (7, 4)))
        loss, backward = cross_entropy(logits, targets, lengths=[7, 0, 3, 5], **options)
        return {"loss": loss, "dlogits": backward()}

    return run


def _optimizer(make):
    def run(backend, dtype):
        model = Linear(5, 7, backend=backend, dtype=dtype, seed=1)
        optimizer, rng = make(model), np.random.default_rng(3)
        for _ in range(3):
            model.flat_grads[...] = model.xp.asarray(
                rng.normal(size=model.flat_grads.shape).astype(model.compute_dtype)
            )
            norm = clip_grad_norm(model, 2.0)
            optimizer.step()
        return {"parameters": model.flat_params, "gradients": model.flat_grads, "norm": norm}

    return run


OTHER_CASES = {
    "Linear": _layer(lambda o: Linear(6, 5, **o)),
    "Embedding": _layer(lambda o: Embedding(9, 6, padding_idx=2, **o), ids=True),
    "Dropout": _layer(lambda o: Dropout(0.4, **o)),
    "LayerNorm": _layer(lambda o: LayerNorm(6, **o)),
    "BatchNorm": _layer(lambda o: BatchNorm(6, **o)),
    "Pooling": _layer(lambda o: Pooling(6, "last", 2, **o), lengths=[7, 0, 3, 5]),
    "Pooling, mean": _layer(lambda o: Pooling(6, "mean", **o), lengths=[7, 0, 3, 5]),
    "Pooling, max": _layer(lambda o: Pooling(6, "max", **o), lengths=[7, 0, 3, 5]),
    "Pooling, attention": _layer(lambda o: Pooling(6, "attention", **o), lengths=[7, 0, 3, 5]),
    "padding in front": _padding_in_front,
    "Attention, dot": _attention("dot"),
    "Attention, general": _attention("general"),
    "Attention, additive": _attention("additive"),
    "cross_entropy": _loss(),
    "cross_entropy, smoothed": _loss(label_smoothing=0.1, reduction="sum"),
    "SGD": _optimizer(lambda m: SGD(m, 0.1, momentum=0.9, nesterov=True)),
    "RMSprop": _optimizer(lambda m: RMSprop(m, 0.01, centered=True, momentum=0.5)),
    "Adam": _optimizer(lambda m: Adam(m, 0.01, amsgrad=True)),
    "AdamW": _optimizer(lambda m: AdamW(m, 0.01)),
}


def _on_host(results, ops):
    return {name: ops.to_numpy(value).astype(np.float64) for name, value in results.items()}


def _check_other(name, backend, dtype):
    ops, plain = get_backend(backend), get_backend("numpy")
    run = OTHER_CASES[name]
    first, second = (_on_host(run(backend, dtype), ops) for _ in range(2))
    expected = _on_host(run("numpy", "float64"), plain)
    counted = 8 * 28 if dtype == "float64" or ops.name == "numpy" else None  # at most 28 terms of a few operations
    usual = _on_host(run("numpy", dtype), plain)
    return worst_error(first, usual, expected, dtype, counted), equal_bits(first, second)


# ---- the whole


def run_checks(backends=None, cells=None, dtypes=None, quick=False, progress=None):
    """Run the checks; returns a list of ``Result``, the worst of each backend, cell, dtype and check.

    backends: names or ``Ops`` objects, by default all that work here. cells: of ``CELLS`` and ``OTHERS``, by default
    all. dtypes: of ``DTYPES``. quick: two options instead of nine. progress: wraps the list of jobs, as ``tqdm`` does.
    Raises BackendError for a backend that does not work here, ValueError for an unknown cell or dtype.
    """
    if not backends:
        backends = [name for name, problem in available_backends().items() if problem is None]
    backends = [get_backend(backend) for backend in backends]
    cells = cells or (*CELLS, OTHERS)
    if not dtypes:  # bfloat16 is an extra: left out where it is not installed and nobody asked for it
        dtypes = [dtype for dtype in DTYPES if dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes")]
    for cell in cells:
        check_choice("cell", cell, (*CELLS, OTHERS))
    for dtype in dtypes:
        check_dtype(dtype)
    options = [(name, OPTIONS[name]) for name in (QUICK if quick else OPTIONS)]
    jobs = list(itertools.product(backends, cells, dtypes))
    results = []
    for backend, cell, dtype in progress(jobs) if progress else jobs:
        found = {}
        for check, option, (worst, detail) in _checks(backend, cell, dtype, options):
            if check not in found or not worst <= found[check].worst:
                found[check] = Result(backend.name, cell, dtype, check, worst, f"{option}: {detail}")
        results += found.values()
    return results


def _checks(backend, cell, dtype, options):
    """Every check of one backend, cell and dtype: (check, option, (worst, detail)); an error counts as wrong."""
    if cell == OTHERS:
        for name in OTHER_CASES:
            reference, repeat = _caught(lambda name=name: _check_other(name, backend, dtype), 2)
            yield "reference", name, reference
            yield "repeat", name, repeat
        return
    for name, option in options:
        given = name != "learned state"
        for ragged in (False, True):
            full = f"{name}, ragged" if ragged else name
            if dtype == "float64":
                yield (
                    "gradient",
                    full,
                    _caught(lambda r=ragged, o=option, g=given: check_gradient(cell, backend, r, g, **o)),
                )
            if dtype != "float64" or backend.name != "numpy":
                for label, more in _kernel_choices(backend, cell, dtype, option):
                    yield (
                        "reference",
                        full + label,
                        _caught(
                            lambda r=ragged, o=option | more, g=given: compare(cell, backend, dtype, 5, 3, r, g, **o)
                        ),
                    )
        yield "repeat", name, _caught(lambda o=option: check_repeat(cell, backend, dtype, **o))
        yield "ragged", name, _caught(lambda o=option: check_ragged(cell, backend, dtype, **o))
    large = {"I": 64, "H": 32, "bidirectional": True}  # all arrays of 128 KiB and more, in 16 bits, too
    if backend.name == "cpu" and dtype != "float64":
        yield "reference", "large", _caught(lambda: compare(cell, backend, dtype, 16, 64, **large))
    yield "pieces", "two layers", _caught(lambda: check_pieces(cell, backend, dtype))
    if not cell.startswith("rnn"):
        yield "gates", "no recurrent weights", _caught(lambda: check_gates(cell, backend, dtype))


def _kernel_choices(backend, cell, dtype, option):
    """(label, options) of what makes other kernels do the same."""
    if backend.name != "cuda":
        return [("", {})]
    choices = [(f", {schedule}", {"schedule": schedule}) for schedule in ("auto", "step")]
    if dtype == "float32":
        choices += [(f"{label}, tf32", more | {"precision": "tf32"}) for label, more in choices]
    refused = not CELLS[cell][1].keys().isdisjoint(("proj_size", "reset_after"))
    if dtype != "float64" and not refused and "hidden_size" not in option:
        choices.append((", grid", {"schedule": "grid", "H": 11}))  # units for more than one thread block
    return choices


def _caught(check, parts=1):
    """The check's result; an error of the library becomes a wrong one."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises must show in the table, with the other results
        wrong = float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())}"
        return wrong if parts == 1 else (wrong,) * parts
