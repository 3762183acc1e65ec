"""``Module.summary``: layers, output shapes, parameters, and the bytes of activations by ``plan``."""

import numpy as np
import pytest

from gpurnn import (
    GRU,
    LSTM,
    BatchNorm,
    Dropout,
    Embedding,
    EncoderDecoder,
    LayerNorm,
    Linear,
    LSTMCell,
    Pooling,
    Sequential,
)

CPU = {"backend": "numpy"}


def cells(model, **sizes):
    """The rows of a summary: first column -> the others."""
    lines = model.summary(**sizes).splitlines()
    assert all(len(line) <= 100 for line in lines)
    starts = [lines[0].index(title) for title in ("layer", "output")]
    return {line[: starts[1]].strip(): line[starts[1] :].strip() for line in lines[1:]}


@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_a_call(batch_first):
    order = {"batch_first": batch_first}
    for layers, x in (
        ([Embedding(9, 5, **CPU), Dropout(0.1, **order, **CPU), GRU(5, 4, **order, **CPU), LayerNorm(4, **CPU)], 0),
        ([LSTM(3, 8, proj_size=2, bidirectional=True, **order, **CPU), BatchNorm(4, **order, **CPU)], 3),
        ([LSTM(3, 4, num_layers=2, **order, **CPU), Pooling(4, **order, **CPU), Linear(4, 6, **CPU)], 3),
        ([Sequential(GRU(3, 4, **order, **CPU), Linear(4, 5, **CPU)), Linear(5, 2, **CPU)], 3),
    ):
        model = Sequential(*layers)
        T, B = 7, 3
        axes = (B, T) if batch_first else (T, B)
        inputs = np.zeros((*axes, x), "float32") if x else np.zeros(axes, int)
        y = model(inputs)
        y = y[0] if model.stateful else y
        rows = cells(model, T=T, B=B)
        last = f"{len(layers) - 1}: {type(layers[-1]).__name__}"
        assert rows[last].startswith(str(y.shape)), rows
        lettered = str(tuple({T: "T", B: "B"}.get(size, size) for size in y.shape)).replace("'", "")
        assert cells(model)[last].startswith(lettered)


def test_parameters_and_bytes_of_activations():
    rnn, head = LSTM(3, 4, **CPU), Linear(4, 2, **CPU)
    model = Sequential({"rnn": rnn, "head": head})
    plan, rows = rnn.plan(20, 5), cells(model, T=20, B=5)
    planned = f"{plan.cache_bytes + plan.output_bytes:,}"
    assert rows["rnn: LSTM"].split()[-2:] == [f"{rnn.parameter_count}", planned]
    assert rows["head: Linear"].endswith(f" {head.parameter_count}")
    assert rows["total"].split() == [f"{model.parameter_count}", planned]
    assert cells(model)["total"] == f"{model.parameter_count}"
    model.freeze("head")
    assert cells(model)["of them frozen"] == f"{head.parameter_count}"


def test_what_is_not_known_is_left_out():
    assert cells(Linear(3, 2, **CPU))["Linear"].startswith("(..., 2)")
    assert cells(LSTMCell(3, 4, **CPU))["LSTMCell"].startswith("(B, 4)")
    model = EncoderDecoder(11, 12, 8, **CPU)
    rows = cells(model, T=4, B=2)
    assert rows["total"].startswith(f"{model.parameter_count:,}")
    assert "EncoderDecoder" in rows and rows["EncoderDecoder"] == ""


def test_a_long_name_is_cut():
    model = Sequential({"a" * 200: LSTM(3, 4, **CPU)})
    assert "..." in model.summary() and "..." in model.summary(T=10**6, B=10**3)
    cells(model, T=10**6, B=10**3)


@pytest.mark.parametrize("sizes", [{"T": 3}, {"B": 3}, {"T": 0, "B": 1}, {"T": 1, "B": 2.5}])
def test_sizes_are_checked(sizes):
    with pytest.raises((ValueError, TypeError), match="T|B"):
        Linear(3, 2, **CPU).summary(**sizes)
