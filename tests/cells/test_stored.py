"""Cells as documents: all cells come back to the bit, and nothing but operations is taken."""

import copy
import json
import pickle
import random

import numpy as np
import pytest
from random_cells import random_cell

import gpurnn
from gpurnn import cells
from gpurnn.cells import TracedCell, library
from gpurnn.cells.stored import DEEPEST, MOST_NODES, cell_document, cell_from, function_document, function_from

RANDOM = 25  # cells; 1,000 of them were tried by hand
OWN = [value for value in vars(library).values() if isinstance(value, TracedCell)] + [cells.cornn(), cells.elman()]
OF_OPTIONS = [
    gpurnn.LSTM(2, 3, layer_norm=True, peephole=True, zoneout=0.1, recurrent_dropout=0.2, cell_clip=2.0),
    gpurnn.LSTM(2, 3, coupled=True, activation="silu", recurrent_activation="hard_sigmoid_2", gradient_clip=1.0),
    gpurnn.LSTM(2, 3, batch_norm=5),
    gpurnn.GRU(2, 3, batch_norm=4, zoneout=0.2, bias=False),
    gpurnn.GRU(2, 3, reset_after=False, zoneout=0.1),
    gpurnn.GRU(2, 3, recurrent_dropout=0.3, recurrent_dropout_each="sequence"),
    gpurnn.RNN(2, 3, nonlinearity="elu", layer_norm=True),
]


def through_json(document):
    return json.loads(json.dumps(document, allow_nan=False))


def assert_same(cell, other):
    """All that a layer, a backend and a reader of the code can see."""
    assert other == cell and other.evaluating == cell.evaluating
    for one, two in ((cell, other), (cell.evaluating, other.evaluating)):
        assert two.source("numpy") == one.source("numpy") and two.source() == one.source()
        for name in (
            "name", "gates", "states", "saved", "shown", "preactivations", "inputs", "products", "parameters", "draws",
            "remembers", "writes", "biases", "means", "over_batch", "normalizations", "timesteps", "inner_first",
            "stages", "locals", "array_only", "training",
        ):  # fmt: skip
            assert getattr(two, name) == getattr(one, name), name


@pytest.mark.parametrize("cell", [*OWN, *(layer._cell for layer in OF_OPTIONS)], ids=lambda cell: cell.name)
def test_cells_come_back(cell):
    made = cell_from(through_json(cell_document(cell)))
    assert_same(cell, made)
    assert_same(made, pickle.loads(pickle.dumps(made)))
    assert copy.deepcopy(made) is made
    assert pickle.loads(pickle.dumps(made.evaluating)) == made.evaluating


def test_random_cells_come_back():
    for seed in range(RANDOM):
        cell = random_cell(random.Random(seed))
        assert_same(cell, cell_from(through_json(cell_document(cell))))


@pytest.mark.parametrize(
    "function",
    [
        cells.tanh,
        cells.silu,
        lambda x: x * cells.sigmoid(1 - x) + 2,
        lambda x: cells.dropout(x, 0.3),
        lambda x: cells.normalized(x) - cells.mean(x),
    ],
)
def test_activations_come_back(function):
    document = through_json(function_document(function))
    made = function_from(document)
    assert made.__name__ == function.__name__
    assert made == function_from(document) and hash(made) == hash(function_from(document)) and made != function
    for other in (made, pickle.loads(pickle.dumps(made))):
        for build in (gpurnn.LSTM, gpurnn.GRU):
            assert_same(build(2, 3, activation=function)._cell, build(2, 3, activation=other)._cell)
        assert_same(gpurnn.RNN(2, 3, nonlinearity=function)._cell, gpurnn.RNN(2, 3, nonlinearity=other)._cell)
    assert gpurnn.LSTM(2, 3, activation=made)._cell is gpurnn.LSTM(2, 3, activation=function_from(document))._cell


def test_an_activation_is_simplified_where_it_is_used():
    """1 - x of a negated symbol is a sum: the operations of the file give what those of the function give."""
    function = function_from(function_document(lambda x: 1 - x))

    def cell_with(act):
        return gpurnn.cell("z", name="one")(lambda ax, ah, s: cells.tanh(act(-(ax.z + ah.z))))

    assert_same(cell_with(lambda x: 1 - x), cell_with(function))


def test_what_is_no_graph_is_refused():
    with pytest.raises(TypeError, match="cell: LSTMStep is code in Python, which no file holds"):
        cell_document(cells.LSTMStep())
    with pytest.raises(ValueError, match="no activation that normalizes over the batch"):
        function_document(lambda x: cells.batch_normalized(x))


def test_what_is_too_large_is_refused_when_it_is_saved():
    def deep(ax, ah, s):
        x = ax.z + ah.z
        for _ in range(DEEPEST):
            x = cells.tanh(x)
        return x

    with pytest.raises(ValueError, match=f"operations follow from one another, at most {DEEPEST} may"):
        cell_document(gpurnn.cell("z")(deep))


# ---- wrong documents


def good():
    return cell_document(OF_OPTIONS[0]._cell)


def nodes(document, op):
    return [node for node in document["training"]["nodes"] if node["op"] == op]


def changed(what, path, value):
    """A document with one entry changed; path: keys, the last one of it."""
    document = place = through_json(what)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


