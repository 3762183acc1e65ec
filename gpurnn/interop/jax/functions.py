"""lstm, gru, rnn and recurrent: functions of parameters and arrays, and the initial values of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import ArrayLike

from ...cells import Cell
from .call import call_layer, initial_params

Params = dict[str, jax.Array]


def lstm(
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Output and final state of a stack of LSTMs.

    Sizes, the number of layers and directions, biases, heads, a projection and a learned initial state are read from
    the parameters. Other options of ``gpurnn.LSTM`` are given to each call.

    Parameters
    ----------
    params : mapping
        Name -> array, as ``init_lstm`` and ``gpurnn.LSTM`` name them. Of the dtype of x, or float32 for x of 16 bits.
    x : Array
        (T, B, I), or (T, I) for one sequence; float32, float64, float16 or bfloat16.
    state : Array or pair of Arrays, optional
        Initial state: h (L*D, B, P) and c (L*D, B, H); without the B axis for one sequence. None: the learned one, or
        zeros.
    lengths : Array of int, optional
        (B,), each 0..T in any order.
    reset, mask : Array of bool, optional
        (T, B), as ``gpurnn.LSTM`` takes them.
    key : Array, optional
        A key of ``jax.random``, for dropout, zoneout and their like, which act only where there is one.
    **options
        As ``gpurnn.LSTM``, by name: ``layer_norm``, ``zoneout``, ``dropout``, ``batch_first``, ...

    Returns
    -------
    output : Array
        (T, B, D*P), or (T, D*P); zero past the end of a sequence.
    state : Array or pair of Arrays
        As ``state``, of the dtype of x, or of the state given.

    Raises
    ------
    ShapeError, DtypeError
        For arrays that do not fit. Lengths that only a compiled call knows raise an error of JAX.
    TypeError, ValueError
        For options that do not fit, or that have no form here: ``batch_norm``, ``backend="cuda"``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> params = gj.init_lstm(jax.random.key(0), 8, 16, num_layers=2, bidirectional=True)
    >>> output, (h, c) = jax.jit(gj.lstm)(params, jax.numpy.zeros((5, 3, 8)), lengths=jax.numpy.array([5, 0, 2]))
    >>> output.shape, h.shape
    ((5, 3, 32), (4, 3, 16))
    """
    return call_layer("LSTM", params, x, state, (lengths, reset, mask), key, options)


