"""Layers for torch against torch.nn: values, gradients, and everything that torch does with its modules."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, cuda_ops
from optional import needs, optional

import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.testing import count_terms, worst_error

torch = optional("torch")
gt = optional("gpurnn.interop.torch")
operators = optional("gpurnn.interop.torch.operators")
arrays_module = optional("gpurnn.interop.torch.arrays")
pytestmark = [
    needs("torch"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported", "ignore:`torch.jit:DeprecationWarning"),
]

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays are tiny here, and threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def arrays(named):
    return {name: tensor.detach().double().numpy() for name, tensor in named.items() if tensor is not None}


def data(packed_or_padded):
    return getattr(packed_or_padded, "data", packed_or_padded) if is_packed(packed_or_padded) else packed_or_padded


def is_packed(value):
    return isinstance(value, torch.nn.utils.rnn.PackedSequence)


def gradients(module, inputs, *given):
    """Everything that one call of a module and its backward pass return. inputs: the tensors that get gradients."""
    module.zero_grad()
    output, state = module(*given)
    generator = torch.Generator().manual_seed(5)
    outputs = {"output": data(output), **{f"state {k}": part for k, part in enumerate(as_tuple(state))}}
    along = [torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.dtype) for one in outputs.values()]
    torch.autograd.backward(list(outputs.values()), along)
    found = outputs | {f"d{k}": one.grad for k, one in enumerate(inputs)}
    return arrays(found | {name: one.grad for name, one in module.named_parameters()})


# ---- random configurations


def configuration(rng):
    """A random layer: its class's name, arguments that torch.nn takes, and how it is called."""
    kind = KINDS[rng.integers(3)]
    arguments = {
        "input_size": int(rng.integers(1, 6)), "hidden_size": int(rng.integers(1, 7)),
        "num_layers": int(rng.integers(1, 4)), "bias": bool(rng.random() < 0.7),
        "batch_first": bool(rng.random() < 0.5), "bidirectional": bool(rng.random() < 0.4),
    }  # fmt: skip
    if kind == "LSTM" and arguments["hidden_size"] > 1 and rng.random() < 0.4:
        arguments["proj_size"] = int(rng.integers(1, arguments["hidden_size"]))
    if kind == "RNN" and rng.random() < 0.5:
        arguments["nonlinearity"] = "relu"
    form = ("padded", "packed", "unsorted", "single")[rng.integers(4)]
    dtype = ("float32", "float64", "bfloat16")[rng.choice(3, p=[0.45, 0.45, 0.1])]
    return kind, arguments, form, dtype, bool(rng.random() < 0.6)


def call(rng, layer, form, with_state):
    """A function of a dtype, and of one to round to before: tensors that get gradients, and a call's arguments."""
    T, B, first = int(rng.integers(1, 6)), int(rng.integers(1, 5)), layer.batch_first
    shape = (T,) if form == "single" else (B, T) if first and form == "padded" else (T, B)
    x = rng.standard_normal((*shape, layer.input_size))
    rows = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + isinstance(layer, torch.nn.LSTM)]
    batch = () if form == "single" else (B,)
    state = [rng.standard_normal((rows, *batch, size)) for size in sizes] if with_state else []
    lengths = rng.integers(1, T + 1, B)
    lengths = np.sort(lengths)[::-1].copy() if form == "packed" else lengths

    def made(dtype, rounded):
        tensors = [torch.tensor(array, dtype=rounded).to(dtype).requires_grad_() for array in (x, *state)]
        given = tensors[0]
        if form in ("packed", "unsorted"):
            given = torch.nn.utils.rnn.pack_padded_sequence(given, lengths, enforce_sorted=form == "packed")
        hx = tuple(tensors[1:]) if len(state) > 1 else tensors[1] if state else None
        return tensors, given, hx

    return made, T


