"""The hook that records the gradient flow, see gradients.py."""

import numpy as np

from ..gradients import StepNorms, active_flow


def gradient_flow_hooks(layer, k, saved):
    """A hook for each strand of layer ``k``, which saved ``saved``; None while no gradient flow is recorded."""
    flow = active_flow()
    if flow is None:
        return None
    places = [divmod(strand, layer.heads) for strand in range(len(saved.passes))]
    ends = [layer._suffix(k, d)[1:] + (f"_head{head}" if layer.heads > 1 else "") for d, head in places]
    return [_hook(layer, flow, end, one) for end, one in zip(ends, saved.passes, strict=True)]


def _hook(layer, flow, place, saved):
    """The hook of one pass, which writes to ``flow`` under the name of the layer and ``place``."""
    xp, (T, B, _) = layer.xp, saved.h_new.shape
    norms = [xp.zeros((T, B)) for _ in layer.cell.states]
    name = f"{layer.name}.{place}" if layer.name else place
    last = T - 1 if saved.reverse else 0  # the timestep that the backward pass reaches last

    def hook(t, *gradients):
        for norm, gradient in zip(norms, gradients, strict=True):
            norm[t] = xp.sqrt(xp.square(gradient.astype(np.float64)).sum(axis=0))
        if t == last:
            dh, *others = (layer.ops.to_numpy(norm) for norm in norms)
            flow[name] = StepNorms(dh, dict(zip(layer.cell.states[1:], others, strict=True)))

    return hook
