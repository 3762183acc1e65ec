"""Modules: views of one flat buffer, adopting, state dictionaries, random state."""

import copy
import gc
import json

import numpy as np
import pytest
from optional import optional

import gpurnn
from gpurnn import GRU, LSTM, BatchNorm, Dropout, DtypeError, LayerNorm, Linear, Sequential, ShapeError
from gpurnn.backends.ops import Ops
from gpurnn.dtypes import check_dtype
from gpurnn.module import Module

torch = optional("torch")
ml_dtypes = optional("ml_dtypes")

CPU = gpurnn.get_backend("cpu").name  # "numpy" where no compiler was found
F64 = {"backend": "cpu", "dtype": "float64", "seed": 1}


def deep_model(**options):
    """Three levels, buffers at two of them, a recurrent layer."""
    options = F64 | options
    inner = Sequential({"norm": BatchNorm(4, **options), "drop": Dropout(0.5, **options)})
    return Sequential({"rnn": LSTM(3, 4, **options), "inner": inner, "head": BatchNorm(4, **options)})


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


# ---- views


@pytest.mark.parametrize("kind", ["params", "grads"])
def test_views_write_through(kind):
    layer = Linear(3, 2, **F64)
    views, flat = getattr(layer, kind), getattr(layer, f"flat_{kind}")
    flat[...] = 0
    view = views["bias"]
    views["bias"] += np.array([1.0, 2.0])
    views["weight"] = np.arange(6.0).reshape(2, 3)
    assert flat[:6].tolist() == [0, 1, 2, 3, 4, 5] and flat[16:18].tolist() == [1, 2]
    views["bias"] *= 2
    views["weight"][0] = 7
    assert flat[:6].tolist() == [7, 7, 7, 3, 4, 5] and flat[16:18].tolist() == [2, 4]
    views["bias"] = [5, 6]
    views["weight"] = 0
    assert not flat[:16].any() and flat[16:18].tolist() == [5, 6]
    views["bias"] = views["bias"] + 1
    assert views["bias"] is view and flat[16:18].tolist() == [6, 7] and flat.size == 32 and not flat[18:].any()


def test_every_parameter_starts_where_a_kernel_may_load_four_numbers():
    """Those of a layer in a model, too, in the order in which they are placed; what lies between them stays zero."""
    for dtype in ("float32", "float64", "float16"):
        options = {"backend": "cpu", "dtype": dtype, "seed": 1}
        inner = Sequential(LayerNorm(3, **options), LSTM(3, 5, learn_state=True, **options))
        model = Sequential(inner, Linear(5, 7, **options))
        for module in (model, inner, inner[1]):
            for views, flat in ((module.params, module.flat_params), (module.grads, module.flat_grads)):
                assert {(view.ctypes.data - flat.ctypes.data) // flat.itemsize % 16 for view in views.values()} == {0}
                assert (flat.ctypes.data - model.flat_params.ctypes.data) // flat.itemsize % 16 == 0 or flat is not (
                    module.flat_params
                )
        assert model.parameter_count == sum(view.size for view in model.params.values()) < model.flat_params.size
        optimizer = gpurnn.AdamW(model, weight_decay=0.1)
        for _ in range(3):
            model.flat_grads[...] = 0
            for view in model.grads.values():
                view[...] = 1
            gpurnn.clip_grad_norm(model, 1.0)
            optimizer.step()
        assert np.count_nonzero(model.flat_params) <= model.parameter_count
        between = model.flat_params.copy()
        for view in model._views(between).values():
            view[...] = 0
        assert not between.any()


def test_views_refuse_other_shapes_and_names():
    layer = Linear(3, 2, **F64)
    before = layer.flat_params.copy()
    for wrong in (np.zeros(3), np.zeros((1, 2)), np.zeros((2, 1)), [1.0, 2.0, 3.0], np.zeros(1)):
        with pytest.raises(ShapeError, match=r"bias: expected shape \(2,\), got"):
            layer.params["bias"] = wrong
    with pytest.raises(KeyError):
        layer.params["Weight"] = 0
    np.testing.assert_array_equal(layer.flat_params, before)
    assert "Weight" not in layer.params and len(layer.params) == 2
    assert repr(layer.params) == "{'weight': (2, 3), 'bias': (2,)}"


