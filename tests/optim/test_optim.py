"""Optimizers, clipping and schedules: equal to torch, resumable to the bit, and nothing changes on an error."""

import itertools
import json
import math
import tracemalloc

import numpy as np
import pytest
from optional import needs, optional

from gpurnn import optim
from gpurnn.dtypes import check_dtype
from gpurnn.errors import DtypeError, ShapeError
from gpurnn.layers import Linear, Sequential
from gpurnn.module import Module

torch = optional("torch")

STEPS = 60


both = pytest.mark.parametrize("backend", ["numpy", "cpu"])  # array code, and what is compiled


def build(dtype="float64", features=6, backend="cpu"):
    def linear(*sizes, seed):
        return Linear(*sizes, backend=backend, dtype=dtype, seed=seed)

    return Sequential(linear(features, 5, seed=1), Sequential(linear(5, 4, seed=2), linear(4, 1, seed=3)))


def gradients(model, step):
    """Random gradients by name, of a size that falls with the step; some are zero for the first ten steps."""
    random = np.random.default_rng(step)
    grads = {name: random.standard_normal(param.shape) * math.exp(-step / 20) for name, param in model.params.items()}
    if step < 10:
        grads["0.bias"][::2] = 0
    return grads


def set_gradients(model, step, scale=1.0):
    for name, grad in gradients(model, step).items():
        model.grads[name] = model.xp.asarray(scale * grad, dtype=model.dtype)


def run(model, optimizer, start=0, stop=STEPS):
    for step in range(start, stop):
        set_gradients(model, step)
        optimizer.step()
    return model.state_dict()


def torch_parameters(model, dtype=None):
    return {name: torch.nn.Parameter(torch.tensor(np.array(p), dtype=dtype)) for name, p in model.params.items()}


def run_torch(model, make, dtype="float64"):
    """The same steps by torch from the model's values, one tensor a parameter."""
    dtype = getattr(torch, dtype)
    params = torch_parameters(model, dtype)
    optimizer = make(list(params.values()))
    for step in range(STEPS):
        for name, grad in gradients(model, step).items():
            params[name].grad = torch.tensor(grad, dtype=dtype)
        optimizer.step()
    return {name: param.detach().numpy() for name, param in params.items()}


def largest_difference(got, want):
    """Largest difference of two states relative to the largest value."""
    assert got.keys() == want.keys()
    largest = max(np.abs(value).max() for value in want.values())
    return max(np.abs(got[name].astype(np.float64) - want[name]).max() for name in want) / largest


def options(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


MOMENTUM = [*options(momentum=[0.0, 0.9], dampening=[0.0, 0.3]), {"momentum": 0.9, "nesterov": True}]
DECAY = [0.0, 0.1]
CASES = [
    *(("SGD", {"lr": 0.05, **case, "weight_decay": decay}) for case in MOMENTUM for decay in DECAY),
    *(
        ("RMSprop", {"lr": 0.01, "alpha": 0.9, **case})
        for case in options(centered=[False, True], momentum=[0.0, 0.8], weight_decay=DECAY, eps=[1e-8, 1e-3])
    ),
    *(
        (kind, {"lr": 0.02, "betas": (0.8, 0.95), **case})
        for kind in ("Adam", "AdamW")
        for case in options(amsgrad=[False, True], weight_decay=DECAY, eps=[1e-8, 1e-3])
    ),
    ("RMSprop", {}),
    ("Adam", {}),
    ("AdamW", {}),
]
SHORT = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.8, "centered": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
]

# ---- optimizers


@both
@pytest.mark.parametrize(("kind", "hyper"), CASES)
def test_equals_torch(kind, hyper, backend):
    model = build(backend=backend)
    want = run_torch(model, lambda params: getattr(torch.optim, kind)(params, **hyper))
    before = model.state_dict()
    got = run(model, getattr(optim, kind)(model, **hyper))
    assert largest_difference(got, want) < 1e-12
    assert largest_difference(got, before) > 1e-3


@pytest.mark.parametrize(("kind", "hyper"), SHORT)
def test_a_model_of_many_blocks_equals_torch(kind, hyper, monkeypatch):
    monkeypatch.setattr(optim.blocks, "CPU_BLOCK", 7)
    model = build(backend="numpy")
    assert model.flat_params.size % 7
    want = run_torch(model, lambda params: getattr(torch.optim, kind)(params, **hyper))
    assert largest_difference(run(model, getattr(optim, kind)(model, **hyper)), want) < 1e-12


