"""ONNX's operators that move, choose and make numbers."""

from __future__ import annotations

from typing import Any

import numpy as np


def _integers(node, values):
    """The integers of a small array, on the host."""
    return [int(value) for value in np.asarray(node.ops_to_numpy(values)).ravel()]


def _axes(node, axes, rank):
    """Axes from an attribute, or from an input where the version has it so; None for none."""
    axes = node.attributes.get("axes") if axes is None else _integers(node, axes)
    if axes is None:
        return None
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(f"axes: {axis} is not one of {rank}")
    return tuple(axis % rank for axis in axes)


def _reshape(node, x, shape):
    sizes = _integers(node, shape)
    if not node.attributes.get("allowzero"):
        if any(size == 0 and place >= x.ndim for place, size in enumerate(sizes)):
            raise ValueError(f"shape: 0 means the size of x there, which has {x.ndim} axes; got {sizes}")
        sizes = [size or x.shape[place] for place, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(node, x):
    axis = node.attributes.get("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64)))


def _transpose(node, x):
    return x.transpose(node.attributes.get("perm"))


def _squeeze(node, x, axes=None):
    axes = _axes(node, axes, x.ndim)
    return x.squeeze() if axes is None else x.squeeze(axes)


def _unsqueeze(node, x, axes=None):
    given = node.attributes["axes"] if axes is None else _integers(node, axes)
    axes, sizes = _axes(node, np.array(given), x.ndim + len(given)), iter(x.shape)
    return x.reshape([1 if axis in axes else next(sizes) for axis in range(x.ndim + len(given))])


def _concat(node, *arrays):
    xp, *arrays = node.together(*arrays)
    return xp.concatenate(arrays, axis=node.attributes["axis"])


def _split(node, x, sizes=None):
    axis, count = node.attributes.get("axis", 0), len(node.outputs)
    sizes = node.attributes.get("split") if sizes is None else _integers(node, sizes)
    if sizes is None:
        each = -(-x.shape[axis] // count)
        sizes = [each] * (count - 1) + [x.shape[axis] - each * (count - 1)]
    if len(sizes) != count or min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        raise ValueError(f"split: {x.shape[axis]} is not divided by {sizes} into {count} parts")
    before, ends = (slice(None),) * (axis % x.ndim), np.cumsum(sizes).tolist()
    return tuple(x[(*before, slice(end - size, end))] for size, end in zip(sizes, ends, strict=True))


def _slice(node, x, starts=None, ends=None, axes=None, steps=None):
    given = node.attributes
    starts, ends = (_integers(node, given[name] if one is None else one)
                    for name, one in (("starts", starts), ("ends", ends)))  # fmt: skip
    axes = given.get("axes") if axes is None else _integers(node, axes)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else _integers(node, steps)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        if step < 0 and end < -size:
            end = None  # one before the first, which no slice of Python has a number for
        index[axis] = slice(start, end, step)
    return x[tuple(index)]


def _gather(node, x, indices):
    axis, indices = node.attributes.get("axis", 0), node.like(x, indices)
    size = x.shape[axis]
    if indices.size and not (-size <= int(indices.min()) and int(indices.max()) < size):
        raise ValueError(f"indices: expected numbers from {-size} to {size - 1}")
    shape = x.shape[:axis] + indices.shape + x.shape[axis % x.ndim + 1 :]
    node.check_product(shape, x.dtype.itemsize)
    return x[(*(slice(None),) * (axis % x.ndim), indices)]


def _gather_elements(node, x, indices):
    axis = node.attributes.get("axis", 0)
    indices = node.like(x, indices)
    size = x.shape[axis]
    return node.xp(x).take_along_axis(x, node.xp(x).where(indices < 0, indices + size, indices), axis=axis)


def _expand(node, x, shape):
    sizes = np.broadcast_shapes(x.shape, tuple(_integers(node, shape)))
    node.check_room(sizes, x.dtype.itemsize)
    return node.xp(x).broadcast_to(x, sizes)


def _tile(node, x, repeats):
    repeats = _integers(node, repeats)
    node.check_room([size * count for size, count in zip(x.shape, repeats, strict=True)], x.dtype.itemsize)
    return node.xp(x).tile(x, repeats)


def _shape(node, x):
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return np.array(x.shape[start:end], np.int64)


def _size(node, x):
    return np.array(x.size, np.int64)


def _constant(node):
    names = {"value", "value_float", "value_floats", "value_int", "value_ints"} & set(node.attributes)
    if len(names) != 1:
        raise ValueError(f"expected one number or tensor, got {', '.join(sorted(node.attributes)) or 'nothing'}")
    (name,) = names
    value = node.attributes[name]
    return value if name == "value" else np.array(value, np.float32 if "float" in name else np.int64)


def _constant_of_shape(node, shape):
    value = node.attributes.get("value", np.zeros(1, np.float32))
    sizes = _integers(node, shape)
    node.check_room(sizes, value.dtype.itemsize)
    return np.full(sizes, value.reshape(-1)[0], value.dtype)


def _range(node, start, limit, delta):
    start, limit, delta = (node.ops_to_numpy(one).reshape(-1)[0] for one in (start, limit, delta))
    if not delta:
        raise ValueError("delta: expected a number other than 0")
    count = max(0, int(np.ceil((limit - start) / delta)))
    node.check_room((count,), np.dtype(start.dtype).itemsize)
    return (start + np.arange(count) * delta).astype(start.dtype)


def _pad(node, x, pads=None, value=None, axes=None):
    given = node.attributes
    if given.get("mode", "constant") != "constant":
        raise ValueError(f"mode: expected 'constant', got {given['mode']!r}")
    pads = given["pads"] if pads is None else _integers(node, pads)
    value = given.get("value", 0) if value is None else node.ops_to_numpy(value).reshape(-1)[0]
    axes = range(x.ndim) if axes is None else _integers(node, axes)
    each = [(0, 0)] * x.ndim
    for place, axis in enumerate(axes):
        each[axis] = (pads[place], pads[place + len(pads) // 2])
    node.check_room([size + sum(pair) for size, pair in zip(x.shape, each, strict=True)], x.dtype.itemsize)
    return node.xp(x).pad(x, each, constant_values=value)


def _reverse_sequence(node, x, lengths):
    given, xp = node.attributes, node.xp(x)
    time, batch = given.get("time_axis", 0), given.get("batch_axis", 1)
    if {time, batch} != {0, 1}:
        raise ValueError(f"time_axis and batch_axis: expected 0 and 1, got {time} and {batch}")
    steps = x if time == 0 else x.swapaxes(0, 1)
    lengths = node.like(x, lengths)
    t = xp.arange(len(steps))[:, None]
    order = xp.where(t < lengths, lengths - 1 - t, t)
    y = steps[order, xp.arange(steps.shape[1])]
    return y if time == 0 else y.swapaxes(0, 1)


def _identity(node, x):
    return x


OPERATORS: dict[str, Any] = {
    "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements,
    "Expand": _expand, "Tile": _tile, "Shape": _shape, "Size": _size, "Constant": _constant,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Pad": _pad, "ReverseSequence": _reverse_sequence,
    "Identity": _identity,
}  # fmt: skip
