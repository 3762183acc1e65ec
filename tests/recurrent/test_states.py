"""``memory="states"``: all states are saved, and backward rebuilds the gates of a segment in one timestep."""

import numpy as np
import pytest
from helpers import assert_close, cuda_ops, host
from segmented import LAYERS, all_results, marks_of, shaped

import gpurnn
from gpurnn.backends import chunks, rebuild
from gpurnn.backends.cpu.native import load_native
from gpurnn.backends.records import SavedPass
from gpurnn.cells import library
from gpurnn.testing import check_gradients, count_terms

CASES = 40  # random layers

OPTIONS = [
    {},
    {"reverse": True},
    {"num_layers": 3, "dropout": 0.3, "residual": True},
    {"bidirectional": True, "num_layers": 2, "dropout": 0.4, "residual": True},
    {"learn_state": True, "weight_dropout": 0.3, "num_layers": 2},
    {"bidirectional": True, "weight_dropout": 0.3, "learn_state": True},
    {"layer_norm": True, "zoneout": 0.2},
    {"bidirectional": True, "recurrent_dropout": 0.3, "num_layers": 2},
    {"masked_output": "repeat", "reset_to": "initial", "learn_state": True, "batch_first": True, "num_layers": 2},
    {"heads": 5, "bidirectional": True, "num_layers": 2, "learn_state": True},
    {"heads": 5, "mix_heads": False, "num_layers": 2},
]
MORE = {
    "lstm": [{"proj_size": 2, "num_layers": 2, "bidirectional": True}, {"peephole": True}],
    "gru": [{"reset_after": False}],
}


def assert_same(layer, x, exact, **given):
    """Everything that a call returns and adds, with all states saved and with everything; ``exact``: every bit.

    Otherwise one rounding is allowed for each term of each sum in each timestep.
    """
    T = x.shape[1 if layer.batch_first else 0]
    layer.memory = None
    whole = all_results(layer, x, **given)
    calls, layer.memory = layer.calls, "states"
    again = all_results(layer, x, **given)
    assert layer.calls == calls
    for number, (one, other) in enumerate(zip(again, whole, strict=True)):
        if exact:
            np.testing.assert_array_equal(one, other)
        else:
            assert_close(
                one.astype("float64"), other.astype("float64"), count_terms(layer, T), number, layer.dtype.name
            )


def is_compiled(layer):
    """Whether each timestep is compiled code of the CPU, which rebuilds gates to the bit."""
    return layer.ops.name == "cpu" and load_native() is not None and "compiled" in layer.plan(4, 1).schedule


def random_case(number):
    """A layer with its call."""
    rng = np.random.default_rng(number)
    kind = rng.choice(list(LAYERS))
    options = rng.choice(OPTIONS + MORE.get(kind, []))
    backend = rng.choice(["numpy", "cpu"])
    dtype = rng.choice(["float32", "float64", "float16"], p=[0.5, 0.4, 0.1])
    if "layer_norm" in options:
        kind = "lstm"  # a traced cell is compiled when it is first used, which takes seconds
    layer = LAYERS[kind](5, 5, backend=backend, dtype=dtype, seed=1, **options)
    T, B = int(rng.integers(1, 20)), int(rng.integers(1, 11))
    x = rng.standard_normal((B, T, 5) if layer.batch_first else (T, B, 5)).astype(layer.dtype)
    given = marks_of(layer, rng.choice(["full", "lengths", "marks"]), T, B, rng)
    if rng.random() < 0.5:
        given["state"] = shaped(layer, layer(x)[1], rng)
    return layer, x, given


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, CASES, 10))
def test_random_layers(first, small_chunks):
    for number in range(first, first + 10):
        layer, x, given = random_case(number)
        assert_same(layer, x, is_compiled(layer), **given)


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("options", [{"reverse": True}, {"bidirectional": True, "num_layers": 2}])
def test_in_short(backend, options, small_chunks):
    rng = np.random.default_rng(0)
    layer = gpurnn.LSTM(5, 5, backend=backend, seed=1, **options)
    x = rng.standard_normal((16, 3, 5)).astype("float32")
    assert_same(layer, x, is_compiled(layer), **marks_of(layer, "marks", 16, 3, rng))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bits_of_the_size_that_calls_have(kind):
    """Products of more columns than are summed at once, many rows, and a remainder of a few rows."""
    rng = np.random.default_rng(0)
    layer = LAYERS[kind](24, 264, backend="cpu", seed=1)
    for T, B in ((4098, 1), (700, 7)):
        assert_same(layer, rng.standard_normal((T, B, 24)).astype("float32"), is_compiled(layer))


