"""Traced cells on the schedules of backend ``cuda``: any number of states, own parameters, random masks, products with
some gates, a second product or none, means over the units. Executed on the CPU as test_cuda_layers.py does it, and
compared with NumPy to the same tolerance."""

import numpy as np
import pytest
from cuda_on_cpu.emulator import KernelError
from helpers import THREAD_ORDERS, cuda_ops

import gpurnn
from gpurnn import cells
from gpurnn.backends.cuda import schedules
from gpurnn.backends.sources import kernel_source
from gpurnn.check import Batch
from gpurnn.dtypes import ITEMSIZE
from gpurnn.testing import check_parity
from gpurnn.testing.allowed import worst_error

pytestmark = pytest.mark.emulated


@gpurnn.cell(gates="a b c", states="h s", parameters="u v", remembers="a")
def mixed(ax, ah, s, p):
    """Gates whose two products meet after an equation, and one without a product."""
    a = cells.sigmoid(ax.a + ah.a + p.u * s.s)
    b = cells.tanh(ax.b + a * ah.b)
    slow = s.s + cells.softplus(ax.c) * (b - s.s) * 0.1
    return a * s.h + (1 - a) * cells.tanh(slow + p.v), slow


@gpurnn.cell(gates="r n", states="h s", parameters="u", remembers="r")
def inner_drawn(ax, ah, s, p):
    """A second product of what an own parameter, another state and a mask make."""
    r = cells.sigmoid(ax.r + ah.r + p.u * s.s)
    n = cells.tanh(ax.n + ah.n(cells.dropout(r * s.h, 0.25) + s.s))
    return n + r * (s.h - n), 0.5 * s.s + 0.5 * n * p.u


class LeakyStep(cells.Cell):
    """h' = h + leak (n - h), n = tanh(ax + ah): a cell that nothing else knows, written by hand as one record and one
    struct."""

    name, gates, inputs, saved = "leaky", ("z",), ("z",), ("n",)
    products, parameters = (cells.Product(("z",)),), (cells.Parameter("leak", initial=0.5),)
    preactivations = ("z", *parameters[0].blocks)
    struct = """
        template <typename real>
        struct leaky : PointwiseCell {
            static constexpr int gates = 1, states = 1, saved = 1, preactivations = 2, first_product = 1, products = 1;
            static constexpr int parameters = 1;

            DEVICE static void forward(const ForwardIn<leaky, real>& in, ForwardOut<leaky, real>& out) {
                const real n = out.saved[0] = tanh(in.ax[0] + in.ah[0]);
                out.state[0] = in.state[0] + in.p[0] * (n - in.state[0]);
            }

            DEVICE static void backward(const BackwardIn<leaky, real>& in, BackwardOut<leaky, real>& out) {
                out.d[0] = in.dstate[0] * in.p[0] * dtanh(in.saved[0]);
                out.d[1] = in.dstate[0] * (in.saved[0] - in.state[0]);
                out.dstate[0] = in.dstate[0] * (real(1) - in.p[0]);
            }
        };
    """

    def forward(self, xp, w, ax, old, new, scratch):
        n = scratch.z[: len(ax)]
        n[...] = xp.tanh(w.hh @ old[0] + ax)
        new[0][...] = old[0] + w.own[0] * (n - old[0])

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        (h,), (dh,), H = old, dstate, len(old[0])
        hook(dh)
        n, d = scratch.z[:H], scratch.d
        d[:H] = dh * w.own[0] * (1 - n * n)
        d[H:] = dh * (n - h)
        dh[...] = w.hh.T @ d[:H] + dh * (1 - w.own[0])


def of(cell):
    """A function that makes a layer of a cell."""
    return lambda *sizes, **more: gpurnn.Recurrent(cell, *sizes, **more)


def option(kind, **options):
    """A function that makes a layer with options."""
    return lambda *sizes, **more: kind(*sizes, **options, **more)


DRAWN = {"recurrent_dropout": 0.3, "zoneout": (0.2, 0.1)}
LAYERS = {
    "by hand": of(LeakyStep()),
    "peephole": of(cells.peephole),
    "four states": of(cells.slstm),
    "zoneout and dropout": option(gpurnn.LSTM, **DRAWN),
    "mixed": of(mixed),
    "clips": option(gpurnn.LSTM, cell_clip=0.5, gradient_clip=0.1, peephole=True, coupled=True),
}
NO_PRODUCT = {"indrnn": of(cells.indrnn), "mingru": of(cells.mingru)}
TWO_PRODUCTS = {
    "mgu": of(cells.mgu),
    "two coupled states": of(cells.cornn()),
    "mut1": of(cells.mut1),
    "inner drawn": of(inner_drawn),
    "dropout of a sequence": option(gpurnn.GRU, recurrent_dropout=0.3, recurrent_dropout_each="sequence"),
}
MEANS = {
    "lstm normalized": option(gpurnn.LSTM, layer_norm=True),
    "gru normalized": option(gpurnn.GRU, layer_norm=True),
    "rnn normalized": option(gpurnn.RNN, layer_norm=True),
    "everything": option(gpurnn.LSTM, layer_norm=True, peephole=True, **DRAWN),
}
POINTWISE = LAYERS | NO_PRODUCT
EVERY = POINTWISE | TWO_PRODUCTS | MEANS


