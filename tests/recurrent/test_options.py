"""The options of RNN, LSTM and GRU: against torch operations written from the papers, and finite differences."""

import copy
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, assert_close
from optional import optional

import gpurnn
from gpurnn.backends.cuda.schedules.cost import refusal
from gpurnn.cells.options import ACTIVATIONS
from gpurnn.recurrent.cell_options import OPTIONS
from gpurnn.recurrent.dropout import cell_masks, weight_masks
from gpurnn.testing import check_gradients, check_parity, check_ragged, check_repeat, count_terms, draw_like

torch = optional("torch")
H = 5

BOTH = {  # of all three kinds
    "layer norm": {"layer_norm": True},
    "batch norm": {"batch_norm": True},
    "batch norm of 3 timesteps": {"batch_norm": 3},
    "zoneout": {"zoneout": 0.3},
    "clipped gradient": {"gradient_clip": 0.05},
}
GATED = {
    "update dropout": {"recurrent_dropout": 0.3},
    "sequence dropout": {"recurrent_dropout": 0.3, "recurrent_dropout_each": "sequence"},
    **{f"activation {name}": {"activation": name} for name in ACTIVATIONS if name != "tanh"},
    **{f"gates {name}": {"recurrent_activation": name} for name in ("hard_sigmoid", "hard_sigmoid_2", "softsign")},
}
CASES = {
    "rnn": BOTH | {"sequence dropout": {"recurrent_dropout": 0.3}}
    | {f"activation {name}": {"nonlinearity": name} for name in ACTIVATIONS},
    "lstm": BOTH | GATED | {
        "peephole": {"peephole": True}, "coupled": {"coupled": True}, "cell clip": {"cell_clip": 0.3},
        "two rates": {"zoneout": (0.1, 0.4)}, "coupled peephole": {"coupled": True, "peephole": True},
        "many": {"layer_norm": True, "zoneout": (0.1, 0.05), "recurrent_dropout": 0.2, "peephole": True,
                 "activation": "hard_sigmoid", "cell_clip": 2.0, "gradient_clip": 0.5},
        "many of a batch": {"batch_norm": 4, "coupled": True, "zoneout": 0.2, "recurrent_dropout": 0.2,
                            "recurrent_dropout_each": "sequence"},
    },
    "gru": BOTH | GATED | {
        "original": {"reset_after": False, "activation": "softsign", "zoneout": 0.2, "recurrent_dropout": 0.1},
        "many": {"layer_norm": True, "zoneout": 0.1, "recurrent_dropout": 0.2, "gradient_clip": 0.5},
    },
}  # fmt: skip
ALL = [(kind, name) for kind, cases in CASES.items() for name in cases]
LAYERS = {"rnn": gpurnn.RNN, "lstm": gpurnn.LSTM, "gru": gpurnn.GRU}


def build(kind, name, backend="numpy", dtype="float64", **more):
    layer = LAYERS[kind](3, more.pop("hidden", H), backend=backend, dtype=dtype, seed=1, **CASES[kind][name] | more)
    noise = np.random.default_rng(5).standard_normal(layer.flat_params.shape)
    layer.flat_params += (0.2 * noise).astype(layer.flat_params.dtype)
    for array in layer.buffers.values():  # running statistics of no training would hide an error
        array += np.abs(np.random.default_rng(6).standard_normal(array.shape)).astype(array.dtype)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind, name", ALL)
