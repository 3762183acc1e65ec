"""Segments of the time loop: after each of them the next layer of a wavefront may begin."""

import numpy as np

from ..backends.cuda.schedules import Problem


def time_segments(layer, T, watched):
    """The segments of T timesteps, slices in the order of the time loop. watched: all of time is wanted at once, for
    ``return_all`` or the gradient flow."""
    size = layer.wavefront
    if not size or watched or layer.num_layers == 1 or size >= T:
        return [slice(0, T)]
    segments = [slice(t, min(t + size, T)) for t in range(0, T, size)]
    return segments[::-1] if layer.reverse else segments


def concurrent_layers(layer, segments):
    """How many layers run at once: all of them in a wavefront."""
    return layer.num_layers if len(segments) > 1 else 1


def longest_segment(segments):
    """Timesteps of the longest segment."""
    return max(segment.stop - segment.start for segment in segments)


def lengths_within(lengths, segment):
    """What lengths (B,) or None are within a segment; None where every sequence lasts until its end."""
    if lengths is None or (lengths >= segment.stop).all():
        return None
    return np.clip(lengths - segment.start, 0, segment.stop - segment.start)


def joined(layer, parts):
    """The arrays of all segments, in the order of the time loop, as one over all of time."""
    if len(parts) == 1:
        return parts[0]
    return layer.xp.concatenate(parts[::-1] if layer.reverse else parts)


def layer_problems(layer, T, B):
    """For each layer the ``schedules.Problem`` of its forward pass in a call with (T, B)."""
    segments = time_segments(layer, T, watched=False)
    longest, concurrent = longest_segment(segments), concurrent_layers(layer, segments)
    for k in range(layer.num_layers):
        inputs, H, P = layer._sizes(k)
        yield Problem(
            layer.cell, H // layer.heads, longest, B, len(layer._strands), layer.dtype.name,
            projected=P != H, backward=False, I=inputs, concurrent=concurrent,
        )  # fmt: skip
