"""The layers without a time loop: Linear, Embedding, TiedLinear, Dropout, LayerNorm, BatchNorm, Pooling; and
Sequential, which joins layers.

``y = layer(x)`` keeps nothing; ``y, backward = layer.forward(x)`` and ``dx = backward(dy)`` are for training: parameter
gradients accumulate into ``layer.grads``. Whether Dropout and BatchNorm act as in training depends on ``train()`` and
``eval()`` alone.

Until ``backward``, Linear, TiedLinear and Embedding keep their input by reference: do not write to it before. So does a
Sequential that begins with one of them or with a recurrent layer. The other layers keep nothing of it, and no layer
keeps its output. ``backward`` may run again, and gives the same and adds to the gradients once more; in a Sequential
with a recurrent layer only after ``forward(x, retain=True)``, which every layer here takes.
"""

import math

import numpy as np

from . import rng
from .arrays import host_array, refuse_function
from .dtypes import upcast
from .errors import (
    DtypeError,
    ShapeError,
    check_choice,
    check_flag,
    check_number,
    check_shape,
    check_size,
    checked,
    refuse_unknown,
)
from .gradients import adding
from .masks import check_lengths, valid_steps
from .module import Module, check_unspent
from .recurrent import GRUCell, LSTMCell, RNNCell


def _rows(array):
    """(..., F) as (N, F); a view wherever the memory allows one."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _sum_rows(array):
    """(..., F) summed to (F,), in float64: NumPy adds rows one by one, and there may be T*B of them."""
    return _rows(array).sum(axis=0, dtype=np.float64)


def _mean_features(array):
    """(..., F) averaged to (..., 1), in float64 for the same reason: F may be the outermost axis in memory."""
    return array.mean(axis=-1, keepdims=True, dtype=np.float64).astype(array.dtype)


def _check_features(layer, x, features, name="x"):
    """``x`` as an array of the layer's dtype whose last axis is ``features``."""
    x = layer.ops.asfloat(x, layer.dtype, name)
    if x.ndim == 0 or x.shape[-1] != features:
        raise ShapeError(f"{name}: expected shape (..., {features}), got {x.shape}")
    return x


def _check_like(layer, dy, shape):
    dy = layer.ops.asfloat(dy, layer.dtype, "dy")
    check_shape("dy", dy, shape)
    return dy


class Linear(Module):
    """y = x W^T + b over the last axis; ``torch.nn.Linear``: weight (out, in), bias (out,), U(+-1/sqrt(in)) at first.

    x: (..., in_features) -> y: (..., out_features), of the layer's dtype. ``forward`` keeps x by reference. Linear
    knows no lengths: padding that it reads must be finite, as a NaN there times a zero derivative is NaN in the
    weight's gradient. A ``Sequential`` that is given lengths sees to that. Raises ShapeError, DtypeError.
    """

    def __init__(
        self, in_features, out_features, bias=True, *, backend="auto", dtype="float32", precision="float32", seed=None
    ):
        super().__init__(backend, dtype, seed, precision)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.bias = check_flag("bias", bias)
        shapes = {"weight": (self.out_features, self.in_features)} | ({"bias": (self.out_features,)} if bias else {})
        bound = 1 / math.sqrt(self.in_features)
        self._declare(
            {
                name: rng.uniform(shape, -bound, bound, self.seed, rng.name_key(name), dtype=np.float64)
                for name, shape in shapes.items()
            }
        )

    def __call__(self, x):
        return self._apply(_check_features(self, x, self.in_features))

    def forward(self, x, *, retain=False):
        check_flag("retain", retain)
        x = _check_features(self, x, self.in_features)
        y = self._apply(x)
        shape, bias, table = y.shape, self.bias, self._table()
        versions, table_versions = self.versions(), table.versions()

        def backward(dy):
            dy = _rows(_check_like(self, dy, shape))
            self.check_versions(versions)
            table.check_versions(table_versions)
            if table._trains("weight"):
                weight_grad = table.grads["weight"]
                with adding(weight_grad):
                    self.ops.accumulate_product(weight_grad, dy, _rows(x))
            if bias and self._trains("bias"):
                with adding(self.grads):
                    self.grads["bias"] += self.ops.sum_steps(dy)
            dx = self.xp.empty((len(dy), x.shape[-1]), self.dtype)
            self.ops.product(dy, table.params["weight"].astype(self.dtype, copy=False), dx)
            return dx.reshape(x.shape)

        return y, backward

    def _apply(self, x):
        rows = _rows(x)
        y = self.xp.empty((len(rows), self.out_features), self.compute_dtype)
        self.ops.product(rows, self._weight().T, y)
        if self.bias:
            y += self.params["bias"]
        return y.astype(self.dtype, copy=False).reshape(*x.shape[:-1], self.out_features)

    def _weight(self):
        return self._table().params["weight"].astype(self.dtype, copy=False)

    def _table(self):
        """The layer whose ``weight`` this one uses."""
        return self