def test_equations(kind, name, training):
    """Outputs, states and every gradient are those of the reference's autograd."""
    from option_references import run

    layer, options, rng = build(kind, name), CASES[kind][name], np.random.default_rng(0)
    layer.train(training)
    T, B, lengths = 6, 7, np.array([6, 2, 0, 6, 6, 6, 3])
    x = rng.standard_normal((T, B, 3))
    x[np.arange(T)[:, None] >= lengths] = 0
    state = draw_like(layer(x)[1], rng)
    layer.calls = 0
    masks = cell_masks(layer, T, B)[0]
    running = [torch.tensor(layer.buffers[f"running_{what}_l0"].copy()) for what in ("mean", "var") if layer.buffers]
    parameters = {n[:-3]: torch.tensor(a.copy(), requires_grad=True) for n, a in layer.params.items()}
    given = [torch.tensor(x, requires_grad=True)]
    parts = state if isinstance(state, tuple) else (state,)
    given += [torch.tensor(part[0], requires_grad=True) for part in parts]
    drawn = None if masks is None else torch.tensor(masks[0])
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            output, final = run(
                kind, parameters, given[0], given[1:], torch.tensor(lengths), options, drawn, running, training
            )
        finally:
            torch.set_default_dtype(torch.float32)
    ours, ours_final, backward = layer.forward(x, state, lengths)
    terms = count_terms(layer, T)
    assert_close(ours, output.detach(), terms)
    ours_final = ours_final if isinstance(ours_final, tuple) else (ours_final,)
    used = lengths > 0
    for one, other in zip(ours_final, final, strict=True):
        assert_close(one[0], other.detach(), terms)
    doutput, dstate = rng.standard_normal(ours.shape), draw_like(state, rng)
    dparts = dstate if isinstance(dstate, tuple) else (dstate,)
    loss = (output * torch.tensor(doutput)).sum()
    for one, other in zip(final, dparts, strict=True):
        loss = loss + (one * torch.tensor(other[0])).sum()
    loss.backward()
    dx, dinitial = backward(doutput, dstate)
    dinitial = dinitial if isinstance(dinitial, tuple) else (dinitial,)
    assert_close(dx[:, used], given[0].grad[:, used], terms)
    for one, other in zip(dinitial, given[1:], strict=True):
        assert_close(one[0], other.grad, terms)
    assert set(parameters) == {n[:-3] for n in layer.grads}
    for n, parameter in parameters.items():
        assert_close(layer.grads[f"{n}_l0"], parameter.grad, terms, n)


@pytest.mark.parametrize(
    "more",
    [
        {"num_layers": 2, "bidirectional": True, "learn_state": True},
        {"bias": False},
        {"num_layers": 3, "residual": True, "dropout": 0.2},
        {"weight_dropout": 0.4},
    ],
)
@pytest.mark.parametrize("kind, name", [case for case in ALL if not CASES[case[0]][case[1]].get("gradient_clip")])
def test_finite_differences(kind, name, more):
    layer, rng = build(kind, name, **more), np.random.default_rng(1)
    check_gradients(layer, rng.standard_normal((5, 4, 3)), lengths=[5, 0, 3, 5])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind, name", ALL)
def test_dtypes(kind, name, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(2).standard_normal((5, 6, 3))

    def make(backend, dtype):
        return build(kind, name, backend, dtype, num_layers=2, bidirectional=True)

    check_parity(make, x, backend="numpy", dtype=dtype, lengths=[5, 5, 5, 5, 4, 5])


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, name in ALL if "batch" not in name])
def test_ragged(kind, name):
    layer = build(kind, name, bidirectional=True)
    check_ragged(layer, np.random.default_rng(2).standard_normal((6, 4, 3)), [4, 0, 6, 1])


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, name in ALL if "batch" not in name])
def test_streaming(kind, name):
    """Steps one by one are the whole call, in evaluation."""
    layer = build(kind, name, num_layers=2).eval()
    x, state, outputs = np.random.default_rng(2).standard_normal((4, 3, 3)), None, []
    whole, final = layer(x)
    for step in x:
        output, state = layer.step(step, state)
        outputs.append(output)
    assert_close(np.stack(outputs), whole, count_terms(layer, 4))
    assert_close(np.stack(state), np.stack(final), count_terms(layer, 4))


@pytest.mark.parametrize("kind, name", ALL)
def test_copies_and_repeats(kind, name):
    layer = build(kind, name, num_layers=2)
    x = np.random.default_rng(2).standard_normal((4, 3, 3))
    check_repeat(layer, x)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert repr(other) == repr(layer) and other.cell == layer.cell
        np.testing.assert_array_equal(other.eval()(x)[0], copy.deepcopy(layer).eval()(x)[0])
    other = build(kind, name, num_layers=2, hidden=H)
    other.flat_params[...] = 0
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(other.eval()(x)[0], layer.eval()(x)[0])


# ---- what is random


