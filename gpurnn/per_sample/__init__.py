"""The gradients of each sequence of a batch apart: their norms, they themselves, and their clipped sum."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .._typing import Array
from ..errors import ShapeError, check_flag, check_number
from . import terms
from .recording import Recording, active

__all__ = ["PerSampleGradients", "per_sample_gradients"]


class PerSampleGradients:
    """The gradients of a backward pass for each of its B sequences, from ``per_sample_gradients``.

    What is recorded are the factors of each weight's gradient, (T, B, ...), not the gradients, which would take B times
    the memory of the parameters. Frozen parameters have none.
    """

    def __init__(self, model: Any, recording: Any) -> None:
        self._model, self._recording = model, recording
        frozen = set(model.frozen)
        self._shapes = {name: array.shape for name, array in model.params.items() if name not in frozen}

    @property
    def count(self) -> int:
        """B. Raises RuntimeError before a backward pass has run."""
        if self._recording.count is None:
            raise RuntimeError("per-sample gradients: no backward pass of the model ran inside the with block")
        return self._recording.count

    def norms(self) -> Array:
        """The norm of the gradient of all parameters together, for each sequence.

        Returns
        -------
        Array
            (B,), float64, on the model's backend.
        """
        return self._model.xp.sqrt(sum(self._squares().values(), self._model.xp.zeros(self.count)))

    def norms_by_name(self) -> dict[str, Array]:
        """The norms of the gradient of each parameter: name -> (B,), float64."""
        return {name: self._model.xp.sqrt(squares) for name, squares in self._squares().items()}

    def gradients(self) -> dict[str, Array]:
        """The gradients themselves: name -> (B, *shape of the parameter), of the model's ``compute_dtype``.

        They take B times the memory of the parameters; ``norms`` and ``add_clipped`` do not make them.
        """
        ops, found, B = self._model.ops, self._recording.terms, self.count
        return {
            name: terms.gradients(ops, self._rows(name), found[name]).reshape(B, *shape)
            if name in found
            else ops.xp.zeros((B, *shape), self._model.compute_dtype)
            for name, shape in self._shapes.items()
        }

    def add(self, factors: Array | None = None) -> None:
        """Add the sum of all sequences' gradients, each times its factor, to the model's ``grads``.

        No backward pass of the model may run in another thread meanwhile.

        Parameters
        ----------
        factors : Array, optional
            (B,) numbers; None for ones.

        Raises
        ------
        ShapeError
            For another shape.
        """
        model, B = self._model, self.count
        factors = model.xp.ones(B) if factors is None else model.ops.asarray(factors, "factors")
        if factors.shape != (B,):
            raise ShapeError(f"factors: expected one for each of {B} sequences, shape ({B},), got {factors.shape}")
        factors = factors.astype(model.compute_dtype)
        for name, recorded in self._recording.terms.items():
            grad = model.grads[name]
            terms.add_weighted(model.ops, grad.reshape(self._rows(name)), recorded, factors)

    def add_clipped(self, max_norm: float) -> Array:
        """Scale each sequence's gradient down to the norm ``max_norm``, and add their sum to the model's ``grads``.

        That is the sum of DP-SGD before its noise (Abadi et al., "Deep learning with differential privacy", CCS 2016):
        no sequence changes it by more than ``max_norm``. No gradient of a single sequence is made: the factors of the
        gradients are scaled.

        Parameters
        ----------
        max_norm : float
            Above 0. A norm of all parameters together.

        Returns
        -------
        Array
            The norms before, (B,), float64. A gradient whose norm is not finite makes the sum NaN, as without clipping.
        """
        max_norm, norms = check_number("max_norm", max_norm, 0, low_open=True), self.norms()
        self.add(max_norm / self._model.xp.maximum(norms, max_norm))
        return norms

    def _squares(self):
        """Name -> the squared norms (B,)."""
        ops, found, B = self._model.ops, self._recording.terms, self.count
        return {
            name: terms.squared_norms(ops, self._rows(name), found[name]) if name in found else ops.xp.zeros(B)
            for name in self._shapes
        }

    def _rows(self, name):
        """The shape of a parameter as terms count its rows: with heads those of all heads in one axis."""
        shape = self._shapes[name]
        return (shape[0] * shape[1], *shape[2:]) if name in self._recording.with_heads else shape


@contextlib.contextmanager
def per_sample_gradients(model: Any, *, batch_first: bool | None = None) -> Iterator[PerSampleGradients]:
    """Record the gradients of each sequence in the backward pass inside the ``with`` block.

    Such a backward pass returns what it always does, and leaves the ``grads`` of the model as they are. Several of them
    add up, sequence by sequence, such as those of the segments of truncated back-propagation. Only this thread records.

    The gradient of a sequence is that of its part of the loss: give losses ``reduction="sum"``. With "mean" each is
    divided by what the mean divides by.

    Parameters
    ----------
    model : Module
        A layer or a model. Its parameters must be in recurrent layers, ``Linear``, ``TiedLinear``, ``Embedding``,
        ``LayerNorm``, ``BatchNorm``, ``Pooling`` or ``Attention``, or be frozen.
    batch_first : bool, optional
        Whether arrays of three and more axes begin with that of the sequences, for layers without such an argument.
        None: as the layers in the model that have it. Arrays of two axes always do.

    Yields
    ------
    PerSampleGradients
        Of use from the end of the backward pass on, also behind the block.

    Raises
    ------
    TypeError
        For a layer with trained parameters of another kind.
    ValueError
        From the backward pass, for batch normalization in training mode: no sequence has a gradient of its own there.

    Examples
    --------
    >>> model = gpurnn.Sequential(gpurnn.LSTM(3, 8), gpurnn.Linear(8, 1))
    >>> y, state, backward = model.forward(np.ones((5, 4, 3), "float32"))     # 4 sequences
    >>> with gpurnn.per_sample_gradients(model) as per_sample:
    ...     dx, dstate = backward(np.ones(y.shape, "float32"))
    >>> per_sample.norms().shape, per_sample.gradients()["0.weight_hh_l0"].shape
    ((4,), (4, 32, 8))
    >>> norms = per_sample.add_clipped(1.0)             # the sum is in model.grads now
    """
    modules = list(model.modules())
    for name, module in modules:
        _check(name or type(module).__name__, module)
    if batch_first is None:
        batch_first = any(getattr(module, "batch_first", False) for _, module in modules)
    names = {id(module.grads): f"{name}." if name else "" for name, module in modules}
    recording = Recording(model.xp, names, check_flag("batch_first", batch_first))
    with active(recording):
        yield PerSampleGradients(model, recording)


def _check(name, module):
    """Raise TypeError where a layer adds to the gradients of its parameters without saying what it adds."""
    trained = [own for own, _ in module._own if module._trains(own)]
    maker = next(one for one in type(module).__mro__ if "forward" in vars(one) or one is object)
    if trained and not vars(maker).get("_records_terms", False):
        raise TypeError(
            f"per-sample gradients: {name} is a {type(module).__name__}, which adds to the gradient of {trained[0]} "
            "itself, for all sequences at once. Freeze its parameters, or use layers that per_sample_gradients names"
        )
