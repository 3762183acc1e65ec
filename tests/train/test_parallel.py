"""fit by several processes computes what one process computes; here the processes are threads.

float64: 1e-12, which is 4,500 roundings. float32: 1e-4 of the largest value for trainings of a few updates, whose
products are sums of other lengths on each process; the order of magnitude of 1,000 roundings.
"""

import functools

import numpy as np
import pytest
from group_of_threads import together
from helpers import TEXT_IDS

import gpurnn
from gpurnn import rng, shards
from gpurnn.data import Batch
from gpurnn.data.tokens import TokenVocabulary
from gpurnn.seq2seq import Sampling
from gpurnn.tasks.translate import PairBatches
from gpurnn.train import StopTraining, measure
from gpurnn.train.parallel.parts import part_of

ALLOWED = {"float64": 1e-12, "float32": 1e-4}


def text_model(dtype="float64", backend="cpu", **options):
    shared = {"dtype": dtype, "backend": backend}
    return gpurnn.Sequential(
        gpurnn.Embedding(11, 6, seed=1, **shared),
        gpurnn.LSTM(6, 8, 2, dropout=0.3, weight_dropout=0.2, seed=2, **shared, **options),
        gpurnn.Dropout(0.2, seed=3, **shared),
        gpurnn.Dropout(0.2, variational=True, seed=4, **shared),
        gpurnn.Linear(8, 11, seed=5, **shared),
    )


def text_source(B=7, **options):
    return gpurnn.TextBatches(TEXT_IDS[:400] % 11, B, 10, **options)


def normalized_model(dtype="float64"):
    shared = {"dtype": dtype, "backend": "numpy"}
    return gpurnn.Sequential(
        gpurnn.Embedding(11, 6, seed=1, **shared),
        gpurnn.BatchNorm(6, **shared),
        gpurnn.RNN(6, 8, batch_norm=True, zoneout=0.1, seed=2, **shared),
        gpurnn.Pooling(8, "mean", **shared),
        gpurnn.Dropout(0.2, seed=3, **shared),
        gpurnn.Linear(8, 4, seed=4, **shared),
    )


@functools.cache
def ragged(packed=False, count=19, batch=8):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 9, count)
    inputs = [draw.integers(0, 11, T) for T in lengths]
    return gpurnn.SequenceBatches(inputs, draw.integers(0, 4, count), batch, per_step=False, seed=1, packed=packed)


def pairs():
    draw, words = np.random.default_rng(0), [str(n) for n in range(9)]
    vocabulary = TokenVocabulary.of([words * 2], 1, None)
    texts = [tuple(list(draw.choice(words, draw.integers(1, 7))) for _ in range(2)) for _ in range(14)]
    return PairBatches(texts, vocabulary, vocabulary, 5, seed=1), len(vocabulary.tokens)


def translator(dtype="float64"):
    source, V = pairs()
    model = gpurnn.EncoderDecoder(V + 4, V + 4, 6, layers=2, dropout=0.3, backend="cpu", dtype=dtype, seed=1)
    model.sampling = Sampling(0.5, steps=4)
    return model


def trained(group, make, source, **options):
    """The losses and weights of a short training."""
    model = make()
    usual = {"optimizer": "adam", "lr": 0.01, "epochs": 2, "progress": False, "clip_norm": 0.5, "validation": source}
    loss = options.pop("loss", gpurnn.cross_entropy)
    history = gpurnn.fit(model, loss, source, group=group, **usual | options)
    losses = [[one["train_loss"], one["validation_loss"], one["grad_norm"]] for one in history.epochs]
    buffers = [array.ravel() for _, layer in model.modules() for array in layer.buffers.values()]
    calls = [layer.calls for _, layer in model.modules()]
    return np.array(losses), np.concatenate([model.flat_params, *buffers]), calls


def check_equal(sizes, make, source, dtype="float64", **options):
    expected = trained(None, make, source, **options)
    for size in sizes:
        for got in together(size, lambda group: trained(group, make, source, **options)):
            for one, other in zip(got[:2], expected[:2], strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=ALLOWED[dtype] * max(1, np.abs(other).max()))
            assert got[2] == expected[2], "each process counts the same draws"


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_text_with_carried_state_and_all_kinds_of_dropout(dtype):
    check_equal((2, 3, 4), lambda: text_model(dtype), text_source(), dtype, accumulate=2, weight_noise=0.01)


def test_empty_shards():
    check_equal((5,), text_model, text_source(B=3), clip_value=0.1)


def test_documents_are_reset():
    check_equal((3,), lambda: text_model(reset_to="initial"), text_source(begins=3), epochs=1)


