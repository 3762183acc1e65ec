"""Module: parameters and gradients as views of one flat buffer each, state dictionaries, train and eval.

A layer declares its parameters once; a module made of modules re-homes their parameters into one buffer of its own, so
that an optimiser step, a norm or an all-reduce is one operation over one array however deep the model is.
"""

import contextlib
import difflib
import fnmatch
import math
import os
import re
import threading
import weakref
from collections.abc import Mapping

import numpy as np

from . import rng
from .arrays import host_array, refuse_graph, refuse_masked
from .backend import get_backend
from .dtypes import check_dtype, compute_dtype, is_float
from .errors import DtypeError, NamesArguments, ShapeError, check_choice, check_flag, check_shape, check_size, checked

# Numbers: every parameter starts at a multiple of it in a flat buffer, so that kernels may load four at once.
ALIGNMENT = 16
PRECISIONS = ("float32", "tf32")

_changing_modes = threading.Lock()  # where blocks of ``evaluation`` begin and end
if hasattr(os, "register_at_fork"):  # the child of a fork has it free
    release = _changing_modes.release
    os.register_at_fork(before=_changing_modes.acquire, after_in_parent=release, after_in_child=release)


def _check_gpu_bfloat16(cupy, numpy):
    """Raise DtypeError unless these versions know bfloat16: CuPy has it from 14 on, and needs NumPy 2.1.2 for it."""
    for name, version, least in (("CuPy", cupy, (14,)), ("NumPy", numpy, (2, 1, 2))):
        if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < least:
            wanted = ".".join(map(str, least))
            raise DtypeError(f"dtype bfloat16 on a GPU needs {name} {wanted} or newer, here is {version}")


class Views(Mapping):
    """Name -> view of a flat buffer. Assigning copies into the view, so that names and buffer never part:
    ``layer.params["bias"] = 0`` and ``layer.grads["bias"] += d`` both write through. Assigning to ``params`` also
    counts as a change, see ``Module.changed``.
    """

    def __init__(self):
        self._arrays = {}
        self._owners = {}  # of parameters: name -> (its layer's counts, its layer's frozen names, its name there)

    def __getitem__(self, name):
        try:
            return self._arrays[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._arrays, 4)
            there = f"did you mean {', '.join(near)}" if near else f"there are {', '.join(self._arrays) or 'none'}"
            raise KeyError(f"no parameter is called {name!r}; {there}{'?' if near else ''}") from None

    def __contains__(self, name):
        return name in self._arrays

    def get(self, name, default=None):
        return self._arrays.get(name, default)

    def __setitem__(self, name, value):
        view = self[name]
        if value is not view:  # else the end of an in-place operation
            refuse_masked(name, value)
            refuse_graph(name, value)
            shape = np.shape(value)
            if shape and shape != view.shape:
                raise ShapeError(f"{name}: expected shape {view.shape}, got {shape}")
            view[...] = value
        if name in self._owners:
            counts, _, inner = self._owners[name]
            counts[inner] += 1

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)

    def __repr__(self):
        return repr({name: array.shape for name, array in self._arrays.items()})


def _room(shape):
    """Numbers that a parameter takes in a flat buffer, up to where the next one starts."""
    return -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT


