"""One call of a layer, repeated with the same random draws, and all that it gives."""

import inspect

import numpy as np

from ..module import Module
from .nested import is_floating, leaves, map_leaves, named_leaves


class Call:
    """A layer with the inputs and options of one call. Every repetition draws the same dropout masks."""

    def __init__(self, layer, inputs, options):
        self.layer, self.inputs, self.options = layer, inputs, options
        self.forward = getattr(layer, "forward", layer)
        self.modules = [module for _, module in layer.modules()] if isinstance(layer, Module) else []
        self.calls = [module.calls for module in self.modules]
        self.buffers = [{name: array.copy() for name, array in module.buffers.items()} for module in self.modules]
        self.names = _names(self.forward, len(inputs))

    def restore(self):
        """Reset the counters of random draws and the running statistics to what they were."""
        for module, calls, buffers in zip(self.modules, self.calls, self.buffers, strict=True):
            module.calls = calls
            for name, array in buffers.items():
                module.buffers[name][...] = array

    def move(self, nested):
        """Move host arrays to the layer's backend, in its dtype."""

        def one(array):
            if not self.modules:
                return array
            floating = is_floating(np.asarray(array))
            return self.layer.xp.asarray(np.asarray(array).astype(self.layer.dtype) if floating else array)

        return map_leaves(one, nested)

    def host(self, array):
        if self.modules:
            array = self.layer.ops.to_numpy(array)
        return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float64)

    def call(self, inputs):
        """(outputs, backward or None) of one forward."""
        self.restore()
        results = self.forward(*(self.move(part) for part in inputs), **self.options)
        results = results if isinstance(results, tuple) else (results,)
        return (results[:-1], results[-1]) if callable(results[-1]) else (results, None)

    def outputs(self, inputs=None):
        """The outputs on the host, float64."""
        outputs, _ = self.call(self.inputs if inputs is None else inputs)
        self.restore()
        return map_leaves(self.host, outputs)

    def run(self, doutputs):
        """Name -> float64 host array: outputs, ``d`` + name of every input and parameter that has a gradient."""
        outputs, gradients = self.train(doutputs)
        names = ["output", "state"] if getattr(self.layer, "stateful", False) else ["output"]
        names += [f"output {k}" for k in range(len(names), len(outputs))]
        results = {}
        for name, output in zip(names, outputs, strict=True):
            results |= named_leaves(name, output)
        for name, gradient in gradients.items():
            results |= named_leaves(name, gradient)
        return results

    def train(self, doutputs):
        """``(outputs, {name: gradient})`` of forward and backward, nested like the inputs, on the host."""
        if self.modules:
            self.layer.zero_grad()
        outputs, backward = self.call(self.inputs)
        gradients = self._paired(backward(*(self.move(part) for part in doutputs))) if backward else {}
        gradients = {f"d{name}": map_leaves(self.host, gradient) for name, gradient in gradients.items()}
        if self.modules:
            gradients |= {f"d {name}": self.host(gradient) for name, gradient in self.layer.grads.items()}
        self.restore()
        return map_leaves(self.host, outputs), gradients  # outputs last: backward must not have changed them

    def _paired(self, returned):
        """Name of an input -> its gradient; AssertionError where one is missing or has another shape."""
        alone = len(self.inputs) == 1 and (isinstance(self.inputs[0], tuple) or not isinstance(returned, tuple))
        if alone or not isinstance(returned, tuple):
            returned = (returned,)
        found = {}
        for k, (name, given) in enumerate(zip(self.names, self.inputs, strict=True)):
            gradient = returned[k] if k < len(returned) else None
            if given is None and gradient is not None:
                found[name] = gradient  # with respect to what the layer takes for None, such as a state of zeros
            if not any(is_floating(np.asarray(leaf)) for leaf in leaves(given)):
                continue
            shapes = [[getattr(leaf, "shape", ()) for leaf in leaves(part)] for part in (given, gradient)]
            if shapes[0] != shapes[1]:
                raise AssertionError(
                    f"d{name}: expected a gradient of shape {_shapes(shapes[0])}, got {_shapes(shapes[1])}"
                )
            found[name] = gradient
        return found


def _shapes(shapes):
    return ", ".join(map(str, shapes)) or "none"


def _names(function, count):
    """The names of the first ``count`` arguments of a function."""
    try:
        kinds = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        kinds = ()
    plain = [one.name for one in kinds if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [plain[k] if k < len(plain) else f"input {k}" for k in range(count)]


def results(layer, inputs, doutputs, **options):
    """Name -> float64 array on the host, of one forward and backward: outputs, ``d`` + name of every input, "d " + name
    of every parameter. Arrays of a tuple are numbered: "state 0"."""
    return Call(layer, inputs, options).run(doutputs)
