"""How layers become parts of a model: set as attributes, or given by name."""

from __future__ import annotations

from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Generator, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from types import MappingProxyType
from typing import Any

import numpy as np

from .._typing import Array
from ..arrays import host_array
from ..dtypes import compute_dtype, is_float
from ..errors import DtypeError
from .parameters import FlatParameters
from .views import Views

_HELD = {"params": "parameters", "grads": "gradients"}
_HINTS = {  # what other libraries call it -> what is there instead
    "backward": "forward(x) returns the backward function, behind the output",
    "add": "give all layers to gpurnn.Sequential(...) at once",
    "compile": "nothing has to be compiled; loss and optimizer are given to gpurnn.fit",
    "count_params": "the number of parameters is parameter_count",
    "cpu": "a backend is chosen at construction: backend='cpu'",
    "cuda": "a backend is chosen at construction: backend='cuda'",
    "double": "a dtype is chosen at construction: dtype='float64'",
    "evaluate": "gpurnn.evaluate(model, loss, batches) does that",
    "fit": "gpurnn.fit(model, loss, batches, optimizer='adam', epochs=10) trains a model",
    "flatten_parameters": "the parameters lie in one buffer, always",
    "float": "a dtype is chosen at construction: dtype='float32'",
    "get_weights": "state_dict() returns the weights, load_state_dict(...) sets them",
    "half": "a dtype is chosen at construction: dtype='float16'",
    "layers": "the layers are in children, name -> layer; those of a Sequential are model[0], model[1], ...",
    "load": "gpurnn.load(path) makes a model, gpurnn.load_weights(model, path) loads into one",
    "load_weights": "gpurnn.load_weights(model, path) does that",
    "named_parameters": "the parameters are in params, name -> array",
    "parameters": "the parameters are in params, name -> array",
    "predict": "call the model: model(x), after model.eval()",
    "requires_grad_": "freeze() and unfreeze() do that",
    "save": "gpurnn.save(model, path) saves a model, gpurnn.save_weights(model, path) its weights",
    "save_weights": "gpurnn.save_weights(model, path) does that",
    "set_weights": "load_state_dict(...) sets the weights",
    "to": "backend and dtype are chosen at construction: backend='cuda', dtype='float16'",
    "weights": "the parameters are in params, name -> array",
}


