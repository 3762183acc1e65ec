"""CuPy's dtypes in every layer: what goes in as float16 or bfloat16 comes out so, ragged or not, there and back.

On two backends over the emulated CuPy: ``cuda`` with its kernels, and ``cupy``, the generic code.
"""

import numpy as np
import pytest
from cuda_on_cpu import cupy_types
from helpers import OPTIMIZERS, cuda_ops

import gpurnn
from gpurnn import check, dtypes, losses
from gpurnn.backends.ops import Ops
from gpurnn.check import CELLS, Batch, build
from gpurnn.seq2seq import EncoderDecoder, Sampling, beam_search, greedy_search
from gpurnn.testing import leaves, map_leaves

pytestmark = pytest.mark.emulated

LENGTHS = [3, 0, 5]
OPTIONS = {
    "plain": {},
    "bidirectional": {"bidirectional": True},
    "reverse": {"reverse": True},
    "stack with dropout": {"num_layers": 2, "dropout": 0.3, "bidirectional": True},
    "wavefront, batch first": {"num_layers": 2, "dropout": 0.3, "wavefront": 2, "batch_first": True},
    "learned state": {"learn_state": True},
}


@pytest.fixture(params=["cuda", "cupy"])
def ops(request, monkeypatch):
    ops = cuda_ops()
    if request.param == "cupy":
        ops = Ops(ops.xp, "cupy")
    plain = gpurnn.get_backend("numpy")
    monkeypatch.setattr(losses.common, "array_ops", lambda *a: ops if isinstance(a[0], ops.xp.ndarray) else plain)
    return ops


both = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


# ---- the table


def test_the_table_is_cupys_own():
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    pytest.importorskip("ml_dtypes")
    committed, asked = cupy_types.read(), cupy_types.ask()
    made_with, found = committed.pop("made with"), asked.pop("made with")
    if made_with["cupy"] != cupy.__version__:
        pytest.skip(f"the table is of CuPy {made_with['cupy']}, here is {cupy.__version__}")
    assert asked == committed, f"made with {made_with}, asked {found}"


def test_results_have_cupys_dtypes(ops):
    xp = ops.xp
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    half, brain, single, mask = (xp.ones(3, dtype) for dtype in ("float16", bfloat16, "float32", bool))
    for got, expected in (
        (xp.where(mask, brain, brain), "float32"),  # there is no loop
        (xp.where(mask, brain, 0), "float32"),
        (xp.where(mask, half, 0), "float16"),
        (xp.where(mask, half, np.float32(0)), "float32"),
        (brain.clip(0, 1), "float32"),
        (brain * 2, "bfloat16"),
        (1 - brain, "bfloat16"),
        (brain * 0.5, "float32"),  # a float of Python's does not go into a bfloat16 loop
        (half * 0.5, "float16"),
        (single * np.float64(2), "float64"),
        (brain * mask, "bfloat16"),
        (brain > 0.5, "bool"),
        (xp.exp(mask), "float16"),
        (mask.sum(), "int64"),
        (brain.sum(dtype=np.float64), "float64"),
        (brain.mean(), "bfloat16"),
        (brain.argmax(), "int64"),
        (xp.maximum(brain, 0), "bfloat16"),
        (xp.multiply(half, half, dtype=np.float64), "float64"),
        (xp.concatenate([half, single]), "float32"),
        (brain @ brain, "bfloat16"),
        (half * brain, "float32"),
    ):
        assert got.dtype.name == expected
    brain *= 0.5  # computed in float32, written as bfloat16
    assert brain.dtype == bfloat16 and float(brain[0]) == 0.5
    xp.copyto(brain, 0, where=mask)
    assert brain.dtype == bfloat16 and not brain.get().any()


def test_what_cupy_refuses_is_refused(ops):
    xp = ops.xp
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    half, brain, single, mask, count = (
        xp.ones((2, 2), dtype) for dtype in ("float16", bfloat16, "float32", bool, "int64")
    )
    for refused in (
        lambda: mask - mask,
        lambda: -mask,
        lambda: single & single,
        lambda: count.__iadd__(single),
        lambda: xp.multiply(brain, brain, out=half),
        lambda: xp.multiply(single, single, out=count),
        lambda: xp.tanh(single, dtype=np.int64),
        lambda: xp.copyto(count, single),
        lambda: brain.argsort(),
        lambda: xp.argpartition(brain, 1),
        lambda: brain[None] @ brain[None],
        lambda: xp.where(mask, half, "1"),
    ):
        with pytest.raises(TypeError):
            refused()
    half *= np.float64(2)  # computed in float64, written as float16
    assert half.dtype == np.float16 and float(half[0, 0]) == 2


# ---- recurrent layers