@both
@pytest.mark.parametrize(("kind", "hyper"), SHORT)
def test_float32_is_as_exact_as_torch(kind, hyper, backend):
    def make(params):
        return getattr(torch.optim, kind)(params, **hyper)

    model = build("float32", backend=backend)
    exact, plain = run_torch(model, make), run_torch(model, make, "float32")
    got = run(model, getattr(optim, kind)(model, **hyper))
    assert all(array.dtype == np.float32 for array in got.values())
    assert largest_difference(got, exact) < 2 * largest_difference(plain, exact)


def test_a_step_leaves_gradients_and_moves_views():
    model = build()
    weight, optimizer = model[0].params["weight"], optim.SGD(model, lr=0.5)
    before = weight.copy()
    set_gradients(model, 0)
    grads = model.flat_grads.copy()
    optimizer.step()
    assert np.array_equal(model.flat_grads, grads)
    np.testing.assert_allclose(model[0].params["weight"], before - 0.5 * model[0].grads["weight"], rtol=1e-15)
    assert np.shares_memory(weight, model.flat_params)


def test_a_model_joined_into_a_bigger_one_afterwards_still_trains():
    inner = Linear(3, 2, backend="cpu", dtype="float64", seed=1)
    optimizer = optim.SGD(inner, lr=1.0)
    outer = Sequential(inner, Linear(2, 2, backend="cpu", dtype="float64", seed=2))
    before = outer.state_dict()
    outer.flat_grads.fill(1)
    optimizer.step()
    after = outer.state_dict()
    np.testing.assert_allclose(after["0.weight"], before["0.weight"] - 1)
    assert np.array_equal(after["1.weight"], before["1.weight"])


@pytest.mark.parametrize("action", [lambda o: o.step(), lambda o: o.state_dict()])
def test_a_model_of_another_size_is_refused(action):
    model = Linear(3, 2, backend="cpu", seed=1)
    optimizer = optim.Adam(model)
    model._declare({"weight": np.zeros((2, 4)), "bias": np.zeros(2)})
    with pytest.raises(ValueError, match="had 8 parameters when the optimizer was built and has 10 now"):
        action(optimizer)
    assert optimizer.steps == 0


@pytest.mark.parametrize(("kind", "hyper"), SHORT)
def test_a_step_allocates_nothing(kind, hyper):
    model = build("float32", features=40_000)
    optimizer = getattr(optim, kind)(model, **hyper)
    set_gradients(model, 0)
    optimizer.step()
    tracemalloc.start()
    try:
        optimizer.step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert model.flat_params.nbytes > 800_000
    assert peak < 10_000


def test_a_rate_of_zero_changes_no_parameter_and_lr_is_settable():
    model = build()
    optimizer = optim.Adam(model, lr=0)
    before = model.flat_params.copy()
    run(model, optimizer, stop=2)
    assert np.array_equal(model.flat_params, before)
    optimizer.lr = 0.25
    run(model, optimizer, stop=1)
    assert not np.array_equal(model.flat_params, before)
    assert optimizer.lr == 0.25
    assert "lr=0.25" in repr(optimizer) and "steps=3" in repr(optimizer)


