"""Whole models learn: loss curves beside torch's, the adding problem, copy memory, vanishing gradients made visible."""

import numpy as np
import pytest
from helpers import DATA
from optional import optional

import gpurnn
from gpurnn.data import TextBatches, adding_problem, copy_memory

torch = optional("torch")

SHAKESPEARE = DATA / "tiny_shakespeare" / "input.txt"


def character_model(V, dtype, hidden=128):
    return gpurnn.Sequential(
        {
            "embedding": gpurnn.Embedding(V, hidden, backend="cpu", dtype=dtype, seed=0),
            "rnn": gpurnn.LSTM(hidden, hidden, num_layers=2, backend="cpu", dtype=dtype, seed=1),
            "output": gpurnn.Linear(hidden, V, backend="cpu", dtype=dtype, seed=2),
        }
    )


def torch_character_model(V, hidden=128):
    class TorchCharacterModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(V, hidden)
            self.rnn = torch.nn.LSTM(hidden, hidden, num_layers=2)
            self.output = torch.nn.Linear(hidden, V)

        def forward(self, ids, state):
            x, state = self.rnn(self.embedding(ids), state)
            return self.output(x), state

    return TorchCharacterModel()


def loss_curves(ids, V, dtype, steps):
    """Loss of every training step here and in torch: same weights, data, Adam, clipping and carried state."""
    ours = character_model(V, dtype)
    theirs = torch_character_model(V).to(getattr(torch, dtype))
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    adam = gpurnn.Adam(ours, lr=2e-3)
    torch_adam = torch.optim.Adam(theirs.parameters(), lr=2e-3)
    batches = TextBatches(ids, batch_size=50, steps=50)
    state = torch_state = None
    curves = []
    for i in range(steps):
        batch = batches.batch(0, i)
        ours.zero_grad()
        logits, state, backward = ours.forward(batch.inputs, state)
        loss, dloss = gpurnn.cross_entropy(logits, batch.targets)
        backward(dloss())
        gpurnn.clip_grad_norm(ours, 1.0)
        adam.step()

        torch_adam.zero_grad()
        logits, torch_state = theirs(torch.from_numpy(np.asarray(batch.inputs, np.int64)), torch_state)
        torch_state = tuple(part.detach() for part in torch_state)
        targets = torch.from_numpy(np.asarray(batch.targets, np.int64))
        torch_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))
        torch_loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch_adam.step()
        curves.append((float(loss), float(torch_loss.detach())))
    return np.array(curves).T


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tiny_shakespeare is not beside this checkout (set GPURNN_DATA)")
def test_loss_curve_equals_torchs_on_tiny_shakespeare(record_property):
    text = SHAKESPEARE.read_text()
    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text[:400_000]], np.uint8)
    ours, theirs = loss_curves(ids, len(characters), "float64", 100)
    assert np.abs(ours - theirs).max() < 1e-6
    assert ours[-1] < 2.8 < ours[0]
    ours, theirs = loss_curves(ids, len(characters), "float32", 100)
    drift = float(np.abs(ours - theirs).max())
    record_property("float32_drift", drift)
    print(f"largest drift between the float32 loss curves over 100 steps: {drift:.2e} nats")
    assert drift < 1e-2  # two float32 trainings diverge by chaos, not by a wrong derivative


@pytest.mark.slow
def test_loss_curve_equals_torchs_on_synthetic_text():
    """The same comparison small, on data that every machine has."""
    rng = np.random.default_rng(0)
    ids = (np.cumsum(rng.integers(0, 3, 60_000)) % 17).astype(np.uint8)
    ours, theirs = loss_curves(ids, 17, "float64", 10)
    assert np.abs(ours - theirs).max() < 1e-9


def train_steps(model, loss, draw, steps, lr):
    """Adam over freshly drawn batches, its rate falling late; the mean loss of the last tenth."""
    adam = gpurnn.Adam(model, lr=lr)
    schedule = gpurnn.StepSchedule(adam, 3 * steps // 4, gamma=0.2)
    losses = []
    for step in range(steps):
        x, y, pick = draw(step)
        model.zero_grad()
        output, _, backward = model.forward(x)
        value, dloss = loss(output[pick], y)
        doutput = np.zeros_like(output)
        doutput[pick] = dloss()
        backward(doutput)
        gpurnn.clip_grad_norm(model, 1.0)
        adam.step()
        schedule.step()
        losses.append(float(value))
    last = float(np.mean(losses[-max(1, steps // 10) :]))
    print(f"loss over the last tenth of {steps} steps: {last:.4f}")
    return last


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["GRU"])
def test_adding_problem_is_learned(cell):
    """T = 100 (Hochreiter & Schmidhuber 1997): always predicting 1 gives a mean squared error of 0.1767."""
    options = {"forget_bias": 1.0} if cell == "LSTM" else {}
    model = gpurnn.Sequential(
        getattr(gpurnn, cell)(2, 48, backend="cpu", seed=1, init="orthogonal", **options),
        gpurnn.Linear(48, 1, backend="cpu", seed=2),
    )

    def draw(step):
        x, y = adding_problem(50, 100, seed=step)
        return x, y, slice(-1, None)

    def loss(output, y):
        return gpurnn.mse(output, y[None])

    error = train_steps(model, loss, draw, steps=1200, lr=4e-3)
    assert error < 0.02, error


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["LSTM"])
def test_copy_memory_is_learned(cell):
    """T = 50 (Arjovsky 2016): guessing among 8 symbols where they are asked for gives 10 ln 8 / 70 = 0.297 nats a
    step."""
    options = {"forget_bias": 4.0} if cell == "LSTM" else {}  # remember for T steps (Tallec & Ollivier 2018)
    model = gpurnn.Sequential(
        gpurnn.Embedding(10, 16, backend="cpu", seed=0),
        getattr(gpurnn, cell)(16, 128, backend="cpu", seed=1, **options),
        gpurnn.Linear(128, 10, backend="cpu", seed=2),
    )

    def draw(step):
        ids, targets = copy_memory(20, 50, seed=step)
        return ids, targets, slice(None)

    error = train_steps(model, gpurnn.cross_entropy, draw, steps=1800, lr=1e-2)
    assert error < 0.6 * 10 * np.log(8) / 70, error


def test_vanishing_gradient_is_visible():
    """At T = 100 the tanh RNN's dL/dh vanishes on its way to t = 0, the gated cells' does not."""
    share = {}
    for cell in ("RNN", "GRU", "LSTM"):
        options = {"forget_bias": 5.0} if cell == "LSTM" else {}
        layer = getattr(gpurnn, cell)(2, 64, backend="cpu", dtype="float64", seed=3, **options)
        if cell == "GRU":
            layer.params["bias_ih_l0"][64:128] = 5.0  # the update gate holds on, as the forget gate does
        x, _ = adding_problem(16, 100, seed=0)
        output, _, backward = layer.forward(x.astype("float64"))
        doutput = np.zeros_like(output)
        doutput[-1] = 1.0
        with gpurnn.record_gradient_flow() as flow:
            backward(doutput)
        norms = flow["l0"].dc if cell == "LSTM" else flow["l0"].dh
        share[cell] = norms[0].mean() / norms[-1].mean()
    assert share["RNN"] < 1e-12
    assert share["GRU"] > 1e-2 and share["LSTM"] > 1e-2
