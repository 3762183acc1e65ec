"""Whole updates as CUDA graphs, on the emulated device: the bits of ``fit`` with and without are compared."""

import contextlib
import functools

import numpy as np
import pytest
from cuda_on_cpu.cuda import Graph
from cuda_on_cpu.device import Array
from cuda_on_cpu.emulator import KernelError
from helpers import all_equal, cuda_ops

import gpurnn
from gpurnn.backends.cuda.recording import Recording, UpdateGraph
from gpurnn.errors import BackendError
from gpurnn.module.step_graph import StepGraph
from gpurnn.testing import leaves

pytestmark = pytest.mark.emulated

TEXT = np.random.default_rng(0).integers(0, 7, 43)  # three pieces of 14: batches of T 3, four times, and of T 2


@pytest.fixture
def train(monkeypatch):
    """A function that trains a language model for three epochs, with or without graphs, and returns a ``Run``."""
    arrays = gpurnn.losses.common.array_ops

    def run(graph, edits=(), optimizer="adam", scale=None, text=TEXT, prepare=None, **options):
        ops = cuda_ops(edits=edits, checked=False)
        monkeypatch.setattr(
            gpurnn.losses.common, "array_ops", lambda *a: ops if isinstance(a[0], ops.xp.ndarray) else arrays(*a)
        )
        names = [
            "kind",
            "schedule_",
            "dtype",
            "H",
            "num_layers",
            "between",
            "wavefront",
            "bidirectional",
            "norm",
            "floats",
        ]
        model = language_model(ops, **{name: options.pop(name) for name in names if name in options})
        how = {"epochs": 3, "clip_norm": 0.5, "progress": False, "lr": 0.05} | options
        if not isinstance(optimizer, str):
            del how["lr"]
            optimizer = optimizer(model)
        if scale is not None:
            how["loss_scaler"] = gpurnn.LossScaler(scale, growth_interval=3)
        if prepare is not None:
            prepare(model)
        return Run(ops, model, text, optimizer, graph, how)

    return run


def language_model(ops, kind="lstm", schedule_="step", dtype="float32", H=5, between=0.0, **options):
    norm, floats = (options.pop(name, False) for name in ("norm", "floats"))
    layer, how = {"lstm": gpurnn.LSTM, "gru": gpurnn.GRU}[kind], {"backend": ops, "dtype": dtype}
    both = 2 if options.get("bidirectional") else 1
    layers = [
        *([] if floats else [gpurnn.Embedding(7, 4, seed=1, **how)]),
        layer(4, H, seed=2, schedule=schedule_, dropout=between, **options, **how),
        gpurnn.Dropout(0.2, seed=3, **how),
        *([gpurnn.BatchNorm(H * both, **how)] if norm else []),
        gpurnn.Linear(H * both, 7, seed=4, **how),
    ]
    return gpurnn.Sequential(*layers)


class Run:
    """A training: its records, its arrays at the end, how many updates were graphs."""

    def __init__(self, ops, model, text, optimizer, graph, how):
        self.ops, self.model, self.graphs = ops, model, 0
        history, self.error = None, None
        loss = how.pop("loss", gpurnn.cross_entropy)
        batches = how.pop("batches", None) or gpurnn.TextBatches(text, batch_size=3, steps=3)
        try:
            with self.counted():
                history = gpurnn.fit(model, loss, batches, optimizer=optimizer, graph=graph, **how)
        except (gpurnn.train.TrainingError, ValueError) as error:
            self.error, history = error, error.history
        self.records = [{name: value for name, value in one.items() if name != "seconds"} for one in history]
        self.arrays = model.state_dict() | {"calls": np.array([module.calls for _, module in model.modules()])}
        rows = [row for row in ops.recordings() if row["pass"] == "update"]
        self.recorded = len(rows) if all(row["recorded"] for row in rows) else [row["reason"] for row in rows]

    @contextlib.contextmanager
    def counted(self):
        launch = UpdateGraph.launch

        def counting(graph, *args):
            self.graphs += 1
            launch(graph, *args)

        UpdateGraph.launch = counting
        try:
            yield
        finally:
            UpdateGraph.launch = launch


