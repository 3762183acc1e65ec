"""The base of every layer and model."""

from .base import PRECISIONS, Layers, Module
from .building import Later, need_values, without_values
from .quantized import float_model, refuse_quantized
from .registration import no_layer
from .stepper import Stepper
from .versions import backward_of, check_unspent
from .views import ALIGNMENT, Views, writable

__all__ = [
    # the base class, and what its parameters are
    "Module", "Layers", "Stepper", "Views", "ALIGNMENT", "PRECISIONS",
    # for layers and optimizers
    "Later", "backward_of", "check_unspent", "float_model", "need_values", "no_layer", "refuse_quantized",
    "without_values", "writable",
]  # fmt: skip