@pytest.mark.parametrize("size", [2, pytest.param(9, marks=pytest.mark.long)])
def test_statistics_over_the_batch_are_those_of_all(size):
    """SGD: Adam would divide the noise in gradients that are zero, of what is in front of a normalization."""
    check_equal((size,), normalized_model, ragged(), optimizer="sgd", lr=0.1)


def test_packed_rows_and_pooled_vectors():
    def model():
        shared = {"dtype": "float64", "backend": "cpu"}
        return gpurnn.Sequential(
            gpurnn.Embedding(11, 6, seed=1, **shared),
            gpurnn.GRU(6, 8, seed=2, reset_to="initial", **shared),
            gpurnn.Pooling(8, "last", **shared),
            gpurnn.Dropout(0.3, seed=3, **shared),
            gpurnn.Linear(8, 4, seed=4, **shared),
        )

    check_equal((2, 3), model, ragged(packed=True, count=30, batch=20))


def test_translation_with_sampled_words():
    smoothed = functools.partial(gpurnn.cross_entropy, label_smoothing=0.1)
    check_equal((2, 3), translator, pairs()[0], loss=smoothed, epochs=1)


@pytest.mark.parametrize("targets", ["list", "rows", "flat"])
@pytest.mark.parametrize("weight", [None, 4])
def test_ctc_counts_sequences(targets, weight):
    """Four sequences of four timesteps and labels: by their sizes alone rows of labels might be timesteps."""
    draw = np.random.default_rng(0)
    lengths, counts = np.array([4, 4, 2, 3]), np.array([2, 1, 1, 2])
    labels = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0]])
    options = {"lengths": lengths} | ({} if targets == "list" else {"target_lengths": counts})
    rows = [row[:count] for row, count in zip(labels, counts, strict=True)]
    given = {"list": [row.tolist() for row in rows], "rows": labels, "flat": np.concatenate(rows)}[targets]
    batch = Batch(draw.standard_normal((4, 4, 4)), given, lengths, loss_options=options, weight=weight)

    def model():
        shared = {"dtype": "float64", "backend": "cpu"}
        return gpurnn.Sequential(gpurnn.GRU(4, 5, seed=1, **shared), gpurnn.Linear(5, 4, seed=2, **shared))

    check_equal((2, 3), model, [batch], loss=gpurnn.ctc_loss)


def test_a_sum_in_place_of_a_mean_is_refused():
    batches = [(np.zeros((9, 4, 3), "float64"), np.zeros((9, 4, 5), "float64"))]
    loss = functools.partial(gpurnn.mse, reduction="sum")
    with pytest.raises(ValueError, match="expected reduction='mean', got 'sum'"):
        together(2, lambda group: trained(group, lambda: gpurnn.GRU(3, 5, dtype="float64"), batches, loss=loss))


def test_a_loss_of_ones_own_over_sequences():
    draw = np.random.default_rng(0)
    lengths, wanted = np.array([9, 9, 2, 3]), draw.standard_normal((4, 5))
    batch = Batch(draw.standard_normal((9, 4, 3)), wanted, lengths, loss_options={}, per_step=False)

    def squares(outputs, targets):
        d = outputs - targets
        return float((d * d).sum() / len(d)), lambda scale=1.0: d * (2 * scale / len(d))

    def model():
        shared = {"dtype": "float64", "backend": "cpu"}
        return gpurnn.Sequential(gpurnn.GRU(3, 5, seed=1, **shared), gpurnn.Pooling(5, "last", **shared))

    check_equal((2, 3), model, [batch], loss=squares)