class Embedding(Module):
    """Rows of a table by number; ``torch.nn.Embedding``: weight (num_embeddings, embedding_dim), N(0, std^2) at first.

    ids: integers of any shape, 0 .. num_embeddings - 1 -> (*shape, embedding_dim). padding_idx: a row that starts at
    zero and receives no gradient. ``backward`` returns None: numbers have no derivative; the gradient of the table is
    summed in a fixed order. ``forward`` keeps ids by reference. Raises DtypeError unless ids are integers, ValueError
    naming an id out of range.
    """

    def __init__(
        self, num_embeddings, embedding_dim, padding_idx=None, *, std=1.0, backend="auto", dtype="float32", seed=None
    ):
        super().__init__(backend, dtype, seed)
        self.num_embeddings = check_size("num_embeddings", num_embeddings)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        if padding_idx is not None:
            padding_idx = check_size("padding_idx", padding_idx, minimum=0)
            if padding_idx >= self.num_embeddings:
                raise ValueError(f"padding_idx should be below num_embeddings {num_embeddings}, got {padding_idx}")
        self.padding_idx = padding_idx
        shape = (self.num_embeddings, self.embedding_dim)
        weight = rng.normal(shape, self.seed, rng.name_key("weight"), dtype=np.float64) * check_number("std", std, 0)
        if padding_idx is not None:
            weight[padding_idx] = 0
        self._declare({"weight": weight})

    def __call__(self, ids):
        return self.params["weight"][self._check(ids)].astype(self.dtype, copy=False)

    def forward(self, ids, *, retain=False):
        check_flag("retain", retain)
        ids = self._check(ids)
        y = self.params["weight"][ids].astype(self.dtype, copy=False)
        shape, padding_idx, versions = y.shape, self.padding_idx, self.versions()

        def backward(dy):
            dy, index = _rows(_check_like(self, dy, shape)), ids.reshape(-1)
            self.check_versions(versions)
            if not self._trains("weight"):
                return
            if padding_idx is not None:
                counted = self.xp.flatnonzero(index != padding_idx)
                dy, index = dy[counted], index[counted]
            with adding(self.grads["weight"]):  # a tied layer adds to it, too
                self.ops.accumulate_rows(self.grads["weight"], index, dy)

        return y, backward

    def _check(self, ids, name="ids"):
        ids = self.ops.asarray(ids, name)
        if ids.dtype.kind not in "iu":
            raise DtypeError(f"{name}: expected integers, got {ids.dtype}")
        if ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.num_embeddings:
                wrong = low if low < 0 else high
                raise ValueError(f"{name}: expected numbers from 0 to {self.num_embeddings - 1}, got {wrong}")
        return ids


