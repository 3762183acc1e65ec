"""``export_onnx``: every layer, option and model, read back and run by onnx.reference and ONNX Runtime."""

import importlib

import numpy as np
import pytest
from helpers import assert_close, cuda_ops
from optional import needs, optional

import gpurnn
from gpurnn.cells import tanh
from gpurnn.interop.onnx import export_onnx, import_onnx
from gpurnn.interop.onnx.roles import names_in
from gpurnn.tasks import get_task

onnx = optional("onnx")
pytestmark = needs("onnx")
KW = {"backend": "numpy", "seed": 1}
SIZES = ((1, 1), (4, 3), (7, 2))  # T, B
CLOSE = 1e-5  # what an export may differ by: a few roundings of numbers near 1, in float32


@gpurnn.cell(gates="z", parameters="leak")
def leaky(ax, ah, s, p):
    return s.h + p.leak * (tanh(ax.z + ah.z) - s.h)


@gpurnn.cell(gates="f n", states="h c", parameters="w")
def gated(ax, ah, s, p):
    """Something of everything: a second product, states, a mean, a comparison, logarithms."""
    from gpurnn.cells import exp, expm1, log1p, maximum, mean, minimum, sigmoid, softplus, where

    f = sigmoid(ax.f + ah.f) * 0.9
    n = tanh(ax.n + ah.n(f * s.h))
    c = f * s.c + log1p(abs(n)) / (1 + exp(-p.w)) - 0.1 * mean(n)
    return where(c > 0.2, minimum(softplus(c), 0.7), maximum(expm1(c), -0.5)), c


# name -> (the layer's class, its arguments, the node that it becomes)
LAYERS = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}, "LSTM"),
    "gru": ("GRU", {}, "GRU"),
    "gru, original": ("GRU", {"num_layers": 2, "reset_after": False, "reverse": True}, "GRU"),
    "rnn": ("RNN", {"nonlinearity": "relu", "bias": False}, "RNN"),
    "batch first": ("LSTM", {"batch_first": True, "num_layers": 2}, "LSTM"),
    "float64": ("LSTM", {"dtype": "float64", "bidirectional": True}, "LSTM"),
    "peephole": ("LSTM", {"peephole": True, "bidirectional": True}, "LSTM"),
    "coupled": ("LSTM", {"coupled": True, "peephole": True, "recurrent_activation": "hard_sigmoid"}, "LSTM"),
    "coupled, no mirror": ("LSTM", {"coupled": True, "recurrent_activation": "elu"}, "Scan"),
    "activations": ("LSTM", {"activation": "leaky_relu", "recurrent_activation": "hard_sigmoid_2"}, "LSTM"),
    "activations of a GRU": ("GRU", {"activation": "elu", "recurrent_activation": "hard_sigmoid"}, "GRU"),
    "activation of an RNN": ("RNN", {"nonlinearity": "softsign", "bidirectional": True}, "RNN"),
    "silu": ("GRU", {"activation": "silu"}, "Scan"),
    "layer norm": ("GRU", {"layer_norm": True, "num_layers": 2, "bidirectional": True}, "Scan"),
    "layer norm of an LSTM": ("LSTM", {"layer_norm": True, "bias": False, "reverse": True}, "Scan"),
    "layer norm, heads": ("RNN", {"layer_norm": True, "heads": 2}, "Scan"),
    "projection": ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}, "Scan"),
    "heads": ("LSTM", {"heads": 3, "num_layers": 2, "bidirectional": True}, "LSTM"),
    "heads, options": ("LSTM", {"heads": 2, "peephole": True, "coupled": True}, "LSTM"),
    "zoneout": ("GRU", {"zoneout": 0.2, "reset_after": False}, "Scan"),
    "cell clip": ("LSTM", {"cell_clip": 0.1}, "Scan"),
    "dropout": ("LSTM", {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.3, "gradient_clip": 1.0}, "LSTM"),
    "learned state": ("LSTM", {"num_layers": 2, "learn_state": True, "residual": True}, "LSTM"),
    "learned state, scan": ("LSTM", {"learn_state": True, "cell_clip": 0.1, "bidirectional": True}, "Scan"),
    "sizes": ("GRU", {"hidden_size": [4, 6], "num_layers": 2, "bidirectional": True, "learn_state": True}, "GRU"),
    "own": ("Recurrent", {"cell": leaky, "num_layers": 2, "bidirectional": True, "heads": 2}, "Scan"),
    "own, of everything": ("Recurrent", {"cell": gated, "bidirectional": True}, "Scan"),
    "own without bias": ("Recurrent", {"cell": gated, "bias": False, "heads": 3}, "Scan"),
}


