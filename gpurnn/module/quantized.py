"""Models whose weights are whole numbers of 8 bits, for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np

from .._typing import Array
from ..backends.int8 import Int8Matrix
from ..errors import check_choice
from ..quantization import quantize_rows

M = TypeVar("M", bound="Quantizing")  # the class of the module

SCALE = "_scale"  # what the name of the scales ends with, behind that of the weights
FORMATS = ("int8",)
ACTIVATIONS = {"int16": 16, "int8": 8}  # their bits


class Quantizing:
    """The part of ``Module`` that makes and reads weights in 8 bits.

    They are buffers: whole numbers under the name that the parameter had, and their scales.
    """

    quantized: str | None = None  # "int8" in a layer that has such weights
    _activations: str = "int16"  # what their products make of inputs and states
    _int8_names: tuple[str, ...] = ()  # of which
    _frozen: list[set[str]]
    buffers: dict[str, Array]

    def quantize(self: M, format: str = "int8", activations: str = "int16") -> M:
        """A copy of this model for inference, whose weights take a quarter of the memory; it is in evaluation mode.

        Quantized are the weight matrices of recurrent layers and of ``Linear``: each row is whole numbers from -127 to
        127, and a scale in float32 (``gpurnn.quantization.quantize_rows``). All else stays as it is: biases, tables of
        embeddings, attention, normalization, what layers of your own have as parameters. The matrices leave ``params``
        and are among the ``buffers``, so that ``state_dict``, ``gpurnn.save`` and copies have the whole numbers.

        On the backend "cpu" compiled code multiplies the whole numbers themselves by each input and state, which it
        rounds to whole numbers, too (float32 and float64). Elsewhere floats are made of them at the first call, and
        nothing is faster. A quantized model cannot be trained.

        Parameters
        ----------
        format : {"int8"}
            How weights are stored.
        activations : {"int16", "int8"}
            What a product rounds each row of inputs or states to: whole numbers of 16 bits, which changes next to
            nothing, or of 8 bits, times a scale for each row. 8 bits are up to twice as fast with AVX-512 VNNI, and
            hardly faster elsewhere. Array code on NumPy rounds to 8 bits as compiled code does; it does not round to
            16, and numbers of 16-bit dtypes and those on a GPU are never rounded.

        Returns
        -------
        Module
            This model stays as it is, in its own mode.

        Raises
        ------
        ValueError
            For another format or other activations; if the model has no such weights, is quantized already, or has
            some that are not finite.

        Examples
        --------
        >>> model = gpurnn.Sequential(gpurnn.LSTM(4, 8, seed=0), gpurnn.Linear(8, 2, seed=1))
        >>> small = model.quantize("int8")
        >>> {name: str(array.dtype) for name, array in small.state_dict().items() if name.startswith("1.")}
        {'1.bias': 'float32', '1.weight': 'int8', '1.weight_scale': 'float32'}
        >>> x = np.ones((5, 3, 4), "float32")
        >>> bool(np.abs(small(x)[0] - model.eval()(x)[0]).max() < 0.01)
        True
        """
        check_choice("format", format, FORMATS)
        check_choice("activations", activations, tuple(ACTIVATIONS))
        if not any(layer._matrix_names() for _, layer in self._layers_here()):
            if any(layer.quantized for _, layer in self._layers_here()):
                raise ValueError(f"quantize: this {type(self).__name__} is quantized already")
            raise ValueError(
                f"quantize: this {type(self).__name__} has no weights to quantize: those of recurrent layers and of "
                "Linear are"
            )
        copied: Any = copy.deepcopy(self)
        for name, layer in copied._layers_here():
            if layer._matrix_names():
                layer._quantize_own(name, activations)
        return copied.eval()

    def _layers_here(self) -> Iterator[tuple[str, Any]]:
        return self.modules()  # type: ignore[attr-defined]

    def _matrix_names(self) -> list[str]:
        """Names of this layer's own parameters that ``quantize`` makes whole numbers of."""
        return []

    def _quantize_own(self, place: str, activations: str) -> None:
        """Quantize this layer itself. place: its dotted name, for messages."""
        names, stored = self._matrix_names(), {}
        layer: Any = self
        for name in names:
            array = layer.ops.to_numpy(layer.params[name])
            try:
                values, scales = quantize_rows(array.reshape(-1, array.shape[-1]))
            except ValueError as error:
                shown = f"{place}.{name}" if place else name
                raise ValueError(f"quantize: {shown} holds numbers that are not finite in float32") from error
            stored[name] = layer.xp.asarray(values.reshape(array.shape))
            stored[name + SCALE] = layer.xp.asarray(scales.reshape(array.shape[:-1]))
        own = [name for name, _ in layer._own if name not in names]
        self._frozen[0] -= set(names)
        layer._declare({name: layer.params[name] for name in own}, again=True)
        self.buffers.update(stored)
        self.quantized, self._activations, self._int8_names = "int8", activations, tuple(names)

    def _int8_matrices(self) -> dict[str, Int8Matrix]:
        """The ``Int8Matrix`` of each quantized parameter of this layer, by name."""
        bits = ACTIVATIONS[self._activations]
        return {name: Int8Matrix(self.buffers[name], self.buffers[name + SCALE], bits) for name in self._int8_names}

    def _read_matrix(self, name: str, readable: bool) -> Array | Int8Matrix:
        """Quantized weights as a backend reads them: as they are where they are readable, else floats, remembered."""
        layer: Any = self
        made = self.__dict__.setdefault("_matrices", {})  # copies and pickles leave it out
        found = made.get((name, readable))
        if found is None:
            matrix = self._int8_matrices()[name]
            rounds = layer.xp is np and layer.dtype == layer.compute_dtype
            make = matrix.rounding_floats if rounds else matrix.floats
            found = made[name, readable] = matrix if readable else make(layer.compute_dtype)
        return found

    def _forget_floats(self) -> None:
        """Forget what was made of weights that have changed."""
        self.__dict__.pop("_matrices", None)

    def _and_activations(self) -> str:
        """What an account of weights in 8 bits says besides where some products round to 8 bits."""
        return " and activations" if any(layer._activations == "int8" for _, layer in self._layers_here()) else ""

    def _int8_count(self) -> int:
        """How many weights of this module and of all in it are whole numbers."""
        return sum(matrix.values.size for _, layer in self._layers_here() for matrix in layer._int8_matrices().values())


def refuse_quantized(model: Any, what: str) -> None:
    """Raise RuntimeError where a layer of ``model`` is quantized. what: what needs weights that can change."""
    for name, layer in model.modules():
        if layer.quantized:
            shown = f"{name}: this {type(layer).__name__}" if name else f"this {type(layer).__name__}"
            raise RuntimeError(
                f"{what}: {shown} is quantized to {layer.quantized}, for inference alone. Take the model that it was "
                "made from, and quantize that again"
            )


def float_model(model: M) -> M:
    """``model``, or where layers in it are quantized, a copy whose weights are floats again."""
    if not any(layer.quantized for _, layer in model._layers_here()):
        return model
    copied: Any = copy.deepcopy(model)
    for _, layer in copied._layers_here():
        if not layer.quantized:
            continue
        made = {name: matrix.floats(layer.compute_dtype) for name, matrix in layer._int8_matrices().items()}
        for name in made:
            del layer.buffers[name], layer.buffers[name + SCALE]
        own = {name: layer.params[name] for name, _ in layer._own}
        layer._declare(made | own)
        layer.quantized, layer._activations, layer._int8_names = None, "int16", ()
    return copied