class TiedLinear(Linear):
    """An output layer whose weight is the table of an embedding: y = x E^T + b, with a bias of its own.

    Press & Wolf, "Using the output embedding to improve language models", EACL 2017. x: (..., embedding_dim) ->
    y: (..., num_embeddings). The table stays the embedding's, in its state dictionary too; its gradient is the sum of
    both uses. Both layers belong into one model. Backend and dtype are the embedding's. Start the table small
    (``Embedding(..., std=0.1)``): as an output layer, N(0, 1) makes very sure of itself.
    """

    def __init__(self, embedding, bias=True):
        if not isinstance(embedding, Embedding):
            raise TypeError(f"embedding: expected an Embedding, got {type(embedding).__name__}")
        Module.__init__(self, embedding.ops, embedding.dtype, embedding.seed)
        self.embedding = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = check_flag("bias", bias)
        if bias:
            self._declare({"bias": np.zeros(self.out_features)})

    def _table(self):
        return self.embedding


class Dropout(Module):
    """Zeroes each element with probability ``rate`` and scales the rest by 1 / (1 - rate), in training mode only.

    variational: one mask for each sequence, the same at every timestep (Gal & Ghahramani 2016), for x (T, B, F), or
    (B, T, F) with ``batch_first``; otherwise x may have any shape. Masks come from (seed, name in the model, number of
    the call in training mode): equal on every backend, and independent of what else was drawn. Every call in training
    mode draws a new one, with and without ``forward``: several give the samples of Monte-Carlo dropout (Gal &
    Ghahramani 2016). ``random_state()`` holds the number, so that a resumed run draws what it would have drawn.
    """

    def __init__(self, rate, variational=False, *, batch_first=False, backend="auto", dtype="float32", seed=None):
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

    def __call__(self, x):
        return self._apply(x)[0]

    def forward(self, x, *, retain=False):
        check_flag("retain", retain)
        y, scaled_mask = self._apply(x)
        shape = y.shape

        def backward(dy):
            dy = _check_like(self, dy, shape)
            return dy.copy() if scaled_mask is None else dy * scaled_mask

        return y, backward

    def _apply(self, x):
        """y, and the mask times 1 / (1 - rate), or None where nothing is dropped."""
        x = self.ops.asfloat(x, self.dtype, "x")
        if not self.training or self.rate == 0:
            return x.copy(), None
        shape = list(x.shape)
        if self.variational:
            if x.ndim != 3:
                raise ShapeError(f"x: variational dropout expects 3-D input with a time axis, got shape {x.shape}")
            shape[1 if self.batch_first else 0] = 1
        mask = self.ops.dropout_mask(tuple(shape), self.rate, self.seed, self.key, self.calls)
        self.calls += 1
        scaled_mask = mask.astype(self.dtype)
        scaled_mask *= 0 if self.rate == 1 else 1 / (1 - self.rate)
        return x * scaled_mask, scaled_mask


def _normalize(xp, x, mean, variance, eps):
    """(x - mean) / sqrt(variance + eps), and 1 / sqrt(variance + eps)."""
    inverse = (1 / xp.sqrt(variance + eps)).astype(x.dtype)
    return (x - mean) * inverse, inverse


