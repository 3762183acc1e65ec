"""The hook that records the gradient flow, see gradients.py."""

import numpy as np

from ..gradients import StepNorms, active_flow


def gradient_flow_hooks(layer, k, saved):
    """A hook for each strand of layer ``k``, which saved ``saved``; None while no gradient flow is recorded."""
    flow = active_flow()
    if flow is None:
        return None
    hooks = []
    for d in range(len(layer._directions)):
        squares = _squares(layer, saved.passes[d * layer.heads])
        hooks += [_hook(layer, flow, layer._suffix(k, d)[1:], squares, head) for head in range(layer.heads)]
    return hooks


def _squares(layer, saved):
    """For each state the squared norms (T, B) of a direction, all heads together, and the timestep that comes last."""
    T, B, _ = saved.h_new.shape
    return [layer.xp.zeros((T, B)) for _ in layer.cell.states], T - 1 if saved.reverse else 0


def _hook(layer, flow, place, squares, head):
    """The hook of one head, which writes to ``flow`` under the name of the layer and ``place``."""
    name, (squares, last) = f"{layer.name}.{place}" if layer.name else place, squares

    def hook(t, *gradients):
        for square, gradient in zip(squares, gradients, strict=True):
            part = layer.xp.square(gradient.astype(np.float64)).sum(axis=0)
            square[t] = part if head == 0 else square[t] + part
        if t == last and head == layer.heads - 1:
            dh, *others = (np.sqrt(layer.ops.to_numpy(square)) for square in squares)
            flow[name] = StepNorms(dh, dict(zip(layer.cell.states[1:], others, strict=True)))

    return hook
