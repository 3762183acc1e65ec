"""Reverse mode over the graph of a cell, and what its forward pass saves for that.

A derivative is written over the activated value where it can be, as in the hand-written cells: sigmoid's is s (1 - s).

**Saved or recomputed.** The backward pass has the old and new states, the parameters and the masks at no cost. A value
that it needs besides is recomputed if it follows from these and from what is saved already; otherwise it is saved.
Means and second products are never recomputed. So the LSTM saves its four gates, and computes tanh(c') again.
"""

from __future__ import annotations

from .symbols import maximum, mean, minimum, sigmoid, where

LEAVES = ("ax", "ah", "state", "own", "mask", "constant", "running", "dstate", "d_inner")
_FREE = ("state", "own", "mask", "constant", "running", "dstate", "d_inner")  # that the backward pass has


def gradients(graph, seeds):
    """Symbol -> the gradient with respect to it. seeds: (symbol, gradient) pairs, of the results."""
    found, last = {}, -1
    for node, seed in seeds:
        found[node] = found[node] + seed if node in found else seed
        last = max(last, node.index)
    for node in reversed(graph.nodes[: last + 1]):
        if node not in found or node.op in LEAVES:
            continue
        for arg, gradient in zip(node.args, _backward(node, found[node]), strict=True):
            if gradient is None or arg.op == "constant":
                continue
            found[arg] = found[arg] + gradient if arg in found else gradient
    return found


def _backward(node, d):
    """The gradients with respect to the arguments of an operation, from that with respect to its result."""
    args, y = node.args, node
    match node.op:
        case "add":
            return d, d
        case "sub":
            return d, -d
        case "mul":
            return d * args[1], d * args[0]
        case "div":
            return d / args[1], -(d * y / args[1])
        case "neg":
            return (-d,)
        case "sigmoid":
            return (d * node.graph.make("dsigmoid", y),)
        case "tanh":
            return (d * node.graph.make("dtanh", y),)
        case "relu":
            return (d * node.graph.make("drelu", y),)
        case "exp":
            return (d * y,)
        case "expm1":
            return (d * (y + 1),)
        case "log":
            return (d / args[0],)
        case "log1p":
            return (d / (1 + args[0]),)
        case "sqrt":
            return (0.5 * d / y,)
        case "softplus":
            return (d * sigmoid(args[0]),)
        case "fabs":
            return (where(args[0] > 0, d, where(args[0] < 0, -d, d * args[0])),)  # 0 at 0, NaN at NaN
        case "larger":
            return where(args[0] > args[1], d, 0), where(args[0] > args[1], 0, d)
        case "smaller":
            return where(args[0] < args[1], d, 0), where(args[0] < args[1], 0, d)
        case "where_greater":
            return None, None, where(args[0] > args[1], d, 0), where(args[0] > args[1], 0, d)
        case "mean":
            return (mean(d),)  # it is its own mirror: each unit gets the mean of what all units pass back
        case "batch_mean":
            return (node.graph.make("batch_mean", d),)
        case "clip_gradient":
            return (minimum(maximum(d, -node.value), node.value),)
        case "stop_gradient":
            return (None,)
    raise AssertionError(f"no derivative of {node.op}")


def below(nodes, stop):
    """All symbols that ``nodes`` are computed from, themselves included, in order; not beyond those that ``stop``."""
    found, todo = {}, list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found[node] = None
            if not stop(node):
                todo += node.args
    return sorted(found, key=lambda node: node.index)


def needed_values(results, count):
    """The symbols of the forward pass, the first ``count`` of their graph, that ``results`` read."""

    def is_forward(node):
        return node.index < count

    return [node for node in below(results, is_forward) if is_forward(node) and node.op != "constant"]


def saved_values(needed, new_states):
    """Those of the ``needed`` values that the forward pass saves, by the rule of this module.

    new_states: symbols that the backward pass has.
    """
    saved, known = [], {}

    def is_known(node):
        if node not in known:
            known[node] = (
                node.op in _FREE
                or node in new_states
                or (node.op not in ("ax", "ah", "mean", "batch_mean") and all([is_known(arg) for arg in node.args]))
            )
        return known[node]

    for node in needed:
        if not is_known(node):
            saved.append(node)
            known[node] = True
            known = {one: yes for one, yes in known.items() if yes}  # what follows from it is known now
    return saved
