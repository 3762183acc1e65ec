"""Lengths, resets and masks in a chain of layers: which layer is given what, and zeros where no timestep is."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np

from ..arrays import host_array
from ..backends.marks import HELD, Marks
from ..masks import check_lengths, check_steps
from ..module import Module


class Axes(NamedTuple):
    """What a check of booleans needs of a layer: its backend, and the order of its axes."""

    ops: Any
    batch_first: bool


def axis_orders(layer):
    """``batch_first`` of every layer inside ``layer`` that knows the time axis."""
    for _, module in layer.modules() if isinstance(layer, Module) else ():
        if hasattr(module, "batch_first") and getattr(module, "variational", True):
            yield module.batch_first


@functools.lru_cache(maxsize=256)
def _parameters(function):
    return frozenset(inspect.signature(function).parameters)


def accepts(layer, name, method="forward"):
    """Whether a layer has a use for "lengths", "reset" or "mask"; dropout that is not variational has none."""
    if name == "lengths":
        return getattr(layer, "takes_lengths", False)
    if not getattr(layer, "variational", True):
        return False
    function = getattr(type(layer), method, None)
    return name in _parameters(function if function else type(layer).forward)


def takes(layer, name, method="forward"):
    """Whether a layer of a chain is given ``name``: "lengths", "reset" or "mask".

    A Sequential of layers that do not take it is not: it could not know which axis is time, or whether there is one.
    """
    if layer._chain and not any(takes(one, name, method) for one in layer.children.values()):
        return False
    return accepts(layer, name, method)


def without_time(layer):
    """Whether the output of a layer has no time axis any more."""
    return getattr(layer, "_pools", False) or (layer._chain and any(map(without_time, layer.children.values())))


class Timesteps(NamedTuple):
    """What a call was given on its timesteps, in the caller's axes; None for what was not given."""

    lengths: Any = None
    reset: Any = None
    mask: Any = None

    def given_to(self, layer, method="forward", taken=takes):
        """What a layer takes of it, by name. taken: ``takes``, or ``accepts`` for what is no layer of a chain."""
        given = {name: one for name, one in self._asdict().items() if one is not None}
        return {name: one for name, one in given.items() if taken(layer, name, method)}

    def check_taken(self, layers, method="forward", place=""):
        """Raise TypeError where a layer would ignore a reset or a mask that it must know. layers: by name.

        Such a layer has a state, or reads lengths, so that it knows time. No other layer needs a mask. A reset needs a
        layer that takes it.
        """
        if self.reset is None and self.mask is None:
            return
        for name, layer in layers.items():
            self._check_layer(f"{place}{name}", layer, method)
        if self.reset is not None and not place and not any(takes(one, "reset", method) for one in layers.values()):
            raise TypeError("reset: no layer here takes it. Only recurrent layers have a state to reset; leave it out")

    def _check_layer(self, shown, layer, method):
        given = self._asdict()
        for name, needed in (("reset", layer.stateful), ("mask", layer.stateful or takes(layer, "lengths"))):
            if given[name] is None or not needed:
                continue
            if not takes(layer, name, method) and not _plain(layer):
                raise TypeError(
                    f"{name}: {shown}: {type(layer).__name__}.{method} does not take it, and would run over it. Give "
                    f"it an argument {name}=None, and what gpurnn.LSTM does with it"
                )
        if _plain(layer):
            self.check_taken(layer.children, method, f"{shown}.")

    def read_by_none(self, layers):
        """What of lengths and mask the first of ``layers`` does not take, or None where there is nothing.

        Such a layer would carry what stands where no timestep is, which may be NaN, into the gradient of its weights.
        """
        lengths = None if takes(layers[0], "lengths") else self.lengths
        mask = None if takes(layers[0], "mask") else self.mask
        return None if lengths is None and mask is None else Timesteps(lengths, None, mask)

    def zeroed(self, chain, x):
        """A copy of x (T, B, F), or (B, T, F) with ``batch_first``, or (T, F), zero where no timestep is."""
        x, ops = x.copy(), chain.ops
        single, batch_first = x.ndim == 2, True in axis_orders(chain)
        steps = x[:, None] if single else x.swapaxes(0, 1) if batch_first else x
        T, B = steps.shape[:2]
        if self.lengths is not None:
            lengths = [self.lengths] if single and np.ndim(self.lengths) == 0 else self.lengths
            ops.zero_past_end(steps, check_lengths(lengths, T, B, batch_first=batch_first))
        if self.mask is not None:
            mask = check_steps(Axes(ops, batch_first), self.mask, T, B, single, "mask")
            ops.zero_silent(steps, None, Marks(~mask * np.uint8(HELD)))
        return x

    def copied(self, ops):
        """A copy that nobody else can change."""
        lengths = None if self.lengths is None else host_array(self.lengths, "lengths").copy()
        return Timesteps(lengths, None, None if self.mask is None else ops.asarray(self.mask, "mask").copy())


def _plain(layer):
    """Whether a layer is a chain that runs as ``Sequential`` does, not one of a subclass that runs otherwise."""
    return layer._chain and type(layer).forward.__module__ == f"{__package__}.sequential"


def repeats(layers):
    """Whether the last of ``layers`` that knows masks gives an output at timesteps that are not there."""
    for layer in reversed(layers):
        if takes(layer, "mask"):
            inside = list(layer.children.values())
            return repeats(inside) if layer._chain else getattr(layer, "masked_output", "zero") == "repeat"
    return False