def layer_of(name):
    kind, given, _ = LAYERS[name]
    layer = getattr(gpurnn, kind)(**{"input_size": 3, "hidden_size": 6} | given, **KW)
    rng = np.random.default_rng(5)
    for key, array in layer.params.items():
        if key.startswith(("initial", "leak", "w_l0", "p_")):
            array[...] = rng.random(array.shape)
    return layer


def chains():
    """Name -> a model of several layers, and its input for (T, B)."""
    S, rng = gpurnn.Sequential, np.random.default_rng(0)
    embedding, norm = gpurnn.Embedding(11, 6, **KW), gpurnn.BatchNorm(12, **KW)
    norm.buffers["running_mean"][...] = rng.normal(size=12)
    norm.buffers["running_var"][...] = rng.random(12) + 0.5
    words = [embedding, gpurnn.LSTM(6, 6, **KW), gpurnn.LayerNorm(6, eps=1e-3, **KW), gpurnn.Dropout(0.5, **KW)]
    models = {
        "words": S(*words, gpurnn.TiedLinear(embedding)),
        "last": S(
            gpurnn.Linear(3, 4, **KW), gpurnn.GRU(4, 6, bidirectional=True, **KW), norm,
            gpurnn.Pooling(12, "last", 2, **KW), gpurnn.Linear(12, 2, bias=False, **KW),
        ),
        "nested": S(S(gpurnn.GRU(3, 4, **KW), gpurnn.LSTM(4, 4, **KW)), gpurnn.LayerNorm(4, bias=False, **KW)),
        "plain norm": S(gpurnn.BatchNorm(3, affine=False, **KW), gpurnn.Linear(3, 2, **KW)),
        "batch first": S(gpurnn.GRU(3, 4, batch_first=True, **KW), gpurnn.BatchNorm(4, batch_first=True, **KW),
                         gpurnn.Pooling(4, "mean", batch_first=True, **KW)),
    }  # fmt: skip
    for mode in ("mean", "max", "attention"):
        models[mode] = S(gpurnn.LSTM(3, 4, **KW), gpurnn.Pooling(4, mode, **KW))
    return models


def proto_of(model, tmp_path, **options):
    export_onnx(model, tmp_path / "model.onnx", **options)
    return onnx.load(str(tmp_path / "model.onnx"))


def flat(state):
    return [] if state is None else [a for part in state for a in flat(part)] if isinstance(state, tuple) else [state]


def inputs_for(model, ids=False, batch_first=False):
    """(x, lengths) of each size; lengths None, some, and with sequences of length 0."""
    rng = np.random.default_rng(6)
    for T, B in SIZES:
        shape = (B, T) if batch_first else (T, B)
        x = rng.integers(0, 11, shape) if ids else rng.normal(size=(*shape, 3)).astype(model.dtype)
        for lengths in (None, rng.integers(1, T + 1, B), np.maximum(0, rng.integers(-2, T + 1, B))):
            yield x, lengths


def check_twin(model, twin, pairs, most=CLOSE):
    """The outputs and states of a twin are those of the model."""
    for x, lengths in pairs:
        expected = model(x, None, lengths) if model.stateful or model.takes_lengths else model(x)
        output, state = expected if model.stateful else (expected, None)
        got, final = twin(x, None, lengths)
        np.testing.assert_allclose(got, output, rtol=0, atol=most)
        assert len(flat(final)) == len(flat(state))
        for one, exact in zip(flat(final), flat(state), strict=True):
            np.testing.assert_allclose(one, exact, rtol=0, atol=most)


