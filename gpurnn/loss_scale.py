"""The loss scale that float16 needs: its smallest number is 6e-8, and most gradients of a large model are smaller.

>>> import math
>>> model = gpurnn.Sequential(gpurnn.Linear(2, 3, dtype="float16"))
>>> optimizer, scaler = gpurnn.SGD(model, lr=0.1), gpurnn.LossScaler()
>>> for inputs, targets in [(np.ones((4, 2), "float16"), np.zeros(4, int))]:
...     model.zero_grad()
...     output, backward = model.forward(inputs)
...     loss, dloss = gpurnn.cross_entropy(output, targets)
...     _ = backward(dloss(scaler.scale))               # every gradient is larger by this factor
...     scaler.unscale(model)                           # the gradients are what they would have been
...     norm = gpurnn.clip_grad_norm(model, 1.0)
...     if scaler.update(math.isfinite(norm)):          # False where they overflowed: no update then
...         optimizer.step()

``fit`` does this by itself for float16. Parameters and their gradients are float32 then, so only the gradients of the
activations need the scale. bfloat16 has the range of float32 and needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import MissingError, check_number, check_size, checked
from .losses import quiet
from .module import Module


class LossScaler:
    """A dynamic loss scale, by the rule of ``torch.amp.GradScaler``: as large as float16 can take.

    The scale is multiplied by ``backoff_factor`` where gradients overflow, and by ``growth_factor`` after every
    ``growth_interval`` steps in a row without an overflow.

    Parameters
    ----------
    init_scale : float
        First scale, above 0.
    growth_factor : float
        Above 1.
    backoff_factor : float
        Between 0 and 1.
    growth_interval : int
        At least 1.

    Attributes
    ----------
    scale : float
        The factor for the gradient of the loss.
    skipped : int
        Number of steps so far whose gradients overflowed.
    good : int
        Steps in a row without an overflow.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Source: Micikevicius et al., "Mixed precision training", ICLR 2018.
    """

    scale: float
    good: int
    skipped: int

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.scale = check_number("init_scale", init_scale, 0, low_open=True)
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.good = self.skipped = 0

    @checked
    def growth_factor(self, value: float) -> float:
        """Factor of the scale after ``growth_interval`` steps without an overflow."""
        return check_number("growth_factor", value, 1, low_open=True)

    @checked
    def backoff_factor(self, value: float) -> float:
        """Factor of the scale after an overflow."""
        return check_number("backoff_factor", value, 0, 1, low_open=True, high_open=True)

    @checked
    def growth_interval(self, value: int) -> int:
        """Steps without an overflow until the scale grows."""
        return check_size("growth_interval", value)

    def unscale(self, model: Module) -> None:
        """Divide all gradients of ``model`` by the scale, in place."""
        grads = model.flat_grads
        with quiet():
            model.xp.multiply(grads, grads.dtype.type(1 / self.scale), out=grads)

    def update(self, finite: bool) -> bool:
        """Adapt the scale after a step.

        Parameters
        ----------
        finite : bool
            Whether all gradients of the step were finite.

        Returns
        -------
        bool
            Whether the optimizer may make its update: ``finite``.
        """
        if not finite:
            self.good, self.skipped = 0, self.skipped + 1
            self._scale_by(self.backoff_factor)
            return False
        self.good += 1
        if self.good == self.growth_interval:
            self.good = 0
            self._scale_by(self.growth_factor)
        return True

    def _scale_by(self, factor: float) -> None:
        """Change the scale, unless it would leave what a float holds."""
        if 0.0 < self.scale * factor < float("inf"):
            self.scale *= factor

    def state_dict(self) -> dict[str, float | int]:
        """Everything that a resumed run needs, JSON-ready."""
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "good", "skipped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a loss scaler from its ``state_dict()``.

        Raises
        ------
        KeyError, ValueError, TypeError
            For a state that does not fit; nothing changes then.
        """
        if not isinstance(state, Mapping) or set(state) != set(self.state_dict()):
            raise MissingError(
                f"state of a loss scaler: expected the entries {sorted(self.state_dict())}, got {state!r}"
            )
        factors = {name: state[name] for name in ("growth_factor", "backoff_factor", "growth_interval")}
        loaded = LossScaler(state["scale"], **factors)
        loaded.good, loaded.skipped = (check_size(name, state[name], 0) for name in ("good", "skipped"))
        self.__dict__.update(loaded.__dict__)

    def __repr__(self) -> str:
        return f"LossScaler(scale={self.scale:g}, skipped={self.skipped})"
