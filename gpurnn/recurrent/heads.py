"""Heads: parts of the hidden units with recurrent weights of their own, each a layer of H/N units for a time loop."""

from __future__ import annotations

from ..errors import check_size


def check_heads(heads, hidden_sizes, proj_size):
    """``heads`` as int. Raises ValueError where the units cannot be divided so."""
    heads = check_size("heads", heads)
    uneven = [size for size in hidden_sizes if size % heads]
    if uneven:
        raise ValueError(f"heads: hidden_size = {uneven[0]} cannot be divided into {heads} heads of one size")
    if heads > 1 and proj_size:
        raise ValueError("heads: proj_size mixes all units in every timestep, so that no head could be on its own")
    return heads


def check_parts(layer):
    """Raise ValueError where the heads of a layer read equal parts of an input that cannot be divided so."""
    if layer.mix_heads or layer.heads == 1:
        return
    for k in range(layer.num_layers):
        inputs = layer._sizes(k)[0]
        if inputs % layer.heads:
            raise ValueError(
                f"mix_heads: the {inputs} inputs of layer {k} cannot be divided into {layer.heads} parts of one size"
            )


def inputs_of(layer, k):
    """How many inputs a head of layer ``k`` reads."""
    inputs = layer._sizes(k)[0]
    return inputs if layer.mix_heads else inputs // layer.heads


def columns_of(layer, k, head):
    """Which columns of its input a head of layer ``k`` reads, None for all."""
    if layer.mix_heads or layer.heads == 1:
        return None
    size = inputs_of(layer, k)
    return slice(head * size, (head + 1) * size)


def split(array, heads):
    """Views of the last axis, one for each head."""
    size = array.shape[-1] // heads
    return [array[..., n * size : (n + 1) * size] for n in range(heads)]


def split_states(states, heads):
    """For each pass a tuple of (B, H) arrays or None -> the same for each head of it."""
    if heads == 1:
        return states
    found = []
    for parts in states:
        every = [[None] * heads if part is None else split(part, heads) for part in parts]
        found += list(zip(*every, strict=True))
    return found


def join_states(xp, states, heads):
    """The reverse of ``split_states``."""
    if heads == 1:
        return states
    groups = [states[first : first + heads] for first in range(0, len(states), heads)]
    return [tuple(xp.concatenate(parts, axis=-1) for parts in zip(*group, strict=True)) for group in groups]


def split_masks(mask, draws, heads):
    """Masks (T, B, M*H) of a cell's draws -> one array (T, B, M*H/N) for each head."""
    if heads == 1:
        return [mask]
    T, B, columns = mask.shape
    by_draw = mask.reshape(T, B, draws, columns // draws)
    return [part.reshape(T, B, columns // heads) for part in split(by_draw, heads)]