def feeds_of(twin, x, lengths):
    """What another runtime is fed."""
    roles, T, B = twin._roles, x.shape[twin._roles.time], x.shape[1 - twin._roles.time]
    sizes = {"T": T, "B": B}
    feeds = {roles.x[0]: x} | roles.lengths_given(lengths, sizes)
    states = roles.states_given(None, sizes, twin.inputs, twin._program.initial)
    return feeds | {name: np.ascontiguousarray(array) for name, array in states.items()}


def check_reference(proto, twin, pairs):
    """onnx.reference gives the same; its recurrent nodes ignore lengths."""
    reference = importlib.import_module("onnx.reference").ReferenceEvaluator(proto)
    for x, lengths in pairs:
        if lengths is None:
            feeds = feeds_of(twin, x, None)
            expected = reference.run(None, feeds)
            for got, exact in zip(twin.run(feeds).values(), expected, strict=True):
                np.testing.assert_allclose(got, exact, rtol=0, atol=CLOSE)


def check_runtime(proto, twin, pairs):
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for x, lengths in pairs:
        feeds = feeds_of(twin, x, lengths)
        for got, exact in zip(twin.run(feeds).values(), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, exact, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layers(name, tmp_path):
    layer = layer_of(name)
    proto = proto_of(layer, tmp_path)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.op_type for node in proto.graph.node} & {"RNN", "GRU", "LSTM", "Scan"} == {LAYERS[name][2]}
    twin, layer = import_onnx(proto, backend="numpy"), layer.eval()
    pairs = list(inputs_for(layer, batch_first=layer.batch_first))
    check_twin(layer, twin, pairs)
    if not any(one.name == "activations" for node in proto.graph.node for one in node.attribute):
        check_reference(proto, twin, pairs)  # which knows the usual ones only


@pytest.mark.parametrize("name", chains())
def test_chains(name, tmp_path):
    model = chains()[name]
    proto = proto_of(model, tmp_path)
    twin, model = import_onnx(proto, backend="numpy"), model.eval()
    pairs = list(inputs_for(model, name == "words", name == "batch first"))
    check_twin(model, twin, pairs)
    check_reference(proto, twin, pairs)


@pytest.mark.long
@pytest.mark.parametrize("name", [*LAYERS, *(f"chain {name}" for name in chains())])
def test_onnx_runtime_gives_the_same(name, tmp_path):
    pytest.importorskip("onnxruntime")
    chain = name.removeprefix("chain ")
    model = chains()[chain] if chain != name else layer_of(name)
    if model.dtype == "float64":
        pytest.skip("ONNX Runtime has no recurrent nodes of float64")
    proto = proto_of(model, tmp_path)
    first = chain == "batch first" or getattr(model, "batch_first", False)
    check_runtime(proto, import_onnx(proto, backend="numpy"), inputs_for(model, chain == "words", first))


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_streaming(backend, tmp_path):
    """Timestep by timestep, and in two pieces: as in one call."""
    model = gpurnn.Sequential(gpurnn.LSTM(3, 4, 2, **KW), gpurnn.GRU(4, 5, layer_norm=True, **KW))
    twin = import_onnx(proto_of(model, tmp_path), backend=backend)
    x = np.random.default_rng(1).normal(size=(6, 2, 3)).astype("float32")
    whole, last = model(x)
    first, state = twin(x[:2])
    parts = [first]
    for t in range(2, 6):
        y, state = twin(x[t : t + 1], state)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=CLOSE)
    for got, exact in zip(flat(state), flat(last), strict=True):
        np.testing.assert_allclose(got, exact, rtol=0, atol=CLOSE)
    assert [len(part) if isinstance(part, tuple) else 1 for part in state] == [2, 1]
    with pytest.raises(ValueError, match=r"state: expected 2 parts, got ndarray"):
        twin(x, state[1])


