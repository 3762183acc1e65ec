"""What a call would do, before it is made: schedules and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import check_flag, check_size
from .memory import done_again, longest_segment, peak_bytes
from .peak import added, mask_bytes
from .segments import concurrent_layers, layer_problems, time_segments


@dataclass
class Plan:
    """What a training call with (T, B) would do, and the bytes it needs. ``layer.plan(T, B)`` makes it.

    Not all of this memory is used at once: the total is an upper bound.

    Attributes
    ----------
    schedule : str
        The schedule of the time loop; several, separated by commas, where layers differ.
    reason : str
        Why that schedule, and why not a faster one.
    cache_bytes : int
        What forward saves for backward. A pass (layer and direction) saves T*B*K*H + (T+1)*B*(P + (S-1)*H) numbers,
        with S states, and K = 1 for RNN, 4 for GRU and LSTM, 5 for LSTM with projection; K of another cell is
        ``cell.saved_blocks``. A wavefront adds one timestep of
        states for each segment. Each layer whose input is a fresh array (after dropout, after two directions, after a
        residual sum, on the backend "cuda") adds T*B*I. States besides h are float32 beside 16-bit numbers. Random
        masks add a byte for each of theirs. With ``memory`` T is here the longest segment, but for masks, for the
        inputs of layers with two directions, and with "states" for the states; each segment adds its first states.
    output_bytes : int
        The output.
    backward_bytes : int
        The largest extra memory of backward, which otherwise works inside the cache: dx, and the scratch of a timestep.
        A wavefront holds the dx of all layers until the end.
    packed_bytes : int
        What compiled code on a CPU uses, for a while, to copy weights, inputs and states into the order in which its
        products read them: the largest of all layers. In long calls these are x or h of a chunk of timesteps, some
        thousand rows of I or P numbers, each padded to whole vectors, for the weight gradients. The schedule "fused" of
        a GPU copies W_hh and two timesteps of what it multiplies, float32 as six bytes a number.
    peak_bytes : int
        The most that a call with its backward takes at once, besides x, doutput, parameters and their gradients, where
        the output is held to the end. On "numpy" and "cpu" it is within 5 % of what is measured, for a first call (10 %
        with heads); for other backends and wavefronts it is an estimate. With "states" and no marks but lengths it
        counts too much, up to a seventh.
    recompute : float
        The share of the forward pass's multiplications that backward makes again, from 0.0 to 1.0; 0.0 without
        ``memory``.
    steps_again : int
        Timesteps of each pass that backward runs again, one after another: T times ``recompute``. 0 where the gates are
        rebuilt from saved states, as these timesteps do not wait for one another.
    """

    schedule: str
    reason: str
    cache_bytes: int
    output_bytes: int
    backward_bytes: int
    packed_bytes: int = 0
    peak_bytes: int = 0
    recompute: float = 0.0
    steps_again: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of a forward and backward pass together, besides the inputs and the parameters."""
        return self.cache_bytes + self.output_bytes + self.backward_bytes + self.packed_bytes


def make_plan(layer, T, B, marked):
    """The ``Plan`` of a training call of ``layer`` with x (T, B, I)."""
    T, B, D = check_size("T", T, 0), check_size("B", B, 0), len(layer._directions)
    layer.ops.refuse_sizes(T, B, lambda: [(one, True, layer.schedule) for one in layer_problems(layer, T, B)])
    size = layer.dtype.itemsize
    segments = time_segments(layer, T, B, marked=check_flag("marked", marked))
    schedule, reason, packed = _schedules(layer, T, B, segments)
    most_inputs = max(layer._sizes(k)[0] for k in range(layer.num_layers))
    H, (recompute, steps_again) = max(layer.hidden_sizes), done_again(layer, segments)
    scratch = B * H * (2 * layer.cell.saved_blocks + 4) + min(T * B * H, 1 << 18)
    return Plan(
        schedule=schedule,
        reason=reason,
        cache_bytes=_cache_bytes(layer, T, B, segments),
        output_bytes=T * B * D * layer._sizes(layer.num_layers - 1)[2] * size,
        backward_bytes=T * B * most_inputs * D * size + scratch * layer.compute_dtype.itemsize,
        packed_bytes=packed,
        peak_bytes=peak_bytes(layer, B, segments, marked),
        recompute=recompute,
        steps_again=steps_again,
    )


def _cache_bytes(layer, T, B, segments):
    """Bytes that forward saves for backward, as ``Plan`` counts them."""
    size, compute_size = layer.dtype.itemsize, layer.compute_dtype.itemsize
    cut = layer.memory is not None and len(segments.slices) > 1
    steps = longest_segment(segments.slices) if cut else T
    cache, slots = mask_bytes(layer, T, B), (T if segments.states else steps) + len(segments.slices)
    for _, k, _, _ in layer._passes():
        _, H, P = layer._sizes(k)
        cache += steps * B * layer.cell.saved_blocks * H * size + slots * B * P * size
        cache += slots * B * H * compute_size * (len(layer.cell.states) - 1)
    two = len(layer._directions) == 2
    inputs = T if two else steps
    for k in range(1, layer.num_layers):
        # a kernel writes its output to a fresh array, besides the states
        fresh = len(layer._strands) > 1 or layer.dropout or layer.ops.name == "cuda"
        cache += inputs * B * layer._sizes(k)[0] * size * bool(fresh or added(layer, k - 1))
    return cache


def _memory_reason(layer, segments):
    """What is saved, and what is computed again."""
    longest = longest_segment(segments.slices)
    if len(segments.slices) == 1:
        return f"memory={layer.memory!r}: one segment, everything is saved"
    how = f"memory={layer.memory!r}: {len(segments.slices)} segments of up to {longest} timesteps"
    if segments.states:
        inputs = "The inputs of all layers and all" if len(layer._directions) == 2 else "All"
        rebuilt = "rebuilds the gates of a segment at once" if layer.cell.saved else "finds in them all that it reads"
        return f"{how}. {inputs} states are saved; backward {rebuilt}"
    if len(layer._directions) == 2:
        return (
            f"{how} in each direction. The inputs of all layers and the states between segments are saved; "
            "backward runs every segment again, layer by layer"
        )
    return f"{how}. The states between segments and all of the last one are saved; backward runs the others again"


def _schedules(layer, T, B, segments):
    """The names of the schedules, the reasons, and the bytes that compiled code on a CPU packs."""
    longest, concurrent = longest_segment(segments.slices), concurrent_layers(layer, segments.slices)
    schedules, packed = {}, 0
    for k, forward in enumerate(layer_problems(layer, T, B)):
        for backward in (False, True):
            problem = replace(forward, backward=backward)
            packed = max(
                packed, layer.ops.packed_bytes(problem, layer._sizes(k)[2] // layer.heads, longest, layer.schedule)
            )
            name, why = layer.ops.schedule(problem, layer.schedule)
            schedules.setdefault((name, why), []).append(f"layer {k} {'backward' if backward else 'forward'}")
    lines = [f"{', '.join(passes)}: {name}, {why}" for (name, why), passes in schedules.items()]
    reason = "; ".join(lines) if len(schedules) > 1 else why
    if concurrent > 1:
        reason = f"{concurrent} layers side by side, each {longest} timesteps after the one below; {reason}"
    if layer.memory is not None:
        reason = f"{_memory_reason(layer, segments)}; {reason}"
    if layer.schedule != "auto" and layer.ops.name != "cuda":
        reason += f". schedule={layer.schedule!r} has no effect here: schedules are of the backend 'cuda'"
    return ", ".join(dict.fromkeys(name for name, _ in schedules)), reason, packed