@pytest.mark.parametrize(
    ("kind", "hyper", "error", "message"),
    [
        ("SGD", {"lr": math.nan}, ValueError, "lr should be a finite number"),
        ("SGD", {"lr": -0.1}, ValueError, "lr"),
        ("SGD", {"lr": "0.1"}, TypeError, "lr should be a number, got str"),
        ("SGD", {"lr": 0.1, "momentum": 1.0}, ValueError, "momentum"),
        ("SGD", {"lr": 0.1, "dampening": 1.5}, ValueError, "dampening"),
        ("SGD", {"lr": 0.1, "nesterov": True}, ValueError, "nesterov needs momentum above 0"),
        ("SGD", {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "dampening 0.1"),
        ("SGD", {"lr": 0.1, "weight_decay": math.inf}, ValueError, "weight_decay"),
        ("RMSprop", {"alpha": 1.0}, ValueError, "alpha"),
        ("RMSprop", {"eps": 0.0}, ValueError, "eps"),
        ("RMSprop", {"centered": "yes"}, TypeError, "centered"),
        ("Adam", {"betas": 0.9}, TypeError, "betas should be a pair"),
        ("Adam", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        ("AdamW", {"weight_decay": -1}, ValueError, "weight_decay"),
    ],
)
def test_hyper_parameters_are_checked(kind, hyper, error, message):
    with pytest.raises(error, match=message):
        getattr(optim, kind)(build(), **hyper)


def test_a_bad_rate_is_refused_and_not_taken():
    optimizer = optim.Adam(build())
    for value in (math.nan, math.inf, -1e-3):
        with pytest.raises(ValueError, match="lr"):
            optimizer.lr = value
    assert optimizer.lr == 1e-3
    with pytest.raises(TypeError):
        optimizer.hyper["eps"] = 1.0


def test_the_model_is_checked():
    empty = Module("cpu")
    with pytest.raises(TypeError, match="model should be a gpurnn layer or model, got list"):
        optim.Adam([1, 2])
    with pytest.raises(ValueError, match="no parameters"):
        optim.Adam(empty)
    with pytest.raises(TypeError, match="model"):
        optim.clip_grad_norm(build().flat_grads, 1.0)
    with pytest.raises(TypeError, match="model"):
        optim.clip_grad_value(build().flat_grads, 1.0)
    assert float(optim.clip_grad_norm(empty, 1.0)) == 0


# ---- optimizer states


def through_json(state):
    """As a checkpoint would carry it."""
    scalars = json.loads(json.dumps(state["scalars"], allow_nan=False))
    return {"scalars": scalars, "arrays": {name: array.copy() for name, array in state["arrays"].items()}}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "hyper"), CASES)
def test_a_resumed_run_continues_to_the_bit(kind, hyper, dtype):
    hyper = {"lr": 0.1, **hyper}
    model = build(dtype)
    optimizer = getattr(optim, kind)(model, **hyper)
    run(model, optimizer, stop=7)
    optimizer.lr = 0.03
    weights, state = model.state_dict(), through_json(optimizer.state_dict())
    want = run(model, optimizer, 7, 15)

    other = build(dtype)
    other.load_state_dict(weights)
    resumed = getattr(optim, kind)(other, **{**hyper, "lr": 7.0})
    resumed.load_state_dict(state)
    assert resumed.lr == 0.03 and resumed.steps == 7 and resumed.hyper == optimizer.hyper
    got = run(other, resumed, 7, 15)
    assert all(np.array_equal(got[name], want[name]) for name in want)
    assert resumed.state_dict()["scalars"] == optimizer.state_dict()["scalars"]


def test_state_names_are_the_parameters_and_arrays_are_copies():
    model = build()
    optimizer = optim.Adam(model)
    run(model, optimizer, stop=1)
    state = optimizer.state_dict()
    assert state["scalars"] == {
        "kind": "Adam",
        "lr": 1e-3,
        "steps": 1,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
    }
    assert {name: array.shape for name, array in state["arrays"].items()} == {
        f"{kind}.{name}": param.shape for kind in ("exp_avg", "exp_avg_sq") for name, param in model.params.items()
    }
    np.testing.assert_allclose(state["arrays"]["exp_avg.1.0.weight"], 0.1 * model.grads["1.0.weight"], rtol=1e-14)
    state["arrays"]["exp_avg.0.bias"].fill(99)
    assert not (optimizer.state_dict()["arrays"]["exp_avg.0.bias"] == 99).any()


def without(name):
    return lambda part: part.pop(name)


def setting(name, value):
    return lambda part: part.update({name: value})


