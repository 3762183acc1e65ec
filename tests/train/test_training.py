"""fit: what a step does, validation, schedules, accumulation, patience, exact resume, errors that break nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, TEXT_IDS, assert_close
from optional import needs

import gpurnn
from gpurnn import Batch, CheckpointError, SequenceBatches, TextBatches, TrainingError, evaluate, fit
from gpurnn.checkpoint import load_checkpoint
from gpurnn.testing import count_terms
from gpurnn.train import load_weights, measure


def text_model(seed=1, dropout=0.25, cell="GRU", dtype="float32", backend="cpu"):
    shared = {"dtype": dtype, "backend": backend}
    return gpurnn.Sequential(
        {
            "embedding": gpurnn.Embedding(11, 6, seed=seed, **shared),
            "rnn": getattr(gpurnn, cell)(6, 8, num_layers=2, dropout=dropout, seed=seed + 1, **shared),
            "drop": gpurnn.Dropout(dropout, seed=seed + 2, **shared),
            "output": gpurnn.Linear(8, 11, seed=seed + 3, **shared),
        }
    )


def train(
    out=None, *, epochs=3, seed=1, lr=1e-2, steps=10, cell="GRU", dtype="float32", backend="cpu", batch=8, **options
):
    """A small training with everything that carries state from step to step."""
    model = text_model(seed, cell=cell, dtype=dtype, backend=backend)
    adam = gpurnn.Adam(model, lr=lr)
    schedule = gpurnn.CosineSchedule(adam, total=200)
    defaults = dict(progress=False, clip_norm=1.0, schedule=schedule, schedule_every="step", out=out)
    defaults["validation"] = TextBatches(TEXT_IDS[2400:], batch, steps)
    history = fit(
        model,
        gpurnn.cross_entropy,
        TextBatches(TEXT_IDS[:2400], batch, steps),
        optimizer=adam,
        epochs=epochs,
        **defaults | options,
    )
    return model, history


@pytest.mark.long
@needs("matplotlib")
def test_training_learns_and_records(tmp_path):
    model, history = train(tmp_path / "run", flow=True)
    epochs = history.epochs
    assert [r["epoch"] for r in epochs] == [1, 2, 3] and history.stopped == "epochs"
    assert epochs[-1]["validation_loss"] < epochs[0]["validation_loss"] < np.log(11)
    assert epochs[-1]["step"] == 3 * 30 and epochs[-1]["lr"] < 1e-2
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(history)
    steps = [r for r in history if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(10, 91, 10))
    assert all(set(r) == {"kind", "step", "epoch", "loss", "lr", "grad_norm"} for r in steps)
    flow = [json.loads(line) for line in (tmp_path / "run" / "gradient_flow.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in flow] == [1, 2, 3] and set(flow[0]["layers"]) == {"rnn.l0", "rnn.l1"}
    assert len(flow[0]["layers"]["rnn.l0"]["dh"]) == 10
    assert (tmp_path / "run" / "history.png").stat().st_size > 5000
    assert model.training


@pytest.mark.parametrize("noise", [0, 0.1])
def test_a_step_is_forward_backward_clip_update(noise):
    """fit's first steps against the same loop written out."""
    model, _ = train(epochs=1, validation=None, weight_noise=noise)
    again = text_model()
    adam = gpurnn.Adam(again, lr=1e-2)
    schedule = gpurnn.CosineSchedule(adam, total=200)
    batches, state = TextBatches(TEXT_IDS[:2400], 8, 10), None
    for i in range(len(batches)):
        batch = batches.batch(0, i)
        again.zero_grad()
        clean = again.flat_params.copy()
        key = gpurnn.rng.name_key("weight noise")
        drawn = noise * gpurnn.rng.normal((again.parameter_count,), again.seed, key, i)
        parts = np.split(drawn, np.cumsum([array.size for array in again.params.values()])[:-1])
        for array, part in zip(again.params.values(), parts, strict=True):
            array += part.reshape(array.shape)
        logits, state, backward = again.forward(batch.inputs, state)
        backward(gpurnn.cross_entropy(logits, batch.targets)[1]())
        again.flat_params[...] = clean
        gpurnn.clip_grad_norm(again, 1.0)
        adam.step()
        schedule.step()
    assert np.array_equal(model.flat_params, again.flat_params)


