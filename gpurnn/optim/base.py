"""The base class of the optimizers: flat buffers, state arrays, saving and loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from .._typing import Array
from ..arrays import host_array
from ..dtypes import is_float
from ..errors import DtypeError, NamesArguments, ShapeError, check_flag, check_number, check_size
from ..module import Module, writable
from .blocks import block_size, blocks, check_model
from .groups import Group, ReadOnly, Setting, make_groups
from .state import check_kind, check_names, is_square


class Optimizer(NamesArguments):
    """Base class of the optimizers.

    State arrays are allocated once, in the model's compute dtype. An update allocates nothing.

    Parameters
    ----------
    model : Module
        The model to train. It must have parameters.
    lr : float
        Learning rate, at least 0.
    groups : list of dict, optional
        Settings of some parameters: ``{"match": name, "lr": 1e-4, "weight_decay": 0}``. ``match`` is a name, or a list
        of names, as in ``Module.freeze``: parameters or layers, with ``*`` and ``?``. The other keys are ``lr``, any
        hyperparameter that needs no other state arrays, or ``freeze``, which calls ``Module.freeze``. A parameter
        belongs to the first group that matches it; what no group matches has the optimizer's own settings. A group's
        ``lr`` holds at the rate that the optimizer is built with; where that changes, by a schedule or by hand, the
        group's changes in proportion. Where that is 0, a schedule scales the group's as it would a rate above 0.
    decay_biases : bool
        False: no weight decay of parameters of fewer than two axes, which are biases and the weights of norms, unless a
        group sets ``weight_decay``.
    maximize : bool
        Go up the gradient instead of down.
    **hyper
        Hyperparameters of the optimizer, which ``_check_hyper`` checks.

    Attributes
    ----------
    model : Module
        The model whose parameters are updated.
    lr : float
        Learning rate, settable at any time; 0 is allowed.
    steps : int
        Number of updates made.
    hyper : mapping
        The other hyperparameters, read-only.

    Raises
    ------
    TypeError, ValueError
        For a ``model`` that is no Module or has no parameters, and for hyperparameters out of their range. ValueError,
        too, for a group to which no parameter is left.
    KeyError
        For a group whose pattern matches nothing.
    """

    model: Module
    hyper: Mapping[str, Any]
    steps: int
    _kernel: str | None = None  # the compiled rule; None: array code on every backend
    _hints = {"zero_grad": "model.zero_grad() does that", "param_groups": "lr may be set; groups= has those of parts"}
    _group_factor = 1.0  # of the groups' rates, by a schedule, where the first rate is 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_update" in vars(cls) and "_kernel" not in vars(cls):  # the rule that it inherits is another update
            cls._kernel = None

    def __init__(
        self,
        model: Module,
        lr: float,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        decay_biases: bool = True,
        maximize: bool = False,
        **hyper: Any,
    ) -> None:
        check_model(model)
        model._refuse_hidden_layers()
        if model.flat_params.size == 0:
            raise ValueError("model has no parameters to train")
        self.lr = lr
        self.hyper = MappingProxyType(self._check_hyper(**hyper))
        self.model, self.steps = model, 0
        self._decay_biases = check_flag("decay_biases", decay_biases)
        self._maximize = check_flag("maximize", maximize)
        self._first_lr = self.lr
        self._groups = make_groups(model, groups, self.hyper, self._check_group)
        self._number_settings()
        xp, self._size, self._count = model.xp, model.flat_params.size, model.parameter_count
        self._structure = model._structure()
        self._arrays = {name: xp.zeros(self._size, model.compute_dtype) for name in self._array_names(self.hyper)}
        self._block = block_size(xp, self._size)
        self._scratch = xp.empty((2, self._block), model.compute_dtype)

    def __copy__(self) -> NoReturn:
        raise TypeError(
            f"copy.copy: a shallow copy of this {type(self).__name__} would share its state arrays and its model: use "
            "copy.deepcopy((model, optimizer)), which copies both"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, with arrays on the host.

        The model is part of it. To copy both and leave them connected, copy them in one call:
        ``model, adam = copy.deepcopy((model, adam))``.
        """
        arrays = {name: self.model.ops.to_numpy(array) for name, array in self._arrays.items()}
        # A model may refer to this optimizer and get its own state later, so the two are stored here as well.
        from_model = {"_ops": self.model.ops, "_compute_dtype": self.model.compute_dtype}
        return self.__dict__ | {"hyper": dict(self.hyper), "_arrays": arrays, "_scratch": None} | from_model

    def __setstate__(self, state: dict[str, Any]) -> None:
        xp, compute_dtype = state.pop("_ops").xp, state.pop("_compute_dtype")
        self.__dict__.update(state)
        self.hyper = MappingProxyType(self.hyper)
        self._arrays = {name: xp.asarray(writable(array)) for name, array in self._arrays.items()}
        self._scratch = xp.empty((2, self._block), compute_dtype)

    @property
    def lr(self) -> float:
        """Learning rate: a finite number, at least 0."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = check_number("lr", value, 0.0)

    def step(self) -> None:
        """Update ``model.flat_params`` in place from ``model.flat_grads``, which do not change.

        Frozen parameters and their state arrays do not change either. The state of a parameter that was frozen from
        the start begins at zero when it is unfrozen.

        Raises
        ------
        ValueError
            If the model's number of parameters has changed since the optimizer was built.
        """
        params, grads = self._buffers()
        self.steps += 1
        parts, frozen = self.model._trained_parts(self._numbers), set(self.model.frozen)
        settings, arrays = [self._setting(*kind) for kind in self._kinds], self._arrays.items()
        try:
            for part, number in parts:
                self._step(settings[number], params[part], grads[part], {name: array[part] for name, array in arrays})
        finally:  # behind the last write: another thread may copy the weights meanwhile
            if parts:
                self.model.changed(*(name for name in self.model.params if frozen and name not in frozen))

    def _step(self, by: Setting, params: Array, grads: Array, arrays: dict[str, Array]) -> None:
        """Update a part of the flat buffers and of the state arrays."""
        array_code = partial(self._array_code, by)
        self.model.ops.optimize(self._kernel, params, grads, arrays, self._scalars(by), array_code)

    def _array_code(self, by: Setting, params: Array, grads: Array, arrays: dict[str, Array]) -> None:
        """The update in array code, for backends that have no other."""
        with np.errstate(over="ignore", invalid="ignore"):  # the numbers themselves show it, as on a GPU
            for part in blocks(params.size, self._block):
                p = params[part]
                a, b = self._scratch[:, : p.size]
                self._update(by, p, grads[part], a, b, **{name: array[part] for name, array in arrays.items()})

    # ---- groups

    @property
    def groups(self) -> tuple[ReadOnly, ...]:
        """The sets of parameters with settings of their own: ``names``, ``lr`` as of now, and all hyperparameters.

        They are read-only: set the optimizer's ``lr``, or build a new optimizer.
        """
        found = []
        for number, kind in enumerate(self._kinds):
            names = list(self.model.params)
            if self._numbers is not None:
                names = [name for name in names if self._numbers[name] == number]
            found.append(ReadOnly(names=names, lr=self._rate(kind[0]), **self._hyper_of(*kind)))
        return tuple(found)

    def _number_settings(self) -> None:
        """Number the settings: (group or None, whether its decay is left out), and those of each parameter."""
        self._kinds: list[tuple[Group | None, bool]] = []
        group_of = {name: group for group in self._groups for name in group.names}
        numbers = {}
        for name, array in self.model.params.items():
            group = group_of.get(name)
            decays = self._decay_biases or array.ndim > 1 or (group is not None and "weight_decay" in group.hyper)
            kind = next((n for n, (g, free) in enumerate(self._kinds) if g is group and free != decays), None)
            if kind is None:
                kind = len(self._kinds)
                self._kinds.append((group, not decays))
            numbers[name] = kind
        self._numbers = None if len(self._kinds) == 1 else numbers  # None: one update of all that is not frozen

    def _check_group(self, **hyper: Any) -> dict[str, Any]:
        """Hyperparameters of a group, checked: they must need the optimizer's own state arrays."""
        checked = self._check_hyper(**hyper)
        if self._array_names(checked) != self._array_names(self.hyper):
            changed = ", ".join(f"{name}={checked[name]}" for name in checked if checked[name] != self.hyper[name])
            raise ValueError(f"{changed} needs other state arrays than the optimizer's own settings")
        return checked

    def _rate(self, group: Group | None) -> float:
        """A group's learning rate of now."""
        if group is None or group.lr is None:
            return self.lr
        if self._first_lr == 0:
            return group.lr * self._group_factor
        return group.lr * (self.lr / self._first_lr)

    def _hyper_of(self, group: Group | None, no_decay: bool) -> Mapping[str, Any]:
        """A group's hyperparameters."""
        if group is None and not no_decay:
            return self.hyper
        hyper = {**self.hyper, **(group.hyper if group else {})}
        return hyper | {"weight_decay": 0.0} if no_decay and "weight_decay" in hyper else hyper

    def _setting(self, group: Group | None, no_decay: bool) -> Setting:
        """What the update of a group takes.

        To maximize, rate and decay change their sign. Every update is odd in the gradient: its averages then have the
        gradient's own sign, and the parameters move as if all of them had the other.
        """
        lr, hyper = self._rate(group), self._hyper_of(group, no_decay)
        if self._maximize:
            lr, hyper = -lr, {**hyper, "weight_decay": -hyper.get("weight_decay", 0.0)}
        return Setting(lr, hyper)

    def _options(self) -> dict[str, Any]:
        """The options beside hyperparameters that are not the defaults, JSON-ready."""
        options = {"groups": [group.given for group in self._groups], "maximize": self._maximize}
        options = {name: value for name, value in options.items() if value}
        return options | ({} if self._decay_biases else {"decay_biases": False})

    # ---- saving and loading

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything that a resumed run needs.

        Returns
        -------
        dict
            ``{"scalars": JSON-ready dict, "arrays": name -> NumPy array}``. An array is called by its state and its
            parameter (``exp_avg.rnn.weight_ih_l0``) and has the parameter's shape.
        """
        scalars = {"kind": type(self).__name__, "lr": self.lr, "steps": self.steps, **self.hyper, **self._options()}
        if self._groups:
            scalars |= {"first_lr": self._first_lr}
            scalars |= {"group_factor": self._group_factor} if self._group_factor != 1 else {}
        arrays = {name: self.model.ops.to_numpy(array).copy() for name, array in self._named_arrays().items()}
        return {"scalars": scalars, "arrays": arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an optimizer from its ``state_dict()``: learning rate, update count, hyperparameters and arrays.

        Parameters
        ----------
        state : mapping
            What ``state_dict()`` returned.

        Raises
        ------
        ValueError
            For another kind of optimizer, other groups or flags, hyperparameters that need other arrays, and values
            that are not finite (averages of squares may be +inf).
        KeyError
            For missing and unknown names.
        ShapeError, DtypeError
            For arrays that do not fit.
        TypeError
            For an object that is no such state.

        Nothing changes on an error.
        """
        check_names("optimizer state", state, ("scalars", "arrays"))
        scalars, arrays = state["scalars"], state["arrays"]
        check_kind("optimizer state", scalars, self)
        options = self._options()
        for name, default in (("groups", []), ("maximize", False), ("decay_biases", True)):
            saved, here = scalars.get(name, default), options.get(name, default)
            if saved != here:
                raise ValueError(f"{name}: this state was saved with {saved!r}, expected {here!r}, the optimizer's own")
        first = ["first_lr", *(["group_factor"] if "group_factor" in scalars else [])] if self._groups else []
        check_names("optimizer state", scalars, ("kind", "lr", "steps", *self.hyper, *options, *first))
        lr = check_number("lr", scalars["lr"], 0.0)
        first_lr = check_number("first_lr", scalars.get("first_lr", lr), 0.0)
        factor = check_number("group_factor", scalars.get("group_factor", 1.0), 0.0)
        steps = check_size("steps", scalars["steps"], minimum=0)
        hyper = self._check_hyper(**{name: scalars[name] for name in self.hyper})
        if self._array_names(hyper) != list(self._arrays):
            raise ValueError(f"this state is of an optimizer with {hyper}, expected one with {dict(self.hyper)}")
        targets = self._named_arrays()
        check_names("optimizer state", arrays, targets)
        loaded = {name: self._check_array(name, arrays[name], target) for name, target in targets.items()}

        self.lr, self.steps, self.hyper, self._first_lr = lr, steps, MappingProxyType(hyper), first_lr
        self._group_factor = factor
        for name, value in loaded.items():
            targets[name][...] = self.model.xp.asarray(value)

    def __repr__(self) -> str:
        hyper = ", ".join(f"{name}={value}" for name, value in self.hyper.items())
        options = self._options()
        if self._groups:
            options["groups"] = len(self._groups)
        more = "".join(f", {name}={value}" for name, value in options.items())
        return f"{type(self).__name__}(lr={self.lr}, {hyper}{more}, steps={self.steps})"

    # ---- what each optimizer defines

    def _check_hyper(self, **hyper: Any) -> dict[str, Any]:
        """The hyperparameters, checked, as a JSON-ready dict."""
        raise NotImplementedError

    def _array_names(self, hyper: Mapping[str, Any]) -> list[str]:
        """Names of the state arrays that these hyperparameters need; they start at zero."""
        raise NotImplementedError

    def _scalars(self, by: Setting) -> dict[str, float]:
        """Name -> number for the compiled update ``_kernel``, in the order in which the CPU code takes them."""
        return {}

    def _update(self, by: Setting, p: Array, g: Array, a: Array, b: Array, **arrays: Array) -> None:
        """Update the block ``p`` and its state arrays from the gradients ``g``; ``a`` and ``b`` are scratch.

        ``by.lr`` and the decay in ``by.hyper`` are negative where the optimizer maximizes.
        """
        raise NotImplementedError

    # ---- shared by the optimizers

    def _decayed(self, by: Setting, p: Array, g: Array, scratch: Array) -> Array:
        """Gradient with the L2 penalty, g + weight_decay * p."""
        if by.hyper["weight_decay"] == 0:
            return g
        self.model.xp.multiply(p, by.hyper["weight_decay"], out=scratch)
        scratch += g
        return scratch

    def _average(self, average: Array, value: Array, decay: float, scratch: Array) -> None:
        """average = decay * average + (1 - decay) * value; ``scratch`` may be ``value``."""
        average *= decay
        self.model.xp.multiply(value, 1 - decay, out=scratch)
        average += scratch

    def _average_square(self, average: Array, value: Array, decay: float, scratch: Array) -> None:
        """average = decay * average + (1 - decay) * value^2.

        The factor is applied before the square, so that the square overflows only where the result would.
        """
        average *= decay
        self.model.xp.multiply(value, 1 - decay, out=scratch)
        scratch *= value
        average += scratch

    def _buffers(self) -> tuple[Array, Array]:
        """The model's current flat buffers. They are new arrays after the module was put into a larger one."""
        params, grads = self.model.flat_params, self.model.flat_grads
        if self.model.parameter_count != self._count or params.size != self._size:
            raise ValueError(
                f"the model had {self._count} parameters when the optimizer was built and has "
                f"{self.model.parameter_count} now: build a new optimizer"
            )
        if self.model._structure() != self._structure:
            raise ValueError("a layer of the model was replaced after the optimizer was built: build a new optimizer")
        return params, grads

    def _named_arrays(self) -> dict[str, Array]:
        """State arrays as views by parameter: "<state>.<parameter>" -> array of the parameter's shape."""
        self._buffers()
        views = {state: self.model._views(array) for state, array in self._arrays.items()}
        return {f"{state}.{name}": views[state][name] for name in self.model.params for state in views}

    def _check_array(self, name: str, value: Array, target: Array) -> Array:
        """``value`` on the host in the target's dtype, checked."""
        value = host_array(value, name)
        if not is_float(value.dtype):
            raise DtypeError(f"{name}: expected floating-point numbers, got {value.dtype}")
        if value.shape != target.shape:
            raise ShapeError(f"{name}: expected shape {target.shape}, got {value.shape}")
        with np.errstate(over="ignore"):
            loaded = value.astype(target.dtype)
        legal = np.isfinite(loaded)
        if is_square(name):
            legal |= np.isposinf(value)
        if not legal.all():
            raise ValueError(f"{name}: holds values that are not finite in {target.dtype}")
        return loaded
