"""``import_onnx``: a model in an ONNX file as a function of arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..._typing import Array, Backend, Lengths, State
from ...backends import get_backend
from ...dtypes import is_float
from ...errors import DtypeError, FileError, ShapeError
from .library import onnx_library
from .program import Context, Program, unknown_operators
from .reading import opset_of, read_model
from .roles import Roles, roles_by_use, roles_of_document

DOCUMENT = "gpurnn"  # the key of the metadata under which gpurnn describes a file that it wrote


class Twin:
    """What an ONNX file computes; ``import_onnx`` makes it.

    Attributes
    ----------
    inputs, outputs : dict of str to tuple
        By name the dtype and the shape, with a name or None for a size that is not fixed.
    metadata : dict of str to str
        What the file says about itself.
    """

    inputs: dict[str, tuple[str, tuple[int | str | None, ...]]]
    outputs: dict[str, tuple[str, tuple[int | str | None, ...]]]
    metadata: dict[str, str]

    def __init__(self, model: Any, place: str, ops: Any) -> None:
        self._place, self.ops = place, ops
        unknown = unknown_operators(model.graph)
        if unknown:
            shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            raise FileError(f"{place}: it has operators that gpurnn does not know: {shown}")
        self._program = Program(model.graph, Context(ops, place, opset_of(model, place)))
        given = [one for one in model.graph.input if one.name not in self._program.initial]
        self.inputs = {one.name: _described(one, place) for one in given}
        self.outputs = {one.name: _described(one, place) for one in model.graph.output}
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self._roles = self._find_roles(model)

    def _find_roles(self, model) -> Roles:
        document = self.metadata.get(DOCUMENT)
        if document is not None:
            try:
                return roles_of_document(json.loads(document), self.inputs, self.outputs, self._program.initial)
            except (ValueError, TypeError, LookupError, RecursionError):
                pass  # of another kind: the file may still be a model like those of others
        return roles_by_use(model.graph, self.inputs, self.outputs)

    def __call__(self, x: Array, state: State = None, lengths: Lengths = None) -> tuple[Any, State]:
        """The output and the final state.

        Parameters
        ----------
        x : Array
            The first input of the graph that is neither a state nor lengths; a tuple where there are more.
        state : State
            What a call before returned; None for the initial state: zeros, or what the model has learned.
        lengths : Lengths
            (B,) integers; None where all timesteps count.

        Returns
        -------
        output : Array
            The first output that is no state; a tuple where there are more.
        state : State
            Of a gpurnn model as that model returns it. Of others the final states of the graph, a tuple of several;
            None where it has none.

        Raises
        ------
        ShapeError, DtypeError, ValueError
            An array does not fit the graph; the message names it.
        """
        roles = self._roles
        several = len(roles.x) != 1
        if several and not isinstance(x, (tuple, list)):
            raise ShapeError(f"x: expected a tuple of {', '.join(roles.x) or 'nothing'}, got {type(x).__name__}")
        given = dict(zip(roles.x, x if several else (x,), strict=True))
        sizes = self._sizes({name: self._asked(name, array) for name, array in given.items()})
        given |= roles.lengths_given(lengths, sizes)
        given |= roles.states_given(state, sizes, self.inputs, self._program.initial)
        found = self.run(given)
        outputs = [found[name] for name in self.outputs if name not in roles.final_names]
        final = roles.final_state(found)
        return (outputs[0] if len(outputs) == 1 else tuple(outputs)), final

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs by name.

        Parameters
        ----------
        inputs : dict of str to Array
            All inputs by name; None for an input that only optional inputs of recurrent nodes read.
        outputs : sequence of str, optional
            Which ones; all without it.

        Raises
        ------
        ShapeError, DtypeError, ValueError
            As a call.
        """
        missing, unknown = set(self.inputs) - set(inputs), set(inputs) - set(self.inputs)
        if missing or unknown:
            wrong = f"{min(missing)!r} is missing" if missing else f"{min(unknown)!r} is none of them"
            raise ValueError(f"inputs: expected {', '.join(self.inputs)}; {wrong}")
        wrong = [name for name in outputs or () if name not in self.outputs]
        if wrong:
            raise ValueError(f"outputs: expected some of {', '.join(self.outputs)}, got {wrong[0]!r}")
        given = {name: None if one is None else self._asked(name, one) for name, one in inputs.items()}
        self._sizes(given)
        with np.errstate(all="ignore"):  # a division by zero gives what IEEE 754 says
            return self._program.run(given, outputs)

    def _asked(self, name, array):
        """An input in the dtype that the graph asks for. Raises DtypeError for one of another kind."""
        array, dtype = self.ops.asarray(array, name), np.dtype(_dtype(self.inputs[name][0]))
        if array.dtype == dtype:
            return array
        if is_float(array.dtype) != is_float(dtype) or (dtype.kind == "b") != (array.dtype.kind == "b"):
            raise DtypeError(f"{name}: expected {dtype}, got {array.dtype}")
        return array.astype(dtype)

    def _sizes(self, given):
        """Named size -> number, from the shapes of arrays. Raises ShapeError where they do not fit the graph's."""
        sizes: dict[str, int] = {}
        for name, array in given.items():
            shape = self.inputs[name][1]
            if array is None or shape is None:
                continue
            for size, expected in zip(array.shape, shape, strict=False):
                known = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
                if len(shape) != array.ndim or (known is not None and known != size):
                    raise ShapeError(f"{name}: expected shape {_shown(shape, sizes)}, got {array.shape}")
            if len(shape) != array.ndim:
                raise ShapeError(f"{name}: expected shape {_shown(shape, sizes)}, got {array.shape}")
        return sizes

    def __repr__(self) -> str:
        return f"Twin({self._place}: {', '.join(self.inputs)} -> {', '.join(self.outputs)})"