@pytest.mark.parametrize(
    "name", [name for name, one in vars(library).items() if isinstance(one, gpurnn.cells.TracedCell)]
)
def test_cells(name, small_chunks):
    rng = np.random.default_rng(0)
    layer = gpurnn.Recurrent(vars(library)[name], 4, 5, 2, backend="numpy", dtype="float64", seed=1)
    assert_same(layer, rng.standard_normal((17, 3, 4)), False, **marks_of(layer, "marks", 17, 3, rng))


def test_a_cell_that_saves_no_gates_is_not_run_again(small_chunks, monkeypatch):
    layer, x = gpurnn.RNN(4, 5, 2, memory="states", backend="numpy", seed=1), np.ones((12, 3, 4), "float32")
    plan = layer.plan(12, 3)
    assert plan.recompute == plan.steps_again == 0 and "backward finds in them all that it reads" in plan.reason
    output, _, backward = layer.forward(x)
    monkeypatch.setattr(type(layer.ops), "layer_forward", lambda *arguments: 1 / 0)
    backward(output)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind, small_chunks):
    """Finite differences, which know nothing of segments."""
    rng = np.random.default_rng(0)
    x, reset, mask = rng.standard_normal((9, 2, 3)), rng.random((9, 2)) < 0.3, rng.random((9, 2)) < 0.8
    for options in ({"num_layers": 2, "learn_state": True}, {"bidirectional": True}):
        layer = LAYERS[kind](3, 4, backend="numpy", dtype="float64", memory="states", seed=0, **options)
        check_gradients(layer, x, reset=reset, mask=mask)


def test_backward_twice(small_chunks):
    rng = np.random.default_rng(0)
    for options in ({"num_layers": 2}, {"bidirectional": True}):
        layer = gpurnn.LSTM(4, 5, backend="cpu", memory="states", seed=1, **options)
        x, marked = rng.standard_normal((17, 3, 4)).astype("float32"), marks_of(layer, "marks", 17, 3, rng)
        output, _, backward = layer.forward(x, retain=True, **marked)
        found = []
        for _ in range(2):
            layer.zero_grad()
            found.append((backward(output)[0], layer.flat_grads.copy()))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_state_that_the_caller_overwrites(small_chunks):
    rng, found = np.random.default_rng(0), []
    x, first = rng.standard_normal((12, 3, 4)).astype("float32"), rng.standard_normal((1, 3, 5)).astype("float32")
    for memory in (None, "states"):
        layer, state = gpurnn.GRU(4, 5, backend="numpy", memory=memory, seed=1), first.copy()
        output, final, backward = layer.forward(x, state)
        state[...] = final
        found.append(backward(output)[0])
    assert_close(*found, count_terms(layer, 12), dtype="float32")


def test_gradients_of_each_sequence_and_second_derivatives(small_chunks):
    rng = np.random.default_rng(0)
    x, found = rng.standard_normal((12, 3, 4)), []
    for memory in (None, "states"):
        layer = gpurnn.GRU(4, 5, 2, backend="numpy", dtype="float64", memory=memory, seed=1)
        with gpurnn.per_sample_gradients(layer) as per_sample:
            output, _, backward = layer.forward(x)
            backward(output)
        one = {name: host(array) for name, array in per_sample.gradients().items()}

        def gradient(layer=layer):
            output, _, backward = layer.forward(x)
            backward(output)

        v = {name: np.ones(array.shape) for name, array in layer.params.items()}
        found.append(one | {f"hvp {name}": array for name, array in gpurnn.hvp(layer, gradient, v).items()})
    for name, array in found[0].items():
        assert_close(found[1][name], array, count_terms(layer, 12), name)


# ---- a GPU


def launched(ops, monkeypatch):
    """The names of the kernels that ``ops`` launches from now on, in a list that grows."""
    names = []
    for name in ("launch", "bind"):
        inner = getattr(ops.kernels, name)

        def noted(file, kernel, *arguments, inner=inner, **options):
            names.append(kernel)
            return inner(file, kernel, *arguments, **options)

        monkeypatch.setattr(ops.kernels, name, noted)
    return names


