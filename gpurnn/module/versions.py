"""Whether parameters changed between a forward pass and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .._typing import Array, Backward
from ..arrays import refuse_function, refuse_loss
from ..errors import MissingError, check_shape, described

M = TypeVar("M", bound="Versions")  # the class of the module
F = TypeVar("F", bound=Callable[..., Any])


def check_unspent(spent: list[Any]) -> None:
    """Raise RuntimeError unless the list ``spent``, to which a backward appends when it runs, is empty."""
    if spent:
        raise RuntimeError(
            "backward ran already: it overwrites what forward saved. Call forward again; for several backward passes "
            "of one forward pass call forward(..., retain=True)"
        )


def backward_of(layer: Any) -> Callable[[F], F]:
    """A decorator for the backward function of ``layer``: messages of Python call it by the layer, "LSTM.backward"."""

    def named(backward: F) -> F:
        backward.__qualname__ = f"{type(layer).__name__}.backward"
        return backward

    return named


_INT8 = "weights in 8 bits"  # as one name, because they are no parameters


class Versions:
    """The part of ``Module`` that counts the changes of parameters."""

    def changed(self, *names: str) -> None:
        """Record that these parameters, or all, were changed through their arrays; see ``check_versions``.

        Parameters
        ----------
        *names : str
            Names as in ``params``.

        Raises
        ------
        KeyError
            For a name that no parameter has; the message lists those that there are. Nothing is recorded then.

        Examples
        --------
        >>> layer = gpurnn.Linear(2, 3)
        >>> layer.params["weight"][0] = 0          # a write through an array cannot be seen
        >>> layer.changed("weight")
        """
        for name in names:
            if name not in self.params:
                known = ", ".join(self.params) or "none"
                raise MissingError(f"changed: no parameter is called {name!r}, there are: {known}")
        for name in names or self.params:
            counts, _, inner = self.params._owners[name]
            counts[inner] += 1
        for number, (_, layer) in enumerate(self.modules()):
            if layer.quantized:  # its weights in 8 bits are no parameters
                layer._forget_floats()
                self._counts[number][_INT8] = self._counts[number].get(_INT8, 0) + 1

    def versions(self) -> list[dict[str, int]]:
        """How often each parameter has been changed so far, for ``check_versions``."""
        return [dict(counts) for counts in self._counts]

    def check_versions(self, before: list[dict[str, int]], now: str = "backward", then: str = "forward") -> None:
        """Check that no parameter has changed since ``before = versions()``.

        Parameters
        ----------
        before : list of dict
            The result of ``versions()``.
        now, then : str
            What the message calls the two moments.

        Raises
        ------
        RuntimeError
            If a parameter has changed; the message names it.
        """
        if before == self._counts:
            return
        for (_, layer), old, new in zip(self.modules(), before, self._counts, strict=False):
            if old.get("") != new.get(""):
                raise RuntimeError(
                    f"{now}: a layer or parameter of the {type(layer).__name__} was set since. Call {then} again"
                )
            for name, version in new.items():
                if old.get(name) != version:
                    place = f"{layer.name}.{name}" if layer.name else name
                    raise RuntimeError(
                        f"{now}: parameter {place} was changed (version {old.get(name)} at {then}, {version} now), and "
                        f"the result would be that of neither. Call {then} again, or change parameters after {now}"
                    )

    def guard_backward(
        self,
        backward: Backward,
        outputs: Array | tuple[Array, ...],
        name: str = "doutputs",
        retain: bool = False,
    ) -> Callable[[Any], Any]:
        """``backward`` of a model's ``forward`` with the checks that a layer's has, made before any gradient is added.

        It refuses a gradient of the wrong shape or dtype, parameters that have changed since this call, and a second
        call.

        Parameters
        ----------
        backward : callable
            Takes the gradient with respect to outputs: an array, or a tuple of arrays where outputs is one.
        outputs : Array or tuple of Array
            What ``forward`` returns beside it.
        name : str
            What errors call the gradient.
        retain : bool
            Whether backward may run more than once.

        Returns
        -------
        callable
            ``guarded(doutputs)`` returns what ``backward(doutputs)`` does, and raises ShapeError, DtypeError, TypeError
            or RuntimeError where that must not run. In a tuple None stands for no gradient.

        Examples
        --------
        >>> class Twice(gpurnn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = gpurnn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         first, first_backward = self.linear.forward(x)
        ...         second, second_backward = self.linear.forward(first)
        ...         return second, self.guard_backward(lambda dy: first_backward(second_backward(dy)), second)
        >>> y, backward = Twice().forward(np.ones((3, 2), "float32"))
        >>> backward(y[:1])
        Traceback (most recent call last):
        gpurnn.errors.ShapeError: doutputs: expected shape (3, 2), got (1, 2)
        """
        versions, spent = self.versions(), []
        shapes = [output.shape for output in outputs] if isinstance(outputs, tuple) else outputs.shape

        def checked(name, doutput, shape):
            refuse_loss(name, doutput, shape)
            doutput = self.ops.asfloat(doutput, self.dtype, name)
            check_shape(name, doutput, shape)
            return doutput

        @backward_of(self)
        def guarded(doutputs):
            if isinstance(shapes, list):
                refuse_function(name, doutputs)
                if not isinstance(doutputs, (tuple, list)) or len(doutputs) != len(shapes):
                    raise TypeError(f"{name}: expected {len(shapes)} gradients in a tuple, got {described(doutputs)}")
                doutputs = tuple(
                    None if part is None else checked(f"{name}[{n}]", part, shape)
                    for n, (part, shape) in enumerate(zip(doutputs, shapes, strict=True))
                )
            else:
                doutputs = checked(name, doutputs, shapes)
            self.check_versions(versions)
            check_unspent(spent)
            if not retain:
                spent.append(True)
            return backward(doutputs)

        return guarded

    def _guarded(self, backward: Backward, name: str, outputs: Array, retain: bool) -> Callable[[Any], Any]:
        return self.guard_backward(backward, outputs, name, retain)

    def _as_now(self: M) -> M:
        """A stand-in with the attributes of this moment, for a backward that runs later.

        Parameters, gradients and children are shared.
        """
        now = object.__new__(type(self))
        now.__dict__.update(self.__dict__)
        return now