class Registration(FlatParameters):
    """The part of ``Module`` that registers layers and parameters of its own."""

    _hints: dict[str, str] = _HINTS
    references: tuple[str, ...] = ()  # names of attributes whose layers are parts of another module, not of this one
    ops: Any
    xp: Any
    dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    flat_params: Array
    flat_grads: Array

    # ---- parameters

    def parameter(self, name: str, value: Array) -> None:
        """Make a parameter of this module's own, with a gradient: ``params[name]`` and ``grads[name]``.

        Read it as ``self.params[name]``, change it by ``self.params[name] = ...``, and add to ``self.grads[name]`` in
        the backward pass, unless ``name`` is among ``self.frozen``. A gradient starts at zero.

        Parameters
        ----------
        name : str
            Without a dot, and not that of a layer or of another parameter.
        value : Array
            Its start and its shape; numbers of any type. It is copied to the backend in the module's compute dtype.

        Raises
        ------
        ValueError
            For a name that is taken or not allowed.
        DtypeError, TypeError
            For a value that holds no numbers; for a name that is no string.

        Examples
        --------
        >>> model = gpurnn.Module()
        >>> model.parameter("gain", np.ones(3))
        >>> model.params
        {'gain': (3,)}
        """
        _check_name("parameters", name)
        self._need_init(name)
        if name in self.params or name in self.children:
            kind = "parameter" if name in self.params else "layer"
            raise ValueError(f"{name}: this {type(self).__name__} has a {kind} of that name. Take another one")
        value = host_array(value, name)
        if not (value.dtype.kind in "iu" or is_float(value.dtype)):
            raise DtypeError(f"{name}: expected numbers, got {value.dtype}")
        self._open = (False, False)
        self._counts[0][""] = self._counts[0].get("", 0) + 1
        self._extend(name, self.xp.asarray(value, dtype=self.compute_dtype))

    # ---- layers

    def add_layers(self, layers: Mapping[str, Any]) -> None:
        """Register layers by name, as ``self.name = layer`` does for each.

        A layer that appears under two names shares its parameters: they are stored once, under the first name. A name
        that is in use gets the new layer; the old one is on its own again, with its values.

        Parameters
        ----------
        layers : mapping
            Name -> Module, or a list, tuple or dict of them.

        Raises
        ------
        ValueError
            Names, backends or dtypes do not fit; a layer belongs to another model; it holds this module itself.
        TypeError
            A name is no string, or a value no layer. Nothing changes on an error.

        Examples
        --------
        >>> model = gpurnn.Module()
        >>> model.add_layers({"first": gpurnn.Linear(2, 3), "second": gpurnn.Linear(3, 1)})
        >>> list(model.params)
        ['first.weight', 'first.bias', 'second.weight', 'second.bias']
        """
        named = {name: self._grouped(name, layer) for name, layer in layers.items()}
        ops, dtype, undecided = self._decided(named.values())
        for name, layer in named.items():
            self._check_child(name, layer, ops, dtype)
        self._check_layers({**self.children, **named})
        for module in (self, *named.values()):
            if any(module._open):
                module._use(ops, dtype, undecided)
        self._set_children({**self.children, **named})

    _adopt = add_layers

    def _grouped(self, name: str, value: Any) -> Any:
        """``value``, or where it is a list, tuple or dict of layers, the ``Layers`` of these."""
        if not isinstance(value, _GROUPS):
            return value
        for part in _parts(value):
            _refuse_holder(name, part)
            if not isinstance(part, (FlatParameters, *_GROUPS)):
                raise TypeError(
                    f"{name}: expected layers alone in a {type(value).__name__}, got {no_layer(part)}. Set what "
                    "is no layer as another attribute"
                )
        return self._group(value)

    def _check_layers(self, children: Mapping[str, FlatParameters]) -> None:
        """Raise where these children, which may take the place of today's, do not fit one another."""

    def _layers_changed(self) -> None:
        """Take note of the children of now."""

    def _decided(self, layers: Iterable[Any]) -> tuple[Any, Any, tuple[bool, bool]]:
        """Backend and dtype of this module once these layers are in it, and which of the two nobody has decided."""
        open_ops, open_dtype = self._open
        ops, dtype = self.ops, self.dtype
        for layer in layers:
            if isinstance(layer, FlatParameters):
                if open_ops and not layer._open[0]:
                    ops, open_ops = layer.ops, False
                if open_dtype and not layer._open[1]:
                    dtype, open_dtype = layer.dtype, False
        return ops, dtype, (open_ops, open_dtype)

    def _use(self, ops: Any, dtype: Any, undecided: tuple[bool, bool]) -> None:
        """Compute with this backend and dtype; nothing in this module has decided on them, so it has no parameters."""
        self._open = undecided
        if (ops, dtype) != (self.ops, self.dtype):
            self.ops, self.xp, self.dtype, self.compute_dtype = ops, ops.xp, dtype, compute_dtype(dtype)
            self.flat_params, self.flat_grads = (self.xp.zeros(0, self.compute_dtype) for _ in range(2))
        for child in self._homes.values():
            child._use(ops, dtype, undecided)

    def _check_child(self, name: str, child: Any, ops: Any, dtype: Any) -> None:
        """Raise unless ``child`` may become a part of this module, which computes with ``ops`` and ``dtype``."""
        _check_name("layers", name)
        if not isinstance(child, FlatParameters):
            raise TypeError(f"{name}: expected a gpurnn layer, got {no_layer(child)}")
        if name in (own for own, _ in self._own):
            raise ValueError(f"{name}: this {type(self).__name__} has a parameter of that name. Take another one")
        same_ops = child._open[0] or (child.ops.name == ops.name and child.xp is ops.xp)
        if not same_ops or not (child._open[1] or child.dtype == dtype):
            raise ValueError(
                f"{name} is {child.ops.name}/{child.dtype}, the module around it {ops.name}/{dtype}: "
                "build all layers with one backend and one dtype"
            )
        around = child._parent and child._parent()
        if around is not None and around is not self:
            raise ValueError(
                f"{name}: this {type(child).__name__} already belongs to another {type(around).__name__}, "
                "which holds its parameters; use that one whole, or build a layer and copy the values"
            )
        if any(module is self for _, module in child.modules()):
            raise ValueError(f"{name}: this {type(child).__name__} holds the module itself that it is to be a part of")

    def _set_children(self, children: Mapping[str, FlatParameters]) -> None:
        """Make these the children, all of them checked, and move their parameters into one buffer."""
        homes: dict[str, FlatParameters] = {}
        for name, child in children.items():
            if child not in homes.values():
                homes[name] = child
        gone = [child for child in self._homes.values() if child not in homes.values()]
        # past __setattr__, which would take these for groups of layers
        self.__dict__["children"], self.__dict__["_homes"] = dict(children), homes
        for child in gone:
            child._part()
        for name, child in homes.items():
            child._set_name(f"{self.name}.{name}" if self.name else name)
        self._counts[0][""] = self._counts[0].get("", 0) + 1
        self._join()
        self._layers_changed()

    # ---- attributes

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.references and self._is_part(value):
            self._need_init(name)
            if name in self._reserved or hasattr(type(self), name):
                raise AttributeError(
                    f"{name}: every {type(self).__name__} has an attribute of that name, so no layer can take it. "
                    f"Take another name, such as {name}_layer"
                )
            self.add_layers({name: value})
            self.__dict__.pop(name, None)  # a plain attribute, such as None, that stood there
            return
        if name not in self.references:
            _refuse_holder(name, value)
        if name in self.__dict__.get("children", ()):
            self.__delattr__(name)
        if name in ("params", "grads") and not isinstance(value, Views):
            raise AttributeError(
                f"{name}: every {type(self).__name__} has its {_HELD[name]} there. Make a parameter by "
                "self.parameter(name, value), change one by self.params[name] = value, or take another attribute"
            )
        super().__setattr__(name, value)

    def _is_part(self, value: Any) -> bool:
        """Whether an attribute of this value is a part of the module. A reference to the module around it is none."""
        if isinstance(value, FlatParameters):
            return not any(module is self for _, module in value.modules())
        return isinstance(value, _GROUPS) and _holds_layers(value)

    def __getattr__(self, name: str) -> Any:
        """The layer of this name; it is called where there is no other attribute."""
        try:
            return self.__dict__["children"][name]
        except KeyError:
            hint = self._hints.get(name, "")
            if name in self.__dict__.get("params", ()):
                hint = f"the parameter is params[{name!r}]"
            hint = f"; {hint}" if hint else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}") from None

    def __delattr__(self, name: str) -> None:
        children = self.__dict__.get("children", {})
        if name not in children:
            super().__delattr__(name)
            return
        rest = {other: child for other, child in children.items() if other != name}
        self._check_layers(rest)
        self._set_children(rest)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.children]

    def _need_init(self, name: str) -> None:
        if "children" not in self.__dict__:
            raise AttributeError(f"{name}: call super().__init__() first, in {type(self).__name__}.__init__")

    def _refuse_hidden_layers(self) -> None:
        """Raise ValueError for layers that came into a list or dict after it was set as an attribute."""
        for _, module in self.modules():
            for name, value in vars(module).items():
                if name in self._reserved or name in module.references or not _holds_layers(value):
                    continue
                kind = type(value).__name__
                raise ValueError(
                    f"{name}: this {kind} was filled after it had been set, so its layers are not part of the "
                    f"{type(module).__name__}. Fill it first, then set self.{name}"
                )


