"""What fit takes: data of every kind, own losses and metrics, optimizers by name; and what it answers to all else."""

import functools
import logging

import numpy as np
import pytest
from helpers import TEXT_IDS
from optional import optional

import gpurnn
from gpurnn import Batch, SequenceBatches, TextBatches, evaluate, fit
from gpurnn.train import StopTraining, measure

torch = optional("torch")
SHARED = {"backend": "cpu", "seed": 1}


def drawn(count=6, T=5, B=4, seed=0):
    """(x, y) of batches, with a class for every timestep."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((T, B, 3)).astype("float32"), rng.integers(0, 4, (T, B))) for _ in range(count)]


def model_of(pooled=False, **more):
    head = [gpurnn.Pooling(6, "mean", **SHARED)] if pooled else []
    return gpurnn.Sequential(gpurnn.GRU(3, 6, **SHARED, **more), *head, gpurnn.Linear(6, 4, **SHARED))


def train(batches, model=None, loss=gpurnn.cross_entropy, **options):
    model = model or model_of()
    usual = {"optimizer": "adam", "lr": 0.01, "epochs": 2, "progress": False}
    history = fit(model, loss, batches, **usual | options)
    return model.flat_params.copy(), history


class Source:
    """Pairs as a batch source, the standard that other kinds of data are held to."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def batch(self, epoch, index):
        return Batch(*self.batches[index])


