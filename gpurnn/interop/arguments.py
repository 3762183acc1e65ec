"""The arguments of a call that goes through another library's graph: arrays in a row, and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What every pass of a configured layer is given.

    weights: all parameters. state: the parts of the initial state, or none. marks: lengths (B,), reset (T, B), mask
    (T, B) and the key of random masks, each or None. layer: the text of the configuration.
    """

    x: Any
    weights: list[Any]
    state: list[Any]
    marks: list[Any]
    layer: str

    def flat(self) -> tuple[Form, list[Any]]:
        """What is no array, and all arrays in a row."""
        present = [one for one in self.marks if one is not None]
        form = Form(self.layer, len(self.weights), len(self.state), tuple(one is not None for one in self.marks))
        return form, [self.x, *self.weights, *self.state, *present]


class Form(NamedTuple):
    """``Arguments`` without the arrays: how many weights and parts of a state there are, and which marks."""

    layer: str
    weights: int
    state: int
    marks: tuple[bool, ...]

    def arguments(self, arrays: Sequence[Any]) -> tuple[Arguments, list[Any]]:
        """The reverse of ``Arguments.flat``, and the arrays that are left."""
        first, second = 1 + self.weights, 1 + self.weights + self.state
        rest = iter(arrays[second:])
        marks = [next(rest) if present else None for present in self.marks]
        given = Arguments(arrays[0], list(arrays[1:first]), list(arrays[first:second]), marks, self.layer)
        return given, list(rest)

    def gradients(self, made: Sequence[Any]) -> tuple[Any, ...]:
        """Those with respect to ``Arguments.flat``, of those with respect to x, weights and state."""
        return *made, *([None] * sum(self.marks))
