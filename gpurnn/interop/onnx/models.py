"""Whole models as graphs: their inputs, their outputs, and what belongs to what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ...attention import Attention
from ...errors import check_choice
from ...layers import Embedding
from ...layers.common import feature_sizes
from ...layers.timesteps import axis_orders
from ...module import Module
from ...seq2seq import EncoderDecoder
from ...tasks.series.models import Direct, Recursive
from .building import Builder
from .flow import Flow, Inner
from .layers import first_of, write_attention, write_layer


class Signature(NamedTuple):
    """What a graph has on its border: (name, sizes, dtype) of inputs and outputs; roles as in roles.py."""

    inputs: list[tuple[str, Any, Any]]
    outputs: list[tuple[str, Any, Any]]
    roles: dict[str, Any]


def write_model(b: Builder, model: Module, lengths: bool, states: bool, part: str | None) -> Signature:
    """Write a model into ``b``, or a part of it. Raises ValueError that names what has no form in ONNX."""
    if part is not None:
        if type(model) is not EncoderDecoder:
            raise ValueError(f"part: an EncoderDecoder has parts, a {type(model).__name__} is exported whole")
        return PARTS[check_choice("part", part, tuple(PARTS))](b, model, lengths, states)
    return _MODELS.get(type(model), _chain)(b, model, lengths, states)


def _flow(b, model, lengths, states=False):
    return Flow(b, b.name("lengths") if lengths else None, states, True in axis_orders(model))


def _chain(b, model, lengths, states):
    """A layer, or layers one after another."""
    first, x = first_of(model), b.name("x")
    flow = _flow(b, model, lengths, states)
    steps = ("B", "T") if flow.batch_first else ("T", "B")
    if isinstance(first, Embedding):
        given = (x, steps, np.int64)
    else:
        features = feature_sizes(first, None)[0]
        given = (x, (*steps, "F" if features is None else features), b.dtype)
    y, state = write_layer(b, model, x, flow, "")
    output = _output(b, y, "output")
    features = _features(model)
    sizes = (*(steps if flow.timed else ("B",)), "V" if features is None else features)
    return _signature(b, flow, [given], [(output, sizes, b.dtype)], state)


def _features(model, size=None):
    """The features of the output of a layer or of a chain; None where they are those of its input."""
    if not model.children:
        return feature_sizes(model, size)[1]
    for layer in model.children.values():
        size = _features(layer, size)
    return size


def _output(b, value, name):
    """An output of the graph with this value."""
    name = b.name(name)
    b.nodes.append(b.onnx.helper.make_node("Identity", [value], [name], name=name))
    return name


def _signature(b, flow, inputs, outputs, state=None):
    given = [] if flow.lengths is None else [(flow.lengths, ("B",), np.int32)]
    given += [(name, sizes, b.dtype) for name, sizes in flow.inputs]
    final = [(name, sizes, b.dtype) for name, sizes in flow.outputs]
    roles = {"lengths": flow.lengths, "state": _inputs_like(state, iter([name for name, _ in flow.inputs]))}
    roles |= {"final": state, "initial": flow.initial, "time": int(flow.batch_first)}
    return Signature([*inputs, *given], [*outputs, *final], roles)


def _inputs_like(state, names):
    """The inputs for states in the form of the outputs: both are made in one order."""
    if state is None:
        return None
    return next(names) if isinstance(state, str) else [_inputs_like(part, names) for part in state]


def _attention(b, model, lengths, states):
    flow = _flow(b, model, lengths)
    queries, memory = b.name("queries"), b.name("memory")
    valid = flow.valid(memory) if lengths else None
    context, weights = write_attention(b, model, queries, memory, valid, "")
    inputs = [(queries, ("U", "B", model.query_size), b.dtype), (memory, ("T", "B", model.memory_size), b.dtype)]
    outputs = [(_output(b, context, "context"), ("U", "B", model.memory_size), b.dtype)]
    outputs += [(_output(b, weights, "weights"), ("U", "B", "T"), b.dtype)]
    return _signature(b, flow, inputs, outputs)


# ---- encoder and decoder


def _encoder_decoder(b, model, lengths, states):
    """source (T, B), target (U, B) -> logits (U, B, V). The lengths are those of the source."""
    source, target = b.name("source"), b.name("target")
    flow = _flow(b, model, lengths)
    memory, state = _encode(b, model, source, flow)
    logits, *_ = _decode(b, model, target, memory, state, flow)
    inputs = [(source, ("T", "B"), np.int64), (target, ("U", "B"), np.int64)]
    return _signature(b, flow, inputs, [(_output(b, logits, "logits"), _logits(model, "U"), b.dtype)])


def _encoder(b, model, lengths, states):
    """source (T, B) -> the memory (T, B, H), and the state that the decoder begins with."""
    source, flow = b.name("source"), _flow(b, model, lengths)
    memory, state = _encode(b, model, source, flow)
    outputs = [(_output(b, memory, "memory"), ("T", "B", model.hidden), b.dtype)]
    final = [flow.final(one, f"{kind}_0", (model.layers, "B", model.hidden))
             for kind, one in zip(model._kinds, state, strict=True)]  # fmt: skip
    found = _signature(b, flow, [(source, ("T", "B"), np.int64)], outputs)
    return found._replace(roles=found.roles | {"final": _few(final)})


def _decoder_step(b, model, lengths, states):
    """target (U, B), memory and state -> logits, the weights of the attention, and the state after these steps."""
    target, memory, flow = b.name("target"), b.name("memory"), _flow(b, model, lengths, True)
    shape = model.layers, "B", model.hidden
    given = [flow.state(kind, shape) for kind in model._kinds]
    logits, weights, last = _decode(b, model, target, memory, given, flow)
    final = [flow.final(one, f"{kind}_n", shape) for kind, one in zip(model._kinds, last, strict=True)]
    inputs = [(target, ("U", "B"), np.int64), (memory, ("T", "B", model.hidden), b.dtype)]
    outputs = [(_output(b, logits, "logits"), _logits(model, "U"), b.dtype)]
    outputs += [(_output(b, weights, "weights"), ("U", "B", "T"), b.dtype)]
    return _signature(b, flow, inputs, outputs, _few(final))


def _few(names):
    return names[0] if len(names) == 1 else tuple(names)


def _logits(model, steps):
    return steps, "B", model.children["target_embedding"].num_embeddings


def _decode(b, model, target, memory, state, flow):
    """Logits, the weights of the attention, and the final states as a list."""
    layer = model.children
    embedded, _ = write_layer(b, layer["target_embedding"], target, flow, "target_embedding")
    h, last = write_layer(b, layer["decoder"], embedded, Inner(b, None, state), "decoder")
    valid = None if flow.lengths is None else flow.valid(memory)
    context, weights = write_attention(b, layer["attention"], h, memory, valid, "attention")
    y, _ = write_layer(b, layer["combine"], b.node("Concat", context, h, axis=2), flow, "combine")
    logits, _ = write_layer(b, layer["output"], b.node("Tanh", y), flow, "output")
    return logits, weights, list(last) if isinstance(last, tuple) else [last]


def _encode(b, model, source, flow):
    """The memory (T, B, H), and the decoder's initial states (L, B, H)."""
    layer, L, H = model.children, model.layers, model.hidden
    x, _ = write_layer(b, layer["source_embedding"], source, flow, "source_embedding")
    memory, final = write_layer(b, layer["encoder"], x, Inner(b, flow.lengths, None), "encoder")
    states = []
    for kind, part in zip(model._kinds, final if isinstance(final, tuple) else (final,), strict=True):
        rows = b.reshape(b.node("Transpose", part, perm=[1, 0, 2]), -1, L * H)
        y, _ = write_layer(b, layer[f"bridge_{kind}"], rows, flow, f"bridge_{kind}")
        states.append(b.node("Transpose", b.reshape(b.node("Tanh", y), -1, L, H), perm=[1, 0, 2]))
    return memory, states