GRAPH = ("training", "nodes")
FIRST = next(k for k, node in enumerate(good()["training"]["nodes"]) if node["op"] == "add")
MASK = next(k for k, node in enumerate(good()["training"]["nodes"]) if node["op"] == "mask")
MEAN = next(k for k, node in enumerate(good()["training"]["nodes"]) if node["op"] == "mean")
WRONG = {
    "newer": (("version",), 2, "a cell of version 2, this gpurnn reads version 1: install a newer"),
    "no version": (("version",), None, "version should be an int"),
    "name of code": (("name",), "a; import os", "a cell cannot be called 'a; import os'"),
    "name of C++": (("name",), "while", "a cell cannot be called 'while'"),
    "gate of code": (("gates",), ["f", "i)("], "gates: expected names of letters"),
    "parameter of code": (("parameters", 0, "name"), "x\n", "parameters: expected names of letters"),
    "initial": (("parameters", 0, "initial"), "__import__", "the initial value of gain_ih should be one of"),
    "remembers": (("remembers",), "z", "remembers should be one of"),
    "no nodes": (GRAPH, [], f"nodes: expected a list of 1 to {MOST_NODES}"),
    "too many": (GRAPH, [{"op": "state", "value": 0}] * (MOST_NODES + 1), "nodes: expected a list of 1 to"),
    "no node": ((*GRAPH, FIRST), 7, f"node {FIRST}: expected an operation, got int"),
    "operation": ((*GRAPH, FIRST, "op"), "system", f"node {FIRST}: unknown operation 'system'"),
    "derivative": ((*GRAPH, FIRST, "op"), "dtanh", f"node {FIRST}: unknown operation 'dtanh'"),
    "leaf of functions": ((*GRAPH, FIRST, "op"), "x", f"node {FIRST}: unknown operation 'x'"),
    "arity": ((*GRAPH, FIRST, "args"), [0], f"node {FIRST}: add has 2 arguments"),
    "itself": ((*GRAPH, FIRST, "args"), [0, FIRST], f"its argument {FIRST} does not come before it"),
    "cycle": ((*GRAPH, FIRST, "args"), [0, FIRST + 5], "does not come before it"),
    "negative": ((*GRAPH, FIRST, "args"), [0, -1], "should be at least 0"),
    "value": ((*GRAPH, FIRST, "value"), 3, f"node {FIRST}: add has no value"),
    "node's name": ((*GRAPH, FIRST, "name"), "x = 1", "expected a name of letters"),
    "leaf": ((*GRAPH, 0, "value"), 2, "there is no state 2"),
    "rate": ((*GRAPH, MASK, "value"), [1.5, "timestep"], "rate should be a finite number"),
    "each": ((*GRAPH, MASK, "value"), [0.5, "call"], "each should be one of"),
    "results": (("training", "results"), [0, 10**6], "results: there is no node 1000000"),
    "one result": (("training", "results"), [0], "expected it to return the new states"),
    "normalizations": (("training", "normalizations"), [[MEAN, MEAN]], "timesteps should be at least 1"),
    "evaluation missing": (("evaluating",), None, "its equations for evaluation are missing"),
    "masks in evaluation": (("evaluating",), good()["training"], "mask does not go with evaluation"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_documents_are_refused_by_name(kind):
    path, value, words = WRONG[kind]
    with pytest.raises((ValueError, TypeError, LookupError), match=words):
        cell_from(changed(good(), path, value))


def test_a_gate_without_its_second_product():
    document = cell_document(cells.mgu)
    place = next(k for k, node in enumerate(document["training"]["nodes"]) if node["op"] == "product")
    for value in (-1, 2):
        with pytest.raises(ValueError, match="value should be at least|there is no gate"):
            cell_from(changed(document, (*GRAPH, place, "value"), value))


def test_numbers_are_finite():
    document = cell_document(cells.cornn())
    place = next(k for k, node in enumerate(document["training"]["nodes"]) if node["op"] == "constant")
    for value in (float("nan"), float("inf"), "1", True):
        with pytest.raises((ValueError, TypeError), match="value should be a"):
            cell_from(changed(document, (*GRAPH, place, "value"), value))


def test_batch_statistics_have_to_be_there():
    document = cell_document(OF_OPTIONS[2]._cell)
    for path, value, words in (
        (("training", "normalizations"), [], "the equations have more of batch_mean than there are"),
        (("evaluating", "normalizations"), [], "the equations have more of running than there are"),
        (("training", "normalizations"), [[0, 0]], "normalizations: expected pairs of batch_mean"),
        (("evaluating", "timesteps"), 6, "for evaluation have other weights"),
    ):
        with pytest.raises(ValueError, match=words):
            cell_from(changed(document, path, value))
    place = next(k for k, node in enumerate(document["evaluating"]["nodes"]) if node["op"] == "running")
    with pytest.raises(ValueError, match="more of running than there are"):
        cell_from(changed(document, ("evaluating", "nodes", place, "value"), 100))


def test_an_operation_that_simplifies_itself_is_none_that_was_traced():
    document = cell_document(cells.mgu)
    document["training"]["nodes"].append({"op": "neg", "args": [0]})
    document["training"]["nodes"].append({"op": "neg", "args": [len(document["training"]["nodes"]) - 1]})
    with pytest.raises(ValueError, match="neg of these arguments is none that equations leave"):
        cell_from(document)


def test_a_name_of_an_activation_is_no_code():
    document = function_document(cells.tanh)
    for name in ("x){}", 3, "if"):
        with pytest.raises((ValueError, TypeError), match="expected a name of letters|expected string"):
            function_from(document | {"name": name})


def test_layers_of_such_cells_compute_the_same_bits():
    """On NumPy; what is compiled is made of the same text."""
    x = np.random.default_rng(0).standard_normal((5, 3, 2))
    for cell in OWN:
        found = []
        for one in (cell, cell_from(through_json(cell_document(cell)))):
            layer = gpurnn.Recurrent(one, 2, 3, seed=1, backend="numpy", dtype="float64")
            output, _, backward = layer.forward(x)
            found.append([output, backward(np.ones_like(output))[0], layer.flat_grads])
        for one, two in zip(*found, strict=True):
            np.testing.assert_array_equal(one, two)
