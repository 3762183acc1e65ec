"""State dictionaries: parameters, running statistics, counters of random draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import rng
from .._typing import Array
from ..arrays import host_array, without_torch
from ..dtypes import is_float
from ..errors import DtypeError, MissingError, ShapeError, check_flag, check_size
from .quantized import SCALE


class States:
    """The part of ``Module`` that gives and takes state dictionaries."""

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers as NumPy arrays, dotted name -> array."""
        return {name: self.ops.to_numpy(array).copy() for name, array in self._saved_arrays().items()}

    def load_state_dict(self, mapping: Mapping[str, Array], strict: bool = True) -> None:
        """Copy arrays that are in memory into parameters and buffers; ``gpurnn.load_weights`` reads a file.

        Parameters
        ----------
        mapping : mapping
            Name -> array: NumPy, CuPy or torch tensors of any float type (those that require grad are copied too).
            The names are those of ``state_dict()``. They are PyTorch's for the recurrent and linear layers, so the
            ``state_dict()`` of a ``torch.nn.LSTM`` loads unchanged.
        strict : bool
            Refuse missing and unknown names; otherwise load what fits by name.

        Raises
        ------
        KeyError
            For missing and unknown names, if ``strict``.
        ShapeError, DtypeError
            For an array of another shape, or one that does not hold numbers.
        ValueError
            For a value that is not finite, also after conversion to the target's dtype.
        TypeError
            For an object that is no mapping.

        Nothing changes on an error.

        Examples
        --------
        >>> first, second = gpurnn.GRU(2, 3), gpurnn.GRU(2, 3)
        >>> second.load_state_dict(first.state_dict())
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"mapping: expected name -> array, got {type(mapping).__name__}; a file is what "
                "gpurnn.load_weights(model, path) reads"
            )
        check_flag("strict", strict)
        targets = self._saved_arrays()
        missing = [name for name in targets if name not in mapping]
        unknown = [name for name in mapping if name not in targets]
        if strict and (missing or unknown):
            hint = ""
            if any(name.startswith("model/") for name in unknown):
                hint = "; these are the arrays of a checkpoint of fit: load_weights(model, path) reads that"
            if any(_is_int8(name, mapping) for name in mapping) != any(_is_int8(name, targets) for name in targets):
                hint = "; only one of the two is quantized: load into a model that is as the arrays are"
            raise MissingError(f"state_dict does not fit: missing {missing}, unknown {unknown}{hint}")
        for name in targets:
            if name in mapping and _is_int8(name, mapping) and not _is_int8(name, targets):
                raise DtypeError(f"{name}: expected floats, got whole numbers with scales: quantize this model first")
        loaded = {name: _converted(name, mapping[name], target) for name, target in targets.items() if name in mapping}
        for name, value in loaded.items():
            targets[name][...] = self.xp.asarray(value)
        for _, module in self.modules():
            module._forget_floats()
        written = [name for name in loaded if name in self.params]
        if written:
            self.changed(*written)

    def _saved_arrays(self) -> dict[str, Array]:
        """Dotted name -> array of all parameters and buffers."""
        self._refuse_hidden_layers()
        arrays = dict(self.params)
        for prefix, module in self.modules():
            for name, array in module.buffers.items():
                arrays[f"{prefix}.{name}" if prefix else name] = array
        return arrays

    def random_state(self) -> dict[str, list[int]]:
        """The counters of this model's random draws: dotted name -> [seed, key, calls]; JSON-ready."""
        return {name: [module.seed, module.key, module.calls] for name, module in self.modules()}

    def load_random_state(self, state: Mapping[str, Any]) -> None:
        """Continue the random draws from ``random_state()``.

        Parameters
        ----------
        state : mapping
            The result of ``random_state()``.

        Raises
        ------
        KeyError
            If the names of the modules differ.
        ValueError, TypeError
            For damaged counters. Nothing changes on an error.
        """
        modules = dict(self.modules())
        if set(state) != set(modules):
            raise MissingError(f"random state is of another model: expected {sorted(modules)}, got {sorted(state)}")
        loaded = [
            (modules[name], rng.check_seed(seed), check_size("key", key, 0), check_size("calls", calls, 0))
            for name, (seed, key, calls) in state.items()
        ]
        for module, seed, key, calls in loaded:
            module.seed, module.key, module.calls = seed, key, calls


def _is_int8(name: str, arrays: Mapping[str, Any]) -> bool:
    """Whether an array is a matrix in 8 bits, beside its scales."""
    return name + SCALE in arrays and str(getattr(arrays[name], "dtype", "")).endswith("int8")


def _converted(name: str, value: Any, target: Array) -> Array:
    """``value`` on the host in the target's dtype, checked."""
    value = host_array(without_torch(value), name)
    if not (value.dtype.kind in "iu" or is_float(value.dtype)):
        raise DtypeError(f"{name}: expected numbers, got {value.dtype}")
    if value.shape != target.shape:
        raise ShapeError(f"{name}: expected shape {target.shape}, got {value.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        converted = value.astype(target.dtype)
    if not (np.isfinite(value).all() and np.isfinite(converted).all()):  # 1e300 is not finite in float32
        raise ValueError(f"{name}: holds values that are not finite in {target.dtype}")
    if target.dtype == np.int8 and (value.dtype.kind not in "iu" or not (converted == value).all()):
        raise ValueError(
            f"{name}: expected whole numbers as {target.dtype} holds them: quantize a model that has the floats"
        )
    return converted