def run_ragged(kind, ops, dtype, option):
    """(layer, all that a training call returns by name) of a ragged batch with NaN in its padding."""
    layer, _, exact = check.twins(kind, ops, dtype, **OPTIONS[option])
    batch = Batch(exact, 5, len(LENGTHS), ragged=False)
    for b, length in enumerate(LENGTHS):
        by_sequence(batch.x, layer)[b, length:] = np.nan

    def move(nested):
        return map_leaves(lambda array: layer.xp.asarray(array.astype(layer.dtype)), nested)

    given = None if option == "learned state" else move(batch.state)
    output, final, backward = layer.forward(move(batch.x), given, LENGTHS)
    dx, dinitial = backward(move(batch.doutput), move(batch.dstate))
    found = {"output": output, "dx": dx, **layer.grads}
    for name, state in (("state", final), ("dstate", dinitial)):
        found |= {f"{name} {kind}": part for kind, part in zip("hc", leaves(state), strict=False)}
    return layer, found


def by_sequence(array, layer):
    return array if layer.batch_first else array.swapaxes(0, 1)


def check_ragged(kind, ops, dtype, option):
    layer, found = run_ragged(kind, ops, dtype, option)
    for name, array in found.items():
        wide = name in layer.grads or name in ("state c", "dstate c")
        assert array.dtype == (layer.compute_dtype if wide else layer.dtype), name
        assert np.isfinite(array.get().astype(np.float64)).all(), name
    for name in ("output", "dx"):
        steps = by_sequence(found[name].get(), layer)
        assert not any(steps[b, length:].any() for b, length in enumerate(LENGTHS)), name


@both
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_ragged_layers_keep_their_dtype(kind, option, dtype, ops):
    check_ragged(kind, ops, dtype, option)


@both
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_step_and_the_gradient_flow(kind, dtype, ops):
    layer = build(kind, ops, dtype, num_layers=2)
    x = ops.xp.asarray(np.ones((5, 3, 4)).astype(layer.dtype))
    output, state, backward, steps = layer.forward(x, None, LENGTHS, return_all=True)
    for one in steps:
        assert one.h.dtype == layer.dtype and (one.c is None or one.c.dtype == layer.compute_dtype)
        assert {gate.dtype for gate in one.gates.values()} <= {layer.dtype}
    with gpurnn.record_gradient_flow() as flow:
        dx, _ = backward(output)
    assert dx.dtype == layer.dtype and all(np.isfinite(norms.dh).all() for norms in flow.values())
    output, state = layer.step(x[0], state)
    assert output.dtype == layer.dtype
    assert [part.dtype for part in leaves(state)] == [layer.dtype, layer.compute_dtype][: len(leaves(state))]


@both
def test_the_generic_code_computes_rightly_under_cupys_rules(dtype, monkeypatch):
    """test_check.py and test_cuda_layers.py have the backend cuda."""
    ops = Ops(cuda_ops().xp, "cupy")
    plain = gpurnn.get_backend("numpy")
    monkeypatch.setattr(losses.common, "array_ops", lambda *a: ops if isinstance(a[0], ops.xp.ndarray) else plain)
    wrong = [result for result in check.run_checks([ops], dtypes=[dtype], quick=True) if not result.right]
    assert not wrong


@both
@pytest.mark.parametrize("where", ["recurrent", "attention"])
def test_a_planted_where_is_seen(where, dtype, ops, monkeypatch):
    """What the library once did with padding: CuPy's ``where`` keeps float16, and makes bfloat16 float32."""

    def zero_past_end(steps, lengths):
        valid = ops.xp.asarray(np.arange(len(steps))[:, None] < lengths)
        return ops.xp.where(valid[:, :, None], steps, ops.xp.zeros((), steps.dtype))

    monkeypatch.setattr(ops, "zero_past_end", zero_past_end)

    def run():
        return (
            check_ragged("lstm", ops, dtype, "plain")
            if where == "recurrent"
            else check_attention("general", dtype, ops)
        )

    if dtype == "float16" or (where, ops.name) == ("attention", "cupy"):  # which goes on in float32 from there anyway
        run()
    else:
        with pytest.raises((AssertionError, gpurnn.DtypeError, ValueError)):
            run()


# ---- the other layers


def numbers(layer, *shape, padding=None):
    """Random numbers on the layer's device, NaN past the ends."""
    array = np.random.default_rng(len(shape)).normal(size=shape)
    for b, length in enumerate(LENGTHS if padding else ()):
        array[length:, b] = np.nan
    return layer.xp.asarray(array.astype(layer.dtype))


def check_layer(layer, x, **context):
    """The dtypes of a layer's results, and that none of them has NaN."""
    y, backward = layer.forward(x, **context)
    dx = backward(numbers(layer, *y.shape))
    for array in (y, layer(x, **context), *([] if dx is None else [dx])):
        assert array.dtype == layer.dtype
        assert np.isfinite(array.get().astype(np.float64)).all()
    assert layer.flat_grads.dtype == layer.compute_dtype and np.isfinite(layer.flat_grads.get()).all()


