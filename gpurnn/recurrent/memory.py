"""The argument ``memory``: how much a training call may take, and which segments it has for that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

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


class Segments(NamedTuple):
    """How a call is cut. slices: of time, in the order of the time loop. states: whether all states are saved, from
    which backward rebuilds the gates; otherwise those before each segment, from which it runs the segment again."""

    slices: list[slice]
    states: bool = False


def memory_segments(layer, T, B, marked=False, save=True):
    """The ``Segments`` of a call, for the ``memory`` of a layer that has one.

    Raises ValueError where none are short enough for a training call; the message names the least that is enough.
    marked, save: as in ``time_segments``.
    """
    chunks = layer.ops.time_chunks(T, B, reverse=True)
    if layer.memory == "states":
        return Segments(cut(chunks, 1, layer.reverse), save)
    if layer.memory == "sqrt":
        return Segments(cut(chunks, max(1, math.ceil(math.sqrt(T) / max(chunks[0].stop, 1))), layer.reverse))
    least = math.inf
    for segments in _candidates(layer, chunks):
        needed = peak_bytes(layer, B, segments, marked)
        if needed <= layer.memory:
            return segments if save else segments._replace(states=False)
        least = min(least, needed)
    if not save:
        return segments
    raise ValueError(
        f"memory: a training call with T = {T}, B = {B} takes at least {least} bytes ({show_size(least)}) even in the "
        f"best segments, the limit is {layer.memory}. Allow more, or make T or B smaller"
    )


def _candidates(layer, chunks):
    """All ``Segments`` that a budget may choose, those first for which backward does the least again.

    On a GPU that is the fewest timesteps one after another, otherwise the fewest multiplications. The last segment is
    saved whole, so beside saved states it may be longer than the others: up to seven eighths of all.
    """
    count = len(chunks)
    lasts = {1} if len(layer._directions) == 2 else {1, *(-(-count * n // 8) for n in range(1, 8))}
    found = [Segments(cut(chunks, count, layer.reverse))]
    found += [Segments(cut(chunks, 1, layer.reverse, last), states=True) for last in sorted(lasts) if last < count]
    sizes = {-(-count // segments) for segments in range(2, count + 1)}
    found += [Segments(cut(chunks, size, layer.reverse)) for size in sorted(sizes, reverse=True)]
    order = -1 if layer.ops.name in ("cuda", "cupy") else 1
    return sorted(found, key=lambda segments: done_again(layer, segments)[::order])


def done_again(layer, segments):
    """What backward does again of the forward pass: the share of its multiplications, and for each pass how many
    timesteps one after another."""
    T, last = sum(map(_length, segments.slices)), _length(segments.slices[-1])
    if layer.memory is None or len(segments.slices) == 1:
        return 0.0, 0
    steps = T if len(layer._directions) == 2 else T - last
    return (steps / T if layer.cell.saved or not segments.states else 0.0), (0 if segments.states else steps)


def peak_bytes(layer, B, segments, marked=False):
    """Bytes that a training call takes at its peak in these ``Segments``, beyond what the caller holds. marked: whether
    it has lengths, resets or masks."""
    lengths = tuple(map(_length, segments.slices))
    longest = max(lengths)
    compiled, packed = False, 0
    for k, problem in enumerate(problems(layer, longest, B)):
        compiled = layer.ops.schedule(problem, layer.schedule)[0] == "compiled"
        for backward in (False, True):
            one = replace(problem, backward=backward)
            packed = max(
                packed, layer.ops.packed_bytes(one, layer._sizes(k)[2] // layer.heads, longest, layer.schedule)
            )
    return Rehearsal(layer, Shape(lengths, B, segments.states, marked), compiled).peak() + packed


def cut(chunks, count, reverse, last=0):
    """Segments of ``count`` chunks each, in the order of the time loop; the first of them has what remains.

    chunks: all of them, from the beginning of time. last: how many the last segment has, where that is more.
    """
    chunks = chunks[::-1] if not reverse else chunks  # the last segment is saved, not run again: it has full length
    last = max(last, count)
    groups = [chunks[:last], *(chunks[n : n + count] for n in range(last, len(chunks), count))]
    segments = [slice(min(one.start for one in group), max(one.stop for one in group)) for group in groups]
    return segments[::-1]


def longest_segment(segments):
    """Timesteps of the longest segment."""
    return max(map(_length, segments))


def _length(segment):
    return segment.stop - segment.start


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
