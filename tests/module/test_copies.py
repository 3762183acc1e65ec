"""``copy.deepcopy`` and ``pickle``: copies with equal bits and a life of their own; ``copy.copy`` is refused."""

import copy
import io
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
from helpers import LAYERS, build_layer, cuda_ops, numbers, ones
from optional import optional

import gpurnn
from gpurnn import GRU, LSTM, BatchNorm, Dropout, Embedding, LayerNorm, Linear, Sequential, TiedLinear
from gpurnn.seq2seq import Sampling
from gpurnn.testing import leaves

ml_dtypes = optional("ml_dtypes")

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


def through_pickle(value, protocol=pickle.HIGHEST_PROTOCOL):
    return pickle.loads(pickle.dumps(value, protocol))


def read_only(value):
    """Through pickle as joblib and multiprocessing hand over large arrays: in memory that nobody may write to."""
    buffers = []
    data = pickle.dumps(value, 5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers])


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "read only": read_only}
COPIES |= {f"protocol {number}": (lambda value, n=number: through_pickle(value, n)) for number in PROTOCOLS}


def assert_same(one, other):
    """Two modules with equal state, in buffers of their own, each parameter a view of them."""
    assert type(one) is type(other) and repr(one) == repr(other)
    assert [name for name, _ in one.modules()] == [name for name, _ in other.modules()]
    state, copied = one.state_dict(), other.state_dict()
    assert list(state) == list(copied)
    for name, value in state.items():
        np.testing.assert_array_equal(value, copied[name], err_msg=name)
        assert value.dtype == copied[name].dtype
    np.testing.assert_array_equal(one.ops.to_numpy(one.flat_grads), other.ops.to_numpy(other.flat_grads))
    assert one.random_state() == other.random_state()
    for (_, mine), (_, theirs) in zip(one.modules(), other.modules(), strict=True):
        assert mine is not theirs and mine.ops is theirs.ops and mine.xp is theirs.xp
        assert (mine.name, mine.key, mine.training, mine.dtype) == (
            theirs.name,
            theirs.key,
            theirs.training,
            theirs.dtype,
        )
        if isinstance(theirs.flat_params, np.ndarray) and theirs.flat_params.size:
            for views, flat in ((theirs.params, other.flat_params), (theirs.grads, other.flat_grads)):
                assert all(
                    np.shares_memory(view, flat) and view.flags.writeable for view in views.values() if view.size
                )
            assert not np.shares_memory(mine.flat_params, theirs.flat_params)
        for name in mine.buffers:
            assert mine.buffers[name] is not theirs.buffers[name] and theirs.buffers[name].flags.writeable


def trained(layer, inputs):
    """What two training calls give: outputs, derivatives, gradients."""
    found = []
    for _ in range(2):
        *outputs, backward = layer.forward(*inputs)
        found += leaves(outputs) + leaves(backward(ones(outputs[0])))
        found.append(layer.ops.to_numpy(layer.flat_grads).copy())
        if layer.parameter_count:
            gpurnn.SGD(layer, lr=0.1).step()
    return found + list(layer.state_dict().values())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_have_equal_bits_and_are_independent(kind, how):
    for backend, dtype in (("numpy", "float64"), ("cpu", "float32"), ("cpu", "float16")):
        layer, inputs = build_layer(kind, backend, dtype)
        *outputs, backward = layer.forward(*inputs)
        backward(ones(outputs[0]))
        other = COPIES[how](layer)
        assert_same(layer, other)
        before = layer.state_dict()
        found = trained(other, inputs)
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[name])
        for mine, expected in zip(found, trained(layer, inputs), strict=True):
            np.testing.assert_array_equal(mine, expected)


def test_bfloat16_and_tf32():
    ml_dtypes.bfloat16  # noqa: B018 - skips where it is not here
    layer = Linear(3, 4, backend="cpu", dtype="bfloat16", seed=1)
    fine = Linear(3, 4, backend="cpu", precision="tf32", seed=1)
    for one in (layer, fine):
        for how in COPIES.values():
            assert_same(one, how(one))
            assert how(one).precision == one.precision


