"""Flags are True or False, and an unknown argument is answered with the class and our word for it."""

import copy
import inspect
import pickle
import re

import numpy as np
import pytest
from helpers import values

import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.backends.cpu import uncompiled

X, IDS = values((5, 2, 6)), np.ones((5, 2), int)


class Source:
    def __len__(self):
        return 1

    def batch(self, epoch, index):
        return gpurnn.Batch(X, X)


def linear():
    return gpurnn.Linear(6, 6, backend="cpu", seed=1)


def fit(**options):
    model = linear()
    return gpurnn.fit(
        model, gpurnn.mse, Source(), optimizer=gpurnn.SGD(model, 0.1), epochs=1, **{"progress": False, **options}
    )


def evaluate(**options):
    return gpurnn.evaluate(linear(), gpurnn.mse, Source(), **options)


def forward(make):
    return lambda **o: make(6).forward(X, **o)


# Every public class and function with flags -> (a call that takes them by name, the flags).
FLAGS = {
    "LSTM": (
        lambda **o: gpurnn.LSTM(6, 5, 2, **o),
        "bias batch_first bidirectional reverse learn_state layer_norm peephole coupled residual mix_heads",
    ),
    "GRU": (
        lambda **o: gpurnn.GRU(6, 5, 2, **o),
        "bias batch_first bidirectional reverse learn_state reset_after layer_norm residual mix_heads",
    ),
    "RNN": (
        lambda **o: gpurnn.RNN(6, 5, 2, **o),
        "bias batch_first bidirectional reverse learn_state layer_norm residual mix_heads",
    ),
    "Recurrent": (
        lambda **o: gpurnn.Recurrent(gpurnn.cells.mgu, 6, 5, 2, **o),
        "bias batch_first bidirectional reverse learn_state residual mix_heads",
    ),
    "LSTMCell": (lambda **o: gpurnn.LSTMCell(6, 5, **o), "bias"),
    "GRUCell": (lambda **o: gpurnn.GRUCell(6, 5, **o), "bias reset_after"),
    "RNNCell": (lambda **o: gpurnn.RNNCell(6, 5, **o), "bias"),
    "Linear": (lambda **o: gpurnn.Linear(6, 5, **o), "bias"),
    "TiedLinear": (lambda **o: gpurnn.TiedLinear(gpurnn.Embedding(6, 5), **o), "bias"),
    "LayerNorm": (lambda **o: gpurnn.LayerNorm(6, **o), "bias"),
    "BatchNorm": (lambda **o: gpurnn.BatchNorm(6, **o), "affine batch_first"),
    "Dropout": (lambda **o: gpurnn.Dropout(0.5, **o), "variational batch_first"),
    "Pooling": (lambda **o: gpurnn.Pooling(6, **o), "batch_first"),
    "EncoderDecoder": (lambda **o: gpurnn.EncoderDecoder(9, 9, 4, **o), "tied"),
    "SGD": (lambda **o: gpurnn.SGD(linear(), 0.1, momentum=0.9, **o), "nesterov decay_biases maximize"),
    "RMSprop": (lambda **o: gpurnn.RMSprop(linear(), **o), "centered decay_biases maximize"),
    "Adam": (lambda **o: gpurnn.Adam(linear(), **o), "amsgrad decay_biases maximize"),
    "AdamW": (lambda **o: gpurnn.AdamW(linear(), **o), "amsgrad decay_biases maximize"),
    "Batch": (lambda **o: gpurnn.Batch(X, X, **o), "carry"),
    "SequenceBatches": (lambda **o: gpurnn.SequenceBatches([X], [X], 1, **o), "per_step shuffle bucket packed"),
    "LSTM.__call__": (lambda **o: gpurnn.LSTM(6, 5)(X, **o), "return_all"),
    "LSTM.forward": (lambda **o: gpurnn.LSTM(6, 5).forward(X, **o), "return_all retain"),
    "GRUCell.forward": (lambda **o: gpurnn.GRUCell(6, 5).forward(X[0], **o), "retain"),
    "Linear.forward": (forward(lambda n: gpurnn.Linear(n, 5)), "retain"),
    "Embedding.forward": (lambda **o: gpurnn.Embedding(6, 5).forward(IDS, **o), "retain"),
    "TiedLinear.forward": (forward(lambda n: gpurnn.TiedLinear(gpurnn.Embedding(9, n))), "retain"),
    "Dropout.forward": (forward(lambda n: gpurnn.Dropout(0.5)), "retain"),
    "LayerNorm.forward": (forward(gpurnn.LayerNorm), "retain"),
    "BatchNorm.forward": (forward(gpurnn.BatchNorm), "retain"),
    "Pooling.forward": (forward(gpurnn.Pooling), "retain"),
    "Attention.forward": (lambda **o: gpurnn.Attention(6, 6).forward(X, X, **o), "retain"),
    "Sequential.forward": (forward(lambda n: gpurnn.Sequential(gpurnn.Linear(n, 5))), "retain"),
    "EncoderDecoder.forward": (lambda **o: gpurnn.EncoderDecoder(9, 9, 4).forward((IDS, IDS), **o), "retain"),
    "train": (lambda **o: linear().train(**o), "mode"),
    "load_state_dict": (lambda **o: linear().load_state_dict({}, **o), "strict"),
    "cross_entropy": (lambda **o: gpurnn.cross_entropy(X, IDS, **o), "batch_first"),
    "accuracy": (lambda **o: gpurnn.accuracy(X, IDS, **o), "batch_first"),
    "mse": (lambda **o: gpurnn.mse(X, X, **o), "batch_first"),
    "mae": (lambda **o: gpurnn.mae(X, X, **o), "batch_first"),
    "huber": (lambda **o: gpurnn.huber(X, X, **o), "batch_first"),
    "smooth_l1": (lambda **o: gpurnn.smooth_l1(X, X, **o), "batch_first"),
    "kl_div": (lambda **o: gpurnn.kl_div(X, X, **o), "log_target batch_first"),
    "nll_loss": (lambda **o: gpurnn.nll_loss(X, IDS, **o), "batch_first"),
    "quantile_loss": (lambda **o: gpurnn.quantile_loss(X[..., :1], X[..., 0], [0.5], **o), "batch_first"),
    "binary_cross_entropy_with_logits": (
        lambda **o: gpurnn.binary_cross_entropy_with_logits(X, X, **o), "batch_first",
    ),
    "ctc_loss": (lambda **o: gpurnn.ctc_loss(X[:2], [[1], [1]], **o), "batch_first zero_infinity"),
    "ctc_greedy": (lambda **o: gpurnn.ctc_greedy(X, **o), "batch_first"),
    "ctc_beam_search": (lambda **o: gpurnn.ctc_beam_search(X, **o), "batch_first"),
    "cell": (lambda **o: gpurnn.cell("z", **o), "biases"),
    "fit": (fit, "resume overwrite progress flow"),
    "evaluate": (evaluate, "progress"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name, tmp_path):
    call, flags = FLAGS[name]
    for flag in flags.split():
        for wrong in ("no", "", 0.5, 1, 0, None, [], np.ones(2)):
            with pytest.raises(TypeError, match=rf"^{flag} should be True or False, got ") as caught:
                call(**{flag: wrong})
            assert repr(wrong) in str(caught.value)
        if flag not in ("resume", "progress", "strict"):
            for right in (True, False, np.True_):
                call(**{flag: right})


def test_the_table_of_flags_is_whole():
    for name in dir(gpurnn):
        public = getattr(gpurnn, name)
        if name.startswith("_") or inspect.ismodule(public) or not callable(public):
            continue
        if not inspect.isclass(public):
            flags = [p.name for p in inspect.signature(public).parameters.values() if isinstance(p.default, bool)]
        else:
            flags = [
                p.name
                for owner in public.__mro__
                if owner.__module__.startswith("gpurnn") and "__init__" in vars(owner) and not name.endswith("Cell")
                for p in inspect.signature(owner.__init__).parameters.values()
                if isinstance(p.default, bool)
            ]
        flags = set(flags) - {"batch_norm"}  # which may be a number, too
        assert flags <= set(FLAGS.get(name, (None, ""))[1].split()), name


def test_every_forward_looks_at_retain():
    for name in dir(gpurnn):
        public = getattr(gpurnn, name)
        if inspect.isclass(public) and hasattr(public, "forward") and not name.endswith("Cell"):
            owner = next(owner for owner in public.__mro__ if "forward" in vars(owner))
            named = [other for other in FLAGS if other.endswith(".forward") and "retain" in FLAGS[other][1]]
            assert any(getattr(gpurnn, n.partition(".")[0]).forward is owner.forward for n in named), name


@pytest.mark.parametrize("cls", [gpurnn.LSTM, gpurnn.GRU, gpurnn.RNN, gpurnn.LSTMCell, gpurnn.GRUCell, gpurnn.RNNCell])
def test_recurrent_layers_speak_of_themselves(cls):
    with pytest.raises(
        TypeError, match=rf"^{cls.__name__}: hidden_size is missing: {cls.__name__}\(input_size, hidden_size\)"
    ):
        cls(3)
    with pytest.raises(TypeError, match=rf"^{cls.__name__}.__init__\(\) takes from"):
        cls(*[3] * 12)
    with pytest.raises(TypeError, match="unknown argument 'colour'. It takes input_size, hidden_size, ") as caught:
        cls(3, 4, colour=1)
    listed = str(caught.value).partition("It takes ")[2].split(", ")
    assert "cell" not in listed
    values = {"init": "xavier", "schedule": "auto", "backend": "cpu", "dtype": "float64", "precision": "float32"}
    values |= {"nonlinearity": "relu", "hidden_size": 5, "input_size": 3, "num_layers": 2, "proj_size": 2, "chrono": 9}
    values |= {"seed": 1, "forget_bias": 1.0, "wavefront": 1, "dropout": 0.0, "residual": False, "heads": 2}
    values |= {"masked_output": "repeat", "reset_to": "initial", "memory": "1GB", "save": "states"}
    values |= dict.fromkeys(("recurrent_dropout", "zoneout", "weight_dropout", "cell_clip", "gradient_clip"), 0.5)
    values |= {"recurrent_dropout_each": "sequence", "activation": "relu", "recurrent_activation": "hard_sigmoid"}
    # else True
    least = {"input_size": 3, "hidden_size": 4}
    for name in listed:  # each can be given
        cls(**least | {name: values.get(name, True)})
    with pytest.raises(TypeError, match="unknown argument 'cell'"):
        cls(3, 4, cell=None)


def test_arguments_by_position_as_in_torch():
    layer = gpurnn.LSTM(3, 4, 2, False, True, 0.5, False, 2)
    assert (layer.bias, layer.batch_first, layer.dropout, layer.bidirectional, layer.proj_size) == (
        False, True, 0.5, False, 2,
    )  # fmt: skip
    layer = gpurnn.GRU(3, 4, 2, False, True, 0.5, True)
    assert (layer.bias, layer.batch_first, layer.dropout, layer.bidirectional) == (False, True, 0.5, True)


def test_errors_say_what_was_meant():
    h = np.zeros((1, 2, 5), "float32")
    lstm, single, table = gpurnn.LSTM(6, 5), gpurnn.LSTMCell(6, 5), gpurnn.Embedding(9, 6)
    translator = gpurnn.EncoderDecoder(9, 8, 4)
    for call, error, message in (
        (lambda: lstm(None), gpurnn.DtypeError, "^x: expected an array of numbers of dtype float32, got None$"),
        (lambda: lstm("abc"), gpurnn.DtypeError, "^x: expected an array .*, got 'abc'$"),
        (lambda: linear()(["a", "b"]), gpurnn.DtypeError, "^x: expected an array .*, got a list of str$"),
        (lambda: linear()(X.astype(object)), gpurnn.DtypeError, "^x: expected an array .*, got an array of object$"),
        (lambda: lstm(X, (h, None)), gpurnn.DtypeError, "^state c: expected an array .*, got None$"),
        (lambda: single(X[0], (h[0], None)), gpurnn.DtypeError, "^state c: expected an array .*, got None$"),
        (lambda: lstm(X, (h, h.astype(int))), gpurnn.DtypeError, r"^state c: .* Convert it: c = c.astype\('float32'\)"),
        (lambda: linear()(X.astype(int)), gpurnn.DtypeError, r"^x: .* Convert it: x = x.astype\('float32'\)$"),
        (lambda: gpurnn.SGD(linear(), -1), ValueError, r"^lr should be a finite number in \[0.0, inf\), got -1"),
        (lambda: gpurnn.LayerNorm(3, np.inf), ValueError, r"^eps should be a finite number in \[0, inf\), got inf"),
        (
            lambda: gpurnn.LSTM(3, 4, forget_bias=np.nan), ValueError,
            r"^forget_bias should be a finite number in \(-inf, inf\), got nan",
        ),
        (
            lambda: gpurnn.Sequential([linear(), linear()]), TypeError,
            r"^Sequential: got a list. Give the layers one by one: Sequential\(a, b\)$",
        ),
        (lambda: gpurnn.Sequential((linear(),)), TypeError, "^Sequential: got a tuple. Give the layers one by one"),
        (
            lambda: lstm.params["weight"], KeyError,
            "no parameter is called 'weight'; did you mean weight_.*, weight_.*[?]",
        ),
        (lambda: lstm.params["size"], KeyError, "no parameter is called 'size'; there are weight_ih_l0, weight_hh"),
        (lambda: lstm.params.__setitem__("weight", 0), KeyError, "no parameter is called 'weight'; did you mean "),
        (lambda: lstm.grads[0], KeyError, "no parameter is called 0; there are weight_ih_l0, "),
        (lambda: gpurnn.Dropout(0.5).params["weight"], KeyError, "no parameter is called 'weight'; there are none"),
        (lambda: table([[9]]), ValueError, "^ids: expected numbers from 0 to 8, got 9"),
        (lambda: translator((IDS + 8, IDS)), ValueError, "^source: expected numbers from 0 to 8, got 9"),
        (lambda: translator.forward((IDS, IDS - 2)), ValueError, "^target: expected numbers from 0 to 7, got -1"),
        (lambda: translator((IDS, IDS * 0.5)), gpurnn.DtypeError, "^target: expected integers, got float64"),
    ):  # fmt: skip
        with pytest.raises(error, match=message if error is not KeyError else None) as caught:
            call()
        if error is KeyError:
            assert re.match(message, caught.value.args[0])
    assert "weight" not in lstm.params and lstm.params.get("weight") is None


def test_a_dtype_of_torch():
    torch = pytest.importorskip("torch")
    for make in (lambda d: gpurnn.LSTM(3, 4, dtype=d), lambda d: gpurnn.Linear(3, 4, dtype=d)):
        with pytest.raises(gpurnn.DtypeError, match="got torch.float32: give a string such as 'float32'$"):
            make(torch.float32)


def test_why_there_is_no_compiled_code(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_ops, "load_native", lambda: None)
    assert "this checkout was not built. Compiled, small layers are 5 to 8 times as fast" in cpu_ops.describe()
    monkeypatch.setattr(uncompiled, "__file__", str(tmp_path / "gpurnn/backends/cpu/uncompiled.py"))
    assert "installed without a C++ compiler" in cpu_ops.describe()


def test_a_flag_is_no_number():
    with pytest.raises(TypeError, match="^directions should be an int, got bool"):
        gpurnn.Pooling(4, directions=True)
    with pytest.raises(ValueError, match="^directions should be one of 1, 2, got 3"):
        gpurnn.Pooling(3, directions=3)
    with pytest.raises(ValueError, match=r"^cell should be one of .*, got \['lstm'\]"):
        gpurnn.EncoderDecoder(9, 9, 4, cell=["lstm"])


def test_a_number_in_the_place_of_a_flag():
    with pytest.raises(TypeError, match="^bias should be True or False, got 0.5"):
        gpurnn.GRU(3, 4, 2, 0.5)


@pytest.mark.parametrize(
    "make, word, answer",
    [
        (lambda: gpurnn.LSTM(3, units=4), "units", "hidden_size"),
        (lambda: gpurnn.GRU(3, 4, device="cpu"), "device", "backend"),
        (lambda: gpurnn.RNN(3, 4, n_layers=2), "n_layers", "num_layers"),
        (lambda: gpurnn.LSTM(3, 4, nonlinearity="relu"), "nonlinearity", "RNN"),
        (lambda: gpurnn.RNN(3, 4, activation="relu"), "activation", "nonlinearity"),
        (lambda: gpurnn.LSTM(3, 4, return_sequences=True), "return_sequences", "Pooling"),
        (lambda: gpurnn.LSTM(3, 4, return_state=True), "return_state", "state"),
        (lambda: gpurnn.LSTM(3, 4, stateful=True), "stateful", "state"),
        (lambda: gpurnn.LSTM(3, 4, go_backwards=True), "go_backwards", "reverse"),
        (lambda: gpurnn.LSTM(3, 4, time_major=True), "time_major", "batch_first"),
        (lambda: gpurnn.LSTM(3, 4, use_bias=True), "use_bias", "bias"),
        (
            lambda: gpurnn.LSTM(3, 4, variational_dropout=0.1),
            "variational_dropout",
            'recurrent_dropout with recurrent_dropout_each="sequence"',
        ),
        (lambda: gpurnn.RNN(3, 4, variational_dropout=0.1), "variational_dropout", "is called recurrent_dropout"),
        (lambda: gpurnn.Dropout(0.5, variational_dropout=True), "variational_dropout", "is called variational"),
        (lambda: gpurnn.RNN(3, 4, recurrent_dropout_each="sequence"), "recurrent_dropout_each", "sequence alone: give"),
        (lambda: gpurnn.LSTM(3, 4, wdrop=0.1), "wdrop", "Here it is called weight_dropout"),
        (lambda: gpurnn.LSTM(3, 4, recurrent_initializer="x"), "recurrent_initializer", "Here it is called init"),
        (lambda: gpurnn.LSTM(3, 4, cifg=True), "cifg", "Here it is called coupled"),
        (lambda: gpurnn.GRU(3, 4, cifg=True), "cifg", "Here it is called coupled. LSTM has it; a GRU always"),
        (lambda: gpurnn.LSTM(3, 4, skip=True), "skip", "Here it is called residual"),
        (lambda: gpurnn.RNN(3, 4, residual_connections=True), "residual_connections", "Here it is called residual"),
        (lambda: gpurnn.GRU(3, 4, peephole=True), "peephole", "LSTM has it; a GRU has no c"),
        (lambda: gpurnn.GRU(3, 4, coupled=True), "coupled", "LSTM has it; a GRU always writes 1 - z"),
        (lambda: gpurnn.GRU(3, 4, cell_clip=1.0), "cell_clip", "LSTM has it; a GRU has no c"),
        (lambda: gpurnn.RNN(3, 4, cell_clip=1.0), "cell_clip", "LSTM has it; an RNN has no c"),
        (lambda: gpurnn.RNNCell(3, 4, activation="relu"), "activation", "Here it is called nonlinearity"),
        (lambda: gpurnn.LSTM(3, 4, bidirectionel=True), "bidirectionel", "bidirectional"),
        (lambda: gpurnn.LSTM(3, 4, colour=1), "colour", "hidden_size"),
        (lambda: gpurnn.GRU(3, 4, proj_size=2), "proj_size", "LSTM"),
        (lambda: gpurnn.RNN(3, 4, forget_bias=1.0), "forget_bias", "It is of gates, and an RNN has none"),
        (lambda: gpurnn.RNN(3, 4, unit_forget_bias=True), "unit_forget_bias", "It is of gates, and an RNN has none"),
        (lambda: gpurnn.RNN(3, 4, proj_size=2), "proj_size", "LSTM has it; RNN has no projection"),
        (lambda: gpurnn.GRU(3, 4, forget_bias=1.0), "forget_bias", "A GRU has no forget gate; chrono sets"),
        (lambda: gpurnn.GRU(3, 4, unit_forget_bias=True), "unit_forget_bias", "A GRU has no forget gate; chrono sets"),
        (lambda: gpurnn.LSTM(3, 4, unit_forget_bias=True), "unit_forget_bias", "Give forget_bias=1.0"),
        (lambda: gpurnn.LSTMCell(3, 4, num_layers=2), "num_layers", "LSTM"),
        (lambda: gpurnn.GRUCell(3, 4, units=2), "units", "hidden_size"),
        (lambda: gpurnn.Linear(3, units=4), "units", "out_features"),
        (lambda: gpurnn.Linear(input_size=3, out_features=4), "input_size", "in_features"),
        (lambda: gpurnn.Embedding(3, 4, device="cpu"), "device", "backend"),
        (lambda: gpurnn.Embedding(vocab_size=3, embedding_dim=4), "vocab_size", "num_embeddings"),
        (lambda: gpurnn.Dropout(p=0.5), "p", "rate"),
        (lambda: gpurnn.LayerNorm(normalized_shape=3), "normalized_shape", "features"),
        (lambda: gpurnn.BatchNorm(num_features=3), "num_features", "features"),
        (lambda: gpurnn.BatchNorm(3, epsilon=1e-3), "epsilon", "eps"),
        (lambda: gpurnn.Adam(linear(), learning_rate=1e-3), "learning_rate", "lr"),
        (lambda: gpurnn.Adam(params=[]), "params", "model"),
        (lambda: gpurnn.CosineSchedule(gpurnn.SGD(linear(), 0.1), T_max=3), "T_max", "total"),
        (lambda: gpurnn.EncoderDecoder(9, 9, hidden_size=4), "hidden_size", "hidden"),
        (lambda: gpurnn.Attention(3, 4, dropout=0.5), "dropout", "query_size"),
        (lambda: gpurnn.Sequential(device="cpu"), "device", "by position"),
        (lambda: gpurnn.LSTM(3, 4, h0=1), "h0", "state"),
        (lambda: gpurnn.LSTM(6, 5)(X, hx=None), "hx", "state"),
        (lambda: gpurnn.LSTM(6, 5).forward(X, initial_state=None), "initial_state", "state"),
        (lambda: gpurnn.LSTM(6, 5).forward(X, retain_graph=True), "retain_graph", "retain"),
        (lambda: gpurnn.GRUCell(6, 5).forward(X[0], retain_graph=True), "retain_graph", "retain"),
        (lambda: gpurnn.Sequential(gpurnn.GRU(6, 5)).forward(X, retain_graph=True), "retain_graph", "retain"),
        (lambda: gpurnn.LSTM(6, 5).forward(X, colour=1), "colour", "retain"),
        (lambda: gpurnn.LSTM(6, 5)(X, retain=True), "retain", "forward(..., retain=True)"),
        (lambda: gpurnn.LSTM(6, 5)(X, retain_graph=True), "retain_graph", "forward(..., retain=True)"),
        (lambda: gpurnn.GRU(6, 5)(X, padding_mask=None), "padding_mask", "mask=~padding_mask"),
        (lambda: gpurnn.GRU(6, 5)(X, sequence_length=None), "sequence_length", "lengths"),
        (lambda: gpurnn.GRU(6, 5)(X, training=True), "training", "train()"),
        (lambda: gpurnn.GRU(6, 5).step(X[0], hx=None), "hx", "state"),
        (lambda: gpurnn.GRUCell(6, 5)(X[0], hx=None), "hx", "state"),
        (lambda: gpurnn.GRUCell(6, 5).forward(X[0], hx=None), "hx", "state"),
        (lambda: gpurnn.Sequential(gpurnn.GRU(6, 5))(X, hx=None), "hx", "state"),
        (lambda: gpurnn.Sequential(gpurnn.GRU(6, 5)).forward(X, masks=None), "masks", "mask"),
    ],
)
def test_an_unknown_argument_is_answered_with_our_word(make, word, answer):
    with pytest.raises(TypeError, match=rf"^(\w+): unknown argument '{word}'") as caught:
        make()
    message = str(caught.value)
    assert message.partition(":")[0] in dir(gpurnn) and answer in message.partition("'. ")[2]


LAYERS = {
    "Dropout": lambda **o: gpurnn.Dropout(**{"rate": 0.5, **o}),
    "LayerNorm": lambda **o: gpurnn.LayerNorm(6, **o),
    "BatchNorm": lambda **o: gpurnn.BatchNorm(6, **o),
    "Pooling": lambda **o: gpurnn.Pooling(6, **o),
    "Attention": lambda **o: gpurnn.Attention(6, 6, **o),
    "LSTM": lambda **o: gpurnn.LSTM(6, 5, num_layers=2, **o),
    "GRU": lambda **o: gpurnn.GRU(6, 5, **o),
    "RNN": lambda **o: gpurnn.RNN(6, 5, num_layers=2, bidirectional=True, **o),
    "LossScaler": lambda **o: gpurnn.LossScaler(**o),
    "SGD": lambda **o: gpurnn.SGD(linear(), **{"lr": 0.1, **o}),
}
SET_LATER = [  # kind, attribute, a value that is taken, some that are refused
    ("Dropout", "rate", 0.25, (2, -1, "a", None, True, np.nan)),
    ("Dropout", "variational", True, (1, "no")),
    ("Dropout", "batch_first", True, ("no", 0)),
    ("LayerNorm", "eps", 1, (-1, "a", np.inf)),
    ("BatchNorm", "eps", 1, (-1, "a")),
    ("BatchNorm", "momentum", 0.5, (2, -1, "a")),
    ("BatchNorm", "batch_first", True, ("no",)),
    ("Pooling", "batch_first", True, ("no",)),
    ("Attention", "scale", 2, (0, -1, "a")),
    ("LSTM", "dropout", 0.5, (5, -1, "a")),
    ("LSTM", "batch_first", True, ("no", 1)),
    ("LSTM", "schedule", "step", ("fast", None, 1)),
    ("LSTM", "wavefront", 3, (-1, 0.5, "a")),
    ("GRU", "dropout", 0, (0.5, 2)),
    ("RNN", "wavefront", 0, (1, -1)),
    ("LSTM", "memory", "sqrt", ("root", 0, -1, 0.5, True)),
    ("LossScaler", "growth_factor", 3, (1, "a")),
    ("LossScaler", "backoff_factor", 0.25, (0, 1, "a")),
    ("LossScaler", "growth_interval", 7, (0, 0.5)),
    ("SGD", "lr", 0.5, (-1, "a", np.nan)),
]


@pytest.mark.parametrize("kind, name, right, wrong", SET_LATER)
def test_what_is_set_later_is_checked_as_in_the_constructor(kind, name, right, wrong):
    made = LAYERS[kind]()
    setattr(made, name, right)
    assert getattr(made, name) == right == getattr(LAYERS[kind](**{name: right}), name)
    assert getattr(copy.deepcopy(made), name) == right
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=name) as first:
            LAYERS[kind](**{name: value})
        with pytest.raises(first.type) as later:
            setattr(made, name, value)
        assert str(later.value) == str(first.value)
        assert getattr(made, name) == right


