"""Checks of the states that optimizers and learning-rate schedules save and load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import MissingError


def check_names(what: str, got: Mapping[str, Any], expected: Collection[str]) -> None:
    """Raise TypeError unless ``got`` is a mapping, KeyError unless it has exactly the expected names."""
    if not isinstance(got, Mapping):
        raise TypeError(f"{what} should be a dict, got {type(got).__name__}")
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        raise MissingError(f"{what} does not fit: missing {missing}, unknown {unknown}")


def check_kind(what: str, state: Any, owner: object) -> None:
    """Raise ValueError unless the state was saved by an object of the owner's class.

    It is the first check of a state: the names that another class saves would only confuse.
    """
    got, expected = state.get("kind") if isinstance(state, Mapping) else state, type(owner).__name__
    if got != expected:
        raise ValueError(f"{what} is of kind {got!r}, expected {expected!r}")


def is_square(name: str) -> bool:
    """Whether a state array of an optimizer holds averages of squares, by its name.

    Such an average may be infinite: the update is then a gradient divided by infinity, 0.
    """
    return name.partition(".")[0] in ("square_avg", "exp_avg_sq", "max_exp_avg_sq")