def test_layer_without_parameters():
    layer = Dropout(0.5, **F64)
    assert layer.flat_params.shape == (0,) and dict(layer.params) == {} and layer.state_dict() == {}
    layer.zero_grad()
    layer.load_state_dict({})
    assert Sequential(layer).flat_params.shape == (0,)


def test_dtypes():
    for right in ("float32", np.float32, np.dtype("float64"), float):
        assert check_dtype(right) == np.dtype(right)
    assert check_dtype("bfloat16").name == "bfloat16" and check_dtype("bfloat16").itemsize == 2
    for wrong in ("float128", "int32", "bfloat", torch.float32, None, 32):
        with pytest.raises(
            DtypeError, match=f"dtype should be one of float32, float64, float16, bfloat16, got {wrong}"
        ):
            check_dtype(wrong)


# ---- adopting


def test_adopting_re_homes_values_gradients_and_children():
    first, second = Linear(3, 4, **F64), Sequential(LayerNorm(4, **F64))
    first.grads["bias"] += 3
    values, gradients = first.flat_params.copy(), first.flat_grads.copy()
    old = first.flat_params
    model = Sequential(first, second)
    np.testing.assert_array_equal(first.flat_params, values)
    np.testing.assert_array_equal(first.flat_grads, gradients)
    old[...] = 0  # the old buffer is nobody's
    np.testing.assert_array_equal(first.flat_params, values)
    model.flat_params[...] = np.arange(64)  # 12, 4, 4 and 4 numbers, each from a multiple of 16 on
    assert first.params["weight"][0, 1] == 1 and first.params["bias"].tolist() == [16, 17, 18, 19]
    assert second.params["0.bias"].tolist() == second[0].params["bias"].tolist() == [48, 49, 50, 51]
    second[0].params["bias"] = 9
    assert model.params["1.0.bias"].tolist() == model.flat_params[48:52].tolist() == [9] * 4
    model.zero_grad()
    assert not first.flat_grads.any()


def test_names_and_keys_follow_the_place_in_the_model():
    model = deep_model()
    assert [name for name, _ in model.modules()] == ["", "rnn", "inner", "inner.norm", "inner.drop", "head"]
    for name, module in model.modules():
        assert module.name == name and module.key == gpurnn.rng.name_key(name)
    outer = Sequential({"model": model})
    assert model["inner"]["drop"].name == "model.inner.drop"
    assert [name for name, _ in outer.modules()][-1] == "model.head"


def test_a_layer_placed_twice_is_one_module():
    norm = BatchNorm(3, **F64)
    model = Sequential(Linear(3, 3, **F64), norm, Dropout(0.1, **F64), norm)
    assert [name for name, _ in model.modules()] == ["", "0", "1", "2"]
    assert [name for name in model.state_dict() if "running" in name] == ["1.running_mean", "1.running_var"]
    assert set(model.random_state()) == {"", "0", "1", "2"}
    model.forward(np.random.default_rng(0).standard_normal((5, 3)))
    assert int(model.state_dict()["1.num_batches_tracked"]) == 2


@pytest.mark.long
def test_a_layer_of_another_model_is_refused():
    """It could lie in one buffer only: the other model would go on with stale parameters."""
    shared = Linear(3, 3, **F64)
    model = Sequential(shared)
    values = model.flat_params.copy()
    message = "0: this Linear already belongs to another Sequential"
    with pytest.raises(ValueError, match=message):
        Sequential(shared, Linear(3, 3, **F64))
    with pytest.raises(ValueError, match=message):
        Sequential(shared, model)
    with pytest.raises(ValueError, match=message.replace("0", "1")):
        Sequential(model, shared)
    model.flat_params += 1
    np.testing.assert_array_equal(shared.flat_params, values + 1)
    del model
    gc.collect()
    again = Sequential(shared)  # nobody else holds it now
    np.testing.assert_array_equal(again.flat_params, values + 1)


