"""The array code of a traced cell, for NumPy and CuPy: Python text, and the functions that it defines."""

from __future__ import annotations

import numpy as np

from .. import shards
from .written import Statements

_CALLS = {
    "tanh": "xp.tanh({0})", "exp": "xp.exp({0})", "expm1": "xp.expm1({0})", "log": "xp.log({0})",
    "log1p": "xp.log1p({0})", "sqrt": "xp.sqrt({0})", "fabs": "xp.abs({0})", "relu": "xp.maximum({0}, 0)",
    "larger": "xp.maximum({0}, {1})", "smaller": "xp.minimum({0}, {1})", "sigmoid": "sigmoid(xp, {0})",
    "softplus": "softplus(xp, {0})", "dsigmoid": "dsigmoid({0})", "dtanh": "dtanh({0})", "drelu": "drelu(xp, {0})",
    "where_greater": "where_greater(xp, {0}, {1}, {2}, {3})", "mean": "xp.mean({0}, axis=0, keepdims=True)",
    "batch_mean": "batch_mean(xp, {0}, scratch.batch.valid)",
}  # fmt: skip
_ARGUMENTS = (
    "xp",
    "w",
    "ax",
    "ah",
    "old",
    "new",
    "dstate",
    "scratch",
    "hook",
    "z",
    "d",
    "masks",
    "H",
    "d_inner",
    "len",
)


# ---- the functions that generated code calls


def sigmoid(xp, x):
    """1 / (1 + exp(-x)); an exp that overflows gives 0."""
    with np.errstate(over="ignore"):
        return 1 / (1 + xp.exp(-x))


def softplus(xp, x):
    """log(1 + exp(x)) without overflow."""
    return xp.maximum(x, 0) + xp.log1p(xp.exp(xp.minimum(-x, x)))  # not -abs(x): a Dual needs one branch at 0


def dsigmoid(y):
    """The derivative of y = sigmoid(x)."""
    return y * (1 - y)


def dtanh(y):
    """The derivative of y = tanh(x)."""
    return (1 - y) * (1 + y)


def drelu(xp, y):
    """The derivative of y = relu(x): NaN stays NaN."""
    return xp.where(y > 0, y.dtype.type(1), y)


def where_greater(xp, a, b, x, y):
    """x where a > b, else y, in the dtype of the arrays."""
    dtype = next(part.dtype for part in (a, b, x, y) if hasattr(part, "dtype"))
    return xp.where(a > b, x, y).astype(dtype, copy=False)


def batch_mean(xp, x, valid):
    """The mean over the batch, (H, 1). valid: (B,) the sequences that count, None for all."""
    if valid is None and not shards.active():
        return x.mean(axis=1, keepdims=True)
    total = (x if valid is None else xp.where(valid, x, 0)).sum(axis=1, keepdims=True)
    count = xp.full(1, x.shape[1], np.float64) if valid is None else valid.sum()
    if shards.active():
        total, count = shards.added(xp, total), shards.added(xp, xp.asarray(count, np.float64).reshape(1))
    return (total / xp.maximum(count, 1)).astype(x.dtype, copy=False)


_FUNCTIONS = {one.__name__: one for one in (sigmoid, softplus, dsigmoid, dtanh, drelu, where_greater, batch_mean)}


def compiled(cell):
    """The functions ``forward`` and ``backward`` of a ``TracedCell``."""
    names = dict(_FUNCTIONS)
    exec(compile(write(cell), f"<array code of cell {cell.name}>", "exec"), names)
    return names["forward"], names["backward"]


def write(cell):
    """The text of both functions."""
    return "\n".join([*_forward(cell), "", "", *_backward(cell)]) + "\n"


def _number(value):
    return repr(int(value) if value.is_integer() and abs(value) < 1e9 else value)


def _block(array, k):
    return f"{array}[{k} * H : {k + 1} * H]" if k else f"{array}[:H]"


def _statements(cell, given):
    """``Statements`` of array code. given: symbol -> expression, besides leaves."""
    states = [f"old[{k}]" for k in range(len(cell.states))]
    leaves = {
        "ax": lambda k: _block("ax", k), "ah": lambda k: _block("ah", k), "state": states.__getitem__,
        "own": "w.own[{}]".format, "mask": lambda k: _block("masks", k), "constant": _number,
        "dstate": "dstate[{}]".format, "d_inner": lambda _: "d_inner",
        "running": "scratch.batch.running[{}]".format,
    }  # fmt: skip

    def leaf(node):
        return given.get(node) or (leaves[node.op](node.value) if node.op in leaves else None)

    def call(op, arguments, node):
        return _CALLS[op].format(*arguments)

    return Statements(leaf, call, lambda name, text: f"{name} = {text}", (*_ARGUMENTS, *_FUNCTIONS))