def gru(
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Output and final state of a stack of GRUs.

    Parameters
    ----------
    params, x, lengths, reset, mask, key :
        As ``lstm``.
    state : Array, optional
        Initial state, h (L*D, B, H), or (L*D, H) for one sequence.
    **options
        As ``gpurnn.GRU``, by name: ``reset_after``, ``layer_norm``, ...

    Returns
    -------
    output, state :
        As from ``lstm``.

    Raises
    ------
    ShapeError, DtypeError, TypeError, ValueError
        As ``lstm``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> params = gj.init_gru(jax.random.key(0), 8, 16)
    >>> gradients = jax.grad(lambda params: gj.gru(params, jax.numpy.ones((5, 3, 8)))[0].sum())(params)
    >>> gradients["weight_ih_l0"].shape
    (48, 8)
    """
    return call_layer("GRU", params, x, state, (lengths, reset, mask), key, options)


def rnn(
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Output and final state of a stack of plain RNNs.

    Parameters
    ----------
    params, x, lengths, reset, mask, key :
        As ``lstm``.
    state : Array, optional
        Initial state, h (L*D, B, H), or (L*D, H) for one sequence.
    **options
        As ``gpurnn.RNN``, by name: ``nonlinearity``, ``layer_norm``, ...

    Returns
    -------
    output, state :
        As from ``lstm``.

    Raises
    ------
    ShapeError, DtypeError, TypeError, ValueError
        As ``lstm``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> params = gj.init_rnn(jax.random.key(0), 8, 16)
    >>> output, h = jax.vmap(lambda x: gj.rnn(params, x, nonlinearity="relu"))(jax.numpy.zeros((3, 5, 8)))
    >>> output.shape, h.shape
    ((3, 5, 16), (3, 1, 16))
    """
    return call_layer("RNN", params, x, state, (lengths, reset, mask), key, options)


def recurrent(
    cell: Cell,
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: Any = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """Output and final state of a stack of any cell.

    Parameters
    ----------
    cell : TracedCell
        From the decorator ``gpurnn.cell``, or one of ``gpurnn.cells``.
    params, x, lengths, reset, mask, key :
        As ``lstm``.
    state : Array or tuple of Arrays, optional
        Initial state: an array for each state of the cell.
    **options
        As ``gpurnn.Recurrent``, by name.

    Returns
    -------
    output, state :
        As from ``lstm``.

    Raises
    ------
    ShapeError, DtypeError, TypeError, ValueError
        As ``lstm``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> params = gj.init_recurrent(gpurnn.cells.mingru, jax.random.key(0), 8, 16)
    >>> output, h = gj.recurrent(gpurnn.cells.mingru, params, jax.numpy.zeros((5, 3, 8)))
    >>> output.shape
    (5, 3, 16)
    """
    return call_layer("Recurrent", params, x, state, (lengths, reset, mask), key, {"cell": cell, **options})


def init_lstm(
    key: jax.Array, input_size: int, hidden_size: int, num_layers: int = 1, *, dtype: Any = "float32", **options: Any
) -> Params:
    """Initial values of the parameters for ``lstm``.

    Parameters
    ----------
    key : Array
        A key of ``jax.random``. The same key gives the same values.
    input_size, hidden_size, num_layers :
        As ``gpurnn.LSTM``.
    dtype : str or dtype
        Of the parameters. For x of 16 bits float32 is best: it is what they are trained in.
    **options
        As ``gpurnn.LSTM``, by name: ``bidirectional``, ``bias``, ``init``, ``forget_bias``, ...

    Returns
    -------
    dict
        Name -> array: ``weight_ih_l0`` (4H, I), ``weight_hh_l0`` (4H, H), ``bias_ih_l0`` and ``bias_hh_l0`` (4H,), ...

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.LSTM``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> params = gj.init_lstm(jax.random.key(0), 8, 16, forget_bias=1.0)
    >>> {name: array.shape for name, array in params.items()}
    {'weight_ih_l0': (64, 8), 'weight_hh_l0': (64, 16), 'bias_ih_l0': (64,), 'bias_hh_l0': (64,)}
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    return initial_params("LSTM", key, sizes | options, dtype)


def init_gru(
    key: jax.Array, input_size: int, hidden_size: int, num_layers: int = 1, *, dtype: Any = "float32", **options: Any
) -> Params:
    """Initial values of the parameters for ``gru``.

    Parameters
    ----------
    key, input_size, hidden_size, num_layers, dtype :
        As ``init_lstm``.
    **options
        As ``gpurnn.GRU``, by name.

    Returns
    -------
    dict
        Name -> array.

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.GRU``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> gj.init_gru(jax.random.key(0), 8, 16)["weight_hh_l0"].shape
    (48, 16)
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    return initial_params("GRU", key, sizes | options, dtype)


def init_rnn(
    key: jax.Array, input_size: int, hidden_size: int, num_layers: int = 1, *, dtype: Any = "float32", **options: Any
) -> Params:
    """Initial values of the parameters for ``rnn``.

    Parameters
    ----------
    key, input_size, hidden_size, num_layers, dtype :
        As ``init_lstm``.
    **options
        As ``gpurnn.RNN``, by name.

    Returns
    -------
    dict
        Name -> array.

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.RNN``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> gj.init_rnn(jax.random.key(0), 8, 16)["weight_hh_l0"].shape
    (16, 16)
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    return initial_params("RNN", key, sizes | options, dtype)


def init_recurrent(
    cell: Cell,
    key: jax.Array,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    *,
    dtype: Any = "float32",
    **options: Any,
) -> Params:
    """Initial values of the parameters for ``recurrent``.

    Parameters
    ----------
    cell : TracedCell
        As ``recurrent``.
    key, input_size, hidden_size, num_layers, dtype :
        As ``init_lstm``.
    **options
        As ``gpurnn.Recurrent``, by name.

    Returns
    -------
    dict
        Name -> array.

    Raises
    ------
    TypeError, ValueError
        As ``gpurnn.Recurrent``.

    Examples
    --------
    >>> import jax, gpurnn.interop.jax as gj
    >>> gj.init_recurrent(gpurnn.cells.mingru, jax.random.key(0), 8, 16)["weight_ih_l0"].shape
    (32, 8)
    """
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    return initial_params("Recurrent", key, {"cell": cell, **sizes, **options}, dtype)