class Again:
    """Something to iterate over again and again, without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Wrong:
    def on_end(self):
        """Without the argument ``training``."""


class OnlyOutputs(gpurnn.Module):
    """As a model of torch is written."""

    def __init__(self):
        super().__init__()
        self.layer = gpurnn.LSTM(3, 4)

    def forward(self, x):
        return self.layer(x)[0]


# ---- data


@pytest.mark.parametrize("kind", ["list", "tuple", "batches", "iterable", "loader", "lists"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_data_of_every_kind_train_alike(kind, accumulate):
    pairs = drawn()
    if kind == "loader":
        dataset = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in pairs]
        batches = torch.utils.data.DataLoader(dataset, batch_size=None)
    else:
        batches = {
            "list": pairs, "tuple": tuple(pairs), "batches": [Batch(*pair) for pair in pairs],
            "iterable": Again(pairs), "lists": [list(pair) for pair in pairs],
        }[kind]  # fmt: skip
    options = {"accumulate": accumulate, "metrics": {"accuracy": gpurnn.accuracy}}
    weights, history = train(batches, validation=batches, **options)
    expected, other = train(Source(pairs), validation=Source(pairs), **options)
    assert np.array_equal(weights, expected)
    assert [r["validation_accuracy"] for r in history.epochs] == [r["validation_accuracy"] for r in other.epochs]
    assert history.epochs[-1]["step"] == 2 * -(-6 // accumulate)


def test_a_loader_that_batches_and_shuffles():
    """As torch collates: (B, T, I) for layers with batch_first, a last batch that is smaller."""
    x, y = torch.randn(10, 7, 3), torch.randint(0, 4, (10, 7))
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    model = gpurnn.Sequential(gpurnn.GRU(3, 6, batch_first=True, **SHARED), gpurnn.Linear(6, 4, **SHARED))
    loss = functools.partial(gpurnn.cross_entropy, batch_first=True)
    before = evaluate(model, loss, loader)
    _, history = train(loader, model, loss, epochs=8, lr=0.03)
    assert history.epochs[-1]["step"] == 24 and history.epochs[-1]["train_loss"] < before
    plain = float(gpurnn.cross_entropy(model.eval()(x.numpy())[0], y.numpy())[0])
    assert evaluate(model, loss, loader) == pytest.approx(plain, rel=1e-6)  # a mean over ten, in any order


@pytest.mark.parametrize("per_step", [True, False])
def test_lengths_in_a_triple(per_step):
    """Padding does not count; targets of whole sequences count once each."""
    x, y = drawn(1)[0]
    lengths = np.array([5, 1, 3, 2])
    y = y if per_step else y[0]
    batch = Batch(x, y, lengths) if per_step else Batch(x, y, lengths, loss_options={}, weight=4)
    padded = x.copy()
    padded[np.arange(5)[:, None] >= lengths] = 100
    weights, history = train([(padded, y, lengths)], model_of(pooled=not per_step))
    expected, other = train([batch], model_of(pooled=not per_step))
    assert np.array_equal(weights, expected)
    assert history.epochs[-1]["train_loss"] == other.epochs[-1]["train_loss"]


def test_uneven_batches_weigh_what_they_hold():
    (x, y), (a, b) = drawn(2)
    model = model_of()
    means = [float(gpurnn.cross_entropy(model.eval()(*pair)[0], t)[0]) for *pair, t in ((x, y), (a[:, :1], b[:, :1]))]
    found = evaluate(model, gpurnn.cross_entropy, [(x, y), (a[:, :1], b[:, :1])])
    assert found == pytest.approx((means[0] * 20 + means[1] * 5) / 25, rel=1e-6)
    pooled = model_of(pooled=True).eval()
    means = [float(gpurnn.cross_entropy(pooled(*pair)[0], t)[0]) for *pair, t in ((x, y[0]), (a[:3, :1], b[0, :1]))]
    found = evaluate(pooled, gpurnn.cross_entropy, [(x, y[0]), (a[:3, :1], b[0, :1])])
    assert found == pytest.approx((means[0] * 4 + means[1]) / 5, rel=1e-6)


def stop_at(step):
    class Stop:
        def on_update(self, record, training):
            if record["step"] == step:
                raise StopTraining

    return Stop()


def test_a_list_resumes_in_the_middle_of_an_epoch(tmp_path, caplog):
    whole, _ = train(drawn())
    train(drawn(), out=tmp_path, callbacks=[stop_at(4)])
    weights, history = train(drawn(), out=tmp_path, resume=True)
    assert np.array_equal(weights, whole) and history.epochs[-1]["step"] == 12 and not caplog.text


@pytest.mark.long
def test_a_loader_resumes_at_an_epoch(tmp_path, caplog):
    """Between epochs exactly; in the middle of one it says that this begins anew."""
    whole, _ = train(Again(drawn()))
    train(Again(drawn()), out=tmp_path / "between", epochs=1)
    weights, _ = train(Again(drawn()), out=tmp_path / "between", resume=True)
    assert np.array_equal(weights, whole) and not caplog.text
    train(Again(drawn()), out=tmp_path / "middle", callbacks=[stop_at(4)])
    with caplog.at_level(logging.WARNING):
        _, history = train(Again(drawn()), out=tmp_path / "middle", resume=True)
    assert "middle of epoch 1" in caplog.text and "begins anew" in caplog.text
    assert [record["epoch"] for record in history.epochs] == [1, 2] and history.epochs[-1]["step"] == 4 + 12


@pytest.mark.parametrize("count", [True, False])
def test_a_loader_stopped_at_the_last_update_of_an_epoch_goes_on_with_the_next(tmp_path, caplog, count):
    """Where it has a length; without one nobody knows that it was the last."""

    class Counted(Again):
        def __len__(self):
            return len(self.batches)

    kind = Counted if count else Again
    whole, expected = train(kind(drawn()), validation=drawn(1))
    train(kind(drawn()), out=tmp_path, validation=drawn(1), callbacks=[stop_at(6)])
    weights, history = train(kind(drawn()), out=tmp_path, resume=True, validation=drawn(1))
    assert ("begins anew" in caplog.text) is not count
    assert np.array_equal(weights, whole) is count
    if count:
        names = "epoch", "step", "train_loss", "validation_loss"
        assert [[r[n] for n in names] for r in history.epochs] == [[r[n] for n in names] for r in expected.epochs]


@pytest.mark.parametrize(
    "batches, words",
    [
        (drawn(1)[0][0], r"batches: expected .* got ndarray; one batch of arrays is \[\(x, y\)\]"),
        (drawn(1)[0], "batches: got a tuple of arrays: one batch"),
        (Batch(*drawn(1)[0]), r"batches: got one Batch: give a list of them, \[batch\]"),
        ((pair for pair in drawn()), "a generator can be read only once"),
        ("book.txt", "batches: expected a batch source .* got str"),
        (7, "batches: expected a batch source .* got int"),
        ([1, 2], r"batches\[0\]: expected \(x, y\), \(x, y, lengths\) or a gpurnn.Batch, got int"),
        ([(1, 2, 3, 4)], r"batches\[0\]: expected .* got tuple of 4"),
        ([(3.0, drawn(1)[0][1])], r"batches\[0\]: x: expected an array with a batch, got float"),
        ([((drawn(1)[0][0],) * 2, 1, np.array([1]))], "several inputs and lengths: give a gpurnn.Batch"),
    ],
)
def test_what_is_no_data(batches, words):
    with pytest.raises(TypeError, match=words):
        train(batches)
    if not isinstance(batches, list):
        with pytest.raises(TypeError, match=words.replace("batches: ", "validation: ")):
            train(drawn(), validation=batches)


def test_no_batches():
    for empty in ([], Again([]), Source([])):
        with pytest.raises(ValueError, match="batches: "):
            train(empty)
    with pytest.raises(TypeError, match="has batch.* but no length"):
        train(type("Half", (), {"batch": lambda self, epoch, index: None})())


def test_arrays_as_other_libraries_take_them():
    x, y = drawn(1)[0]
    with pytest.raises(TypeError, match=r"fit\(model, loss, gpurnn.SequenceBatches\(inputs, targets, batch_size=32\)"):
        fit(model_of(), gpurnn.cross_entropy, x, y)
    with pytest.raises(gpurnn.ShapeError, match=r"targets\[0\]: .* per_step=False"):
        SequenceBatches([x[:, 0]], [3], 1)


# ---- losses, metrics, optimizers


def test_an_accuracy_is_a_metric():
    """With lengths, and with the ignore_index of the loss."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((n, 3)).astype("float32") for n in (5, 2, 4, 1)]
    y = [rng.integers(0, 4, len(a)) for a in x]
    model, source = model_of().eval(), SequenceBatches(x, y, 2, shuffle=False)
    found = measure(model, gpurnn.cross_entropy, source, {"acc": gpurnn.accuracy})
    right = [model(a[:, None])[0][:, 0].argmax(axis=1) == b for a, b in zip(x, y, strict=True)]
    assert found["acc"] == pytest.approx(np.concatenate(right).mean(), abs=1e-12)

    loss = functools.partial(gpurnn.cross_entropy, ignore_index=0)
    seen = []

    def metric(outputs, targets, lengths=None, ignore_index=None, batch_first=None):
        seen.append((ignore_index, batch_first))
        return 0.5

    def counted(batch):
        return ((batch.targets != 0) & (np.arange(len(batch.targets))[:, None] < batch.lengths)).sum()

    measured = measure(model, loss, source, {"acc": gpurnn.accuracy, "mine": metric})
    pairs = [(b.targets, gpurnn.accuracy(model(b.inputs, lengths=b.lengths)[0], b.targets, lengths=b.lengths,
              ignore_index=0), counted(b)) for b in (source.batch(0, n) for n in range(2))]  # fmt: skip
    assert measured["acc"] == pytest.approx(sum(a * w for _, a, w in pairs) / sum(w for *_, w in pairs), abs=1e-12)
    assert seen == [(0, None)] * 2 and measured["mine"] == 0.5
    fixed = functools.partial(metric, ignore_index=3)
    measure(model, loss, source, {"mine": fixed})
    assert seen[-1] == (3, None)


