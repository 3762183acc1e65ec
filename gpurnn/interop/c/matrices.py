"""Weights in a header, and the products with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...pruning import BLOCK
from ...quantization import quantize_rows
from .building import Builder, Value

HEIGHT, WIDTH = BLOCK  # as kernels/c/products.h has them
TALL = 32  # rows of a tall stripe, likewise
_FEW = 0.75  # the share of blocks up to which the others are left out
_LARGEST = 2**31 - 1, 2**15 - 1  # of int32 and int16


class Matrix(NamedTuple):
    """Weights (rows, columns). w, scale, blocks: names of arrays; scale of int8, blocks where some are left out."""

    rows: int
    columns: int
    w: str
    scale: str | None = None
    blocks: str | None = None
    striped: bool = True


def put_matrix(b: Builder, name: str, array: np.ndarray, looked_up: bool = False, multiplied: bool = True) -> Matrix:
    """Write weights. looked_up: whether rows of them are read; multiplied: whether they are in products, too."""
    array = np.asarray(array, np.float64)
    with np.errstate(over="ignore"):  # ``Builder.array`` refuses infinity
        values, scales = array.astype(np.float32), None
    if b.weights == "int8":
        try:
            values, scales = quantize_rows(array)
        except ValueError as error:
            raise ValueError(f"{name.strip()}: its numbers are not all finite in float32") from error
    blocks = None if looked_up else _blocks(values)
    striped = multiplied and b.activations == "float32"
    if blocks is None:
        flat, places = _striped(values) if striped else values, None
    else:
        flat, places = _gathered(values, blocks)
    return Matrix(
        *array.shape,
        b.array(name, flat),
        None if scales is None else b.floats(f"{name}_scale", scales),
        None if places is None else b.array(f"{name}_blocks", places),
        striped,
    )


def _striped(values):
    """All numbers by stripes: of 32 rows, then of 8, then of what is left; in each column by column."""
    parts, row = [], 0
    while row < len(values):
        left = len(values) - row
        height = TALL if left >= TALL else min(left, HEIGHT)
        parts.append(values[row : row + height].T.reshape(-1))
        row += height
    return np.concatenate(parts) if parts else values.reshape(-1)


def _blocks(values):
    """For each 8 rows which blocks are not zero, (rows / 8, columns / 4), or None where most are not."""
    rows, columns = (-(-size // one) for size, one in zip(values.shape, BLOCK, strict=True))
    padded = np.zeros((rows * HEIGHT, columns * WIDTH), bool)
    padded[: values.shape[0], : values.shape[1]] = values != 0
    found = padded.reshape(rows, HEIGHT, columns, WIDTH).any(axis=(1, 3))
    return found if columns <= np.iinfo(np.uint16).max and found.mean() <= _FEW else None


def _gathered(values, blocks):
    """The numbers of the blocks that are there, column by column; and for each 8 rows how many there are and which."""
    parts, places = [], []
    for row, there in enumerate(blocks):
        chosen = np.repeat(there, WIDTH)[: values.shape[1]]
        parts.append(values[row * HEIGHT : (row + 1) * HEIGHT, chosen].T.reshape(-1))
        places += [there.sum(), *np.flatnonzero(there)]
    flat = np.concatenate(parts)
    return flat if flat.size else np.zeros(1, values.dtype), np.array(places, np.uint16)  # C has no empty arrays


def product(b: Builder, matrix: Matrix, bias: Any, x: str, y: str) -> None:
    """Write y = W x + bias. bias: the name of an array, or None."""
    form = "float32" if matrix.scale is None else "int8" if matrix.striped else "int16"
    weights = [one for one in (matrix.w, matrix.scale, matrix.blocks) if one is not None]
    arguments = [*weights, matrix.rows, matrix.columns, bias or "NULL"]
    function = f"{'product' if matrix.blocks is None else 'blocks'}_{form}"
    if form != "int16":
        b.line(b.call(function, *arguments, x, y) + ";")
        return
    whole, most = b.whole_numbers(matrix.columns), min(_LARGEST[1], _LARGEST[0] // (127 * matrix.columns))
    with b.block():
        b.line(f"const float each = {b.call('quantize', x, matrix.columns, b.number(most), whole)};")
        b.line(b.call(function, *arguments, whole, "each", y) + ";")


def look_up(b: Builder, matrix: Matrix, row: str, y: Value) -> None:
    """Write that y is a row of a matrix. row: the text of its number."""
    function = "row_float32" if matrix.scale is None else "row_int8"
    scale = [] if matrix.scale is None else [f"{matrix.scale}[{row}]"]
    with b.block():
        if matrix.striped:
            b.line("size_t apart;")
            place = b.call("row_of_stripes", matrix.rows, matrix.columns, row, "&apart")
            b.line(f"const size_t first = {place};")
            b.line(b.call(function, f"{matrix.w} + first", *scale, "apart", matrix.columns, y.text) + ";")
        else:
            first = f"{matrix.w} + {row} * {matrix.columns}"
            b.line(b.call(function, first, *scale, 1, matrix.columns, y.text) + ";")