def test_masks_of_timesteps_and_sequences():
    """At T >= 3: other masks at each timestep, or the same; other ones in each call, layer and direction."""
    layer = gpurnn.LSTM(3, 200, 2, bidirectional=True, zoneout=(0.2, 0.6), backend="numpy", seed=1)
    masks = cell_masks(layer, 4, 8)
    assert len(masks) == 2 and len(masks[0]) == 2 and masks[0][0].shape == (4, 8, 400)
    flat = [mask[t] for directions in masks for mask in directions for t in range(4)]
    assert all((one != other).any() for k, one in enumerate(flat) for other in flat[:k])
    count = 16 * 8 * 200
    for part, rate in ((slice(0, 200), 0.2), (slice(200, 400), 0.6)):
        kept = sum(int(mask[:, part].sum()) for mask in flat)
        assert abs(kept - (1 - rate) * count) < 5 * (count * rate * (1 - rate)) ** 0.5
    layer.calls = 1
    assert (cell_masks(layer, 4, 8)[0][0] != masks[0][0]).any()
    once = gpurnn.LSTM(3, 8, recurrent_dropout=0.5, recurrent_dropout_each="sequence", backend="numpy", seed=1)
    assert cell_masks(once, 4, 8)[0][0].shape == (1, 8, 8)
    assert cell_masks(layer.eval(), 4, 8) == [None, None]


@pytest.mark.parametrize("layer", [gpurnn.RNN, gpurnn.GRU])
def test_a_pair_of_zoneout_rates_needs_two_states(layer):
    with pytest.raises(ValueError, match=r"zoneout: expected one rate, as \w+ has one state, h, got \(0.1, 0.9\)"):
        layer(2, 4, zoneout=(0.1, 0.9), backend="numpy")


def test_zoneout_keeps_the_old_state():
    layer = gpurnn.GRU(3, 50, zoneout=0.5, backend="numpy", dtype="float64", seed=1)
    x, h = np.random.default_rng(0).standard_normal((1, 2, 3)), np.random.default_rng(1).standard_normal((1, 2, 50))
    output, _ = layer(x, h)
    same = output[0] == h[0]
    layer.calls = 0
    np.testing.assert_array_equal(~same, cell_masks(layer, 1, 2)[0][0][0])
    assert 20 < same.sum() < 80
    free = gpurnn.GRU(3, 50, backend="numpy", dtype="float64", seed=1)
    free.load_state_dict(layer.state_dict())
    assert_close(layer.eval()(x, h)[0], 0.5 * h + 0.5 * free(x, h)[0], count_terms(layer, 1))


def test_weight_dropout():
    """In training W_hh times a mask of the call; gradients of dropped weights are zero; in evaluation all of it."""
    layer = gpurnn.LSTM(3, 6, 2, bidirectional=True, weight_dropout=0.4, backend="numpy", dtype="float64", seed=1)
    plain = gpurnn.LSTM(3, 6, 2, bidirectional=True, backend="numpy", dtype="float64", seed=1)
    x = np.random.default_rng(0).standard_normal((4, 3, 3))
    np.testing.assert_array_equal(layer.eval()(x)[0], plain(x)[0])
    layer.train()
    masks = weight_masks(layer)
    for _, k, _, suffix in layer._passes():
        plain.params[f"weight_hh{suffix}"] *= masks[k]["_reverse" in suffix] / 0.6
    y, _, backward = layer.forward(x)
    expected, _, other = plain.forward(x)
    assert_close(y, expected, count_terms(plain, 4))
    dx, _ = backward(np.ones_like(y))
    assert_close(dx, other(np.ones_like(y))[0], count_terms(plain, 4))
    for _, k, _, suffix in layer._passes():
        name, mask = f"weight_hh{suffix}", masks[k]["_reverse" in suffix]
        assert_close(layer.grads[name], plain.grads[name] * mask / 0.6, count_terms(plain, 4), name)
    assert (weight_masks(layer)[0][0] != masks[0][0]).any()  # another call, another mask


def test_running_statistics():
    """Training moves them by a tenth towards those of the batch, at each timestep; calling the layer does not."""
    layer = gpurnn.RNN(2, 3, batch_norm=3, backend="numpy", dtype="float64", seed=1)
    x = np.random.default_rng(0).standard_normal((1, 7, 2))
    layer(x)
    assert not layer.buffers["running_mean_l0"].any()
    layer.forward(x)
    sums = x[0] @ layer.params["weight_ih_l0"].T
    assert_close(layer.buffers["running_mean_l0"][0, 0], 0.1 * sums.mean(0), count_terms(layer, 1))
    assert_close(layer.buffers["running_var_l0"][0, 0], 0.9 + 0.1 * sums.var(0, ddof=1), count_terms(layer, 1))
    assert not layer.buffers["running_mean_l0"][0, 1:].any()
    assert set(layer.state_dict()) >= {"running_mean_l0", "running_var_l0"}
    for name in ("layer_norm", "zoneout"):
        assert not gpurnn.RNN(2, 3, **{name: 0.5 if name == "zoneout" else True}, backend="numpy").buffers


