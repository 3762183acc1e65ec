"""Long-range problems: how sequences are drawn, how images are read and cut into steps, and that a run learns."""

import gzip
import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close

from gpurnn import DtypeError, ShapeError
from gpurnn.cli import main
from gpurnn.data import adding_problem, copy_memory
from gpurnn.tasks.longrange import TASK, DrawnBatches, LongSettings, read_images
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load

R, C = 6, 4  # rows and columns of the images here


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Most of a tiny run's time would go into its picture."""
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


def stripes(count, seed):
    """Images of three classes: the bright row is one of the upper two, the middle or the lower; and their classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    images = draw.integers(0, 80, (count, R, C), dtype=np.uint8)
    images[np.arange(count), 2 * labels + draw.integers(0, 2, count)] += 150
    return images, labels.astype(np.uint8)


@pytest.fixture(scope="module")
def arrays():
    train, test = stripes(400, 1), stripes(100, 2)
    return {"x_train": train[0], "y_train": train[1], "x_test": test[0], "y_test": test[1]}


@pytest.fixture
def npz(tmp_path, arrays):
    """Writes the arrays, with changes, as images.npz and returns its path as a string."""

    def write(**changes):
        kept = {name: array for name, array in (arrays | changes).items() if array is not None}
        np.savez(tmp_path / "images.npz", **kept)
        return str(tmp_path / "images.npz")

    return write


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


# ---- sequences that are drawn


def test_training_sequences_are_new_and_the_others_fixed():
    settings = [LongSettings(steps=9, sequences=12, batch=4, seed=seed) for seed in (0, 1)]
    train, other = (DrawnBatches(s) for s in settings)
    assert len(train) == 3
    numbers = [train.batch(epoch, index).inputs[:, :, 0] for epoch in (0, 1) for index in (0, 1, 2)]
    numbers.append(other.batch(0, 0).inputs[:, :, 0])
    numbers += [DrawnBatches(settings[0], part).batch(0, 0).inputs[:, :4, 0] for part in ("valid", "test")]
    assert len({array.tobytes() for array in numbers}) == len(numbers)
    np.testing.assert_array_equal(train.batch(1, 1).inputs, adding_problem(4, 9, seed=0, call=4)[0])
    for part in ("valid", "test"):
        held = [DrawnBatches(s, part) for s in settings]
        assert len(held[0]) * held[0].batch(0, 0).weight == 1000
        np.testing.assert_array_equal(held[0].batch(0, 9).inputs, held[1].batch(7, 9).inputs)
    with pytest.raises(IndexError):
        train.batch(0, 3)


def test_copy_is_drawn_as_one_of_ten_for_each_step():
    settings = LongSettings(problem="copy", steps=7, batch=5, seed=3, dtype="float64")
    batch = DrawnBatches(settings).batch(2, 1)
    ids, targets = copy_memory(5, 7, seed=3, call=2 * 2000 + 1)  # 10,000 sequences an epoch
    assert batch.inputs.shape == (27, 5, 10) and batch.inputs.dtype == np.float64
    np.testing.assert_array_equal(batch.inputs.argmax(axis=2), ids)
    np.testing.assert_array_equal(np.count_nonzero(batch.inputs, axis=2), 1)
    np.testing.assert_allclose(np.square(batch.inputs).mean(axis=2), 1, rtol=1e-12)
    np.testing.assert_array_equal(batch.targets, targets)


# ---- images


def test_images_are_read_from_npz_and_from_idx_files(tmp_path, npz, arrays):
    names = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte.gz",
             "x_test": "t10k-images.idx3-ubyte.gz", "y_test": "t10k-labels.idx1-ubyte"}  # fmt: skip
    for name, file in names.items():
        data = idx(arrays[name])
        (tmp_path / file).write_bytes(gzip.compress(data, mtime=0) if file.endswith(".gz") else data)
    parts = read_images([str(tmp_path / file) for file in names.values()])
    for found in (parts, read_images([npz(more=np.zeros(3))])):
        for part, (images, labels) in found.items():
            np.testing.assert_array_equal(images, arrays[f"x_{part}"])
            np.testing.assert_array_equal(labels, arrays[f"y_{part}"])
            assert images.dtype == np.uint8 and labels.dtype == np.int64


@pytest.mark.parametrize("problem, shape", [("rows", (R, C)), ("pixels", (R * C, 1)), ("permuted", (R * C, 1))])
def test_images_become_sequences(npz, arrays, problem, shape):
    settings = LongSettings(problem=problem, valid=0.25, batch=20, seed=1)
    data = TASK.read([npz()], settings)
    train, valid = ([source.batch(0, i) for i in range(len(source))] for source in (data.train, data.valid))
    assert sum(batch.weight for batch in train) == 300 and sum(batch.weight for batch in valid) == 100
    pixels = np.concatenate([batch.inputs for batch in train], axis=1)
    assert pixels.shape == (shape[0], 300, shape[1]) and pixels.dtype == np.float32
    assert abs(pixels.mean(dtype=np.float64)) < 1e-6 and abs(pixels.std(dtype=np.float64) - 1) < 1e-6
    images = np.concatenate([batch.inputs for batch in valid], axis=1).transpose(1, 0, 2).reshape(100, -1)
    scaled = ((arrays["x_train"][300:] - data.facts["mean"]) / data.facts["deviation"]).reshape(100, -1)
    order = np.arange(R * C)
    if problem == "permuted":  # which pixel comes when, found by value: the same for all images, and no sorted order
        order = np.array([np.abs(images[:, [t]] - scaled).max(axis=0).argmin() for t in range(R * C)])
        assert sorted(order) == list(range(R * C)) != order.tolist()
    assert_close(images, scaled[:, order], 1, dtype="float32")
    np.testing.assert_array_equal(np.concatenate([b.targets for b in valid]), arrays["y_train"][300:])
    again = TASK.read([npz()], LongSettings(problem=problem, valid=0.25, batch=20, seed=2)).valid.batch(0, 0)
    np.testing.assert_array_equal(again.inputs, valid[0].inputs)  # neither the order nor the parts are the seed's
    if problem == "permuted":
        other = TASK.read([npz()], LongSettings(problem=problem, permutation=1, seed=1)).rest.batch(0, 0).inputs
        assert not np.array_equal(other, data.rest.batch(0, 0).inputs)


def test_images_shrink_to_means(npz, arrays):
    data = TASK.read([npz()], LongSettings(problem="rows", shrink=2))
    shrunk = data.rest.pixels
    means = arrays["x_test"].reshape(100, R // 2, 2, C // 2, 2).mean(axis=(2, 4))
    assert shrunk.shape == (100, R // 2, C // 2) and np.abs(shrunk - means).max() <= 0.5


# ---- runs


@pytest.mark.long
def test_adding_is_learned_and_beats_answering_one(tmp_path):
    run = prepare("longrange", [], tmp_path / "run", cell="gru", steps=8, hidden=24, batch=50, sequences=5000,
                  epochs=4, lr=1e-2, seed=1, backend="cpu")  # fmt: skip
    numbers, text = run.finish(run.train(progress=False))
    assert numbers["test_loss"] < 0.2 * numbers["trivial_loss"] == 0.2 / 6, numbers
    assert f"{numbers['test_loss']:.5f}" in text and numbers["test_close"] > 0.2
    assert TASK.evaluate(load(tmp_path / "run", "cpu"), []) == (numbers, text)


def test_a_run_on_images_from_the_command_line(tmp_path, npz):
    path, folder = npz(), str(tmp_path / "run")
    options = ["--problem", "rows", "--hidden", "12", "--batch", "20", "--epochs", "4", "--lr", "0.02", "--seed", "1",
               "--backend", "cpu", "--no-progress", "--json", "--out", folder]  # fmt: skip
    trained = CliRunner().invoke(main, ["train", "longrange", path, *options])
    assert trained.exit_code == 0, trained.output
    numbers = json.loads(trained.stdout)
    assert numbers["test_accuracy"] > 0.8 > 2 * numbers["trivial_accuracy"], numbers
    tested = json.loads(CliRunner().invoke(main, ["evaluate", folder, path, "--json"]).stdout)
    _, labels = read_images([path])["test"]
    counts = np.bincount(labels)
    assert tested["test_accuracy"] == numbers["test_accuracy"]
    by_class = np.array([tested[f"test_accuracy_{label}"] for label in range(3)])
    np.testing.assert_allclose(by_class @ counts / 100, tested["test_accuracy"], rtol=1e-12)


@pytest.mark.long
def test_settings_reach_the_layers():
    facts = {"steps": 60, "inputs": 3, "outputs": 2}

    def recurrent(**settings):
        return TASK.build(LongSettings(hidden=40, seed=1, **settings), facts, "cpu")["recurrent"]

    forget = slice(40, 80)
    for off in ({"chrono": 0}, {"problem": "rows"}):
        assert (recurrent(**off).params["bias_ih_l0"][forget] == 1).all()
        assert (recurrent(**off, forget_bias=4.0).params["bias_ih_l0"][forget] == 4).all()
    for cell in ("lstm", "gru"):
        for chrono, longest in ((50, 50), (None, 60)):
            bias = recurrent(cell=cell, chrono=chrono).params["bias_ih_l0"][forget]
            assert 0 < bias.min() < bias.max() <= np.log(longest - 1) < 1.1 * bias.max()
    irnn = recurrent(cell="rnn", activation="relu", init="identity", learn_state=True)
    assert irnn.nonlinearity == "relu" and "initial_h_l0" in irnn.params
    np.testing.assert_array_equal(irnn.params["weight_hh_l0"], np.eye(40))
    assert recurrent(cell="gru", chrono=0).params["bias_ih_l0"][forget].max() == 0
    assert [len(TASK.build(LongSettings(problem=name), facts, "cpu")) for name in ("adding", "copy", "rows")] == [
        3,
        2,
        3,
    ]


# ---- what a user may get wrong


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"steps": 1}, "steps should be at least 2"),
        ({"problem": "pixels", "steps": 100}, "leave it out"),
        ({"problem": "sorting"}, "problem"),
        ({"cell": "rnn", "chrono": 100}, "lstm or gru"),
        ({"sequences": 0}, "sequences"),
        ({"init": "zeros"}, "init"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        LongSettings(**settings)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"x_train": None}, ValueError, "images.npz: no x_train"),
        ({"x_test": None, "y_test": None}, ValueError, "no x_test and no y_test"),
        ({"x_train": np.zeros((400, R, C))}, DtypeError, "x_train: expected uint8.*float64"),
        ({"x_train": np.zeros((400, R * C), np.uint8)}, ShapeError, r"x_train: expected \(images, rows, columns\)"),
        ({"x_test": np.zeros((0, R, C), np.uint8), "y_test": np.zeros(0, int)}, ShapeError, "x_test"),
        ({"x_test": np.zeros((100, R, C + 1), np.uint8)}, ShapeError, r"test images: expected \(N, 6, 4\)"),
        ({"y_train": np.zeros(399, int)}, ShapeError, r"y_train: expected \(400,\)"),
        ({"y_train": np.zeros(400)}, DtypeError, "y_train: expected integers"),
        ({"y_train": np.full(400, -1)}, ValueError, "y_train: expected classes from 0 to 999, got -1"),
        ({"y_train": np.full(400, 10**6)}, ValueError, "got 1000000"),
        ({"y_train": np.full(400, 3)}, ValueError, "3 occurs, 0 does not"),
        ({"y_test": np.full(100, 3)}, ValueError, "3 was never seen in training"),
        ({"y_test": np.array([None] * 100)}, ValueError, "images.npz: is not an .npz file of arrays"),
    ],
)
def test_bad_npz(npz, changes, error, words):
    path = npz(**changes)
    with pytest.raises(error, match=words):
        TASK.read([path], LongSettings(problem="rows"))


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("images.npz", b"no zip file", "is not an .npz file"),
        ("train-images", b"GIF89a......", "neither an .npz nor an IDX file"),
        ("train-images", b"", "neither"),
        ("train-images", b"\0\0\x08\x03" + bytes(12) + b"?", "17 bytes, its header says 16"),
        ("train-images", b"\0\0\x08\x03\0\0", "6 bytes, its header says"),
        ("train-images.gz", gzip.compress(b"\0\0\x08\x01\0\0\0\x02\1\2", mtime=0)[:-4], "cannot be decompressed"),
        ("images", b"\0\0\x08\x01\0\0\0\x02\1\2", "train, test or t10k"),
        ("train-labels", b"\0\0\x08\x01\0\0\0\x02\1\2", "train-labels: no x_train"),
    ],
)
def test_bad_files(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read_images([str(tmp_path / name)])


def test_a_folder_of_images_is_none(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give the files in it"):
        read_images([str(tmp_path)])


def test_two_files_of_the_same_images(tmp_path, npz, arrays):
    """The second would take the place of the first in silence."""
    path = str(tmp_path / "train-images")
    (tmp_path / "train-images").write_bytes(idx(arrays["x_train"]))
    for files in ([npz(), path], [path, path]):
        with pytest.raises(ValueError, match="train-images: has x_train, which another file has already"):
            read_images(files)


def test_files_and_problems_that_do_not_fit(npz):
    with pytest.raises(ValueError, match="images.npz: adding draws its sequences and takes no file"):
        TASK.read([npz()], LongSettings())
    with pytest.raises(ValueError, match="no files of images: give one .npz"):
        TASK.read([], LongSettings(problem="rows"))
    with pytest.raises(ValueError, match="shrink: 4 does not divide the images' 6 x 4 pixels"):
        TASK.read([npz()], LongSettings(problem="rows", shrink=4))
    with pytest.raises(ValueError, match="valid: 0.001 of 400 images"):
        TASK.read([npz()], LongSettings(problem="rows", valid=0.001))
