"""The schedule ``fused``: a launch for each timestep, which multiplies and computes the cells. Executed on the CPU as
test_cuda_block.py does it; each launch but the first may begin before the one before it has ended."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import THREAD_ORDERS, check_spills, compare, cuda_ops, precision

import gpurnn
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.fused import FusedPass
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.schedules import Device, Fused, Problem
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS as RECORDS
from gpurnn.cells import tanh
from gpurnn.check import OPTIONS, Batch, build
from gpurnn.errors import BackendError

pytestmark = pytest.mark.emulated

H100 = Device(90, 132, 227 * 1024, 1.755e9)


@pytest.fixture
def forced(monkeypatch):
    """``forced(U, R, C, stages=2)``: layers run by tiles of U units and R sequences, shared by C thread blocks.
    backward: the C of backward, if it is another."""

    def force(U, R, C, stages=2, backward=None):
        def fused_candidates(problem, device):
            blocks = (problem.backward and backward) or C
            return [schedules.fused_tile(problem, H100, U, R, blocks, stages)]

        schedules.candidates.cache_clear()
        monkeypatch.setitem(schedules.FINDERS, "fused", fused_candidates)

    yield force
    schedules.candidates.cache_clear()


SIZES = [  # kind, dtype, T, B, H, U, R, C, stages, ragged, both directions, order of threads
    ("lstm", "float16", 3, 9, 33, 32, 32, 1, 2, True, True, "ascending"),
    ("gru", "bfloat16", 2, 35, 70, 32, 32, 2, 3, False, False, "random"),
    ("rnn relu", "bfloat16", 4, 3, 19, 32, 32, 1, 2, True, True, "interrupted"),
    ("lstm", "tf32", 3, 3, 66, 32, 32, 2, 2, True, False, "random"),
    ("gru", "tf32", 1, 1, 7, 16, 64, 1, 4, True, True, "descending"),
    ("rnn tanh", "float32", 3, 40, 129, 64, 64, 2, 2, True, False, "ascending"),  # 8 turns, 4 at a time
    ("lstm", "float32", 3, 5, 20, 16, 64, 1, 2, True, True, "random"),
]


@pytest.mark.parametrize("kind, dtype, T, B, H, U, R, C, stages, ragged, both, order", SIZES)
def test_sizes(kind, dtype, T, B, H, U, R, C, stages, ragged, both, order, forced):
    """Units, sequences and columns that fill no tile and no panel; tiles of one block and of several."""
    forced(U, R, C, stages)
    dtype, options = precision(dtype)
    ops = cuda_ops(**{"policy": "descending"} if order == "descending" else THREAD_ORDERS[order])
    compare(kind, ops, dtype, T, B, ragged, H=H, bidirectional=both, schedule="fused", **options)


@pytest.mark.parametrize("kind, H, C", [("lstm", 33, 8), ("gru", 34, 4)])
def test_blocks_with_fewer_sequences_than_threads_and_panels_that_are_no_multiple(kind, H, C, forced):
    """Of a tile of 32 sequences a block of eight has 4, and its threads could take 8. Four blocks have 6 panels."""
    forced(32, 32, 1, backward=C)
    compare(kind, cuda_ops(), "float32", 2, 9, H=H, schedule="fused", precision="tf32")


def test_no_timestep_and_no_sequence(forced):
    forced(32, 32, 1)
    layer = build("gru", cuda_ops(), "float16", H=11, schedule="fused")
    for T, B in ((0, 2), (2, 0)):
        for _ in range(3):  # the second call is recorded
            x, state = layer.xp.ones((T, B, 4), "float16"), layer.xp.ones((1, B, 11), "float16")
            output, final, backward = layer.forward(x, state)
            dx, dstate = backward(layer.xp.ones((T, B, 11), "float16"), 3 * state)
            assert output.shape == (T, B, 11) and dx.shape == x.shape
            assert (final.get() == 1).all() and (dstate.get() == 3).all()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, forced):
    """Each with one cell; what differs between cells is in the sizes above."""
    forced(32, 32, 1)
    options = OPTIONS[option] | ({} if "hidden_size" in OPTIONS[option] else {"H": 11})
    for kind, dtype in [("lstm", "float16"), ("gru", "bfloat16")][list(OPTIONS).index(option) % 2 :][:1]:
        compare(kind, cuda_ops(), dtype, 4, 3, True, option != "learned state", **options, schedule="fused")


def test_heads(forced):
    """Heads are to a schedule what directions are."""
    forced(32, 32, 1)
    compare("lstm", cuda_ops(), "float16", 3, 3, True, H=14, heads=2, bidirectional=True, schedule="fused")


@pytest.mark.parametrize("arch", [80, 120])
def test_gpus_without_dependent_launches(arch, forced):
    """And 80 without clusters: nothing there waits for the launch before."""
    forced(32, 32, 1)
    compare("gru", cuda_ops(arch=arch), "float16", 3, 3, True, H=11, schedule="fused")


def test_two_runs_give_equal_bits_and_so_do_graphs(forced):
    """Longer than a graph holds, so that one is launched again."""
    forced(32, 32, 1)
    reference, runs = build("gru", "numpy", "float64", H=11), []
    batch = Batch(reference, 67, 2, ragged=True)
    for order in ("ascending", "random"):
        ops = cuda_ops(**THREAD_ORDERS[order], checked=False)
        layer = build("gru", ops, "float16", H=11, schedule="fused")
        runs += [batch.run(layer) for _ in range(3)]  # launch by launch, recorded, and the same graphs again
        assert {entry["recorded"] for entry in ops.recordings()} == {True}
    for other in runs[1:]:
        for name, value in runs[0].items():
            np.testing.assert_array_equal(other[name], value)


def test_it_is_the_schedule_that_runs(forced, monkeypatch):
    """A launch for each timestep, all but the first dependent, and one GEMM, at the end of backward."""
    forced(32, 32, 1)
    ops, launched = cuda_ops(), []
    load, product = ops.device.load, ops.device.product

    def noted(file, expression, struct=None):
        run = load(file, expression, struct)

        def launch(grid, block, args, **options):
            launched.append((expression.partition("<")[0], options.get("dependent", False)))
            run(grid, block, args, **options)

        return launch

    def noted_product(a, b, out, accumulate=False, tf32=False):
        if accumulate and out.shape == (9, 11):
            launched.append("product")
        return product(a, b, out, accumulate, tf32)

    monkeypatch.setattr(ops.device, "load", noted)
    monkeypatch.setattr(ops.device, "product", noted_product)
    compare("lstm", ops, "float16", 3, 9, H=11, schedule="fused")
    found = [entry for entry in launched if entry == "product" or entry[0].startswith(("fused", "to_", "step"))]
    forward, backward = ([(f"fused_{name}", k > 0) for k in range(3)] for name in ("forward", "backward"))
    panels = ("to_panels", False)
    assert found == [panels, panels, *forward, panels, *backward, "product"]


SYNC = "__syncthreads();  // all copies of stage k are there, and all warps have read the stage before it"
MUTATIONS = {  # planted error -> edits
    "no wait for the launch before": [('asm volatile("griddepcontrol.wait;" ::: "memory");', "")],
    "vectors before the wait": [
        ("if (k < count) copy_weights(k);", "if (k < count) copy_weights(k), copy_vectors(k);"),
    ],
    "no barrier of a stage": [(SYNC, "")],
    "a group too few": [("wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();")],
    "stages that overlap": [("memory + k % STAGES * stage_bytes", "memory")],
    "sums over stages still read": [("wait_for_copies<0>();\n        __syncthreads();", "wait_for_copies<0>();")],
    "no barrier behind the sums": [("meet<C>();  // all sums are there", "")],
    "a block that leaves": [("if (C > 1) meet<C>();", "")],
    "a panel left out": [("count(panels * (rank + 1) / C - first)", "count(panels * (rank + 1) / C - first - 1)")],
    "a block left out": [("int rank = 0; rank < C; rank++) total", "int rank = 1; rank < C; rank++) total")],
    "pieces in order": [("row * 128 + (piece ^ row % 8) * 16", "row * 128 + piece * 16")],
    "one slot in forward": [("((1 - s % 2) * gridDim.z", "(s % 2 * gridDim.z")],
    "one slot in backward": [("((1 - count % 2) * gridDim.z", "(count % 2 * gridDim.z")],
    "rows of another gate": [("row % (Q * U) / U;", "row / U % Q * 0;")],
    "the edge of panels": [("within < count && across < width", "within < count")],
    "gates of d side by side": [("k * panels * Panels<T, PARTS>::columns + j", "k * H + j")],
    "dh without what it was": [("complete[n] += product.sum", "complete[n] = product.sum")],
    "dh of another unit": [("sum(threadIdx.x % U, Turn", "sum((threadIdx.x + 1) % U, Turn")],
    "lengths forgotten": [("if (now[n].held) {\n                h_next", "if (false) {\n                h_next")],
}  # fmt: skip
CHECKED = []


def errors(edits):
    """What is wrong with a layer, in two orders of threads, one after another."""
    for order in (THREAD_ORDERS["random"], THREAD_ORDERS["interrupted"]):
        try:
            ops = cuda_ops(edits=edits, **order)
            with np.errstate(invalid="ignore", over="ignore"):  # what a planted error leaves may be no number
                compare("gru", ops, "float32", 3, 3, ragged=True, H=35, schedule="fused", precision="tf32")
        except (AssertionError, emulator.KernelError) as error:
            yield error


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation, forced):
    forced(32, 32, 2)
    edits = MUTATIONS[mutation]
    assert all(kernel_source("fused.cu").count(old) == 1 for old, _ in edits)
    if not CHECKED:
        assert not list(errors([]))
        CHECKED.append("right without an error")
    assert next(errors(edits), None)


@pytest.mark.parametrize("part", ["_finish", "_start"])
def test_what_comes_before_and_behind_the_launches_counts(part, forced, monkeypatch):
    forced(32, 32, 1)
    monkeypatch.setattr(FusedPass, part, lambda self: None)
    with pytest.raises((AssertionError, emulator.KernelError)):
        compare("gru", cuda_ops(), "float16", 2, 3, H=11, schedule="fused")


def test_where_the_device_refuses_a_launch_of_clusters_step_does_it(forced, monkeypatch):
    forced(32, 32, 2)
    ops = cuda_ops()
    load = ops.device.load

    def refusing(file, expression, struct=None):
        def launch(*args, **options):
            raise BackendError("no clusters here")

        return launch if expression.startswith("fused") else load(file, expression, struct)

    monkeypatch.setattr(ops.device, "load", refusing)
    compare("gru", ops, "float16", 4, 3, ragged=True, H=70, schedule="fused")
    assert not ops.device.limits.clusters and ops.device.limits.cooperative


# ---- the choice


def problem(kernel="lstm", H=1024, B=128, dtype="bfloat16", backward=False, **more):
    more = {"T": 512, "directions": 1, "projected": False} | more
    return Problem(RECORDS[kernel], H, B=B, dtype=dtype, backward=backward, **more)


KERNELS = "rnn_tanh", "lstm", "gru"
SOME, MORE = (("bfloat16", 1024, 128), ("float32", 1024, 128)), (("tf32", 1024, 256), ("float32", 650, 20))


@pytest.mark.parametrize("cases", [SOME, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_tiles_that_are_offered_do_not_spill(cases):
    offered = {}
    for kernel, (dtype, H, B), backward in itertools.product(KERNELS, cases, (False, True)):
        dtype, options = precision(dtype)
        asked = problem(kernel, H, B, dtype, backward, tf32=bool(options))
        found = schedules.fused_candidates(asked, H100)
        for tile in found[: 2 if cases is MORE else 1]:
            offered[kernel_of(asked, tile)[1]] = asked, tile
    assert len(offered) > 5
    check_spills("fused.cu", offered, 90, H100)


@pytest.mark.parametrize("arch", [100, 120])
def test_clusters_compile_for_later_gpus_too(arch):
    """The gate has the tiles of one thread block, for all architectures."""
    device = Device(arch, 132, (99 if arch == 120 else 227) * 1024)
    asked = [problem(backward=backward) for backward in (False, True)]
    chosen = {
        kernel_of(one, tile)[1]: (one, tile) for one in asked for tile in schedules.fused_candidates(one, device)[:1]
    }
    assert len(chosen) == 2 and all(tile.waits for _, tile in chosen.values())
    check_spills("fused.cu", chosen, arch, device)


def test_what_fits_and_what_is_chosen():
    """Weights that fit on no GPU at once are multiplied by whichever of step and fused should be faster."""
    for dtype, H, B in (("bfloat16", 2048, 64), ("float32", 2048, 64), ("tf32", 4096, 32)):
        dtype, options = precision(dtype)
        for backward in (False, True):
            asked = problem("lstm", H, B, dtype, backward, tf32=bool(options))
            candidate, reason = schedules.choose(asked, H100, "fused")
            assert isinstance(candidate, Fused) and candidate.shared <= H100.shared_bytes
            assert "units and" in reason and "step: 512 timesteps" in reason
            assert schedules.hold_less(asked, candidate, H100) is None
    assert schedules.choose(problem(dtype="float32"), H100)[0].schedule == "fused"
    alone = schedules.candidates(problem(), Device(89, 128, 99 * 1024))[0]
    assert {one.numbers[2] for one in alone if one.schedule == "fused"} == {1}


def test_shared_memory_holds_the_stages_and_then_the_sums():
    """The sums, float [R, rows + 4], take the place of the stages, and may need more room than two of them."""
    more = 0
    for U, R in itertools.product((16, 32, 64), (32, 64, 128)):
        tile = schedules.fused_tile(problem("lstm"), H100, U, R, 1, 2)
        if tile is not None:
            stages, sums = 2 * 128 * (4 * U + R), 4 * R * (4 * U + 4)
            assert tile.shared >= max(stages, sums)
            more += sums > stages
    assert more


@pytest.mark.parametrize("change, reason", [
    ({"device": Device(75, 40, 64 * 1024)}, "tensor cores of compute capability 8.0 or later"),
    ({"dtype": "float32", "fma": True}, "precision='fma' asks for multiply-adds"),
    ({"dtype": "float64"}, "computes in float32"),
    ({"projected": True}, "has no projection"),
    ({"kernel": "gru_original"}, "has no second product in a timestep"),
])  # fmt: skip
def test_who_is_refused_is_told_why(change, reason):
    sizes = {name: value for name, value in change.items() if name != "device"}
    with pytest.raises(ValueError, match=f"^schedule: fused.*{reason}"):
        schedules.choose(problem(**sizes), change.get("device", H100), "fused")


@pytest.mark.parametrize("kind, dtype", [("lstm", "float32"), ("gru", "float16")])
def test_the_bytes_of_a_pass_are_those_of_its_arrays_and_stand_in_the_plan(kind, dtype, forced):
    forced(32, 32, 1)
    ops = cuda_ops(checked=False)
    layer = build(kind, ops, dtype, H=70, bidirectional=True, schedule="fused")
    layer(ops.xp.zeros((4, 33, 4), dtype))
    assert not any(loop.fused for _, loop in ops.pool.free.values())
    for _ in range(2):
        layer.forward(ops.xp.zeros((4, 33, 4), dtype))[2](None)
    ((_, loop),) = ops.pool.free.values()
    found = {}
    for name, one in loop.fused.items():
        found[name] = FusedPass.nbytes(loop.candidates[name], loop.problems[name])
        assert found[name] == one.weights.nbytes + one.vectors.nbytes
    assert set(found) == {"forward", "backward"} and layer.plan(4, 33).packed_bytes == max(found.values())
    arrays = [loop.h, loop.output, loop.output, loop.gates, *([loop.others] if kind == "lstm" else [])]
    assert loop.nbytes == sum(array.nbytes for array in arrays) + sum(found.values())  # doutput is as output


@gpurnn.cell(gates="a b c d e f g")
def seven(ax, ah, s):
    sums = (tanh(getattr(ax, gate) + getattr(ah, gate)) for gate in "abcdefg")
    return sum(sums) * (1 / 7)


def test_cells_of_which_no_tile_fits_are_refused():
    """Forward a tile holds all gates of its units, and these GPUs have 99 KB of shared memory."""
    small, refused = Device(89, 128, 99 * 1024), "fused: a tile of 16 units, with the 7 gates .* does not fit into"
    asked = Problem(seven, 64, 50, 16, 1, "float32", False, False)
    assert re.match(refused, schedules.candidates(asked, small)[1]["fused"])
    with pytest.raises(ValueError, match=f"schedule: {refused}"):
        schedules.choose(asked, small, "fused")
    assert schedules.choose(asked, H100, "fused")[0].schedule == "fused"
    assert schedules.choose(replace(asked, backward=True), small, "fused")[0].schedule == "fused"