def test_the_mode_and_the_sampling_are_checked_too():
    model = gpurnn.EncoderDecoder(9, 9, 4)
    with pytest.raises(TypeError, match="^training should be True or False, got 'no'"):
        model.training = "no"
    with pytest.raises(TypeError, match="^sampling should be a Sampling or None, got 0.5"):
        model.sampling = 0.5
    model.sampling = gpurnn.seq2seq.Sampling(0.5, 10)
    assert model.training is True and model.sampling.rate == 0.5


def test_classes_of_ones_own_take_what_they_like():
    class Mine(gpurnn.Linear):
        def __init__(self, units, **more):
            super().__init__(3, units, **more)

    class Other(gpurnn.Module):
        def __init__(self, *, units):
            super().__init__("cpu")
            self.units = units

    class Settings(gpurnn.Module):
        def __init__(self, **settings):
            super().__init__("cpu")
            self.settings = settings

    assert Mine(units=4, seed=1).out_features == 4 and Other(units=3).units == 3
    assert Settings(units=3).settings == {"units": 3}
    with pytest.raises(TypeError, match="Mine|Linear"):
        Mine(units=4, colour=1)
    assert copy.deepcopy(linear()).in_features == 6
    assert pickle is not None


def test_glorot_is_xavier():
    with pytest.raises(
        ValueError, match=r"^init should be one of 'uniform', .*, got 'glorot': here it is called 'xavier'$"
    ):
        gpurnn.LSTM(3, 4, init="glorot")
    with pytest.raises(ValueError, match="got 'other'$"):
        gpurnn.errors.check_choice("name", "other", (None, "one"))
    with pytest.raises(ValueError, match=r"^schedule should be one of .*, got 'glorot'$"):
        gpurnn.LSTM(3, 4, schedule="glorot")
