"""Groups of parameters, no decay of biases, and maximize: parity with torch's param_groups, schedules, saved states."""

import copy
import json
import pickle

import numpy as np
import pytest
from helpers import assert_close, cuda_ops
from optional import optional

import gpurnn
from gpurnn import GRU, SGD, Adam, AdamW, LayerNorm, Linear, RMSprop, Sequential

torch = optional("torch")

STEPS = 20
KINDS = {
    "sgd": (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": (RMSprop, "RMSprop", {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    "adam": (Adam, "Adam", {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "amsgrad": (Adam, "Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (AdamW, "AdamW", {"lr": 0.01, "weight_decay": 0.3}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("backend", ["numpy", "cpu"])
GROUPS = [
    {"match": "norm", "weight_decay": 0.0, "lr": 0.002},
    {"match": ["*.bias*"], "weight_decay": 0},
    {"match": ["head", "rnn.weight_ih*"], "lr": 0.2},
]


def build(backend="numpy", dtype="float64"):
    o = {"backend": backend, "dtype": dtype}
    return Sequential({"rnn": GRU(3, 5, seed=1, **o), "norm": LayerNorm(5, **o), "head": Linear(5, 2, seed=2, **o)})


def draw(model, step):
    random = np.random.default_rng(step)
    return {name: random.standard_normal(array.shape) for name, array in model.params.items()}


def run(model, optimizer, start=0, stop=STEPS, schedule=None):
    for step in range(start, stop):
        for name, grad in draw(model, step).items():
            model.grads[name][...] = model.xp.asarray(grad.astype(model.compute_dtype))
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return model.state_dict()


def settings_of(name):
    """The group of GROUPS that a parameter belongs to, as torch's settings, by hand: the first wins."""
    if name.startswith("norm."):
        return {"weight_decay": 0.0, "lr": 0.002}
    if ".bias" in name:
        return {"weight_decay": 0.0}
    if name.startswith("head.") or name.startswith("rnn.weight_ih"):
        return {"lr": 0.2}
    return {}


def run_torch(model, kind, settings, schedule=None, **more):
    """The same with one of torch's param_groups for each parameter."""
    _, name, options = KINDS[kind]
    params = {n: torch.nn.Parameter(torch.tensor(np.array(p))) for n, p in model.params.items()}
    groups = [{"params": [param], **settings(n)} for n, param in params.items()]
    optimizer = getattr(torch.optim, name)(groups, **options, **more)
    schedule = None if schedule is None else schedule(optimizer)
    for step in range(STEPS):
        for n, grad in draw(model, step).items():
            params[n].grad = torch.tensor(grad)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {n: param.detach().numpy() for n, param in params.items()}


def same(got, expected):
    """Some ten roundings in each of the steps."""
    assert got.keys() == expected.keys()
    for name in got:
        assert_close(got[name], expected[name], 10 * STEPS, name)


# ---- parity with torch


@both
@each_kind
@pytest.mark.parametrize("maximize", [False, True])
def test_groups_equal_torchs(kind, backend, maximize):
    model = build(backend)
    ours, _, options = KINDS[kind]
    expected = run_torch(model, kind, settings_of, maximize=maximize)
    optimizer = ours(model, groups=GROUPS, maximize=maximize, **options)
    same(run(model, optimizer), expected)


@both
@each_kind
def test_biases_and_norms_without_decay_equal_torchs(kind, backend):
    model = build(backend)
    ours, _, options = KINDS[kind]
    vectors = {name for name, array in model.params.items() if array.ndim < 2}
    assert vectors == {"rnn.bias_ih_l0", "rnn.bias_hh_l0", "norm.weight", "norm.bias", "head.bias"}
    expected = run_torch(model, kind, lambda name: {"weight_decay": 0.0} if name in vectors else {})
    same(run(model, ours(model, decay_biases=False, **options)), expected)


@both
@each_kind
def test_a_group_may_set_what_needs_no_other_arrays(kind, backend):
    change = {"sgd": {"momentum": 0.5}, "nesterov": {"momentum": 0.5}, "rmsprop": {"alpha": 0.5, "eps": 1e-3}}
    change = change.get(kind, {"betas": (0.5, 0.7), "eps": 1e-3})
    model = build(backend)
    ours, _, options = KINDS[kind]
    expected = run_torch(model, kind, lambda name: change if name.startswith("rnn") else {})
    same(run(model, ours(model, groups=[{"match": "rnn", **change}], **options)), expected)


@both
@each_kind
def test_maximize_is_minimizing_the_negative_to_the_bit(kind, backend):
    ours, _, options = KINDS[kind]
    down, up = build(backend, "float32"), build(backend, "float32")
    minimizer, maximizer = ours(down, **options), ours(up, maximize=True, **options)
    for step in range(STEPS):
        for name, grad in draw(down, step).items():
            up.grads[name], down.grads[name] = grad.astype("float32"), -grad.astype("float32")
        before = up.flat_grads.copy()
        minimizer.step()
        maximizer.step()
        np.testing.assert_array_equal(up.flat_grads, before)
    np.testing.assert_array_equal(up.flat_params, down.flat_params)


@both
def test_a_decay_that_a_group_sets_holds(backend):
    model = build(backend)
    groups = [{"match": "norm", "weight_decay": 0.5}, {"match": "head", "lr": 0.3}]
    optimizer = AdamW(model, lr=0.1, weight_decay=0.01, decay_biases=False, groups=groups)
    found = {name: (group["lr"], group["weight_decay"]) for group in optimizer.groups for name in group["names"]}
    assert found == {
        "rnn.weight_ih_l0": (0.1, 0.01), "rnn.weight_hh_l0": (0.1, 0.01),
        "rnn.bias_ih_l0": (0.1, 0.0), "rnn.bias_hh_l0": (0.1, 0.0),
        "norm.weight": (0.1, 0.5), "norm.bias": (0.1, 0.5), "head.weight": (0.3, 0.01), "head.bias": (0.3, 0.0),
    }  # fmt: skip


# ---- schedules


@each_kind
@pytest.mark.parametrize("name", ["step", "cosine"])
def test_schedules_scale_each_group_as_torchs(kind, name):
    model = build()
    ours, _, options = KINDS[kind]
    schedulers = torch.optim.lr_scheduler
    theirs = {
        "step": lambda o: schedulers.StepLR(o, 3, 0.5),
        "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    }[name]
    expected = run_torch(model, kind, settings_of, theirs)
    optimizer = ours(model, groups=GROUPS, **options)
    schedule = {
        "step": lambda: gpurnn.StepSchedule(optimizer, 3, 0.5),
        "cosine": lambda: gpurnn.CosineSchedule(optimizer, STEPS),
    }[name]()
    same(run(model, optimizer, schedule=schedule), expected)


def test_rates_follow_the_optimizers():
    model = build()
    optimizer = Adam(model, lr=0.1, groups=[{"match": "head", "lr": 0.3}])
    rates = lambda: [group["lr"] for group in optimizer.groups]  # noqa: E731
    assert rates() == [0.1, 0.3]  # to the bit
    optimizer.lr = 0.05
    assert rates() == [0.05, 0.15]
    gpurnn.WarmupSchedule(optimizer, 5)
    np.testing.assert_allclose(rates(), [0.01, 0.03], rtol=1e-15)
    still = Adam(build(), lr=0.0, groups=[{"match": "head", "lr": 0.3}])
    assert [group["lr"] for group in still.groups] == [0.0, 0.3]  # nothing to be in proportion to


# ---- flat buffers


def test_the_flat_buffer_is_cut_into_runs_of_equal_settings(monkeypatch):
    model = build()
    cuts = []
    monkeypatch.setattr(model.ops.__class__, "optimize", lambda self, kernel, p, *rest: cuts.append(p.size))
    sizes = [-(-array.size // 16) * 16 for array in model.params.values()]

    def cuts_of(optimizer):
        cuts.clear()
        optimizer.step()
        return list(cuts)

    assert cuts_of(Adam(model)) == [sum(sizes)]
    assert cuts_of(Adam(model, groups=[{"match": "*", "lr": 1e-4}])) == [sum(sizes)]
    assert cuts_of(Adam(model, groups=[{"match": "rnn", "lr": 1e-4}])) == [sum(sizes[:4]), sum(sizes[4:])]
    assert cuts_of(Adam(model, decay_biases=False)) == [sum(sizes[:2]), sum(sizes[2:6]), sizes[6], sizes[7]]
    optimizer = Adam(model, groups=[{"match": ["rnn.weight_hh*", "norm"], "lr": 1e-4}])
    model.freeze("rnn.bias*")
    assert cuts_of(optimizer) == [sizes[0], sizes[1], sum(sizes[4:6]), sum(sizes[6:])]


@both
def test_frozen_groups(backend):
    model = build(backend)
    before = model.state_dict()
    adam = Adam(model, lr=0.1, groups=[{"match": "rnn.*", "freeze": True}, {"match": "norm", "freeze": False}])
    assert model.frozen == [name for name in model.params if name.startswith("rnn.")]
    after = run(model, adam, stop=2)
    for name, array in after.items():
        assert (array == before[name]).all() == name.startswith("rnn.")
    model.unfreeze()
    assert (run(model, adam, 2, 3)["rnn.bias_ih_l0"] != before["rnn.bias_ih_l0"]).all()


def test_a_layer_inside_a_larger_model_still_has_its_groups():
    model = build()
    sgd = SGD(model, 0.5, groups=[{"match": "head", "lr": 0.0}])
    outer = Sequential({"inner": model})
    before = outer.state_dict()
    run(model, sgd, stop=1)
    for name, array in outer.state_dict().items():
        assert (array == before[name]).all() == name.startswith("inner.head")


@pytest.mark.emulated
@each_kind
def test_the_cuda_backend_does_the_same(kind):
    ops, results = cuda_ops(), []
    ours, _, options = KINDS[kind]
    for backend in (ops, "numpy"):
        model = build(backend)
        optimizer = ours(model, groups=GROUPS, maximize=True, decay_biases=False, **options)
        results.append(run(model, optimizer, stop=3))
    same(*results)


# ---- saved states


def through_json(state):
    return {"scalars": json.loads(json.dumps(state["scalars"])), "arrays": state["arrays"]}


@each_kind
@pytest.mark.parametrize(
    "how",
    [{"groups": GROUPS}, {"maximize": True}, {"decay_biases": False}, {"groups": GROUPS, "decay_biases": False}],
    ids=str,
)
def test_a_resumed_run_continues_to_the_bit(kind, how):
    ours, _, options = KINDS[kind]
    whole, first = build(), build()
    through = ours(whole, **how, **options)
    expected = run(whole, through, schedule=gpurnn.CosineSchedule(through, STEPS))
    optimizer = ours(first, **how, **options)
    schedule = gpurnn.CosineSchedule(optimizer, STEPS)
    run(first, optimizer, stop=7, schedule=schedule)
    again = build()
    again.load_state_dict(first.state_dict())
    resumed = ours(again, **how, **options)
    later = gpurnn.CosineSchedule(resumed, STEPS)
    resumed.load_state_dict(through_json(optimizer.state_dict()))
    later.load_state_dict(schedule.state_dict())
    assert resumed.groups == optimizer.groups
    found = run(again, resumed, 7, schedule=later)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_the_rate_in_the_state_is_the_one_that_counts():
    """A resumed optimizer that was built with another rate continues with the proportions of the first."""
    optimizer = Adam(build(), lr=0.1, groups=[{"match": "head", "lr": 0.3}])
    optimizer.lr = 0.05
    resumed = Adam(build(), lr=0.7, groups=[{"match": "head", "lr": 0.3}])
    resumed.load_state_dict(through_json(optimizer.state_dict()))
    assert [group["lr"] for group in resumed.groups] == [0.05, 0.15]


def test_states_without_groups_are_those_of_before():
    """An old state has no more keys than these, and loads."""
    state = AdamW(build()).state_dict()
    assert list(state["scalars"]) == ["kind", "lr", "steps", "betas", "eps", "weight_decay", "amsgrad"]
    AdamW(build()).load_state_dict(through_json(state))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"groups": GROUPS}, r"groups: this state was saved with \[\], expected \[{'match': \['norm'\]"),
        ({"maximize": True}, "maximize: this state was saved with False, expected True, the optimizer's own"),
        ({"decay_biases": False}, "decay_biases: this state was saved with True, expected False"),
    ],
)
def test_a_state_of_other_settings_is_refused(how, message):
    plain, other = Adam(build()), Adam(build(), **how)
    before = other.state_dict()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=message.split(":")[0]):
        plain.load_state_dict(before)
    assert other.state_dict()["scalars"] == before["scalars"]
    broken = through_json(before)
    if "first_lr" in broken["scalars"]:
        del broken["scalars"]["first_lr"]
        with pytest.raises(KeyError, match="first_lr"):
            other.load_state_dict(broken)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how):
    model = build()
    adam = Adam(model, groups=GROUPS, decay_biases=False, maximize=True)
    run(model, adam, stop=2)
    both_copied = copy.deepcopy((model, adam)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, adam)))
    other, its_adam = both_copied
    assert its_adam.groups == adam.groups and repr(its_adam) == repr(adam)
    expected, found = run(model, adam, 2, 4), run(other, its_adam, 2, 4)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_repr_says_it():
    assert repr(SGD(build(), 0.1, groups=GROUPS, maximize=True, decay_biases=False)) == (
        "SGD(lr=0.1, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, groups=3, maximize=True, "
        "decay_biases=False, steps=0)"
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ("norm", TypeError, r"groups: expected a list such as \[{'match': '\*\.bias\*', 'lr': 1e-4}\], got 'norm'"),
        ({"match": "norm"}, TypeError, "groups: expected a list such as"),
        (["norm"], TypeError, r"groups\[0\]: expected a dict with 'match' and settings, got 'norm'"),
        ([{"lr": 1}], TypeError, r"groups\[0\]: expected a dict with 'match' and settings"),
        ([{"match": 3}], TypeError, r"groups\[0\]: match should be a name or a list of names, got 3"),
        ([{"match": []}], TypeError, r"groups\[0\]: match should be a name or a list of names"),
        ([{"match": [3]}], TypeError, r"groups\[0\]: names should be strings, got int"),
        ([{"match": "nrom"}], KeyError, r"groups\[0\]: no parameter or layer is called 'nrom', there are rnn"),
        ([{"match": "norm", "decay": 1}], TypeError, r"groups\[0\]: unknown setting 'decay'. It takes match, lr, f"),
        ([{"match": "norm", "lr": -1}], ValueError, r"groups\[0\]: lr should be a finite number"),
        ([{"match": "norm", "eps": 0}], ValueError, r"groups\[0\]: eps should be a finite number"),
        ([{"match": "norm", "amsgrad": True}], ValueError, r"groups\[0\]: amsgrad=True needs other state arrays"),
        ([{"match": "norm", "freeze": True, "lr": 1}], ValueError, r"groups\[0\]: freeze leaves nothing to set"),
        ([{"match": "norm", "freeze": 1}], TypeError, r"groups\[0\]: freeze should be True or False"),
        ([{"match": "norm"}, {"match": "norm.*"}], ValueError, r"groups\[1\]: its parameters are all in groups before"),
        ([{"match": "drop"}], ValueError, r"groups\[0\]: it matches no parameter, match=\['drop'\]"),
    ],
)  # fmt: skip
def test_wrong_groups_are_refused(groups, error, message):
    model = build()
    model.drop = gpurnn.Dropout(0.5, backend="numpy", dtype="float64")
    with pytest.raises(error, match=message):
        Adam(model, groups=groups)
    if isinstance(groups, list):
        with pytest.raises(error):
            Adam(model, groups=[{"match": "head", "freeze": True}, *groups])
    assert model.frozen == []  # nothing half-changed


