"""Learning-rate schedules. Each sets ``opt.lr`` as a function of how often its ``step`` was called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import NamesArguments, check_number, check_size
from .base import Optimizer
from .state import check_kind, check_names


class Schedule(NamesArguments):
    """Base class of the learning-rate schedules: ``step()`` advances and sets ``opt.lr``.

    Call ``step()`` after each epoch or after each update: all durations count these calls. A schedule starts from the
    ``opt.lr`` at the time it is built, its base rate, and owns ``opt.lr`` from then on. A rate is a function of
    counters and not of the rate before it, so that nothing drifts and a resumed schedule continues exactly. The rates
    of the optimizer's groups follow in proportion.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    **hyper
        Hyperparameters of the schedule, which ``_check_hyper`` checks.

    Raises
    ------
    TypeError, ValueError
        For an ``opt`` that is no optimizer, and for hyperparameters out of their range.
    """

    def __init__(self, opt: Optimizer, **hyper: Any) -> None:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"opt should be a gpurnn optimizer, got {type(opt).__name__}")
        self._opt = opt
        self._hyper = self._check_hyper(base_lr=opt.lr, **hyper)
        self._counters = self._check_counters()

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"copy.copy: a shallow copy of this {type(self).__name__} would set the learning rate of the same "
            "optimizer: use copy.deepcopy((model, optimizer, schedule)), which copies all three"
        )

    @property
    def lr(self) -> float:
        """The learning rate at this point of the schedule."""
        return self._rate(**self._hyper, **self._counters)

    def step(self, metric: float | None = None) -> None:
        """Advance by one call and set ``opt.lr``.

        Parameters
        ----------
        metric : float, optional
            The result of the epoch; only ``PlateauSchedule`` needs it.
        """
        self._counters = self._advance(metric, **self._counters)
        self._set_rates()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON-ready."""
        return {"kind": type(self).__name__, **self._hyper, **self._counters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a schedule from its ``state_dict()`` and set ``opt.lr``.

        Raises
        ------
        ValueError, TypeError, KeyError
            For a state that does not fit; nothing changes then.
        """
        self._hyper, self._counters = self._check_state(state)
        self._set_rates()

    def _check_state(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(hyperparameters, counters) of a state, checked."""
        check_kind("schedule state", state, self)
        check_names("schedule state", state, self.state_dict())
        hyper = self._check_hyper(**{name: state[name] for name in self._hyper})
        return hyper, self._check_counters(**{name: state[name] for name in self._counters})

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in {**self._hyper, **self._counters}.items())
        return f"{type(self).__name__}(lr={self.lr}, {values})"

    def _set_rates(self) -> None:
        """Set the optimizer's rate, and the factor of its groups where its first rate, 0, has no ratio to this one."""
        self._opt.lr = self.lr
        self._opt._group_factor = self._factor() if self._opt._first_lr == 0 else 1.0

    def _factor(self) -> float:
        """The rate as a share of the base rate."""
        base = self._hyper["base_lr"]
        return self.lr / base if base else self._rate(**{**self._hyper, "base_lr": 1.0}, **self._counters)

    # ---- what each schedule defines; most of them only count calls

    def _check_hyper(self, base_lr: float, **hyper: Any) -> dict[str, Any]:
        """The base rate and the hyperparameters, checked, as a JSON-ready dict."""
        raise NotImplementedError

    def _rate(self, base_lr: float, **hyper_and_counters: Any) -> float:
        """The learning rate; called with all hyperparameters and counters by name."""
        raise NotImplementedError

    def _check_counters(self, calls: int = 0) -> dict[str, Any]:
        """The counters, checked, as a JSON-ready dict; the defaults are the start."""
        return {"calls": check_size("calls", calls, minimum=0)}

    def _advance(self, metric: float | None, calls: int) -> dict[str, Any]:
        """The counters after one more call of ``step``."""
        return {"calls": calls + 1}


class ConstantSchedule(Schedule):
    """The base rate throughout.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    """

    def __init__(self, opt: Optimizer) -> None:
        super().__init__(opt)

    def _check_hyper(self, base_lr: float) -> dict[str, Any]:
        return {"base_lr": check_number("base_lr", base_lr, 0.0)}

    def _rate(self, base_lr: float, calls: int) -> float:
        return base_lr