def test_evaluate_is_the_mean_over_valid_steps():
    rng = np.random.default_rng(0)
    lengths = [9, 3, 0, 7, 5]
    x = [rng.standard_normal((n, 4)).astype("float32") for n in lengths]
    y = [rng.integers(0, 3, n) for n in lengths]
    model = gpurnn.Sequential(
        gpurnn.LSTM(4, 6, backend="cpu", seed=0),
        gpurnn.BatchNorm(6, backend="cpu"),
        gpurnn.Dropout(0.5, backend="cpu", seed=1),
        gpurnn.Linear(6, 3, backend="cpu", seed=2),
    )
    source = SequenceBatches(x, y, 2, shuffle=False, bucket=False)
    model[1].eval()
    mean = evaluate(model, gpurnn.cross_entropy, source)
    assert not model[1].training and model[2].training and model.training  # as they were
    model.eval()
    total = 0.0
    for one, targets in zip(x, y, strict=True):
        if len(one):
            logits, _ = model(one[:, None])
            total += float(gpurnn.cross_entropy(logits, targets[:, None], reduction="sum")[0])
    assert abs(mean - total / sum(lengths)) < 1e-6


def test_fit_leaves_every_part_in_its_mode():
    """A normalisation in evaluation mode keeps its statistics; a model that is as a whole in evaluation mode trains."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((4, 4)).astype("float32") for _ in range(6)]
    y = [rng.integers(0, 3, 4) for _ in x]
    source = SequenceBatches(x, y, 2)

    def train(model):
        adam = gpurnn.Adam(model)
        fit(model, gpurnn.cross_entropy, source, optimizer=adam, epochs=2, validation=source, progress=False)
        return [module.training for _, module in model.modules()]

    model = gpurnn.Sequential(gpurnn.BatchNorm(4, backend="cpu"), gpurnn.Linear(4, 3, backend="cpu", seed=1))
    model[0].eval()
    assert train(model) == [True, False, True]
    assert int(model[0].buffers["num_batches_tracked"]) == 0
    model.eval()
    assert train(model) == [True, True, True]
    assert int(model[0].buffers["num_batches_tracked"]) == 6


def test_accumulated_batches_equal_one_large_batch():
    """Ragged batches: the shares follow the valid steps."""
    rng = np.random.default_rng(0)
    lengths = [9, 3, 1, 7, 5, 2, 8, 6]
    x = [rng.standard_normal((n, 4)) for n in lengths]
    y = [rng.integers(0, 3, n) for n in lengths]
    weights = []
    for size, accumulate in ((8, 1), (2, 4), (3, 3)):
        model = gpurnn.Sequential(
            gpurnn.LSTM(4, 6, backend="cpu", dtype="float64", seed=0),
            gpurnn.Linear(6, 3, backend="cpu", dtype="float64", seed=2),
        )
        sgd = gpurnn.SGD(model, lr=0.5)
        source = SequenceBatches(x, y, size, shuffle=False, bucket=False)
        fit(model, gpurnn.cross_entropy, source, optimizer=sgd, epochs=3, accumulate=accumulate, progress=False)
        assert sgd.steps == 3
        weights.append(model.flat_params.copy())
    for other in weights[1:]:
        assert_close(other, weights[0], 3 * count_terms(model, len(x)))  # three updates


class Pair(gpurnn.Module):
    """Two inputs of different length: the sum of one's rows over its valid steps is added to each row of the other."""

    takes_lengths = True

    def __init__(self):
        super().__init__("cpu", "float64", 0)
        self._adopt({"linear": gpurnn.Linear(2, 3, backend="cpu", dtype="float64", seed=1)})

    def __call__(self, inputs, lengths):
        return self.forward(inputs, lengths)[0]

    def forward(self, inputs, lengths):
        source, target = inputs
        valid = np.arange(len(source))[:, None] < lengths[0]
        return self.children["linear"].forward(target + (source * valid[:, :, None]).sum(axis=0))


class Pairs:
    """The batch source of ``Pair``: targets of the second input's length."""

    def __init__(self, count=6):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, epoch, index):
        rng = np.random.default_rng(index)
        lengths = rng.integers(1, 6, 4), rng.integers(1, 4, 4)
        source, target = rng.standard_normal((5, 4, 2)), rng.standard_normal((3, 4, 2))
        classes = (target.sum(axis=2) > 0) + 0
        options = {"lengths": lengths[1]}
        return Batch((source, target), classes, lengths, loss_options=options, weight=int(lengths[1].sum()))


def count_right(logits, targets, lengths):
    return gpurnn.accuracy(logits, targets, lengths=lengths) * lengths.sum(), lengths.sum()


