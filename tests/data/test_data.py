"""Batches: ids used once, carried states, padding, shuffling by (seed, epoch) alone; synthetic tasks."""

import numpy as np
import pytest

from gpurnn import DtypeError, SequenceBatches, ShapeError, TextBatches
from gpurnn.data import adding_problem, copy_memory


@pytest.mark.parametrize("count, B, steps", [(101, 4, 5), (100, 3, 7), (2, 1, 10), (50, 49, 1), (1000, 7, 1000)])
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_text_batches_read_every_stream_to_its_end(count, B, steps, dtype):
    ids = (np.arange(count) % 251).astype(dtype)
    source = TextBatches(ids, B, steps)
    batches = [source.batch(3, i) for i in range(len(source))]
    inputs, targets = (np.concatenate([getattr(b, name) for b in batches]) for name in ("inputs", "targets"))
    S = (count - 1) // B
    for b in range(B):
        np.testing.assert_array_equal(inputs[:, b], ids[b * S : (b + 1) * S])
        np.testing.assert_array_equal(targets[:, b], ids[b * S + 1 : (b + 1) * S + 1])
    assert [b.carry for b in batches] == [False] + [True] * (len(batches) - 1)
    assert all(b.inputs.dtype == np.int64 and b.inputs.shape[0] == steps for b in batches[:-1])
    assert sum(b.weight for b in batches) == S * B


def test_text_batches_read_a_memory_map(tmp_path):
    path = tmp_path / "ids.bin"
    (np.arange(1000) % 200).astype(np.uint8).tofile(path)
    mapped = np.memmap(path, np.uint8, "r")
    batch = TextBatches(mapped, 4, 10).batch(0, 2)
    np.testing.assert_array_equal(batch.inputs[:, 1], (249 + 20 + np.arange(10)) % 200)
    assert not isinstance(batch.inputs, np.memmap)


@pytest.mark.parametrize(
    "ids, error",
    [
        (np.zeros((3, 3), int), ShapeError),
        (np.zeros(9), DtypeError),
        ([1, 2, 3], ShapeError),
        (np.zeros(4, int), ValueError),
        (np.zeros(0, int), ValueError),
    ],
)
def test_bad_text(ids, error):
    with pytest.raises(error, match="ids"):
        TextBatches(ids, 4, 5)


def test_index_out_of_range():
    source = TextBatches(np.zeros(100, int), 4, 5)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match="index"):
            source.batch(0, index)


def sequences(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, 3)) for n in lengths]


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_sequence_batches_use_every_sequence_once(shuffle, bucket):
    lengths = np.random.default_rng(1).integers(0, 20, 203)
    x = sequences(lengths)
    y = [np.arange(n) for n in lengths]
    source = SequenceBatches(x, y, 8, shuffle=shuffle, bucket=bucket, seed=5)
    seen = []
    for i in range(len(source)):
        batch = source.batch(0, i)
        assert batch.inputs.shape[0] == batch.lengths.max() and not batch.carry
        for b, n in enumerate(batch.lengths):
            seen.append(batch.inputs[:n, b].tobytes())
            assert not batch.inputs[n:, b].any()
            np.testing.assert_array_equal(batch.targets[:n, b], np.arange(n))
    assert sorted(seen) == sorted(a.tobytes() for a in x)
    if not shuffle and not bucket:
        assert seen == [a.tobytes() for a in x]


def test_order_depends_on_seed_and_epoch_alone():
    x = sequences([5] * 60)
    y = np.arange(60)

    def order(seed, epoch):
        source = SequenceBatches(x, y, 7, per_step=False, seed=seed)
        return np.concatenate([source.batch(epoch, i).targets for i in reversed(range(len(source)))]).tolist()

    assert order(1, 0) == order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 3)) == y.tolist()


def test_bucketing_pads_less():
    lengths = np.random.default_rng(2).integers(1, 100, 640)
    x = sequences(lengths)
    padded = []
    for bucket in (True, False):
        source = SequenceBatches(x, lengths, 16, per_step=False, bucket=bucket, seed=0)
        padded.append(sum(source.batch(0, i).inputs.shape[0] * 16 for i in range(len(source))))
    assert padded[0] < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded[1]


def test_bad_sequences():
    x = sequences([3, 4])
    with pytest.raises(ShapeError, match=r"targets\[1\]: expected 4 steps"):
        SequenceBatches(x, [np.zeros(3), np.zeros(5)], 2)
    with pytest.raises(ShapeError, match="expected 2 entries"):
        SequenceBatches(x, np.zeros(3), 2, per_step=False)
    with pytest.raises(ValueError, match="at least one"):
        SequenceBatches([], [], 2)


def test_adding_problem():
    x, y = adding_problem(4000, 101, seed=1)
    assert x.shape == (101, 4000, 2) and y.shape == (4000, 1) and x.dtype == y.dtype == np.float32
    np.testing.assert_array_equal(x[:50, :, 1].sum(axis=0), 1)
    np.testing.assert_array_equal(x[50:, :, 1].sum(axis=0), 1)
    np.testing.assert_allclose(y[:, 0], (x[:, :, 0] * x[:, :, 1]).sum(axis=0), rtol=1e-6)
    # 1/6 is the variance of a sum of two uniform numbers; its estimate from 4000 of them has a deviation of 0.003
    assert abs(np.mean((y - 1) ** 2) - 1 / 6) < 0.012
    assert x[:50, :, 1].any(axis=1).all() and x[50:, :, 1].any(axis=1).all()  # every place is drawn
    assert np.array_equal(x, adding_problem(4000, 101, seed=1)[0])
    assert not np.array_equal(x, adding_problem(4000, 101, seed=2)[0])
    other, sums = adding_problem(4000, 101, seed=1, call=1)
    assert (x[:, :, 0] != other[:, :, 0]).mean() > 0.99 and (x[:, :, 1] != other[:, :, 1]).any()
    np.testing.assert_allclose(sums[:, 0], (other[:, :, 0] * other[:, :, 1]).sum(axis=0), rtol=1e-6)


def test_copy_memory():
    ids, targets = copy_memory(500, 30, symbols=8, length=10, seed=1)
    assert ids.shape == targets.shape == (50, 500)
    assert set(np.unique(ids[:10])) == set(range(1, 9))
    assert not ids[10:39].any() and (ids[39] == 9).all() and not ids[40:].any()
    assert not targets[:40].any()
    np.testing.assert_array_equal(targets[40:], ids[:10])
    assert (copy_memory(500, 30, seed=1, call=1)[1][40:] != targets[40:]).mean() > 0.8  # 7/8 of them differ
