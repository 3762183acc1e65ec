"""ONNX's operators on numbers one by one, their sums and products, as array code for NumPy and CuPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...dtypes import compute_dtype, is_float, upcast
from .activations import Activation


def _sigmoid(xp, x):
    with np.errstate(over="ignore"):
        return 1 / (1 + xp.exp(-x))


def _softplus(xp, x):
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))


def _divide(xp, a, b):
    """Of integers the quotient cut towards zero."""
    return a / b if is_float(a.dtype) else xp.sign(a) * xp.sign(b) * (xp.abs(a) // xp.abs(b))


def _activate(xp, x, one):
    """x after an ``Activation`` with one or two numbers."""
    name, alpha, beta = one
    return {
        "leakyrelu": lambda: xp.where(x > 0, x, alpha * x),
        "hardsigmoid": lambda: xp.clip(alpha * x + beta, 0, 1),
        "elu": lambda: xp.where(x > 0, x, alpha * xp.expm1(xp.minimum(x, 0))),
        "thresholdedrelu": lambda: xp.where(x > alpha, x, 0),
    }[name]()


_UNARY = {  # computed in float32 for 16-bit arrays
    "Relu": lambda xp, x: xp.maximum(x, 0), "Tanh": lambda xp, x: xp.tanh(x), "Sigmoid": _sigmoid,
    "Exp": lambda xp, x: xp.exp(x), "Log": lambda xp, x: xp.log(x), "Sqrt": lambda xp, x: xp.sqrt(x),
    "Neg": lambda xp, x: -x, "Abs": lambda xp, x: xp.abs(x), "Reciprocal": lambda xp, x: 1 / x,
    "Softplus": _softplus, "Softsign": lambda xp, x: x / (1 + xp.abs(x)),
    "Floor": lambda xp, x: xp.floor(x), "Ceil": lambda xp, x: xp.ceil(x), "Sign": lambda xp, x: xp.sign(x),
    "HardSwish": lambda xp, x: x * xp.clip(x / 6 + 0.5, 0, 1),
}  # fmt: skip
_BINARY = {
    "Add": lambda xp, a, b: a + b, "Sub": lambda xp, a, b: a - b, "Mul": lambda xp, a, b: a * b, "Div": _divide,
    "Pow": lambda xp, a, b: xp.power(a, b).astype(a.dtype, copy=False),
    "PRelu": lambda xp, a, b: xp.where(a > 0, a, b * a),
    "Equal": lambda xp, a, b: a == b, "Less": lambda xp, a, b: a < b, "Greater": lambda xp, a, b: a > b,
    "LessOrEqual": lambda xp, a, b: a <= b, "GreaterOrEqual": lambda xp, a, b: a >= b,
    "And": lambda xp, a, b: a & b, "Or": lambda xp, a, b: a | b, "Xor": lambda xp, a, b: a ^ b,
}  # fmt: skip
_NUMBERED = {  # name -> the alpha and beta that it has where none are given
    "LeakyRelu": (0.01, None), "HardSigmoid": (0.2, 0.5), "Elu": (1.0, None), "ThresholdedRelu": (1.0, None),
}  # fmt: skip
_MANY = {"Min": "minimum", "Max": "maximum", "Sum": "add"}


def _unary(node, x):
    return _UNARY[node.op](node.xp(x), upcast(x)).astype(x.dtype, copy=False)


def _numbered(node, x):
    alpha, beta = _NUMBERED[node.op]
    one = Activation(node.op.lower(), node.attributes.get("alpha", alpha), node.attributes.get("beta", beta))
    return _activate(node.xp(x), upcast(x), one).astype(x.dtype, copy=False)


def _binary(node, a, b):
    xp, a, b = node.together(a, b)
    node.check_broadcast(a, b)
    return _BINARY[node.op](xp, a, b)


def _many(node, *arrays):
    xp, *arrays = node.together(*arrays)
    node.check_broadcast(*arrays)
    total = arrays[0]
    for array in arrays[1:]:
        total = getattr(xp, _MANY[node.op])(total, array)
    return total


def _clip(node, x, low=None, high=None):
    low, high = (node.attributes.get(name, one) for name, one in (("min", low), ("max", high)))
    xp = node.xp(x)
    for function, limit in ((xp.maximum, low), (xp.minimum, high)):
        x = x if limit is None else function(x, xp.asarray(limit, dtype=x.dtype)).astype(x.dtype, copy=False)
    return x


def _where(node, condition, a, b):
    xp, condition, a, b = node.together(condition, a, b)
    node.check_broadcast(condition, a, b)
    return xp.where(condition, a, b)


def _not(node, x):
    return ~x


def _cast(node, x, like=None):
    onnx = node.onnx
    dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"]) if like is None else like.dtype
    if dtype.kind in "OSU" or x.dtype.kind in "OSU":
        raise ValueError("text is not cast here")
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(dtype)


# ---- products


def _matmul(node, a, b):
    xp, a, b = node.together(a, b)
    if a.ndim > 1 and b.ndim > 1:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        node.check_product((*batch, a.shape[-2], b.shape[-1]), a.dtype.itemsize)
    return xp.matmul(upcast(a), upcast(b)).astype(a.dtype, copy=False)


def _gemm(node, a, b, c=None):
    given = node.attributes
    xp, a, b = node.together(a, b)
    a, b = (x.T if given.get(name) else x for name, x in (("transA", a), ("transB", b)))
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"expected matrices, got shapes {a.shape} and {b.shape}")
    node.check_product((len(a), b.shape[1]), a.dtype.itemsize)
    y = given.get("alpha", 1.0) * (upcast(a) @ upcast(b))
    if c is not None:
        y = y + given.get("beta", 1.0) * upcast(xp.asarray(c))
    return y.astype(a.dtype, copy=False)


# ---- sums


def _reduce(node, x, axes=None):
    given = node.attributes
    axes = given.get("axes") if axes is None else [int(axis) for axis in node.ops_to_numpy(axes).ravel()]
    if not axes and given.get("noop_with_empty_axes"):
        return x
    name, xp = node.op.removeprefix("Reduce"), node.xp(x)
    axes, raised = tuple(axes) if axes else None, upcast(x)
    how = {"axis": axes, "keepdims": bool(given.get("keepdims", 1))}
    if name in ("L1", "L2", "SumSquare"):
        raised = xp.abs(raised) if name == "L1" else raised * raised
    y = getattr(raised, name.lower() if name in ("Max", "Min", "Mean", "Prod") else "sum")(**how)
    y = xp.sqrt(y) if name == "L2" else y
    return xp.asarray(y).astype(x.dtype, copy=False)


def _softmax(node, x):
    xp, old = node.xp(x), node.version < 13
    axis, shape = node.attributes.get("axis", 1 if old else -1), x.shape
    if old:  # all axes from this one on are one
        axis += x.ndim if axis < 0 else 0
        x, axis = x.reshape(math.prod(shape[:axis]), -1), -1
    shifted = upcast(x)
    shifted = shifted - shifted.max(axis=axis, keepdims=True)
    exps = xp.exp(shifted)
    total = exps.sum(axis=axis, keepdims=True)
    y = shifted - xp.log(total) if node.op == "LogSoftmax" else exps / total
    return y.astype(x.dtype, copy=False).reshape(shape)


def _arg(node, x):
    given, xp = node.attributes, node.xp(x)
    axis, last = given.get("axis", 0), given.get("select_last_index", 0)
    x = xp.flip(x, axis) if last else x
    found = x.argmax(axis=axis) if node.op == "ArgMax" else x.argmin(axis=axis)
    found = x.shape[axis] - 1 - found if last else found
    return (xp.expand_dims(found, axis) if given.get("keepdims", 1) else found).astype(np.int64)


# ---- normalizations


def _layer_norm(node, x, scale, bias=None):
    axis = node.attributes.get("axis", -1)
    xp, x, scale = node.together(x, scale)
    axes = tuple(range(axis % x.ndim, x.ndim))
    raised = upcast(x)
    mean = raised.mean(axis=axes, keepdims=True)
    variance = xp.square(raised - mean).mean(axis=axes, keepdims=True)
    inverse = 1 / xp.sqrt(variance + xp.asarray(node.attributes.get("epsilon", 1e-5), raised.dtype))
    y = (raised - mean) * inverse * scale
    y = (y if bias is None else y + bias).astype(x.dtype, copy=False)
    return y, mean, inverse


def _batch_norm(node, x, scale, bias, mean, variance):
    if node.attributes.get("training_mode") or len(node.outputs) > 1:
        raise ValueError("statistics of the batch, as in training, are not computed here")
    if not node.attributes.get("spatial", 1):
        raise ValueError("spatial: expected 1: one mean and deviation for each channel")
    xp, shape = node.ops.xp, (-1, *[1] * (x.ndim - 2))
    scale, bias, mean, variance = (xp.asarray(array).reshape(shape) for array in (scale, bias, mean, variance))
    epsilon = np.asarray(node.attributes.get("epsilon", 1e-5), compute_dtype(x.dtype))
    return ((upcast(x) - mean) / xp.sqrt(variance + epsilon) * scale + bias).astype(x.dtype, copy=False)


def _dropout(node, x, rate=None, training=None):
    if training is not None and bool(training):
        raise ValueError("training mode is not run here")
    return (x, np.ones(x.shape, bool)) if len(node.outputs) > 1 else x


OPERATORS: dict[str, Any] = {
    **dict.fromkeys(_UNARY, _unary), **dict.fromkeys(_BINARY, _binary), **dict.fromkeys(_NUMBERED, _numbered),
    **dict.fromkeys(_MANY, _many), "Clip": _clip, "Where": _where, "Not": _not, "Cast": _cast, "CastLike": _cast,
    "MatMul": _matmul, "Gemm": _gemm, "Softmax": _softmax, "LogSoftmax": _softmax, "ArgMax": _arg, "ArgMin": _arg,
    **dict.fromkeys([f"Reduce{name}" for name in ("Mean", "Max", "Min", "Sum", "Prod", "L1", "L2", "SumSquare")],
                    _reduce),
    "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm, "Dropout": _dropout,
}  # fmt: skip