class StepSchedule(Schedule):
    """The rate times ``gamma`` after every ``step_size`` calls; ``torch.optim.lr_scheduler.StepLR``.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    step_size : int
        Calls between two changes, at least 1.
    gamma : float
        Factor of a change, in (0, 1].

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Examples
    --------
    >>> schedule = gpurnn.StepSchedule(gpurnn.SGD(gpurnn.Linear(2, 1), lr=0.5), step_size=2, gamma=0.5)
    >>> rates = []
    >>> for epoch in range(4):
    ...     rates.append(schedule.lr)
    ...     schedule.step()
    >>> rates
    [0.5, 0.5, 0.25, 0.25]
    """

    def __init__(self, opt: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        super().__init__(opt, step_size=step_size, gamma=gamma)

    def _check_hyper(self, base_lr: float, step_size: int, gamma: float) -> dict[str, Any]:
        return {
            "base_lr": check_number("base_lr", base_lr, 0.0),
            "step_size": check_size("step_size", step_size),
            "gamma": check_number("gamma", gamma, 0.0, 1.0, low_open=True),
        }

    def _rate(self, base_lr: float, step_size: int, gamma: float, calls: int) -> float:
        return base_lr * gamma ** (calls // step_size)


class CosineSchedule(Schedule):
    """Half a cosine from the base rate to ``min_lr`` in ``total`` calls, and ``min_lr`` from then on.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    total : int
        Calls until ``min_lr`` is reached, at least 1.
    min_lr : float
        The last rate, from 0 to the base rate.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Source: Loshchilov and Hutter, ICLR 2017, without restarts. ``torch.optim.lr_scheduler.CosineAnnealingLR`` is the
    same up to ``total`` and rises again after it.
    """

    def __init__(self, opt: Optimizer, total: int, min_lr: float = 0.0) -> None:
        super().__init__(opt, total=total, min_lr=min_lr)

    def _check_hyper(self, base_lr: float, total: int, min_lr: float) -> dict[str, Any]:
        base_lr = check_number("base_lr", base_lr, 0.0)
        return {
            "base_lr": base_lr,
            "total": check_size("total", total),
            "min_lr": check_number("min_lr", min_lr, 0.0, base_lr),
        }

    def _rate(self, base_lr: float, total: int, min_lr: float, calls: int) -> float:
        # the fraction is exactly 1 at the start and exactly 0 at the end
        fraction = (1 + math.cos(math.pi * min(calls, total) / total)) / 2
        return fraction * base_lr + (1 - fraction) * min_lr


class PlateauSchedule(Schedule):
    """The rate times ``factor`` whenever the metric, a loss, has not improved for more than ``patience`` calls.

    An improvement is a metric below ``best * (1 - threshold)``. ``step(metric)`` needs the metric: a number, or a
    scalar of the backend; NaN and -inf raise ValueError, and inf counts as no improvement.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    factor : float
        Factor of a reduction, in (0, 1).
    patience : int
        Calls without an improvement that are allowed, at least 0.
    threshold : float
        Relative improvement that counts, in [0, 1).
    min_lr : float
        Lower limit of the rate, from 0 to the base rate.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range.

    Notes
    -----
    Equals ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with ``eps=0``.
    """

    def __init__(
        self,
        opt: Optimizer,
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(opt, factor=factor, patience=patience, threshold=threshold, min_lr=min_lr)

    def _check_hyper(
        self, base_lr: float, factor: float, patience: int, threshold: float, min_lr: float
    ) -> dict[str, Any]:
        base_lr = check_number("base_lr", base_lr, 0.0)
        return {
            "base_lr": base_lr,
            "factor": check_number("factor", factor, 0.0, 1.0, low_open=True, high_open=True),
            "patience": check_size("patience", patience, minimum=0),
            "threshold": check_number("threshold", threshold, 0.0, 1.0, high_open=True),
            "min_lr": check_number("min_lr", min_lr, 0.0, base_lr),
        }

    def _check_counters(self, best: float | None = None, bad: int = 0, reductions: int = 0) -> dict[str, Any]:
        return {
            "best": None if best is None else check_number("best", best),  # None because inf is not JSON
            "bad": check_size("bad", bad, minimum=0),
            "reductions": check_size("reductions", reductions, minimum=0),
        }

    def _advance(self, metric: float | None, best: float | None, bad: int, reductions: int) -> dict[str, Any]:
        if metric is None:
            raise TypeError("metric is missing: PlateauSchedule follows it, call step(metric)")
        try:
            metric = float(metric)  # a scalar of the backend is copied to the host here
        except (TypeError, ValueError):
            raise TypeError(f"metric should be a number, got {metric!r}") from None
        if math.isnan(metric) or metric == -math.inf:
            raise ValueError(f"metric should be a number above -inf, got {metric}")
        limit = math.inf if best is None else best * (1 - self._hyper["threshold"])
        if metric < limit:
            return {"best": metric, "bad": 0, "reductions": reductions}
        if bad < self._hyper["patience"]:
            return {"best": best, "bad": bad + 1, "reductions": reductions}
        return {"best": best, "bad": 0, "reductions": reductions + 1}

    def _rate(self, base_lr: float, factor: float, min_lr: float, reductions: int, **_: Any) -> float:
        return max(base_lr * factor**reductions, min_lr)


class WarmupSchedule(Schedule):
    """Rise from ``base / steps`` to the base rate in equal parts, then continue with ``after``.

    After k calls of ``step`` the rate is ``base * (k + 1) / steps`` for k < steps. So building the schedule lowers
    ``opt.lr`` to ``base / steps``, and the base rate is reached after ``steps - 1`` calls. The next call is the start
    of ``after``: it runs as it would on its own, ``steps`` calls later. Metrics given during the warm-up are not used.

    Parameters
    ----------
    opt : Optimizer
        The optimizer whose ``lr`` is set.
    steps : int
        Calls of the warm-up, at least 1.
    after : Schedule, optional
        A schedule built on the same optimizer just before this one; None stays at the base rate.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or out of its range, and for an ``after`` that does not fit.

    Notes
    -----
    Equals ``torch.optim.lr_scheduler.SequentialLR([LinearLR(o, 1 / steps, total_iters=steps - 1), after], [steps])``.
    ``state_dict()`` holds that of ``after``.
    """

    def __init__(self, opt: Optimizer, steps: int, after: Schedule | None = None) -> None:
        super().__init__(opt, steps=steps)
        if after is None:
            after = ConstantSchedule(opt)
        if not isinstance(after, Schedule):
            raise TypeError(f"after should be a gpurnn schedule, got {type(after).__name__}")
        if after._opt is not opt:
            raise ValueError("after should be built on the same optimizer as the warm-up")
        if after.lr != opt.lr:
            raise ValueError(
                f"after is at the rate {after.lr}, the optimizer at {opt.lr}: build after just before the warm-up"
            )
        self._after = after
        self._set_rates()

    def step(self, metric: float | None = None) -> None:
        """Advance by one call and set ``opt.lr``.

        Parameters
        ----------
        metric : float, optional
            Passed on to ``after`` once the warm-up is over.
        """
        if self._counters["calls"] >= self._hyper["steps"]:
            self._after.step(metric)
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, JSON-ready, with the state of ``after``."""
        return {**super().state_dict(), "after": self._after.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue this schedule and ``after`` from a ``state_dict()``; raises as ``Schedule.load_state_dict``."""
        self._check_state(state)  # all checks before any change
        self._after.load_state_dict(state["after"])
        super().load_state_dict(state)

    def _check_hyper(self, base_lr: float, steps: int) -> dict[str, Any]:
        return {"base_lr": check_number("base_lr", base_lr, 0.0), "steps": check_size("steps", steps)}

    def _rate(self, base_lr: float, steps: int, calls: int) -> float:
        return base_lr * ((calls + 1) / steps) if calls < steps else self._after.lr

    def _factor(self) -> float:
        return super()._factor() if self._counters["calls"] < self._hyper["steps"] else self._after._factor()