@pytest.mark.long
def test_several_inputs_metrics_and_what_is_watched(tmp_path):
    model = Pair()
    adam = gpurnn.Adam(model, lr=0.05)
    options = dict(validation=Pairs(3), metrics={"accuracy": count_right}, progress=False, patience=3)
    history = fit(
        model, gpurnn.cross_entropy, Pairs(), optimizer=adam, epochs=30, out=tmp_path,
        watch=("accuracy", "max"), **options,
    )  # fmt: skip
    seen = [record["validation_accuracy"] for record in history.epochs]
    assert seen[0] < max(seen)
    _, best = load_checkpoint(tmp_path / "best.json")
    assert best["best"] == max(seen) and best["epoch"] == 1 + seen.index(max(seen))
    assert history.stopped == "patience" and len(seen) == best["epoch"] + 3
    load_weights(model, tmp_path / "best.json")
    again = measure(model, gpurnn.cross_entropy, Pairs(3), options["metrics"])
    assert again["accuracy"] == max(seen) and again["loss"] == history.epochs[best["epoch"] - 1]["validation_loss"]
    batches = [Pairs().batch(0, index) for index in range(3)]
    right = sum(count_right(model(b.inputs, b.lengths), b.targets, **b.loss_options)[0] for b in batches)
    assert again["accuracy"] == pytest.approx(right / sum(b.weight for b in batches))
    for watch in (("f1", "max"), ("accuracy", "up")):
        with pytest.raises(ValueError, match="watch"):
            fit(model, gpurnn.cross_entropy, Pairs(), optimizer=adam, epochs=1, watch=watch, **options)


def test_targets_for_whole_sequences():
    """The mean over batches weighs sequences, not steps."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((n, 4)) for n in (9, 1, 0, 7, 5)]
    y = np.array([0, 1, 2, 1, 0])
    model = gpurnn.Sequential(
        gpurnn.GRU(4, 6, backend="cpu", dtype="float64", seed=0),
        gpurnn.Pooling(6, "mean", backend="cpu", dtype="float64"),
        gpurnn.Linear(6, 3, backend="cpu", dtype="float64", seed=2),
    )
    mean = evaluate(model, gpurnn.cross_entropy, SequenceBatches(x, y, 2, per_step=False))
    model.eval()
    alone = [float(gpurnn.cross_entropy(model(a[:, None])[0], y[n : n + 1])[0]) for n, a in enumerate(x)]
    assert mean == pytest.approx(np.mean(alone), rel=1e-12)


def test_stateless_models_with_lengths():
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((n, 4)).astype("float32") for n in (4, 2, 3)]
    y = [(a.sum(axis=1, keepdims=True) > 0).astype("float32") for a in x]
    model = gpurnn.Sequential(gpurnn.BatchNorm(4, backend="cpu"), gpurnn.Linear(4, 1, backend="cpu", seed=0))
    source = SequenceBatches(x, y, 3)
    loss = gpurnn.binary_cross_entropy_with_logits
    history = fit(model, loss, source, optimizer=gpurnn.Adam(model, lr=0.1), epochs=60, progress=False)
    assert history.epochs[-1]["train_loss"] < 0.3 < history.epochs[0]["train_loss"]


@pytest.mark.long
def test_patience_keeps_the_best(tmp_path):
    """With a rate of 0 nothing gets better: training stops after the first epoch and two more."""
    model = text_model(dropout=0.0)
    valid = TextBatches(TEXT_IDS[2400:], 8, 10)
    history = fit(
        model,
        gpurnn.cross_entropy,
        TextBatches(TEXT_IDS[:2400], 8, 10),
        optimizer=gpurnn.SGD(model, lr=0.0),
        epochs=20,
        validation=valid,
        patience=2,
        progress=False,
        out=tmp_path,
    )
    assert len(history.epochs) == 3 and history.stopped == "patience"
    _, best = load_checkpoint(tmp_path / "best.json")
    assert best["epoch"] == 1
    other = text_model(seed=9)
    load_weights(other, tmp_path / "best.json")
    assert abs(evaluate(other, gpurnn.cross_entropy, valid) - best["best"]) < 1e-12


def test_plateau_schedule_sees_the_validation_loss():
    model = text_model(dropout=0.0)
    sgd = gpurnn.SGD(model, lr=1e-9)
    history = fit(
        model,
        gpurnn.cross_entropy,
        TextBatches(TEXT_IDS[:400], 8, 10),
        optimizer=sgd,
        epochs=6,
        schedule=gpurnn.PlateauSchedule(sgd, factor=0.5, patience=1),
        progress=False,
    )
    assert [r["lr"] for r in history.epochs][-1] < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("every", [None, 4])
def test_resumed_training_equals_an_uninterrupted_one(tmp_path, cell, every):
    options = dict(cell=cell, accumulate=2, weight_noise=0.05)
    whole, history = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", epochs=1, **options)
    model, resumed = train(tmp_path / "parts", resume=True, checkpoint_every=every, **options)
    assert np.array_equal(model.flat_params, whole.flat_params)
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in h] for h in (history, resumed)]
    assert timeless[0] == timeless[1]


class Stop(Exception):
    pass


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 17, 30, 31, 44])
def test_stopped_anywhere(tmp_path, stop, monkeypatch):
    """An exception in any step, at any place of a checkpoint's period: resumed, the bits are the same."""
    whole, _ = train(epochs=2)
    step = gpurnn.Adam.step

    def failing(self):
        if self.steps == stop:
            raise Stop
        step(self)

    monkeypatch.setattr(gpurnn.Adam, "step", failing)
    with pytest.raises(Stop):
        train(tmp_path, epochs=2, checkpoint_every=7)
    monkeypatch.undo()
    model, history = train(tmp_path, epochs=2, checkpoint_every=7, resume=True)
    assert np.array_equal(model.flat_params, whole.flat_params)
    assert [r["step"] for r in history if r["kind"] == "step"] == [10, 20, 30, 40, 50, 60]