def test_population_statistics():
    """Those of one batch, as a model of several layers meets them; an error leaves them as they were."""
    model = gpurnn.Sequential(
        gpurnn.GRU(2, 3, 2, batch_norm=4, backend="numpy", dtype="float64", seed=1),
        gpurnn.RNN(3, 2, batch_norm=4, backend="numpy", dtype="float64", seed=2),
    )
    x = np.random.default_rng(0).standard_normal((4, 200, 2))
    model.forward(x)
    layer = next(module for _, module in model.modules() if isinstance(module, gpurnn.GRU))
    gpurnn.recurrent.set_population_statistics(model.eval(), x)
    assert not model.training and not layer.training
    sums = x[0] @ layer.params["weight_ih_l0"][:3].T
    assert_close(layer.buffers["running_mean_l0"][0, 0], sums.mean(0), count_terms(layer, 200))
    assert_close(layer.buffers["running_var_l0"][0, 0], sums.var(0, ddof=1), count_terms(layer, 200))
    before = {name: array.copy() for name, array in layer.buffers.items()}
    with pytest.raises(gpurnn.ShapeError):
        gpurnn.recurrent.set_population_statistics(model, x[..., :1])
    for name, array in layer.buffers.items():
        np.testing.assert_array_equal(array, before[name])


def test_what_batch_norm_refuses():
    layer = gpurnn.RNN(2, 3, batch_norm=True, backend="numpy")
    with pytest.raises(ValueError, match="batch_norm: one sequence has no statistics to train with"):
        layer.forward(np.zeros((4, 1, 2), "float32"))
    with pytest.raises(ValueError, match="step: batch_norm has statistics of each timestep"):
        layer.eval().step(np.zeros((2, 2), "float32"))
    assert layer(np.zeros((4, 1, 2), "float32"))[0].shape == (4, 1, 3)


def test_residual():
    stack = gpurnn.GRU(4, 4, 3, residual=True, backend="numpy", dtype="float64", seed=1)
    layers = [gpurnn.GRU(4, 4, backend="numpy", dtype="float64") for _ in range(3)]
    for k, layer in enumerate(layers):
        for name in layer.params:
            layer.params[name] = stack.params[name.replace("l0", f"l{k}")]
    x, lengths = np.random.default_rng(0).standard_normal((5, 2, 4)), [5, 2]
    expected = x
    for k, layer in enumerate(layers):
        below, (expected, _) = expected, layer(expected, lengths=lengths)
        expected = expected + below if k else expected
    assert_close(stack(x, lengths=lengths)[0], expected, count_terms(stack, 5))


# ---- attributes and errors


