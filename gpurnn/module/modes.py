"""Training mode and evaluation mode."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from ..errors import check_flag
from .quantized import refuse_quantized

M = TypeVar("M", bound="Modes")  # the class of the module

_changing_modes = threading.Lock()  # held where blocks of ``evaluation`` begin and end
if hasattr(os, "register_at_fork"):  # a forked child finds it released
    release = _changing_modes.release
    os.register_at_fork(before=_changing_modes.acquire, after_in_parent=release, after_in_child=release)


class Modes:
    """The part of ``Module`` that sets the mode of a model."""

    training: Any  # of ``Module``

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """All modules in this one, itself first and each once, as (dotted name, module).

        Parameters
        ----------
        prefix : str
            Name of this module, in front of the others.

        Examples
        --------
        >>> model = gpurnn.Sequential({"rnn": gpurnn.GRU(2, 3), "head": gpurnn.Linear(3, 1)})
        >>> [name for name, module in model.modules()]
        ['', 'rnn', 'head']
        """
        yield prefix, self
        for name, child in self._homes.items():
            yield from child.modules(f"{prefix}.{name}" if prefix else name)

    def train(self: M, mode: bool = True) -> M:
        """Put this module and all in it into training mode: dropout draws, batch statistics.

        Parameters
        ----------
        mode : bool
            False for evaluation mode.

        Returns
        -------
        Module
            This module.

        Raises
        ------
        RuntimeError
            To train a model that is quantized.
        """
        mode = check_flag("mode", mode)
        if mode:
            refuse_quantized(self, "train")
        for _, module in self.modules():
            module.training = mode
        return self

    def eval(self: M) -> M:
        """Put this module and all in it into evaluation mode: no dropout, running statistics. Returns the module."""
        return self.train(False)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[Any]:
        """Evaluation mode inside a ``with`` block; after it each module is in its own mode again, whatever happened.

        Yields the module. Blocks of several threads may overlap in any order: the modes are restored when the last
        block ends.

        Examples
        --------
        >>> model = gpurnn.Dropout(0.5)
        >>> with model.evaluation():
        ...     model(np.ones(3, "float32")).tolist()
        [1.0, 1.0, 1.0]
        """
        blocks = [(module, [None]) for _, module in self.modules()]
        with _changing_modes:
            for module, block in blocks:
                block[0] = module.training
                module._evaluations.append(block)
                module.training = False
        try:
            yield self
        finally:
            with _changing_modes:
                for module, block in blocks:
                    module._leave(block)

    def _leave(self, block: list[bool]) -> None:
        """End a block of ``evaluation`` for this module.

        The block that began after it found the module in evaluation mode, so it takes over the mode to restore. If
        there is none, the mode is restored now.
        """
        active = self._evaluations
        place = next(n for n, other in enumerate(active) if other is block)
        if active[place] is active[-1]:
            self.training = block[0]
        else:
            active[place + 1][0] = block[0]
        del active[place]
