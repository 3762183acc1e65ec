"""The backward pass: the time loops in reverse, then the gradients of weights and inputs."""

import contextlib
import threading

from ..backends.ops import flat
from ..dtypes import upcast
from ..gradients import active_flow, adding
from ..module import check_unspent
from .axes import check_doutput, outward
from .dropout import drop
from .hooks import gradient_flow_hook
from .segments import concurrent_layers, joined, lengths_within
from .state import pack_state, restore_unused, unpack_state, zero_unused
from .weight_gradients import add_weight_gradients


def make_backward(layer, call, output_shape, retain):
    """The function ``backward`` of a call, which ``forward`` returns; ``backward.check`` checks a dstate alone."""
    then, versions, spent = layer._as_now(), layer.versions(), []
    turn = threading.Lock()  # backward works inside what forward saved: one thread at a time

    def check(dstate, name="dstate"):
        """``dstate`` for each pass; raises, before anything is changed, where backward cannot run."""
        if len(call.segments) > 1 and active_flow() is not None:
            raise RuntimeError("gradient flow: forward ran as a wavefront. Call forward, too, while it is recorded")
        if dstate is None:
            return [None] * (then.num_layers * len(then._directions))
        return unpack_state(then, dstate, output_shape[1], call.single, name)

    def backward(doutput=None, dstate=None):
        if doutput is not None:
            doutput = check_doutput(then, doutput, output_shape, call.single)
        dfinal = given = check(dstate)
        if dstate is not None and call.lengths is not None:
            dfinal = zero_unused(then, given, call.lengths)
        then.check_versions(versions)
        with turn:
            check_unspent(spent)
            if not retain:
                spent.append(True)
            with _retained(call) if retain else _spent(call) as saved:
                dx, dinitial = _time_loop(then, saved, doutput, dfinal, call)
        if dfinal is not given:
            dinitial = restore_unused(then, dinitial, given, call.lengths)
        if then.learn_state and not call.state_given:
            _add_initial_gradients(then, dinitial)
        return outward(then, dx, call.single), pack_state(then, dinitial, call.single)

    backward.check = check
    return backward


@contextlib.contextmanager
def _retained(call):
    """Lists of what the call saved, for a backward to use up; afterwards the arrays are what they were."""
    all_saved = [saved for layers in call.saved for directions in layers for saved in directions]
    copies = [(saved, saved.gates.copy(), saved.c) for saved in all_saved]
    try:
        yield [list(layers) for layers in call.saved]
    finally:
        for saved, gates, c in copies:
            saved.gates[...], saved.c = gates, c


def _spent(call):
    """What the call saved, which the call then holds no longer, so that backward frees it layer by layer."""
    saved, call.saved = call.saved, None
    return contextlib.nullcontext(saved)


def _add_initial_gradients(layer, dinitial):
    """Add the gradients of the learned initial state."""
    for (_, _, _, suffix), parts in zip(layer._passes(), dinitial, strict=True):
        for name, part in zip(("initial_h", "initial_c"), parts, strict=False):
            if layer._trains(name + suffix):
                with adding(layer.grads):
                    layer.grads[name + suffix] += upcast(part).sum(axis=0)


def _time_loop(layer, saved, doutput, dfinal, call):
    """The gradients with respect to the input (T, B, I) and to the initial states; uses up ``saved``."""
    D = len(layer._directions)
    dstates = [dfinal[k * D : (k + 1) * D] for k in range(layer.num_layers)]  # where each layer has arrived
    dxs, in_use = [], []
    with layer.ops.streams(concurrent_layers(layer, call.segments)) as streams:
        for segment in reversed(call.segments):
            dy = doutput[segment] if doutput is not None and len(call.segments) > 1 else doutput
            dx, used = _stack(layer, saved.pop(), dy, dstates, segment, call, streams)
            dxs.append(dx)
            in_use.append(used)
    return joined(layer, dxs[::-1]), [state for layer_states in dstates for state in layer_states]


def _stack(layer, saved, dy, dstates, segment, call, streams):
    """One segment back through all layers: dx, and the arrays that streams may still read; moves ``dstates`` on."""
    lengths, in_use, L = lengths_within(call.lengths, segment), [], layer.num_layers
    for k in reversed(range(L)):
        all_saved = saved.pop()
        with streams.on(k, after=k + 1 if k < L - 1 else -1):
            if call.masks[k] is not None:
                dy = drop(layer, dy, call.masks[k][segment])
            dy, dstates[k] = _layer_backward(layer, k, all_saved, dy, dstates[k], lengths)
        if streams.count > 1:  # a stream may still read what another has written
            in_use.append((all_saved, dy))
    return dy, in_use


def _layer_backward(layer, k, all_saved, doutput, dstates, lengths):
    """The gradients with respect to the input and initial state of layer ``k``; adds those of its weights."""
    weights, suffixes = layer._weights(k), [layer._suffix(k, d) for d in range(len(all_saved))]
    passes = list(zip(all_saved, suffixes, layer._directions, strict=True))
    hooks = [gradient_flow_hook(layer, suffix, saved.h.shape, reverse) for saved, suffix, reverse in passes]
    done = layer.ops.layer_backward(layer.cell, all_saved, weights, doutput, dstates, lengths, layer._directions, hooks)
    dx = None
    for (saved, suffix, reverse), w, (_, dh_steps) in zip(passes, weights, done, strict=True):
        with adding(layer.grads):
            add_weight_gradients(layer, saved, reverse, dh_steps, layer.hidden_sizes[k], suffix)
        saved.c = None  # freed before dx is made
        dx = _input_gradient(layer, k, saved, w.ih.astype(layer.dtype, copy=False), dx)
    return dx, [dstate for dstate, _ in done]


def _input_gradient(layer, k, saved, weight_ih, dx):
    """``dx`` (None for the first direction) plus the gradient with respect to the input of layer ``k``, (T, B, I)."""
    T, B, inputs = saved.x.shape
    dgates = flat(saved.gates[:, :, : layer.cell.gates * layer.hidden_sizes[k]])
    if dx is None:
        dx = (layer.ops.empty_steps if k else layer.ops.empty)(T, B, inputs, layer.dtype)
        layer.ops.product(dgates, weight_ih, flat(dx))
    else:
        layer.ops.product(dgates, weight_ih, flat(dx), accumulate=True)
    return dx