def _shown(shape, sizes):
    words = [str(sizes.get(one, one) if isinstance(one, str) else "?" if one is None else one) for one in shape]
    return f"({', '.join(words)}{',' * (len(words) == 1)})"


def _dtype(name):
    if name != "bfloat16":
        return name
    from ml_dtypes import bfloat16

    return bfloat16


def _described(value, place):
    """(dtype, shape) of an input or output of a graph; the shape is None where the file does not say it."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        raise FileError(f"{place}: {value.name[:80]!r} is no tensor")
    try:
        dtype = np.dtype(onnx_library().helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{place}: {value.name[:80]!r} is of an unknown type, {tensor.elem_type}") from error
    if not tensor.HasField("shape"):
        return dtype, None
    shape = (one.dim_value if one.HasField("dim_value") else one.dim_param or None for one in tensor.shape.dim)
    return dtype, tuple(shape)


def import_onnx(path: str | os.PathLike[str] | Any, *, backend: str | Backend | None = "auto") -> Twin:
    """Read a model from an ONNX file.

    Its RNN, GRU and LSTM nodes run as gpurnn layers, with all their attributes; the nodes around them as array code.
    Nothing is executed until the twin is called, and data outside of the file's folder are never read.

    Parameters
    ----------
    path : path, or onnx.ModelProto
        Opsets from 7 on.
    backend : str or Backend, optional
        Where it runs; see ``get_backend``.

    Returns
    -------
    Twin
        ``output, state = twin(x, state=None, lengths=None)``, or ``twin.run({name: array})`` by the names of inputs.

    Raises
    ------
    ImportError
        Without the package onnx.
    FileError
        The file is damaged, too large, or has operators that are not known; the message names them.
    OSError
        It cannot be read.

    Examples
    --------
    >>> from gpurnn.interop.onnx import export_onnx, import_onnx
    >>> model = gpurnn.GRU(4, 8, backend="numpy")
    >>> export_onnx(model, "model.onnx")
    >>> twin = import_onnx("model.onnx", backend="numpy")
    >>> output, h = twin(np.zeros((5, 3, 4), "float32"), lengths=[5, 2, 0])
    >>> output.shape, h.shape
    ((5, 3, 8), (1, 3, 8))
    """
    ops = get_backend(backend)
    model, place = read_model(path)
    return Twin(model, place, ops)
