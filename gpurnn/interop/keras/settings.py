"""The configuration of one layer of Keras, each value checked; what gpurnn cannot serve is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import check_choice, check_flag, check_number, check_size, one_line

# What a layer begins with, how it is trained beside the loss, and how a backend should compute it.
_IGNORED = {
    "name", "trainable", "dtype", "seed", "unroll", "implementation", "use_cudnn", "stateful", "return_state",
    "batch_shape", "batch_input_shape", "build_input_shape", "input_length", "input_shape", "unit_forget_bias",
    "activity_regularizer", "synchronized", "renorm_momentum", "renorm_clipping",
    *(f"{array}_{what}" for array in ("kernel", "recurrent", "bias", "embeddings", "gamma", "beta", "moving_mean",
                                      "moving_variance") for what in ("initializer", "regularizer", "constraint")),
}  # fmt: skip
_DTYPES = {  # name of a policy -> gpurnn's dtype: 16-bit numbers, parameters in float32
    "float32": "float32", "float64": "float64", "float16": "float16", "bfloat16": "bfloat16",
    "mixed_float16": "float16", "mixed_bfloat16": "bfloat16",
}  # fmt: skip
POLICIES = {"float32": "float32", "float64": "float64", "float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}

# Keras's activation -> gpurnn's
ACTIVATIONS = {
    "linear": "identity", "tanh": "tanh", "sigmoid": "sigmoid", "hard_sigmoid": "hard_sigmoid", "relu": "relu",
    "softsign": "softsign", "softplus": "softplus", "elu": "elu", "silu": "silu", "swish": "silu",
}  # fmt: skip


def is_of_keras(document: Mapping[str, Any]) -> bool:
    """Whether a description is of a class of Keras itself."""
    module, registered = document.get("module"), document.get("registered_name")
    return (
        isinstance(module, str) and module.partition(".")[0] == "keras" and registered in (None, document["class_name"])
    )


class Settings:
    """What the configuration of a layer says. ``value`` gives each setting once; ``finish`` refuses what is left."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        if not isinstance(document, Mapping) or not isinstance(document.get("class_name"), str):
            raise ValueError("expected a layer with a class_name")
        self.kind = document["class_name"]
        config = document.get("config")
        self.config = dict(config) if isinstance(config, Mapping) else {}
        name = self.config.get("name", document.get("name"))
        self.name = name if isinstance(name, str) and name else self.kind
        self.shown = f"layer {one_line(repr(self.name), 60)} ({one_line(self.kind, 40)})"
        self.custom = not is_of_keras(document)
        self._rest = set(self.config) - _IGNORED

    def value(self, name: str, default: Any = None) -> Any:
        """A setting as it is."""
        self._rest.discard(name)
        return self.config.get(name, default)

    def size(self, name: str, minimum: int = 1) -> int:
        """A whole number. Raises TypeError and ValueError."""
        return check_size(name, self.value(name), minimum)

    def rate(self, name: str, default: Any = 0.0) -> float:
        """A number from 0 to 1. Raises TypeError and ValueError."""
        return check_number(name, self.value(name, default), 0, 1)

    def number(self, name: str, default: float) -> float:
        """A number of at least 0. Raises TypeError and ValueError."""
        return check_number(name, self.value(name, default), 0)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or False. Raises TypeError."""
        return check_flag(name, self.value(name, default))

    def only(self, name: str, allowed: Iterable[Any]) -> None:
        """Raise ValueError for a setting with another value than the first of these, which it has by default."""
        allowed = list(allowed)
        value = self.value(name, allowed[0])
        if not any(value == one and type(value) is type(one) for one in allowed):
            shown = " or ".join(map(repr, allowed))
            raise ValueError(f"{name}: gpurnn has {shown} alone, got {one_line(repr(value), 60)}")

    def activation(self, name: str, default: str, more: Mapping[str, str] | None = None) -> str:
        """gpurnn's name of an activation. more: those beside ``ACTIVATIONS``. Raises ValueError."""
        value, known = self.value(name, default), ACTIVATIONS | dict(more or {})
        if isinstance(value, Mapping) and value.get("class_name") == "function" and not value.get("registered_name"):
            value = value.get("config")
        if value is None:
            return "identity"
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {one_line(repr(value), 60)}")
        return known[value]

    def dtype(self) -> str:
        """gpurnn's dtype for the layer's policy. Raises ValueError."""
        policy = self.config.get("dtype") or "float32"
        if isinstance(policy, Mapping) and policy.get("class_name") == "DTypePolicy":
            policy = policy.get("config", {}).get("name") if isinstance(policy.get("config"), Mapping) else None
        if not isinstance(policy, str):
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {one_line(repr(policy), 60)}")
        return _DTYPES[check_choice("dtype", policy, tuple(_DTYPES))]

    def check_dtype(self, outer: Settings) -> None:
        """Raise ValueError for another dtype than that of the layer around this one."""
        if self.dtype() != outer.dtype():
            raise ValueError(f"dtype: expected {outer.dtype()}, as the layer around it has, got {self.dtype()}")

    def last_axis(self) -> None:
        """Raise ValueError unless ``axis`` means the last one."""
        axis = self.value("axis", -1)
        if axis not in (-1, [-1]):
            raise ValueError(f"axis: expected -1, the features, got {one_line(repr(axis), 60)}")

    def finish(self) -> None:
        """Raise ValueError for a setting that nobody has asked for and that is neither None nor False."""
        for name in sorted(self._rest):
            if self.config[name] is not None and self.config[name] is not False:
                value = one_line(repr(self.config[name]), 60)
                raise ValueError(f"{one_line(name, 40)}: gpurnn does not know this setting, got {value}")
