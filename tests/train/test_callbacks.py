"""Callbacks of fit: when they are called, how they stop a training, what a resume shows them, and those that ship."""

import csv
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, TEXT_IDS
from optional import needs

import gpurnn
from gpurnn import TextBatches, fit
from gpurnn.checkpoint import load_checkpoint
from gpurnn.train import StopTraining, Terminated, TrainingError
from gpurnn.train.callbacks import Callback, CSVLog, StopWhen, TensorBoard

UPDATES = 10  # of an epoch


def model_of(seed=1):
    shared = {"backend": "cpu", "seed": seed}
    rnn = gpurnn.GRU(6, 8, 2, dropout=0.3, **shared)
    return gpurnn.Sequential(gpurnn.Embedding(11, 6, **shared), rnn, gpurnn.Linear(8, 11, **shared))


def train(*callbacks, epochs=3, model=None, **options):
    model = model or model_of()
    usual = dict(optimizer="adam", lr=0.01, validation=TextBatches(TEXT_IDS[2400:], 8, 10), progress=False)
    batches = TextBatches(TEXT_IDS[: 8 * 10 * UPDATES + 1], 8, 10)
    history = fit(model, gpurnn.cross_entropy, batches, epochs=epochs, callbacks=callbacks, **usual | options)
    return model, history


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, training):
        self.calls.append(("start", training.epoch, training.step))

    def on_update(self, record, training):
        assert record["kind"] == "step" and record["lr"] == training.optimizer.lr and record["loss"] > 0
        self.calls.append(("update", record["epoch"], record["step"]))

    def on_epoch(self, record, training):
        assert record == training.history[-1] and training.model.training
        assert record["validation_loss"] > 0 and record["epoch"] == training.epoch <= training.epochs
        self.calls.append(("epoch", record["epoch"], record["step"]))

    def on_end(self, training):
        self.calls.append(("end", training.history.stopped, training.step))

    def epochs(self):
        return [call[1] for call in self.calls if call[0] == "epoch"]


def test_callbacks_are_called_in_order():
    seen = Recorder()
    functions = []
    train(seen, lambda record, training: functions.append((record["epoch"], training.best_epoch)), epochs=2)
    expected = [("start", 0, 0)]
    for epoch in (1, 2):
        expected += [("update", epoch, UPDATES * (epoch - 1) + n) for n in range(1, UPDATES + 1)]
        expected.append(("epoch", epoch, UPDATES * epoch))
    assert seen.calls == [*expected, ("end", "epochs", 2 * UPDATES)]
    assert functions == [(1, 1), (2, 2)]


def test_callbacks_do_not_change_a_training():
    assert np.array_equal(train(Recorder())[0].flat_params, train()[0].flat_params)


@pytest.mark.long
@pytest.mark.parametrize("place", ["on_start", "on_update", "on_epoch"])
def test_a_callback_stops_and_the_run_can_go_on(tmp_path, place):
    """fit returns, a checkpoint is saved, and the resumed run ends with the bits of one that was not stopped."""

    class Stop(Callback):
        armed = True

        def _stop(self, step, wanted):
            if self.armed and step == wanted:
                raise StopTraining("enough")

    stop = Stop()
    wanted = {"on_start": 0, "on_update": 13, "on_epoch": 10}[place]
    method = (lambda t: stop._stop(t.step, wanted)) if place == "on_start" else lambda r, t: stop._stop(t.step, wanted)
    setattr(stop, place, method)
    seen = Recorder()
    _, history = train(stop, seen, out=tmp_path)
    assert (history.stopped, history.reason) == ("callback", "enough")
    assert seen.calls[-1] == ("end", "callback", wanted)
    assert load_checkpoint(tmp_path / "last.json")[1]["step"] == wanted
    assert (tmp_path / "best.json").exists() is (wanted >= 10)
    stop.armed = False
    again = Recorder()
    model, history = train(again, out=tmp_path, resume=True)
    assert np.array_equal(model.flat_params, train()[0].flat_params) and len(history.epochs) == 3
    assert seen.epochs() + again.epochs() == [1, 2, 3]


@pytest.mark.parametrize("place", ["on_update", "on_epoch"])
def test_a_record_is_the_callbacks_own_to_change(place):
    class Clear(Callback):
        pass

    clear, seen = Clear(), Recorder()
    setattr(clear, place, lambda record, training: record.clear())
    _, history = train(clear, seen, epochs=1)
    assert [record["step"] for record in history] == [UPDATES, UPDATES]  # one of an update, one of the epoch