def test_without_states_and_lengths(tmp_path):
    """The layer begins with what it has learned."""
    layer = layer_of("sizes")
    twin = import_onnx(proto_of(layer, tmp_path, states=False, lengths=False), backend="numpy")
    assert list(twin.inputs) == ["x"] and list(twin.outputs) == ["output"]
    x = np.random.default_rng(1).normal(size=(5, 2, 3)).astype("float32")
    output, state = twin(x)
    assert state is None
    np.testing.assert_allclose(output, layer(x)[0], rtol=0, atol=CLOSE)
    for name in ("learned state, scan", "projection", "layer norm, heads"):
        scan = layer_of(name)
        twin = import_onnx(proto_of(scan, tmp_path, states=False), backend="numpy")
        np.testing.assert_allclose(twin(x, None, [5, 2])[0], scan(x, None, [5, 2])[0], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("of_model", [False, True])
def test_16_bit_weights(dtype, of_model, tmp_path):
    """The file holds them so; arithmetic is in float32, with the weights as they are rounded."""
    model = gpurnn.GRU(3, 40, seed=1, backend="numpy", dtype=dtype if of_model else "float32")
    proto = proto_of(model, tmp_path, weights=None if of_model else dtype)
    assert proto.ByteSize() < 2 * model.parameter_count + 3000
    rounded = gpurnn.GRU(3, 40, backend="numpy")
    to = np.float16 if dtype == "float16" else importlib.import_module("ml_dtypes").bfloat16
    rounded.load_state_dict({name: array.astype(to).astype("float32") for name, array in model.state_dict().items()})
    check_twin(rounded, import_onnx(proto, backend="numpy"), inputs_for(rounded))


def test_what_the_file_says(tmp_path):
    model = gpurnn.Sequential(gpurnn.Embedding(5, 3, **KW), gpurnn.LSTM(3, 4, **KW), gpurnn.Linear(4, 5, **KW))
    proto = proto_of(model, tmp_path, metadata={"vocabulary": "abcde"})
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 17)]
    twin = import_onnx(tmp_path / "model.onnx", backend="numpy")
    assert twin.metadata["vocabulary"] == "abcde"
    states = {"1.h": ("float32", (1, "B", 4)), "1.c": ("float32", (1, "B", 4))}
    assert twin.inputs == {"x": ("int64", ("T", "B")), "lengths": ("int32", ("B",))} | states
    finals = {f"{name}_n": one for name, one in states.items()}
    assert twin.outputs == {"output": ("float32", ("T", "B", 5))} | finals
    known = {one.name for one in proto.graph.value_info}
    assert all(set(node.output) - {""} <= known | set(twin.outputs) for node in proto.graph.node), "no shape inferred"
    assert names_in(twin._roles.state) == ["1.h", "1.c"] and twin._roles.x == ("x",)