@pytest.mark.long
@needs("ml_dtypes")
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_stopped_in_the_middle_of_an_epoch_in_another_dtype(tmp_path, dtype, cell, backend, monkeypatch):
    options = dict(epochs=1, cell=cell, dtype=dtype, backend=backend)
    whole, _ = train(**options)
    step = gpurnn.Adam.step

    def failing(self):
        if self.steps == 10:
            raise Stop
        step(self)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(gpurnn.Adam, "step", failing)
        train(tmp_path, checkpoint_every=7, **options)
    arrays, _ = gpurnn.load_checkpoint(tmp_path / "last.json")
    assert dtype in {array.dtype.name for name, array in arrays.items() if name.startswith("state/")}
    model, _ = train(tmp_path, resume=True, **options)
    assert np.array_equal(model.flat_params, whole.flat_params)


@pytest.mark.long
def test_a_run_that_goes_on_elsewhere_says_that_bits_may_differ(tmp_path, monkeypatch, caplog):
    train(tmp_path, epochs=1)
    _, document = gpurnn.load_checkpoint(tmp_path / "last.json")
    ops = gpurnn.get_backend("cpu")
    assert document["machine"] == ops.machine()
    train(tmp_path, epochs=2, resume=True)
    assert "not to the same bits" not in caplog.text
    monkeypatch.setattr(type(ops), "machine", lambda self: document["machine"] | {"isa": "abacus"})
    train(tmp_path, epochs=3, resume=True)
    assert "last.json: the run goes on, but not to the same bits" in caplog.text
    assert "isa was" in caplog.text and "is 'abacus'" in caplog.text and "blas" not in caplog.text


CHILD = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/train", {root!r}]
from test_training import train
train({out!r}, epochs=4, checkpoint_every=3, resume=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(tmp_path):
    """SIGKILL at random moments until one attempt reaches the end: bit-equal weights, whole history."""
    whole, history = train(tmp_path / "whole", epochs=4)
    code = CHILD.format(tests=str(ROOT / "tests"), root=str(ROOT), out=str(tmp_path / "killed"))
    rng = np.random.default_rng(0)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    kills = 0
    for _ in range(60):
        child = subprocess.Popen([sys.executable, "-c", code], env=environment)
        last = tmp_path / "killed" / "last.json"
        before = last.stat().st_mtime_ns if last.exists() else 0
        deadline = time.monotonic() + 60  # let it get past its start, so that every attempt gains ground
        while child.poll() is None and time.monotonic() < deadline:
            if last.exists() and last.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL
    else:
        pytest.fail("never reached the end")
    assert kills >= 3
    model = text_model()
    load_weights(model, tmp_path / "killed" / "last.json")
    assert np.array_equal(model.flat_params, whole.flat_params)
    lines = (tmp_path / "killed" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [r["step"] for r in history]


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_interrupt_saves_and_raises(tmp_path, monkeypatch):
    whole, _ = train(epochs=2)
    step = gpurnn.Adam.step

    def pressing(self):
        step(self)
        if self.steps == 13:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(gpurnn.Adam, "step", pressing)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, epochs=2)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    _, document = load_checkpoint(tmp_path / "last.json")
    assert document["step"] == 13
    model, _ = train(tmp_path, epochs=2, resume=True)
    assert np.array_equal(model.flat_params, whole.flat_params)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, poison):
    calls = []
    bad = []

    def loss(outputs, targets):
        value, backward = gpurnn.cross_entropy(outputs, targets)
        calls.append(1)
        if len(calls) == 40:
            bad.append(model.flat_params.copy())
            if poison == "loss":
                return value * np.nan, backward
            return value, lambda dloss=1.0: backward(dloss) * np.float32(np.inf)
        return value, backward

    model = text_model(dropout=0.0)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(TrainingError, match=r"epoch 2, step 40: loss .*, gradient norm .*step before: \d") as error,
    ):
        batches = TextBatches(TEXT_IDS[:2400], 8, 10)
        fit(model, loss, batches, optimizer=gpurnn.Adam(model), epochs=3, out=tmp_path, progress=False)
    assert "clip_norm" in str(error.value)
    assert np.array_equal(model.flat_params, bad[0])
    _, document = load_checkpoint(tmp_path / "last.json")
    assert document["epoch"] == 1