@pytest.mark.parametrize(
    ("part", "change", "error", "message"),
    [
        ("scalars", setting("kind", "SGD"), ValueError, "is of kind 'SGD', expected 'Adam'"),
        ("scalars", without("steps"), KeyError, "missing.*steps"),
        ("scalars", setting("surprise", 1), KeyError, "unknown.*surprise"),
        ("scalars", setting("lr", math.nan), ValueError, "lr"),
        ("scalars", setting("steps", -1), ValueError, "steps"),
        ("scalars", setting("steps", 2.5), TypeError, "steps"),
        ("scalars", setting("betas", [0.9, 2.0]), ValueError, "betas"),
        ("scalars", setting("amsgrad", True), ValueError, "amsgrad"),
        ("arrays", without("exp_avg.0.bias"), KeyError, "missing.*exp_avg.0.bias"),
        ("arrays", setting("exp_avg.nowhere", np.zeros(3)), KeyError, "unknown.*exp_avg.nowhere"),
        ("arrays", setting("exp_avg.0.bias", np.zeros(3)), ShapeError, r"exp_avg.0.bias: expected shape \(5,\)"),
        ("arrays", setting("exp_avg.0.bias", np.zeros(5, complex)), DtypeError, "exp_avg.0.bias"),
        ("arrays", setting("exp_avg_sq.1.1.bias", np.array([math.nan])), ValueError, "exp_avg_sq.1.1.bias"),
        ("arrays", setting("exp_avg_sq.1.1.bias", np.array([1e300])), ValueError, "finite in float32"),
        ("arrays", setting("exp_avg_sq.1.1.bias", np.array([-math.inf])), ValueError, "finite in float32"),
        ("arrays", setting("exp_avg.1.1.bias", np.array([math.inf])), ValueError, "finite in float32"),
    ],
)
def test_a_wrong_state_is_refused_and_nothing_changes(part, change, error, message):
    donor = build("float32")
    other = optim.Adam(donor, lr=0.5)
    run(donor, other, stop=3)
    state = other.state_dict()
    change(state[part])

    model = build("float32")
    optimizer = optim.Adam(model)
    run(model, optimizer, stop=2)
    before = optimizer.state_dict()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["scalars"] == before["scalars"]
    assert all(np.array_equal(after["arrays"][name], before["arrays"][name]) for name in before["arrays"])