def test_a_refused_model_changes_nothing():
    good, other = Linear(3, 3, **F64), Linear(3, 3, backend="cpu")
    buffer = good.flat_params
    for wrong in (other, "layer"):
        with pytest.raises((ValueError, TypeError)):
            Sequential(good, wrong)
    assert good.flat_params is buffer and good.name == ""
    Sequential(good)


def test_mixed_dtypes_and_backends_are_refused():
    with pytest.raises(ValueError, match=f"b is {CPU}/float32, the module around it {CPU}/float64: build all layers"):
        Sequential({"a": Linear(3, 3, **F64), "b": Linear(3, 3, backend="cpu")})
    stranger = Linear(3, 3, **F64)
    stranger.ops = Ops(np, "cuda")
    with pytest.raises(ValueError, match=f"1 is cuda/float64, the module around it {CPU}/float64"):
        Sequential(Linear(3, 3, **F64), stranger)


def test_a_users_own_module():
    """Subclasses declare and adopt with the same two calls."""

    class Scale(Module):
        def __init__(self, size):
            super().__init__("cpu", "float64", 3)
            self._declare({"scale": np.arange(size), "empty": np.zeros((0, 2))})

    layer = Scale(3)
    assert layer.params["scale"].dtype == np.float64 and layer.params["empty"].shape == (0, 2)
    assert not layer.stateful and layer.training and repr(layer) == f"Scale(3 parameters, {CPU}, float64)"
    model = Sequential(layer)
    assert list(model.params) == ["0.scale", "0.empty"] and model.params["0.empty"].shape == (0, 2)


def test_evaluation_inside_a_block():
    model = deep_model()
    model["inner"]["drop"].eval()
    modes = [module.training for _, module in model.modules()]
    with model.evaluation() as same:
        assert same is model and not any(module.training for _, module in model.modules())
        with model["rnn"].evaluation():
            pass
        assert not model["rnn"].training
    assert [module.training for _, module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), model.evaluation():
        1 / 0  # noqa: B018
    assert [module.training for _, module in model.modules()] == modes


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "order", ["A+ B+ A- B-", "A+ B+ B- A-", "A+ A- B+ B-", "A+ B+ C+ B- A- C-", "A+ B+ A- C+ B- C-"]
)
def test_blocks_of_evaluation_overlap_in_any_order(order, training, part):
    model = deep_model().train(training)
    model["head"].train(not training)
    modes, inside = [module.training for _, module in model.modules()], {}
    for name, begins in order.split():
        if begins == "+":
            inside[name] = (model["inner"] if part and name == "B" else model).evaluation()
            inside[name].__enter__()
        else:
            inside.pop(name).__exit__(None, None, None)
        if inside:
            assert not model["inner"].training and not model["inner"]["drop"].training
            assert not model.training or set(inside) == {"B"}
    assert [module.training for _, module in model.modules()] == modes


def test_what_is_set_inside_a_block_of_evaluation():
    model = deep_model()
    with model.evaluation():
        model.train()
        with model.evaluation():
            inner = copy.deepcopy(model)
        assert model.training  # as it was before the inner block
    assert model.training and not inner.training
    with inner.train().evaluation():
        pass
    assert inner.training


# ---- state dictionaries