def test_wrong_flags_are_refused():
    for name in ("maximize", "decay_biases"):
        with pytest.raises(TypeError, match=f"{name} should be True or False, got 1"):
            Adam(build(), **{name: 1})


@pytest.mark.parametrize("name", ["step", "cosine", "plateau", "warmup", "warmup, finished"])
@pytest.mark.parametrize("base", [0.0, 0.1])
def test_a_schedule_scales_a_group_from_its_own_rate(name, base):
    """Also where the optimizer's own rate is 0, so that there is no ratio to it."""
    make = {
        "step": lambda o: gpurnn.StepSchedule(o, 3, 0.5),
        "cosine": lambda o: gpurnn.CosineSchedule(o, 10),
        "plateau": lambda o: gpurnn.PlateauSchedule(o, patience=1),
        "warmup": lambda o: gpurnn.WarmupSchedule(o, 20),
        "warmup, finished": lambda o: gpurnn.WarmupSchedule(o, 4, gpurnn.CosineSchedule(o, 6)),
    }[name]

    def start(model):
        optimizer = Adam(model, lr=base, groups=[{"match": "head", "lr": 0.3}])
        return optimizer, make(optimizer)

    alone = Adam(build(), lr=0.3)
    expected = make(alone)
    optimizer, schedule = start(build())
    for call in range(12):
        assert optimizer.lr == (0 if base == 0 else pytest.approx(alone.lr / 3, rel=1e-14, abs=0))
        assert optimizer.groups[1]["lr"] == pytest.approx(alone.lr, rel=1e-14, abs=0)
        if call == 7:  # a resumed run goes on; so does an optimizer without its schedule, where it was
            saved, rates = through_json(optimizer.state_dict()), [group["lr"] for group in optimizer.groups]
            through = json.loads(json.dumps(schedule.state_dict()))
            optimizer, schedule = start(build())
            optimizer.load_state_dict(saved)
            assert [group["lr"] for group in optimizer.groups] == rates
            optimizer, schedule = start(build())
            schedule.load_state_dict(through)
            assert [group["lr"] for group in optimizer.groups] == rates
        for one in (expected, schedule):
            one.step(1.0)


