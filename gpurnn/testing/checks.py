"""The four checks: each raises AssertionError where a layer is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._typing import Array, Backend
from ..module import Module
from .allowed import count_terms, equal_bits, worst_error
from .call import Call
from .differences import gradient_error
from .nested import draw_like, leaves
from .ragged import ragged_error


def check_gradients(layer: Module | Callable[..., Any], *inputs: Any, seed: int = 0, **options: Any) -> float:
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
    >>> from gpurnn.testing import check_gradients
    >>> layer = gpurnn.GRU(3, 5, backend="numpy", dtype="float64", seed=1)
    >>> x, h = np.random.default_rng(0).normal(size=(6, 2, 3)), np.ones((1, 2, 5))
    >>> check_gradients(layer, x, h, lengths=[6, 4]) <= 1
    True
    >>> check_gradients(lambda x: (x**2, lambda dy: 3 * x * dy), x)
    Traceback (most recent call last):
    AssertionError: x: the derivative along a random direction is ...
    """
    return _demand(*gradient_error(layer, inputs, seed, **options))


def check_gradient(layer: Module | Callable[..., Any], *inputs: Any, seed: int = 0, **options: Any) -> float:
    """The old name of ``check_gradients``."""
    warnings.warn("check_gradient is now called check_gradients", DeprecationWarning, stacklevel=2)
    return check_gradients(layer, *inputs, seed=seed, **options)


def check_parity(
    make: Callable[[Any, str], Module],
    *inputs: Any,
    backend: str | Backend = "cpu",
    dtype: str = "float32",
    reference: Callable[..., Any] | None = None,
    terms: int | None = None,
    seed: int = 0,
    **options: Any,
) -> float:
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
    calls = [Call(one, inputs, options) for one in (layer, plain, exact)]
    doutputs = draw_like(calls[2].outputs(), np.random.default_rng(seed))
    got, usual, expected = (call.run(doutputs) for call in calls)
    if terms is None:
        terms = count_terms(layer, max([np.shape(part)[0] for part in leaves(inputs) if np.ndim(part)], default=1))
    share = 0.0
    if reference is not None:
        right = Call(reference, inputs, options).run(doutputs)
        share = _demand(*worst_error(expected, None, right, "float64", terms))
    says_nothing = layer.dtype == np.float64 or layer.ops.name == "numpy"
    return max(share, _demand(*worst_error(got, usual, expected, layer.dtype.name, terms if says_nothing else None)))


def check_repeat(layer: Module | Callable[..., Any], *inputs: Any, seed: int = 0, **options: Any) -> float:
    """Run a layer forward and backward twice and compare the bits of all outputs and gradients.

    Parameters
    ----------
    layer : Module or function
        As for ``check_gradients``, in any dtype; dropout draws the same masks in both runs.
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
    call = Call(layer, inputs, options)
    doutputs = draw_like(call.outputs(), np.random.default_rng(seed))
    return _demand(*equal_bits(call.run(doutputs), call.run(doutputs)))


def check_ragged(
    layer: Module, x: Array, lengths: Sequence[int] | Array, state: Any = None, terms: int | None = None, seed: int = 0
) -> float:
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
