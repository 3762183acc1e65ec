"""A batch with resets and masks as what it stands for: each piece of a sequence between two resets, alone."""

import numpy as np

from gpurnn.testing import count_terms, draw_like, leaves, map_leaves, worst_error


class Piecewise:
    """Results of a layer, piece by piece, as ``gpurnn.testing.results`` names those of the whole batch.

    reset, mask: (T, B). Works for layers that are time-major, in evaluation mode or without random draws.
    """

    def __init__(self, layer, x, state, lengths, reset, mask):
        self.layer, self.x, self.state = layer, x, state
        T, B = x.shape[:2]
        lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
        self.pieces = []  # of each sequence: arrays of the timesteps that are there
        for b in range(B):
            borders = [0, *(t for t in range(1, lengths[b]) if reset[t, b]), max(lengths[b], 1)]
            there = mask[:, b] & (np.arange(T) < lengths[b])
            self.pieces.append([t + np.flatnonzero(there[t:end]) for t, end in zip(borders, borders[1:], strict=False)])

    def run(self, doutput, dstate):
        """outputs: zero where nothing happens. doutput: (T, B, F); dstate: as the state."""
        layer, D = self.layer, len(self.layer._directions)
        backwards = [layer._directions[n % D] for n in range(D * layer.num_layers)]
        found = {"output": np.zeros_like(doutput), "dx": np.zeros_like(self.x)}
        final, dinitial = (map_leaves(np.zeros_like, dstate) for _ in range(2))
        layer.zero_grad()
        for b, pieces in enumerate(self.pieces):
            for number, steps in enumerate(pieces):
                first = map_leaves(lambda part, b=b: part[:, b : b + 1], self.state)
                # the loop of a direction ends in the last piece, or in the first one
                ends = np.array([number == (0 if back else len(pieces) - 1) for back in backwards])
                given = map_leaves(lambda part, b=b, ends=ends: part[:, b : b + 1] * ends[:, None, None], dstate)
                output, state, backward = layer.forward(self.x[steps, b : b + 1], first)
                dx, dfirst = backward(doutput[steps, b : b + 1], given)
                found["output"][steps, b], found["dx"][steps, b] = output[:, 0], dx[:, 0]
                for total, part in zip(leaves(final), leaves(state), strict=True):
                    total[ends, b] = part[ends, 0]
                for total, part in zip(leaves(dinitial), leaves(dfirst), strict=True):
                    total[:, b] += part[:, 0]
        return found | {"state": final, "dstate": dinitial} | {f"d {name}": g.copy() for name, g in layer.grads.items()}


def whole(layer, x, state, lengths, reset, mask, doutput, dstate):
    """The same results of one call."""
    layer.zero_grad()
    output, final, backward = layer.forward(x, state, lengths, reset=reset, mask=mask)
    dx, dinitial = backward(doutput, dstate)
    found = {"output": output, "dx": dx, "state": final, "dstate": dinitial}
    return found | {f"d {name}": g.copy() for name, g in layer.grads.items()}


def flat(results):
    """Nested states as entries of their own, float64."""
    plain = {}
    for name, value in results.items():
        for n, part in enumerate(leaves(value)):
            plain[f"{name} {n}"] = np.asarray(part, np.float64)
    return plain


def case(layer, T=8, B=5, seed=0):
    """Arguments of ``whole``: resets, holes, padding on both sides, a sequence without a timestep, one of length 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((T, B, 3)).astype(layer.dtype)
    reset, mask = rng.random((T, B)) < 0.3, rng.random((T, B)) < 0.7
    mask[:, 0], mask[:3, 1], reset[2, 1], lengths = False, False, True, [T, T, 0, T - 2, T - 1]
    output, final = layer(x)
    state = draw_like(final, rng)
    doutput, dstate = draw_like(output, rng).astype(layer.dtype), draw_like(final, rng)
    state, dstate = (map_leaves(lambda part: part.astype(layer.dtype), one) for one in (state, dstate))
    return x, state, lengths, reset, mask, doutput, dstate


def compare(layer, arguments):
    """Every result within the rounding that sums of these sizes may have."""
    *inputs, doutput, dstate = arguments
    expected = flat(Piecewise(layer, *inputs).run(doutput, dstate))
    got = flat(whole(layer, *arguments))
    share, detail = worst_error(got, None, expected, layer.dtype.name, count_terms(layer, inputs[0].shape[0]))
    assert share <= 1, detail
    return got, expected