@pytest.mark.parametrize("place", ["on_start", "on_update", "on_epoch"])
def test_a_callback_that_stops_hides_nothing_from_those_after_it(tmp_path, place, capsys):
    """The callbacks after it see the same; then training stops, for the reason that was given first."""

    class Stop(Callback):
        def __init__(self, reason):
            def stop(*arguments):
                raise StopTraining(reason)

            setattr(self, place, stop)

    seen, table = Recorder(), tmp_path / "table.csv"
    _, history = train(Stop("first"), Stop("second"), seen, CSVLog(table), progress=True)
    last = {"on_start": ("start", 0, 0), "on_update": ("update", 1, 1), "on_epoch": ("epoch", 1, UPDATES)}[place]
    assert seen.calls[-2] == last and (history.stopped, history.reason) == ("callback", "first")
    shown = capsys.readouterr().err
    assert ("epoch 1/3" in shown) == (place == "on_epoch") == table.exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("step", [13, 20])
def test_after_an_interrupt_each_epoch_was_shown_once(tmp_path, number, kind, step):
    """And the history is not lost."""

    class Press(Callback):
        def on_update(self, record, training):
            if record["step"] == step:
                os.kill(os.getpid(), number)

    first, second = Recorder(), Recorder()
    with pytest.raises(kind) as caught:
        train(first, Press(), out=tmp_path)
    history = caught.value.history
    assert history.stopped == "interrupt" and first.calls[-1] == ("end", "interrupt", step)
    assert [record["epoch"] for record in history.epochs] == [1] == first.epochs()
    model, _ = train(second, out=tmp_path, resume=True)
    assert second.calls[0] == ("start", 1, step) and second.epochs() == [2, 3]
    assert np.array_equal(model.flat_params, train()[0].flat_params)


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_an_interrupt_between_epochs_waits_for_no_update(tmp_path):
    """As during a long validation."""

    def press(record, training):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated):
        train(press, out=tmp_path)
    document = load_checkpoint(tmp_path / "last.json")[1]
    assert (document["epoch"], document["index"], document["step"]) == (1, 0, UPDATES)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("place", ["on_start", "on_update", "on_epoch", "on_end"])
@pytest.mark.parametrize("stops", [False, True])
def test_no_interrupt_is_lost(tmp_path, number, kind, place, stops):
    """Not at the end of the last epoch either, nor where a callback stops the training at the same moment."""
    last = {"on_start": 0, "on_end": UPDATES}

    class Press(Callback):
        def _press(self, *arguments):
            if arguments[-1].step == last.get(place, UPDATES):
                os.kill(os.getpid(), number)
                if stops and place != "on_end":
                    raise StopTraining("enough")

    press, seen = Press(), Recorder()
    setattr(press, place, press._press)
    with pytest.raises(kind) as caught:
        train(press, seen, out=tmp_path, epochs=1)
    history = caught.value.history
    assert history.stopped == "interrupt"
    assert seen.calls[-1][:2] == ("end", "epochs" if place == "on_end" else "interrupt")
    model, _ = train(out=tmp_path, resume=True, epochs=2)
    assert np.array_equal(model.flat_params, train(epochs=2)[0].flat_params)


def test_without_a_folder_the_history_is_on_the_exception():
    def interrupt(record, training):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        train(interrupt)
    assert len(caught.value.history.epochs) == 1

    def poison(record, training):
        training.model.flat_params[...] = np.nan

    with pytest.raises(TrainingError) as caught, np.errstate(all="ignore"):
        train(poison)
    assert caught.value.history.stopped == "error" and len(caught.value.history.epochs) == 1


CHILD = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/train", {root!r}]
from test_callbacks import train

def show(record, training):
    print(record["epoch"], flush=True)
train(show, epochs=100000, out={out!r}, validation=None)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_sigterm_saves_in_a_child(tmp_path):
    code = CHILD.format(tests=str(ROOT / "tests"), root=str(ROOT), out=str(tmp_path / "run"))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout.readline() == "1\n"
    child.send_signal(signal.SIGTERM)
    shown, errors = child.communicate(timeout=60)
    assert "Terminated" in errors.splitlines()[-1] and child.returncode == 1
    epochs = len(shown.split()) + 1
    document = load_checkpoint(tmp_path / "run" / "last.json")[1]
    assert document["epoch"] == epochs and document["step"] > UPDATES * epochs - UPDATES


@pytest.mark.long
def test_what_a_callback_changes_is_saved(tmp_path):
    """A rate of its own, and weights: the resumed run has the bits of the whole one."""

    def halve(record, training):
        training.optimizer.lr /= 2
        training.model.flat_params[...] *= 0.9

    whole, _ = train(halve)
    train(halve, out=tmp_path, epochs=2)
    model, history = train(halve, out=tmp_path, resume=True)
    assert np.array_equal(model.flat_params, whole.flat_params)
    assert [record["lr"] for record in history.epochs] == [0.01, 0.005, 0.0025]