def test_numbers_are_averaged_by_weight_and_nan_counts_for_nothing():
    (x, y), (a, b) = drawn(2)
    values = iter([1.0, 4.0])
    found = measure(model_of(), gpurnn.cross_entropy, [(x, y), (a[:, :1], b[:, :1])], {"m": lambda o, t: next(values)})
    assert found["m"] == pytest.approx((1.0 * 20 + 4.0 * 5) / 25)
    values = iter([np.nan, 4.0])
    found = measure(model_of(), gpurnn.cross_entropy, [(x, y), (a[:, :1], b[:, :1])], {"m": lambda o, t: next(values)})
    assert found["m"] == 4.0
    everywhere = measure(model_of(), gpurnn.cross_entropy, [(x, y)], {"m": lambda o, t: float("nan")})
    assert np.isnan(everywhere["m"])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"metrics": {"acc": lambda outputs, targets: 1.0}}, r"metrics\['acc'\]: takes no argument lengths"),
        ({"metrics": {"acc": lambda *_, lengths: "high"}}, r"metrics\['acc'\]: expected it to return a number"),
        ({"metrics": [gpurnn.accuracy]}, "metrics: expected a mapping such as"),
        ({"metrics": {"acc": 3}}, "metrics: expected names and functions, got 'acc': int"),
        ({"loss": lambda outputs, targets: (1.0, None)}, "loss: takes no argument lengths, and this batch has lengths"),
        ({"loss": lambda *_, lengths: np.float32(1)}, r"loss: expected it to return \(value, backward\).* got float32"),
        ({"loss": "mse"}, "loss: expected a function such as gpurnn.cross_entropy, got 'mse'"),
        ({"model": "lstm"}, "model: expected a gpurnn layer or model, got str"),
        ({"optimizer": gpurnn.Adam, "lr": None}, "optimizer: expected one built for the model, .* got the class Adam"),
        ({"optimizer": 3, "lr": None}, "optimizer: expected .* got int"),
        (
            {"loss": lambda *_, lengths: (1.0, np.ones(3))},
            r"gradient with respect to the outputs, got \(float, ndarray\)",
        ),
        (
            {"callbacks": [lambda record: None]},
            r"callbacks\[0\]: expected a function of \(record, training\), got one of",
        ),
        (
            {"callbacks": [print, Wrong()]},
            r"callbacks\[1\].on_end: expected a function of \(training\), got one of \(\)",
        ),
        ({"model": OnlyOutputs()}, r"OnlyOutputs.forward: expected it to return \(outputs, backward\), .* got ndarray"),
        ({"schedule": "cosine"}, "schedule: expected a learning-rate schedule .* got str"),
        ({"watch": "loss"}, r"watch: expected a pair such as \('loss', 'min'\)"),
        ({"epochs": "3"}, "epochs should be an int"),
        ({"verbose": 1}, "fit: unknown argument 'verbose'. Here it is called progress"),
        ({"validation_data": 1}, "unknown argument 'validation_data'. Here it is called validation"),
        ({"callback": 1}, "unknown argument 'callback'. Did you mean callbacks"),
        ({"batch_size": 1}, "The batch source has the batch size"),
    ],
)
def test_wrong_arguments(options, words):
    x, y = drawn(1)[0]
    batches = [(x, y, np.array([5, 1, 3, 2]))]
    with pytest.raises(TypeError, match=words):
        train(batches, validation=batches, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer": "adamax"}, "optimizer should be one of 'adam', 'adamw', 'rmsprop', 'sgd', got 'adamax'"),
        ({"optimizer": "sgd", "lr": None}, "lr: optimizer='sgd' has no usual rate"),
        ({"lr": -1.0}, "lr should be a finite number"),
        ({"metrics": {"acc": gpurnn.accuracy}}, "metrics are measured on validation batches, and there are none"),
        (
            {"validation": drawn(1), "watch": ("acc", "max")},
            "name of a metric, got 'acc': metrics={'acc': ...} measures",
        ),
        ({"optimizer": gpurnn.Adam(model_of()), "lr": None}, "optimizer: was built for another model: build one for"),
    ],
)
def test_wrong_values(options, words):
    with pytest.raises(ValueError, match=words):
        train(drawn(1), **options)