@pytest.mark.emulated
@pytest.mark.parametrize("schedule", ["block", "grid", "step"])
def test_no_time_loop_runs_again(schedule, small_chunks, monkeypatch):
    """One launch for a piece of a segment and none that waits for other blocks; the recorded loops of a shape that
    comes back are filled, too."""
    ops = cuda_ops()
    layer = gpurnn.GRU(4, 16, backend=ops, schedule=schedule, seed=1)
    monkeypatch.setattr(chunks, "ROWS_OF_GPU", 24)  # pieces of 6 rows
    x = layer.xp.asarray(np.random.default_rng(0).standard_normal((19, 3, 4)).astype("float32"))
    assert_same(layer, x, exact=False)
    assert_same(layer, x, exact=False)
    output, _, backward = layer.forward(x)
    names = launched(ops, monkeypatch)
    backward(output)
    forward = [name for name in names if name.endswith("forward")]
    assert forward == ["step_forward"] * 8, names  # two segments of 8 timesteps, in pieces of 2; the last is saved


@pytest.mark.emulated
@pytest.mark.parametrize(
    "kind, options", [("lstm", OPTIONS[2]), ("gru", OPTIONS[3]), ("lstm", MORE["lstm"][0]), ("rnn", OPTIONS[0])]
)
def test_on_an_emulated_gpu(kind, options, small_chunks):
    rng = np.random.default_rng(0)
    layer = LAYERS[kind](5, 5, backend=cuda_ops(), seed=1, **options)
    x = layer.xp.asarray(rng.standard_normal((11, 3, 5)).astype("float32"))
    for how in ("lengths", "marks"):
        given = marks_of(layer, how, 11, 3, rng)
        given = {name: one if name == "lengths" else layer.xp.asarray(one) for name, one in given.items()}
        assert_same(layer, x, kind == "rnn", **given)


# ---- what plan says, and what a budget takes


def test_a_budget_takes_what_does_the_least_again(small_chunks):
    for backend in ("numpy", "cpu"):
        layer = gpurnn.LSTM(4, 16, backend=backend, seed=0)
        T, B = 96, 3
        most = layer.plan(T, B).peak_bytes
        layer.memory = "states"
        states = layer.plan(T, B)
        assert states.steps_again == 0 and states.recompute == 94 / 96
        layer.memory = "sqrt"
        again = layer.plan(T, B)
        assert again.steps_again == round(again.recompute * T) > 0
        assert again.peak_bytes < states.peak_bytes < most
        shares = []
        for budget in np.linspace(most, again.peak_bytes, 30).astype(int):
            layer.memory = int(budget)
            plan = layer.plan(T, B)
            assert plan.peak_bytes <= budget
            assert plan.steps_again in (0, round(plan.recompute * T))
            shares.append(plan.recompute)
        assert shares == sorted(shares) and shares[0] == 0 and 0 < shares[1] < 0.5
    assert gpurnn.LSTM(4, 16, 2, bidirectional=True, memory="states", backend="numpy").plan(96, 3).recompute == 1


@pytest.mark.emulated
def test_a_budget_on_a_gpu_runs_no_time_loop_again(small_chunks):
    layer = gpurnn.LSTM(4, 16, memory="states", backend=cuda_ops(), seed=0)
    layer.memory = least = layer.plan(96, 3).peak_bytes
    assert layer.plan(96, 3).steps_again == 0
    layer.memory = least - 1
    assert layer.plan(96, 3).steps_again > 0


# ---- planted errors: what these tests are for


ERRORS = {
    "the slot after": (SavedPass, "h_old", SavedPass.h_new),
    "reverse read as forward": (SavedPass, "h_old", property(lambda saved: saved.h[:-1])),
    "resets ignored": (rebuild, "read_states", lambda xp, saved: [saved.h_old, *saved.others_old]),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_errors_are_noticed(backend, error, small_chunks, monkeypatch):
    rng = np.random.default_rng(0)
    layer = gpurnn.LSTM(4, 5, backend=backend, reverse="reverse" in error, seed=1)
    x, reset = rng.standard_normal((16, 3, 4)).astype("float32"), rng.random((16, 3)) < 0.3
    inner = type(layer.ops).layer_rebuild

    def with_error(self, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(*ERRORS[error])
            return inner(self, *arguments)

    assert_same(layer, x, is_compiled(layer), reset=reset)
    monkeypatch.setattr(type(layer.ops), "layer_rebuild", with_error)
    with pytest.raises(AssertionError):
        assert_same(layer, x, is_compiled(layer), reset=reset)