def test_a_base_rate_set_by_hand_before_the_schedule():
    optimizer = Adam(build(), lr=0.0, groups=[{"match": "head", "lr": 0.3}])
    optimizer.lr = 0.1
    schedule = gpurnn.StepSchedule(optimizer, 1, 0.5)
    schedule.step()
    assert [group["lr"] for group in optimizer.groups] == [0.05, 0.15]


def test_groups_are_read_only():
    optimizer = Adam(build(), lr=0.1, groups=[{"match": "head", "lr": 0.3}])
    group = optimizer.groups[1]
    changes = {
        "__setitem__": ("lr", 5), "__delitem__": ("lr",), "__ior__": ({"lr": 5},), "update": ({"lr": 5},),
        "setdefault": ("new", 5), "pop": ("lr",), "popitem": (), "clear": (),
    }  # fmt: skip
    for change, arguments in changes.items():
        with pytest.raises(TypeError, match=r"groups: read-only.*set the optimizer's lr.*build a new optimizer"):
            getattr(group, change)(*arguments)
    with pytest.raises(TypeError):
        optimizer.groups[1] = {"lr": 5}
    assert dict(group) == optimizer.groups[1] and group["lr"] == 0.3
    for copied in (copy.deepcopy(group), pickle.loads(pickle.dumps(group)), json.loads(json.dumps(group))):
        assert copied == group
