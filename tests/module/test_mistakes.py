"""Mistakes that people make in their first hour: which message each of them gets."""

import copy
import pickle

import numpy as np
import pytest
from optional import optional

import gpurnn
from gpurnn import GRU, LSTM, RNN, Dropout, DtypeError, Linear, Sequential, ShapeError

torch = optional("torch")


def f32(*shape):
    return np.ones(shape, "float32")


def loss_instead_of_gradient(model):
    output, *_, backward = model.forward(f32(5, 3, 4))
    _, dloss = gpurnn.mse(output, np.zeros_like(output))
    backward(dloss)


def weights_changed(change):
    layer = LSTM(4, 8, seed=0)
    output, _, backward = layer.forward(f32(5, 3, 4))
    change(layer)
    backward(output)


def adam_step(layer):
    layer.flat_grads[...] = 1
    gpurnn.Adam(layer).step()


def with_layers():
    model = gpurnn.Module()
    model.blocks = [Linear(2, 2)]
    return model


STATE = np.ones((1, 3, 8))
CLASSES = np.zeros((5, 3), int)
CALL_IT = "expected an array, got a function. Call it: backward(dloss())"
AS_FLOAT32 = "dtype (float64) does not match the layer's (float32). Convert it: "
MISTAKES = {
    # the backward of the loss is not called
    "b(dl)": (lambda: loss_instead_of_gradient(LSTM(4, 8)), TypeError, f"doutput: {CALL_IT}"),
    "b(dl), Sequential": (
        lambda: loss_instead_of_gradient(Sequential(LSTM(4, 8), Linear(8, 2))), TypeError, f"doutput: {CALL_IT}",
    ),
    "b(dl), Linear": (lambda: loss_instead_of_gradient(Linear(4, 2)), TypeError, f"doutput: {CALL_IT}"),
    "b(), Linear": (
        lambda: Linear(4, 2).forward(f32(3, 4))[1](), TypeError,
        "Linear.backward() missing 1 required positional argument: 'doutput'",
    ),
    "b(), Sequential": (
        lambda: Sequential(LSTM(4, 8)).forward(f32(5, 3, 4))[2](), TypeError,
        "Sequential.backward() missing 1 required positional argument: 'doutput'",
    ),
    "b(dy=), LSTM": (
        lambda: LSTM(4, 8).forward(f32(5, 3, 4))[2](dy=None), TypeError, "LSTM.backward() got an unexpected keyword",
    ),
    "b(), LSTMCell": (
        lambda: gpurnn.LSTMCell(4, 8).forward(f32(3, 4))[1](), TypeError, "LSTMCell.backward() missing 1 required",
    ),
    # axes
    "batch first, lengths": (
        lambda: LSTM(4, 8)(f32(3, 5, 4), lengths=[5, 4, 3]), ShapeError,
        "lengths: expected one length for each of the 5 sequences, got shape (3,); arrays are time-major, (T, B, ...): "
        "for (B, T, ...), with T = 5, give batch_first=True",
    ),
    "batch first, lengths of a loss": (
        lambda: gpurnn.mse(f32(3, 5, 2), f32(3, 5, 2), lengths=[5, 4, 3]), ShapeError, "give batch_first=True",
    ),
    "time major, lengths": (
        lambda: LSTM(4, 8, batch_first=True)(f32(5, 3, 4), lengths=[5, 5, 5]), ShapeError,
        "got shape (3,); with batch_first=True arrays are (B, T, ...), here (5, 3, ...): for (T, B, ...) leave it out",
    ),
    "time major, lengths, Sequential": (
        lambda: Sequential(Linear(4, 4), GRU(4, 8, batch_first=True))(f32(5, 3, 4), lengths=[5, 5, 5]), ShapeError,
        "with batch_first=True arrays are (B, T, ...), here (5, 3, ...)",
    ),
    "time major, lengths, Pooling": (
        lambda: gpurnn.Pooling(4, batch_first=True)(f32(5, 3, 4), lengths=[5, 5, 5]), ShapeError,
        "with batch_first=True arrays are (B, T, ...), here (5, 3, ...)",
    ),
    "time major, lengths of CTC": (
        lambda: gpurnn.ctc_loss(f32(5, 3, 2), [[1]] * 5, lengths=[5, 5, 5], batch_first=True), ShapeError,
        "with batch_first=True arrays are (B, T, ...), here (5, 3, ...)",
    ),
    "a mask as lengths": (
        lambda: LSTM(4, 8, batch_first=True)(f32(3, 5, 4), lengths=np.ones((3, 5), bool)), DtypeError,
        "lengths: expected integers, got bool. Of a mask give how many steps count: mask.sum(axis=1)",
    ),
    "time major, lengths of a loss": (
        lambda: gpurnn.mse(f32(5, 3, 2), f32(5, 3, 2), lengths=[5, 5, 5], batch_first=True), ShapeError,
        "with batch_first=True arrays are (B, T, ...), here (5, 3, ...)",
    ),
    # arguments
    "LSTM(8)": (lambda: LSTM(8), TypeError, "LSTM: hidden_size is missing: LSTM(input_size, hidden_size)"),
    "SGD(m)": (lambda: gpurnn.SGD(LSTM(4, 8)), TypeError, "SGD: lr is missing: SGD(model, lr)"),
    "CosineSchedule(opt)": (
        lambda: gpurnn.CosineSchedule(gpurnn.Adam(LSTM(4, 8))), TypeError, "CosineSchedule: total is missing: Cos",
    ),
    "Linear(out_features=)": (
        lambda: Linear(out_features=8), TypeError, "Linear: in_features is missing: Linear(in_features, out_features)",
    ),
    "a function as a layer": (
        lambda: Sequential(LSTM(4, 8), np.tanh), TypeError,
        "1: expected a gpurnn layer, got ufunc. No layer applies a function: write a Module that does",
    ),
    "Adam.zero_grad": (
        lambda: gpurnn.Adam(LSTM(4, 8)).zero_grad(), AttributeError, "no attribute 'zero_grad'; model.zero_grad() does",
    ),
    "TextBatches(text)": (
        lambda: gpurnn.TextBatches("hello", 4, 8), ShapeError, "1-D array of character or word numbers, got 'hello'",
    ),
    # losses
    "target list": (
        lambda: gpurnn.mse(f32(3, 2), f32(3, 2).tolist()), DtypeError,
        "Convert it: target = np.asarray(target, 'float32')",
    ),
    "targets list": (
        lambda: gpurnn.cross_entropy(f32(1, 2), [[0.5, 0.5]]), DtypeError, "targets = np.asarray(targets, 'float32')",
    ),
    **{
        f"(output, state), {name}": (
            lambda loss=loss: loss(LSTM(4, 2)(f32(5, 3, 4))), TypeError,
            "got a tuple. A recurrent model returns (output, state): give the first, output",
        )
        for name, loss in {
            "cross_entropy": lambda output: gpurnn.cross_entropy(output, CLASSES),
            "nll_loss": lambda output: gpurnn.nll_loss(output, CLASSES),
            "kl_div": lambda output: gpurnn.kl_div(output, f32(5, 3, 2)),
            "binary": lambda output: gpurnn.binary_cross_entropy_with_logits(output, f32(5, 3, 2)),
            "mse": lambda output: gpurnn.mse(output, f32(5, 3, 2)),
            "mae": lambda output: gpurnn.mae(output, f32(5, 3, 2)),
            "huber": lambda output: gpurnn.huber(output, f32(5, 3, 2)),
            "smooth_l1": lambda output: gpurnn.smooth_l1(output, f32(5, 3, 2)),
            "quantile_loss": lambda output: gpurnn.quantile_loss(output, f32(5, 3), [0.1, 0.9]),
            "ctc_loss": lambda output: gpurnn.ctc_loss(output, [[1]] * 3),
            "ctc_greedy": lambda output: gpurnn.ctc_greedy(output),
            "ctc_beam_search": lambda output: gpurnn.ctc_beam_search(output),
        }.items()
    },
    "classes on axis 1": (
        lambda: gpurnn.cross_entropy(f32(5, 2, 3), CLASSES), ShapeError,
        "got (5, 3). The classes are the last axis of logits, not axis 1: give np.moveaxis(logits, 1, -1)",
    ),
    "one-hot integers": (
        lambda: gpurnn.cross_entropy(f32(5, 3, 2), np.eye(2, dtype=int)[CLASSES]), ShapeError,
        "targets: expected shape (5, 3), got (5, 3, 2). Of one-hot targets give the classes: targets = targets.argmax",
    ),
    "one-hot booleans": (
        lambda: gpurnn.cross_entropy(f32(5, 3, 2), np.eye(2, dtype=bool)[CLASSES]), DtypeError,
        "got bool. Of one-hot targets give the classes: targets = targets.argmax(-1)",
    ),
    "classes with an axis more": (
        lambda: gpurnn.cross_entropy(f32(3, 5), np.ones((3, 1), int)), ShapeError,
        "targets: expected shape (3,), got (3, 1). Drop the last axis: targets = targets[..., 0]",
    ),
    "weight of one class more": (
        lambda: gpurnn.cross_entropy(f32(5, 3, 2), CLASSES, weight=[1, 2, 3]), ShapeError,
        "weight: expected shape (2,), got (3,)",
    ),
    "targets no probabilities": (
        lambda: gpurnn.cross_entropy(f32(5, 3, 2), f32(5, 3, 2)), ValueError,
        "targets: expected probabilities of all 2 classes (one-hot, or at least 0 with a sum of 1), got a sum of 2",
    ),
    "targets negative": (
        lambda: gpurnn.cross_entropy(f32(1, 2), np.array([[-0.5, 1.5]], "float32")), ValueError, "sum of 1), got -0.5",
    ),
    # changes in between
    "weights changed": (
        lambda: weights_changed(adam_step), RuntimeError,
        "backward: parameter weight_ih_l0 was changed (version 1 at forward, 2 now)",
    ),
    "a weight set": (
        lambda: weights_changed(lambda layer: layer.params.__setitem__("bias_ih_l0", 3)), RuntimeError,
        "backward: parameter bias_ih_l0 was changed",
    ),
    # dtypes
    "state float64": (lambda: GRU(4, 8)(f32(5, 3, 4), STATE), DtypeError, "state = state.astype('float32')"),
    "state h float64": (
        lambda: LSTM(4, 8)(f32(5, 3, 4), (STATE, STATE)), DtypeError,
        f"state h: {AS_FLOAT32}h = h.astype('float32')",
    ),
    "state list": (
        lambda: GRU(4, 8)(f32(5, 3, 4), STATE.tolist()), DtypeError,
        f"state: {AS_FLOAT32}state = np.asarray(state, 'float32')",
    ),
    "x list": (
        lambda: LSTM(4, 8)(f32(5, 3, 4).tolist()), DtypeError, f"x: {AS_FLOAT32}x = np.asarray(x, 'float32')",
    ),
    "x float64": (lambda: Linear(4, 8)(np.ones((3, 4))), DtypeError, f"x: {AS_FLOAT32}x = x.astype('float32')"),
    "x double of torch": (
        lambda: Linear(4, 8)(torch.ones(3, 4).double()), DtypeError, f"x: {AS_FLOAT32}x = x.to(torch.float32)",
    ),
    "x requires grad": (
        lambda: LSTM(4, 4)(torch.ones(5, 3, 4, requires_grad=True)), TypeError,
        "x: this tensor requires grad, and no gradient would come back to it",
    ),
    "x requires grad, the cure": (
        lambda: LSTM(4, 4)(torch.ones(5, 3, 4, requires_grad=True)), TypeError, "Give x.detach()",
    ),
    # words of other libraries
    "units": (lambda: LSTM(4, units=8), TypeError, "LSTM: unknown argument 'units'. Here it is called hidden_size"),
    "units, Linear": (lambda: Linear(4, units=8), TypeError, "Linear: unknown argument 'units'. Here it is called out"),
    "return_sequences": (
        lambda: GRU(4, 8, return_sequences=True), TypeError,
        "GRU: unknown argument 'return_sequences'. The outputs of all steps are always returned; the layer Pooling",
    ),
    "device": (
        lambda: LSTM(4, 8, device="cuda"), TypeError, "LSTM: unknown argument 'device'. Here it is called backend",
    ),
    "hx": (
        lambda: LSTM(4, 8)(f32(5, 3, 4), hx=None), TypeError, "LSTM: unknown argument 'hx'. Here it is called state",
    ),
    "hx, built": (lambda: GRU(4, 8, hx=None), TypeError, "The initial state is given to the call, as state"),
    "mask": (
        lambda: LSTM(4, 8)(f32(5, 3, 4), mask=[1, 0]), DtypeError, "mask: expected booleans, got a list of numbers",
    ),
    "mask, shape": (
        lambda: LSTM(4, 8)(f32(5, 3, 4), mask=np.ones(3, bool)),
        ShapeError,
        "mask: expected one boolean for each timestep, (T, B) = (5, 3), got (3,)",
    ),
    "reset, batch_first": (
        lambda: LSTM(4, 8, batch_first=True)(f32(5, 3, 4), reset=np.ones((3, 5), bool)),
        ShapeError,
        "reset: expected one boolean for each timestep, (B, T) = (5, 3), got (3, 5)",
    ),
    "mask, Sequential": (
        lambda: Sequential(Linear(4, 4))(f32(5, 3, 4), mask=[1, 0]), DtypeError, "mask: expected booleans, got a list",
    ),
    "mask, EncoderDecoder": (
        lambda: gpurnn.EncoderDecoder(9, 9, 4)((np.ones((3, 2), int), np.ones((2, 2), int)), mask=np.ones((3, 2))),
        TypeError, "EncoderDecoder: unknown argument 'mask'. It belongs to a call of a recurrent layer or a Sequential",
    ),
    "mask, built": (lambda: LSTM(4, 8, mask=None), TypeError, "It belongs to a call of a recurrent layer"),
    "activation, Linear": (
        lambda: Linear(8, 2, activation="relu"), TypeError,
        "Linear: unknown argument 'activation'. No layer applies one: write a Module that does",
    ),
    "activation, RNN": (lambda: RNN(8, 2, activation="relu"), TypeError, "Here it is called nonlinearity"),
    "dropconnect": (lambda: LSTM(8, 2, dropconnect=0.1), TypeError, "Here it is called weight_dropout"),
    "Sequential(lstm=)": (
        lambda: Sequential(lstm=LSTM(4, 8)), TypeError,
        "Sequential: unknown argument 'lstm'. Names of layers are given in a dict: Sequential({'lstm': ...})",
    ),
    "a class": (
        lambda: Sequential(LSTM, Linear), TypeError, "0: expected a gpurnn layer, got the class LSTM: call it, LSTM(.",
    ),
    "a class, second": (lambda: Sequential(LSTM(4, 8), Linear), TypeError, "1: expected a gpurnn layer, got the class"),
    "a class in a list": (
        lambda: setattr(gpurnn.Module(), "a", [LSTM(4, 8), Linear]), TypeError, "in a list, got the class Linear: call",
    ),
    # states
    "pair to a GRU": (
        lambda: GRU(4, 8)(f32(5, 3, 4), (f32(1, 3, 8), f32(1, 3, 8))), ShapeError,
        "state: expected h alone, got a pair: only an LSTM has c, this is a GRU",
    ),
    "pair to a GRU, one sequence": (
        lambda: GRU(4, 8)(f32(5, 4), (f32(1, 8), f32(1, 8))), ShapeError, "state: expected h alone, got a pair",
    ),
    "pair to a Sequential": (
        lambda: Sequential(LSTM(4, 8))(f32(5, 3, 4), (f32(1, 3, 8), f32(1, 3, 8))), ShapeError,
        "got 2 entries. The pair of an LSTM is one entry: give ((h, c),)",
    ),
    "pair of gradients to a Sequential": (
        lambda: Sequential(LSTM(4, 8)).forward(f32(5, 3, 4))[2](None, (f32(1, 3, 8), f32(1, 3, 8))), ShapeError,
        "dstate: expected a tuple with one entry for each of 1 stateful layers, got 2 entries. The pair of an LSTM is "
        "one entry: give ((dh, dc),)",
    ),
    "h to a Sequential": (
        lambda: Sequential(GRU(4, 8))(f32(5, 3, 4), f32(1, 3, 8)), ShapeError, "got ndarray. What one layer",
    ),
    # the loss, not its gradient
    **{
        f"b({kind}), {name}": (
            lambda make=make, loss=loss: make().forward(f32(5, 3, 4))[-1](loss), ShapeError,
            "doutput: expected the gradient of the output, of shape (5, 3, 4), got one number. Give what the loss's "
            "backward returns, not the loss: backward(dloss())",
        )
        for kind, loss in {"float(loss)": 1.5, "loss": np.float32(1.5), "0-d": np.array(1.5, "float32")}.items()
        for name, make in {
            "LSTM": lambda: LSTM(4, 4), "Linear": lambda: Linear(4, 4), "Sequential": lambda: Sequential(Linear(4, 4)),
        }.items()
    },
    # names of other libraries
    ".backward": (
        lambda: Linear(2, 2).backward(), AttributeError,
        "'Linear' object has no attribute 'backward'; forward(x) returns the backward function, behind the output",
    ),
    ".fit": (lambda: Linear(2, 2).fit(), AttributeError, "; gpurnn.fit(model, loss, batches, optimizer='adam'"),
    ".predict": (lambda: Linear(2, 2).predict(), AttributeError, "; call the model: model(x), after model.eval()"),
    ".to": (lambda: Linear(2, 2).to("cuda"), AttributeError, "; backend and dtype are chosen at construction:"),
    ".cuda": (lambda: Linear(2, 2).cuda(), AttributeError, "; a backend is chosen at construction: backend='cuda'"),
    ".save": (lambda: Linear(2, 2).save("x"), AttributeError, "; gpurnn.save(model, path) saves a model"),
    ".compile": (lambda: Linear(2, 2).compile(), AttributeError, "; nothing has to be compiled"),
    "gpurnn.load": (lambda: gpurnn.load("x"), ValueError, "path should name a .safetensors file, got 'x'"),
    "gpurnn.Dense": (lambda: gpurnn.Dense(8), AttributeError, "no attribute 'Dense'; use gpurnn.Linear(in_features,"),
    "gpurnn.nn": (lambda: gpurnn.nn.LSTM, AttributeError, "no attribute 'nn'; the layers are in gpurnn itself"),
    "append": (
        lambda: with_layers().blocks.append(Linear(2, 2)), AttributeError,
        "'Layers' object has no attribute 'append'; set a new list or dict of all layers, or layers[name] = layer",
    ),
    "no __call__": (lambda: gpurnn.Module()(f32(2)), TypeError, "Module has no __call__, so it cannot be called. A mo"),
    "self.params": (
        lambda: setattr(gpurnn.Module(), "params", 3), AttributeError,
        "params: every Module has its parameters there. Make a parameter by self.parameter(name, value)",
    ),
    "self.grads": (
        lambda: setattr(Linear(2, 2), "grads", {}), AttributeError, "grads: every Linear has its gradients there.",
    ),
    "learning_rate": (lambda: gpurnn.Adam(Linear(2, 2), learning_rate=1), TypeError, "Here it is called lr"),
    # sizes that do not fit
    "Sequential": (
        lambda: Sequential(LSTM(4, 8), Linear(9, 2)), ShapeError,
        "1: Linear reads 9 features, but 0: LSTM before it gives 8. Give both one size",
    ),
    "Sequential, two directions": (
        lambda: Sequential({"rnn": LSTM(4, 8, bidirectional=True), "drop": Dropout(0.1), "head": Linear(8, 2)}),
        ShapeError, "head: Linear reads 8 features, but drop: Dropout before it gives 16",
    ),
    "Sequential, nested": (
        lambda: Sequential(gpurnn.Embedding(9, 3), Sequential(GRU(4, 5))), ShapeError,
        "1.0: GRU reads 4 features, but 0: Embedding before it gives 3",
    ),
    "Sequential, projected": (
        lambda: Sequential(LSTM(4, 8, proj_size=3), gpurnn.LayerNorm(8)), ShapeError,
        "1: LayerNorm reads 8 features, but 0: LSTM before it gives 3",
    ),
    # names
    "params['weight']": (
        lambda: LSTM(4, 8).params["weight"], KeyError,
        "no parameter is called 'weight'; did you mean weight_ih_l0, weight_hh_l0?",
    ),
    "params['x']": (lambda: Linear(4, 8).params["x"], KeyError, "no parameter is called 'x'; there are weight, bias"),
    "attribute": (
        lambda: LSTM(4, 8).weight_ih_l0, AttributeError,
        "'LSTM' object has no attribute 'weight_ih_l0'; the parameter is params['weight_ih_l0']",
    ),
    "parameters()": (lambda: LSTM(4, 8).parameters(), AttributeError, "the parameters are in params, name -> array"),
    "Adam(params)": (
        lambda: gpurnn.Adam(LSTM(4, 8).params), TypeError, "got Views; give the model, not its parameters",
    ),
    # dtypes in one model
    "float32 and float16": (
        lambda: Sequential(Linear(2, 2), Linear(2, 2, dtype="float16")), ValueError,
        "build all layers with one backend and one dtype",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_says_what_to_do(mistake):
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error) as caught:
        make()
    assert message in (caught.value.args[0] if error is KeyError else str(caught.value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(4, 2), lambda: Dropout(0.5), lambda: gpurnn.LayerNorm(4), lambda: gpurnn.BatchNorm(4),
        lambda: gpurnn.Pooling(4), lambda: LSTM(4, 8), lambda: gpurnn.RNN(4, 8), lambda: Sequential(Linear(4, 2)),
        lambda: Sequential(GRU(4, 8), Linear(8, 2)),
    ],
)  # fmt: skip
def test_every_backward_takes_doutput_by_name(make):
    (by_place, *_, first), (by_name, *_, second) = (make().forward(f32(5, 3, 4)) for _ in range(2))
    first, second = first(np.zeros_like(by_place)), second(doutput=np.zeros_like(by_name))
    if isinstance(first, tuple):
        first, second = first[0], second[0]
    assert first.shape == second.shape == (5, 3, 4) and not first.any() and not second.any()


def test_hints_do_not_make_attributes():
    model = Sequential(Linear(2, 3), Linear(3, 1))
    for name in ("backward", "fit", "to", "append", "__deepcopy__", "__array__"):
        assert not hasattr(model, name)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(copied(f32(4, 2)), model(f32(4, 2)))
    assert not hasattr(gpurnn, "nn") and "nn" not in dir(gpurnn)
    two = GRU(4, 8, 2)  # a state of two layers may still be a list of two arrays
    state = [f32(3, 8), f32(3, 8)]
    np.testing.assert_array_equal(two(f32(5, 3, 4), state)[0], two(f32(5, 3, 4), np.array(state))[0])


def test_what_fits_is_built():
    o = {"seed": 0}
    for model in (
        Sequential(gpurnn.Embedding(9, 3), GRU(3, [4, 5], 2, bidirectional=True), gpurnn.LayerNorm(10), Linear(10, 1)),
        Sequential(Dropout(0.5), LSTM(3, 8, proj_size=2), gpurnn.Pooling(2), Dropout(0.1), Linear(2, 3)),
        Sequential(Sequential(GRU(3, 4, **o), Dropout(0.5)), gpurnn.BatchNorm(4)),
    ):
        assert model.parameter_count

    class Doubled(gpurnn.Module):
        """What it gives is not known, although it has an attribute of a layer of ours."""

        features = 3

        def forward(self, x):
            return np.concatenate([x, x], axis=-1), lambda dy: dy[..., : dy.shape[-1] // 2] * 2

        def __call__(self, x):
            return self.forward(x)[0]

    assert Sequential(Linear(3, 4), Doubled(), Linear(8, 1))(f32(2, 3)).shape == (2, 1)
