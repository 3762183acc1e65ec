"""Checks for layers of your own, the ones that ``gpurnn check`` and this library's tests use.

``check_gradient`` compares gradients with finite differences, ``check_parity`` a backend or a dtype with float64 on
NumPy, ``check_repeat`` the bits of two runs, ``check_ragged`` a ragged batch with its sequences one by one. Each
raises AssertionError with the array, its error and what is allowed, and returns the largest error as a share of what
is allowed: 1 or less.

A layer is a ``Module``, or any function that works as ``forward`` does: it takes arrays, and returns its outputs and
a function ``backward``, which takes the gradient with respect to each output and returns the gradient with respect to
each input. Inputs and outputs may be nested in tuples, as the state of an LSTM is. Inputs that are ``None`` or hold no
floating-point numbers (ids, lengths) have no gradient.

What is allowed follows from the size of one rounding, ``EPSILON`` of the dtype, from the number of terms in a sum, and
from the size of the numbers. Nothing is a tolerance that happened to be large enough.
"""

import inspect
import math

import numpy as np

from .dtypes import EPSILON
from .errors import DtypeError
from .module import Module

__all__ = ["check_gradient", "check_parity", "check_ragged", "check_repeat"]

LARGEST_SHARE = 2.0**-20  # of the slope: differences that are less certain than this check nothing


# ---- the public checks


def check_gradient(layer, *inputs, seed=0, **options):
    """Compare every gradient of a layer with finite differences in float64.

    All parameters and all floating-point inputs, the initial state among them, move together along one random
    direction, so that one derivative checks every number of every gradient. Where it is wrong, each array moves alone,
    and the message names the array that is off most. Frozen parameters do not move. Dropout draws the same masks in
    each call. The layer is left as it was.

    The loss along the direction, f(t), is the sum of all outputs times random weights. Its derivative is taken from
    central differences c(s) = (f(s) - f(-s)) / 2s at the steps s = h, 2h and 4h, extrapolated to
    (64 c(h) - 20 c(2h) + c(4h)) / 45. Allowed is the sum of

    - truncation: |d(h) - d(2h)| / 15 with d(s) = (4 c(s) - c(2s)) / 3, which is the leading error of d(h), and the
      extrapolation removes that;
    - rounding of f: one ``EPSILON["float64"]`` for each number that goes in, times the sum of the absolute terms of f,
      times 1.65 / h, the sum of the extrapolation's weights;
    - rounding of the analytic slope: the same share of the sum of its absolute terms.

    The step starts at EPSILON^(1/5), where the two errors of d(h) are alike for a function of scale 1, and is halved
    until truncation is below rounding; so a step that crosses the kink of a relu shrinks until it does not.

    Parameters
    ----------
    layer : Module with dtype float64, or function
        Called as ``layer.forward(*inputs, **options)``, or ``layer(*inputs, **options)`` where it has no ``forward``.
    *inputs : arrays (NumPy, float64), nested tuples of them, integers, or None
        Of any shape that the layer takes; a layer on a GPU gets them moved there.
    seed : int
        Of the random direction and weights.
    **options
        More arguments of the call, such as ``lengths``. With them the gradient with respect to the first output is zero
        past the end of each sequence, where no loss looks.

    Returns
    -------
    float
        The error as a share of what is allowed.

    Raises
    ------
    AssertionError
        Where a gradient is wrong, missing or of another shape than its input, and where differences say nothing: two
        equal calls differ, or there is no derivative.
    DtypeError
        Where the layer or an input is not float64.

    Examples
    --------
    >>> import numpy as np, gpurnn
    >>> from gpurnn.testing import check_gradient
    >>> layer = gpurnn.GRU(3, 5, backend="numpy", dtype="float64", seed=1)
    >>> x, h = np.random.default_rng(0).normal(size=(6, 2, 3)), np.ones((1, 2, 5))
    >>> check_gradient(layer, x, h, lengths=[6, 4]) <= 1
    True
    >>> check_gradient(lambda x: (x**2, lambda dy: 3 * x * dy), x)
    Traceback (most recent call last):
    AssertionError: x: the derivative along a random direction is ...
    """
    return _demand(*gradient_error(layer, inputs, seed, **options))


