"""Names of other libraries: what each of them is answered."""

import pickle

import numpy as np
import pytest

import gpurnn

MODEL = gpurnn.Sequential(gpurnn.Linear(2, 3))
HISTORY = gpurnn.History()


@pytest.mark.parametrize(
    "thing, name, hint",
    [
        (gpurnn, "CrossEntropyLoss", "losses are functions, such as gpurnn.cross_entropy"),
        (gpurnn, "Bidirectional", "give the layer bidirectional=True"),
        (gpurnn, "pack_padded_sequence", "nothing is packed: give lengths= to the layer and"),
        (gpurnn, "Lstm", "did you mean LSTM?"),
        (gpurnn, "crossentropy", "did you mean cross_entropy?"),
        (gpurnn.cells, "minGRU", "did you mean mingru?"),
        (gpurnn.cells, "IndRNN", "did you mean indrnn?"),
        (gpurnn.cells, "hardsigmoid", "did you mean hard_sigmoid?"),
        (
            gpurnn.cells,
            "qrnn",
            "cells in it: cifg, cornn(), elman(), indrnn, ligru, mgu, mingru, ",
        ),
        (MODEL, "count_params", "the number of parameters is parameter_count"),
        (MODEL, "get_weights", "state_dict"),
        (MODEL, "requires_grad_", "freeze"),
        (HISTORY, "history", "history.epochs lists the records"),
    ],
)
def test_a_name_of_another_library_is_answered(thing, name, hint):
    with pytest.raises(AttributeError) as caught:
        getattr(thing, name)
    assert f"no attribute {name!r}; {hint}" in str(caught.value) and not hasattr(thing, name)


def test_what_is_said_is_there():
    assert MODEL.parameter_count == 9 and MODEL.state_dict() and callable(MODEL.freeze) and callable(MODEL.unfreeze)
    assert HISTORY.epochs == [] and HISTORY.stopped is None


def test_a_missing_name_is_a_sentence_without_quotes():
    for call, start in (
        (lambda: MODEL.load_state_dict({}), "state_dict does not fit: missing ['0.weight', '0.bias'], unknown []"),
        (lambda: MODEL.params["weigt"], "no parameter is called 'weigt'; "),
        (lambda: MODEL.freeze("q"), "freeze: no parameter or layer is called 'q'"),
        (lambda: gpurnn.LossScaler().load_state_dict({}), "state of a loss scaler: expected the entries"),
        (lambda: gpurnn.SGD(MODEL, 0.1).load_state_dict({}), ""),
    ):
        with pytest.raises(KeyError) as caught:
            call()
        assert str(caught.value) == caught.value.args[0] and str(caught.value).startswith(start)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_name_like_no_other_has_no_hint():
    with pytest.raises(AttributeError, match="has no attribute 'xyzzy'$"):
        gpurnn.xyzzy  # noqa: B018


def test_text_as_targets():
    with pytest.raises(gpurnn.DtypeError, match="expected class numbers, got text. Number it: np.unique"):
        gpurnn.cross_entropy(np.zeros((2, 3), "float32"), np.array(["a", "b"]))


@pytest.mark.parametrize(
    "name, words", [("device", "backend='cuda'"), ("shuffle", "shuffle=True"), ("class_weight", "weight=")]
)
def test_arguments_of_other_kinds_of_fit(name, words):
    options = {"optimizer": "adam", "epochs": 1, name: 1}
    with pytest.raises(TypeError, match=f"fit: unknown argument '{name}'. .*{words}"):
        gpurnn.fit(MODEL, gpurnn.mse, [], **options)
