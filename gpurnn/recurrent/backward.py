"""The backward pass: the layers of the stack, each with its time loop, in reverse."""

import contextlib
import threading

from ..dtypes import upcast
from ..gradients import active_flow, adding
from ..module import backward_of, check_unspent
from ..per_sample.recording import recorded, recording_of, refuse_mixing
from .axes import check_doutput, outward
from .dropout import drop, dropped_gradients, recorded_gradients
from .heads import join_states
from .hooks import gradient_flow_hooks
from .segments import concurrent_layers, joined
from .state import pack_state, restore_unused, unpack_state, zero_unused


def make_backward(layer, call, output_shape, retain):
    """The function ``backward`` of a call, which ``forward`` returns; ``backward.check`` checks a dstate alone."""
    then, versions, spent = layer._as_now(), layer.versions(), []
    turn = threading.Lock()  # backward works inside what forward saved: one thread at a time

    def check(dstate, name="dstate"):
        """``dstate`` for each pass; raises, before anything is changed, where backward cannot run."""
        if len(call.segments) > 1 and active_flow() is not None:
            raise RuntimeError("gradient flow: forward ran as a wavefront. Call forward, too, while it is recorded")
        if dstate is None:
            return [None] * (then.num_layers * len(then._strands))
        return unpack_state(then, dstate, output_shape[1], call.single, name)

    @backward_of(layer)
    def backward(doutput=None, dstate=None):
        if doutput is not None:
            doutput = check_doutput(then, doutput, output_shape, call.single)
        dfinal = given = check(dstate)
        if dstate is not None and call.lengths is not None:
            dfinal = zero_unused(then, given, call.lengths)
        then.check_versions(versions)
        if then.cell.over_batch and then.training:
            refuse_mixing(then)
        with turn:
            check_unspent(spent)
            if not retain:
                spent.append(True)
            with _retained(call) if retain else _spent(call) as saved:
                dx, dinitial, dresets = _time_loop(then, saved, doutput, dfinal, call)
        if call.resets is not None and call.reset_to_given:
            dinitial = dresets = [_sums(*parts) for parts in zip(dinitial, dresets, strict=True)]
        if dfinal is not given:
            dinitial = restore_unused(then, dinitial, given, call.lengths)
        if then.learn_state and not call.state_given:
            _add_initial_gradients(then, dinitial)
        elif then.learn_state and call.resets is not None and not call.reset_to_given:
            _add_initial_gradients(then, dresets)
        return outward(then, dx, call.single), pack_state(then, dinitial, call.single)

    backward.check = check
    return backward


@contextlib.contextmanager
def _retained(call):
    """Lists of what the call saved, for a backward to use up; afterwards the arrays are what they were."""
    passes = [one for layers in call.saved for layer in layers for one in layer.passes]
    copies = [(one, one.gates.copy(), one.others, one.marks and one.h.copy()) for one in passes]
    try:
        yield [list(layers) for layers in call.saved]
    finally:
        for one, gates, others, h in copies:
            one.gates[...], one.others = gates, others
            if h is not None:
                one.h[...] = h


def _spent(call):
    """What the call saved, which the call then holds no longer, so that backward frees it layer by layer."""
    saved, call.saved = call.saved, None
    return contextlib.nullcontext(saved)


def _add_initial_gradients(layer, dinitial):
    """Add the gradients of the learned initial state."""
    whole = join_states(layer.xp, dinitial, layer.heads)
    for (_, _, _, suffix), parts in zip(layer._passes(), whole, strict=True):
        for kind, part in zip(layer.cell.states, parts, strict=True):
            name = f"initial_{kind}{suffix}"
            if layer._trains(name) and not recorded(layer, name, part):
                with adding(layer.grads):
                    layer.grads[name] += upcast(part).sum(axis=0)


def _sums(parts, more):
    """The sums of two gradients with respect to a state."""
    return tuple(a + b for a, b in zip(parts, more, strict=True))


def _time_loop(layer, all_saved, doutput, dfinal, call):
    """The gradients with respect to the input (T, B, I), to the initial states, and to those that resets give; uses up
    ``all_saved``."""
    D = len(layer._strands)
    dstates = [dfinal[k * D : (k + 1) * D] for k in range(layer.num_layers)]  # where each layer has arrived
    dresets = [[None] * D for _ in range(layer.num_layers)]
    dxs, in_use = [], []
    with layer.ops.streams(concurrent_layers(layer, call.segments)) as streams:
        for segment in reversed(call.segments):
            dy = doutput[segment] if doutput is not None and len(call.segments) > 1 else doutput
            dx, used = _stack(layer, all_saved.pop(), dy, (dstates, dresets), segment, call, streams)
            dxs.append(dx)
            in_use.append(used)
    every = ([state for layer_states in states for state in layer_states] for states in (dstates, dresets))
    return joined(layer, dxs[::-1]), *every


def _stack(layer, all_saved, dy, arrived, segment, call, streams):
    """One segment back through all layers: dx, and the arrays that streams may still read.

    arrived: the gradients with respect to states, which move on, and to those that resets give, which add up.
    """
    in_use, L, (dstates, dresets) = [], layer.num_layers, arrived
    for k in reversed(range(L)):
        saved = all_saved.pop()
        with streams.on(k, after=k + 1 if k < L - 1 else -1):
            if call.masks[k] is not None:
                dy = drop(layer, dy, call.masks[k][segment])
            hooks = gradient_flow_hooks(layer, k, saved)
            above = dy
            into = dropped_gradients if recording_of(layer) is None else recorded_gradients
            with into(layer, k, call.weight_masks[k]) as gradients:
                dy, dstates[k], more = layer.ops.layer_backward(saved, gradients, dy, dstates[k], hooks, k == 0)
            dresets[k] = [_sums(a, b) if a and b else b for a, b in zip(dresets[k], more, strict=True)]
            if layer.residual and k and above is not None and above.shape == dy.shape:
                marks = saved.passes[0].marks
                dy = dy + (above if k < L - 1 else layer.ops.zero_silent(above.copy(), saved.lengths, marks))
        if streams.count > 1:  # a stream may still read what another has written
            in_use.append((saved, dy))
    return dy, in_use
