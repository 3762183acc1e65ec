"""Derivatives by finite differences, and how far they can be trusted."""

import math

import numpy as np

from ..dtypes import EPSILON
from ..errors import DtypeError
from .allowed import nan_is_worst
from .call import Call
from .nested import draw_like, is_floating, leaves, map_leaves

LARGEST_SHARE = 2.0**-20  # of the slope: differences that are less certain than this check nothing


def gradient_error(layer, inputs, seed=0, **options):
    """``(share, detail)`` of ``check_gradients``."""
    for name, dtype in [("layer", getattr(layer, "dtype", np.dtype("float64")))] + [
        ("inputs", np.asarray(leaf).dtype) for leaf in leaves(inputs) if is_floating(np.asarray(leaf))
    ]:
        if dtype != np.float64:
            raise DtypeError(f"{name}: expected float64, whose digits differences need, got {dtype}")
    call, rng = Call(layer, inputs, options), np.random.default_rng(seed)
    doutputs = draw_like(call.outputs(), rng)
    if options.get("lengths") is not None:
        batch_first = any(getattr(module, "batch_first", False) for module in [layer, *call.modules])
        _clear_padding(doutputs, options["lengths"], batch_first)
    saved = (layer.flat_params.copy(), layer.flat_grads.copy()) if call.modules else None
    try:
        outputs, gradients = call.train(doutputs)
        return Differences(call, outputs, gradients, doutputs, rng).worst()
    finally:
        if saved:
            layer.flat_params[...], layer.flat_grads[...] = saved
        call.restore()


def _clear_padding(doutputs, lengths, batch_first):
    """Set the gradient of the first output to zero past the end of each sequence, where no loss looks."""
    output = leaves(doutputs)[0]
    if output.ndim > 2:
        output = output if batch_first else output.swapaxes(0, 1)
        output[np.arange(output.shape[1]) >= np.asarray(lengths)[:, None]] = 0


class Differences:
    """The loss of a call along random directions of its arrays, and the slopes that backward gave."""

    def __init__(self, call, outputs, gradients, doutputs, rng):
        self.call, self.doutputs, self.gradients = call, doutputs, gradients
        still = {f"d {name}" for name in getattr(call.layer, "frozen", ())}
        still |= {f"d{name}" for name, given in zip(call.names, call.inputs, strict=True) if given is None}
        gradients = {name: gradient for name, gradient in gradients.items() if name not in still}
        self.along = {name: draw_like(gradient, rng) for name, gradient in gradients.items()}
        self.params = {name: array.copy() for name, array in call.layer.params.items()} if call.modules else {}
        numbers = sum(leaf.size for direction in self.along.values() for leaf in leaves(direction))
        self.rounding = EPSILON["float64"] * numbers
        products = zip(leaves(outputs), leaves(doutputs), strict=True)
        self.size = sum(float(np.abs(y * d).sum()) for y, d in products)

    def worst(self):
        """``(share, detail)`` of all arrays together, or of the worst one where that is wrong."""
        share, detail = self._compare("all gradients", list(self.along))
        if share <= 1:
            return share, detail
        alone = [self._compare(name.removeprefix("d").removeprefix(" "), [name]) for name in self.along]
        return max([(share, detail), *alone], key=lambda found: (found in alone and found[0] > 1, found[0]))

    def _compare(self, label, names):
        products = [
            gradient * direction
            for name in names
            for gradient, direction in zip(leaves(self.gradients[name]), leaves(self.along[name]), strict=True)
        ]
        slope = sum(float(product.sum()) for product in products)
        sizes = sum(float(np.abs(product).sum()) for product in products)
        norm = math.sqrt(sum(float((product**2).sum()) for product in products))
        numeric, allowed = self._derivative(names)
        allowed += self.rounding * sizes
        detail = f"{label}: the derivative along a random direction is {slope:.10g}, by differences {numeric:.10g}"
        error = nan_is_worst(abs(numeric - slope))
        if not allowed <= LARGEST_SHARE * max(norm, self.size):
            return float("inf"), (
                f"{detail}, and these are off by up to {allowed:.3g}: equal calls differ, or there is no derivative"
            )
        share = nan_is_worst(error / allowed) if error else 0.0
        return share, f"{detail}: off by {error:.3g}, allowed {allowed:.3g}"

    def _derivative(self, names):
        """(derivative by differences, allowed error), at the step where that error is smallest."""
        central = {}

        def difference(step):
            if step not in central:
                central[step] = (self._loss(names, step) - self._loss(names, -step)) / (2 * step)
            return central[step]

        step, best = EPSILON["float64"] ** 0.2, (float("nan"), float("inf"))
        while step > EPSILON["float64"] ** 0.5:
            one, two, four = (difference(n * step) for n in (1, 2, 4))
            truncation = abs((4 * one - two) - (4 * two - four)) / 45
            rounding = 1.65 * self.rounding * self.size / step
            if truncation + rounding < best[1]:
                best = (64 * one - 20 * two + four) / 45, truncation + rounding
            if truncation <= rounding or rounding > best[1]:
                break
            step /= 2
        return best

    def _loss(self, names, step):
        """The loss when the arrays in ``names`` are moved by ``step``."""
        call = self.call

        def moved(name, array):
            return map_leaves(lambda a, v: a + step * v, array, self.along[name]) if name in names else array

        for name, array in self.params.items():
            if f"d {name}" in names:
                call.layer.params[name][...] = array + step * call.layer.xp.asarray(self.along[f"d {name}"])
            else:
                call.layer.params[name][...] = array
        inputs = [moved(f"d{name}", given) for name, given in zip(call.names, call.inputs, strict=True)]
        products = zip(leaves(call.outputs(inputs)), leaves(self.doutputs), strict=True)
        return sum(float((y * d).sum()) for y, d in products)