def compare(make, ops, dtype, T, B, H, ragged, schedule, I=3, **options):
    """Every result of a training call and the output of inference, within twice the error of NumPy's."""
    first = make(I, H, backend=ops, dtype=dtype, seed=1, schedule=schedule, **options)
    like = "float16" if options.pop("precision", None) == "tf32" else dtype
    plain, exact = (make(I, H, backend="numpy", dtype=kind, seed=1, **options) for kind in (like, "float64"))
    for other in (plain, exact):
        other.load_state_dict(first.state_dict())
    worst = []
    for seed in (T + 31 * B, 1, 2):
        batch = Batch(exact, T, B, ragged, seed=seed)
        got, plain_got, expected = (batch.run(layer) for layer in (first, plain, exact))
        for layer, results in ((first, got), (plain, plain_got), (exact, expected)):
            layer.eval()
            output, state = layer(
                layer.xp.asarray(batch.x.astype(np.float32)).astype(layer.dtype), lengths=batch.lengths
            )
            layer.train()
            states = state if isinstance(state, tuple) else (state,)
            for k, array in enumerate((output, *states)):
                results[f"inference {k}"] = np.asarray(layer.ops.to_numpy(array), np.float64)
        terms = T * (B + 2 * H + 4) if dtype == "float64" else None
        worst.append(worst_error(got, plain_got, expected, like, terms))
        if worst[-1][0] <= 1:  # NumPy may have been exact by luck: the middle one of three draws counts
            return
    error, detail = sorted(worst)[1]
    assert error <= 1, detail


