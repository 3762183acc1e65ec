"""A ragged batch against each of its sequences alone."""

import numpy as np

from .allowed import count_terms, worst_error
from .call import Call
from .nested import draw_like, is_floating, map_leaves


def ragged_error(layer, x, lengths, state=None, terms=None, seed=0):
    """``(share, detail)`` of ``check_ragged``."""
    rng, lengths = np.random.default_rng(seed), np.asarray(lengths)
    axis = 0 if getattr(layer, "batch_first", False) else 1
    modes = [(module, module.training) for _, module in layer.modules()]
    layer.eval()
    try:
        return RaggedBatch(layer, np.array(x), lengths, state, axis, rng).worst(terms)
    finally:
        for module, training in modes:
            module.training = training


class RaggedBatch:
    """A ragged batch with NaN in its padding; ``axis`` is that of the sequences in x."""

    def __init__(self, layer, x, lengths, state, axis, rng):
        self.layer, self.lengths, self.axis, self.x = layer, lengths, axis, x
        outputs = Call(layer, self._inputs(x, state), {"lengths": lengths}).outputs()
        self.doutputs = draw_like(outputs, rng)
        doutput = self.doutputs[0]
        self.stepwise = doutput.shape[:2] == x.shape[:2] and doutput.ndim >= min(x.ndim, 3)
        for b, length in enumerate(lengths):
            for array in (x,) * is_floating(x) + (doutput,) * self.stepwise:
                np.moveaxis(array, axis, 0)[b, length:] = np.nan
        self.state = map_leaves(lambda part: np.where((lengths > 0)[:, None], part, np.nan), state)

    def _inputs(self, x, state):
        return (x, state) if self.layer.stateful else (x,)

    def worst(self, terms):
        layer, lengths = self.layer, self.lengths
        whole = Call(layer, self._inputs(self.x, self.state), {"lengths": lengths}).run(self.doutputs)
        terms = count_terms(layer, self.x.shape[1 - self.axis]) if terms is None else terms
        broken = [name for name, value in self._used(whole).items() if not np.isfinite(value).all()]
        if broken:
            return float("inf"), f"padding reached {', '.join(broken)}"
        worst, detail = 0.0, ""
        sums = {name: np.zeros_like(value) for name, value in whole.items() if name.startswith("d ")}
        for b, length in enumerate(lengths):
            for name in ("output", "dx"):
                if name in whole and (name == "dx" or self.stepwise):
                    past = np.moveaxis(whole[name], self.axis, 0)[b, length:]
                    if past.any():  # NaN too
                        return float("inf"), f"{name} past the end of the sequence of length {length} is not zero"
            alone = self._alone(b, length)
            for name in sums:
                sums[name] += alone.pop(name)
            mine = {name: self._part(name, whole[name], b, length) for name in alone}
            if not length:  # the initial state, as it came
                for name in [name for name in alone if name.startswith("state") and np.isnan(alone[name]).all()]:
                    if np.isnan(mine[name]).all():
                        del alone[name]
            share, where = worst_error(mine, None, alone, layer.dtype.name, terms)
            if share > worst:
                worst, detail = share, f"sequence of length {length}, {where}"
        share, where = worst_error(whole, None, sums, layer.dtype.name, terms + len(lengths))
        return (worst, detail) if worst > 1 else max((worst, detail), (share, where))

    def _used(self, whole):
        """All results but the final states of sequences without steps."""
        some = self.lengths > 0
        return {name: value[:, some] if name.startswith("state") else value for name, value in whole.items()}

    def _alone(self, b, length):
        """The results of one sequence by itself."""
        doutput, *dstate = self.doutputs
        doutput = self._steps(doutput, b, length) if self.stepwise else doutput[b : b + 1]
        states = [map_leaves(lambda part: part[:, b : b + 1], part) for part in (self.state, *dstate)]
        inputs = self._inputs(self._steps(self.x, b, length), states[0])
        return Call(self.layer, inputs, {}).run((doutput, *states[1:]))

    def _part(self, name, value, b, length):
        """What belongs to one sequence, of a result of the batch."""
        if name == "dx" or (name == "output" and self.stepwise):
            return self._steps(value, b, length)
        return value[b : b + 1] if name == "output" else value[:, b : b + 1]

    def _steps(self, array, b, length):
        return np.moveaxis(np.moveaxis(array, self.axis, 0)[b : b + 1, :length], 0, self.axis)