@both
@pytest.mark.parametrize("mode", ["last", "mean", "max", "attention"])
def test_pooling(mode, dtype, ops):
    layer = gpurnn.Pooling(6, mode, 2, backend=ops, dtype=dtype, seed=1)
    check_layer(layer, numbers(layer, 5, 3, 6, padding=True), lengths=LENGTHS)
    check_layer(layer, numbers(layer, 5, 3, 6))


@both
@pytest.mark.parametrize("name", ["linear", "layer norm", "dropout", "variational dropout"])
def test_layers_without_lengths(name, dtype, ops):
    options = {"backend": ops, "dtype": dtype, "seed": 1}
    layer = {
        "linear": lambda: gpurnn.Linear(6, 4, **options),
        "layer norm": lambda: gpurnn.LayerNorm(6, **options),
        "dropout": lambda: gpurnn.Dropout(0.4, **options),
        "variational dropout": lambda: gpurnn.Dropout(0.4, variational=True, **options),
    }[name]()
    check_layer(layer, numbers(layer, 5, 3, 6))
    layer.eval()
    check_layer(layer, numbers(layer, 5, 3, 6))


@both
def test_batch_norm(dtype, ops):
    layer = gpurnn.BatchNorm(6, backend=ops, dtype=dtype)
    check_layer(layer, numbers(layer, 5, 3, 6, padding=True), lengths=LENGTHS)
    mask = ops.xp.asarray(np.arange(5)[:, None] % 2 == np.zeros(3, int))
    check_layer(layer.eval(), numbers(layer, 5, 3, 6), lengths=LENGTHS, mask=mask)
    assert {buffer.dtype for name, buffer in layer.buffers.items() if name.startswith("running")} == {
        layer.compute_dtype
    }


@both
def test_embedding_and_tied_linear(dtype, ops):
    embedding = gpurnn.Embedding(9, 6, padding_idx=0, backend=ops, dtype=dtype, seed=1)
    check_layer(embedding, ops.xp.asarray(np.arange(15).reshape(5, 3) % 9))
    tied = gpurnn.TiedLinear(embedding)
    check_layer(tied, numbers(tied, 5, 3, 6))


def check_attention(score, dtype, ops):
    layer = gpurnn.Attention(6, 6, score, backend=ops, dtype=dtype, seed=1)
    queries, memory = numbers(layer, 4, 3, 6), numbers(layer, 5, 3, 6, padding=True)
    context, weights, backward = layer.forward(queries, memory, LENGTHS)
    dqueries, dmemory = backward(numbers(layer, 4, 3, 6), numbers(layer, 4, 3, 5))
    for array in (context, weights, dqueries, dmemory, *layer(queries, memory, LENGTHS)):
        assert array.dtype == layer.dtype
        assert np.isfinite(array.get().astype(np.float64)).all()
    assert layer.flat_grads.dtype == layer.compute_dtype


@both
@pytest.mark.parametrize("score", gpurnn.attention.SCORES)
def test_attention(score, dtype, ops):
    check_attention(score, dtype, ops)


# ---- losses, optimisers, whole models


LOSSES = {
    "mse": (gpurnn.mse, {}),
    "mae": (gpurnn.mae, {}),
    "binary": (gpurnn.binary_cross_entropy_with_logits, {}),
    "huber": (gpurnn.huber, {"delta": 0.5}),
    "smooth l1": (gpurnn.smooth_l1, {"beta": 0.5}),
    "kl": (gpurnn.kl_div, {"log_target": True}),
    "probabilities": (gpurnn.cross_entropy, {"label_smoothing": 0.1, "weight": [1, 0, 2, 3]}),
}
TARGETS = {  # those whose targets are class numbers
    "cross-entropy": (gpurnn.cross_entropy, {"label_smoothing": 0.1}),
    "class weights": (gpurnn.cross_entropy, {"weight": [1, 0, 2, 3]}),
    "class weights, smoothed": (gpurnn.cross_entropy, {"weight": [1, 0, 2, 3], "label_smoothing": 0.1}),
    "nll": (gpurnn.nll_loss, {"weight": [1, 0, 2, 3]}),
}


