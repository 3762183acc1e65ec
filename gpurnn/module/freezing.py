"""Parameters that training does not change."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TypeVar

from ..errors import MissingError
from .views import padded_size

M = TypeVar("M", bound="Freezing")  # the class of the module


class Freezing:
    """The part of ``Module`` that freezes parameters."""

    def freeze(self: M, *names: str) -> M:
        """Stop training these parameters, or all of them.

        ``backward`` makes no gradients for a frozen parameter, no optimizer moves it, and clipping does not count it.
        Its gradient becomes zero. Frozen parameters are saved and loaded like others. Which ones are frozen is part of
        ``copy.deepcopy`` and ``pickle``, but not of ``state_dict()``. Running statistics are no parameters: ``eval()``
        stops their updates.

        Parameters
        ----------
        *names : str
            Names of parameters as in ``params``, or of layers for all their parameters, with ``*`` and ``?`` as in
            file names.

        Returns
        -------
        Module
            This module.

        Raises
        ------
        KeyError
            For a name that matches nothing; nothing changes then.

        Examples
        --------
        >>> model = gpurnn.Sequential({"encoder": gpurnn.LSTM(2, 3), "head": gpurnn.Linear(3, 1)})
        >>> model.freeze("encoder.*").frozen
        ['encoder.weight_ih_l0', 'encoder.weight_hh_l0', 'encoder.bias_ih_l0', 'encoder.bias_hh_l0']
        """
        for name in self._matching("freeze", names):
            _, frozen, inner = self.params._owners[name]
            frozen.add(inner)
            self.grads[name][...] = 0
        return self

    def unfreeze(self: M, *names: str) -> M:
        """Undo ``freeze`` for these parameters, or for all; arguments, result and errors are those of ``freeze``."""
        for name in self._matching("unfreeze", names):
            _, frozen, inner = self.params._owners[name]
            frozen.discard(inner)
        return self

    @property
    def frozen(self) -> list[str]:
        """Names of the frozen parameters, as in ``params``."""
        if not any(self._frozen):
            return []
        return [name for name, (_, frozen, inner) in self.params._owners.items() if inner in frozen]

    def _matching(self, method: str, patterns: tuple[str, ...]) -> list[str]:
        """The names of parameters that match the patterns; errors begin with ``method``."""
        if not patterns:
            return list(self.params)
        found = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{method}: names should be strings, got {type(pattern).__name__}")
            matched = {
                name for name in self.params if any(fnmatch.fnmatchcase(part, pattern) for part in _prefixes(name))
            }
            layers = (name for name, _ in self.modules() if name)
            if not matched and not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                known = ", ".join(self.params) or "none"
                raise MissingError(f"{method}: no parameter or layer is called {pattern!r}, there are {known}")
            found |= matched
        return [name for name in self.params if name in found]

    def _trains(self, name: str) -> bool:
        """Whether a parameter of this layer itself is not frozen."""
        return name not in self._frozen[0]

    def _trained_parts(self, numbers: Mapping[str, int] | None = None) -> list[tuple[slice, int]]:
        """The slices of the flat buffers that are not frozen; neighbors of equal number are joined.

        numbers: parameter -> number, None for 0 everywhere.
        """
        if numbers is None and not any(self._frozen):
            return [(slice(0, self.flat_params.size), 0)]
        parts, start, frozen = [], 0, set(self.frozen)
        for name, shape in self._layout:
            stop = start + padded_size(shape)
            if name not in frozen and stop > start:
                number = numbers[name] if numbers else 0
                if parts and parts[-1][0].stop == start and parts[-1][1] == number:
                    parts[-1] = slice(parts[-1][0].start, stop), number
                else:
                    parts.append((slice(start, stop), number))
            start = stop
        return parts


def _prefixes(name: str) -> list[str]:
    """A dotted name and the layers around it: "a.b.c" -> "a", "a.b", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]
