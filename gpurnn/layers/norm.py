"""Normalization: over the features of each step (LayerNorm), and over the valid steps of a batch (BatchNorm)."""

from __future__ import annotations

import math

import numpy as np

from .. import shards
from .._typing import Array, Backward, Lengths
from ..dtypes import upcast
from ..errors import DtypeError, ShapeError, check_flag, check_number, check_shape, check_size, checked
from ..gradients import adding
from ..masks import valid_steps
from ..module import Later, Module, backward_of, need_values
from ..per_sample.recording import recorded, recording_of, refuse_mixing
from .common import check_features, check_gradient, mean_features, rows_of, sizes_text, sum_rows


def _normalize(xp, x, mean, variance, eps):
    """(x - mean) / sqrt(variance + eps), and 1 / sqrt(variance + eps)."""
    inverse = (1 / xp.sqrt(variance + eps)).astype(x.dtype)
    return (x - mean) * inverse, inverse


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, as ``torch.nn.LayerNorm``.

    Ba, Kiros, Hinton, "Layer normalization", 2016 (arXiv:1607.06450). var is the biased variance. ``params`` holds
    ``weight`` and ``bias``, both (features,), which start at 1 and 0. Padding must be finite, as for ``Linear``.

    Parameters
    ----------
    features : int
        Size of the last axis.
    eps : float
        Added to the variance, at least 0. May be set later.
    bias : bool
        Whether there is a bias.
    backend, dtype, seed
        As in ``Module``.

    Examples
    --------
    >>> layer = gpurnn.LayerNorm(2, eps=0.0)
    >>> layer(np.array([[1, 3], [5, 4]], "float32")).tolist()
    [[-1.0, 1.0], [1.0, -1.0]]
    """

    features: int
    bias: bool
    _records_terms = True

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.eps = eps
        self.bias = check_flag("bias", bias)
        shape = (self.features,)
        self._declare({"weight": Later(shape, np.ones)} | ({"bias": Later(shape, np.zeros)} if bias else {}))

    @checked
    def eps(self, value):
        return check_number("eps", value, 0)

    def __call__(self, x: Array) -> Array:
        """The output alone, for inference: y, of the shape and dtype of x (..., features). Raises as ``forward``."""
        return self.forward(x)[0]

    def forward(self, x: Array, *, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training.

        Parameters
        ----------
        x : Array
            (..., features), of the layer's dtype.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            A fresh array of x's shape.
        backward : callable
            ``backward(doutput)`` adds to ``grads`` and returns dx, of x's shape.

        Raises
        ------
        ShapeError, DtypeError
            x has another last axis, or is not of the layer's dtype.
        """
        check_flag("retain", retain)
        x, xp = upcast(check_features(self, x, self.features)), self.xp
        mean = mean_features(x)
        variance = mean_features(xp.square(x - mean))
        normal, inverse = _normalize(xp, x, mean, variance, self.eps)
        y = normal * self.params["weight"]
        if self.bias:
            y += self.params["bias"]
        bias, versions = self.bias, self.versions()

        @backward_of(self)
        def backward(doutput):
            dy = upcast(check_gradient(self, doutput, normal.shape))
            self.check_versions(versions)
            with adding(self.grads):
                if self._trains("weight") and not recorded(self, "weight", dy * normal):
                    self.grads["weight"] += sum_rows(dy * normal)
                if bias and self._trains("bias") and not recorded(self, "bias", dy):
                    self.grads["bias"] += sum_rows(dy)
            dnormal = dy * self.params["weight"]
            dx = (dnormal - mean_features(dnormal) - normal * mean_features(dnormal * normal)) * inverse
            return dx.astype(self.dtype, copy=False)

        return y.astype(self.dtype, copy=False), backward

    def _sizes_text(self):
        return sizes_text(self, "features", eps=1e-5, bias=True)


