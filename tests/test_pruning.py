"""``gpurnn.pruning``: blocks that become zero, and stay zero while a model trains."""

import numpy as np
import pytest

import gpurnn
from gpurnn.interop.c import export_c
from gpurnn.pruning import prune


def model_of(backend="numpy", dtype="float32", **options):
    given = {"backend": backend, "dtype": dtype, "seed": 1}
    return gpurnn.Sequential(gpurnn.GRU(10, 18, **given, **options), gpurnn.Linear(18, 3, **given))


def blocks(weight):
    """Which blocks of 8 rows and 4 columns are not all zero."""
    rows, columns = weight.shape
    return np.array([[np.any(weight[r : r + 8, c : c + 4]) for c in range(0, columns, 4)] for r in range(0, rows, 8)])


@pytest.mark.parametrize("density", [1, 0.5, 0.3, 0.001])
def test_the_blocks_with_the_largest_mean_square_stay(density):
    model = model_of()
    before = {name: array.copy() for name, array in model.params.items()}
    pruned = prune(model, density)
    assert list(pruned.masks) == ["0.weight_ih_l0", "0.weight_hh_l0"]
    for name, array in model.params.items():
        if name not in pruned.masks:
            np.testing.assert_array_equal(array, before[name])
            continue
        np.testing.assert_array_equal(array, before[name] * pruned.masks[name])
        there = blocks(array)
        assert there.sum() == np.ceil(density * there.size)
        rows, columns = array.shape
        means = np.array([[np.mean(before[name][r : r + 8, c : c + 4] ** 2) for c in range(0, columns, 4)]
                          for r in range(0, rows, 8)])  # fmt: skip
        assert density == 1 or means[there].min() >= means[~there].max()


def test_heads_are_one_choice():
    model = model_of(heads=2)
    model.params["0.weight_hh_l0"][1] *= 100
    prune(model, 0.5, ["0.weight_hh_l0"])
    weight = model.params["0.weight_hh_l0"]
    assert not weight[0].any() and weight[1].all()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_training_leaves_them_at_zero_and_finds_others_better(backend, dtype):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 6, 10)).astype(dtype), rng.normal(size=(12, 6, 3)).astype(dtype)
    model = model_of(backend, dtype)
    pruned = prune(model, 0.3)
    before = {name: array.copy() for name, array in model.params.items()}
    history = gpurnn.fit(model, gpurnn.mse, [(x, y)], optimizer="adam", lr=0.01, epochs=8, callbacks=[pruned],
                         progress=False)  # fmt: skip
    losses = [record["train_loss"] for record in history.epochs]
    assert losses[-1] < losses[0]
    for name, mask in pruned.masks.items():
        weight = model.params[name]
        assert not weight[~mask].any() and (weight[mask] != before[name][mask]).mean() > 0.9


def test_a_resumed_training_goes_on_with_its_blocks(tmp_path, monkeypatch):
    """The model of the second call begins with others, before its checkpoint is loaded."""
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
    rng = np.random.default_rng(0)
    data = [(rng.normal(size=(5, 4, 10)).astype("float32"), rng.normal(size=(5, 4, 3)).astype("float32"))]
    given = {"optimizer": "adam", "lr": 0.01, "progress": False}
    whole = model_of()
    gpurnn.fit(whole, gpurnn.mse, data, epochs=4, callbacks=[prune(whole, 0.3)], **given)
    first, second = model_of(), model_of()
    gpurnn.fit(first, gpurnn.mse, data, epochs=2, callbacks=[prune(first, 0.3)], out=tmp_path / "run", **given)
    for array in second.params.values():
        array[...] = rng.normal(size=array.shape)
    gpurnn.fit(second, gpurnn.mse, data, epochs=4, callbacks=[prune(second, 0.3)], out=tmp_path / "run", resume=True,
               **given)  # fmt: skip
    for name, array in whole.params.items():
        np.testing.assert_array_equal(second.params[name], array, err_msg=name)


def test_a_loop_of_ones_own():
    model = model_of()
    pruned, optimizer = prune(model, 0.4, "1.weight"), gpurnn.SGD(model, lr=0.1, momentum=0.9)
    x = np.ones((3, 2, 10), "float32")
    for _ in range(3):
        model.zero_grad()
        y, _, backward = model.forward(x)
        backward(y)
        optimizer.step()
        pruned.apply()
    assert 0 < (model.params["1.weight"] != 0).mean() < 0.5
    assert list(pruned.masks) == ["1.weight"] and (model.params["0.weight_hh_l0"] != 0).all()


def test_a_backward_pass_notices():
    model = model_of()
    _, _, backward = model.forward(np.ones((3, 2, 10), "float32"))
    prune(model, 0.5)
    with pytest.raises(RuntimeError, match="weight"):
        backward(np.ones((3, 2, 3), "float32"))


def test_exported_c_leaves_them_out(tmp_path):
    model, sizes = gpurnn.GRU(32, 64, backend="numpy", seed=0), []
    for density in (1, 0.8, 0.25):
        prune(model, density)
        export_c(model, tmp_path / "net.h")
        text = (tmp_path / "net.h").read_text()
        sizes.append(int(text.split("float32: ")[1].split(" bytes")[0]))
        assert ("net_blocks_float32(" in text) == (density == 0.25)
    weights, biases = 4 * 192 * (32 + 64), 4 * 2 * 192
    assert sizes[:2] == [weights + biases] * 2
    assert sizes[2] == weights / 4 + biases + 2 * (2 * 24 + 192 * 96 / 32 / 4)  # and where the blocks are


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((0,), ValueError, "density: expected more than 0"),
        ((1.5,), ValueError, "density"),
        (("half",), TypeError, "density"),
        ((0.5, ["0.bias_ih_l0"]), ValueError, r"names: 0.bias_ih_l0 is no matrix, its shape is \(54,\)"),
        ((0.5, ["weight"]), KeyError, "names: the model has no parameter 'weight'; it has 0.weight_ih_l0"),
        ((0.5, []), ValueError, "names: no layer of the model is recurrent"),
    ],
)
def test_arguments(arguments, error, words):
    model = model_of()
    before = model.flat_params.copy()
    with pytest.raises(error, match=words):
        prune(model, *arguments)
    np.testing.assert_array_equal(model.flat_params, before)