def deep_model():
    o = {"backend": "cpu", "dtype": "float64"}
    table = Embedding(7, 6, seed=1, **o)
    norm = LayerNorm(6, **o)
    inner = Sequential({"drop": Dropout(0.5, seed=2, **o), "batch": BatchNorm(6, **o)})
    return Sequential(
        {
            "table": table, "norm": norm, "rnn": LSTM(6, 6, 2, dropout=0.3, seed=3, **o), "inner": inner, "again": norm,
            "head": TiedLinear(table),
        }
    )  # fmt: skip


@pytest.mark.parametrize("how", COPIES)
def test_ties_and_random_draws_are_kept(how):
    model, ids = deep_model(), np.array([[1, 2, 3], [4, 5, 6], [0, 1, 2]])
    model["inner"]["batch"].eval()
    model.forward(ids)  # the masks have counters
    other = COPIES[how](model)
    assert_same(model, other)
    assert other["again"] is other["norm"] and other["head"].embedding is other["table"]
    assert not other["inner"]["batch"].training and other["rnn"].training
    for mine, expected in zip(trained(other, [ids]), trained(model, [ids]), strict=True):
        np.testing.assert_array_equal(mine, expected)
    other.flat_params[...] = 3  # one buffer for all
    assert all((value == 3).all() for value in other["rnn"].params.values())
    with pytest.raises(ValueError, match="already belongs to another Sequential"):
        Sequential(other["rnn"])


@pytest.mark.parametrize("how", COPIES)
def test_a_part_of_a_model_is_copied_alone(how):
    model = deep_model()
    rnn, head = COPIES[how](model["rnn"]), COPIES[how](model["head"])
    assert_same(model["rnn"], rnn)
    assert rnn.flat_params.size < model.flat_params.size
    assert head.embedding is not model["table"]
    np.testing.assert_array_equal(head.embedding.params["weight"], model["table"].params["weight"])
    again = Sequential(rnn)  # it belongs to nobody
    np.testing.assert_array_equal(again.flat_params, model["rnn"].flat_params)


def test_changes_are_counted_in_the_copy_too():
    other = copy.deepcopy(deep_model())
    y, _, backward = other.forward(np.array([[1, 2, 3], [4, 5, 6]]))
    other["rnn"].params["weight_hh_l1"] *= 2
    with pytest.raises(RuntimeError, match=r"parameter rnn\.weight_hh_l1 was changed"):
        backward(y)


@pytest.mark.parametrize("how", COPIES)
def test_optimisers_and_schedules_go_on_with_equal_bits(how):
    for make in (
        lambda m: gpurnn.SGD(m, 0.1, momentum=0.9, nesterov=True),
        lambda m: gpurnn.RMSprop(m, centered=True, momentum=0.5),
        lambda m: gpurnn.Adam(m, amsgrad=True),
        lambda m: gpurnn.AdamW(m),
    ):
        model = Linear(3, 4, backend="cpu", seed=1)
        optimizer = make(model)
        schedule = gpurnn.WarmupSchedule(optimizer, 3, after=gpurnn.CosineSchedule(optimizer, total=9))
        plateau = gpurnn.PlateauSchedule(optimizer, patience=0)

        def go_on(model, optimizer, schedule, plateau):
            for call in range(4):
                model.flat_grads[...] = call + 1
                optimizer.step()
                schedule.step()
                plateau.step(1.0)
            return model.flat_params.copy(), optimizer.lr, repr(optimizer), schedule.state_dict(), plateau.state_dict()

        go_on(model, optimizer, schedule, plateau)
        copied = COPIES[how]((model, optimizer, schedule, plateau))
        assert copied[1].model is copied[0] and copied[2]._opt is copied[1] and copied[2]._after._opt is copied[1]
        with pytest.raises(TypeError):
            copied[1].hyper["eps"] = 1  # read-only, as it was
        got, expected = go_on(*copied), go_on(model, optimizer, schedule, plateau)
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1:] == expected[1:]
        alone = COPIES[how](optimizer)
        assert alone.model is not model
        np.testing.assert_array_equal(alone.model.flat_params, model.flat_params)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["model", "optimizer", "schedule"])