def check_parity(make, *inputs, backend="cpu", dtype="float32", reference=None, terms=None, seed=0, **options):
    """Compare a layer on one backend and dtype with the same layer in float64 on NumPy, and that with a function.

    Outputs and all gradients are compared. Allowed is twice the largest error of the plain implementation, which is
    the same layer on NumPy in the same dtype, plus two roundings, both as a share of an array's largest absolute value
    or of 1. Where the plain implementation says nothing, that is in float64 and on NumPy itself, one rounding is
    allowed for each of ``terms``.

    Parameters
    ----------
    make : function (backend, dtype) -> Module
        Builds the layer; all copies get the parameters of the first by ``load_state_dict``.
    *inputs : arrays (NumPy, float64), nested tuples of them, integers, or None
        Rounded to ``dtype`` where the layer reads them.
    backend, dtype : str or Ops, str
        Of the layer that is checked.
    reference : function, optional
        What is right: called with the float64 inputs and the options, it returns what ``forward`` does, or the outputs
        alone, which then are all that it is compared in. The layer in float64 on NumPy must equal it up to one
        rounding for each of ``terms``, and is then what the layer on ``backend`` is compared with.
    terms : int, optional
        Roundings, one after another, that float64 may add up; by default ``count_terms(layer, steps)`` with the
        longest leading axis of an input for the steps.
    seed : int
        Of the gradients with respect to the outputs.
    **options
        More arguments of the call.

    Returns
    -------
    float
        The largest error as a share of what is allowed.

    Raises
    ------
    AssertionError
        Where an array is off by more, or has another shape.
    BackendError
        Where a backend does not work here.

    Examples
    --------
    >>> import numpy as np, gpurnn
    >>> from gpurnn.testing import check_parity
    >>> def make(backend, dtype):
    ...     return gpurnn.Linear(3, 4, backend=backend, dtype=dtype, seed=1)
    >>> x = np.random.default_rng(0).normal(size=(6, 2, 3))
    >>> check_parity(make, x, backend="cpu", dtype="float32") <= 1
    True
    """
    layer, plain, exact = make(backend, dtype), make("numpy", dtype), make("numpy", "float64")
    for other in (plain, exact):
        other.load_state_dict(layer.state_dict())
    calls = [_Call(one, inputs, options) for one in (layer, plain, exact)]
    doutputs = draw_like(calls[2].outputs(), np.random.default_rng(seed))
    got, usual, expected = (call.run(doutputs) for call in calls)
    if terms is None:
        terms = count_terms(layer, max([np.shape(part)[0] for part in leaves(inputs) if np.ndim(part)], default=1))
    share = 0.0
    if reference is not None:
        right = _Call(reference, inputs, options).run(doutputs)
        share = _demand(*worst_error(expected, None, right, "float64", terms))
    says_nothing = layer.dtype == np.float64 or layer.ops.name == "numpy"
    return max(share, _demand(*worst_error(got, usual, expected, layer.dtype.name, terms if says_nothing else None)))


def check_repeat(layer, *inputs, seed=0, **options):
    """Run a layer forward and backward twice and compare the bits of all outputs and gradients.

    Parameters
    ----------
    layer : Module or function
        As for ``check_gradient``, in any dtype; dropout draws the same masks in both runs.
    *inputs : arrays, nested tuples of them, integers, or None
        Floating-point ones are rounded to the dtype of the layer.
    seed : int
        Of the gradients with respect to the outputs.
    **options
        More arguments of the call.

    Returns
    -------
    float
        0.0: there is no error that would be allowed.

    Raises
    ------
    AssertionError
        Names every array whose bits differ.

    Examples
    --------
    >>> import numpy as np, gpurnn
    >>> from gpurnn.testing import check_repeat
    >>> check_repeat(gpurnn.LSTM(3, 5, backend="cpu", seed=1), np.ones((6, 2, 3)))
    0.0
    """
    call = _Call(layer, inputs, options)
    doutputs = draw_like(call.outputs(), np.random.default_rng(seed))
    return _demand(*equal_bits(call.run(doutputs), call.run(doutputs)))


