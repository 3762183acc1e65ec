"""Traced cells on the schedules of backend ``cuda``: any number of states, own parameters, random masks, products with
some gates, a second product or none, means over the units. Executed on the CPU as test_cuda_layers.py does it, and
compared with NumPy to the same tolerance."""

import numpy as np
import pytest
from cuda_cells import (
    EVERY,
    FUSABLE,
    INNER_FIRST,
    LAYERS,
    MEANS,
    NO_PRODUCT,
    TWO_PRODUCTS,
    centered,
    compare,
    of,
    option,
    with_dtypes,
)
from cuda_on_cpu.emulator import KernelError
from helpers import THREAD_ORDERS, cuda_ops

import gpurnn
from gpurnn import cells
from gpurnn.backends.cuda import schedules
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import LSTMStep
from gpurnn.check import Batch
from gpurnn.dtypes import ITEMSIZE
from gpurnn.testing import check_parity

pytestmark = pytest.mark.emulated


SIZES = [  # T, B, H, ragged, both directions
    (1, 1, 1, False, False), (5, 3, 7, True, True), (1, 5, 33, True, False),
]  # fmt: skip


@pytest.mark.parametrize("kind, dtype", with_dtypes(EVERY))
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
    for make in (LAYERS["zoneout and dropout"], INNER_FIRST["dropout of a sequence"], MEANS["everything"]):
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
SIXTEEN_BITS = dict(zip(FUSABLE, ("float16", "bfloat16") * len(FUSABLE), strict=False))


@pytest.mark.parametrize("schedule", ["step", "block", "grid"])  # the others have files of their own
@pytest.mark.parametrize("kind", [gpurnn.LSTM, gpurnn.GRU])
def test_heads(kind, schedule):
    """Heads are to a schedule what directions are."""
    ops = cuda_ops(**THREAD_ORDERS["ascending"])
    both = schedule != "grid"  # of which four strands do not fit on the multiprocessors here
    compare(kind, ops, "float32", 5, 5, 22, True, schedule, heads=2, bidirectional=both)
    compare(kind, ops, "float32", 5, 5, 22, True, schedule, I=4, heads=2, mix_heads=False, bidirectional=both)
    if both:  # as many strands as a word has bits, and more
        compare(kind, ops, "float32", 4, 3, 32, False, schedule, heads=16, bidirectional=True)
        compare(kind, ops, "float32", 4, 3, 34, False, schedule, heads=34, reverse=True)
        compare(kind, ops, "float32", 4, 3, 38, False, schedule, heads=19, bidirectional=True)


@pytest.mark.parametrize("kind", FUSABLE)
def test_block(kind):
    for dtype, sizes in (("float32", FUSED), (SIXTEEN_BITS[kind], FUSED[1:])):
        ops = cuda_ops(**THREAD_ORDERS["ascending" if dtype == "float32" else "random"])
        for T, B, H, ragged, both in sizes:
            compare(FUSABLE[kind], ops, dtype, T, B, H, ragged, "block", bidirectional=both)


MEANS_TILES = {  # sequences in slices of their own; more slices than sequences; two groups of columns
    "float32": [(4, 4), (8, 2)],
    "bfloat16": [(2,)],
}


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("dtype", MEANS_TILES)
def test_block_averages_in_every_tile(kind, dtype, only):
    """Of several warps, with units past H in the last one, and more sequences than a tile has."""
    for which in MEANS_TILES[dtype]:

        def tile(problem, device, which=which):
            if dtype == "float32":
                return schedules.fma_tile(problem, 64, which[0], 4, which[1])
            return schedules.mma_tile(problem, 64, 2, *which)

        only("block", tile)
        ops = cuda_ops(**THREAD_ORDERS["random"])
        compare(MEANS[kind], ops, dtype, 3, 5, 45, True, "block", bidirectional=True)


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


@pytest.mark.parametrize("kind", GRID := LAYERS | INNER_FIRST)
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
    compare(GRID[kind], cuda_ops(), dtype, 3, 5, 33, True, "grid", bidirectional=True)


@pytest.mark.parametrize("kind", ["mixed", "dropout of a sequence"])
def test_grid_by_thirds(kind, only):
    """float32 on tensor cores, as three bfloat16 numbers each."""

    def tile(problem, device):
        return schedules.grid_mma_tile(problem, schedules.Device(90, 12, device.shared_bytes), 8, 4, 1, 1)

    only("grid", tile)
    compare(GRID[kind], cuda_ops(), "float32", 3, 5, 33, True, "grid", bidirectional=True)


