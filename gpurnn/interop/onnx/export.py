"""``export_onnx``: a model as an ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...dtypes import check_dtype, compute_dtype
from ...errors import check_flag, show_size
from ...files import write_bytes_atomic
from ...module import Module, float_model
from .building import Builder
from .library import IR_VERSION, OPSET, onnx_library
from .models import write_model
from .twin import DOCUMENT

_MOST = 2_000_000_000  # bytes of weights: a message of protobuf has at most 2^31 - 1


def export_onnx(
    model: Module,
    path: str | os.PathLike[str],
    *,
    lengths: bool = True,
    states: bool = True,
    weights: str | None = None,
    part: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model, as it is in evaluation, to an ONNX file.

    T and B stay free. RNN, GRU and LSTM become nodes of ONNX where it has their equations (both forms of the GRU,
    peepholes, coupled gates, most activations; heads as dense weights), all other cells a Scan of plain operators.
    Arithmetic is in float32, or float64 for a model of that dtype. The opset is 17.

    Parameters
    ----------
    model : Module
        A layer, a Sequential, an Attention, an EncoderDecoder, or the model of a task.
    path : path
        The file to write.
    lengths : bool
        Whether "lengths", (B,) of int32, is an input. Of an EncoderDecoder they are those of the source.
    states : bool
        Whether the states of recurrent layers are inputs and outputs, for streaming; else they begin as the model
        does: with zeros, or with what it has learned.
    weights : {"float16", "bfloat16"}, optional
        The dtype of the weights in the file, which are cast to that of the arithmetic. By default the model's own.
    part : {"encoder", "decoder"}, optional
        Of an EncoderDecoder: what reads the source, or what reads words of the target, memory and state and gives
        logits, weights and the state after them; for translation, word by word. By default the whole model, which
        reads a whole target.
    metadata : dict of str to str, optional
        What the file should say besides, such as a vocabulary.

    Raises
    ------
    ImportError
        Without the package onnx.
    ValueError
        A layer has no form in ONNX; the message names it.
    TypeError
        The model is no Module.

    Examples
    --------
    >>> from gpurnn.interop.onnx import export_onnx, import_onnx
    >>> model = gpurnn.Sequential(gpurnn.Embedding(65, 8), gpurnn.LSTM(8, 16), gpurnn.Linear(16, 65))
    >>> export_onnx(model, "model.onnx", weights="float16")
    >>> twin = import_onnx("model.onnx")
    >>> logits, state = twin(np.zeros((7, 2), int))
    >>> logits, state = twin(np.zeros((1, 2), int), state)       # the next timestep
    >>> logits.shape
    (1, 2, 65)
    """
    options = {"lengths": lengths, "states": states, "weights": weights, "part": part}
    if isinstance(model, Module):
        model = float_model(model)
    proto, _ = model_proto(model, options, metadata)
    write_bytes_atomic(Path(path), proto.SerializeToString())


def model_proto(
    model: Module,
    options: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    read: Any = None,
    run: Any = None,
) -> tuple[Any, Builder]:
    """(ModelProto, the ``Builder`` that made it).

    options: lengths, states, weights and part, as of ``export_onnx``. read: (module, name) -> array, in place of the
    model's parameters. run: what the file says of the run that the model is of, JSON-ready.
    """
    onnx = onnx_library()
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a gpurnn layer or model, got {type(model).__name__}")
    lengths, states, weights, part = (options[name] for name in ("lengths", "states", "weights", "part"))
    stored = model.dtype if weights is None else check_dtype(weights)
    if weights is not None and stored.itemsize != 2:
        raise ValueError(f"weights: expected 'float16', 'bfloat16' or None, got {weights!r}")
    b = Builder(read or parameter, compute_dtype(model.dtype), stored)
    signature = write_model(b, model, check_flag("lengths", lengths), check_flag("states", states), part)
    needed = sum(array.nbytes for array in b.arrays.values())
    if needed > _MOST:
        raise ValueError(f"model: its weights take {show_size(needed)}, an ONNX file holds at most {show_size(_MOST)}")
    graph = onnx.helper.make_graph(
        [*b.casts(), *b.nodes], type(model).__name__,
        [b.described(*one) for one in signature.inputs], [b.described(*one) for one in signature.outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in b.arrays.items()],
    )  # fmt: skip
    proto = onnx.helper.make_model(
        graph, producer_name="gpurnn", ir_version=IR_VERSION, opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    document = {"format": 1, "model": type(model).__name__, "options": dict(options), "roles": signature.roles}
    document |= {"run": run} if run else {}
    onnx.helper.set_model_props(proto, {**(metadata or {}), DOCUMENT: json.dumps(document)})
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True), b


def parameter(module: Module, name: str) -> np.ndarray:
    """A parameter or buffer of a module, rounded to the dtype that it computes with."""
    array = module.params[name] if name in module.params else module.buffers[name]
    return module.ops.to_numpy(array)