def check_ragged(layer, x, lengths, state=None, terms=None, seed=0):
    """Compare a ragged batch with each of its sequences alone, in evaluation mode.

    NaN lies in all that must not be read: in x and in the gradient with respect to the output past the end of each
    sequence, and in the initial state of a sequence without steps, which is also its final state. Output and dx past
    an end must be zero, and no gradient may be NaN. One rounding of the dtype is allowed for each of ``terms``, as a
    share of an array's largest absolute value or of 1. Gradients of the parameters are those of the sequences added
    up, with one rounding more for each sequence.

    Parameters
    ----------
    layer : Module
        Takes ``lengths`` by name; returns one output for each step or for each sequence.
    x : array (T, B, ...), or (B, T, ...) for a layer with ``batch_first``; float64 or integers
        Integers (ids) hold no NaN and are left as they are.
    lengths : B integers from 0 to T, in any order
    state : nested tuple of arrays (L D, B, H), float64, optional
        The initial state of a stateful layer.
    terms : int, optional
        Roundings, one after another; by default ``count_terms(layer, T)``.
    seed : int
        Of the gradients with respect to output and state.

    Returns
    -------
    float
        The largest error as a share of what is allowed.

    Raises
    ------
    AssertionError
        Names the array and the sequence.

    Examples
    --------
    >>> import numpy as np, gpurnn
    >>> from gpurnn.testing import check_ragged
    >>> layer = gpurnn.GRU(3, 5, bidirectional=True, backend="cpu", seed=1)
    >>> check_ragged(layer, np.random.default_rng(0).normal(size=(6, 3, 3)), [4, 0, 6]) <= 1
    True
    """
    return _demand(*ragged_error(layer, x, lengths, state, terms, seed))


def _demand(share, detail):
    if not share <= 1:
        raise AssertionError(detail)
    return share


# ---- nested arrays


def leaves(nested):
    """The arrays of a state, an input or an output, however it is nested; None holds none."""
    if isinstance(nested, (tuple, list)):
        return [leaf for part in nested for leaf in leaves(part)]
    return [] if nested is None else [nested]


def map_leaves(function, nested, *others):
    """``nested`` with ``function`` of each array, and of the arrays in the same places of ``others``."""
    if isinstance(nested, tuple):
        return tuple(map_leaves(function, *parts) for parts in zip(nested, *others, strict=True))
    return None if nested is None else function(nested, *others)


def draw_like(nested, rng):
    """Standard normal float64 numbers in the structure and the shapes of ``nested``."""
    return map_leaves(lambda array: rng.standard_normal(np.shape(array)), nested)


def named_leaves(name, nested):
    """Name -> array: the name alone for one array, with a number behind it for each array of a tuple."""
    if isinstance(nested, tuple):
        return {f"{name} {k}": leaf for k, leaf in enumerate(leaves(nested))}
    return {} if nested is None else {name: nested}


def _is_floating(array):
    # ml_dtypes' bfloat16 has kind V
    return hasattr(array, "dtype") and (array.dtype.kind == "f" or array.dtype.name == "bfloat16")


# ---- one call


