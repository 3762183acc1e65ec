"""``export_c``: every cell, option and layer, compiled and run beside the model."""

import ctypes

import numpy as np
import pytest
from c_models import Compiled, assert_as_float64, inputs, needs_compiler, outputs_of, pointer
from c_zoo import FORMS, MODELS, RECURRENT, build, random_model
from helpers import assert_close
from optional import needs

import gpurnn
from gpurnn.dtypes import EPSILON
from gpurnn.quantization import quantize_rows

# It takes seconds to compile them all; test_c_files.py has short tests.
pytestmark = [needs_compiler, pytest.mark.long]
T = 9


def as_stored(model, weights):
    """The model with its weights as a header of ``weights`` has them, in float64."""
    if weights == "float32":
        return
    for name, array in model.params.items():
        last = name.rpartition(".")[2]
        if last.startswith("weight") and array.ndim > 1:
            rows = array.reshape(-1, array.shape[-1])
            values, scales = quantize_rows(rows)
            array[...] = (values * scales.astype(array.dtype)[:, None]).reshape(array.shape)


QUANTIZED = [
    "lstm",
    "gru_original",
    "projection",
    "heads",
    "unequal",
    "tall",
    "words",
    "tied",
    "mean",
    "only_embedding",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All models, and some in 8 bits, compiled with every warning an error: "lstm", "lstm_int8", "lstm_int16"."""
    models = {name: build(name) for name in [*RECURRENT, *MODELS]}
    given = {f"{name}{end}": (model, options) for name, model in models.items()
             for end, options in FORMS.items() if not end or name in QUANTIZED}  # fmt: skip
    return Compiled(tmp_path_factory.mktemp("c"), given)


@pytest.mark.parametrize("name", [*RECURRENT, *MODELS])
def test_a_header_gives_what_the_model_gives(name, library):
    plain, expected, x = beside(name, "float32")
    assert_as_float64(library.run(name, x, expected.shape[1]), plain, expected, name)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_in_8_bits_are_those_of_the_quantizer(name, library):
    plain, expected, x = beside(name, "int8")
    assert_as_float64(library.run(f"{name}_int8", x, expected.shape[1]), plain, expected, name)


def beside(name, weights):
    """The outputs of a model in float32 and in float64, and its inputs."""
    models = [build(name, dtype) for dtype in ("float32", "float64")]
    for model in models:
        as_stored(model, weights)
    x = inputs(models[0], T)
    return *(outputs_of(model, x) for model in models), x


# ---- vectors in 16 bits


def rounded(x):
    """x (1, K) as whole numbers of at most 32767, with one scale: what a step multiplies."""
    each = np.abs(x).max() / 32767
    return np.rint(x / each) * each if each else x


@pytest.mark.parametrize("name", ["lstm", "gru_original", "tall"])
def test_vectors_in_16_bits_cost_what_rounded_states_cost(name, library):
    """The plain implementation: the model in float32, whose x and h are rounded before each timestep."""
    plain, expected, x = beside(name, "int8")
    model, state, found = build(name), None, []
    as_stored(model, "int8")
    for row in x[:, None]:
        if state is not None:
            h = state[0] if isinstance(state, tuple) else state
            h = np.stack([rounded(layer) for layer in h])
            state = (h, *state[1:]) if isinstance(state, tuple) else h
        y, state = model.step(rounded(row), state)
        found.append(y[0])
    got = library.run(f"{name}_int16", x, expected.shape[1])
    assert_as_float64(got, np.array(found), expected, name)
    assert np.abs(got - plain).max() > 0


@pytest.mark.parametrize("name", QUANTIZED)
def test_vectors_in_16_bits_are_close(name, library):
    """A rounding of 1 / 65534 of the largest number, in each of T timesteps of each product, is all that is added."""
    plain, expected, x = beside(name, "int8")
    got = library.run(f"{name}_int16", x, expected.shape[1])
    terms = sum(1 for key in build(name).params if "weight" in key) * T
    assert_close(got, plain, terms / 65534 / EPSILON["float32"], name, "float32")


# ---- states


@pytest.mark.parametrize("name", ["lstm", "batch_norm", "learned_state", "mean", "largest", "words"])
def test_reset_begins_another_sequence(name, library):
    x = inputs(build(name), T)
    state, F = library.state(name), outputs_of(build(name), x).shape[1]
    before = library.run(name, x, F, state)
    assert not np.array_equal(library.run(name, x, F, state), before)
    library.reset(name, state)
    np.testing.assert_array_equal(library.run(name, x, F, state), before)


def test_states_are_independent(library):
    x = inputs(build("gru"), 2 * T)
    one, other = library.state("gru"), library.state("gru")
    both = [(library.run("gru", a[None], 12, one), library.run("gru", b[None], 12, other))
            for a, b in zip(x[:T], x[T:], strict=True)]  # fmt: skip
    for part, alone in zip(zip(*both, strict=True), (x[:T], x[T:]), strict=True):
        np.testing.assert_array_equal(np.concatenate(part), library.run("gru", alone, 12))


@pytest.mark.parametrize("name", ["words", "words_int8", "tied_int16"])
@pytest.mark.parametrize("bad", [-1, 41, 2**31 - 1, -(2**31)])
def test_a_class_that_is_not_there_changes_nothing(name, bad, library):
    state, y = library.state(name), np.full(41, 7, np.float32)
    library.run(name, np.array([3]), 41, state)
    before = state.raw
    assert getattr(library.library, f"{name}_step")(state, ctypes.c_int32(bad), pointer(y)) == -1
    assert state.raw == before and (y == 7).all()


def test_outputs_may_replace_inputs(library):
    x = inputs(build("linear"), 1)
    same, expected = x[0].copy(), library.run("linear", x, 3)[0]
    library.library.linear_step(library.state("linear"), pointer(same), pointer(same))
    np.testing.assert_array_equal(same[:3], expected)


def test_numbers_that_are_not_finite_pass_through(library):
    for name in ("linear", "largest"):
        x = inputs(build(name), 3)
        x[1, 0] = np.nan
        got = library.run(name, x, outputs_of(build(name), x).shape[1])
        np.testing.assert_array_equal(np.isnan(got), np.isnan(outputs_of(build(name), x)))


def test_a_state_may_be_set_between_steps(library):
    """The members of a struct lie in the order in which they are declared: h_l0, c_l0, h_l1, c_l1 of 12 floats."""
    models, x = [build("lstm", dtype) for dtype in ("float32", "float64")], inputs(build("lstm"), T)
    given = np.random.default_rng(2).normal(size=(2, 2, 1, 12)).astype(np.float32)  # (h and c, L, B, H)
    state = library.state("lstm")
    state[: given.nbytes] = given.swapaxes(0, 1).tobytes()
    plain, expected = (
        model(x[:, None].astype(model.dtype), tuple(given.astype(model.dtype)))[0][:, 0] for model in models
    )
    assert_as_float64(library.run("lstm", x, 12, state), plain, expected, "lstm")


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_weights_of_a_16_bit_model_are_those_that_it_computes_with(dtype, tmp_path):
    model, x = build("words", dtype), inputs(build("words"), T)
    others = [build("words", other) for other in ("float32", "float64")]
    for other in others:
        for name, array in model.params.items():
            rounded = array.astype(model.dtype) if "weight_" in name or array.ndim > 1 else array
            other.params[name] = rounded.astype(other.dtype)
    plain, expected = (outputs_of(other, x) for other in others)
    got = Compiled(tmp_path, {"net": (model, {})}).run("net", x, 41)
    assert_as_float64(got, plain, expected, dtype)


def test_a_layer_that_is_placed_twice_has_two_states(tmp_path):
    def twice(dtype):
        layer = gpurnn.GRU(5, 5, backend="numpy", seed=1, dtype=dtype)
        return gpurnn.Sequential(layer, layer)

    models = [twice(dtype) for dtype in ("float32", "float64")]
    models[1].load_state_dict(models[0].state_dict())
    x = inputs(models[0], T)
    got = Compiled(tmp_path, {"net": (models[0], {})}).run("net", x, 5)
    assert_as_float64(got, *(outputs_of(model, x) for model in models), "twice")


# ---- at random

COUNT = 6  # 800 were run once


def test_random_models(tmp_path):
    models = {f"m{seed}{end}": (random_model(seed, "float32"), options)
              for seed in range(COUNT) for end, options in FORMS.items() if not end or end == "_int8"}  # fmt: skip
    library = Compiled(tmp_path, models)
    for seed in range(COUNT):
        for end, weights in (("", "float32"), ("_int8", "int8")):
            both = [random_model(seed, dtype) for dtype in ("float32", "float64")]
            for model in both:
                as_stored(model, weights)
            x = inputs(both[0], T, seed)
            plain, expected = (outputs_of(model, x) for model in both)
            got = library.run(f"m{seed}{end}", x, expected.shape[1])
            assert_as_float64(got, plain, expected, f"seed {seed}{end}: {both[0]!r}")
