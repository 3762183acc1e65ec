"""Numbers as C text."""

from __future__ import annotations

import numpy as np

_ROW = {"f": 8, "i": 24, "u": 16}  # numbers in a line, by the kind of dtype


def number(value: float) -> str:
    """A float32 constant: 9 digits say which one exactly. Raises ValueError where float32 has none for it."""
    with np.errstate(over="ignore"):
        single = float(np.float32(value))
    if not np.isfinite(single):
        raise ValueError(f"a cell's equations have the number {value:g}, which is beyond float32")
    text = f"{single:.9g}"
    return f"{text if set(text) & set('.e') else f'{text}.0'}f"


def array_text(values: np.ndarray) -> str:
    """The numbers of an array, in lines. Those of float32 are exact."""
    flat, count = values.reshape(-1), _ROW[values.dtype.kind]
    one = "%.8ef" if values.dtype.kind == "f" else "%d"
    lines = [flat[first : first + count].tolist() for first in range(0, flat.size, count)]
    return ",\n".join("    " + ", ".join([one] * len(line)) % tuple(line) for line in lines)
