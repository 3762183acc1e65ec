"""The checks of everything that is no recurrent layer: each runs on a backend and gives arrays by name."""

import numpy as np

from ..attention import Attention
from ..backends import get_backend
from ..dtypes import check_dtype
from ..layers import BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential
from ..losses import cross_entropy
from ..optim import SGD, Adam, AdamW, RMSprop, clip_grad_norm
from ..recurrent import GRU
from ..testing.allowed import equal_bits, worst_error


def _layer(make, ids=False, **context):
    def run(backend, dtype):
        layer = make({"backend": backend, "dtype": dtype, "seed": 3})
        rng = np.random.default_rng(2)
        x = rng.integers(0, 9, (7, 4)) if ids else rng.normal(size=(7, 4, 6)).astype(layer.dtype)
        y, backward = layer.forward(layer.xp.asarray(x), **context)
        dx = backward(layer.xp.asarray(rng.normal(size=y.shape).astype(layer.dtype)))
        return {"y": y, "gradients": layer.flat_grads} | ({} if dx is None else {"dx": dx})

    return run


def _padding_in_front(backend, dtype):
    options, rng = {"backend": backend, "dtype": dtype, "seed": 3}, np.random.default_rng(2)
    model = Sequential(Linear(6, 5, **options), LayerNorm(5, **options), GRU(5, 4, **options))
    x, lengths = rng.normal(size=(7, 4, 6)).astype(model.dtype), np.array([7, 0, 3, 5])
    x[np.arange(7)[:, None] >= lengths] = np.nan
    y, _, backward = model.forward(model.xp.asarray(x), lengths=lengths)
    dx, _ = backward(model.xp.asarray(rng.normal(size=y.shape).astype(model.dtype)))
    return {"y": y, "dx": dx, "gradients": model.flat_grads}


def _attention(score):
    def run(backend, dtype):
        layer, rng = Attention(6, 6, score, backend=backend, dtype=dtype, seed=3), np.random.default_rng(2)

        def draw(steps):
            return layer.xp.asarray(rng.normal(size=(steps, 4, 6)).astype(layer.dtype))

        context, weights, backward = layer.forward(draw(5), draw(7), [7, 0, 3, 5])
        dqueries, dmemory = backward(draw(5))
        results = {"context": context, "weights": weights, "dqueries": dqueries, "dmemory": dmemory}
        return results | ({} if score == "dot" else {"gradients": layer.flat_grads})

    return run


def _loss(**options):
    def run(backend, dtype):
        ops, rng = get_backend(backend), np.random.default_rng(4)
        logits = ops.xp.asarray((3 * rng.normal(size=(7, 4, 33))).astype(check_dtype(dtype)))
        targets = ops.xp.asarray(rng.integers(0, 33, (7, 4)))
        loss, backward = cross_entropy(logits, targets, lengths=[7, 0, 3, 5], **options)
        return {"loss": loss, "dlogits": backward()}

    return run


def _optimizer(make):
    def run(backend, dtype):
        model = Linear(5, 7, backend=backend, dtype=dtype, seed=1)
        optimizer, rng = make(model), np.random.default_rng(3)
        for _ in range(3):
            model.flat_grads[...] = model.xp.asarray(
                rng.normal(size=model.flat_grads.shape).astype(model.compute_dtype)
            )
            norm = clip_grad_norm(model, 2.0)
            optimizer.step()
        return {"parameters": model.flat_params, "gradients": model.flat_grads, "norm": norm}

    return run


OTHER_CASES = {
    "Linear": _layer(lambda o: Linear(6, 5, **o)),
    "Embedding": _layer(lambda o: Embedding(9, 6, padding_idx=2, **o), ids=True),
    "Dropout": _layer(lambda o: Dropout(0.4, **o)),
    "LayerNorm": _layer(lambda o: LayerNorm(6, **o)),
    "BatchNorm": _layer(lambda o: BatchNorm(6, **o)),
    "Pooling": _layer(lambda o: Pooling(6, "last", 2, **o), lengths=[7, 0, 3, 5]),
    "Pooling, mean": _layer(lambda o: Pooling(6, "mean", **o), lengths=[7, 0, 3, 5]),
    "Pooling, max": _layer(lambda o: Pooling(6, "max", **o), lengths=[7, 0, 3, 5]),
    "Pooling, attention": _layer(lambda o: Pooling(6, "attention", **o), lengths=[7, 0, 3, 5]),
    "padding in front": _padding_in_front,
    "Attention, dot": _attention("dot"),
    "Attention, general": _attention("general"),
    "Attention, additive": _attention("additive"),
    "cross_entropy": _loss(),
    "cross_entropy, smoothed": _loss(label_smoothing=0.1, reduction="sum"),
    "SGD": _optimizer(lambda m: SGD(m, 0.1, momentum=0.9, nesterov=True)),
    "RMSprop": _optimizer(lambda m: RMSprop(m, 0.01, centered=True, momentum=0.5)),
    "Adam": _optimizer(lambda m: Adam(m, 0.01, amsgrad=True)),
    "AdamW": _optimizer(lambda m: AdamW(m, 0.01)),
}


def _on_host(results, ops):
    return {name: ops.to_numpy(value).astype(np.float64) for name, value in results.items()}


def check_other(name, backend, dtype):
    """``(worst, detail)`` of a case against the reference, and of two runs against one another."""
    ops, plain = get_backend(backend), get_backend("numpy")
    run = OTHER_CASES[name]
    first, second = (_on_host(run(backend, dtype), ops) for _ in range(2))
    expected = _on_host(run("numpy", "float64"), plain)
    counted = 8 * 28 if dtype == "float64" or ops.name == "numpy" else None  # at most 28 terms of a few operations
    usual = _on_host(run("numpy", dtype), plain)
    return worst_error(first, usual, expected, dtype, counted), equal_bits(first, second)
