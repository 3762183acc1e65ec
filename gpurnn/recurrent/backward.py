"""The backward pass: the layers of the stack, each with its time loop, in reverse."""

import contextlib
import threading
from functools import partial

from ..dtypes import upcast
from ..gradients import active_flow, adding
from ..module import backward_of, check_unspent
from ..per_sample.recording import recorded, refuse_mixing
from .axes import check_doutput, outward
from .between import with_residual
from .checkpoints import Arrived, Border, Whole
from .directions import backward_by_direction
from .dropout import all_gradients, drop
from .heads import join_states
from .hooks import gradient_flow_hooks
from .segments import concurrent_layers, steps_of, trimmed
from .state import pack_state, restore_unused, unpack_state, zero_unused


def make_backward(layer, call, output_shape, retain):
    """The function ``backward`` of a call, which ``forward`` returns; ``backward.check`` checks a dstate alone."""
    then, versions, spent = layer._as_now(), layer.versions(), []
    turn = threading.Lock()  # backward works inside what forward saved: one thread at a time

    def check(dstate, name="dstate"):
        """``dstate`` for each pass; raises, before anything is changed, where backward cannot run."""
        if len(call.segments) > 1 and active_flow() is not None:
            how = "as a wavefront" if then.memory is None else "in segments"
            raise RuntimeError(f"gradient flow: forward ran {how}. Call forward, too, while it is recorded")
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
    layers = [layer for saved in call.saved if isinstance(saved, list) for layer in saved]
    passes = [one for layer in layers for one in layer.passes]
    copies = [(one, one.gates.copy(), one.others, one.marks and one.h.copy()) for one in passes]
    try:
        yield [list(saved) if isinstance(saved, list) else saved for saved in call.saved]
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
    with all_gradients(layer, call.weight_masks) as gradients:
        arrived = Arrived(gradients, dstates, dresets)
        if len(call.segments) > 1 and len(set(layer._directions)) > 1:
            dx = backward_by_direction(layer, all_saved, doutput, arrived, call)
        else:
            dx = _by_segment(layer, all_saved, doutput, arrived, call)
    return dx, *([state for layer_states in states for state in layer_states] for states in (dstates, dresets))


def _by_segment(layer, all_saved, doutput, arrived, call):
    """The gradient with respect to the input, segment by segment back through all layers."""
    dx, in_use = Whole(layer, call.segments, steps_of(call.segments)), []
    with layer.ops.streams(concurrent_layers(layer, call.segments)) as streams:
        for segment in trimmed(layer, call.segments[::-1]):
            dy = doutput[segment] if doutput is not None and len(call.segments) > 1 else doutput
            saved = all_saved.pop()
            saved = saved.rebuild(layer, segment, call) if isinstance(saved, Border) else saved
            part, used = _stack(layer, saved, dy, arrived, segment, call, streams)
            dx.add(segment, part)
            in_use.append(used)
            del saved, part  # before the next segment needs memory
    return dx.array


def _stack(layer, all_saved, dy, arrived, segment, call, streams):
    """One segment back through all layers: dx, and the arrays that streams may still read."""
    in_use, L, (gradients, dstates, dresets) = [], layer.num_layers, arrived
    for k in reversed(range(L)):
        saved = all_saved.pop()
        with streams.on(k, after=k + 1 if k < L - 1 else -1):
            if call.masks[k] is not None:
                dy = drop(layer, dy, call.masks[k][segment])
            hooks = gradient_flow_hooks(layer, k, saved)
            above = dy
            for one, dreset in zip(saved.passes, dresets[k], strict=True):
                one.dreset = dreset
            dy, dstates[k], dresets[k] = layer.ops.layer_backward(saved, gradients[k], dy, dstates[k], hooks, k == 0)
            silent = partial(layer.ops.zero_silent, lengths=saved.lengths, marks=saved.passes[0].marks)
            dy = with_residual(layer, k, dy, above, silent)
        if streams.count > 1:  # a stream may still read what another has written
            in_use.append((saved, dy))
    return dy, in_use