def test_a_model_that_holds_its_optimiser(first, how):
    model = deep_model()
    model.adam = gpurnn.Adam(model)
    model["rnn"].schedule_of_lr = gpurnn.CosineSchedule(model.adam, total=9)
    start = {"model": model, "optimizer": model.adam, "schedule": model["rnn"].schedule_of_lr}
    model.flat_grads[...] = 1
    model.adam.step()
    other = COPIES[how](start[first])
    other = {"model": lambda: other, "optimizer": lambda: other.model, "schedule": lambda: other._opt.model}[first]()
    assert other.adam.model is other and other["rnn"].schedule_of_lr._opt is other.adam
    assert_same(model, other)
    for one in (model, other):
        one.adam.step()
        one["rnn"].schedule_of_lr.step()
    assert_same(model, other)
    assert other.adam.lr == model.adam.lr and other.adam is not model.adam


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("first", ["", "rnn", "inner", "inner.drop", "inner.batch", "head"])
def test_layers_that_refer_to_their_model(first, how):
    model = deep_model()
    for name, module in model.modules():
        module.whole, module.place = model, name
    for child in model["inner"].children.values():
        child.around = model["inner"]
    other = COPIES[how](dict(model.modules())[first])
    assert other.place == first
    whole = other.whole
    assert whole is not model and dict(whole.modules())[first] is other
    assert_same(model, whole)
    assert all(module.whole is whole for _, module in whole.modules())
    assert whole["inner"]["batch"].around is whole["inner"]
    whole["rnn"].params["weight_ih_l0"] = 7
    assert (whole.params["rnn.weight_ih_l0"] == 7).all()
    assert not any("_waiting" in vars(module) for _, module in whole.modules())


@pytest.mark.parametrize("how", COPIES)
def test_what_goes_with_models(how):
    layer, (x,) = build_layer("lstm")
    with gpurnn.record_gradient_flow() as flow:
        y, *_, backward = layer.forward(x)
        backward(y)
    other = COPIES[how](flow)
    assert type(other) is gpurnn.GradientFlow and list(other) == list(flow)
    np.testing.assert_array_equal(other["l0"].dc, flow["l0"].dc)
    _, _, steps = layer(x, return_all=True)
    np.testing.assert_array_equal(COPIES[how](steps)[0].gates["f"], steps[0].gates["f"])
    assert COPIES[how](layer.plan(5, 2)) == layer.plan(5, 2)
    attention, (queries, memory) = build_layer("attention, general")
    attention, remembered = COPIES[how]((attention, attention.remember(memory)))
    attention.attend(queries, remembered)
    translator, _ = build_layer("encoder-decoder")
    translator.sampling = Sampling(0.5, 100, "sigmoid")
    assert COPIES[how](translator).sampling == translator.sampling
    history = gpurnn.History([{"kind": "epoch"}])
    history.stopped = "patience"
    assert COPIES[how](history).stopped == "patience"
    assert COPIES[how](layer.ops) is layer.ops
    views = COPIES[how](layer.params)
    np.testing.assert_array_equal(views["weight_ih_l0"], layer.params["weight_ih_l0"])
    if how != "read only":
        views["weight_ih_l0"] = 0
        assert layer.params["weight_ih_l0"].all()


@pytest.mark.long
def test_a_run_and_a_trained_model(tmp_path):
    from gpurnn.tasks.run import prepare
    from gpurnn.tasks.trained import load

    book = tmp_path / "book.txt"
    book.write_text("so it goes, and so it went. " * 40)
    options = {"hidden": 8, "batch": 4, "epochs": 1, "backend": "cpu", "seed": 1, "dropout": 0.3}
    run = prepare("text", [book], tmp_path / "run", **options)
    runs = run, copy.deepcopy(run), through_pickle(run)  # one after the other: the folder belongs to one at a time
    histories = [one.train(progress=False) for one in runs]
    losses = [[record["train_loss"] for record in history.epochs] for history in histories]
    assert losses[0] == losses[1] == losses[2]
    made = load(tmp_path / "run")
    for other in (copy.deepcopy(made), through_pickle(made)):
        assert_same(made.model, other.model)
        assert other.settings == made.settings and other.facts == made.facts and other.folder == made.folder


