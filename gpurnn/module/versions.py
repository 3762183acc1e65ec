"""Whether parameters changed between a forward pass and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .._typing import Array, Backward
from ..errors import check_shape

M = TypeVar("M", bound="Versions")  # the class of the module


def check_unspent(spent: list[Any]) -> None:
    """Raise RuntimeError unless the list ``spent``, to which a backward appends when it runs, is empty."""
    if spent:
        raise RuntimeError(
            "backward ran already: it overwrites what forward saved. Call forward again; for several backward passes "
            "of one forward pass call forward(..., retain=True)"
        )


class Versions:
    """The part of ``Module`` that counts the changes of parameters."""

    def changed(self, *names: str) -> None:
        """Record that these parameters, or all, were changed through their arrays; see ``check_versions``.

        Parameters
        ----------
        *names : str
            Names as in ``params``.

        Examples
        --------
        >>> layer = gpurnn.Linear(2, 3)
        >>> layer.params["weight"][0] = 0          # a write through an array cannot be seen
        >>> layer.changed("weight")
        """
        for name in names or self.params:
            counts, _, inner = self.params._owners[name]
            counts[inner] += 1

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
        layers = [module for _, module in self.modules() if not module.children]
        for layer, old, new in zip(layers, before, self._counts, strict=True):
            for name, version in new.items():
                if old.get(name) != version:
                    place = f"{layer.name}.{name}" if layer.name else name
                    raise RuntimeError(
                        f"{now}: parameter {place} was changed (version {old.get(name)} at {then}, {version} now), and "
                        f"the result would be that of neither. Call {then} again, or change parameters after {now}"
                    )

    def _guarded(self, backward: Backward, name: str, outputs: Array, retain: bool) -> Callable[[Array], Any]:
        """``backward`` of a module that calls several layers, with its checks made before any layer adds gradients.

        It refuses a gradient of the wrong shape, changed parameters and a second call. Errors call the gradient
        ``name``.
        """
        shape, versions, spent = outputs.shape, self.versions(), []

        def guarded(doutputs):
            doutputs = self.ops.asfloat(doutputs, self.dtype, name)
            check_shape(name, doutputs, shape)
            self.check_versions(versions)
            check_unspent(spent)
            if not retain:
                spent.append(True)
            return backward(doutputs)

        return guarded

    def _as_now(self: M) -> M:
        """A stand-in with the attributes of this moment, for a backward that runs later.

        Parameters, gradients and children are shared.
        """
        now = object.__new__(type(self))
        now.__dict__.update(self.__dict__)
        return now
