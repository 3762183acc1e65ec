"""history.png: its title, its axis of epochs, and the epoch whose model was kept."""

from pathlib import Path

import numpy as np
import pytest
from optional import needs

import gpurnn
from gpurnn import plots
from gpurnn.tasks.run import prepare

pytestmark = needs("matplotlib")
EPOCH = {"kind": "epoch", "train_loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "seconds": 1.0}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def records(losses, accuracies=None):
    found = []
    for n, loss in enumerate(losses, 1):
        more = {} if accuracies is None else {"validation_accuracy": accuracies[n - 1]}
        found.append(EPOCH | {"epoch": n, "step": 7 * n, "validation_loss": loss, **more})
    return found


def kept(axis):
    """Place and label of the line that marks the kept epoch."""
    return [(line.get_xdata()[0], line.get_label()) for line in axis.lines if line.get_label().startswith("kept")]


def epoch_ticks(axis):
    (above,) = axis.child_axes
    assert above.get_xlabel() == "epoch"
    return dict(zip(above.get_xticks().tolist(), [label.get_text() for label in above.get_xticklabels()], strict=True))


@pytest.mark.long
def test_the_kept_epoch_is_marked_and_not_the_smallest_loss(drawn, tmp_path):
    plots.plot_history(records([3.0, 1.0, 2.0], [0.1, 0.2, 0.3]), tmp_path / "a.png", title="mine", best_epoch=3)
    (figure,) = drawn
    loss, accuracy, below = figure.axes[:3]
    assert figure.get_suptitle() == "mine" and below.get_xlabel() == "update"
    assert kept(loss) == [(21, "kept: epoch 3, 2.0000")] and kept(accuracy) == [(21, "kept: epoch 3, accuracy 0.3")]
    assert epoch_ticks(loss) == {7: "1", 14: "2", 21: "3"}


@pytest.mark.long
def test_of_many_epochs_some_are_numbered_and_the_last_is(drawn, tmp_path):
    plots.plot_history(records(np.linspace(3, 1, 100)), tmp_path / "a.png")
    (figure,) = drawn
    ticks = epoch_ticks(figure.axes[0])
    assert len(ticks) <= 12 and ticks[700] == "100" and all(step == 7 * int(epoch) for step, epoch in ticks.items())
    assert all(int(epoch) % 10 == 0 for epoch in ticks.values())
    assert not kept(figure.axes[0]) and not figure.get_suptitle()


def test_a_run_says_what_it_is(drawn, tmp_path):
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 30)
    run = prepare("text", [tmp_path / "book.txt"], tmp_path / "my $run", cell="gru", hidden=4, layers=2, steps=8,
                  batch=4, epochs=2, seed=1)  # fmt: skip
    history = run.train(progress=False)
    best = min(history.epochs, key=lambda record: record["validation_loss"])
    (figure,) = drawn
    assert figure.get_suptitle() == r"my \$run: text, gru, 2 x 4 units"
    assert kept(figure.axes[0]) == [(best["step"], f"kept: epoch {best['epoch']}, {best['validation_loss']:.4f}")]


@pytest.mark.long
def test_a_run_of_fit_and_a_folder_without_checkpoints(drawn, tmp_path, monkeypatch):
    batch = np.zeros((3, 2, 2), "float32"), np.ones((3, 2, 1), "float32")
    model = gpurnn.Linear(2, 1, backend="cpu")
    gpurnn.fit(model, gpurnn.mse, [batch], optimizer="adam", epochs=2, progress=False, out=tmp_path / "run")
    assert drawn[0].get_suptitle() == "run" and kept(drawn[0].axes[0])[0][0] == 2
    for path in (tmp_path / "run").glob("best*"):
        path.unlink()
    monkeypatch.chdir(tmp_path / "run")
    plots.plot_run(".")
    assert drawn[1].get_suptitle() == "run" and not kept(drawn[1].axes[0])
    assert Path("history.png").stat().st_size > 3000
