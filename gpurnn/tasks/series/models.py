"""The models: a recurrent stack that reads the window, and what makes forecasts of its states."""

from functools import partial

from ...layers import Dropout, Linear, Pooling, Sequential
from ...module import Module
from ..settings import recurrent


class _Forecaster(Module):
    """What both models have: a recurrent stack that reads the window, and a head (dropout, linear layer)."""

    def __init__(self, settings, facts, backend, outputs):
        season, calendar = settings.residual == "season", 2 * len(facts["calendar"])
        seeds = settings.seeds()
        shared = {"backend": backend, "dtype": settings.dtype}
        encoder = recurrent(settings, 1 + season + len(facts["inputs"]) + calendar, next(seeds), backend)
        if settings.mode == "recursive":
            second = {"decoder": recurrent(settings, 1 + calendar + season, next(seeds), backend)}
        else:
            second = {"last": Pooling(settings.hidden, "last", **shared)}
        head = {
            "dropout": Dropout(settings.dropout, seed=next(seeds), **shared),
            "linear": Linear(settings.hidden, outputs, seed=next(seeds), **shared),
        }
        if not settings.dropout:
            del head["dropout"]
        super().__init__(encoder.ops, settings.dtype, settings.seed)
        self._adopt({"encoder": encoder, **second, "head": Sequential(head)})


class Direct(_Forecaster):
    """A window (T, B, F) -> all values of the horizon from its last state (B, H); in training with the mode "every"
    from each state (T, B, H)."""

    def __init__(self, settings, facts, backend=None):
        super().__init__(settings, facts, backend, settings.horizon)
        self.every = settings.mode == "every"

    def __call__(self, window):
        states, _ = self.children["encoder"](window)
        return self.children["head"](self.children["last"](states))

    def forward(self, window, *, retain=False):
        states, _, encoder_backward = self.children["encoder"].forward(window, retain=retain)
        every = self.every
        if not every:
            states, last_backward = self.children["last"].forward(states)
        outputs, head_backward = self.children["head"].forward(states)

        def backward(doutputs):
            dstates = head_backward(doutputs)
            return encoder_backward(dstates if every else last_backward(dstates))[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)


class Recursive(_Forecaster):
    """An encoder and a decoder: (window (T, B, F), what is known of the rows to come (H, B, K)) -> (B, H).

    The decoder begins with the encoder's last state; at each step it reads its own output of the step before (0 at
    first) and what is known of the row that it is to say. It learns as it is used, from its own outputs: the derivative
    goes back through them.
    """

    def __init__(self, settings, facts, backend=None):
        super().__init__(settings, facts, backend, 1)

    def __call__(self, inputs):
        return self._run(inputs, self.children["encoder"], self.children["decoder"], self.children["head"])[0]

    def forward(self, inputs, *, retain=False):
        parts = (partial(self.children[name].forward, retain=retain) for name in ("encoder", "decoder", "head"))
        outputs, encoder_backward, steps = self._run(inputs, *parts)

        def backward(doutputs):
            dsaid, dstate = 0, None
            for k in reversed(range(len(steps))):
                decoder_backward, head_backward = steps[k]
                dh = head_backward((doutputs[:, k] + dsaid)[None, :, None])
                dx, dstate = decoder_backward(dh, dstate)
                dsaid = dx[0, :, 0]
            return encoder_backward(None, dstate)[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)

    def _run(self, inputs, encoder, decoder, head):
        """Outputs (B, H), and the backwards that the three calls return, if they do: the encoder's, and (decoder's,
        head's) of each step."""
        window, known = inputs
        _, state, *encoder_backward = encoder(window)
        said, outputs, steps = self.xp.zeros((1, *window.shape[1:2], 1), self.dtype), [], []
        for k in range(len(known)):
            h, state, *back = decoder(self.xp.concatenate([said, known[k : k + 1]], axis=2), state)
            said = head(h)
            if back:
                said, head_backward = said
                steps.append((*back, head_backward))
            outputs.append(said[0])
        return self.xp.concatenate(outputs, axis=1), *encoder_backward, steps