# ---- forecasts


def _direct(b, model, lengths, states):
    """A window (T, B, F) -> forecasts (B, horizon), with quantiles (B, horizon, 1 + Q)."""
    flow, layer, x = _flow(b, model, False), model.children, b.name("window")
    y, _ = write_layer(b, layer["encoder"], x, flow, "encoder")
    y, _ = write_layer(b, layer["last"], y, flow, "last")
    y, _ = write_layer(b, layer["head"], y, flow, "head")
    sizes = ("B", "horizon")
    if model.each > 1:
        y, sizes = b.reshape(y, 0, -1, model.each), (*sizes, model.each)
    given = (x, ("T", "B", layer["encoder"].input_size), b.dtype)
    return _signature(b, flow, [given], [(_output(b, y, "forecasts"), sizes, b.dtype)])


def _recursive(b, model, lengths, states):
    """A window (T, B, F) and what is known of the rows to come (horizon, B, K) -> forecasts as of ``_direct``."""
    flow, layer, x, known = _flow(b, model, False), model.children, b.name("window"), b.name("known")
    _, final = write_layer(b, layer["encoder"], x, Inner(b, None, None), "encoder")
    given = list(final) if isinstance(final, tuple) else [final]
    said = b.node("Expand", b.constant(0), b.joined([b.size(x, 1), b.integers(1)], 0))
    body = b.inside()
    names = [body.name("said"), *(body.name("state") for _ in given), body.name("row")]
    row = body.node("Unsqueeze", body.node("Concat", names[0], names[-1], axis=1), body.integers(0))
    h, final = write_layer(body, layer["decoder"], row, Inner(body, None, names[1:-1]), "decoder")
    y, _ = write_layer(body, layer["head"], h, Flow(body), "head")
    y = body.node("Squeeze", y, body.integers(0))  # (B, 1 + Q)
    next_said = body.split(y, 1, [1, model.each - 1])[0] if model.each > 1 else y
    results = [next_said, *(final if isinstance(final, tuple) else (final,)), y]
    *_, outputs = b.scan(body, names, results, [said, *given], [known])
    perm = [1, 0, 2]
    outputs = b.node("Transpose", outputs, perm=perm)  # (B, horizon, 1 + Q)
    sizes = ("B", "horizon")
    if model.each > 1:
        sizes = (*sizes, model.each)
    else:
        outputs = b.node("Squeeze", outputs, b.integers(2))
    inputs = [(x, ("T", "B", layer["encoder"].input_size), b.dtype)]
    inputs += [(known, ("horizon", "B", layer["decoder"].input_size - 1), b.dtype)]
    return _signature(b, flow, inputs, [(_output(b, outputs, "forecasts"), sizes, b.dtype)])


PARTS: dict[str, Callable[..., Signature]] = {"encoder": _encoder, "decoder": _decoder_step}
_MODELS: dict[type, Callable[..., Signature]] = {
    EncoderDecoder: _encoder_decoder,
    Attention: _attention,
    Direct: _direct,
    Recursive: _recursive,
}