@both
@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
@pytest.mark.parametrize("name", [*LOSSES, *TARGETS, "quantiles", "ctc"])
def test_losses(name, reduction, dtype, ops):
    plain = gpurnn.get_backend("numpy")
    host = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(gpurnn.dtypes.check_dtype(dtype))
    other = host[::-1].copy()
    if name == "probabilities":
        powers = np.exp(other.astype(float))
        other = (powers / powers.sum(axis=-1, keepdims=True)).astype(other.dtype)
    for b, length in enumerate(LENGTHS):
        host[length:, b] = np.nan
    results = []
    for device in (ops, plain):
        x, options = device.xp.asarray(host), {"lengths": LENGTHS, "reduction": reduction}
        if name == "ctc":
            loss, backward = gpurnn.ctc_loss(x, [[1, 2], [], [3]], zero_infinity=True, **options)
        elif name in TARGETS:
            function, more = TARGETS[name]
            loss, backward = function(x, device.xp.asarray(np.arange(15).reshape(5, 3) % 4), **more, **options)
        elif name == "quantiles":
            loss, backward = gpurnn.quantile_loss(x, device.xp.asarray(other[..., 0]), [0.1, 0.3, 0.5, 0.9], **options)
        else:
            function, more = LOSSES[name]
            loss, backward = function(x, device.xp.asarray(other), **more, **options)
        dx = backward()
        assert loss.dtype == np.float32 and dx.dtype == host.dtype
        results.append([device.to_numpy(array).astype(np.float64) for array in (loss, dx)])
    for got, expected, eps in zip(*results, (2.0**-23, dtypes.EPSILON[dtype]), strict=True):
        # both compute in float32 or better, 4 terms; then one rounding to the dtype
        np.testing.assert_allclose(got, expected, rtol=eps + 16 * 2.0**-23, atol=16 * 2.0**-23)


@both
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_and_clipping(name, dtype, ops):
    layer = gpurnn.Linear(6, 4, backend=ops, dtype=dtype, seed=1)
    optimizer = OPTIMIZERS[name](layer)
    for _ in range(2):
        layer.flat_grads[...] = 2
        norm = gpurnn.clip_grad_norm(layer, 0.5)
        gpurnn.clip_grad_value(layer, 0.01)
        optimizer.step()
    assert norm.dtype == np.float64 and layer.flat_params.dtype == layer.flat_grads.dtype == np.float32
    assert {array.dtype for array in optimizer.state_dict()["arrays"].values()} <= {np.dtype(np.float32)}
    assert {array.dtype for array in layer.state_dict().values()} == {np.dtype(np.float32)}


@both
@pytest.mark.parametrize(
    "cell, score, tied", [("lstm", "general", True), ("gru", "additive", False), ("rnn", "dot", True)]
)
def test_an_encoder_decoder_trains_and_writes(cell, score, tied, dtype, ops):
    model = EncoderDecoder(
        9, 11, 6, layers=2, cell=cell, score=score, tied=tied, dropout=0.2, backend=ops, dtype=dtype, seed=3
    )
    model.sampling = Sampling(1.0, 1)
    adam, draw = gpurnn.Adam(model, lr=0.02), np.random.default_rng(0)
    source, target, following = (ops.xp.asarray(draw.integers(4, 9, (5, 3))) for _ in range(3))
    lengths, found = ([3, 1, 5], [5, 2, 4]), []
    for _ in range(8):
        model.zero_grad()
        logits, backward = model.forward((source, target), lengths)
        loss, dloss = gpurnn.cross_entropy(logits, following, lengths=lengths[1])
        dlogits = dloss()
        backward(dlogits)
        gpurnn.clip_grad_norm(model, 1.0)
        adam.step()
        assert logits.dtype == dlogits.dtype == model.dtype and model.flat_grads.dtype == np.float32
        found.append(float(loss))
    assert found[-1] < found[0]
    model.eval()
    assert model((source, target), lengths).dtype == model.dtype
    assert len(greedy_search(model, source, lengths[0], max_length=4)) == 3
    assert len(beam_search(model, source, lengths[0], beam=2, max_length=4)) == 3


@both
def test_a_classifier_trains(dtype, ops):
    """Embedding, ragged stack, pooling, batch normalisation, head: what ``Sequential`` hands on."""
    options = {"backend": ops, "dtype": dtype, "seed": 1}
    model = gpurnn.Sequential(
        gpurnn.Embedding(9, 5, **options),
        gpurnn.GRU(5, 6, num_layers=2, dropout=0.2, bidirectional=True, **options),
        gpurnn.BatchNorm(12, backend=ops, dtype=dtype),
        gpurnn.Pooling(12, "max", 2, **options),
        gpurnn.Linear(12, 3, **options),
    )
    optimizer = gpurnn.RMSprop(model, lr=0.01)
    ids, labels, found = ops.xp.asarray(np.arange(15).reshape(5, 3) % 9), ops.xp.asarray(np.array([0, 1, 2])), []
    for _ in range(10):
        model.zero_grad()
        logits, state, backward = model.forward(ids, None, LENGTHS)
        loss, dloss = gpurnn.cross_entropy(logits, labels)
        backward(dloss())
        optimizer.step()
        assert logits.dtype == state[0].dtype == model.dtype
        found.append(float(loss))
    assert found[-1] < found[0] and 0 <= gpurnn.accuracy(logits, labels) <= 1