def test_attributes_and_repr():
    layer = gpurnn.LSTM(3, 4, layer_norm=True, zoneout=(0.1, 0.2), backend="numpy")
    assert layer.layer_norm is True and layer.zoneout == (0.1, 0.2) and layer.peephole is False
    assert "layer_norm=True, zoneout=(0.1, 0.2)" in repr(layer) and "peephole" not in repr(layer)
    with pytest.raises(AttributeError, match="zoneout is part of the cell, .*: make another layer"):
        layer.zoneout = 0.3
    assert not hasattr(gpurnn.GRU(3, 4, backend="numpy"), "peephole")
    own = gpurnn.LSTM(3, 4, activation=lambda x: x, recurrent_activation=gpurnn.cells.softsign, backend="numpy")
    assert "activation=<lambda>, recurrent_activation=softsign;" in repr(own)
    with pytest.raises(ValueError, match=r"one size for each of 1 layers, got \[4, 3\]: num_layers=2 goes with them$"):
        gpurnn.LSTM(2, [4, 3])
    assert gpurnn.LSTM(3, 4, backend="numpy").cell is not layer.cell
    assert layer.cell is gpurnn.LSTM(7, 9, layer_norm=True, zoneout=(0.1, 0.2), backend="numpy").cell


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("lstm", {"zoneout": 1.5}, "zoneout"),
        ("lstm", {"zoneout": (0.1, 0.1, 0.1)}, "zoneout: expected a rate, or a pair of rates of h and c, got 3"),
        ("gru", {"zoneout": (0.1, 0.9)}, r"^zoneout: expected one rate, as GRU has one state, h, got \(0.1, 0.9\)$"),
        ("rnn", {"zoneout": [0.1, 0.1]}, r"^zoneout: expected one rate, as RNN has one state, h, got \[0.1, 0.1\]$"),
        ("lstm", {"layer_norm": True, "batch_norm": True}, "layer_norm and batch_norm normalize the same"),
        ("lstm", {"activation": "tahn"}, "activation.*tanh"),
        ("gru", {"activation": "gelu"}, "activation should be one of .*, got 'gelu'; a function of symbols, such as"),
        ("lstm", {"residual": True}, r"^residual adds the input of .* needs num_layers > 1$"),
        ("rnn", {"residual": "yes", "num_layers": 2}, "residual should be True or False, got 'yes'"),
        ("lstm", {"recurrent_dropout_each": "step"}, "recurrent_dropout_each"),
        ("lstm", {"peephole": True, "proj_size": 2}, "proj_size: options of the cell do not go together"),
        ("lstm", {"cell_clip": -1}, "cell_clip"),
        ("gru", {"layer_norm": True, "reset_after": False}, "normalization needs reset_after=True"),
        ("gru", {"recurrent_dropout": 0.1, "recurrent_dropout_each": "sequence", "reset_after": False}, "reset_after"),
        ("gru", {"peephole": True}, "peephole"),
        ("rnn", {"nonlinearity": "relus"}, "nonlinearity.*relu"),
        ("rnn", {"batch_norm": True, "num_layers": 2, "wavefront": 2}, "wavefront: batch_norm counts timesteps"),
    ],
)
def test_errors(kind, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LAYERS[kind](3, 4, backend="numpy", **options)


# ---- what they cost

ROW = re.compile(r"^\| (none|`(\w+=[^`]*)`) \| (.*) \| (.*) \| (.*) \| (.*) \|$", re.M)
PAGE = (ROOT / "gpurnn" / "docs" / "options.md").read_text(encoding="utf-8")
COSTS = ROW.findall(PAGE[PAGE.index("## What they cost") : PAGE.index("## Together")])


@pytest.mark.parametrize("row", COSTS, ids=lambda row: row[0])
def test_the_table_of_costs(row):
    """Bytes as ``plan`` counts them, blocks as the cell saves them, schedules as they refuse a cell themselves."""
    _, text, *costs, schedules = row
    given, T, B, tested = eval(f"dict({text})"), 7, 3, 0
    for kind, cost in zip(("lstm", "gru", "rnn"), costs, strict=True):
        if cost == "-":
            continue
        options = dict(given)
        if kind == "rnn":
            options = {"nonlinearity" if name == "activation" else name: value for name, value in options.items()}
            options.pop("recurrent_dropout_each", None)
        layer = LAYERS[kind](2, H, backend="numpy", **options)
        cell, tested = layer.cell, tested + 1
        count = cell.saved_blocks + len(cell.states)
        assert cost == f"{4 * count} ({cell.saved_blocks})", kind
        drawn = T if any(draw.each == "timestep" for draw in cell.draws) else 1
        masks = drawn * B * H * len(cell.draws)
        assert layer.plan(T, B).cache_bytes == 4 * (T * B * H * count + B * H * len(cell.states)) + masks
        problem = SimpleNamespace(dtype="float32", projected=False, cell=cell, products=len(cell.hidden))
        fused = "step, block" if cell.means else "step, block, grid"
        several = "step" if refusal(problem) else fused
        assert schedules == ("array code" if cell.over_batch else several), kind
    assert tested


def test_the_table_of_costs_has_every_option_of_cells():
    names = {name for row in COSTS for name in eval(f"dict({row[1]})")}
    assert names == {*OPTIONS, "reset_after"}


# ---- Haste's weights


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_haste(kind, norm):
    """Its documented equations, over its layout: gates i g f o and z r n, kernels that multiply from the right."""
    rng, G, T, B, inputs = np.random.default_rng(0), 4 if kind == "lstm" else 3, 5, 3, 2
    given = {"kernel": rng.standard_normal((inputs, G * H)), "recurrent_kernel": rng.standard_normal((H, G * H))}
    given["bias"] = rng.standard_normal(G * H)
    if kind == "gru":
        given["recurrent_bias"] = rng.standard_normal(G * H)
    if norm:
        given["gamma"] = rng.standard_normal((2, G * H))
        if kind == "lstm":
            given |= {"gamma_h": rng.standard_normal(H), "beta_h": rng.standard_normal(H)}
    w = {name: torch.tensor(array) for name, array in given.items()}
    x = rng.standard_normal((T, B, inputs))

    def normed(v, k):
        return torch.nn.functional.layer_norm(v, v.shape[1:], w["gamma"][k]) if norm else v

    h, c, outputs = torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64), []
    for t in range(T):
        v, u = normed(torch.tensor(x[t]) @ w["kernel"], 0) + w["bias"], normed(h @ w["recurrent_kernel"], 1)
        if kind == "lstm":
            i, g, f, o = (v + u).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            shown = torch.nn.functional.layer_norm(c, (H,), w["gamma_h"], w["beta_h"]) if norm else c
            h = torch.sigmoid(o) * torch.tanh(shown)
        else:
            u = u + w["recurrent_bias"]
            (vz, vr, vn), (uz, ur, un) = v.chunk(3, 1), u.chunk(3, 1)
            z, r = torch.sigmoid(vz + uz), torch.sigmoid(vr + ur)
            h = z * h + (1 - z) * torch.tanh(vn + r * un)
        outputs.append(h)
    layer = LAYERS[kind](inputs, H, layer_norm=norm, backend="numpy", dtype="float64")
    layer.load_state_dict(gpurnn.cells.weights_from_haste(given))
    assert_close(layer(x)[0], torch.stack(outputs), count_terms(layer, T))