class _Call:
    """A layer with the inputs and options of a call that is made again and again, always with the same dropout."""

    def __init__(self, layer, inputs, options):
        self.layer, self.inputs, self.options = layer, inputs, options
        self.forward = getattr(layer, "forward", layer)
        self.modules = [module for _, module in layer.modules()] if isinstance(layer, Module) else []
        self.calls = [module.calls for module in self.modules]
        self.buffers = [{name: array.copy() for name, array in module.buffers.items()} for module in self.modules]
        self.names = _names(self.forward, len(inputs))

    def restore(self):
        """Counters of random draws and running statistics as they were."""
        for module, calls, buffers in zip(self.modules, self.calls, self.buffers, strict=True):
            module.calls = calls
            for name, array in buffers.items():
                module.buffers[name][...] = array

    def move(self, nested):
        """Host arrays to where the layer is, in its dtype."""

        def one(array):
            if not self.modules:
                return array
            floating = _is_floating(np.asarray(array))
            return self.layer.xp.asarray(np.asarray(array).astype(self.layer.dtype) if floating else array)

        return map_leaves(one, nested)

    def host(self, array):
        if self.modules:
            array = self.layer.ops.to_numpy(array)
        return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)

    def call(self, inputs):
        """(outputs, backward or None) of one forward."""
        self.restore()
        results = self.forward(*(self.move(part) for part in inputs), **self.options)
        results = results if isinstance(results, tuple) else (results,)
        return (results[:-1], results[-1]) if callable(results[-1]) else (results, None)

    def outputs(self, inputs=None):
        """The outputs on the host, float64."""
        outputs, _ = self.call(self.inputs if inputs is None else inputs)
        self.restore()
        return map_leaves(self.host, outputs)

    def run(self, doutputs):
        """Name -> float64 host array: outputs, ``d`` + name of every input and parameter that has a gradient."""
        outputs, gradients = self.train(doutputs)
        names = ["output", "state"] if getattr(self.layer, "stateful", False) else ["output"]
        names += [f"output {k}" for k in range(len(names), len(outputs))]
        results = {}
        for name, output in zip(names, outputs, strict=True):
            results |= named_leaves(name, output)
        for name, gradient in gradients.items():
            results |= named_leaves(name, gradient)
        return results

    def train(self, doutputs):
        """``(outputs, {name: gradient})`` of forward and backward, nested like the inputs, on the host."""
        if self.modules:
            self.layer.zero_grad()
        outputs, backward = self.call(self.inputs)
        gradients = self._paired(backward(*(self.move(part) for part in doutputs))) if backward else {}
        gradients = {f"d{name}": map_leaves(self.host, gradient) for name, gradient in gradients.items()}
        if self.modules:
            gradients |= {f"d {name}": self.host(gradient) for name, gradient in self.layer.grads.items()}
        self.restore()
        return map_leaves(self.host, outputs), gradients  # outputs last: backward must not have changed them

    def _paired(self, returned):
        """Name of an input -> its gradient; AssertionError where one is missing or has another shape."""
        alone = len(self.inputs) == 1 and (isinstance(self.inputs[0], tuple) or not isinstance(returned, tuple))
        if alone or not isinstance(returned, tuple):
            returned = (returned,)
        found = {}
        for k, (name, given) in enumerate(zip(self.names, self.inputs, strict=True)):
            gradient = returned[k] if k < len(returned) else None
            if given is None and gradient is not None:
                found[name] = gradient  # with respect to what the layer takes for None, such as a state of zeros
            if not any(_is_floating(np.asarray(leaf)) for leaf in leaves(given)):
                continue
            shapes = [[getattr(leaf, "shape", ()) for leaf in leaves(part)] for part in (given, gradient)]
            if shapes[0] != shapes[1]:
                raise AssertionError(
                    f"d{name}: expected a gradient of shape {_shapes(shapes[0])}, got {_shapes(shapes[1])}"
                )
            found[name] = gradient
        return found


def _shapes(shapes):
    return ", ".join(map(str, shapes)) or "none"