def test_state_dict_round_trip_with_buffers():
    model, other = deep_model(), deep_model(seed=2)
    model.forward(np.random.default_rng(0).standard_normal((5, 2, 3)))
    state = model.state_dict()
    assert [n for n in state if n.startswith("rnn")] == [
        f"rnn.{n}" for n in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    ]
    assert set(state) - set(model.params) == {
        f"{place}.{name}"
        for place in ("inner.norm", "head")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert state["inner.norm.num_batches_tracked"] == 1 and state["inner.norm.running_mean"].any()
    buffer, flat = other["head"].buffers["running_mean"], other.flat_params
    other.load_state_dict(state)
    assert_unchanged(other, state)
    assert other["head"].buffers["running_mean"] is buffer and other.flat_params is flat


def test_state_dict_holds_copies():
    model = deep_model()
    state = model.state_dict()
    for value in state.values():
        value[...] = 7
    assert not (model.flat_params == 7).any()
    assert int(model["head"].buffers["num_batches_tracked"]) == 0
    model.load_state_dict(state)
    state["head.weight"][...] = 8
    assert (model["head"].params["weight"] == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("torch_dtype", ["float64", "float32", "float16", "bfloat16"])
def test_loads_torch_models(torch_dtype, dtype):
    modules = {"gru": torch.nn.GRU(3, 4), "norm": torch.nn.BatchNorm1d(4), "linear": torch.nn.Linear(4, 2)}
    module = torch.nn.ModuleDict(modules).to(getattr(torch, torch_dtype))
    with torch.no_grad():
        module["norm"].running_mean += 0.25
        module["norm"].num_batches_tracked += 9
    options = {"backend": "cpu", "dtype": dtype}
    layers = {"gru": GRU(3, 4, **options), "norm": BatchNorm(4, **options), "linear": Linear(4, 2, **options)}
    model = Sequential(layers)
    model.load_state_dict(module.state_dict())
    for name, value in module.state_dict().items():
        mine = model.state_dict()[name]
        assert mine.dtype == ("int64" if "num" in name else dtype)
        np.testing.assert_array_equal(mine, value.double().numpy().astype(mine.dtype))
    torch_view = {name: p for name, p in module.named_parameters()}  # with requires_grad
    model.load_state_dict(torch_view, strict=False)


def test_lists_and_integers_load():
    layer = Linear(2, 1, **F64)
    layer.load_state_dict({"weight": [[1, 2]], "bias": np.array([3], np.uint8)})
    assert layer.params["weight"].tolist() == [[1, 2]] and layer.params["bias"].tolist() == [3]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("given", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_floats_load(given, dtype):
    given = np.dtype(getattr(ml_dtypes, given, given))
    layer = BatchNorm(3, backend="cpu", dtype=dtype)
    state = layer.state_dict() | {"weight": np.array([0.5, 1, -2], given), "running_mean": np.zeros(3, given)}
    layer.load_state_dict(state)
    assert layer.params["weight"].tolist() == [0.5, 1, -2]
    if given.name != "float8_e4m3fn":
        state["weight"] = np.array([1, np.nan, 1], given)
        with pytest.raises(ValueError, match="weight: holds values that are not finite"):
            layer.load_state_dict(state)


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_strict_loading_refuses_either_fault_alone(fault):
    model = deep_model()
    before = model.state_dict()
    changed = {name: value + 1 for name, value in before.items()}
    if fault == "missing":
        del changed["rnn.bias_hh_l0"]
    else:
        changed["tail.weight"] = np.zeros(3)
    with pytest.raises(KeyError, match=fault):
        model.load_state_dict(changed)
    assert_unchanged(model, before)


def test_strict_and_not():
    model = deep_model()
    before = model.state_dict()
    changed = {name: value + 1 for name, value in before.items()}
    del changed["rnn.bias_hh_l0"], changed["head.running_var"]
    changed["tail.weight"] = np.zeros(3)
    with pytest.raises(KeyError) as caught:
        model.load_state_dict(changed)
    message = str(caught.value)
    assert "missing ['rnn.bias_hh_l0', 'head.running_var']" in message and "unknown ['tail.weight']" in message
    assert_unchanged(model, before)
    model.load_state_dict(changed, strict=False)
    expected = {name: changed.get(name, value) for name, value in before.items()}
    assert_unchanged(model, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("head.bias", np.zeros((4, 1)), ShapeError, r"head.bias: expected shape \(4,\), got \(4, 1\)"),
        ("head.bias", np.zeros(()), ShapeError, r"head.bias: expected shape \(4,\), got \(\)"),
        ("head.bias", np.array([1, 2, np.nan, 4]), ValueError, "head.bias: holds values that are not finite"),
        (
            "head.bias",
            lambda: torch.tensor([1, 2, torch.inf, 4]),
            ValueError,
            "head.bias: holds .* not finite in float32",
        ),
        ("head.bias", np.array([1, 2, 3, 1e300]), ValueError, "head.bias: holds .* not finite in float32"),
        ("head.running_var", np.full(4, -np.inf), ValueError, "head.running_var: holds values that are not finite"),
        ("head.num_batches_tracked", np.float64("nan"), ValueError, "tracked: holds values that are not finite"),
        ("head.bias", np.array(list("abcd")), DtypeError, "head.bias: expected numbers, got <U1"),
        ("head.bias", np.ones(4, bool), DtypeError, "head.bias: expected numbers, got bool"),
        ("head.bias", np.ones(4, complex), DtypeError, "head.bias: expected numbers, got complex128"),
    ],
)
def test_wrong_values_change_nothing(name, value, error, message, strict):
    model = deep_model(dtype="float32")
    before = model.state_dict()
    state = {key: array + 1 for key, array in before.items()} | {name: value() if callable(value) else value}
    with pytest.raises(error, match=message):
        model.load_state_dict(state, strict)
    assert_unchanged(model, before)


# ---- random state


def test_random_state_round_trip_through_json():
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    model, other = deep_model(), deep_model(seed=5)
    other.load_state_dict(model.state_dict())
    for _ in range(3):
        model.forward(x)
    state = json.loads(json.dumps(model.random_state()))
    assert state["inner.drop"] == [1, gpurnn.rng.name_key("inner.drop"), 3]
    expected = [model.forward(x)[0] for _ in range(2)]
    assert (other.forward(x)[0] != expected[0]).any()
    other.load_random_state(state)
    for output in expected:
        np.testing.assert_array_equal(other.forward(x)[0], output)
    assert other.random_state() == model.random_state()


@pytest.mark.parametrize("change", [{"more": [1, 2, 3]}, {"head": None}])
def test_random_state_of_another_model_is_refused(change):
    model = deep_model()
    before = model.random_state()
    state = {name: value for name, value in (before | change).items() if value is not None}
    with pytest.raises(KeyError, match="random state is of another model"):
        model.load_random_state(state)
    assert model.random_state() == before


@pytest.mark.parametrize("wrong", [[1, 2], [1, 2, "3"], [-1, 2, 3], [2**64, 2, 3], [1, 2, -3], [1.5, 2, 3], 7])
def test_damaged_random_state_changes_nothing(wrong):
    model = deep_model()
    before = model.random_state()
    state = {name: [5, 6, 7] for name in before} | {"head": wrong}  # the last module
    with pytest.raises((ValueError, TypeError)):
        model.load_random_state(state)
    assert model.random_state() == before


def test_bfloat16_on_a_gpu_needs_new_versions():
    from gpurnn.module.base import _check_gpu_bfloat16

    for cupy, numpy in (("14.0.0", "2.1.2"), ("14.2.0", "2.4.6"), ("15.0.0a1", "3.0")):
        _check_gpu_bfloat16(cupy, numpy)
    for cupy, numpy, message in (
        ("13.6.0", "2.4.6", "needs CuPy 14 or newer, here is 13.6.0"),
        ("14.2.0", "2.1.1", "needs NumPy 2.1.2 or newer, here is 2.1.1"),
        ("14.2.0", "1.26.4", "needs NumPy 2.1.2 or newer, here is 1.26.4"),
    ):
        with pytest.raises(DtypeError, match=message):
            _check_gpu_bfloat16(cupy, numpy)
