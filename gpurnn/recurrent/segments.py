"""Segments of the time loop: where the next layer of a wavefront may begin, and where ``memory`` saves states."""

import numpy as np

from .memory import Segments, longest_segment, memory_segments, problems


def time_segments(layer, T, B, watched=False, marked=False, save=True):
    """The ``Segments`` of T timesteps of B sequences; with two directions, in the order of the first. watched: all of
    time is wanted at once, for ``return_all`` or the gradient flow. marked: whether there are lengths, resets or masks.
    save: whether backward will follow."""
    if watched or T == 0:
        return Segments([slice(0, T)])
    if layer.memory is not None:
        return memory_segments(layer, T, B, marked, save)
    size = layer.wavefront
    if not size or layer.num_layers == 1 or size >= T:
        return Segments([slice(0, T)])
    slices = [slice(t, min(t + size, T)) for t in range(0, T, size)]
    return Segments(slices[::-1] if layer.reverse else slices)


def in_order(segments, reverse):
    """The segments of a call with two directions, in the order of one direction's time loop."""
    return segments[::-1] if reverse else segments


def trimmed(layer, segments):
    """The ``segments`` one after another, where ``memory`` cuts time. Memory that one leaves and none of those to come
    can use, as their length is another, is given back before the next begins."""
    before = None
    for segment in segments:
        length = segment.stop - segment.start
        if layer.memory is not None and len(segments) > 1 and length != before:
            layer.ops.trim()
        before = length
        yield segment


def steps_of(segments):
    """T, the timesteps of all segments."""
    return max(segment.stop for segment in segments)


def concurrent_layers(layer, segments):
    """How many layers run at once: all of them in a wavefront."""
    return layer.num_layers if len(segments) > 1 and layer.memory is None else 1


def lengths_within(lengths, segment):
    """What lengths (B,) or None are within a segment; None where every sequence lasts until its end."""
    if lengths is None or (lengths >= segment.stop).all():
        return None
    return np.clip(lengths - segment.start, 0, segment.stop - segment.start)


def layer_problems(layer, T, B, save=True):
    """For each layer the ``schedules.Problem`` of its forward pass in a call with (T, B)."""
    segments = time_segments(layer, T, B, save=save).slices
    return problems(layer, longest_segment(segments), B, concurrent_layers(layer, segments))