@needs("ml_dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_state_in_another_float_type_is_taken(dtype):
    donor = build("float32")
    other = optim.Adam(donor)
    run(donor, other, stop=3)
    state = other.state_dict()
    narrow = {name: array.astype(check_dtype(dtype)) for name, array in state["arrays"].items()}
    other.load_state_dict(state | {"arrays": narrow})
    for name, array in other.state_dict()["arrays"].items():
        np.testing.assert_array_equal(array, narrow[name].astype("float32"))


@pytest.mark.parametrize("state", [None, [], {}, {"scalars": {}}, {"scalars": {"kind": "Adam"}, "arrays": {}}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises((TypeError, KeyError), match="optimizer state"):
        optim.Adam(build()).load_state_dict(state)


# ---- clipping


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 5.0, 1e6, math.inf])
def test_clip_grad_norm_equals_torch(dtype, max_norm, backend, monkeypatch):
    monkeypatch.setattr(optim.blocks, "CPU_BLOCK", 9)
    model = build(dtype, backend=backend)
    set_gradients(model, 0)
    params = torch_parameters(model)
    for name, grad in model.grads.items():
        params[name].grad = torch.tensor(grad.copy())
    want = torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    got = optim.clip_grad_norm(model, max_norm)
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    assert float(got) == pytest.approx(float(want), rel=tolerance)
    for name, grad in model.grads.items():
        np.testing.assert_allclose(grad, params[name].grad.numpy(), rtol=tolerance)


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients(dtype, bad, backend):
    model = build(dtype, backend=backend)
    set_gradients(model, 0)
    model.flat_grads[17] = bad
    before = model.flat_grads.copy()
    assert not math.isfinite(optim.clip_grad_norm(model, 1e-3))
    assert np.array_equal(model.flat_grads, before, equal_nan=True)


@both
def test_large_float32_gradients_do_not_overflow_the_norm(backend):
    model = build("float32", backend=backend)
    model.flat_grads.fill(1e30)
    assert float(optim.clip_grad_norm(model, 1.0)) == pytest.approx(1e30 * math.sqrt(model.flat_grads.size))
    assert np.linalg.norm(model.flat_grads.astype(np.float64)) == pytest.approx(1.0, rel=1e-6)


@both
def test_a_float64_norm_beyond_the_range_is_infinite_without_a_warning(backend):
    model = build(backend=backend)
    model.flat_grads.fill(1e200)
    assert float(optim.clip_grad_norm(model, 1.0)) == math.inf


def test_clip_grad_value():
    model = build("float32")
    set_gradients(model, 0)
    model.flat_grads[:3] = [math.nan, math.inf, -math.inf]
    before = model.flat_grads.copy()
    optim.clip_grad_value(model, 0.5)
    np.testing.assert_array_equal(model.flat_grads, np.clip(before, -0.5, 0.5))
    assert math.isnan(model.flat_grads[0])
    assert np.nanmax(np.abs(model.flat_grads)) == 0.5


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
@pytest.mark.parametrize("bound", [0, -1.0, math.nan, "1"])
def test_a_bad_bound_is_refused(clip, bound):
    model = build()
    set_gradients(model, 0)
    before = model.flat_grads.copy()
    with pytest.raises((ValueError, TypeError), match="max_norm|value"):
        clip(model, bound)
    assert np.array_equal(model.flat_grads, before)


# ---- schedules

LR = 0.3


def optimizer_at(lr=LR):
    return optim.SGD(build(), lr=lr)


def rates(schedule, calls, metrics=None):
    """The optimizer's rate before the first call, and after each."""
    found = [schedule._opt.lr]
    for call in range(calls):
        schedule.step(None if metrics is None else metrics[call])
        assert schedule._opt.lr == schedule.lr
        found.append(schedule.lr)
    return found


def torch_rates(make, calls, metrics=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = make(optimizer)
    found = [optimizer.param_groups[0]["lr"]]
    for call in range(calls):
        optimizer.step()
        schedule.step(*([] if metrics is None else [metrics[call]]))
        found.append(optimizer.param_groups[0]["lr"])
    return found


def losses(calls):
    """A falling loss with long plateaus, worse and barely better values, and an inf."""
    random = np.random.default_rng(4)
    values = 2.0 * 0.98 ** (np.arange(calls) // 9 * 9) + 0.01 * random.standard_normal(calls)
    values[5] = math.inf
    values[30:34] = values[29] * (1 - 5e-5 * np.arange(1, 5))
    return values.tolist()


TORCH = optional("torch.optim.lr_scheduler")


@pytest.mark.parametrize(("step_size", "gamma"), [(1, 0.9), (7, 0.1), (100, 0.5), (3, 1.0)])
def test_step_schedule_equals_torch(step_size, gamma):
    want = torch_rates(lambda o: TORCH.StepLR(o, step_size, gamma), 60)
    assert rates(optim.StepSchedule(optimizer_at(), step_size, gamma), 60) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("total", "min_lr"), [(1, 0.0), (7, 0.0), (60, 0.01), (60, LR)])
def test_cosine_schedule_equals_torch_and_stays_at_the_minimum(total, min_lr):
    want = torch_rates(lambda o: TORCH.CosineAnnealingLR(o, total, min_lr), total)
    got = rates(optim.CosineSchedule(optimizer_at(), total, min_lr), 3 * total)
    assert got[: total + 1] == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert got[0] == LR
    assert set(got[total:]) == {min_lr}


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("min_lr", [0.0, 0.05])
def test_plateau_schedule_equals_torch(patience, threshold, min_lr):
    def make(o):
        return TORCH.ReduceLROnPlateau(o, factor=0.7, patience=patience, threshold=threshold, min_lr=min_lr, eps=0)

    metrics = losses(80)
    want = torch_rates(make, 80, metrics)
    got = rates(optim.PlateauSchedule(optimizer_at(), 0.7, patience, threshold, min_lr), 80, metrics)
    assert len(set(want)) > 3
    assert got == pytest.approx(want, rel=1e-12)


def test_plateau_defaults_are_torchs():
    metrics = [1.0] * 40
    want = torch_rates(TORCH.ReduceLROnPlateau, 40, metrics)
    assert rates(optim.PlateauSchedule(optimizer_at()), 40, metrics) == pytest.approx(want, rel=1e-12)
    assert want[-1] < 2e-3 * LR


def test_plateau_takes_scalars_of_the_backend():
    schedule = optim.PlateauSchedule(optimizer_at(), patience=0)
    schedule.step(np.array(0.5))
    schedule.step(np.float32(0.25))
    assert schedule.state_dict()["best"] == 0.25
    json.dumps(schedule.state_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (None, TypeError, "metric is missing"),
        (math.nan, ValueError, "metric should be a number above -inf, got nan"),
        (-math.inf, ValueError, "metric"),
        ("good", TypeError, "metric should be a number, got 'good'"),
        ([0.5], TypeError, "metric"),
    ],
)
@pytest.mark.parametrize("warmup", [False, True])
def test_plateau_refuses_a_bad_metric_and_nothing_changes(metric, error, message, warmup):
    optimizer = optimizer_at()
    schedule = optim.PlateauSchedule(optimizer, patience=0)
    if warmup:
        schedule = optim.WarmupSchedule(optimizer, 1, after=schedule)
        schedule.step()
    schedule.step(1.0)
    before = schedule.state_dict()
    with pytest.raises(error, match=message):
        schedule.step(metric)
    assert schedule.state_dict() == before
    assert optimizer.lr == LR


@pytest.mark.parametrize("steps", [2, 5, 17])
def test_warmup_equals_torchs_linear(steps):
    want = torch_rates(lambda o: TORCH.LinearLR(o, 1 / steps, total_iters=steps - 1), 40)
    got = rates(optim.WarmupSchedule(optimizer_at(), steps), 40)
    assert got == pytest.approx(want, rel=1e-12)
    assert got[:steps] == pytest.approx([LR * (k + 1) / steps for k in range(steps)], rel=1e-15)
    assert set(got[steps - 1 :]) == {LR}


AFTER = {
    "cosine": (lambda o: optim.CosineSchedule(o, 30, 0.01), lambda o: TORCH.CosineAnnealingLR(o, 30, 0.01)),
    "step": (lambda o: optim.StepSchedule(o, 4, 0.5), lambda o: TORCH.StepLR(o, 4, 0.5)),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("steps", [2, 5, 17])
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")  # inside SequentialLR
def test_warmup_continues_as_torchs_sequential(after, steps):
    ours, theirs = AFTER[after]

    def make(o):
        warmup = TORCH.LinearLR(o, 1 / steps, total_iters=steps - 1)
        return TORCH.SequentialLR(o, [warmup, theirs(o)], [steps])

    optimizer = optimizer_at()
    got = rates(optim.WarmupSchedule(optimizer, steps, after=ours(optimizer)), steps + 30)
    assert got == pytest.approx(torch_rates(make, steps + 30), rel=1e-12)
    assert got[steps:] == rates(ours(optimizer_at()), 30)  # after, unchanged, `steps` calls later


def test_warmup_of_one_step_is_the_schedule_behind_it():
    optimizer = optimizer_at()
    got = rates(optim.WarmupSchedule(optimizer, 1, after=optim.CosineSchedule(optimizer, 9)), 12)
    assert got == [LR, *rates(optim.CosineSchedule(optimizer_at(), 9), 11)]


def test_warmup_passes_the_metric_on_once_it_is_over():
    optimizer = optimizer_at()
    schedule = optim.WarmupSchedule(optimizer, 3, after=optim.PlateauSchedule(optimizer, 0.5, patience=1))
    got = rates(schedule, 8, [None, math.nan, None, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert got[2:] == pytest.approx([LR, LR, LR, LR, LR / 2, LR / 2, LR / 4])


def test_constant_schedule():
    assert set(rates(optim.ConstantSchedule(optimizer_at()), 5)) == {LR}


SCHEDULES = {
    "constant": optim.ConstantSchedule,
    "step": lambda o: optim.StepSchedule(o, 4, 0.7),
    "cosine": lambda o: optim.CosineSchedule(o, 20, 0.01),
    "plateau": lambda o: optim.PlateauSchedule(o, 0.6, 1),
    "warmup": lambda o: optim.WarmupSchedule(o, 6),
    "warmup, cosine": lambda o: optim.WarmupSchedule(o, 6, after=optim.CosineSchedule(o, 20)),
    "warmup, plateau": lambda o: optim.WarmupSchedule(o, 6, after=optim.PlateauSchedule(o, 0.6, 1)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [0, 3, 6, 13])
def test_a_resumed_schedule_continues_to_the_bit(name, stop):
    """Built on an optimizer that already carries the rate of the saved run, as after its load_state_dict."""
    metrics = losses(40)
    schedule = SCHEDULES[name](optimizer_at())
    rates(schedule, stop, metrics)
    state, lr = json.loads(json.dumps(schedule.state_dict(), allow_nan=False)), schedule.lr
    want = rates(schedule, 40 - stop, metrics[stop:])

    resumed = SCHEDULES[name](optimizer_at(lr=0.123))
    resumed._opt.lr = lr
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert rates(resumed, 40 - stop, metrics[stop:]) == want


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_wrong_schedule_state_is_refused_and_nothing_changes(name):
    optimizer = optimizer_at()
    schedule = SCHEDULES[name](optimizer)
    rates(schedule, 9, losses(40))
    before, lr = schedule.state_dict(), optimizer.lr
    other = SCHEDULES[name](optimizer_at(0.2)).state_dict()
    counter = "bad" if name == "plateau" else "calls"
    wrong = [None, [], {}, {**other, "kind": "Other"}, {**other, "surprise": 1}]
    wrong += [{**other, "base_lr": value} for value in (math.nan, -1, "1")]
    wrong += [{**other, counter: value} for value in (-1, 1.5, None)]
    wrong += [{key: value for key, value in other.items() if key != missing} for missing in other]
    if "after" in other:
        wrong += [{**other, "after": {**other["after"], "base_lr": math.nan}}, {**other, "after": None}]
        wrong += [{**other, "after": {**other["after"], "kind": "StepSchedule"}}]
    for state in wrong:
        with pytest.raises((ValueError, TypeError, KeyError), match="state|base_lr|" + counter):
            schedule.load_state_dict(state)
        assert schedule.state_dict() == before
        assert optimizer.lr == lr


@pytest.mark.parametrize(
    ("build_schedule", "error", "message"),
    [
        (lambda o: optim.ConstantSchedule(o.model), TypeError, "opt should be a gpurnn optimizer, got Sequential"),
        (lambda o: optim.StepSchedule(o, 0), ValueError, "step_size"),
        (lambda o: optim.StepSchedule(o, 2.0), TypeError, "step_size"),
        (lambda o: optim.StepSchedule(o, 2, 1.5), ValueError, "gamma"),
        (lambda o: optim.StepSchedule(o, 2, math.nan), ValueError, "gamma"),
        (lambda o: optim.CosineSchedule(o, 0), ValueError, "total"),
        (lambda o: optim.CosineSchedule(o, 5, 0.5), ValueError, "min_lr"),
        (lambda o: optim.CosineSchedule(o, 5, math.nan), ValueError, "min_lr"),
        (lambda o: optim.PlateauSchedule(o, factor=1.0), ValueError, "factor"),
        (lambda o: optim.PlateauSchedule(o, patience=-1), ValueError, "patience"),
        (lambda o: optim.PlateauSchedule(o, threshold=1.0), ValueError, "threshold"),
        (lambda o: optim.PlateauSchedule(o, min_lr=1.0), ValueError, "min_lr"),
        (lambda o: optim.WarmupSchedule(o, 0), ValueError, "steps"),
        (lambda o: optim.WarmupSchedule(o, 3, after=0.1), TypeError, "after should be a gpurnn schedule"),
        (lambda o: optim.WarmupSchedule(o, 3, after=optim.ConstantSchedule(optimizer_at())), ValueError, "same"),
    ],
)
def test_schedule_arguments_are_checked_and_the_rate_stays(build_schedule, error, message):
    optimizer = optimizer_at()
    with pytest.raises(error, match=message):
        build_schedule(optimizer)
    assert optimizer.lr == LR


def test_warmup_refuses_a_schedule_whose_base_is_no_longer_the_rate():
    optimizer = optimizer_at()
    after = optim.CosineSchedule(optimizer, 9)
    optimizer.lr = 1.0
    with pytest.raises(ValueError, match="after is at the rate 0.3, the optimizer at 1.0"):
        optim.WarmupSchedule(optimizer, 3, after=after)
    assert optimizer.lr == 1.0


def test_a_schedule_shows_where_it_is():
    schedule = SCHEDULES["step"](optimizer_at())
    rates(schedule, 5)
    assert repr(schedule) == f"StepSchedule(lr={schedule.lr}, base_lr=0.3, step_size=4, gamma=0.7, calls=5)"


# ---- on the GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "hyper"), SHORT)
def test_the_gpu_equals_the_cpu(kind, hyper):
    cpu, gpu = build(), build(backend="cuda")
    gpu.load_state_dict(cpu.state_dict())
    ours, theirs = (getattr(optim, kind)(model, **hyper) for model in (cpu, gpu))
    for step in range(STEPS):
        for model, optimizer in ((cpu, ours), (gpu, theirs)):
            set_gradients(model, step)
            optim.clip_grad_value(model, 1.5)
            optim.clip_grad_norm(model, 2.0)
            optimizer.step()
    assert largest_difference(gpu.state_dict(), cpu.state_dict()) < 1e-12
    theirs.load_state_dict(ours.state_dict())
    assert largest_difference(theirs.state_dict()["arrays"], ours.state_dict()["arrays"]) == 0
