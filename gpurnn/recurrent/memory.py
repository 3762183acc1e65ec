"""The argument ``memory``: how much a training call may take, and how long its segments are for that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..backends.cuda.schedules import Problem
from ..errors import check_size, show_size
from ..files.limits import parse_size
from .heads import inputs_of
from .peak import Rehearsal, Shape


def check_memory_limit(layer, value: Any) -> str | int | None:
    """The argument ``memory``: None, "sqrt", "states", or bytes, which may be text. Raises TypeError, ValueError."""
    if value is None:
        return None
    if layer._cell.over_batch:
        raise ValueError("memory: batch_norm counts timesteps from the beginning of a call, not of a segment")
    if layer.wavefront:
        raise ValueError("memory: a wavefront has segments of its own: leave out one of the two")
    if value in ("sqrt", "states"):
        return value
    if not isinstance(value, str):
        return check_size("memory", value)
    size = parse_size(value, "memory") if value[:1].isdigit() else math.inf
    if not 0 < size < math.inf:
        raise ValueError(f"memory should be None, 'sqrt', 'states', or bytes such as '1GiB' or '200MB', got {value!r}")
    return size


def chunks_of_segment(layer, T, B, marked=False, save=True):
    """How many chunks of time a segment has, for the ``memory`` of a layer that has one.

    Raises ValueError where no segments are short enough for a training call; the message names the least that is
    enough. marked, save: as in ``time_segments``.
    """
    chunks = layer.ops.time_chunks(T, B, reverse=True)
    if layer.memory == "states":
        return 1
    if layer.memory == "sqrt":
        return max(1, math.ceil(math.sqrt(T) / max(chunks[0].stop, 1)))
    count, least = len(chunks), math.inf
    for segments in range(1, count + 1):
        size = -(-count // segments)
        if segments > 1 and size == -(-count // (segments - 1)):
            continue
        needed = peak_bytes(layer, B, cut(chunks, size, layer.reverse), marked)
        if needed <= layer.memory:
            return size
        least = min(least, needed)
    if not save:
        return 1
    raise ValueError(
        f"memory: a training call with T = {T}, B = {B} takes at least {least} bytes ({show_size(least)}) even in the "
        f"best segments, the limit is {layer.memory}. Allow more, or make T or B smaller"
    )


def peak_bytes(layer, B, segments, marked=False):
    """Bytes that a training call takes at its peak in these segments, beyond what the caller holds. marked: whether it
    has lengths, resets or masks."""
    lengths = [segment.stop - segment.start for segment in segments]
    longest = max(lengths)
    compiled, packed = False, 0
    for k, problem in enumerate(problems(layer, longest, B)):
        compiled = layer.ops.schedule(problem, layer.schedule)[0] == "compiled"
        for backward in (False, True):
            one = replace(problem, backward=backward)
            packed = max(packed, layer.ops.packed_bytes(one, layer._sizes(k)[2] // layer.heads, longest))
    return (
        Rehearsal(
            layer, Shape(sum(lengths), B, len(segments), lengths[-1], max(lengths[:-1], default=0), marked), compiled
        ).peak()
        + packed
    )


def cut(chunks, count, reverse):
    """Segments of ``count`` chunks each, in the order of the time loop; the first of them has what remains.

    chunks: all of them, from the beginning of time.
    """
    chunks = chunks[::-1] if not reverse else chunks  # the last segment is saved, not run again: it has full length
    groups = [chunks[n : n + count] for n in range(0, len(chunks), count)]
    segments = [slice(min(one.start for one in group), max(one.stop for one in group)) for group in groups]
    return segments[::-1]


def longest_segment(segments):
    """Timesteps of the longest segment."""
    return max(segment.stop - segment.start for segment in segments)


def problems(layer, T, B, concurrent=1):
    """For each layer the ``schedules.Problem`` of a forward pass of T timesteps."""
    for k in range(layer.num_layers):
        _, H, P = layer._sizes(k)
        inputs = inputs_of(layer, k)
        if layer.ops.name == "cuda" and inputs < layer._sizes(k)[0]:
            inputs = 0  # what a kernel multiplies is all of x
        yield Problem(
            layer.cell, H // layer.heads, T, B, len(layer._strands), layer.dtype.name,
            projected=P != H, backward=False, I=inputs, concurrent=concurrent,
        )  # fmt: skip