def test_no_metric_is_called_loss():
    """That name belongs to the loss, whose mean the metric would change."""
    metrics = {"loss": lambda outputs, targets: 5.0}
    with pytest.raises(ValueError, match="metrics: 'loss' is the name of the loss itself"):
        measure(model_of(), gpurnn.cross_entropy, drawn(1), metrics)
    with pytest.raises(ValueError, match="metrics: 'loss' is the name of the loss itself"):
        train(drawn(1), validation=drawn(1), metrics=metrics)


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop", "sgd"])
def test_optimizers_by_name(name):
    classes = {"adam": gpurnn.Adam, "adamw": gpurnn.AdamW, "rmsprop": gpurnn.RMSprop, "sgd": gpurnn.SGD}
    model = model_of()
    expected, _ = train(drawn(), model, optimizer=classes[name](model, lr=0.02), lr=None)
    assert np.array_equal(train(drawn(), optimizer=name, lr=0.02)[0], expected)
    with pytest.raises(ValueError, match="lr: belongs to an optimizer that is given by name"):
        train(drawn(), model, optimizer=classes[name](model, lr=0.02), lr=0.1)


@pytest.mark.long
def test_a_schedule_of_an_optimizer_by_name(tmp_path):
    model = model_of()
    adam = gpurnn.Adam(model, lr=0.01)
    expected, _ = train(drawn(), model, optimizer=adam, lr=None, schedule=gpurnn.CosineSchedule(adam, total=4))
    make = functools.partial(gpurnn.CosineSchedule, total=4)
    weights, history = train(drawn(), schedule=make)
    assert np.array_equal(weights, expected) and history.epochs[0]["lr"] < 0.01
    train(drawn(), schedule=make, epochs=1, out=tmp_path)
    assert np.array_equal(train(drawn(), schedule=make, out=tmp_path, resume=True)[0], expected)