class LayerNorm(Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis (Ba, Kiros, Hinton 2016); ``torch.nn.LayerNorm``.

    x: (..., features) -> y of the same shape. var is the biased variance. Padding must be finite, as for ``Linear``.
    """

    def __init__(self, features, eps=1e-5, bias=True, *, backend="auto", dtype="float32", seed=None):
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.eps = eps
        self.bias = check_flag("bias", bias)
        self._declare({"weight": np.ones(self.features)} | ({"bias": np.zeros(self.features)} if bias else {}))

    @checked
    def eps(self, value):
        return check_number("eps", value, 0)

    def __call__(self, x):
        return self.forward(x)[0]

    def forward(self, x, *, retain=False):
        check_flag("retain", retain)
        x, xp = upcast(_check_features(self, x, self.features)), self.xp
        mean = _mean_features(x)
        variance = _mean_features(xp.square(x - mean))
        normal, inverse = _normalize(xp, x, mean, variance, self.eps)
        y = normal * self.params["weight"]
        if self.bias:
            y += self.params["bias"]
        bias, versions = self.bias, self.versions()

        def backward(dy):
            dy = upcast(_check_like(self, dy, normal.shape))
            self.check_versions(versions)
            with adding(self.grads):
                if self._trains("weight"):
                    self.grads["weight"] += _sum_rows(dy * normal)
                if bias and self._trains("bias"):
                    self.grads["bias"] += _sum_rows(dy)
            d = dy * self.params["weight"]
            dx = (d - _mean_features(d) - normal * _mean_features(d * normal)) * inverse
            return dx.astype(self.dtype, copy=False)

        return y.astype(self.dtype, copy=False), backward


class BatchNorm(Module):
    """Batch normalisation of each feature over all valid steps (Ioffe & Szegedy 2015); ``torch.nn.BatchNorm1d``.

    x: (T, B, features) or (N, features) -> y of the same shape, zero at steps that are not valid. lengths: (B,), for a
    time-major 3-D x, or (B, T, F) with ``batch_first``; mask: boolean, of x's shape without the last axis.

    In training mode the statistics are the batch's, and ``forward`` (not calling) updates the buffers
    ``running_mean``, ``running_var`` (unbiased) by ``momentum`` and ``num_batches_tracked``; in evaluation mode the
    running ones are used. A batch whose statistics are not finite leaves the running ones as they are.
    Raises ValueError in training mode with fewer than 2 valid steps.
    """

    takes_lengths = True

    def __init__(
        self, features, eps=1e-5, momentum=0.1, affine=True, *, batch_first=False, backend="auto", dtype="float32",
        seed=None,
    ):  # fmt: skip
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.eps, self.momentum, self.batch_first = eps, momentum, batch_first
        self.affine = check_flag("affine", affine)
        if affine:
            self._declare({"weight": np.ones(self.features), "bias": np.zeros(self.features)})
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
        return check_number("momentum", value, 0, 1)

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    def __call__(self, x, lengths=None, mask=None):
        return self._apply(x, lengths, mask, update=False)[0]

    def forward(self, x, lengths=None, mask=None, *, retain=False):
        check_flag("retain", retain)
        y, normal, inverse, rows = self._apply(x, lengths, mask, update=True)
        shape, batch_statistics, affine, versions = y.shape, self.training, self.affine, self.versions()

        def backward(dy):
            d = upcast(self._gather(_rows(_check_like(self, dy, shape)), rows))
            self.check_versions(versions)
            if affine:
                with adding(self.grads):
                    if self._trains("weight"):
                        self.grads["weight"] += _sum_rows(d * normal)
                    if self._trains("bias"):
                        self.grads["bias"] += _sum_rows(d)
                d = d * self.params["weight"]
            if batch_statistics:
                d = d - self._mean(d) - normal * self._mean(d * normal)
            return self._scatter(d * inverse, rows, shape)

        return y, backward

    def _apply(self, x, lengths, mask, update):
        """y, the normalised valid rows (N, F), 1 / deviation, and the numbers of these rows (None for all)."""
        x, xp = _check_features(self, x, self.features), self.xp
        if x.ndim not in (2, 3):
            raise ShapeError(f"x: expected (T, B, {self.features}) or (N, {self.features}), got {x.shape}")
        rows = self._valid_rows(x, lengths, mask)
        valid = upcast(self._gather(_rows(x), rows))
        if self.training:
            count = len(valid)
            if count < 2:
                raise ValueError(f"x: batch statistics need at least 2 valid steps in training mode, got {count}")
            mean = self._mean(valid)
            variance = self._mean(xp.square(valid - mean))
            if update:
                good = xp.isfinite(mean).all() & xp.isfinite(variance).all()  # not waited for on a GPU
                for name, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
                    buffer = self.buffers[name]
                    buffer += self.momentum * xp.where(good, value - buffer, 0)
                self.buffers["num_batches_tracked"] += good
        else:
            mean, variance = self.buffers["running_mean"], self.buffers["running_var"]
        normal, inverse = _normalize(xp, valid, mean, variance, self.eps)
        y = normal * self.params["weight"] + self.params["bias"] if self.affine else normal.copy()
        return self._scatter(y, rows, x.shape), normal, inverse, rows

    def _mean(self, rows):
        return (_sum_rows(rows) / len(rows)).astype(self.compute_dtype)

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

    def _scatter(self, values, rows, shape):
        values = values.astype(self.dtype, copy=False)
        if rows is None:
            return values.reshape(shape)
        whole = self.xp.zeros((math.prod(shape[:-1]), shape[-1]), self.dtype)
        whole[rows] = values
        return whole.reshape(shape)


class Pooling(Module):
    """The steps of each sequence made into one vector, over valid steps only: x (T, B, features) -> (B, features).

    mode: "last": the last valid step; with ``directions=2`` the second half of the features, the reverse direction's,
    is the first step's instead, where that direction ends. "mean", "max": over the valid steps, of each feature.
    "attention": a weighted mean, the weights a softmax over the valid steps of ``query . tanh(W x + b)`` with a learned
    query (Yang et al., "Hierarchical attention networks for document classification", NAACL 2016, equations 5 to 7);
    ``attention_size`` is the query's, ``features`` where None. A sequence of length 0 gives zeros.

    lengths: (B,); steps past the end are not read, and their derivative is zero. With ``batch_first`` x is (B, T, F).
    Raises ShapeError, DtypeError, ValueError for another mode.
    """

    takes_lengths = True

    def __init__(
        self, features, mode="last", directions=1, attention_size=None, *, batch_first=False, backend="auto",
        dtype="float32", seed=None,
    ):  # fmt: skip
        super().__init__(backend, dtype, seed)
        self.features = check_size("features", features)
        self.mode = check_choice("mode", mode, ("last", "mean", "max", "attention"))
        self.directions = check_choice("directions", check_size("directions", directions), (1, 2))
        if self.features % self.directions:
            raise ValueError(f"features should be a multiple of directions {directions}, got {features}")
        self.batch_first = batch_first
        if mode == "attention":
            self.attention_size = (
                self.features if attention_size is None else check_size("attention_size", attention_size)
            )
            shapes = {"weight": (self.attention_size, self.features), "query": (self.attention_size,)}
            drawn = {
                name: rng.uniform(shape, -1, 1, self.seed, rng.name_key(name), dtype=np.float64) / math.sqrt(shape[-1])
                for name, shape in shapes.items()
            }
            self._declare({**drawn, "bias": np.zeros(self.attention_size)})

    @checked
    def batch_first(self, value):
        return check_flag("batch_first", value)

    def __call__(self, x, lengths=None):
        return self.forward(x, lengths)[0]

    def forward(self, x, lengths=None, *, retain=False):
        check_flag("retain", retain)
        x, xp = _check_features(self, x, self.features), self.xp
        if x.ndim != 3:
            raise ShapeError(f"x: expected (T, B, {self.features}), got {x.shape}")
        x = x.swapaxes(0, 1) if self.batch_first else x
        T, B, F = x.shape
        lengths = np.full(B, T) if lengths is None else check_lengths(lengths, T, B)
        if T == 0:
            y, turn = xp.zeros((B, F), self.compute_dtype), lambda dy: xp.zeros((0, B, F), self.compute_dtype)
        else:
            valid = valid_steps(lengths, T, B, xp)[:, :, None]
            y, turn = getattr(self, f"_{self.mode}")(upcast(x), valid, lengths)

        batch_first, versions = self.batch_first, self.versions()

        def backward(dy):
            dy = upcast(_check_like(self, dy, (B, F)))
            self.check_versions(versions)
            dx = turn(dy).astype(self.dtype, copy=False)
            return dx.swapaxes(0, 1) if batch_first else dx

        return y.astype(self.dtype, copy=False), backward

    # Each mode: x (T, B, F), valid (T, B, 1), lengths (B,) -> y (B, F), and the way back from dy to dx.

    def _last(self, x, valid, lengths):
        xp, B, cut = self.xp, x.shape[1], self.features // self.directions
        last, everyone = xp.asarray(np.maximum(lengths - 1, 0)), xp.arange(B)
        some = xp.asarray(lengths > 0)[:, None]
        y = xp.concatenate([x[last, everyone, :cut], x[0, :, cut:]], axis=1)

        def turn(dy):
            dx = xp.zeros(x.shape, x.dtype)
            dy = xp.where(some, dy, 0)
            dx[last, everyone, :cut] = dy[:, :cut]
            dx[0, :, cut:] = dy[:, cut:]
            return dx

        return xp.where(some, y, 0), turn

    def _mean(self, x, valid, lengths):
        xp = self.xp
        share = xp.asarray(1 / np.maximum(lengths, 1)).astype(x.dtype)[:, None]
        y = xp.where(valid, x, 0).sum(axis=0, dtype=np.float64).astype(x.dtype) * share
        return y, lambda dy: xp.where(valid, dy * share, 0)

    def _max(self, x, valid, lengths):
        xp = self.xp
        some = xp.asarray(lengths > 0)[:, None]
        highest = xp.where(valid, x, -np.inf).argmax(axis=0)  # (B, F), of equal ones the first
        T, B, F = x.shape
        y, steps = x[highest, xp.arange(B)[:, None], xp.arange(F)], xp.arange(T)[:, None, None]
        return xp.where(some, y, 0), lambda dy: xp.where((steps == highest) & valid, dy, 0)

    def _attention(self, x, valid, lengths):
        xp, (T, B, F), query = self.xp, x.shape, self.params["query"]
        x = xp.where(valid, x, 0)
        u = xp.empty((T * B, self.attention_size), x.dtype)
        self.ops.product(_rows(x), self.params["weight"].T, u)
        u = xp.tanh(u + self.params["bias"]).reshape(T, B, self.attention_size)
        score = xp.where(valid, (u * query).sum(axis=2, keepdims=True), -np.inf)  # (T, B, 1)
        highest = xp.where(xp.asarray(lengths > 0)[:, None], score.max(axis=0), 0)
        a = xp.exp(score - highest)
        a = a / xp.maximum(a.sum(axis=0), 1)  # the largest term is 1; a sequence of length 0 keeps zeros
        y = (a * x).sum(axis=0)

        def turn(dy):
            dy = xp.where(xp.asarray(lengths > 0)[:, None], dy, 0)
            da = (dy * x).sum(axis=2, keepdims=True)
            dscore = a * (da - (a * da).sum(axis=0))
            du = _rows(dscore * query * (1 - u * u))
            with adding(self.grads):
                if self._trains("query"):
                    self.grads["query"] += self.ops.sum_steps(_rows(dscore * u))
                if self._trains("bias"):
                    self.grads["bias"] += self.ops.sum_steps(du)
                if self._trains("weight"):
                    self.ops.accumulate_product(self.grads["weight"], du, _rows(x))
            dx = xp.empty((T * B, F), x.dtype)
            self.ops.product(du, self.params["weight"], dx)
            return dx.reshape(T, B, F) + a * dy

        return y, turn


_CALL = ("x", "state", "lengths")  # arguments of a model's call


def _axis_orders(layer):
    """``batch_first`` of every layer inside ``layer`` that knows the time axis."""
    for _, module in layer.modules() if isinstance(layer, Module) else ():
        if hasattr(module, "batch_first") and getattr(module, "variational", True):
            yield module.batch_first


def _reads_lengths(layer):
    """Whether a layer inside a Sequential is given the lengths. One that is made of layers without lengths is not: it
    could not know which axis is time, or whether there is one."""
    if isinstance(layer, Sequential):
        return any(map(_reads_lengths, layer))
    return getattr(layer, "takes_lengths", False)


class Sequential(Module):
    """Layers one behind the other, with one flat buffer for all parameters; passes recurrent state and lengths on.

    Sequential(layer, layer, ...) names them "0", "1", ...; Sequential({"rnn": layer, ...}) takes the given names. A
    layer placed twice shares its parameters. A layer belongs to one model: a second one built from it is refused.

    Without a stateful layer: ``y = seq(x)``, ``y, backward = seq.forward(x)``, ``dx = backward(dy)``.
    With one: ``y, state = seq(x, state=None, lengths=None)``, ``y, state, backward = seq.forward(x, state, lengths)``,
    ``dx, dstate = backward(dy, dstate=None)``; the state is a tuple with one entry for each stateful layer in order, or
    None for zeros. ``lengths`` goes to every layer that takes it; past them x and dy may hold anything, NaN too,
    whichever layers come first and last. ``backward`` may run more than once after ``forward(..., retain=True)``, and
    in any case where no layer is recurrent. Backend, dtype and batch_first are the layers' own; layers that know the
    time axis (recurrent, BatchNorm, Pooling, variational Dropout) should agree on it: ValueError.

    >>> model = gpurnn.Sequential(gpurnn.Embedding(65, 32), gpurnn.LSTM(32, 128), gpurnn.Linear(128, 65))
    """

    takes_lengths = True

    def __init__(self, *layers):
        if len(layers) == 1 and isinstance(layers[0], dict):
            named = layers[0]
        else:
            if len(layers) == 1 and isinstance(layers[0], (list, tuple)):
                raise TypeError(
                    f"Sequential: got a {type(layers[0]).__name__}. Give the layers one by one: Sequential(a, b)"
                )
            named = {str(number): layer for number, layer in enumerate(layers)}
        if not named:
            raise ValueError("Sequential needs at least one layer")
        name, first = next(iter(named.items()))
        if not isinstance(first, Module):
            raise TypeError(f"{name}: expected a gpurnn layer, got {type(first).__name__}")
        super().__init__(first.ops, first.dtype, first.seed)
        for name, layer in named.items():
            if isinstance(layer, (RNNCell, LSTMCell, GRUCell)):
                raise TypeError(f"{name}: {type(layer).__name__} has no sequence form; the whole layer has step() too")
        if len({order for layer in named.values() for order in _axis_orders(layer)}) > 1:
            raise ValueError(
                "batch_first: some of these layers take (T, B, F) and some (B, T, F); give it to all or none"
            )
        self._adopt(named)
        self.stateful = any(layer.stateful for layer in named.values())
        self.once = any(layer.once for layer in named.values())

    def __call__(self, x, state=None, lengths=None, **unknown):
        refuse_unknown("Sequential", unknown, _CALL)
        states, final, x = self._unpack(state), [], self._without_padding(x, lengths)
        for layer in self.children.values():
            x = layer(x, **self._context(layer, states, lengths))
            if layer.stateful:
                x, last = x
                final.append(last)
        return (x, tuple(final)) if self.stateful else x

    def forward(self, x, state=None, lengths=None, *, retain=False, **unknown):
        refuse_unknown("Sequential", unknown, (*_CALL, "retain"))
        check_flag("retain", retain)
        states, final, backwards, given = self._unpack(state), [], [], x
        x = self._without_padding(x, lengths)
        for layer in self.children.values():
            context = self._context(layer, states, lengths)
            if retain and layer.once:
                context["retain"] = True
            x, *last, layer_backward = layer.forward(x, **context)
            final += last
            backwards.append((layer.stateful, layer_backward))

        then, versions, spent = self._as_now(), self.versions(), []
        shape, ends = x.shape, self._ends_behind(given, x, lengths)

        def check(dstate, name="dstate"):
            """``dstate`` for each stateful layer; raises, before a layer adds to its gradients, for one that none
            takes."""
            dstates = then._unpack(dstate, name)
            running = [layer_backward for stateful, layer_backward in backwards if stateful]
            for number, (layer_backward, part) in enumerate(zip(running, dstates, strict=True)):
                if hasattr(layer_backward, "check"):  # a layer of one's own may have none
                    layer_backward.check(part, f"{name}[{number}]")
            return dstates

        def backward(dy, dstate=None):
            dstates = check(dstate)
            then.check_versions(versions)  # before a layer adds to its gradients
            check_unspent(spent)
            if ends is not None:
                dy = then.ops.asarray(dy, "dy")
                dy = then._zero_past_end(dy, ends) if dy.shape == shape else dy  # which the last layer refuses
            dinitial = []
            for stateful, layer_backward in reversed(backwards):
                if stateful:
                    dy, first = layer_backward(dy, dstates.pop())
                    dinitial.append(first)
                else:
                    dy = layer_backward(dy)
                if then.once and not retain and not spent:  # the last layer took dy
                    spent.append(True)
            return (dy, tuple(reversed(dinitial))) if then.stateful else dy

        backward.check = check
        return (x, tuple(final), backward) if self.stateful else (x, backward)

    def step(self, x, state=None):
        """One timestep for streaming: the input of one step -> (output, state)."""
        states, final = self._unpack(state), []
        for layer in self.children.values():
            if layer.stateful:
                x, last = layer.step(x, states.pop(0))
                final.append(last)
            else:
                x = layer(x)
        return x, tuple(final)

    def _without_padding(self, x, lengths):
        """``x`` as the first layer may read it. One that takes no lengths would carry what stands past a sequence's
        end, which may be NaN, into the gradient of its weights: it is given zeros there."""
        if lengths is None or _reads_lengths(self[0]):
            return x
        x = self.ops.asarray(x, "x")
        if x.dtype.kind in "iub" or x.ndim not in (2, 3):
            return x
        return self._zero_past_end(x, lengths)

    def _ends_behind(self, x, y, lengths):
        """``lengths`` where a last layer that takes none gives a y for each step of x, else None. It would carry the
        derivatives that stand past a sequence's end into the gradient of its weights: it is given zeros there."""
        if lengths is None or _reads_lengths(self[-1]):
            return None
        x = self.ops.asarray(x, "x")
        steps = x.shape if x.dtype.kind in "iu" else x.shape[:-1]
        return host_array(lengths, "lengths").copy() if steps == y.shape[:-1] and y.ndim in (2, 3) else None

    def _zero_past_end(self, x, lengths):
        """A copy of x (T, B, F), with ``batch_first`` (B, T, F), or (T, F), zero past the end of each sequence."""
        x = x.copy()
        steps = x[:, None] if x.ndim == 2 else x.swapaxes(0, 1) if True in _axis_orders(self) else x
        given = [lengths] if x.ndim == 2 and np.ndim(lengths) == 0 else lengths
        self.ops.zero_past_end(steps, check_lengths(given, *steps.shape[:2]))
        return x

    def _context(self, layer, states, lengths):
        """What a layer's call takes besides x; a stateful layer's state is taken from the front of ``states``."""
        context = {"state": states.pop(0)} if layer.stateful else {}
        if lengths is not None and _reads_lengths(layer):
            context["lengths"] = lengths
        return context

    def _unpack(self, state, name="state"):
        """A list with one entry for each stateful layer; raises ShapeError for another number of them."""
        count = sum(layer.stateful for layer in self.children.values())
        if state is None:
            return [None] * count
        refuse_function(name, state)
        if not isinstance(state, (tuple, list)) or len(state) != count:
            got = f"{len(state)} entries" if isinstance(state, (tuple, list)) else type(state).__name__
            raise ShapeError(f"{name}: expected a tuple with one entry for each of {count} stateful layers, got {got}")
        return list(state)

    def __getitem__(self, key):
        return self.children[key] if isinstance(key, str) else list(self.children.values())[key]

    def __len__(self):
        return len(self.children)

    def __iter__(self):
        return iter(self.children.values())
