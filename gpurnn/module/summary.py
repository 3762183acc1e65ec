"""A table of a model's layers: ``Module.summary``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ..errors import check_size

WIDTH = 100  # columns, at most
Shape = tuple[Any, ...]  # numbers, the letters "T" and "B", "..." for any axes, "?" for an unknown size


def summary_table(model: Any, T: int | None, B: int | None) -> str:
    """The text of ``Module.summary``."""
    if (T is None) != (B is None):
        raise ValueError(f"summary: T and B go together, got T={T} and B={B}")
    sized = T is not None
    if sized:
        T, B = check_size("T", T), check_size("B", B)
    axes = {"T": T, "B": B} if sized else {}
    shapes = {id(module): shape for module, shape in _shapes(model)}
    rows, total = [["layer", "output", "parameters", "activation bytes"]], 0
    for name, module in model.modules():
        place, _, last = name.rpartition(".")
        indent = "  " * (place.count(".") + 1 + bool(place)) if name else ""
        title = f"{indent}{last}: {type(module).__name__}" if name else type(module).__name__
        own = module.parameter_count - sum(child.parameter_count for child in module._homes.values())
        planned = _activation_bytes(module, T, B) if sized else None
        total += planned or 0
        rows.append(
            [
                title,
                _shape_text(shapes.get(id(module)), axes),
                f"{own:,}" if own or not module.children else "",
                "" if planned is None else f"{planned:,}",
            ]
        )
    rows.append(["total", "", f"{model.parameter_count:,}", f"{total:,}"])
    frozen = sum(model.params[name].size for name in model.frozen)
    if frozen:
        rows.append(["of them frozen", "", f"{frozen:,}", ""])
    if model._int8_count():
        rows.append(["besides, in int8", "", f"{model._int8_count():,}", ""])
    return _table([row if sized else row[:3] for row in rows])


# ---- shapes


def _shapes(model: Any) -> Iterator[tuple[Any, Shape]]:
    """(module, output shape) of every module whose output shape is known."""
    if not model.children:
        yield from _chain_shapes([model])
    elif model._chain:
        yield from _chain_shapes(model.children.values())
    else:  # nobody knows what the layers read
        for child in model.children.values():
            yield from _shapes(child)


def _chain_shapes(layers: Any) -> Iterator[tuple[Any, Shape]]:
    """The shapes in a chain, from the axes that its input must have."""
    layers = list(layers)
    innermost = [module for layer in layers for _, module in layer.modules() if not module.children]
    time = any(_takes_lengths(layer) for layer in innermost)
    batch_first = any(getattr(layer, "batch_first", False) for layer in innermost)
    axes = (("B", "T") if batch_first else ("T", "B")) if time else ("...",)
    yield from _follow(layers, axes if hasattr(innermost[0], "embedding_dim") else (*axes, "?"))


def _follow(layers: Any, shape: Shape | None) -> Iterator[tuple[Any, Shape]]:
    """The shapes in a chain whose first layer reads ``shape``."""
    for layer in layers:
        if layer._chain:
            inner = list(_follow(layer.children.values(), shape))
            yield from inner
            shape = inner[-1][1] if len(inner) and inner[-1][0] is list(layer.children.values())[-1] else None
        else:
            shape = _output_shape(layer, ("...", "?") if shape is None else shape)
        if shape is not None:
            yield layer, shape


def _output_shape(layer: Any, shape: Shape) -> Shape | None:
    """The output shape of a layer that reads ``shape``, or None if its attributes do not tell."""
    if layer.children:
        return None
    if hasattr(layer, "embedding_dim"):
        return (*shape, layer.embedding_dim)
    if hasattr(layer, "out_features"):
        return (*shape[:-1], layer.out_features)
    if hasattr(layer, "proj_size"):
        size = (layer.proj_size or layer.hidden_sizes[-1]) * (2 if layer.bidirectional else 1)
        if not _takes_lengths(layer):
            return ("B", size)  # one timestep
        return ("B", "T", size) if layer.batch_first else ("T", "B", size)
    if hasattr(layer, "features"):
        pooled = hasattr(layer, "mode")  # one vector for each sequence
        return ("B", layer.features) if pooled else (*shape[:-1], layer.features)
    return shape if hasattr(layer, "rate") else None  # dropout


def _takes_lengths(layer: Any) -> bool:
    """Whether a layer reads whole sequences: its ``forward`` has the argument ``lengths``."""
    forward = getattr(layer, "forward", None)
    return getattr(layer, "takes_lengths", False) and "lengths" in inspect.signature(forward).parameters


def _shape_text(shape: Shape | None, axes: dict[str, int]) -> str:
    if shape is None or "?" in shape:
        return ""
    return f"({', '.join(str(axes.get(size, size)) for size in shape)})"


# ---- bytes, and the table


def _activation_bytes(module: Any, T: int, B: int) -> int | None:
    """Bytes that a training call saves and returns, by ``plan``; None for a layer without one."""
    if not hasattr(module, "plan") or not _takes_lengths(module):
        return None
    plan = module.plan(T, B)
    return plan.cache_bytes + plan.output_bytes


def _table(rows: list[list[str]]) -> str:
    """Columns side by side, the first two flush left, within ``WIDTH``."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1))
    lines = []
    for row in rows:
        first = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 3] + "..."
        cells = [first.ljust(widths[0]), row[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
