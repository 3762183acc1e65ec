"""Random masks: of the dropout between the layers of a stack, and of what cells draw."""

from .. import rng


def dropout_masks(layer, T, B):
    """For each layer the mask of its outputs, None where nothing is dropped: after the last layer, and in evaluation
    mode."""
    if not (layer.training and layer.dropout > 0):
        return [None] * layer.num_layers
    layers = range(layer.num_layers - 1)
    return [draw_mask(layer, k, (T, B, layer._sizes(k + 1)[0]), layer.calls) for k in layers] + [None]


def draw_mask(layer, k, shape, call):
    """Which outputs of layer ``k`` reach the next one, in the memory order of these outputs."""
    mask = layer.ops.dropout_mask(shape, layer.dropout, layer.seed, rng.name_key(f"{layer.name}.between{k}"), call)
    placed = layer.ops.empty_steps(*shape, mask.dtype)
    if placed.strides == mask.strides:
        return mask
    layer.ops.copy_steps(placed, mask)
    return placed


def drop(layer, x, mask):
    """x / (1 - rate) where the mask is set, else zero: outputs and their gradients alike."""
    scale = 0.0 if layer.dropout == 1 else 1 / (1 - layer.dropout)
    out = layer.ops.empty_steps(*x.shape, layer.dtype)
    layer.xp.multiply(x, mask, out=out)
    layer.xp.multiply(out, layer.dtype.type(scale), out=out)
    return out


def cell_masks(layer, T, B):
    """For each layer the ``masks`` of ``RunOptions``: for each direction those of the cell's draws. None without."""
    draws = layer.cell.draws
    if not draws:
        return [None] * layer.num_layers
    steps = T if any(draw.each == "timestep" for draw in draws) else min(T, 1)
    masks = [[] for _ in range(layer.num_layers)]
    for _, k, _, suffix in layer._passes():
        H = layer._sizes(k)[1]
        whole = layer.xp.empty((steps, B, len(draws) * H), bool)
        for n, draw in enumerate(draws):
            shape = (steps if draw.each == "timestep" else min(T, 1), B, H)
            key = rng.name_key(f"{layer.name}.{draw.name}{suffix}")
            whole[:, :, n * H : (n + 1) * H] = layer.ops.dropout_mask(shape, draw.rate, layer.seed, key, layer.calls)
        masks[k].append(whole)
    return [tuple(directions) for directions in masks]


def masks_within(masks, segment):
    """The ``masks`` of a segment of time."""
    return None if masks is None else tuple(mask if len(mask) == 1 else mask[segment] for mask in masks)