def check_equal(train, edits=(), **options):
    """Both ways have the same bits; returns the recorded run. edits: errors planted in that one."""
    plain, run = train(False, **options), train(True, edits=edits, **options)
    all_equal(plain.arrays, run.arrays)
    assert plain.records == run.records and len(plain.records) >= 3
    return run


SGD = functools.partial(gpurnn.SGD, lr=0.2, momentum=0.9, weight_decay=0.01)
CASES = {
    "lstm step": {},
    "gru block sgd": {"kind": "gru", "schedule_": "block", "optimizer": SGD},
    "lstm grid": {"schedule_": "grid", "H": 19},
    "gru grid_mma": {"kind": "gru", "schedule_": "grid", "H": 19, "dtype": "bfloat16", "optimizer": SGD},
    "two layers, dropout between": {
        "num_layers": 2, "between": 0.3, "optimizer": "rmsprop",
        "validation": gpurnn.TextBatches(TEXT[:13], batch_size=3, steps=2)},
    "a wavefront": {"num_layers": 2, "wavefront": 2},
    "both directions, batch norm": {"bidirectional": True, "norm": True, "batches": [
        (TEXT[k : k + 6].reshape(2, 3), TEXT[k + 1 : k + 7].reshape(2, 3)) for k in (0, 6, 12)]},
    "lengths of all timesteps": {"norm": True, "batches": [
        gpurnn.data.Batch(TEXT[k : k + 6].reshape(3, 2), TEXT[k + 1 : k + 7].reshape(3, 2), np.array([3, 3]))
        for k in (0, 6, 12, 18)]},
    "values clipped, a rate for each step": {
        "kind": "gru", "clip_value": 0.01, "schedule_every": "step",
        "schedule": lambda opt: gpurnn.CosineSchedule(opt, total=9)},
    "a loss scale that overflows": {"kind": "gru", "dtype": "float16", "scale": 2.0**24},
    "two batches an update": {"kind": "gru", "accumulate": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_update_has_the_bits_of_one_launch_by_launch(case, train):
    run = check_equal(train, **CASES[case])
    assert run.recorded in (1, 2, 3) and run.graphs > 3
    if "scale" in CASES[case]:
        assert 0 < run.records[-1]["skipped"] < 9


class Stopping(gpurnn.TextBatches):
    """A text whose reading fails once, in the middle of the second epoch."""

    failed = False

    def batch(self, epoch, index):
        if (epoch, index) == (1, 5) and not self.failed:
            self.failed = True
            raise ValueError("no more")
        return super().batch(epoch, index)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(train, tmp_path):
    """A stop between two fetches, two updates behind a checkpoint in the middle of an epoch."""
    options = {"checkpoint_every": 3}
    text = Stopping(np.resize(TEXT, 3 * 3 * 8 + 1), batch_size=3, steps=3)
    whole = train(True, batches=gpurnn.TextBatches(text.ids, 3, 3), out=tmp_path / "whole", **options)
    stopped = train(True, batches=text, out=tmp_path / "parts", **options)
    assert str(stopped.error) == "no more" and stopped.graphs > 8
    rest = train(True, batches=text, out=tmp_path / "parts", resume=True, **options)
    all_equal(whole.arrays, rest.arrays)
    assert whole.records == rest.records and rest.graphs


def test_nothing_is_launched_or_read_by_python(train, monkeypatch):
    """Of a replayed update the host launches one graph and copies numbers and a batch; it reads once in ten updates."""
    log, launch, read, write = [], Graph.launch, Array.get, Array.set
    monkeypatch.setattr(Graph, "launch", lambda self: (log.append("graph"), launch(self))[1])
    monkeypatch.setattr(Array, "get", lambda self: (log.append("read"), read(self))[1])
    monkeypatch.setattr(Array, "set", lambda self, *a: (log.append("write"), write(self, *a))[1])

    def watched(model):
        run = model.ops.kernels.launch

        def noted(*args, **more):
            log.append("captured" if model.ops.device.is_capturing() else "kernel")
            run(*args, **more)

        monkeypatch.setattr(model.ops.kernels, "launch", noted)

    text = np.resize(TEXT, 3 * 3 * 25 + 1)  # 25 batches of T 3
    run = train(True, text=text, epochs=1, prepare=watched)
    update = ["write"] * 3 + ["graph"]
    expected = update * 10 + ["read"] + update * 10 + ["read"] + update * 3 + ["read"]
    first = log.index("write")
    assert run.graphs == 23 and log[first:][: len(expected)] == expected
    assert {"captured", "kernel"} <= set(log[:first])


# ---- something wrong


@pytest.mark.parametrize("how", ["a label", "an id", "not finite"])
def test_an_update_with_something_wrong_raises_what_it_always_did(how, train):
    """Nothing of it, or of the updates behind it that were launched before anybody knew, reaches the weights."""
    x = np.random.default_rng(1).normal(size=(12, 2, 3, 4)).astype("float32")
    y = np.resize(TEXT, (12, 2, 3))
    x[7, 0, 1, 2] = np.nan if how == "not finite" else 0
    ids = np.resize(TEXT, (12, 2, 3))
    if how == "a label":
        y[7, 1, 1] = 7
    elif how == "an id":
        ids[7, 0, 2] = -1
    inputs = x if how == "not finite" else ids
    batches = [gpurnn.data.Batch(inputs[k], y[k], carry=k > 0) for k in range(12)]
    more = {"norm": True, "floats": True} if how == "not finite" else {}
    plain, run = (train(graph, batches=batches, epochs=1, **more) for graph in (False, True))
    assert plain.error is not None and str(run.error) == str(plain.error)
    all_equal(plain.arrays, run.arrays)
    assert run.records == plain.records and run.graphs


# ---- what is not recorded


def test_what_cannot_be_recorded_says_why(train):
    ragged = [gpurnn.data.Batch(TEXT[:6].reshape(3, 2), TEXT[1:7].reshape(3, 2), np.array([3, 1]))] * 3
    run = train(None, batches=ragged, epochs=1)
    assert run.graphs == 0
    said = [row["reason"] for row in run.ops.recordings() if row["pass"] == "update"]
    assert said == ["batches with lengths: how many timesteps count is a number that the host must know"]
    for options, words in (
        ({"batches": ragged}, "batches with lengths: how many timesteps count"),
        (
            {
                "batches": [
                    gpurnn.data.Batch(TEXT[:6].reshape(3, 2), TEXT[:6].reshape(3, 2), mask=np.ones((3, 2), bool))
                ]
            },
            "batches with mask",
        ),
        ({"weight_noise": 0.1}, "weight_noise"),
        ({"loss": functools.partial(gpurnn.cross_entropy, ignore_index=3)}, "D2H transfers are disallowed"),
    ):
        with pytest.raises(BackendError, match=f"graph=True: .*{words}"):
            train(True, **options)
    assert train(None, loss=lambda *a: gpurnn.cross_entropy(*a)).graphs == 0  # it may change from update to update
    assert train(True, loss=lambda *a: gpurnn.cross_entropy(*a)).graphs and train(None).graphs
    assert train(False).graphs == 0


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
def test_other_backends_record_nothing(backend):
    model = gpurnn.Sequential(gpurnn.GRU(2, 3, backend=backend), gpurnn.Linear(3, 2, backend=backend))
    batch = np.zeros((2, 2, 2), "float32"), np.zeros((2, 2), int)
    with pytest.raises(BackendError, match=f"graph=True: the backend '{backend}' records no updates"):
        gpurnn.fit(model, gpurnn.cross_entropy, [batch], optimizer="adam", epochs=1, progress=False, graph=True)
    with pytest.raises(TypeError, match="graph"):
        gpurnn.fit(model, gpurnn.cross_entropy, [batch], optimizer="adam", epochs=1, progress=False, graph="yes")


def test_what_a_callback_changes_is_seen(train):
    """A mode, a rate of dropout, a parameter that is frozen, the learning rate, running statistics: the same bits."""

    def change(record, training):
        layers = list(training.model)
        training.optimizer.lr *= 0.5
        if record["epoch"] == 1:
            layers[2].rate = 0.4
        else:
            training.model.freeze("0.weight")

    run = check_equal(train, epochs=4, callbacks=[change])
    assert run.graphs > 3


# ---- planted errors

WAIT = "for (int polls = 0; !timed_out; polls++) {"
LATE = (WAIT, f"for (int k = 0; blockIdx.y == 1 && k < 60; k++) (void)*(volatile int*)failed;\n{WAIT}")  # a block
ERRORS = {
    "the epochs of the exchange stand still": {"schedule_": "grid", "H": 19, "edits": [
        ("if (threadIdx.x == 0) *epoch = next < END ? next : 0;", ""), LATE]},
    "the counter of draws is frozen": {"edits": [("call + (calls ? *calls : 0)", "call")]},
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_seen(error, train):
    with pytest.raises((AssertionError, KernelError)):
        check_equal(train, **ERRORS[error])


@pytest.mark.parametrize("error", ["the rate", "the inputs", "the state", "the verdict"])
def test_an_error_planted_on_the_host_is_seen(error, train, monkeypatch):
    options, write = {}, Array.set
    if error == "the rate":
        monkeypatch.setattr(Recording, "write_updates", lambda self, step: step_only(self, step))
    elif error == "the inputs":
        monkeypatch.setattr(Array, "set", lambda self, *a: None if self.dtype == np.int64 else write(self, *a))
    elif error == "the state":
        monkeypatch.setattr(UpdateGraph, "carry", lambda self, to, values: None)
    else:
        options = {"kind": "gru", "dtype": "float16", "scale": 2.0**24}
        options["edits"] = [("*go = *alive && small;", "*go = 1;")]
    with pytest.raises(AssertionError):
        check_equal(train, **options)


def step_only(recording, step):
    """The optimizer counts on, and its numbers stay those of the recording."""
    before = [host.copy() for host in recording._updates]
    recording._next = 0
    step()
    recording._next = None
    for host, old in zip(recording._updates, before, strict=True):
        host[...] = old


# ---- steppers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_of_a_stepper_is_one_graph(dtype, monkeypatch):
    """The bits of steps that are not recorded, whatever happens to rows, states and weights between them."""
    devices = [cuda_ops(graphs=graphs, checked=False) for graphs in (16, 0)]
    steppers = [language_model(ops, "lstm", dtype=dtype).stepper(3) for ops in devices]
    ids, launched, launch = np.resize(TEXT, (12, 3)), [], StepGraph.run
    monkeypatch.setattr(StepGraph, "run", lambda self, x: launched.append(x) or launch(self, x))
    for k, x in enumerate(ids):
        if k == 4:
            with pytest.raises(ValueError, match="from 0 to 6, got 7"):
                steppers[0].step(np.array([0, 7, 1]))
        for stepper in steppers:
            if k == 5:
                stepper.reset([1])
            if k == 6:
                stepper.state = stepper.state
            if k == 8:
                stepper._model.flat_params[...] = stepper._model.flat_params * 0.5
            if k == 9:
                stepper._model.changed()
        found, plain = (stepper.step(x).get() for stepper in steppers)
        np.testing.assert_array_equal(found, plain)
        for mine, other in zip(*(leaves(stepper.state) for stepper in steppers), strict=True):
            np.testing.assert_array_equal(mine.get(), other.get())
        assert [stepper.recorded for stepper in steppers] == [k not in (0, 9), False]
    assert len(launched) == 10 + 1 and "CUDA graph" in repr(steppers[0])


def test_a_step_that_cannot_be_recorded_runs_as_before(monkeypatch):
    ops = cuda_ops(checked=False)
    monkeypatch.setattr(ops.device, "record", refuse)
    stepper = language_model(ops).stepper(2)
    for _ in range(4):
        stepper.step(np.array([1, 2]))
    assert not stepper.recorded
    assert [(row["recorded"], row["reason"]) for row in ops.recordings() if row["pass"] == "update"] == [
        (False, "no graphs here")
    ]


def refuse(*args):
    raise BackendError("no graphs here")