def test_a_layer_of_a_gpu_is_refused_with_a_reason_where_there_is_none(monkeypatch):
    layer = GRU(3, 4, backend="numpy", seed=1)
    monkeypatch.setattr(layer.ops, "name", "cuda")
    data = pickle.dumps(layer)
    monkeypatch.undo()
    if gpurnn.backends()["cuda"] is None:
        pickle.loads(data)
        return
    with pytest.raises(gpurnn.BackendError, match="backend 'cuda' cannot work here: "):
        pickle.loads(data)


@pytest.mark.emulated
def test_copies_on_the_cuda_backend():
    """A recorded loop goes on with the copy's own weights."""
    ops = cuda_ops()
    for options in ({}, {"precision": "tf32"}, {"precision": "fma"}):
        layer = LSTM(3, 4, backend=ops, seed=1, schedule="step", **options)
        x = layer.xp.asarray(numbers(4, 2, 3).astype("float32"))
        for _ in range(3):
            y, _, backward = layer.forward(x)
            backward(y)
        other = copy.deepcopy(layer)
        assert other.ops is layer.ops and other.ops.precision == options.get("precision", "float32")
        assert_same(layer, other)
        other.params["weight_hh_l0"] *= 0
        results = [one.forward(x)[0].get() for one in (layer, other)]
        assert (results[0] != results[1]).any()
        np.testing.assert_array_equal(results[0], y.get())
        if gpurnn.backends()["cuda"] is not None:
            with pytest.raises(gpurnn.BackendError, match="backend 'cuda' cannot work here"):
                through_pickle(layer)


def _output(model, x):
    return model(x)[0], model.ops.name, model.parameter_count


@pytest.mark.long
def test_a_process_of_its_own():
    """Spawned, as on macOS and Windows: everything goes there and back through pickle."""
    model = Sequential(LSTM(3, 4, backend="cpu", seed=1), Linear(4, 2, backend="cpu", seed=2))
    x = numbers(5, 2, 3).astype("float32")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        y, name, count = pool.apply(_output, (model, x))
    np.testing.assert_array_equal(y, model(x)[0])
    assert (name, count) == (model.ops.name, model.parameter_count)


@pytest.mark.parametrize("package", ["joblib", "cloudpickle", "dill"])
def test_other_picklers(package, tmp_path):
    pickler = pytest.importorskip(package)
    model = deep_model()
    file = io.BytesIO()
    pickler.dump(model, file)
    file.seek(0)
    assert_same(model, pickler.load(file))
    if package == "joblib":
        pickler.dump(model, tmp_path / "model")
        mapped = pickler.load(tmp_path / "model", mmap_mode="r")
        assert_same(model, mapped)
        mapped.flat_params += 1


def test_shallow_copies_are_refused():
    """They would share parameters and children: eval() of the one would switch the other."""
    model = deep_model()
    for one in (model, model["rnn"], Dropout(0.5, backend="cpu")):
        with pytest.raises(TypeError, match=r"copy.copy: .* would share .*: use copy.deepcopy"):
            copy.copy(one)
    with pytest.raises(TypeError, match=r"copy.copy: .* would share .*: use copy.deepcopy\(\(model, optimizer\)\)"):
        copy.copy(gpurnn.Adam(model))
    adam = gpurnn.Adam(model)
    for schedule in (gpurnn.CosineSchedule(adam, total=9), gpurnn.WarmupSchedule(adam, 3)):
        with pytest.raises(
            TypeError, match=r"copy.copy: .* would set .*: use copy.deepcopy\(\(model, optimizer, sched"
        ):
            copy.copy(schedule)
    assert copy.copy(model.ops) is model.ops


def test_what_cannot_be_pickled_still_says_so():
    layer = Linear(3, 4, backend="cpu")
    layer.lock = threading.Lock()
    with pytest.raises(TypeError, match="cannot pickle '_thread.lock' object"):
        copy.deepcopy(layer)