@pytest.mark.long
@pytest.mark.parametrize("part", range(6))
def test_random_configurations(part):
    """50 of 300: values and gradients. The reference is torch in float64 with the same rounded weights."""
    rng = np.random.default_rng([3, part])
    torch.manual_seed(part)
    for _ in range(50):
        kind, arguments, form, name, with_state = configuration(rng)
        dtype = getattr(torch, name)
        theirs = getattr(torch.nn, kind)(**arguments, dtype=dtype)
        ours = getattr(gt, kind)(**arguments, dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        exact = copy.deepcopy(theirs).double()
        made, T = call(rng, theirs, form, with_state)
        got, plain, expected = (
            gradients(module, *made(next(module.parameters()).dtype, dtype)) for module in (ours, theirs, exact)
        )
        terms = count_terms(SimpleNamespace(params=dict(theirs.named_parameters())), T)
        worst, detail = worst_error(got, plain, expected, name, terms)
        assert worst <= 1, f"{kind} {arguments} {form} {name}: {detail}"


# ---- torch's own inputs of its modules

MODULES = [pytest.param(name, marks=pytest.mark.slow) for name in (*KINDS, *(f"{kind}Cell" for kind in KINDS))]


def module_inputs(name, which, training=False):
    """The inputs with which torch tests a module. Only the import is slow."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # torch imports setuptools, maybe after distutils
        from torch.testing._internal.common_modules import module_db
    (info,) = (one for one in module_db if one.module_cls is getattr(torch.nn, name))
    return getattr(info, which)(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)


def constructed(library, name, given):
    return getattr(library, name)(*given.args, **{"dtype": torch.float64} | given.kwargs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_module_inputs(name, training):
    """Every constructor and every input, against torch's module and against torch's own expectation."""
    inputs = module_inputs(name, "module_inputs_func", training)
    assert inputs
    for one in inputs:
        theirs = constructed(torch.nn, name, one.constructor_input).train(training)
        ours = constructed(gt, name, one.constructor_input).train(training)
        ours.load_state_dict(theirs.state_dict())
        given = one.forward_input
        got = ours(*given.args, **given.kwargs)
        torch.testing.assert_close(got, theirs(*given.args, **given.kwargs))
        expected = one.reference_fn(ours, *given.args, **given.kwargs)
        leaves = (torch.utils._pytree.tree_leaves(results) for results in (got, expected))
        for mine, other in zip(*leaves, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("name", MODULES)
def test_torchs_own_wrong_inputs(name):
    for one in module_inputs(name, "module_error_inputs_func"):
        made, given = one.module_error_input.constructor_input, one.module_error_input.forward_input
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            constructed(gt, name, made)(*given.args, **given.kwargs)


# ---- derivatives


def checked_layers():
    marks = {"reset": torch.rand(3, 2) > 0.6, "mask": torch.rand(3, 2) > 0.3}
    return {
        "LSTM": (gt.LSTM(2, 2, proj_size=1), {}),
        "GRU with lengths": (gt.GRU(2, 2, bidirectional=True), {"lengths": [3, 0]}),
        "RNN with resets and masks": (gt.RNN(2, 2, 2, reverse=True), marks),
        "own cell": (gt.Recurrent(gpurnn.cells.slstm, 2, 2, learn_state=True, backend="numpy"), {}),
        "dropout": (gt.GRU(2, 2, 2, dropout=0.5, recurrent_dropout=0.3, backend="numpy"), {}),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["LSTM", "GRU with lengths", "RNN with resets and masks", "own cell", "dropout"])
def test_first_and_second_derivatives(name):
    layer, given = checked_layers()[name]
    layer.double()
    names = [one for one, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    parts = [part for parts in layer._state for part in parts]
    state = [torch.randn(part.rows, 2, part.size, dtype=torch.float64, requires_grad=True) for part in parts]
    state = [] if layer._arguments.get("learn_state") else state
    weights = [one.detach().requires_grad_() for one in layer.parameters()]

    def results(x, *rest):
        torch.manual_seed(2)  # the same masks each time
        hx = rest[len(weights) :]
        hx = (hx if len(hx) > 1 else hx[0]) if hx else None
        params = dict(zip(names, rest, strict=False))
        output, final = torch.func.functional_call(layer, params, (x, hx), given)
        return output, *as_tuple(final)

    assert torch.autograd.gradcheck(results, (x, *weights, *state), fast_mode=True)
    assert torch.autograd.gradgradcheck(results, (x, *weights, *state), fast_mode=True)


def test_third_derivatives_are_refused():
    layer = gt.RNN(2, 2)
    x = torch.randn(3, 1, 2, requires_grad=True)
    first = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"third.*gpurnn\.hvp"):
        second.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_are_refused(transform):
    layer, x = gt.GRU(2, 3), torch.randn(3, 4, 2)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: layer(x)[0].sum())(x),
        "vmap": lambda: torch.func.vmap(lambda x: layer(x)[0], 1, 1)(x),
        "jvp": lambda: torch.func.jvp(lambda x: layer(x)[0], (x,), (x,)),
    }
    with pytest.raises(RuntimeError, match=r"gpurnn\.per_sample_gradients"):
        calls[transform]()
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"gpurnn\.jvp"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, x))


def test_a_layer_of_gpurnn_points_here():
    with pytest.raises(TypeError, match=r"x: this tensor requires grad.*gpurnn\.interop\.torch"):
        gpurnn.LSTM(2, 3)(torch.zeros(4, 1, 2, requires_grad=True))


# ---- options, own cells, dtypes, backends: what layers of gpurnn compute

OPTIONS = {
    "layer norm": ("LSTM", {"layer_norm": True, "num_layers": 2}),
    "heads": ("GRU", {"heads": 2, "bidirectional": True}),
    "peephole": ("LSTM", {"peephole": True, "learn_state": True, "reset_to": "initial"}),
    "reset_before": ("GRU", {"reset_after": False, "masked_output": "repeat"}),
    "activation": ("RNN", {"nonlinearity": gpurnn.cells.softsign, "reverse": True}),
    "unequal layers": ("LSTM", {"hidden_size": [4, 6], "num_layers": 2, "proj_size": 3, "init": "orthogonal"}),
    "own cell": ("Recurrent", {"cell": gpurnn.cells.slstm, "residual": True, "num_layers": 2}),
    "chrono": ("LSTM", {"chrono": 10, "zoneout": (0.1, 0.2)}),
    "weight dropout": ("GRU", {"weight_dropout": 0.3, "heads": 2}),
}


def twins(kind, options, dtype="float32", **more):
    """A layer for torch and one of gpurnn with the same parameters, both on NumPy unless ``more`` says otherwise."""
    sizes = {"input_size": 5, "hidden_size": 4} | options
    options = {"backend": "numpy"} | more
    mine = getattr(gt, kind)(**sizes, **options, dtype=getattr(torch, dtype))
    other = getattr(gpurnn, kind)(**sizes, **options, dtype=dtype)
    other.load_state_dict(mine.state_dict())
    return mine, other


def compare_bits(mine, other, dtype="float32", marks=True):
    """Equal bits of results and gradients of a call with resets, masks and lengths."""
    rng = np.random.default_rng(1)
    reset, mask = (rng.random((6, 3)) < part for part in (0.2, 0.8))
    given = {"lengths": [6, 0, 4]} | ({"reset": reset, "mask": mask} if marks else {})
    tensors = {name: one if name == "lengths" else torch.from_numpy(one) for name, one in given.items()}
    x = torch.randn(6, 3, 5).to(getattr(torch, dtype)).requires_grad_()
    output, state = mine(x, **tensors)
    doutput = torch.randn(output.shape).to(output.dtype)
    output.backward(doutput)
    number = array_of(x), array_of(doutput)
    expected, final, backward = other.forward(number[0], **given)
    dx, _ = backward(number[1])
    leaves = torch.utils._pytree.tree_leaves
    pairs = [(output, expected), (x.grad, dx), *zip(leaves(state), leaves(final), strict=True)]
    pairs += [(one.grad, other.grads[name]) for name, one in mine.named_parameters()]
    for got, wanted in pairs:
        wanted = np.asarray(wanted.get() if hasattr(wanted, "get") else wanted)
        np.testing.assert_array_equal(array_of(got).astype(float), wanted.astype(array_of(got).dtype).astype(float))


def array_of(tensor):
    return operators.to_array(gpurnn.get_backend("numpy"), tensor)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    mine, other = twins(*OPTIONS[name])
    key = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(7)  # x is drawn after the masks' key would be, so draw the key from a state of its own
    for module in (mine.eval(), other.eval()):
        assert not module.training
    compare_bits(mine, other)
    if not mine._draws[True]:
        return
    mine.train(), other.train()
    x = torch.randn(4, 2, 5)
    torch.manual_seed(7)
    other.seed, other.calls = key, 0
    np.testing.assert_array_equal(mine(x)[0].detach().numpy(), other(x.numpy())[0])


def test_resets_and_masks_have_the_axes_of_the_input():
    layer, x = gt.GRU(3, 4), torch.randn(6, 2, 3)
    reset, mask = torch.rand(6, 2) > 0.6, torch.rand(6, 2) > 0.3
    expected = layer(x, reset=reset, mask=mask)[0]
    layer.batch_first = True
    output = layer(x.transpose(0, 1), reset=reset.T, mask=mask.T)[0]
    assert torch.equal(output.transpose(0, 1), expected)
    single = layer(x[:, 1], reset=reset[:, 1], mask=mask[:, 1], lengths=6)[0]
    torch.testing.assert_close(single, expected[:, 1])


@pytest.mark.parametrize("name", [f"{kind}Cell" for kind in KINDS])
def test_cells_equal_torchs(name):
    theirs, ours = getattr(torch.nn, name)(3, 4), getattr(gt, name)(3, 4)
    ours.load_state_dict(theirs.state_dict())
    state = [torch.randn(2, 4) for _ in range(1 + (name == "LSTMCell"))]
    x, hx = torch.randn(2, 3), tuple(state) if len(state) > 1 else state[0]
    torch.testing.assert_close(ours(x, hx), theirs(x, hx))
    reset = torch.tensor([True, False])
    assert torch.equal(as_tuple(ours(x, hx, reset=reset))[0][0], as_tuple(ours(x))[0][0])
    assert torch.equal(as_tuple(ours(x, hx, mask=reset))[0][1], state[0][1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(dtype):
    mine, other = twins("LSTM", {"num_layers": 2}, dtype)
    compare_bits(mine, other, dtype, marks=False)
    mixed = gt.LSTM(5, 4, 2, backend="numpy")  # parameters of float32
    mixed.load_state_dict(mine.state_dict())
    x = torch.randn(3, 2, 5).to(getattr(torch, dtype))
    assert torch.equal(mixed(x)[0], mine(x)[0]) and mixed(x)[0].dtype == x.dtype


@pytest.mark.emulated
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "Recurrent"])
def test_the_emulated_gpu(kind):
    """Tensors on the host, whose arrays go to the device and back."""
    cell = {"cell": gpurnn.cells.mgu} if kind == "Recurrent" else {}
    compare_bits(*twins(kind, cell | {"num_layers": 2, "bidirectional": True}, backend=cuda_ops()), marks=False)


def test_results_belong_to_nobody_else():
    """Memory that a backward pass or another result uses must not be the caller's."""
    for kind in KINDS:
        layer = getattr(gt, kind)(3, 4)
        x = torch.randn(5, 2, 3, requires_grad=True)
        layer(x)[0].sum().backward()
        expected = x.grad.clone()
        x.grad = None
        output, state = layer(x)
        total = output.sum()
        with torch.no_grad():
            before = [part.clone() for part in as_tuple(state)]
            output.data.zero_()
            assert all(torch.equal(a, b) for a, b in zip(as_tuple(state), before, strict=True))
            for part in as_tuple(state):
                part.data.zero_()
        total.backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "bool", "int64"])