def no_layer(value: Any) -> str:
    """What ``value`` is, for a message that expected a layer."""
    if isinstance(value, type):
        return f"the class {value.__name__}: call it, {value.__name__}(...)"
    if callable(value):
        return (
            f"{type(value).__name__}. No layer applies a function: write a Module that does; docs/models.md shows how"
        )
    return type(value).__name__


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"names of {what} should be strings, got {type(name).__name__}")
    if not name or "." in name:
        raise ValueError(f"names of {what} should be non-empty and without a dot, got {name!r}")


# ---- lists and dicts of layers, and what else may hold some

_GROUPS = (list, tuple, dict)
_MAPPINGS = (dict, MappingProxyType, UserDict, ChainMap)
_HOLDERS = (*_GROUPS, *_MAPPINGS, set, frozenset, deque, UserList, KeysView, ValuesView, ItemsView)


def _parts(holder: Any) -> Iterator[Any]:
    """What a list, dict or another holder has in it: nothing where it is none."""
    if isinstance(holder, np.ndarray):
        return iter(holder.flat if holder.dtype == object else ())
    if isinstance(holder, _MAPPINGS):
        return iter(holder.values())
    return iter(holder if isinstance(holder, _HOLDERS) else ())


def _holds_layers(holder: Any) -> bool:
    """Whether there is a layer in a list, tuple, dict, set and so on, at any depth."""
    return any(isinstance(part, FlatParameters) or _holds_layers(part) for part in _parts(holder))


def _refuse_holder(name: str, value: Any) -> None:
    """Raise TypeError for a value that holds layers, or may, and has no names or no order for them."""
    kind = type(value).__name__
    if isinstance(value, (Generator, map, filter, zip)):
        problem = f"a {kind} is read once, so layers in it cannot be found"
    elif not isinstance(value, _GROUPS) and _holds_layers(value):
        problem = f"layers in a {kind} cannot become part of the model"
    else:
        return
    raise TypeError(f"{name}: {problem}. Make it a list, tuple or dict, or name it in the class's references")
