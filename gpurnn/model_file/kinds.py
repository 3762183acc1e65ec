"""The layers that a file can hold, by name; and those that are made of others, from their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..attention import Attention
from ..errors import check_flag, check_number, check_size
from ..layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, TiedLinear
from ..module import Module
from ..recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
from ..seq2seq import EncoderDecoder

LAYERS: dict[str, type[Module]] = {
    cls.__name__: cls
    for cls in (
        RNN, LSTM, GRU, Recurrent, RNNCell, LSTMCell, GRUCell, Linear, TiedLinear, Embedding, Dropout, LayerNorm,
        BatchNorm, Pooling, Attention, Sequential, EncoderDecoder,
    )
}  # fmt: skip


class Composite(NamedTuple):
    """A model made of layers. arguments: its attributes that a file has, name -> check. parts: name -> class."""

    arguments: dict[str, Callable[[str, Any], Any]] = {}
    parts: dict[str, type[Module]] = {}

    def arguments_of(self, model: Module) -> dict[str, Any]:
        """Name -> value of these attributes."""
        return {name: getattr(model, name) for name in self.arguments}


def _number_or_none(name, value):
    return None if value is None else check_number(name, value)


_TRANSLATION = {
    "source_embedding": Embedding, "target_embedding": Embedding, "encoder": Recurrent, "bridge_h": Linear,
    "bridge_c": Linear, "decoder": Recurrent, "attention": Attention, "combine": Linear, "output": Linear,
    "source_dropout": Dropout, "target_dropout": Dropout, "output_dropout": Dropout,
}  # fmt: skip
COMPOSITES = {
    "Sequential": Composite(),
    "EncoderDecoder": Composite(parts=_TRANSLATION),
    "Direct": Composite(
        {"each": check_size, "every": check_flag}, {"encoder": Recurrent, "last": Pooling, "head": Sequential}
    ),
    "Recursive": Composite({"each": check_size}, {"encoder": Recurrent, "decoder": Recurrent, "head": Sequential}),
    "Masked": Composite({"mask_value": _number_or_none}),
}


def class_of(kind: str) -> type[Module] | None:
    """The class of this name; None where no file holds such a layer."""
    if kind in ("Direct", "Recursive"):
        from ..tasks.series.models import Direct, Recursive

        return {"Direct": Direct, "Recursive": Recursive}[kind]
    if kind in ("Activation", "Merge", "First", "Masked"):
        from ..interop.keras import layers

        return getattr(layers, kind)
    return LAYERS.get(kind)


def check_parts(kind: str, parts: Mapping[str, Module]) -> None:
    """Raise ValueError unless a composite can be made of these parts."""
    known = COMPOSITES[kind].parts
    for name, cls in known.items():
        if not isinstance(parts.get(name), cls) and not (name == "bridge_c" and name not in parts):
            raise ValueError(f"{kind}: its part {name!r} should be a layer of the kind {cls.__name__}")
    if known and not set(parts) <= set(known):
        raise ValueError(f"{kind}: it has no part {sorted(set(parts) - set(known))[0]!r}")


def restored(kind: str, parts: Mapping[str, Module], arguments: Mapping[str, Any], options: dict[str, Any]) -> Module:
    """A composite of its parts. options: backend and dtype. Raises ValueError and its like where they do not fit."""
    known = COMPOSITES[kind]
    if set(arguments) != set(known.arguments):
        raise ValueError(f"{kind}: expected the arguments {', '.join(known.arguments) or 'none'}")
    if kind in ("Sequential", "Masked"):
        checked = {name: check(name, arguments[name]) for name, check in known.arguments.items()}
        return class_of(kind)(dict(parts), **checked)
    check_parts(kind, parts)
    cls = class_of(kind)
    model = cls.__new__(cls)
    Module.__init__(model, options["backend"], options["dtype"], 0)
    for name, check in known.arguments.items():
        setattr(model, name, check(name, arguments[name]))
    if kind == "EncoderDecoder":
        _set_attributes(model, parts)
    model.add_layers(parts)
    return model


def _set_attributes(model, parts):
    """What an ``EncoderDecoder`` knows of its parts."""
    decoder = parts["decoder"]
    model.layers, model.hidden, model.sampling = decoder.num_layers, check_size("hidden", decoder.hidden_size), None
    model.tied = isinstance(parts["output"], TiedLinear)
    model._kinds = decoder.cell.states
    if model._kinds not in (("h",), ("h", "c")) or (len(model._kinds) == 2) != ("bridge_c" in parts):
        raise ValueError("EncoderDecoder: it needs a bridge for each state of its decoder")