def test_arrays_of_a_gpu_share_memory(dtype):
    """Both ways through DLPack, with NumPy in CuPy's place."""
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(getattr(torch, dtype))
    array = arrays_module._from_device(np, tensor)
    assert array.dtype.name == dtype and array.shape == (2, 3) and array.ctypes.data == tensor.data_ptr()
    np.testing.assert_array_equal(array.astype(float), tensor.double().numpy())
    if dtype in ("bool", "int64"):
        return
    back = arrays_module._to_device(array)
    assert back.dtype == tensor.dtype and back.data_ptr() == tensor.data_ptr() and torch.equal(back, tensor)


def test_a_gpu_runs_on_torchs_stream(monkeypatch):
    """The device and the stream that CuPy is given, with stand-ins for both libraries."""
    entered = []

    @contextlib.contextmanager
    def enter(*what):
        entered.append(what)
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=(77, device.index)))
    cuda = SimpleNamespace(Device=lambda n: enter("device", n), ExternalStream=lambda s: enter("stream", s))
    tensor = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=3))
    with arrays_module.as_torch_runs(SimpleNamespace(cuda=cuda), tensor):
        assert entered == [("device", 3), ("stream", (77, 3))]


@pytest.mark.parametrize("kind, options", [("LSTM", {"proj_size": 2}), ("GRU", {"bidirectional": True}), ("RNN", {})])
def test_initial_values_are_torchs(kind, options):
    found = []
    for library in (torch.nn, gt):
        torch.manual_seed(1)
        found.append(getattr(library, kind)(5, 4, 2, **options).state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


@pytest.mark.parametrize("name", ["layer norm", "heads", "peephole", "unequal layers", "chrono"])
def test_initial_values_are_those_of_gpurnn(name):
    kind, options = OPTIONS[name]
    options = {"input_size": 5, "hidden_size": 4} | options
    torch.manual_seed(1)
    layer = getattr(gt, kind)(**options)
    torch.manual_seed(1)
    expected = getattr(gpurnn, kind)(**options, seed=int(torch.randint(2**62, ()))).params
    for name, one in layer.named_parameters():
        np.testing.assert_array_equal(one.detach().numpy(), expected[name])


# ---- what torch does with modules


def test_nothing_that_was_saved_stays():
    layer = gt.LSTM(3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3, requires_grad=True)
    output, state = layer(x)
    assert len(operators._saved) == 1
    output.sum().backward()
    assert not operators._saved
    output, state = layer(x)
    del output, state
    assert not operators._saved  # the graph is gone, and was never used
    with torch.no_grad():
        results = layer(x)
    assert not operators._saved and not results[0].requires_grad
    for one in layer.parameters():
        one.requires_grad_(False)
    results = layer(x.detach())
    assert not operators._saved
    del results


def test_several_backward_passes_of_one_graph():
    """The first one uses up what was saved; the second runs the forward pass again, with the same masks."""
    layer, x = gt.GRU(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3, requires_grad=True)
    output = layer(x)[0].sum()
    first = torch.autograd.grad(output, [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(output, [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_copied_token():
    """Hooks that put copies in the place of saved tensors, as those that move them to the host do."""
    layer, x = gt.LSTM(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3, requires_grad=True)
    found = []
    for pack in (lambda one: one, lambda one: one.clone()):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            output = layer(x)[0].sum()
        found.append(torch.autograd.grad(output, [x, *layer.parameters()]))
    assert not operators._saved
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_checkpointing_and_seeds():
    layer, x = gt.GRU(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3, requires_grad=True)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        run = torch.utils.checkpoint.checkpoint if checkpointed else lambda function, x, **how: function(x)
        found.append(torch.autograd.grad(run(lambda x: layer(x)[0].sum(), x, use_reentrant=False), x)[0])
    assert torch.equal(*found) and not operators._saved
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_parameters_in_other_memory():
    """What moves or replaces parameters: each call reads those of now."""
    layer, theirs, x = gt.LSTM(3, 4), torch.nn.LSTM(3, 4), torch.randn(5, 2, 3)

    def check():
        double = (module(x.to(module.weight_hh_l0.dtype))[0].detach() for module in (layer, theirs))
        torch.testing.assert_close(*double)

    layer.load_state_dict(theirs.state_dict(), assign=True)
    assert layer.weight_ih_l0.data_ptr() == theirs.weight_ih_l0.data_ptr()
    check()
    with torch.no_grad():
        theirs.weight_hh_l0.mul_(2)  # it is the same memory
    check()
    layer.double(), theirs.double()
    check()
    for module in (layer, theirs):
        module.weight_ih_l0.data = module.weight_ih_l0.data.t().contiguous().t() * 3  # no longer contiguous
    check()
    theirs.load_state_dict(layer.state_dict())
    vector = torch.cat([one.detach().reshape(-1) for one in layer.parameters()])
    for module in (layer, theirs):
        module.weight_ih_l0.data = module.weight_ih_l0.data.contiguous()
        torch.nn.utils.vector_to_parameters(-vector, module.parameters())
    check()
    torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    torch.nn.utils.parametrizations.weight_norm(theirs, "weight_hh_l0")
    check()


def test_a_parameter_that_changes_before_backward():
    layer = gt.RNN(3, 4)
    output = layer(torch.randn(5, 2, 3))[0].sum()
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_frozen_parameters():
    layer, x = gt.GRU(3, 4), torch.randn(5, 2, 3)
    layer.weight_hh_l0.requires_grad_(False)
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None and layer.weight_ih_l0.grad is not None
    layer.weight_hh_l0.requires_grad_()
    expected = layer.weight_ih_l0.grad.clone()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    assert torch.equal(layer.weight_ih_l0.grad, expected)


@pytest.mark.parametrize("name", ["layer norm", "own cell", "chrono"])
def test_copies_and_pickles(name):
    kind, options = OPTIONS[name]
    layer = getattr(gt, kind)(**{"input_size": 5, "hidden_size": 4} | options, backend="numpy")
    x = torch.randn(4, 2, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(3)
        expected = layer(x)[0]
        torch.manual_seed(3)
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.weight_ih_l0.zero_()
        assert layer.weight_ih_l0.any()


def test_attributes_that_change():
    layer, x = gt.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.dropout = 0.5
    assert not torch.equal(layer(x)[0], layer(x)[0])
    with pytest.raises(ValueError, match="dropout"):
        layer.dropout = 2
    assert layer.dropout == 0.5
    layer(x)
    with pytest.raises(ValueError, match="input_size"):
        layer.input_size = 0
    layer.flatten_parameters()
    assert [one.shape for one in layer.all_weights[1]] == [one.shape for one in torch.nn.LSTM(3, 4, 2).all_weights[1]]
    with pytest.warns(UserWarning, match="num_layers=1"):
        gt.LSTM(3, 4, dropout=0.5)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_than_torch_takes(threads, monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    layer, found, count = gt.LSTM(64, 128), [], cpu_ops.thread_count
    monkeypatch.setattr(cpu_ops, "thread_count", lambda: found.append(count()) or found[-1])
    torch.set_num_threads(threads)
    layer(torch.randn(8, 16, 64))[0].sum().backward()
    assert set(found) == {min(threads, 2)} and count() == 2


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_the_operators_keep_torchs_rules(name):
    """Schemas, fakes, aliases, and what compiled graphs make of them, as torch checks operators."""
    layer, x = getattr(gt, name)(3, 4, 2), torch.randn(5, 2, 3)
    weights = [one.detach() for one in layer.parameters()]
    state = [torch.randn(2, 2, 4) for _ in range(1 + (name == "LSTM"))]
    marks = [torch.tensor([5, 3]), None, torch.rand(5, 2) > 0.2, None]
    given = (x, weights, state, marks, layer._texts[1])
    torch.library.opcheck(operators.recurrent, (*given, False))
    doutputs = [torch.randn(5, 2, 4), *(torch.randn(2, 2, 4) for _ in state)]
    token = torch.empty(0, dtype=torch.int64)
    torch.library.opcheck(operators.recurrent_backward, (token, doutputs, *given, [True, False] * (len(weights) // 2)))
    vectors = [x.clone(), *(one.clone() for one in weights), *(one.clone() for one in state)]
    torch.library.opcheck(operators.recurrent_second_backward, (vectors, doutputs, *given))


def test_autocast_on_a_cpu_stays_in_float32():
    layer, x = gt.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(x.bfloat16().float())
        narrow, _ = layer(x.bfloat16())
    assert output.dtype == torch.float32 and torch.equal(output, narrow)
    torch.testing.assert_close(output, expected, rtol=0, atol=0.05)
    output.sum().backward()
    assert x.grad.dtype == torch.float32


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer, x = gt.GRU(3, 4), torch.randn(5, 2, 3)
        layer(x)[0].sum().backward()
        expected = layer.weight_ih_l0.grad.clone()
        layer.zero_grad()
        torch.nn.parallel.DistributedDataParallel(layer)(x)[0].sum().backward()
        assert torch.equal(layer.weight_ih_l0.grad, expected)
    finally:
        distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs(compiler):
    """One graph for forward and backward, with equal results; and no graph for each sequence length."""
    torch._dynamo.reset()
    dropout = 0.5 if compiler == "aot_eager" else 0.0  # inductor draws keys from a generator of its own
    layer = gt.LSTM(3, 4, 2, dropout=dropout, bidirectional=True, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)
    explained = torch._dynamo.explain(layer)(torch.randn(2, 5, 3))
    assert explained.graph_count == 1 and explained.graph_break_count == 0
    for mode, shape in ((False, (2, 5, 3)), (True, (2, 5, 3)), (True, (3, 7, 3))):
        layer.train(mode)
        x = torch.randn(shape, requires_grad=True)
        found = []
        for one in (layer, compiled):
            torch.manual_seed(4)
            output, (h, c) = one(x)
            found.append([output, h, c, *torch.autograd.grad(output.sum() + (h * c).sum(), [x, *layer.parameters()])])
        for mine, other in zip(*found, strict=True):
            assert torch.equal(mine, other)
    assert not operators._saved


@pytest.mark.long
def test_exported_graphs():
    layer = gt.GRU(3, 4, 2, bidirectional=True)
    sizes = {0: torch.export.Dim("T", min=2, max=50), 1: torch.export.Dim("B", min=2, max=50)}
    exported = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=(sizes,))
    calls = [one for one in exported.graph.nodes if one.op == "call_function" and "recurrent" in str(one.target)]
    assert len(calls) == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    x = torch.randn(7, 3, 3)
    for program in (exported.module(), torch.export.load(file).module()):
        output, h = program(x)
        assert torch.equal(output, layer(x)[0]) and torch.equal(h, layer(x)[1])
    x = torch.randn(4, 2, 3, requires_grad=True)
    gradients = [torch.autograd.grad(run(x)[0].sum(), x)[0] for run in (layer, exported.module())]
    assert torch.equal(*gradients)  # the exported program saves nothing, so its forward pass runs again for them


def test_convert():
    class Derived(torch.nn.LSTM):
        pass

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
            self.rest = torch.nn.ModuleList([torch.nn.GRU(8, 4), torch.nn.RNN(4, 4, nonlinearity="relu")])
            self.again, self.derived, self.cell = self.rest[0], Derived(3, 4), torch.nn.GRUCell(4, 4)

        def forward(self, x):
            y = self.rest[1](self.again(self.first(x)[0])[0])[0]
            return self.cell(y[0]) + self.derived(x)[0][0]

    model, x = Model().eval(), torch.randn(2, 4, 3)
    expected, weights = model(x), list(model.parameters())
    model.first.register_forward_hook(lambda module, given, results: None)
    assert gt.convert(model) is model
    assert [type(one) for one in (model.first, *model.rest, model.derived, model.cell)] == [
        gt.LSTM, gt.GRU, gt.RNN, Derived, gt.GRUCell,
    ]  # fmt: skip
    assert model.again is model.rest[0] and not model.first.training and model.first._forward_hooks
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    torch.testing.assert_close(model(x), expected)
    alone = torch.nn.LSTM(3, 4)
    assert isinstance(gt.convert(alone), gt.LSTM)
    with pytest.raises(TypeError, match="model: expected a torch"):
        gt.convert([alone])


def test_a_training_script_with_one_import_changed():
    """The loss curves of torch.nn and of these layers, from the same seed."""
    text = "the quick brown fox jumps over the lazy dog. " * 8
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(one) for one in text])
    curves = []
    for nn in (torch.nn, gt):
        torch.manual_seed(0)
        table, lstm = torch.nn.Embedding(len(letters), 8), nn.LSTM(8, 24, 2)
        head = torch.nn.Linear(24, len(letters))
        model = torch.nn.ModuleList([table, lstm, head])
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        losses, state = [], None
        for update in range(30):
            piece = codes[update * 10 : update * 10 + 21]
            output, state = lstm(table(piece[:-1])[:, None], state)
            state = tuple(part.detach() for part in state)
            loss = torch.nn.functional.cross_entropy(head(output[:, 0]), piece[1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < 0.8 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)


# ---- mistakes


def mistakes():
    lstm, x = gt.LSTM(3, 4), torch.zeros(5, 2, 3)
    h = torch.zeros(1, 2, 4)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 5])
    return {
        "no tuple": (lambda: lstm(x, h), r"hx: expected 2 tensors \(h, c\)"),
        "a pair": (lambda: gt.GRU(3, 4)(x, (h, h)), "hx"),
        "axes": (lambda: lstm(x[0, 0]), "input: expected 2 axes"),
        "axes of hx": (lambda: lstm(x, (h[0], h[0])), "hx: expected 3 axes"),
        "features": (lambda: lstm(torch.zeros(5, 2, 4)), "input: expected input_size = 3"),
        "packed features": (lambda: gt.LSTM(4, 4)(packed), "input: expected input_size = 4"),
        "shape of hx": (lambda: lstm(x, (h, h[:, :1])), r"hx: expected c of shape \(1, 2, 4\), got \(1, 1, 4\)"),
        "dtype": (lambda: lstm(x.double()), "input: expected dtype torch.float32"),
        "dtype of hx": (lambda: lstm(x, (h, h.double())), "hx: expected dtype torch.float32"),
        "dtype of the layer": (lambda: gt.LSTM(3, 4, dtype=torch.int32), "dtype should be one of torch.float32"),
        "device": (lambda: gt.LSTM(3, 4, device="meta")(x), "input: is on cpu, and the parameters on meta"),
        "lengths": (lambda: lstm(x, lengths=[5, 6]), "lengths: expected lengths from 0 to 5"),
        "packed": (lambda: lstm(packed, lengths=[5, 5]), "lengths, reset and mask"),
        "reset": (lambda: lstm(x, reset=torch.zeros(5, 2)), "reset: expected booleans"),
        "seed": (lambda: gt.LSTM(3, 4, seed=1), "seed.*manual_seed"),
        "batch_norm": (lambda: gt.LSTM(3, 4, batch_norm=True), "batch_norm: running statistics"),
        "unknown": (lambda: gt.GRU(3, 4, peepholes=True), "peepholes"),
        "stack": (lambda: gt.GRUCell(3, 4, num_layers=2), "num_layers.*GRU has it"),
        "cell": (lambda: gt.LSTMCell(3, 4)(x), "input: expected"),
        "backend": (lambda: gt.LSTM(3, 4, backend="tpu"), "backend"),
    }  # fmt: skip


@pytest.mark.parametrize("name", [
    "no tuple", "a pair", "axes", "axes of hx", "features", "packed features", "shape of hx",
    "dtype", "dtype of hx", "dtype of the layer",
    "device", "lengths", "packed", "reset", "seed", "batch_norm", "unknown", "stack", "cell", "backend",
])  # fmt: skip
def test_mistakes(name):
    call, message = mistakes()[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_graph_with_an_unknown_cell():
    with pytest.raises(RuntimeError, match="a cell or a function of one's own"):
        operators.find('{"equations": "0", "layer": "Recurrent", "training": true}')


def test_only_this_package_imports_torch():
    script = """
import sys, gpurnn, gpurnn.interop
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    import gpurnn.interop.torch
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'gpurnn.interop.torch needs torch. Run pip install "gpurnn[torch]"\n'