def test_text_batches_still_carry():
    """A source whose batches carry the state, through the same door as all others."""
    model = gpurnn.Sequential(
        gpurnn.Embedding(11, 6, **SHARED), gpurnn.LSTM(6, 8, **SHARED), gpurnn.Linear(8, 11, **SHARED)
    )
    source = TextBatches(TEXT_IDS, 4, 10)
    state, total = None, 0.0
    for index in range(len(source)):
        batch = source.batch(0, index)
        logits, state = model.eval()(batch.inputs, state)
        total += float(gpurnn.cross_entropy(logits, batch.targets)[0]) * batch.weight
    weights = sum(source.batch(0, index).weight for index in range(len(source)))
    assert evaluate(model, gpurnn.cross_entropy, source) == pytest.approx(total / weights, rel=1e-12)


def test_what_fit_cannot_do_without():
    for name, example in (("optimizer", "'adam'"), ("epochs", "10")):
        options = {"optimizer": "adam", "epochs": 1, "progress": False}
        del options[name]
        with pytest.raises(TypeError, match=f"fit: {name} is missing: give {name}={example}"):
            fit(model_of(), gpurnn.cross_entropy, drawn(1), **options)


def test_sequences_first_are_told_where_it_can_be_seen():
    """One target for each of 4 sequences of 5 steps; the model takes the 4 for steps."""
    x, y = np.zeros((4, 5, 3), "float32"), np.zeros(4, int)
    with pytest.raises(gpurnn.ShapeError, match=r"here \(4, 5, 3\), build the layers with batch_first=True"):
        train([(x, y)], model_of(pooled=True))
    with pytest.raises(gpurnn.ShapeError) as caught:
        train([(x[:, :4], y)], model_of())  # 4 steps of 4 sequences: nothing shows which are which
    assert "batch_first" not in str(caught.value)


def test_a_model_without_a_head_is_told():
    x, y = np.zeros((5, 4, 3), "float32"), np.zeros((5, 4, 2), "float32")
    with pytest.raises(gpurnn.ShapeError, match=r"End the model with 2 features, as gpurnn.Linear\(6, 2\) makes them"):
        train([(x, y)], gpurnn.GRU(3, 6), gpurnn.mse)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_loader_that_gives_sequences_first_to_a_model_of_timesteps_first_is_said(batch_first, caplog):
    x, y = np.zeros((8, 5, 3), "float32"), np.zeros((8, 5), int)
    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    model, loss = model_of(batch_first=batch_first), functools.partial(gpurnn.cross_entropy, batch_first=batch_first)
    train(torch.utils.data.DataLoader(data, batch_size=4), model, loss, epochs=1)
    assert ("sequences first, and the model takes (T, B, ...)" in caplog.text) is not batch_first