CLUSTER = "mixed", "zoneout and dropout", next(iter(INNER_FIRST))  # the others take minutes and show no more


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in CLUSTER else pytest.mark.slow) for kind in GRID]
)
def test_cluster(kind, only):
    """Clusters of two thread blocks, which queue; weights in registers and in shared memory."""

    def tile(problem, device):
        return schedules.cluster_tile(problem, schedules.Device(90, 4, device.shared_bytes), 2, 4, 1)

    only("cluster", tile)
    compare(GRID[kind], cuda_ops(), SIXTEEN_BITS[kind], 3, 5, 19, True, "cluster")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in CLUSTER else pytest.mark.slow) for kind in GRID if kind not in INNER_FIRST],
)
def test_fused(kind, only):
    """A launch for each timestep, which multiplies, too."""
    only("fused", lambda problem, _: schedules.fused_tile(problem, schedules.Device(90, 132, 227 * 1024), 16, 64, 1))
    compare(GRID[kind], cuda_ops(), SIXTEEN_BITS[kind], 3, 5, 19, True, "fused")


def test_who_cannot_serve_a_cell_says_why():
    """Schedules that refuse, and cells that run as array code."""
    device = schedules.Device(90, 132, 227 * 1024)

    def problem(make, **more):
        layer = make(3, 8, backend="numpy", seed=0)
        return schedules.Problem(layer.cell, 128, 100, 16, 1, "float32", False, False, **more)

    found, refusals = schedules.candidates(problem(MEANS["lstm normalized"]), device)
    assert found[0].schedule == "block" and found[-1].schedule == "step"
    plain = schedules.candidates(problem(option(gpurnn.LSTM)), device)[0][0]
    assert (found[0].seconds - plain.seconds) * device.clock > 4 * schedules.constants.MEANS  # four stages
    assert (
        list(refusals) == ["grid", "cluster", "fused"] and "means over the units of a sequence" in refusals["cluster"]
    )
    assert "take 4 more exchanges of 0.65 us in every timestep" in refusals["grid"]
    long = LSTMStep(False)
    long.stages, long.locals = ((1,), (1,)), (400, 300)
    refusals = schedules.candidates(schedules.Problem(long, 64, 9, 1, 1, "float32", False, True), device)[1]
    assert "hands on from mean to mean does not fit into its registers" in refusals["block"]
    refusals = schedules.candidates(problem(MEANS["rnn normalized"]), device)[1]
    assert "take 2 more exchanges of" in refusals["grid"]
    refusals = schedules.candidates(problem(of(centered)), device)[1]
    assert "128 of a cell without recurrent weights are spread over 2" in refusals["block"]
    assert "take 1 more exchange of" in refusals["grid"]
    for kind in ("mgu", "inner drawn", "drawn each", "weighted"):
        refusals = schedules.candidates(problem(TWO_PRODUCTS[kind]), device)[1]
        assert all("second product" in refusals[name] for name in ("block", "grid", "cluster", "fused"))
    found, refusals = schedules.candidates(problem(INNER_FIRST["dropout of a sequence"]), device)
    assert list(refusals) == ["cluster", "fused"] and found[0].schedule == "block"  # of float32
    found, refusals = schedules.candidates(problem(NO_PRODUCT["indrnn"]), device)
    assert all("multiplies nothing by it" in refusals[name] for name in ("grid", "cluster", "fused"))
    assert {one.schedule for one in found} == {"step", "block"}
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
    "no b_hh without a product, step": ("mixed", "step", "else in.ax[k] += real(bias_hh(k));", ""),
    "the second product's rows": ("mgu", "step", "at.row[(size_t)k * a.H] = T(float_of<T>(out.d[k]));\n    }", "}"),
    "what the second product multiplies": ("inner drawn", "step", "inner_now[at.index] = T(inner);",
                                           "inner_now[at.index] = h_now[at.index];"),
    "a warp left out": ("lstm normalized", "step", "for (int w = 0; w < WARPS", "for (int w = 1; w < WARPS"),
    "no barrier behind the parts": ("lstm normalized", "step", "__syncthreads();\n    if (warp >=", "if (warp >="),
    "a mean of too many": ("gru normalized", "step", "x[k] /= real(H);", "x[k] /= real(H + 1);"),
    "no barrier in block": ("gru normalized", "block", "__syncthreads();\n    if (warp >=", "if (warp >="),
    "no barrier between steps": ("centered", "block", "if (Cell::means) __syncthreads();", ""),
    "units of another sequence": ("rnn normalized", "block", "parts + warp / WARPS * WARPS * row", "parts"),
    "units that are not there": ("lstm normalized", "block", "x[k] /= real(H);", "x[k] /= real(WARPS * 32 / APART);"),
    "h in place of what is made of it": ("of both states", "block", "h = pos.stored(inner, T());", ""),
    "masks not loaded": ("dropout of a sequence", "block", "if (Cell::inner_first && pos", "if (false && pos"),
    "nothing back through it": ("dropout of a sequence", "block", "Cell::backward_inner(in, d_inner, out);", ""),
    "nothing past the end": ("dropout of a sequence", "block", "} else if constexpr (Cell::inner_first) {",
                             "} else if constexpr (false) {"),
    "parts of another stage": ("lstm normalized", "block", "parts + K * first * Units::apart", "parts"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation, only):
    kind, schedule, old, new = MUTATIONS[mutation]
    if schedule == "block" and kind in MEANS:  # two warps for each of four sequences
        only("block", lambda problem, device: schedules.fma_tile(problem, 64, 4, 4, 4))
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