class BatchNorm(Module):
    """Batch normalization of each feature over all valid steps, as ``torch.nn.BatchNorm1d``.

    Ioffe & Szegedy, "Batch normalization", ICML 2015. In training mode the statistics are the batch's, and ``forward``
    (but not a call) moves the running ones towards them by ``momentum``. In evaluation mode the running statistics are
    used. A batch whose statistics are not finite leaves the running ones as they are.

    ``params`` holds ``weight`` and ``bias``, both (features,), which start at 1 and 0. ``buffers`` holds
    ``running_mean``, ``running_var`` (the unbiased variance) and ``num_batches_tracked``.

    Parameters
    ----------
    features : int
        Size of the last axis.
    eps : float
        Added to the variance, at least 0. May be set later, as may momentum and batch_first.
    momentum : float, optional
        From 0 to 1: the weight of the newest batch in the running statistics. None: they are the averages of all
        batches so far, each of which counts the same.
    affine : bool
        Whether there are a weight and a bias.
    batch_first : bool
        Whether a 3-D x is (B, T, features) instead of (T, B, features).
    backend, dtype, seed
        As in ``Module``.

    Examples
    --------
    >>> layer = gpurnn.BatchNorm(1)
    >>> y, backward = layer.forward(np.array([[[1.0]], [[3.0]], [[99.0]]], "float32"), lengths=[2])
    >>> y.round(2).ravel().tolist()                # the third step is padding
    [-1.0, 1.0, 0.0]
    """

    features: int
    affine: bool
    buffers: dict[str, Array]
    takes_lengths = True
    _records_terms = True

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        batch_first: bool = False,
        backend: str = "auto",
        dtype: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.eps, self.momentum, self.batch_first = eps, momentum, batch_first
        self.affine = check_flag("affine", affine)
        shape = (self.features,)
        if affine:
            self._declare({"weight": Later(shape, np.ones), "bias": Later(shape, np.zeros)})
        need_values(shape, shape, ())  # these do not depend on it, but they count
        self.buffers = {
            "running_mean": self.xp.zeros(self.features, self.compute_dtype),
            "running_var": self.xp.ones(self.features, self.compute_dtype),
            "num_batches_tracked": self.xp.zeros((), np.int64),
        }

    @checked
    def eps(self, value):
        return check_number("eps", value, 0)

    @checked
    def momentum(self, value):
        return None if value is None else check_number("momentum", value, 0, 1)

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    def __call__(self, x: Array, lengths: Lengths = None, mask: Array | None = None) -> Array:
        """The output alone. The running statistics stay as they are, in training mode too.

        Arguments, result and errors are those of ``forward``.
        """
        return self._apply(x, lengths, mask, update=False)[0]

    def forward(
        self, x: Array, lengths: Lengths = None, mask: Array | None = None, *, retain: bool = False
    ) -> tuple[Array, Backward]:
        """The output and its backward, for training. In training mode this updates the running statistics.

        Parameters
        ----------
        x : Array
            (T, B, features), or (B, T, features) with ``batch_first``, or (N, features); of the layer's dtype.
        lengths : Lengths
            (B,) integers, for a 3-D x: the valid steps of each sequence.
        mask : Array, optional
            Booleans of x's shape without the last axis: True where a step is valid. With lengths, both must hold.
        retain : bool
            Accepted by every layer; without effect here.

        Returns
        -------
        y : Array
            Of x's shape, zero at steps that are not valid.
        backward : callable
            ``backward(doutput)`` adds to ``grads`` and returns dx, zero at steps that are not valid.

        Raises
        ------
        ShapeError, DtypeError
            An argument has another shape or dtype.
        ValueError
            In training mode there are fewer than 2 valid steps.
        """
        check_flag("retain", retain)
        y, normal, inverse, rows = self._apply(x, lengths, mask, update=True)
        shape, batch_statistics, affine, versions = y.shape, self.training, self.affine, self.versions()

        @backward_of(self)
        def backward(doutput):
            dvalid = upcast(self._gather(rows_of(check_gradient(self, doutput, shape)), rows))
            self.check_versions(versions)
            if batch_statistics:
                refuse_mixing(self)
            dnormal, recording = dvalid, recording_of(self)
            if affine:
                with adding(self.grads):
                    for name in filter(self._trains, ("weight", "bias")):
                        d = dvalid * normal if name == "weight" else dvalid
                        if recording is None:
                            self.grads[name] += sum_rows(d)
                        else:
                            recording.add_any(self, name, self._scatter(d, rows, shape, d.dtype))
                dnormal = dvalid * self.params["weight"]
            if batch_statistics:
                count = shards.counted(self.xp, len(dnormal))
                dnormal = dnormal - self._mean(dnormal, count) - normal * self._mean(dnormal * normal, count)
            return self._scatter(dnormal * inverse, rows, shape, self.dtype)

        return y, backward

    def _apply(self, x, lengths, mask, update):
        """y, the normalized valid rows (N, F), 1 / deviation, and the indices of these rows (None for all)."""
        x, xp = check_features(self, x, self.features), self.xp
        if x.ndim not in (2, 3):
            raise ShapeError(f"x: expected (T, B, {self.features}) or (N, {self.features}), got {x.shape}")
        rows = self._valid_rows(x, lengths, mask)
        valid = upcast(self._gather(rows_of(x), rows))
        if self.training:
            count = shards.counted(xp, len(valid))
            if count < 2:
                raise ValueError(f"x: batch statistics need at least 2 valid steps in training mode, got {count}")
            mean = self._mean(valid, count)
            variance = self._mean(xp.square(valid - mean), count)
            if update:
                self._update_statistics(mean, variance, count)
        else:
            mean, variance = self.buffers["running_mean"], self.buffers["running_var"]
        normal, inverse = _normalize(xp, valid, mean, variance, self.eps)
        y = normal * self.params["weight"] + self.params["bias"] if self.affine else normal.copy()
        return self._scatter(y, rows, x.shape, self.dtype), normal, inverse, rows

    def _update_statistics(self, mean, variance, count):
        """Move the running statistics towards those of a batch of ``count`` steps, if these are finite."""
        xp = self.xp
        finite = xp.isfinite(mean).all() & xp.isfinite(variance).all()  # stays on the GPU: nothing waits for it
        weight = self.momentum
        if weight is None:  # of the n-th batch, 1 / n
            weight = (1 / (self.buffers["num_batches_tracked"] + 1)).astype(self.compute_dtype)
        for name, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
            buffer = self.buffers[name]
            buffer += weight * xp.where(finite, value - buffer, 0)
        self.buffers["num_batches_tracked"] += finite

    def _mean(self, rows, count):
        return (shards.added(self.xp, sum_rows(rows)) / count).astype(self.compute_dtype)

    def _valid_rows(self, x, lengths, mask):
        valid = None
        if lengths is not None:
            if x.ndim != 3:
                raise ShapeError(f"lengths: need a 3-D x with a time axis, got x of shape {x.shape}")
            T, B = (x.shape[1], x.shape[0]) if self.batch_first else x.shape[:2]
            valid = valid_steps(lengths, T, B, self.xp)
            valid = valid.T if self.batch_first else valid
        if mask is not None:
            mask = self.ops.asarray(mask, "mask")
            if mask.dtype != bool:
                raise DtypeError(f"mask: expected booleans, got {mask.dtype}")
            check_shape("mask", mask, x.shape[:-1])
            valid = mask if valid is None else valid & mask
        return None if valid is None else self.xp.flatnonzero(valid)

    def _gather(self, array, rows):
        return array if rows is None else array[rows]

    def _scatter(self, values, rows, shape, dtype):
        """``values`` at ``rows`` of an array of ``shape`` and ``dtype`` that is zero elsewhere."""
        values = values.astype(dtype, copy=False)
        if rows is None:
            return values.reshape(shape)
        whole = self.xp.zeros((math.prod(shape[:-1]), shape[-1]), dtype)
        whole[rows] = values
        return whole.reshape(shape)

    def _sizes_text(self):
        return sizes_text(self, "features", eps=1e-5, momentum=0.1, affine=True, batch_first=False)
