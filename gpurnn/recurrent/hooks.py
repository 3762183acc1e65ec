"""The hook that records the gradient flow, see gradients.py."""

import numpy as np

from ..gradients import StepNorms, active_flow


def gradient_flow_hook(layer, suffix, shape, reverse):
    """The hook of one pass's backward pass; None while no gradient flow is recorded.

    shape: of the pass's hidden states in slots, (T + 1, B, P). reverse: whether the pass runs backwards in time.
    """
    flow = active_flow()
    if flow is None:
        return None
    xp, (slots, B, _) = layer.xp, shape
    norms = [xp.zeros((slots - 1, B)) for _ in range(layer.cell.states)]
    name = f"{layer.name}.{suffix[1:]}" if layer.name else suffix[1:]
    last = slots - 2 if reverse else 0  # the timestep that the backward pass reaches last

    def hook(t, *gradients):
        for norm, gradient in zip(norms, gradients, strict=False):
            norm[t] = xp.sqrt(xp.square(gradient.astype(np.float64)).sum(axis=0))
        if t == last:
            flow[name] = StepNorms(*(layer.ops.to_numpy(norm) for norm in norms))

    return hook
