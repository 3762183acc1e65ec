"""Linear layers: one with its own weight, and one that shares the table of an embedding."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .. import rng
from .._typing import Array, Backward
from ..backends.int8 import Int8Matrix
from ..backends.steps import LinearStep
from ..errors import check_flag, check_size
from ..gradients import adding
from ..module import Later, Module, backward_of, refuse_quantized
from ..per_sample.recording import recorded
from .common import check_features, check_gradient, rows_of, sizes_text
from .embedding import Embedding


class Linear(Module):
    """y = x W^T + b over the last axis, as ``torch.nn.Linear``.

    ``params`` holds ``weight`` (out_features, in_features) and ``bias`` (out_features,). Both start uniform in
    +-1/sqrt(in_features).

    A Linear takes no lengths, so padding in its input must be finite: NaN times a zero gradient is NaN in the weight's
    gradient. A ``Sequential`` that is called with lengths replaces such padding by zeros.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis of x and of y.
    bias : bool
        Whether b is added.
    backend, dtype, precision, seed
        As in ``Module``. None as seed draws one.

    Examples
    --------
    >>> layer = gpurnn.Linear(3, 5)
    >>> y, backward = layer.forward(np.ones((7, 2, 3), "float32"))
    >>> dx = backward(y)
    >>> y.shape, dx.shape
    ((7, 2, 5), (7, 2, 3))
    """

    in_features: int
    out_features: int
    bias: bool
    _records_terms = True
    _elsewhere = dict.fromkeys(
        ("activation", "nonlinearity"), "No layer applies one: write a Module that does; docs/models.md shows how"
    )

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: str = "auto",
        dtype: str = "float32",
        precision: str = "float32",
        seed: int | None = None,
    ) -> None:
        super().__init__(backend, dtype, seed, precision)
        self.in_features = check_size("in_features", in_features)
        self.out_features = check_size("out_features", out_features)
        self.bias = check_flag("bias", bias)
        shapes = {"weight": (self.out_features, self.in_features)} | ({"bias": (self.out_features,)} if bias else {})
        bound = 1 / math.sqrt(self.in_features)

        def uniform(name, shape):
            return rng.uniform(shape, -bound, bound, self.seed, rng.name_key(name), dtype=np.float64)

        self._declare({name: Later(shape, partial(uniform, name)) for name, shape in shapes.items()})

    def __call__(self, x: Array) -> Array:
        """The output alone, for inference.

        Parameters
        ----------
        x : Array
            (..., in_features), of the layer's dtype.

        Returns
        -------
        Array
            y (..., out_features), of the layer's dtype.

        Raises
        ------
        ShapeError, DtypeError
            x has another last axis, or is not of the layer's dtype.
        """
        return self._apply(check_features(self, x, self.in_features))

    def forward(self, x: Array, *, retain: bool = False) -> tuple[Array, Backward]:
        """The output and its backward, for training. Saves x by reference.

        Parameters
        ----------
        x : Array
            (..., in_features), of the layer's dtype.
        retain : bool
            Accepted by every layer; without effect here, where ``backward`` may always be called again.

        Returns
        -------
        y : Array
            (..., out_features).
        backward : callable
            ``backward(doutput)`` adds to ``grads`` and returns dx, of x's shape.

        Raises
        ------
        ShapeError, DtypeError
            As for a call. ``backward`` raises them for doutput, and RuntimeError if parameters have changed since.
        """
        check_flag("retain", retain)
        refuse_quantized(self, "forward")
        x = check_features(self, x, self.in_features)
        y = self._apply(x)
        shape, bias, table = y.shape, self.bias, self._table()
        versions, table_versions = self.versions(), table.versions()

        @backward_of(self)
        def backward(doutput):
            dy_steps = check_gradient(self, doutput, shape)
            dy = rows_of(dy_steps)
            self.check_versions(versions)
            table.check_versions(table_versions)
            if table._trains("weight") and not recorded(table, "weight", dy_steps, x):
                weight_grad = table.grads["weight"]
                with adding(weight_grad):
                    self.ops.accumulate_product(weight_grad, dy, rows_of(x))
            if bias and self._trains("bias") and not recorded(self, "bias", dy_steps):
                with adding(self.grads):
                    self.grads["bias"] += self.ops.sum_steps(dy)
            dx = self.xp.empty((len(dy), x.shape[-1]), self.dtype)
            self.ops.product(dy, self.ops.rounded(table.params["weight"], self.dtype), dx)
            return dx.reshape(x.shape)

        return y, backward

    def _step_parts(self):
        if type(self) not in (Linear, TiedLinear):
            return None
        weight = self._read() if self.quantized else self._table().params["weight"]
        return [LinearStep(weight, self.params["bias"] if self.bias else None)]

    def _apply(self, x):
        rows = rows_of(x)
        y = self.xp.empty((len(rows), self.out_features), self.compute_dtype)
        weight = self._read() if self.quantized else self._weight()
        if isinstance(weight, Int8Matrix):
            self.ops.int8_product(rows, weight, y)
        else:
            self.ops.product(rows, weight.astype(self.dtype, copy=False).T, y)
        if self.bias:
            y += self.params["bias"]
        return self.ops.rounded(y, self.dtype).reshape(*x.shape[:-1], self.out_features)

    def _read(self):
        """The quantized weight as the backend reads it."""
        return self._read_matrix("weight", self.ops.reads_int8(None, self.dtype))

    def _matrix_names(self):
        return [name for name, _ in self._own if name == "weight"]

    def _weight(self):
        return self.ops.rounded(self._table().params["weight"], self.dtype)

    def _table(self):
        """The layer that holds the ``weight`` used here."""
        return self

    def _sizes_text(self):
        return sizes_text(self, "in_features", "out_features", bias=True)


class TiedLinear(Linear):
    """An output layer whose weight is the table E of an embedding: y = x E^T + b.

    Press & Wolf, "Using the output embedding to improve language models", EACL 2017. The bias is the layer's own. The
    table stays the embedding's, in its state dictionary too, and its gradient is the sum of both uses. Both layers
    belong in one model. Backend and dtype are the embedding's.

    Start the table with a small ``std`` (``Embedding(..., std=0.1)``): as the weight of an output layer, numbers
    from N(0, 1) give logits so large that the softmax is nearly certain from the start.

    Parameters
    ----------
    embedding : Embedding
        Its table is the weight: x is (..., embedding_dim), y is (..., num_embeddings).
    bias : bool
        Whether b, (num_embeddings,), is added; it starts at zero.

    Raises
    ------
    TypeError
        ``embedding`` is no ``Embedding``.

    Examples
    --------
    >>> embedding = gpurnn.Embedding(65, 32, std=0.1)
    >>> output = gpurnn.TiedLinear(embedding)
    >>> output(np.ones((7, 2, 32), "float32")).shape
    (7, 2, 65)
    """

    embedding: Embedding
    in_features: int
    out_features: int
    bias: bool
    references: tuple[str, ...] = ("embedding",)

    def __init__(self, embedding: Embedding, bias: bool = True) -> None:
        if not isinstance(embedding, Embedding):
            raise TypeError(f"embedding: expected an Embedding, got {type(embedding).__name__}")
        Module.__init__(self, embedding.ops, embedding.dtype, embedding.seed)
        self.embedding = embedding
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = check_flag("bias", bias)
        if bias:
            self._declare({"bias": Later((self.out_features,), np.zeros)})

    def _table(self):
        return self.embedding
