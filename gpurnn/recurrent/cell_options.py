"""What a layer tells of its cell's options: attributes that can be read, and their part of its ``repr``."""

from __future__ import annotations

from typing import Any

from .. import cells
from ..cells.options import Options, cell_with
from ..errors import check_flag, check_size, described

# option -> its value where it is not set
OPTIONS = {name: field.default for name, field in Options.__dataclass_fields__.items()}
OPTIONS |= {"batch_norm": False, "zoneout": 0.0}  # as a layer takes them
for _name in ("bias", "reset_after"):  # arguments of the layer, option or not
    del OPTIONS[_name]


def check_cell(cell: Any) -> cells.Cell:
    """``cell``, or TypeError where it is none."""
    if not isinstance(cell, cells.Cell):
        what = "the function of a cell: put @gpurnn.cell(gates=...) before it" if callable(cell) else described(cell)
        raise TypeError(f"cell: expected a cell made by gpurnn.cell, got {what}")
    return cell


def check_residual(value: Any, num_layers: int) -> bool:
    """``value`` as bool; TypeError where it is no flag, ValueError where no layer has another below it."""
    if check_flag("residual", value) and num_layers == 1:
        raise ValueError("residual adds the input of the second layer on to its output: it needs num_layers > 1")
    return bool(value)


def shown(value: Any) -> str:
    """An option's value for ``repr``: functions by their names."""
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def check_projection(proj_size: int, hidden_sizes: tuple[int, ...], cell: cells.Cell) -> int:
    """``proj_size``, 0 for no projection. Raises ValueError."""
    size = check_size("proj_size", proj_size, minimum=0)
    if size and size >= min(hidden_sizes):
        raise ValueError(f"proj_size has to be smaller than hidden_size, got {size} and {min(hidden_sizes)}")
    if size and not cell.projects:
        raise ValueError(f"proj_size: the cell {cell.name} has no form with a projection")
    return size


class _Option:
    """An attribute that says which option a layer's cell was made with."""

    def __init__(self, name):
        self.name = name

    def __get__(self, layer, owner=None):
        options = {} if layer is None else layer.__dict__.get("_options", {})
        if self.name not in options:
            raise AttributeError(f"{owner.__name__} has no option {self.name!r}")
        return options[self.name]

    def __set__(self, layer, value):
        raise AttributeError(f"{self.name} is part of the cell, which a layer has for good: make another layer")


class CellOptions:
    """The part of a layer that knows the options of its cell."""

    def _with_options(self, kind, plain, **options):
        """The cell of a layer with options; they become attributes."""
        cell = cell_with(kind, plain, **options)
        shown = {name: value for name, value in options.items() if name in OPTIONS}
        if kind == "rnn":  # its activation is called nonlinearity
            shown = {k: value for k, value in shown.items() if k not in ("activation", "recurrent_dropout_each")}
        self.__dict__["_options"] = shown
        return cell


for _name in OPTIONS:
    setattr(CellOptions, _name, _Option(_name))