def test_other_errors_of_callbacks_reach_the_caller_and_all_ends_are_called():
    class Broken(Callback):
        def on_epoch(self, record, training):
            raise RuntimeError("mine")

        def on_end(self, training):
            raise OSError("the end of it")

    seen = Recorder()
    with pytest.raises(OSError, match="the end of it") as caught:
        train(Broken(), seen)
    assert str(caught.value.__context__) == "mine" and seen.calls[-1] == ("end", "error", UPDATES)


@pytest.mark.long
def test_an_epoch_in_which_a_callback_failed_is_trained_and_shown_again(tmp_path):
    """So that the callback, and those after it, get to see it."""
    failing, seen = [True], []

    def fail(record, training):
        seen.append(record["epoch"])
        if failing[0] and record["epoch"] == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train(fail, out=tmp_path)
    failing[0] = False
    model, history = train(fail, out=tmp_path, resume=True)
    assert seen == [1, 2, 2, 3] and [record["epoch"] for record in history.epochs] == [1, 2, 3]
    assert np.array_equal(model.flat_params, train()[0].flat_params)


@pytest.mark.parametrize(
    "callbacks, words",
    [
        ([3], r"callbacks\[0\]: expected a function of \(record, training\), .* got int"),
        ([Recorder], r"callbacks\[0\]: .* got the class Recorder: build one"),
        (print, "callbacks: expected a list, such as"),
        ("show", "callbacks: expected a list"),
    ],
)
def test_what_is_no_callback(callbacks, words):
    with pytest.raises(TypeError, match=words):
        fit(model_of(), gpurnn.cross_entropy, TextBatches(TEXT_IDS, 8, 10), optimizer="adam", epochs=1,
            callbacks=callbacks)  # fmt: skip


def test_objects_that_derive_from_nothing():
    class Mine:
        def __init__(self):
            self.losses = []

        def on_epoch(self, record, training):
            self.losses.append(record["train_loss"])

    mine = Mine()
    _, history = train(mine)
    assert mine.losses == [record["train_loss"] for record in history.epochs]
    assert repr(history) == "History(3 epochs, 6 records, stopped='epochs')"


# ---- those that ship


def test_stop_when():
    reports = []

    def should_prune(record):
        reports.append((record["epoch"], record["validation_loss"]))
        return record["epoch"] == 2

    _, history = train(StopWhen(should_prune, "pruned"))
    assert (history.stopped, history.reason, len(reports)) == ("callback", "pruned", 2)
    with pytest.raises(TypeError, match="function: expected a function"):
        StopWhen(0.5)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_a_table_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "logs" / "epochs.csv"
    _, history = train(CSVLog(path), out=tmp_path / "run", epochs=2)
    train(CSVLog(path), out=tmp_path / "run", resume=True)
    found = rows(path)
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert [float(row["train_loss"]) for row in found[:2]] == [r["train_loss"] for r in history.epochs]
    assert set(found[0]) == set(history.epochs[0]) - {"kind"}
    train(CSVLog(path), epochs=1)  # a new training begins a new table
    assert len(rows(path)) == 1


@pytest.mark.long
def test_a_table_shows_an_epoch_once_that_was_trained_again(tmp_path):
    """As after a kill: the checkpoint is older than the table."""
    path = tmp_path / "epochs.csv"
    train(CSVLog(path), out=tmp_path / "run", epochs=1)
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    train(CSVLog(path), out=tmp_path / "run", epochs=2, resume=True)
    train(CSVLog(path), out=tmp_path / "old", resume=True)
    assert [row["epoch"] for row in rows(path)] == ["1", "2", "3"]


def test_a_table_of_somebody_else_is_not_replaced(tmp_path):
    path = tmp_path / "prices.csv"
    path.write_text("date,price\n2020-01-01,3\n")
    for options in ({}, {"out": tmp_path / "run"}):
        with pytest.raises(FileExistsError, match="is no table of CSVLog"):
            train(CSVLog(path), **options)
    assert path.read_text().startswith("date,price")


def scalars(folder):
    """(tag, step) -> value of every event file of a folder, in the order of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):  # a record of TFRecord: its length, a checksum, itself, a checksum
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


@needs("tensorboardX")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    board = TensorBoard(tmp_path / "board", every=5)
    _, history = train(board, epochs=2, metrics={"accuracy": gpurnn.accuracy})
    found = scalars(tmp_path / "board")
    assert {step for tag, step in found if tag == "train/loss"} == {5, 10, 15, 20}
    for record in history.epochs:
        for name in ("validation_loss", "validation_accuracy", "train_loss"):
            assert found[f"epoch/{name}", record["step"]] == pytest.approx(record[name], rel=1e-6)


def test_tensorboard_without_its_library(monkeypatch, tmp_path):
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "gpurnn\[tensorboard\]"'):
        TensorBoard(tmp_path)
