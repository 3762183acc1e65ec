"""What must be the same on all processes, and is compared: data, functions, weights, and the place in the program."""

import functools

import numpy as np
import pytest
from group_of_threads import together
from helpers import TEXT_IDS

import gpurnn
from gpurnn.data import Batch
from gpurnn.train.parallel import Group, launchers
from gpurnn.train.parallel.start import batch_digest, check_same, function_facts


def text(odd=None):
    """A source that changes one number of batch ``odd``, (epoch, index)."""

    class Source(gpurnn.TextBatches):
        def batch(self, epoch, index):
            batch = super().batch(epoch, index)
            if (epoch, index) == odd:
                batch.targets = batch.targets.copy()
                batch.targets[-1, 0] ^= 1
            return batch

    return Source(TEXT_IDS[:200] % 11, 4, 10)


def fit(group, source=None, loss=gpurnn.cross_entropy, **options):
    model = layers(0)
    usual = {"optimizer": "adam", "epochs": 2, "progress": False, "group": group}
    gpurnn.fit(model, loss, source or text(), **usual | options)


def layers(rank, **options):
    shared = {"dtype": "float64", "backend": "cpu"}
    more = {name: values[rank] for name, values in options.items()}
    return gpurnn.Sequential(gpurnn.Embedding(11, 3, seed=1, **shared), gpurnn.RNN(3, 11, seed=2, **more, **shared))


def refused(words, function):
    """Every one of two processes raises a ValueError with these words."""
    caught = []

    def run(group):
        with pytest.raises(ValueError, match=words) as error:
            function(group)
        caught.append(str(error.value))

    together(2, run)
    assert len(caught) == 2 and len(set(caught)) == 1, caught
    return caught[0]


@pytest.mark.parametrize("what", ["nonlinearity", "weight_dropout", "frozen"])
def test_a_model_with_other_options_is_refused(what):
    options = {"nonlinearity": ("tanh", "relu"), "weight_dropout": (0.1, 0.4)}

    def train(group):
        model = layers(group.rank, **({what: options[what]} if what in options else {}))
        if what == "frozen" and group.rank:
            model.freeze("1.weight_hh_l0")
        gpurnn.fit(model, gpurnn.cross_entropy, text(), optimizer="adam", epochs=1, progress=False, group=group)

    assert {"frozen": "1.weight_hh_l0"}.get(what, what) in refused("the model", train)


@pytest.mark.parametrize(
    "odd, accumulate, words",
    [
        ((0, 1), 1, "batch 2 of epoch 1, in update 2, of process 1"),
        ((1, 0), 1, "batch 1 of epoch 2, in update"),
        ((0, 1), 2, "batch 1 to 2 of epoch 1, in update 1, of process 1"),
    ],
)
def test_a_batch_that_differs_anywhere_is_refused(odd, accumulate, words):
    refused(words, lambda group: fit(group, text(odd if group.rank else None), accumulate=accumulate))


def test_a_validation_batch_that_differs_is_refused():
    words = "a measurement or a validation read of process 1"
    refused(words, lambda group: fit(group, validation=text((0, 1) if group.rank else None)))


def test_a_digest_is_of_everything_in_a_batch():
    x, y = np.zeros((3, 2), int), np.zeros((3, 2), int)
    batches = [
        Batch(x, y), Batch(x + 1, y), Batch(x, y + 1), Batch(x.astype("int32"), y), Batch(x[:2], y[:2]),
        Batch(x, y, np.array([3, 2])), Batch(x, y, carry=True), Batch(x, y, mask=np.ones((3, 2), bool)),
        Batch(x, y, weight=2), Batch(x, [[1, 2], [3]], weight=1, loss_options={}),
        Batch(x, [[1], [2, 3]], weight=1, loss_options={}), Batch(x, y, loss_options={"mask": y > 0}, weight=1),
        Batch(x, y, loss_options={"mask": y == 0}, weight=1),
    ]  # fmt: skip
    digests = [batch_digest(batch) for batch in batches]
    assert len(set(digests)) == len(batches)
    assert digests == [batch_digest(batch) for batch in batches]


def scaled(factor):
    def loss(outputs, targets, **options):
        value, backward = gpurnn.cross_entropy(outputs, targets, **options)
        return value * factor, lambda more=1.0: backward(factor * more)

    return loss