SIZES = [  # T, B, H, ragged, both directions
    (1, 1, 1, False, False), (5, 3, 7, True, True), (1, 5, 33, True, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("kind", EVERY)
def test_step(kind, dtype):
    ops = cuda_ops(**THREAD_ORDERS["random" if dtype == "float64" else "ascending"])
    for T, B, H, ragged, both in SIZES:
        compare(EVERY[kind], ops, dtype, T, B, H, ragged, "step", bidirectional=both)


def test_step_with_several_units_a_thread():
    """A thread block has 256 threads: here units of 2 and 4 a thread, the last ones missing."""
    ops = cuda_ops(checked=False)
    for H, kind, dtype in ((300, "lstm normalized", "float32"), (770, "gru normalized", "float16")):
        compare(MEANS[kind], ops, dtype, 2, 2, H, True, "step", bidirectional=H == 300)


def test_a_recorded_loop_takes_new_masks_and_parameters():
    """The second call of a shape is recorded, later ones are replayed."""
    for make in (LAYERS["zoneout and dropout"], TWO_PRODUCTS["dropout of a sequence"], MEANS["everything"]):
        ops = cuda_ops()
        layer, once, exact = (
            make(3, 5, backend=backend, dtype=dtype, seed=1, bidirectional=True, num_layers=2, schedule="step")
            for backend, dtype in ((ops, "float32"), (cuda_ops(graphs=0), "float32"), ("numpy", "float64"))
        )
        for call in range(4):
            for one in (layer, once):
                one.flat_params *= 0.9
            batch = Batch(exact, 4, 3, ragged=True, seed=call)
            results = []
            for one in (layer, once):
                one.calls = 7 + call
                one.zero_grad()
                x = one.xp.asarray(batch.x.astype("float32"))
                output, _, backward = one.forward(x, lengths=batch.lengths)
                dx, _ = backward(output)
                results.append((output.get(), dx.get(), one.flat_grads.get()))
            for mine, expected in zip(*results, strict=True):
                np.testing.assert_array_equal(mine, expected)
        assert any(loop.graphs for _, loop in ops.pool.free.values())


# ---- one launch for the whole sequence


@pytest.fixture
def only(monkeypatch):
    """``only(schedule, tile)``: the schedule has one candidate, ``tile(problem, device)``."""

    def force(schedule, tile):
        schedules.candidates.cache_clear()
        monkeypatch.setitem(schedules.FINDERS, schedule, lambda problem, device: [tile(problem, device)])

    yield force
    schedules.candidates.cache_clear()


FUSED = [  # T, B, H, ragged, both directions
    (1, 1, 1, False, False), (5, 5, 19, True, True),
]  # fmt: skip
SIXTEEN_BITS = dict(zip(POINTWISE, ("float16", "bfloat16") * len(POINTWISE), strict=False))


@pytest.mark.parametrize("schedule", schedules.SCHEDULES[1:])
@pytest.mark.parametrize("kind", [gpurnn.LSTM, gpurnn.GRU])
def test_heads(kind, schedule):
    """Heads are to a schedule what directions are."""
    ops = cuda_ops(**THREAD_ORDERS["ascending"])
    both = schedule != "grid"  # of which four strands do not fit on the multiprocessors here
    compare(kind, ops, "float32", 5, 5, 22, True, schedule, heads=2, bidirectional=both)
    if both:  # more strands than a word has bits
        compare(kind, ops, "float32", 4, 3, 38, False, schedule, heads=19, bidirectional=True)


@pytest.mark.parametrize("kind", POINTWISE)
def test_block(kind):
    for dtype, sizes in (("float32", FUSED), (SIXTEEN_BITS[kind], FUSED[1:])):
        ops = cuda_ops(**THREAD_ORDERS["ascending" if dtype == "float32" else "random"])
        for T, B, H, ragged, both in sizes:
            compare(POINTWISE[kind], ops, dtype, T, B, H, ragged, "block", bidirectional=both)


def test_block_without_a_product_shares_the_units():
    """Of 130 units, in blocks of 64, and of 6 sequences, 4 of a tile."""
    for kind, dtype in (("indrnn", "float32"), ("mingru", "bfloat16")):
        ops = cuda_ops()
        compare(NO_PRODUCT[kind], ops, dtype, 3, 6, 130, True, "block", bidirectional=True)


@pytest.mark.parametrize("kind", ["peephole", "mixed", "zoneout and dropout"])
def test_block_makes_the_input_products(kind, only):
    """Gates whose W_ih x is added to W_hh h, and gates that have it apart or alone."""

    def tile(problem, device):
        HP, size = -(-problem.H // 32) * 32, ITEMSIZE[problem.dtype]
        if problem.tf32 or size == 2:
            IP = 0 if problem.backward else 32 // size
            return schedules.mma_tile(problem, HP, 3, 1, IP=IP)
        return schedules.fma_tile(problem, HP, 4, 4, 2, IP=0 if problem.backward else 4)

    for dtype, precision in (("float32", {}), ("float32", {"precision": "tf32"}), ("float16", {})):
        only("block", tile)
        compare(LAYERS[kind], cuda_ops(), dtype, 3, 5, 19, True, "block", bidirectional=True, **precision)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tensor_cores", [False, True], ids=["", "tensor cores"])
def test_grid(kind, tensor_cores, only):
    """Groups of several blocks, tiles that queue; weights in registers and in shared memory."""

    def tile(problem, device):
        size = schedules.Device(device.capability, 12, device.shared_bytes)
        if tensor_cores:
            return schedules.grid_mma_tile(problem, size, 8, 4, 1, 1)
        tiles = (schedules.grid_tile(problem, size, 16, 2, threads, 4) for threads in (128, 256, 64, 512))
        return next(tile for tile in tiles if tile)

    only("grid", tile)
    dtype = SIXTEEN_BITS[kind] if tensor_cores else "float32"
    compare(LAYERS[kind], cuda_ops(), dtype, 3, 5, 33, True, "grid", bidirectional=True)


def test_who_cannot_serve_a_cell_says_why():
    """Schedules that refuse, and cells that run as array code."""
    device = schedules.Device(90, 132, 227 * 1024)

    def problem(make, **more):
        layer = make(3, 8, backend="numpy", seed=0)
        return schedules.Problem(layer.cell, 128, 100, 16, 1, "float32", False, False, **more)

    refusals = schedules.candidates(problem(MEANS["lstm normalized"]), device)[1]
    assert "takes a barrier more" in refusals["block"] and "an exchange of 0.65 us more" in refusals["grid"]
    refusals = schedules.candidates(problem(TWO_PRODUCTS["mgu"]), device)[1]
    assert all("second product" in refusals[name] for name in ("block", "grid"))
    found, refusals = schedules.candidates(problem(NO_PRODUCT["indrnn"]), device)
    assert "multiplies nothing by it" in refusals["grid"] and {one.schedule for one in found} == {"step", "block"}
    (block,) = (one for one in found if one.schedule == "block")
    assert block.parts == 2 and str(block) == "no recurrent weights, tiles of 4 sequences"
    ops = cuda_ops()
    layer = gpurnn.LSTM(3, 5, batch_norm=4, backend=ops, seed=1)
    plan = layer.plan(4, 3)
    assert plan.schedule == "array code" and "normalizes over the batch" in plan.reason
    compare(option(gpurnn.LSTM, batch_norm=4), ops, "float64", 4, 3, 5, False, "auto", bidirectional=True)


def test_cells_of_one_name_are_not_one_kernel():
    """Kernels are remembered by what the equations are, and a name of ours is free for others."""

    def own(sign):
        @gpurnn.cell(gates="z", name="lstm")
        def equations(ax, ah, s):
            return cells.tanh(sign * (ax.z + ah.z))

        return equations

    ops, outputs = cuda_ops(), []
    for schedule in ("step", "block"):
        for sign in (1, -1):
            layer = gpurnn.Recurrent(own(sign), 3, 5, backend=ops, dtype="float32", seed=1, schedule=schedule)
            outputs.append(layer(ops.xp.ones((1, 2, 3), "float32"))[0].get())
        np.testing.assert_array_equal(outputs[-1], -outputs[-2])
    assert np.abs(outputs[0]).max() > 0


MUTATIONS = {  # planted error -> layer, schedule, piece of the source, what it becomes
    "a state of direction 0": ("four states", "step", "(d * (Cell::states - 2) + s) * size", "s * size"),
    "a state of direction 0, block": ("four states", "block", "(d * (Cell::states - 2) + s) * size", "s * size"),
    "masks of the first timestep": ("zoneout and dropout", "step", "(steps > 1 ? t : 0)", "0"),
    "masks of the last timestep": ("zoneout and dropout", "block", "if (!Channel::waits) load_all_masks(t + on);", ""),
    "masks of one sequence": ("zoneout and dropout", "block", "t, pos.sequence[k], B, H", "t, 0, B, H"),
    "parameters of direction 0": ("peephole", "step", "a.own[((size_t)pos.d * Cell::parameters", "a.own[((size_t)0"),
    "parameters of direction 0, block": ("peephole", "block", "pos.d * Cell::parameters + n", "n"),
    "no b_hh without a product": ("mixed", "block", "else in.ax[g] += bias_r[g][u];", ""),
    "no b_hh without a product, step": ("mixed", "step", "else in.ax[k] += r;", ""),
    "the second product's rows": ("mgu", "step", "row[(size_t)k * a.H] = T(out.d[k]);\n    }", "}"),
    "what the second product multiplies": ("inner drawn", "step", "inner_now[at.index] = T(inner);",
                                           "inner_now[at.index] = h_now[at.index];"),
    "a warp left out": ("lstm normalized", "step", "for (int w = 0; w < WARPS", "for (int w = 1; w < WARPS"),
    "no barrier behind the parts": ("lstm normalized", "step", "    }\n    __syncthreads();\n#pragma unroll",
                                    "    }\n#pragma unroll"),
    "a mean of too many": ("gru normalized", "step", "x[k] /= real(H);", "x[k] /= real(H + 1);"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation):
    kind, schedule, old, new = MUTATIONS[mutation]
    file = "block.cu" if schedule == "block" else "step_means.cu" if kind in MEANS else "step.cu"
    assert kernel_source(file).count(old) == 1
    ops = cuda_ops(edits=[(old, new)], **THREAD_ORDERS["random"])
    with pytest.raises((AssertionError, KernelError)), np.errstate(all="ignore"):
        compare(EVERY[kind], ops, "float32", 4, 3, 40 if kind in MEANS else 7, True, schedule, bidirectional=True)


def test_no_steps_and_no_sequences():
    for kind, schedule in (("zoneout and dropout", "step"), ("zoneout and dropout", "block"), ("mingru", "block"),
                           ("everything", "step"), ("inner drawn", "step")):  # fmt: skip
        for T, B in ((0, 2), (3, 0)):
            compare(EVERY[kind], cuda_ops(), "float32", T, B, 5, False, schedule, I=40)


@pytest.mark.parametrize(
    "layer, options",
    [
        (gpurnn.LSTM, {"weight_dropout": 0.4}),
        (gpurnn.GRU, {"weight_dropout": 0.4, "residual": True, "num_layers": 3}),
        (gpurnn.LSTM, {"layer_norm": True, "weight_dropout": 0.3, "zoneout": (0.1, 0.2)}),
        (gpurnn.RNN, {"batch_norm": 3}),
    ],
)
def test_what_stands_around_the_cell(layer, options):
    """Dropped weights, residuals and the array code of what the kernels refuse."""

    def make(backend, dtype):
        return layer(3, 6, bidirectional=True, backend=backend, dtype=dtype, seed=1, **options)

    x = np.random.default_rng(0).standard_normal((4, 3, 3))
    check_parity(make, x, backend=cuda_ops(), dtype="float32", lengths=[4, 3, 4])