@pytest.mark.long
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    import errno

    from gpurnn import checkpoint

    whole, _ = train(epochs=2)
    written = []
    write = checkpoint.write_bytes_atomic

    def full(path, data, *like):
        written.append(path)
        if len(written) > 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data, *like)

    monkeypatch.setattr(checkpoint, "write_bytes_atomic", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(tmp_path, epochs=2, checkpoint_every=5)
    monkeypatch.undo()
    model, _ = train(tmp_path, epochs=2, checkpoint_every=5, resume=True)
    assert np.array_equal(model.flat_params, whole.flat_params)


def test_resume_with_something_else_changes_nothing(tmp_path):
    train(tmp_path, epochs=1)
    for different in (dict(cell="LSTM"), dict(schedule=None), dict(accumulate=3), dict(steps=7)):
        with pytest.raises(CheckpointError, match="does not fit"):
            train(tmp_path, resume=True, **different)
    model = text_model(seed=5)
    before = model.flat_params.copy()
    with pytest.raises(CheckpointError, match="kind"):
        fit(
            model,
            gpurnn.cross_entropy,
            TextBatches(TEXT_IDS[:2400], 8, 10),
            optimizer=(sgd := gpurnn.SGD(model, lr=0.1)),
            schedule=gpurnn.CosineSchedule(sgd, total=200),
            schedule_every="step",
            validation=TextBatches(TEXT_IDS[2400:], 8, 10),
            clip_norm=1.0,
            epochs=2,
            out=tmp_path,
            resume=True,
            progress=False,
        )
    assert np.array_equal(model.flat_params, before)


@pytest.mark.long
def test_a_damaged_checkpoint_is_named(tmp_path):
    train(tmp_path, epochs=1)
    tensors = next(tmp_path.glob("last-*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-5] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match=tensors.name):
        train(tmp_path, resume=True)


@pytest.mark.long
def test_a_folder_in_use(tmp_path):
    train(tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(tmp_path, epochs=1)
    first, _ = train(epochs=1)
    model, history = train(tmp_path, epochs=1, overwrite=True)
    assert np.array_equal(model.flat_params, first.flat_params) and len(history.epochs) == 1
    assert (tmp_path / "history.jsonl").read_text().count('"epoch"') == len(history) + 1


@pytest.mark.long
def test_resume_without_a_checkpoint_starts(tmp_path):
    _, history = train(tmp_path / "new", epochs=1, resume=True)
    assert len(history.epochs) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": 0}, "epochs"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"clip_value": -1}, "clip_value"),
        ({"weight_noise": -0.1}, "weight_noise"),
        ({"accumulate": 0}, "accumulate"),
        ({"schedule_every": "hour"}, "schedule_every"),
        ({"patience": 0}, "patience"),
        ({"patience": 1, "validation": None}, "validation"),
        ({"resume": True}, "out"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        train(**options)


def test_an_optimiser_of_another_model():
    with pytest.raises(ValueError, match="another model"):
        fit(
            text_model(),
            gpurnn.cross_entropy,
            TextBatches(TEXT_IDS, 8, 10),
            optimizer=gpurnn.Adam(text_model()),
            epochs=1,
        )