def _names(function, count):
    """The names of the first ``count`` arguments of a function."""
    try:
        kinds = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        kinds = ()
    plain = [one.name for one in kinds if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [plain[k] if k < len(plain) else f"input {k}" for k in range(count)]


# ---- errors as a share of what is allowed; ``gpurnn check`` puts them into its table


def nan_is_worst(error):
    """An error as a float; one that is not a number is infinite, so that no other hides it."""
    return float("inf") if np.isnan(error) else float(error)


def count_terms(layer, steps):
    """Roundings, one after another, of a layer: one for each term of each product with a parameter, in each step.

    A weight (N, K) is multiplied in sums of K terms forward and of N backward, anything else counts once each way, and
    each parameter's gradient adds up one term a step. A layer without parameters counts as one of a single number.
    """
    shapes = [array.shape for array in layer.params.values()] or [()]
    return max(1, steps) * sum(sum(shape) + 1 if len(shape) > 1 else 2 for shape in shapes)


def allowed_rounding(value, dtype, terms):
    """What ``terms`` roundings in a dtype may add up to: a share of the largest absolute value of an array, or of 1."""
    return terms * EPSILON[dtype] * np.abs(value).max(initial=1)


def worst_error(got, plain, expected, dtype, terms):
    """``(share, detail)``: the largest error of the arrays in ``got`` as a share of what is allowed, and where.

    got, plain, expected: mappings name -> array, of the layer, of the plain implementation, and of float64. terms:
    roundings to allow where ``plain`` says nothing, else None: then twice its largest error and two roundings.
    """
    if terms is None:  # of all results together: a single number may happen to be exact
        usual = max(
            np.abs(plain[name] - value).max(initial=0) / np.abs(value).max(initial=1)
            for name, value in expected.items()
        )
        terms = 2 * usual / EPSILON[dtype] + 2
    worst, detail = 0.0, ""
    for name, value in expected.items():
        if np.shape(got[name]) != np.shape(value):
            return float("inf"), f"{name}: expected shape {np.shape(value)}, got {np.shape(got[name])}"
        allowed = allowed_rounding(value, dtype, terms)
        error = np.abs(got[name] - value).max(initial=0)
        share = nan_is_worst(error / allowed)
        if share > worst:
            worst, detail = share, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"
    return worst, detail


def equal_bits(first, second):
    """``(share, detail)``: 0 where the arrays of two mappings are equal, NaN to NaN, else infinity."""
    different = [name for name, value in first.items() if not np.array_equal(value, second[name], equal_nan=True)]
    return (float("inf"), f"two runs differ in {', '.join(different)}") if different else (0.0, "")


def results(layer, inputs, doutputs, **options):
    """Name -> float64 array on the host, of one forward and backward: outputs, ``d`` + name of every input, "d " + name
    of every parameter. Arrays of a tuple are numbered: "state 0"."""
    return _Call(layer, inputs, options).run(doutputs)


def gradient_error(layer, inputs, seed=0, **options):
    """``(share, detail)`` of ``check_gradient``."""
    for name, dtype in [("layer", getattr(layer, "dtype", np.dtype("float64")))] + [
        ("inputs", np.asarray(leaf).dtype) for leaf in leaves(inputs) if _is_floating(np.asarray(leaf))
    ]:
        if dtype != np.float64:
            raise DtypeError(f"{name}: expected float64, whose digits differences need, got {dtype}")
    call, rng = _Call(layer, inputs, options), np.random.default_rng(seed)
    doutputs = draw_like(call.outputs(), rng)
    if options.get("lengths") is not None:
        batch_first = any(getattr(module, "batch_first", False) for module in [layer, *call.modules])
        _clear_padding(doutputs, options["lengths"], batch_first)
    saved = (layer.flat_params.copy(), layer.flat_grads.copy()) if call.modules else None
    try:
        outputs, gradients = call.train(doutputs)
        return _Differences(call, outputs, gradients, doutputs, rng).worst()
    finally:
        if saved:
            layer.flat_params[...], layer.flat_grads[...] = saved
        call.restore()


def _clear_padding(doutputs, lengths, batch_first):
    """Set the gradient of the first output to zero past the end of each sequence, where no loss looks."""
    output = leaves(doutputs)[0]
    if output.ndim > 2:
        output = output if batch_first else output.swapaxes(0, 1)
        output[np.arange(output.shape[1]) >= np.asarray(lengths)[:, None]] = 0


class _Differences:
    """The loss of a call along random directions of its arrays, and the slopes that backward gave."""

    def __init__(self, call, outputs, gradients, doutputs, rng):
        self.call, self.doutputs, self.gradients = call, doutputs, gradients
        still = {f"d {name}" for name in getattr(call.layer, "frozen", ())}
        still |= {f"d{name}" for name, given in zip(call.names, call.inputs, strict=True) if given is None}
        gradients = {name: gradient for name, gradient in gradients.items() if name not in still}
        self.along = {name: draw_like(gradient, rng) for name, gradient in gradients.items()}
        self.params = {name: array.copy() for name, array in call.layer.params.items()} if call.modules else {}
        numbers = sum(leaf.size for direction in self.along.values() for leaf in leaves(direction))
        self.rounding = EPSILON["float64"] * numbers
        products = zip(leaves(outputs), leaves(doutputs), strict=True)
        self.size = sum(float(np.abs(y * d).sum()) for y, d in products)

    def worst(self):
        """``(share, detail)`` of all arrays together, or of the worst one where that is wrong."""
        share, detail = self._compare("all gradients", list(self.along))
        if share <= 1:
            return share, detail
        alone = [self._compare(name.removeprefix("d").removeprefix(" "), [name]) for name in self.along]
        return max([(share, detail), *alone], key=lambda found: (found in alone and found[0] > 1, found[0]))

    def _compare(self, label, names):
        products = [
            gradient * direction
            for name in names
            for gradient, direction in zip(leaves(self.gradients[name]), leaves(self.along[name]), strict=True)
        ]
        slope = sum(float(product.sum()) for product in products)
        sizes = sum(float(np.abs(product).sum()) for product in products)
        norm = math.sqrt(sum(float((product**2).sum()) for product in products))
        numeric, allowed = self._derivative(names)
        allowed += self.rounding * sizes
        detail = f"{label}: the derivative along a random direction is {slope:.10g}, by differences {numeric:.10g}"
        error = nan_is_worst(abs(numeric - slope))
        if not allowed <= LARGEST_SHARE * max(norm, self.size):
            return float("inf"), (
                f"{detail}, and these are off by up to {allowed:.3g}: equal calls differ, or there is no derivative"
            )
        share = nan_is_worst(error / allowed) if error else 0.0
        return share, f"{detail}: off by {error:.3g}, allowed {allowed:.3g}"

    def _derivative(self, names):
        """(derivative by differences, what it may be off by), at the step for which that is least."""
        central = {}

        def difference(step):
            if step not in central:
                central[step] = (self._loss(names, step) - self._loss(names, -step)) / (2 * step)
            return central[step]

        step, best = EPSILON["float64"] ** 0.2, (float("nan"), float("inf"))
        while step > EPSILON["float64"] ** 0.5:
            one, two, four = (difference(n * step) for n in (1, 2, 4))
            truncation = abs((4 * one - two) - (4 * two - four)) / 45
            rounding = 1.65 * self.rounding * self.size / step
            if truncation + rounding < best[1]:
                best = (64 * one - 20 * two + four) / 45, truncation + rounding
            if truncation <= rounding or rounding > best[1]:
                break
            step /= 2
        return best

    def _loss(self, names, step):
        """Of the arrays in ``names`` moved by ``step``."""
        call = self.call

        def moved(name, array):
            return map_leaves(lambda a, v: a + step * v, array, self.along[name]) if name in names else array

        for name, array in self.params.items():
            if f"d {name}" in names:
                call.layer.params[name][...] = array + step * call.layer.xp.asarray(self.along[f"d {name}"])
            else:
                call.layer.params[name][...] = array
        inputs = [moved(f"d{name}", given) for name, given in zip(call.names, call.inputs, strict=True)]
        products = zip(leaves(call.outputs(inputs)), leaves(self.doutputs), strict=True)
        return sum(float((y * d).sum()) for y, d in products)


def ragged_error(layer, x, lengths, state=None, terms=None, seed=0):
    """``(share, detail)`` of ``check_ragged``."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    axis = 0 if getattr(layer, "batch_first", False) else 1
    modes = [(module, module.training) for _, module in layer.modules()]
    layer.eval()
    try:
        return _Ragged(layer, np.array(x), lengths, state, axis, rng).worst(terms)
    finally:
        for module, training in modes:
            module.training = training


class _Ragged:
    """A ragged batch with NaN in its padding; ``axis`` is that of the sequences in x."""

    def __init__(self, layer, x, lengths, state, axis, rng):
        self.layer, self.lengths, self.axis, self.x = layer, lengths, axis, x
        outputs = _Call(layer, self._inputs(x, state), {"lengths": lengths}).outputs()
        self.doutputs = draw_like(outputs, rng)
        doutput = self.doutputs[0]
        self.stepwise = doutput.shape[:2] == x.shape[:2] and doutput.ndim >= min(x.ndim, 3)
        for b, length in enumerate(lengths):
            for array in (x,) * _is_floating(x) + (doutput,) * self.stepwise:
                np.moveaxis(array, axis, 0)[b, length:] = np.nan
        self.state = map_leaves(lambda part: np.where((lengths > 0)[:, None], part, np.nan), state)

    def _inputs(self, x, state):
        return (x, state) if self.layer.stateful else (x,)

    def worst(self, terms):
        layer, lengths = self.layer, self.lengths
        whole = _Call(layer, self._inputs(self.x, self.state), {"lengths": lengths}).run(self.doutputs)
        terms = count_terms(layer, self.x.shape[1 - self.axis]) if terms is None else terms
        broken = [name for name, value in self._used(whole).items() if not np.isfinite(value).all()]
        if broken:
            return float("inf"), f"padding reached {', '.join(broken)}"
        worst, detail = 0.0, ""
        sums = {name: np.zeros_like(value) for name, value in whole.items() if name.startswith("d ")}
        for b, length in enumerate(lengths):
            for name in ("output", "dx"):
                if name in whole and (name == "dx" or self.stepwise):
                    past = np.moveaxis(whole[name], self.axis, 0)[b, length:]
                    if past.any():  # NaN too
                        return float("inf"), f"{name} past the end of the sequence of length {length} is not zero"
            alone = self._alone(b, length)
            for name in sums:
                sums[name] += alone.pop(name)
            mine = {name: self._part(name, whole[name], b, length) for name in alone}
            if not length:  # the initial state, as it came
                for name in [name for name in alone if name.startswith("state") and np.isnan(alone[name]).all()]:
                    if np.isnan(mine[name]).all():
                        del alone[name]
            share, where = worst_error(mine, None, alone, layer.dtype.name, terms)
            if share > worst:
                worst, detail = share, f"sequence of length {length}, {where}"
        share, where = worst_error(whole, None, sums, layer.dtype.name, terms + len(lengths))
        return (worst, detail) if worst > 1 else max((worst, detail), (share, where))

    def _used(self, whole):
        """All results but the final states of sequences without steps."""
        some = self.lengths > 0
        return {name: value[:, some] if name.startswith("state") else value for name, value in whole.items()}

    def _alone(self, b, length):
        """The results of one sequence by itself."""
        doutput, *dstate = self.doutputs
        doutput = self._steps(doutput, b, length) if self.stepwise else doutput[b : b + 1]
        states = [map_leaves(lambda part: part[:, b : b + 1], part) for part in (self.state, *dstate)]
        inputs = self._inputs(self._steps(self.x, b, length), states[0])
        return _Call(self.layer, inputs, {}).run((doutput, *states[1:]))

    def _part(self, name, value, b, length):
        """What belongs to one sequence, of a result of the batch."""
        if name == "dx" or (name == "output" and self.stepwise):
            return self._steps(value, b, length)
        return value[b : b + 1] if name == "output" else value[:, b : b + 1]

    def _steps(self, array, b, length):
        return np.moveaxis(np.moveaxis(array, self.axis, 0)[b : b + 1, :length], 0, self.axis)