def _forward(cell):
    first, rows = cell._rows
    yield "def forward(xp, w, ax, old, new, scratch):"
    yield "    z, masks, H = scratch.z, scratch.masks, len(new[0])"
    code = _statements(cell, {})
    if first == rows and rows:
        yield "    ah = xp.matmul(w.hh, old[0])"
    elif first:
        yield f"    ah = xp.empty(({rows} * H, new[0].shape[1]), new[0].dtype)"
        yield f"    ah[: {first} * H] = xp.matmul(w.hh[: {first} * H], old[0])"
    elif rows:
        yield f"    ah = xp.empty(({rows} * H, new[0].shape[1]), new[0].dtype)"
    before = rows - cell.separate  # gates whose b_hh is in ax
    if rows and before < first and cell.biases:
        yield "    if w.bias_apart is not None:"
        yield f"        ah[{before} * H : {first} * H] += w.bias_apart[: {first - before} * H]"
    if rows > first:
        code.compute([cell.inner_node])
        yield from _taken(code)
        inner = _block("z", len(cell.saved_nodes) - 1)  # all units have it there, also where it is one mean for all
        yield f"    {inner} = {code.expression(cell.inner_node)}"
        yield f"    ah[{first} * H :] = xp.matmul(w.hh[{first} * H :], {inner})"
        if cell.separate and cell.biases:
            start = max(before, first)
            yield "    if w.bias_apart is not None:"
            yield f"        ah[{start} * H :] += w.bias_apart[{start - before} * H :]"
    saved = [node for node in cell.saved_nodes if node is not None]
    statistics = cell.graph.normalizations if cell.training else []
    code.compute([*cell.new_states, *saved, *(one for both in statistics for one in both)])
    yield from _taken(code)
    for k, node in enumerate(cell.new_states):
        yield f"    new[{k}][...] = {code.expression(node)}"
    for k, node in enumerate(cell.saved_nodes):
        if node is not None and node is not cell.inner_node:
            yield f"    {_block('z', k)} = {code.expression(node)}"
    for both in statistics:
        yield f"    scratch.batch.found.append(({', '.join(code.expression(one) for one in both)}))"


def _backward(cell):
    first, rows = cell._rows
    yield "def backward(xp, w, old, new, dstate, scratch, hook):"
    yield "    z, d, masks, H = scratch.z, scratch.d, scratch.masks, len(new[0])"
    given = {node: f"new[{k}]" for node, k in cell.free_states.items()}
    given |= {node: _block("z", k) for k, node in enumerate(cell.saved_nodes) if node is not None}
    code = _statements(cell, given)
    code.compute([*cell.complete, *cell.d, *cell.dstates])
    yield from _taken(code)
    yield f"    hook({', '.join(code.expression(node) for node in cell.complete)})"
    for k, node in enumerate(cell.d):
        yield f"    {_block('d', k)} = {code.expression(node)}"
    results = [code.variable(f"d{name}") for name in cell.states]
    for name, node in zip(results, cell.dstates, strict=True):
        copied = ".copy()" if node.op == "dstate" else ""  # whose memory is written below
        yield f"    {name} = {code.expression(node)}{copied}"
    if rows > first:
        yield f"    d_inner = xp.matmul(w.hh[{first} * H :].T, d[{first} * H : {rows} * H])"
        code.taken.add("d_inner")
        code.compute([*cell.d_inner, *cell.dstates_inner])
        yield from _taken(code)
        for k, node in enumerate(cell.d_inner):
            if code.expression(node) != "0":
                yield f"    {_block('d', k)} += {code.expression(node)}"
        for name, node in zip(results, cell.dstates_inner, strict=True):
            if code.expression(node) != "0":
                yield f"    {name} = {name} + {code.expression(node, 2)}"
    for k, name in enumerate(results):
        yield f"    dstate[{k}][...] = {name}"
    if first:
        yield f"    dstate[0][...] += xp.matmul(w.hh[: {first} * H].T, d[: {first} * H])"


def _taken(code):
    """The statements that were written since the last time."""
    lines, code.lines = code.lines, []
    return [f"    {line}" for line in lines]