def _places(name):
    """A dotted name and all that it lies in: "a.b.c" -> "a", "a.b", "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def check_unspent(spent):
    """Raise RuntimeError where ``spent``, a list into which a backward puts something when it runs, is not empty."""
    if spent:
        raise RuntimeError(
            "backward ran already: it works inside what forward kept. Call forward again; for several backwards of one "
            "forward call forward(..., retain=True)"
        )


def writable(array):
    """``array``, or a copy where others hold its memory: joblib and pickle may hand over what is read-only."""
    return array if type(array) is np.ndarray and array.flags.writeable else np.array(array)


class Module(NamesArguments):
    """Base of every layer and model.

    Attributes
    ----------
    params, grads : ``Views``, name -> array; views of ``flat_params`` and ``flat_grads``. In the flat buffers every
        parameter starts at a multiple of 16 numbers; what lies between them is zero and stays so.
    parameter_count : how many numbers the parameters hold, without what lies between them.
    buffers : mapping, name -> array; saved with the state, not trained (running statistics).
    children : mapping, name -> Module.
    training : bool, set by ``train()`` and ``eval()``.
    dtype : of inputs, outputs and activations; float16 and bfloat16 are computed in float32.
    wide : dtype of parameters, gradients and buffers: float32 with a 16-bit ``dtype``, whose products take a rounded
        copy of the weights; else ``dtype``.
    precision : "float32", or "tf32" where a GPU may round float32 to tf32 (10 bits of mantissa) before it multiplies,
        as its tensor cores then do; sums, states and everything else stay float32, and other backends are exact.
    name : dotted place in the model around it, empty for a module on its own.
    seed, key, calls : key of this module's random draws (see rng.py). ``key`` comes from ``name``; ``calls`` counts the
        calls in training mode that drew, with and without ``forward``, and belongs to ``random_state()``.

    Parameters stay as they are between a forward and its backward: ``backward`` raises RuntimeError, naming the
    parameter, where an optimizer, ``load_state_dict`` or an assignment ``params[name] = ...`` has changed one. A write
    through an array (``params[name][0] = 1``, ``flat_params *= 2``) cannot be seen: call ``changed`` behind it.
    Attributes other than sizes may be set at any time, and are checked as the constructor checks its arguments;
    ``backward`` uses those of its forward.

    ``copy.deepcopy`` and ``pickle`` make independent copies with equal bits: parameters, gradients, buffers, modes and
    the counters of random draws; a layer in two places, or a table with two uses, stays one. A pickle names its
    backend, and loading it where that cannot work raises BackendError. Like every pickle it may run any code when it is
    loaded: for files there is ``save_checkpoint``.

    A layer of one's own takes ``versions()`` in ``forward`` and gives it to ``check_versions`` in ``backward``.
    """

    stateful = False  # True where forward takes and returns a recurrent state
    once = False  # True where backward works inside what forward kept, and runs once unless forward has ``retain=True``

    def __init__(self, backend=None, dtype="float32", seed=None, precision="float32"):
        self.ops = get_backend(backend)
        self.xp = self.ops.xp
        self.dtype = check_dtype(dtype)
        self.precision = check_choice("precision", precision, PRECISIONS)
        if precision == "tf32":
            if self.dtype != np.float32:
                raise ValueError(f"precision: tf32 is a way to multiply float32, got dtype {self.dtype}")
            self.ops = self.ops.with_tf32()
        if self.dtype.name == "bfloat16" and self.xp is not np:
            _check_gpu_bfloat16(self.xp.__version__, np.__version__)
        self.compute_dtype = compute_dtype(self.dtype)
        self.seed = rng.check_seed(seed)
        self.name = ""
        self.key = 0
        self.calls = 0
        self.training = True
        self._evaluations = []  # of each block of ``evaluation`` that this is in: [the mode to come back to]
        self.buffers = {}
        self.children = {}
        self.params, self.grads = Views(), Views()
        # of each layer in here, in the order of modules(): parameter -> how often it was changed; those that are frozen
        self._counts, self._frozen = [{}], [set()]
        self._homes = {}  # children without the second names of those placed twice: whose parameters live here
        self._parent = None  # weak reference to the module that holds the parameters
        self._bind(self.xp.zeros(0, self.compute_dtype), self.xp.zeros(0, self.compute_dtype), [])

    @checked
    def training(self, value):
        return check_flag("training", value)

    # ---- declaring

    def _declare(self, arrays):
        """Make the mapping name -> initial value this module's own parameters, in one flat buffer."""
        layout = [(name, array.shape) for name, array in arrays.items()]
        size = sum(_room(shape) for _, shape in layout)
        counts = self._counts[0]
        for name in arrays:
            counts[name] = counts.get(name, 0) + 1
        self.params._owners = {name: (counts, self._frozen[0], name) for name in arrays}
        self._bind(self.xp.zeros(size, self.compute_dtype), self.xp.zeros(size, self.compute_dtype), layout)
        for name, array in arrays.items():
            self.params[name][...] = self.xp.asarray(array, dtype=self.compute_dtype)

    def _adopt(self, children):
        """Make the mapping name -> Module this module's children and re-home their parameters into one buffer.

        A child that appears under two names shares its parameters: it is stored once, under the first. Raises
        ValueError where names, backends or dtypes do not fit, and for a child that another living module holds: its
        parameters can lie in one buffer only.
        """
        for name, child in children.items():
            if not isinstance(name, str):
                raise TypeError(f"names of layers should be strings, got {type(name).__name__}")
            if not name or "." in name:
                raise ValueError(f"names of layers should be non-empty and without a dot, got {name!r}")
            if not isinstance(child, Module):
                raise TypeError(f"{name}: expected a gpurnn layer, got {type(child).__name__}")
            if (child.ops.name, child.dtype) != (self.ops.name, self.dtype) or child.xp is not self.xp:
                raise ValueError(
                    f"{name} is {child.ops.name}/{child.dtype}, the module around it {self.ops.name}/{self.dtype}: "
                    "build all layers with one backend and one dtype"
                )
            if child._parent is not None and child._parent() is not None:
                raise ValueError(
                    f"{name}: this {type(child).__name__} already belongs to another {type(child._parent()).__name__}, "
                    "which holds its parameters; use that one whole, or build a layer and copy the values"
                )
        self.children = dict(children)
        for name, child in self.children.items():
            if child in self._homes.values():
                continue
            self._homes[name] = child
            child._set_name(name)
        self._gather()

    def _gather(self):
        """Bring the parameters of all children into one buffer."""
        homes, layout = self._homes.values(), []
        self.params._owners = {}
        for name, child in self._homes.items():
            child._parent = weakref.ref(self)
            layout += [(f"{name}.{inner}", shape) for inner, shape in child._layout]
            self.params._owners |= {f"{name}.{inner}": where for inner, where in child.params._owners.items()}
        self._counts = [counts for child in homes for counts in child._counts]
        self._frozen = [frozen for child in homes for frozen in child._frozen]
        params = self.xp.concatenate([child.flat_params for child in homes])
        grads = self.xp.concatenate([child.flat_grads for child in homes])
        self._bind(params, grads, layout)

    def _bind(self, flat_params, flat_grads, layout):
        """Make ``params`` and ``grads`` views of the flat buffers; children follow into their slices."""
        self.flat_params, self.flat_grads = flat_params, flat_grads
        self._layout = layout
        self.parameter_count = sum(math.prod(shape) for _, shape in layout)
        self.params._arrays = self._views(flat_params)
        self.grads._arrays = self._views(flat_grads)
        start = 0
        for child in self._homes.values():
            stop = start + child.flat_params.size
            child._bind(flat_params[start:stop], flat_grads[start:stop], child._layout)
            start = stop

    def _views(self, buffer):
        """Name -> the part of a buffer laid out as ``flat_params`` that belongs to a parameter, in its shape."""
        views, start = {}, 0
        for name, shape in self._layout:
            views[name] = buffer[start : start + math.prod(shape)].reshape(shape)
            start += _room(shape)
        return views

    # ---- copying

    def __copy__(self):
        name = type(self).__name__
        raise TypeError(
            f"copy.copy: a shallow copy of this {name} would share its parameters, its layers and their modes with it: "
            "use copy.deepcopy, which makes an independent one"
        )

    def __getstate__(self):
        """All of the module as copies and pickles hold it: arrays on the host, each layer with its own parameters,
        the backend by name."""
        state = self.__dict__.copy()
        for name in ("xp", "params", "grads", "flat_params", "flat_grads", "_parent", "_evaluations"):
            del state[name]
        if not self.children:
            state["flat"] = [self.ops.to_numpy(flat) for flat in (self.flat_params, self.flat_grads)]
        state["buffers"] = {name: self.ops.to_numpy(array) for name, array in self.buffers.items()}
        return state

    def __setstate__(self, state):
        flat = state.pop("flat", None)
        self.__dict__.update(state)
        self.xp = self.ops.xp
        self.params, self.grads, self._parent, self._evaluations = Views(), Views(), None, []
        self.buffers = {name: self.xp.asarray(writable(array)) for name, array in self.buffers.items()}
        if flat is not None:
            self.params._owners = {name: (self._counts[0], self._frozen[0], name) for name, _ in self._layout}
            self._bind(*(self.xp.asarray(writable(array)) for array in flat), self._layout)
        self._settle()

    def _settle(self):
        """The end of ``__setstate__``. A layer that refers to the model around it may get its state after that one: the
        model then waits for it."""
        late = next((child for child in self._homes.values() if not hasattr(child, "flat_params")), None)
        if late is not None:
            late.__dict__.setdefault("_waiting", []).append(self)
            return
        if self.children:
            self._gather()
        for module in self.__dict__.pop("_waiting", ()):
            module._settle()

    def _set_name(self, path):
        """Name this module, and its children, by its place in the model around it; the name keys its random draws."""
        self.name, self.key = path, rng.name_key(path)
        for name, child in self._homes.items():
            child._set_name(f"{path}.{name}")

    # ---- freezing

    def freeze(self, *names):
        """Leave these parameters as they are from now on, or all of them: ``backward`` makes no gradients for them, no
        optimizer moves them, clipping does not count them. Returns the module.

        names: of parameters as in ``params``, or of layers for all that is theirs, with ``*`` and ``?`` as in file
        names. The gradients that they have become zero. Values are saved and loaded as ever; what is frozen is not
        saved with them, but is in ``copy.deepcopy`` and ``pickle``. Running statistics are no parameters: ``eval()``
        keeps those.
        Raises KeyError for a name that there is not; nothing changes then.

        >>> model = gpurnn.Sequential({"encoder": gpurnn.LSTM(2, 3), "head": gpurnn.Linear(3, 1)})
        >>> model.freeze("encoder.*").frozen
        ['encoder.weight_ih_l0', 'encoder.weight_hh_l0', 'encoder.bias_ih_l0', 'encoder.bias_hh_l0']
        """
        for name in self._called("freeze", names):
            _, frozen, inner = self.params._owners[name]
            frozen.add(inner)
            self.grads[name][...] = 0
        return self

    def unfreeze(self, *names):
        """Undo ``freeze`` for these parameters, or for all. Returns the module. Raises as ``freeze``."""
        for name in self._called("unfreeze", names):
            _, frozen, inner = self.params._owners[name]
            frozen.discard(inner)
        return self

    @property
    def frozen(self):
        """Names of the parameters that are frozen, as in ``params``."""
        if not any(self._frozen):
            return []
        return [name for name, (_, frozen, inner) in self.params._owners.items() if inner in frozen]

    def _called(self, what, patterns):
        """The names of parameters that the patterns mean; ``what`` asks for them."""
        if not patterns:
            return list(self.params)
        found = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{what}: names should be strings, got {type(pattern).__name__}")
            some = {name for name in self.params if any(fnmatch.fnmatchcase(part, pattern) for part in _places(name))}
            layers = (name for name, _ in self.modules() if name)
            if not some and not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
                there = ", ".join(self.params) or "none"
                raise KeyError(f"{what}: no parameter or layer is called {pattern!r}, there are {there}")
            found |= some
        return [name for name in self.params if name in found]

    def _trains(self, name):
        """Whether a parameter of this layer itself is not frozen."""
        return name not in self._frozen[0]

    def _trained_parts(self):
        """The slices of the flat buffers that are not frozen, as few as there can be."""
        if not any(self._frozen):
            return [slice(0, self.flat_params.size)]
        parts, start, frozen = [], 0, set(self.frozen)
        for name, shape in self._layout:
            stop = start + _room(shape)
            if name not in frozen and stop > start:
                if parts and parts[-1].stop == start:
                    parts[-1] = slice(parts[-1].start, stop)
                else:
                    parts.append(slice(start, stop))
            start = stop
        return parts

    # ---- using

    def modules(self, prefix=""):
        """Every module of this one once, itself first, as (dotted name, module)."""
        yield prefix, self
        for name, child in self._homes.items():
            yield from child.modules(f"{prefix}.{name}" if prefix else name)

    def train(self, mode=True):
        """Training mode for this module and all inside it (dropout draws, batch statistics); returns the module."""
        mode = check_flag("mode", mode)
        for _, module in self.modules():
            module.training = mode
        return self

    def eval(self):
        """Evaluation mode: no dropout, running statistics. Returns the module."""
        return self.train(False)

    @contextlib.contextmanager
    def evaluation(self):
        """Inside the ``with`` block this module and all in it are in evaluation mode; behind it each is in its own mode
        again, whatever happened. Yields the module. Blocks of several threads may overlap in any order: the module
        comes back to its mode when it has left the last.

        >>> model = gpurnn.Dropout(0.5)
        >>> with model.evaluation():
        ...     model(np.ones(3, "float32")).tolist()
        [1.0, 1.0, 1.0]
        """
        blocks = [(module, [None]) for _, module in self.modules()]
        with _changing_modes:
            for module, block in blocks:
                block[0] = module.training
                module._evaluations.append(block)
                module.training = False
        try:
            yield self
        finally:
            with _changing_modes:
                for module, block in blocks:
                    module._leave(block)

    def _leave(self, block):
        """Take a block of ``evaluation`` out of those that this is in: the one that began next, which found it in
        evaluation mode, comes back to this one's mode; where there is none, the module does."""
        inside = self._evaluations
        place = next(n for n, other in enumerate(inside) if other is block)
        if inside[place] is inside[-1]:
            self.training = block[0]
        else:
            inside[place + 1][0] = block[0]
        del inside[place]

    def changed(self, *names):
        """Count a change of these parameters, or of all, that was made through their arrays; see ``check_versions``.

        >>> layer = gpurnn.Linear(2, 3)
        >>> layer.params["weight"][0] = 0          # through an array: nobody sees it
        >>> layer.changed("weight")
        """
        for name in names or self.params:
            counts, _, inner = self.params._owners[name]
            counts[inner] += 1

    def versions(self):
        """How often each parameter was changed so far, as ``check_versions`` wants to know it."""
        return [dict(counts) for counts in self._counts]

    def check_versions(self, before, now="backward", then="forward"):
        """Raise RuntimeError, naming a parameter, unless all are as they were when ``before = versions()`` was taken.

        now, then: what the message calls these two moments.
        """
        if before == self._counts:
            return
        layers = [module for _, module in self.modules() if not module.children]
        for layer, old, new in zip(layers, before, self._counts, strict=True):
            for name, version in new.items():
                if old.get(name) != version:
                    place = f"{layer.name}.{name}" if layer.name else name
                    raise RuntimeError(
                        f"{now}: parameter {place} was changed (version {old.get(name)} at {then}, {version} now), and "
                        f"the result would be that of neither. Call {then} again, or change parameters after {now}"
                    )

    def _guarded(self, backward, name, outputs, retain):
        """``backward``, for a module that calls several layers: it refuses a derivative of the wrong shape, changed
        parameters and a second call before any layer adds to its gradients. Errors call the derivative ``name``."""
        shape, versions, spent = outputs.shape, self.versions(), []

        def guarded(doutputs):
            doutputs = self.ops.asfloat(doutputs, self.dtype, name)
            check_shape(name, doutputs, shape)
            self.check_versions(versions)
            check_unspent(spent)
            if not retain:
                spent.append(True)
            return backward(doutputs)

        return guarded

    def _as_now(self):
        """A stand-in with the attributes of this moment, for a backward that comes later. Parameters, gradients and
        children are shared."""
        now = object.__new__(type(self))
        now.__dict__.update(self.__dict__)
        return now

    def zero_grad(self):
        """Set every gradient to zero, in place."""
        self.flat_grads.fill(0)

    def state_dict(self):
        """Copies of all parameters and buffers as NumPy arrays, dotted name -> array."""
        state = {name: self.ops.to_numpy(array).copy() for name, array in self.params.items()}
        for prefix, module in self.modules():
            for name, array in module.buffers.items():
                state[f"{prefix}.{name}" if prefix else name] = self.ops.to_numpy(array).copy()
        return state

    def load_state_dict(self, mapping, strict=True):
        """Copy values into parameters and buffers.

        mapping: name -> array; NumPy, CuPy or torch tensors of any float type, which may require grad (their values
        are copied), names as in ``state_dict()`` (PyTorch's
        names for the recurrent and linear layers, so a ``torch.nn.LSTM``'s ``state_dict()`` loads unchanged).
        strict: raise KeyError for missing and for unknown names; otherwise load what fits by name.
        Raises ShapeError for a wrong shape, ValueError for a value that is not finite. Nothing changes on an error.
        A file is read by ``gpurnn.load_weights``.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"mapping: expected name -> array, got {type(mapping).__name__}; a file is what "
                "gpurnn.load_weights(model, path) reads"
            )
        check_flag("strict", strict)
        targets = dict(self.params)
        for prefix, module in self.modules():
            for name, array in module.buffers.items():
                targets[f"{prefix}.{name}" if prefix else name] = array
        missing = [name for name in targets if name not in mapping]
        unknown = [name for name in mapping if name not in targets]
        if strict and (missing or unknown):
            hint = ""
            if any(name.startswith("model/") for name in unknown):
                hint = "; these are the arrays of a checkpoint of fit: load_weights(model, path) reads that"
            raise KeyError(f"state_dict does not fit: missing {missing}, unknown {unknown}{hint}")
        loaded = {}
        for name, target in targets.items():
            if name not in mapping:
                continue
            value = mapping[name]
            if hasattr(value, "detach"):  # a torch tensor; NumPy has no bfloat16
                value = value.detach().cpu()
                value = (value.double() if value.is_floating_point() else value).numpy()
            value = host_array(value, name)
            if not (value.dtype.kind in "iu" or is_float(value.dtype)):
                raise DtypeError(f"{name}: expected numbers, got {value.dtype}")
            if value.shape != target.shape:
                raise ShapeError(f"{name}: expected shape {target.shape}, got {value.shape}")
            with np.errstate(over="ignore", invalid="ignore"):
                loaded[name] = value.astype(target.dtype)
            if not (np.isfinite(value).all() and np.isfinite(loaded[name]).all()):  # 1e300 is not, in float32
                raise ValueError(f"{name}: holds values that are not finite in {target.dtype}")
        for name, value in loaded.items():
            targets[name][...] = self.xp.asarray(value)
        written = [name for name in loaded if name in self.params]
        if written:
            self.changed(*written)

    def random_state(self):
        """The counters of this model's random draws: dotted name -> [seed, key, calls]; JSON-ready."""
        return {name: [module.seed, module.key, module.calls] for name, module in self.modules()}

    def load_random_state(self, state):
        """Continue the random draws from ``random_state()``. Raises KeyError where the modules' names differ."""
        modules = dict(self.modules())
        if set(state) != set(modules):
            raise KeyError(f"random state is of another model: expected {sorted(modules)}, got {sorted(state)}")
        loaded = [
            (modules[name], rng.check_seed(seed), check_size("key", key, 0), check_size("calls", calls, 0))
            for name, (seed, key, calls) in state.items()
        ]
        for module, seed, key, calls in loaded:
            module.seed, module.key, module.calls = seed, key, calls

    def _sizes_text(self):
        """A layer's sizes and options, for ``repr``; where it is empty, ``repr`` shows the number of parameters."""
        return ""

    def __repr__(self):
        count, sizes = sum(self.params[name].size for name in self.frozen), self._sizes_text()
        if sizes:
            frozen = f", {count} of {self.parameter_count} parameters frozen" if count else ""
            return f"{type(self).__name__}({sizes}{frozen})"
        frozen = f", {count} of them frozen" if count else ""
        return f"{type(self).__name__}({self.parameter_count} parameters{frozen}, {self.ops.name}, {self.dtype})"