@pytest.mark.parametrize("score", ["dot", "general", "additive"])
def test_attention(score, tmp_path):
    layer, rng = gpurnn.Attention(4, 4, score, scale=0.5, **KW), np.random.default_rng(2)
    twin = import_onnx(proto_of(layer, tmp_path), backend="numpy")
    for T, B in SIZES:
        given = tuple(rng.normal(size=(n, B, 4)).astype("float32") for n in (3, T))
        for lengths in (None, rng.integers(0, T + 1, B)):
            found, _ = twin(given, None, lengths)
            for got, exact in zip(found, layer(*given, lengths), strict=True):
                np.testing.assert_allclose(got, exact, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("cell, tied", [("lstm", False), ("gru", True)])
def test_encoder_and_decoder(cell, tied, tmp_path):
    """The whole, and its two parts word by word."""
    rng = np.random.default_rng(3)
    model = gpurnn.EncoderDecoder(13, 17, 8, layers=2, cell=cell, tied=tied, embedding=6, **KW).eval()
    whole = import_onnx(proto_of(model, tmp_path), backend="numpy")
    encoder, decoder = (
        import_onnx(proto_of(model, tmp_path, part=one), backend="numpy") for one in ("encoder", "decoder")
    )
    for T, B in SIZES:
        source, target, lengths = rng.integers(4, 13, (T, B)), rng.integers(4, 17, (5, B)), rng.integers(1, T + 1, B)
        expected = model((source, target), (lengths, None))
        np.testing.assert_allclose(whole((source, target), None, lengths)[0], expected, rtol=0, atol=CLOSE)
        memory, state = encoder(source, None, lengths)
        for u in range(5):
            (logits, weights), state = decoder((target[u : u + 1], memory), state, lengths)
            np.testing.assert_allclose(logits, expected[u : u + 1], rtol=0, atol=CLOSE)
        assert_close(weights.sum(axis=2), np.ones((1, B)), T, dtype="float32")


@pytest.mark.parametrize("interval", [None, "80"])
@pytest.mark.parametrize("mode", ["direct", "every", "recursive"])
def test_forecasts(mode, interval, tmp_path):
    task, rng = get_task("series"), np.random.default_rng(4)
    settings = task.Settings(mode=mode, interval=interval, hidden=6, horizon=3, cell="lstm", layers=2)
    facts = {"calendar": ["hour"], "inputs": ["a"], "season": 4, "residual": "last"}
    model = task.build(settings, facts, "numpy").eval()
    twin = import_onnx(proto_of(model, tmp_path), backend="numpy")
    for T, B in SIZES:
        x = rng.normal(size=(T, B, model.children["encoder"].input_size)).astype("float32")
        if mode == "recursive":
            x = x, rng.normal(size=(T, B, model.children["decoder"].input_size - 1)).astype("float32")
        np.testing.assert_allclose(twin(x)[0], model(x), rtol=0, atol=CLOSE)


@pytest.mark.emulated
def test_on_the_emulated_gpu(tmp_path):
    """Layers as kernels, and the nodes around them as CuPy's functions."""
    ops = cuda_ops()
    models = {name: one for name, one in chains().items() if name not in ("batch first", "plain norm")}
    for name, model in models.items():
        twin = import_onnx(proto_of(model, tmp_path), backend=ops)
        x = np.array([[0, 1], [2, 3], [4, 0]]) if name == "words" else np.ones((3, 2, 3), "float32")
        got, _ = twin(ops.asarray(x, "x"), None, [3, 1])
        assert not isinstance(got, np.ndarray)
        np.testing.assert_allclose(ops.to_numpy(got), model.eval()(x, None, [3, 1])[0], rtol=0, atol=CLOSE)


# ---- what cannot be exported


class Doubled(gpurnn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_what_has_no_form_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="head: Doubled cannot be exported: expected one of BatchNorm, Dropout"):
        export_onnx(gpurnn.Sequential({"rnn": gpurnn.RNN(2, 3, **KW), "head": Doubled(3, 2, **KW)}), path)
    with pytest.raises(ValueError, match="model: batch_norm inside the time loop has no form in ONNX"):
        export_onnx(gpurnn.GRU(2, 3, batch_norm=True, **KW), path)
    with pytest.raises(TypeError, match="model: expected a gpurnn layer or model, got str"):
        export_onnx("model", path)
    with pytest.raises(ValueError, match="weights: expected 'float16', 'bfloat16' or None, got 'float64'"):
        export_onnx(gpurnn.GRU(2, 3, **KW), path, weights="float64")
    with pytest.raises(ValueError, match="part: an EncoderDecoder has parts, a GRU is exported whole"):
        export_onnx(gpurnn.GRU(2, 3, **KW), path, part="encoder")
    with pytest.raises(ValueError, match="part should be one of"):
        export_onnx(gpurnn.EncoderDecoder(9, 9, 4, **KW), path, part="middle")
    assert not path.exists()
