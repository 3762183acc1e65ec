"""Dropout, with a new mask for every call or one for all timesteps of a sequence."""

from __future__ import annotations

from .. import shards
from .._typing import Array, Backward
from ..errors import ShapeError, check_flag, check_number, checked
from ..masks import check_steps
from ..module import Module, backward_of
from .common import check_gradient, sizes_text


class Dropout(Module):
    """In training mode, zeroes each element with probability ``rate`` and scales the rest by 1 / (1 - rate).

    A mask depends on (seed, name of the layer in its model, number of the call in training mode) alone: it is equal on
    every backend and does not depend on other draws. Every call in training mode draws a new mask, with and without
    ``forward``. Several calls therefore give the samples of Monte-Carlo dropout (Gal & Ghahramani, ICML 2016).
    ``random_state()`` holds the number of the call, so a resumed run draws what it would have drawn.

    Parameters
    ----------
    rate : float
        Probability from 0 to 1. May be set later, as may the two flags.
    variational : bool
        Draw one mask for each sequence and use it at every timestep (Gal & Ghahramani, NIPS 2016). x must then be
        (T, B, F).
    batch_first : bool
        Whether a variational layer takes (B, T, F) instead.
    backend, dtype, seed
        As in ``Module``. None as seed draws one.

    Examples
    --------
    >>> layer = gpurnn.Dropout(0.5, seed=1)
    >>> sorted(set(layer(np.ones(100, "float32")).tolist()))
    [0.0, 2.0]
    >>> layer.eval()(np.ones(3, "float32")).tolist()
    [1.0, 1.0, 1.0]
    """

    calls: int

    def __init__(
        self,
        rate: float,
        variational: bool = False,
        *,
        batch_first: bool = False,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        self.rate, self.variational, self.batch_first = rate, variational, batch_first

    @checked
    def rate(self, value):
        return check_number("rate", value, 0, 1)

    @checked
    def variational(self, value):
        return check_flag("variational", value)

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    def __call__(self, x: Array, *, reset: Array | None = None) -> Array:
        """The output alone. In training mode this draws a mask, as ``forward`` does.

        Parameters
        ----------
        x : Array
            Any shape, of the layer's dtype; (T, B, F) or (B, T, F) for a variational layer.
        reset : Array of bool, optional
            (T, B), or (B, T) with ``batch_first``, for a variational layer in training: a sequence begins at these
            timesteps, and has a mask of its own.

        Returns
        -------
        Array
            y, a fresh array of x's shape.

        Raises
        ------
        ShapeError, DtypeError
            x is not 3-D in a variational layer, or is not of the layer's dtype.
        """
        return self._apply(x, reset)[0]

    def forward(self, x: Array, *, reset: Array | None = None, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training.

        Parameters
        ----------
        x, reset : Array
            As for a call.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            A fresh array of x's shape.
        backward : callable
            ``backward(doutput)`` returns dx; it uses the mask of this forward.

        Raises
        ------
        ShapeError, DtypeError
            As for a call.
        """
        check_flag("retain", retain)
        y, scaled_mask = self._apply(x, reset)
        shape = y.shape

        @backward_of(self)
        def backward(doutput):
            dy = check_gradient(self, doutput, shape)
            return dy.copy() if scaled_mask is None else dy * scaled_mask

        return y, backward

    def _step_parts(self):
        return None if type(self) is not Dropout else []  # in inference it does nothing

    def _apply(self, x, reset):
        """y, and the mask times 1 / (1 - rate), or None where nothing is dropped."""
        x = self.ops.asfloat(x, self.dtype, "x")
        if not self.training or self.rate == 0:
            return x.copy(), None
        mask = self._variational_mask(x.shape, reset) if self.variational else self._drawn(x.shape)
        self.calls += 1
        scaled_mask = mask.astype(self.dtype)
        scaled_mask *= 0 if self.rate == 1 else 1 / (1 - self.rate)
        return x * scaled_mask, scaled_mask

    def _drawn(self, shape):
        axis = (1 - int(self.batch_first)) if self.variational else None
        return shards.dropout_mask(self.ops, tuple(shape), self.rate, self.seed, self.key, self.calls, axis)

    def _variational_mask(self, shape, reset):
        """A mask for x of this shape: one for each row, or for each sequence that begins in it."""
        if len(shape) != 3:
            raise ShapeError(f"x: variational dropout expects 3-D input with a time axis, got shape {shape}")
        time = 1 if self.batch_first else 0
        T, B = shape[time], shape[1 - time]
        if reset is None:
            return self._drawn([*shape[:time], 1, *shape[time + 1 :]])
        number = self.xp.cumsum(check_steps(self, reset, T, B, False, "reset"), axis=0)  # of the sequence in its row
        shape = (int(number.max()) + 1 if number.size else 1, B, shape[2])
        masks = shards.dropout_mask(self.ops, shape, self.rate, self.seed, self.key, self.calls, axis=1)
        mask = masks[number, self.xp.arange(B)]
        return mask.swapaxes(0, 1) if self.batch_first else mask

    def _sizes_text(self):
        return sizes_text(self, "rate", variational=False, batch_first=False)
