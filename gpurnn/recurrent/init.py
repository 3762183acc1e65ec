"""Initial values of a layer's parameters."""

import math
from functools import partial

import numpy as np

from .. import rng
from ..errors import check_number, check_size
from ..module import Later, need_values
from .heads import inputs_of

INITIALIZERS = ("uniform", "xavier", "orthogonal", "identity")


def check_memory(forget_bias, chrono, bias):
    """Raise ValueError where forget_bias and chrono exclude each other, or there is no bias to set."""
    if forget_bias is not None and chrono is not None:
        raise ValueError("forget_bias and chrono both set the forget gate's bias: give one of them")
    for name, value in (("forget_bias", forget_bias), ("chrono", chrono)):
        if value is not None and not bias:
            raise ValueError(f"{name} needs bias=True")


def initial_values(layer, forget_bias, chrono):
    """Name -> ``Later`` of every parameter, in torch's order; then what the cell has besides."""
    values, cell = {}, layer.cell
    G, rows = len(cell.gates), len(cell.hidden)
    if (forget_bias is not None or chrono is not None) and cell.remembers is None:
        raise ValueError(f"forget_bias and chrono: the cell {cell.name} does not say which of its gates remembers")
    for _, k, _, suffix in layer._passes():
        _, H, P = layer._sizes(k)
        H, P = H // layer.heads, P // layer.heads  # each head begins as a layer of its size
        blocks = {"weight_ih": (G, H, inputs_of(layer, k)), "weight_hh": (rows, H, P)}
        if layer.bias and cell.biases:
            blocks |= {"bias_ih": (G, H), "bias_hh": (G, H)}
        if layer.proj_size:
            blocks["weight_hr"] = (1, P, H)
        blocks |= {one.name: (one.vectors, H) for one in cell.parameters}
        constant = {one.name: one.initial for one in cell.parameters if one.initial != "biases"}
        for name, of_head in blocks.items():
            shape = (of_head[0] * of_head[1], *of_head[2:])
            if shape[0]:
                draw = partial(_block, layer, name, constant.get(name), (forget_bias, chrono), H)
                shape = shape if layer.heads == 1 else (layer.heads, *shape)
                values[name + suffix] = Later(shape, partial(_by_head, layer.heads, name + suffix, of_head, draw))
        if layer.learn_state:
            for kind in cell.states:
                size = (P if kind == cell.states[0] else H) * layer.heads
                values[f"initial_{kind}{suffix}"] = Later((size,), np.zeros)
    return values


def _by_head(heads, name, of_head, draw, shape):
    """The initial values of a parameter: ``draw(name, of_head)`` for each head, together of the shape."""
    places = [name + (f".head{head}" if head else "") for head in range(heads)]
    return np.concatenate([draw(place, of_head) for place in places]).reshape(shape)


def _block(layer, name, constant, memory, H, place, shape):
    """Initial values of one head. constant: that of the cell's parameter, or None. memory: forget_bias and chrono."""
    if constant is not None:
        return np.full(shape, {"zeros": 0.0, "ones": 1.0}.get(constant, constant), np.float64)
    block = _draw(layer, place, shape, H)
    if name in ("bias_ih", "bias_hh"):
        _set_memory(layer, block, place, *memory)
    return block


def running_statistics(layer):
    """The buffers of a cell that normalizes over the batch: name -> (normalizations, timesteps, H) for each pass."""
    buffers, cell = {}, layer.cell
    if cell.over_batch:
        for _, k, _, suffix in layer._passes():
            shape = cell.normalizations, cell.timesteps, layer._sizes(k)[1]
            need_values(shape, shape)  # these do not depend on it, but they count
            buffers["running_mean" + suffix] = layer.xp.zeros(shape, layer.compute_dtype)
            buffers["running_var" + suffix] = layer.xp.ones(shape, layer.compute_dtype)
    return buffers


def _set_memory(layer, block, name, forget_bias, chrono):
    """Overwrite, in a bias (G, H), the gate that preserves the old state, and with chrono the one that writes."""
    if forget_bias is None and chrono is None:
        return
    cell, first = layer.cell, name.startswith("bias_ih")  # b_hh, which is added to it, becomes zero
    remembers = block[cell.gates.index(cell.remembers)]
    if forget_bias is not None:
        remembers[:] = check_number("forget_bias", forget_bias) if first else 0.0
    else:
        longest = check_size("chrono", chrono, 2) - 1
        key = rng.name_key("chrono" + name)
        drawn = rng.uniform(remembers.shape, 1, longest, layer.seed, key, dtype=np.float64)
        remembers[:] = np.log(drawn) if first else 0.0
        if cell.writes is not None:
            block[cell.gates.index(cell.writes)] = -remembers


def _draw(layer, name, shape, H):
    """Initial float64 values of one parameter, gate by gate: shape (G, rows, columns) or (G, rows)."""
    key = rng.name_key(name)
    if layer.init == "uniform":  # torch's: U(-1/sqrt(H), 1/sqrt(H)) for everything
        bound = 1 / math.sqrt(H)
        return rng.uniform(shape, -bound, bound, layer.seed, key, dtype=np.float64)
    if len(shape) == 2:
        return np.zeros(shape)
    if layer.init == "orthogonal" and not name.startswith("weight_ih"):
        return np.stack([init_orthogonal(m) for m in rng.normal(shape, layer.seed, key, dtype=np.float64)])
    if layer.init == "identity":
        if name.startswith("weight_ih"):
            return 0.001 * rng.normal(shape, layer.seed, key, dtype=np.float64)
        return np.broadcast_to(np.eye(*shape[1:]), shape).copy()
    bound = math.sqrt(6 / (shape[1] + shape[2]))  # Glorot & Bengio 2010, for each gate
    return rng.uniform(shape, -bound, bound, layer.seed, key, dtype=np.float64)


def init_orthogonal(normal):
    """An orthogonal matrix (orthonormal rows or columns) from normal draws (rows, columns) (Saxe 2014)."""
    rows, columns = normal.shape
    q, r = np.linalg.qr(normal if rows >= columns else normal.T)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return q if rows >= columns else q.T