def test_haste_errors():
    with pytest.raises(ValueError, match="does not have 'weight'"):
        gpurnn.cells.weights_from_haste({"weight": np.ones(3)})
    with pytest.raises(ValueError, match="which are missing"):
        gpurnn.cells.weights_from_haste({})
    with pytest.raises(gpurnn.ShapeError, match=r"expected \(H, 3H\) or \(H, 4H\), got \(2, 5\)"):
        gpurnn.cells.weights_from_haste({"kernel": np.ones((2, 5)), "recurrent_kernel": np.ones((2, 5))})
    right = {"kernel": (2, 12), "recurrent_kernel": (3, 12), "bias": (12,), "gamma": (2, 12), "gamma_h": (3,)}
    right = {name: np.ones(shape) for name, shape in (right | {"beta_h": (3,)}).items()}
    assert gpurnn.cells.weights_from_haste(right)
    for name, shape in (
        ("kernel", (2, 10)), ("bias", (9,)), ("gamma", (12,)), ("gamma_h", (4,)), ("beta_h", ()),
        ("recurrent_kernel", (3,)), ("recurrent_kernel", (0, 0)), ("recurrent_bias", (3,)),
    ):  # fmt: skip
        with pytest.raises(gpurnn.ShapeError, match=rf"^{name}: expected .*, got "):
            gpurnn.cells.weights_from_haste(right | {name: np.ones(shape)})
    with pytest.raises(ValueError, match="gamma_h and beta_h besides gamma, which are missing"):
        gpurnn.cells.weights_from_haste({name: right[name] for name in right if name != "beta_h"})


def test_haste_from_tensors():
    """Parameters that require a gradient, and bfloat16, which NumPy does not have."""
    rng = np.random.default_rng(0)
    arrays = {"kernel": rng.standard_normal((2, 12)), "recurrent_kernel": rng.standard_normal((3, 12))}
    expected = gpurnn.cells.weights_from_haste(arrays)
    for name, array in gpurnn.cells.weights_from_haste(
        {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    ).items():
        np.testing.assert_array_equal(array, expected[name])
    halved = {name: torch.nn.Parameter(torch.tensor(array).bfloat16()) for name, array in arrays.items()}
    got = gpurnn.cells.weights_from_haste(halved)
    np.testing.assert_array_equal(got["weight_ih_l0"][:3], halved["kernel"].detach().double().numpy()[:, :3].T)