def test_the_same_bits_in_every_run():
    first, second = (together(3, lambda group: trained(group, text_model, text_source())) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one[0].tobytes() == other[0].tobytes() and one[1].tobytes() == other[1].tobytes()
    assert len({one[1].tobytes() for one in first}) == 1, "all processes hold the same weights"


def test_an_overflow_on_one_process_skips_the_update_on_all():
    x = np.zeros((3, 2, 2), "float16")
    x[:, 1] = 60000  # of the second process alone
    batches = [(x, np.array([0, 1])), (np.ones((3, 2, 2), "float16"), np.array([0, 1]))]

    def train(group):
        shared = {"dtype": "float16", "backend": "cpu"}
        model = gpurnn.Sequential(
            gpurnn.RNN(2, 3, seed=1, **shared),
            gpurnn.Pooling(3, "last", **shared),
            gpurnn.Linear(3, 2, seed=2, **shared),
        )
        scaler = gpurnn.LossScaler(init_scale=2.0**30)
        gpurnn.fit(model, gpurnn.cross_entropy, batches, optimizer="sgd", lr=0.1, epochs=2, progress=False,
                   loss_scaler=scaler, group=group)  # fmt: skip
        return scaler.skipped, scaler.scale, model.flat_params.tobytes()

    alone, results = train(None), together(2, train)
    assert results[0] == results[1] and results[0][:2] == alone[:2] and alone[0] > 0


# ---- what all decide together


def test_process_0_stops_sets_the_rate_and_decides_for_all():
    called = []

    def watch(record, training):
        called.append(record["epoch"])
        training.optimizer.lr = 0.5
        if record["epoch"] == 2:
            raise StopTraining("enough")

    def train(group):
        model = text_model()
        options = dict(optimizer="adam", lr=0.01, epochs=5, progress=False, callbacks=[watch], group=group)
        history = gpurnn.fit(model, gpurnn.cross_entropy, text_source(), **options)
        return history.stopped, history.reason, [one["lr"] for one in history.epochs], model.flat_params.tobytes()

    first, second = together(2, train)
    assert first == second and first[:3] == ("callback", "enough", [0.01, 0.5])
    assert called == [1, 2]


def test_patience_ends_all_in_the_same_epoch():
    results = together(3, lambda group: trained(group, text_model, text_source(), epochs=40, lr=0.5, patience=1))
    alone = trained(None, text_model, text_source(), epochs=40, lr=0.5, patience=1)
    assert {len(one[0]) for one in results} == {len(alone[0])} and len(alone[0]) < 40


def test_a_full_disk_on_process_0_is_the_error_of_all(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpurnn.train.snapshot.save_checkpoint", full)
    caught = []

    def train(group):
        with pytest.raises(OSError, match="No space left") as error:
            trained(group, text_model, text_source(), out=tmp_path if group.is_first else None)
        caught.append((group.rank, type(error.value)))

    together(3, train)
    assert sorted(caught) == [(0, OSError), (1, OSError), (2, OSError)]


@pytest.mark.parametrize(
    "words, options",
    [
        ("the arguments of fit", lambda rank: {"clip_norm": 1 + rank}),
        ("the training data", lambda rank: {"source": text_source(7 + rank)}),
        ("the model", lambda rank: {"make": lambda: text_model("float32" if rank else "float64")}),
        ("the code", lambda rank: {}),
    ],
)
def test_what_differs_between_processes_is_refused_on_all(words, options, monkeypatch):
    versions = iter(range(9))
    if words == "the code":
        monkeypatch.setattr("gpurnn.train.members.code_digest", lambda: next(versions))
    caught = []

    def train(group):
        given = {"make": text_model, "source": text_source()} | options(group.rank == 2)
        with pytest.raises(ValueError, match=f"group: {words}.* must be the same .* Different on .*2 .of 3. from"):
            trained(group, **given)
        caught.append(group.rank)

    together(3, train)
    assert sorted(caught) == [0, 1, 2]


def test_a_loader_that_shuffles_on_its_own_is_refused():
    def train(group):
        draw = np.random.default_rng(group.rank)

        class Loader:
            def __iter__(self):
                yield draw.standard_normal((3, 4, 2)), np.zeros((3, 4), int)

        model = gpurnn.Sequential(gpurnn.GRU(2, 3, dtype="float64"), gpurnn.Linear(3, 2, dtype="float64"))
        with pytest.raises(ValueError, match="batch 1 of epoch 1, in update 1, of process 1 .of 2. differ"):
            gpurnn.fit(model, gpurnn.cross_entropy, Loader(), optimizer="adam", epochs=1, progress=False, group=group)

    together(2, train)


# ---- resume


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)


def runs_on(folder, size, epochs, **options):
    def train(group):
        more = {"out": folder if group.is_first else None, "epochs": epochs, "resume": True, "checkpoint_every": 2}
        return trained(group, text_model, text_source(), **more | options)

    return together(size, train)[-1] if size > 1 else trained(
        None, text_model, text_source(), out=folder, epochs=epochs, resume=True, checkpoint_every=2, **options
    )  # fmt: skip


def stop_at(step):
    class Stop:
        def on_update(self, record, training):
            if record["step"] == step:
                raise StopTraining

    return {"callbacks": [Stop()]}


def test_a_resumed_run_has_the_same_bits_with_as_many_processes(tmp_path, undrawn):
    """Stopped in the middle of an epoch, with a recurrent state that is carried on."""
    whole = runs_on(tmp_path / "whole", 3, 2)
    runs_on(tmp_path / "parts", 3, 2, **stop_at(3))
    again = runs_on(tmp_path / "parts", 3, 2)
    assert again[1].tobytes() == whole[1].tobytes()


@pytest.mark.long
@pytest.mark.parametrize("before, after", [(2, 3), (3, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, undrawn, before, after):
    """The checkpoint is that of one process: the same training goes on, up to rounding."""
    expected = runs_on(tmp_path / "whole", 1, 2)
    runs_on(tmp_path / "parts", before, 2, **stop_at(3))
    got = runs_on(tmp_path / "parts", after, 2)
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=ALLOWED["float64"])


# ---- measuring


def test_evaluation_in_shards_is_that_of_one_process():
    def found(group=None):
        model = normalized_model()
        metrics = {"right": gpurnn.accuracy, "pair": lambda y, t: (float((y.argmax(-1) == t).sum()), len(t))}
        return measure(model, gpurnn.cross_entropy, ragged(), metrics, group=group)

    alone = found()
    for one in together(5, found):
        assert one == pytest.approx(alone, abs=1e-12)


# ---- parts of batches


def cut(size, rank, batch, model=None, loss=gpurnn.cross_entropy):
    group = together(size, lambda group: group)[rank]
    return part_of(group, model or text_model(), loss, batch)


def test_targets_without_time_are_cut_by_sequence_even_where_sizes_agree():
    x, y = np.zeros((4, 4, 2)), np.arange(16.0).reshape(4, 4)
    by_sequence = cut(2, 1, Batch(x, y, loss_options={}, weight=4, per_step=False), loss=gpurnn.mse)
    assert by_sequence.batch.targets.tolist() == y[2:].tolist() and by_sequence.share == 0.5
    by_step = cut(2, 1, Batch(x, y, loss_options={}, weight=4), loss=gpurnn.mse)
    assert by_step.batch.targets.tolist() == y[:, 2:].tolist()


def test_the_share_of_a_part_is_what_its_mean_divides_by():
    lengths = np.array([5, 1, 2])
    x, y = np.zeros((5, 3), int), np.zeros((5, 3), int)
    assert cut(2, 0, Batch(x, y, lengths)).share == 6 / 8
    assert cut(2, 1, Batch(x, y, lengths)).share == 2 / 8
    mask = np.arange(15).reshape(5, 3) % 5 > 0
    masked = [cut(2, rank, Batch(x, y, mask=mask)).share for rank in (0, 1)]
    assert masked == [mask[:, :2].sum() / mask.sum(), mask[:, 2:].sum() / mask.sum()]
    ignoring = functools.partial(gpurnn.cross_entropy, ignore_index=1)
    y = (np.arange(15).reshape(5, 3) % 3 == 2).astype(int)
    assert cut(2, 1, Batch(x, y), loss=ignoring).share == 0
    own = cut(2, 0, Batch(x, y, lengths), loss=lambda outputs, targets, lengths: None)
    assert own.share == 6 / 8, "the weight of the batch says that a loss of one's own counts timesteps"


def test_sequences_that_cannot_be_found_are_an_error():
    with pytest.raises(ValueError, match="cut inputs along axis 1, and there these differ"):
        cut(
            2,
            0,
            Batch((np.zeros((3, 4), int), np.zeros((3, 5), int)), np.zeros((3, 4), int), loss_options={}, weight=1),
        )


# ---- draws


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("shape, axis", [((3, 5, 7), 1), ((5, 6), 0), ((5, 3, 2), 0), ((1, 5, 9), 1)])
def test_a_part_of_a_mask_is_what_the_mask_of_the_batch_has_there(backend, shape, axis, monkeypatch):
    ops, total, first = gpurnn.get_backend(backend), 11, 4
    whole = ops.dropout_mask((*shape[:axis], total, *shape[axis + 1 :]), 0.3, 5, 6, 7)
    for most in (16, 0):
        monkeypatch.setattr(shards, "_WHOLE", most)
        with shards.computing(shards.Shard(first, 5, total, axis, (first, 5, total), None)):
            got = shards.dropout_mask(ops, shape, 0.3, 5, 6, 7, axis)
        assert got.tolist() == whole.take(range(first, first + 5), axis).tolist()


def test_words_of_rows():
    whole = rng.words(6 * 13, 3, 4, 5).reshape(6, 13)
    for first, count in ((0, 13), (1, 1), (5, 8), (12, 1), (3, 0)):
        assert rng.words_of_rows(6, (first, count, 13), 3, 4, 5).tolist() == whole[:, first : first + count].tolist()


def test_dropout_on_an_array_without_the_batch_is_refused():
    layer = gpurnn.Dropout(0.5, backend="numpy")
    words = "expects the sequences of the batch on axis 1, 2 of them here"
    with shards.computing(shards.Shard(0, 2, 4, 1, (0, 2, 4), None)), pytest.raises(ValueError, match=words):
        layer(np.ones((3, 4, 5), "float32"))
