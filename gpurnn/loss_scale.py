"""The loss scale that float16 needs: its smallest number is 6e-8, and most derivatives of a large model are smaller.

>>> import math
>>> model = gpurnn.Sequential(gpurnn.Linear(2, 3, dtype="float16"))
>>> optimizer, scaler = gpurnn.SGD(model, lr=0.1), gpurnn.LossScaler()
>>> for inputs, targets in [(np.ones((4, 2), "float16"), np.zeros(4, int))]:
...     model.zero_grad()
...     output, backward = model.forward(inputs)
...     loss, dloss = gpurnn.cross_entropy(output, targets)
...     _ = backward(dloss(scaler.scale))               # every gradient is this many times as large
...     scaler.unscale(model)                           # the gradients are what they would have been
...     norm = gpurnn.clip_grad_norm(model, 1.0)
...     if scaler.update(math.isfinite(norm)):          # False where they overflowed: no update then
...         optimizer.step()

``fit`` does this by itself for float16. Parameters and gradients are float32 there, so that only what lies between the
loss and the gradients needs the scale. bfloat16 has the range of float32 and needs none.
"""

from collections.abc import Mapping

from .errors import check_number, check_size, checked
from .losses import quiet


class LossScaler:
    """A dynamic loss scale, by the rule of ``torch.amp.GradScaler``: as large as float16 can take.

    The scale is multiplied by ``backoff_factor`` where gradients overflow, and by ``growth_factor`` after every
    ``growth_interval`` steps in a row that did not. Micikevicius et al., "Mixed precision training", ICLR 2018.

    Attributes
    ----------
    scale : what the derivative of the loss is multiplied with. skipped : how many steps overflowed so far.
    """

    def __init__(self, init_scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000):
        self.scale = check_number("init_scale", init_scale, 0, low_open=True)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.good = self.skipped = 0  # steps in a row without an overflow; steps with one

    @checked
    def growth_factor(self, value):
        return check_number("growth_factor", value, 1, low_open=True)

    @checked
    def backoff_factor(self, value):
        return check_number("backoff_factor", value, 0, 1, low_open=True, high_open=True)

    @checked
    def growth_interval(self, value):
        return check_size("growth_interval", value)

    def unscale(self, model):
        """Divide all gradients of ``model`` by the scale, in place."""
        grads = model.flat_grads
        with quiet():
            model.xp.multiply(grads, grads.dtype.type(1 / self.scale), out=grads)

    def update(self, finite):
        """Tell whether the gradients of a step were finite; returns the same: whether the update may be made."""
        if not finite:
            self.scale, self.good, self.skipped = self.scale * self.backoff_factor, 0, self.skipped + 1
            return False
        self.good += 1
        if self.good == self.growth_interval:
            self.scale, self.good = self.scale * self.growth_factor, 0
        return True

    def state_dict(self):
        """All that a resumed run needs, JSON-ready."""
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "good", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        """Continue from ``state_dict()``. Raises KeyError, ValueError, TypeError; nothing changes then."""
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise KeyError(f"state of a loss scaler: expected the entries {sorted(self.state_dict())}, got {state!r}")
        factors = {name: state[name] for name in ("growth_factor", "backoff_factor", "growth_interval")}
        loaded = LossScaler(state["scale"], **factors)
        loaded.good, loaded.skipped = (check_size(name, state[name], 0) for name in ("good", "skipped"))
        self.__dict__.update(loaded.__dict__)

    def __repr__(self):
        return f"LossScaler(scale={self.scale:g}, skipped={self.skipped})"