def test_a_loss_of_the_same_name_and_other_numbers_is_refused():
    words = r"the arguments of fit .*Different on 1 .*: loss: .*loss \(code .*\) there, .*loss \(code .*\) on process 0"
    said = refused(words, lambda group: fit(group, loss=scaled(1.0 + group.rank)))
    assert "clip_norm" not in said, "only what differs"


def test_facts_of_functions():
    smooth = functools.partial(gpurnn.cross_entropy, label_smoothing=0.1)
    functions = [
        scaled(1), scaled(2), scaled(np.ones(2)), smooth, functools.partial(gpurnn.cross_entropy, label_smoothing=0.2),
        lambda x: x + 1, lambda x: x + 2, lambda x, y=1: x + 1, gpurnn.cross_entropy, gpurnn.GRU(2, 3).forward, len,
    ]  # fmt: skip
    facts = [str(function_facts(one)) for one in functions]
    assert len(set(facts)) == len(functions)
    assert function_facts(scaled(1)) == function_facts(scaled(1))


def test_a_callback_that_changes_weights_is_refused():
    def reset(record, training):
        training.model.flat_params[:3] = 0

    words = "after the callbacks of epoch 1 the model of process 1 .* another one than that of process 0"
    refused(words, lambda group: fit(group, callbacks=[reset]))


def test_processes_at_different_places_say_where_they_are():
    def run(group):
        fit(group)
        if group.rank:
            fit(group)
        group.close()

    refused("process 1 is at the start of fit, process 0 at the end of the group", run)
    refused(
        "process 1 is at update 3, process 0 at the callbacks of epoch 1",
        lambda group: fit(group, Uneven(2 + group.rank)),
    )


def test_a_training_that_does_not_name_the_group_says_so_once(monkeypatch, caplog, tmp_path):
    """With a folder, which the processes share, the failure of one is heard by all."""
    heard = []

    class Others(Group):
        size = 2

        def all_fail(self, seconds):
            heard.append(seconds)
            return True

    others = Others()
    monkeypatch.setattr(launchers, "joined", [others])
    monkeypatch.setattr("gpurnn.train.settings.joined", [others])
    for out in (None, tmp_path / "run"):
        with pytest.raises(gpurnn.train.TrainingError):
            fit(None, loss=scaled(np.nan), out=out)
        assert len(heard) == (out is not None)
    assert caplog.text.count("fit: without group= each of the 2 processes trains a model of its own") == 1
    others.warned = False
    fit(Group(), epochs=1)
    assert caplog.text.count("without group=") == 1, "that one is alone on purpose"


def test_a_block_with_a_group_ends_all_where_one_fails_alone(capsys, monkeypatch):
    ended, asked = [], []

    class Others(Group):
        size, alone = 2, True

        def all_fail(self, seconds):
            asked.append(seconds)
            return not self.alone

        def abort(self, code):
            ended.append(code)

        def gather_equal(self, data):
            return [data, data]

    written = []
    monkeypatch.setattr("gpurnn.train.parallel.group.say_at_once", written.append)
    with pytest.raises(RuntimeError), Others():
        raise RuntimeError("a bad disk, say")
    assert ended == [1] and "a bad disk, say" in written[0] and "all were ended" in written[0]
    with pytest.raises(SystemExit), Others():
        raise SystemExit
    assert ended == [1], "it has ended as it should"
    Others.alone = False
    with pytest.raises(ZeroDivisionError), Others() as group, group.guarded():
        raise ZeroDivisionError
    assert (ended, len(asked)) == ([1], 2), "an error of all is asked about once, by the inner block"


class Uneven:
    """A loader that gives so many batches."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([(np.zeros((4, 2), int), np.zeros((4, 2), int))] * self.count)


@pytest.mark.parametrize("count", [0, 80, 81, 1000])
def test_an_exchange_of_any_length(count):
    datas = [bytes(range(256))[:7] * (count // 7), b"", b"x" * count]
    assert together(3, lambda group: group.gather(datas[group.rank], "one")) == [datas] * 3


def test_only_the_keys_that_differ_are_named():
    def run(group):
        facts = {"hidden": 8 + group.rank, "cell": "gru", "layers": {"a": [1], **({"b": [2]} if group.rank else {})}}
        check_same(group, {"the options": lambda: facts})

    said = refused("group: the options must be the same", run)
    assert said.endswith("process 0: hidden: 9 there, 8 on process 0; layers, b: [2] there, null on process 0")
