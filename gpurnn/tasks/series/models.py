"""The models: a recurrent stack that reads the window, and a head that turns its states into forecasts."""

from functools import partial

from ...layers import Dropout, Linear, Pooling, Sequential
from ...module import Module
from ..settings import recurrent
from .parts import residual_of


class _Forecaster(Module):
    """What both models have: a recurrent stack that reads the window, and a head (dropout, linear layer)."""

    def __init__(self, settings, facts, backend, outputs):
        season, calendar = residual_of(settings, facts) == "season", 2 * len(facts["calendar"])
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
    from each state (T, B, H). With Q quantiles the outputs are (..., H, 1 + Q), the forecast first."""

    def __init__(self, settings, facts, backend=None):
        self.each = 1 + len(settings.quantiles)
        super().__init__(settings, facts, backend, settings.horizon * self.each)
        self.every = settings.mode == "every"

    def __call__(self, window):
        states, _ = self.children["encoder"](window)
        return self._parted(self.children["head"](self.children["last"](states)))

    def _parted(self, outputs):
        return outputs if self.each == 1 else outputs.reshape(*outputs.shape[:-1], -1, self.each)

    def forward(self, window, *, retain=False):
        states, _, encoder_backward = self.children["encoder"].forward(window, retain=retain)
        every = self.every
        if not every:
            states, last_backward = self.children["last"].forward(states)
        flat, head_backward = self.children["head"].forward(states)
        outputs = self._parted(flat)

        def backward(doutputs):
            dstates = head_backward(doutputs.reshape(flat.shape))
            return encoder_backward(dstates if every else last_backward(dstates))[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)


class Recursive(_Forecaster):
    """An encoder and a decoder: (window (T, B, F), what is known of the rows to come (H, B, K)) -> (B, H),
    with Q quantiles (B, H, 1 + Q).

    The decoder begins with the encoder's last state; at each step it reads its own forecast of the step before (0 at
    first) and what is known of the row that it is to say. It learns as it is used, from its own outputs: the derivative
    goes back through them.
    """

    def __init__(self, settings, facts, backend=None):
        self.each = 1 + len(settings.quantiles)
        super().__init__(settings, facts, backend, self.each)

    def __call__(self, inputs):
        return self._run(inputs, self.children["encoder"], self.children["decoder"], self.children["head"])[0]

    def forward(self, inputs, *, retain=False):
        parts = (partial(self.children[name].forward, retain=retain) for name in ("encoder", "decoder", "head"))
        outputs, encoder_backward, steps = self._run(inputs, *parts)

        def backward(doutputs):
            doutputs, dsaid, dstate = doutputs.reshape(*doutputs.shape[:2], self.each), 0, None
            for k in reversed(range(len(steps))):
                decoder_backward, head_backward = steps[k]
                dsaying = doutputs[:, k].copy()
                dsaying[:, 0] += dsaid
                dh = head_backward(dsaying[None])
                dx, dstate = decoder_backward(dh, dstate)
                dsaid = dx[0, :, 0]
            return encoder_backward(None, dstate)[0]

        return outputs, self._guarded(backward, "doutputs", outputs, retain)

    def _run(self, inputs, encoder, decoder, head):
        """Outputs, and the backwards that the three calls return, if they do: the encoder's, and (decoder's,
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
            said = said[:, :, :1]
        joined = self.xp.concatenate(outputs, axis=1) if self.each == 1 else self.xp.stack(outputs, axis=1)
        return joined, *encoder_backward, steps
