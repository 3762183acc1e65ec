"""What mpirun starts in tests/train/test_parallel_mpi.py: ``python mpi_program.py NAME FOLDER``."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

import gpurnn
from gpurnn.train import parallel

TEXT = (np.arange(600) * 7 + (np.arange(600) // 13) ** 2) % 11


def train(group=None, **options):
    """(losses, weights) of a short training with carried state and dropout."""
    shared = {"dtype": "float64", "backend": "cpu"}
    model = gpurnn.Sequential(
        gpurnn.Embedding(11, 6, seed=1, **shared),
        gpurnn.GRU(6, 8, 2, dropout=0.3, seed=2, **shared),
        gpurnn.Linear(8, 11, seed=3, **shared),
    )
    text = gpurnn.TextBatches(TEXT, 7, 10)
    usual = {"optimizer": "adam", "lr": 0.01, "epochs": 2, "progress": False, "clip_norm": 0.5, "validation": text}
    history = gpurnn.fit(model, gpurnn.cross_entropy, text, group=group, **usual | options)
    return [[one["train_loss"], one["validation_loss"]] for one in history.epochs], model.flat_params


def everything(group, folder):
    """Sums and exchanges of a group, and trainings whose results the test compares with one process."""
    rank, size = group.rank, group.size
    for count in (0, 1, size, 1000):
        array = np.arange(count, dtype="float32") / 3 + rank
        expected = np.arange(count, dtype="float32") / 3
        for other in range(1, size):
            expected = expected + (np.arange(count, dtype="float32") / 3 + np.float32(other))
        assert group.add(array).tobytes() == expected.tobytes()
    several = [group.start_sum(np.full(5, float(rank + k))) for k in range(3)]
    for one in several[::-1]:
        one.finish()
    assert several[2].array.tolist() == [sum(range(2, size + 2))] * 5
    assert group.gather(b"x" * rank) == [b"x" * k for k in range(size)]
    assert group.send({"a": 1} if rank == 0 else None) == {"a": 1}
    assert group.gather_numbers(rank, 0.5).tolist() == [[k, 0.5] for k in range(size)]
    sent = {"a": np.arange(3), "b": np.zeros((0, 2), "float16")}
    received = group.send_arrays(sent if rank == 0 else None)
    assert [received[k].tolist() for k in sent] == [sent[k].tolist() for k in sent]
    try:
        group.first(lambda: gpurnn.GRU(0, 3))
        raise AssertionError("no error came")
    except ValueError as error:
        assert "input_size" in str(error)
    losses, params = train(group, out=folder / "run")
    again = train(group)[1]
    assert again.tobytes() == params.tobytes(), "two trainings have the same bits"
    if rank == 0:
        (folder / "result.json").write_text(json.dumps([losses, params.tolist()]))


def fault(group, folder, kind):
    """Train until the last process dies, raises or hangs in its fourth update."""

    class Source(gpurnn.TextBatches):
        def batch(self, epoch, index):
            if group.rank == group.size - 1 and (epoch, index) == (1, 3):
                if kind == "raise":
                    raise RuntimeError("a bad disk, say")
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return super().batch(epoch, index)

    shared = {"dtype": "float64", "backend": "cpu"}
    model = gpurnn.Sequential(gpurnn.Embedding(11, 6, seed=1, **shared), gpurnn.RNN(6, 11, seed=2, **shared))
    gpurnn.fit(model, gpurnn.cross_entropy, Source(TEXT, 7, 10), optimizer="adam", epochs=3, progress=False,
               out=folder, group=group)  # fmt: skip


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    with parallel.init("mpi") as group:
        if name == "everything":
            everything(group, folder)
        else:
            fault(group, folder, name)
