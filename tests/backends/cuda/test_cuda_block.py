"""The schedule ``block``: one thread block walks all of time. Executed on the CPU as test_cuda_layers.py does, and
compared with NumPy to the same tolerance; and its tiles, which must fit."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import THREAD_ORDERS, check_spills, compare, cuda_ops

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.loop import Loop
from gpurnn.backends.cuda.loop_plan import LoopShape
from gpurnn.backends.cuda.schedules import Block, Device, Problem, cost, step
from gpurnn.backends.cuda.schedules.tuned_table import Table, key
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS as RECORDS
from gpurnn.check import OPTIONS, Batch, build, twins

pytestmark = pytest.mark.emulated

CELLS = ("rnn tanh", "rnn relu", "lstm", "gru")
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = {"forward": {}, "bidirectional": {"bidirectional": True}, "reverse": {"reverse": True}}
TF32 = {"precision": "tf32"}
ACROSS = [  # T, B, H, sequences of a tile / 8, I, tiles in registers, x within the launch, direction, ragged, cells
    (33, 1, 31, 1, 1, 0, True, "forward", False, ("gru", "rnn tanh", "gru")),
    (2, 7, 64, 2, 6, 7, False, "bidirectional", True, ("rnn tanh", "lstm", "rnn tanh")),
    (5, 8, 33, 1, 11, 14, True, "reverse", False, ("lstm", "gru", "lstm")),
    (1, 9, 128, 2, 16, 21, False, "forward", True, ("gru", "rnn tanh", "gru")),
    (2, 17, 65, 1, 21, 28, True, "bidirectional", False, ("rnn tanh", "lstm", "rnn tanh")),
    (5, 17, 32, 2, 26, 5, False, "reverse", True, ("lstm", "gru", "lstm")),
    (33, 8, 1, 2, 31, 12, True, "forward", False, ("gru", "rnn tanh", "gru")),
]
ACROSS_DTYPES = ("float16", "bfloat16", "tf32")  # in the order of the cells
ACROSS_CASES = [
    pytest.param(dtype, kind, *size, id=f"{dtype}-{kind}-T{size[0]}-B{size[1]}-H{size[2]}")
    for *size, kinds in ACROSS
    for dtype, kind in zip(ACROSS_DTYPES, kinds, strict=True)
]
KERNELS = "rnn_tanh", "lstm", "gru"


def only(monkeypatch, tile):
    """Every block has the tile ``tile(problem, HP)``."""

    def block_candidates(problem, device):
        return [tile(problem, -(-problem.H // 32) * 32)]

    schedules.candidates.cache_clear()
    monkeypatch.setitem(schedules.FINDERS, "block", block_candidates)


def forced(monkeypatch, S, KREG, R, inputs=False):
    """inputs: W_ih x is made within the launch."""

    def tile(problem, HP):
        IP = cost.padded(problem.I, 4) if inputs and not problem.backward else 0
        return schedules.fma_tile(problem, HP, S, min(KREG, HP // S), R, IP=IP)

    only(monkeypatch, tile)


@pytest.fixture(autouse=True)
def forget():
    """What a test has forced is not remembered."""
    yield
    schedules.candidates.cache_clear()


SIZES = (  # T, B, H, ragged, bidirectional
    (1, 1, 1, False, False), (3, 7, 32, True, False), (5, 9, 7, False, True), (2, 3, 33, True, False),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CELLS)
def test_sizes(kind, dtype):
    """Every size in float32; half of them in 16 bits, the other half in the other dtype and with the next cell."""
    ops, which = cuda_ops(), CELLS.index(kind) + DTYPES.index(dtype)
    for T, B, H, ragged, bidirectional in SIZES if dtype == "float32" else SIZES[which % 2 :: 2]:
        compare(kind, ops, dtype, T, B, ragged, H=H, bidirectional=bidirectional, schedule="block")


TILED_H = (1, 31, 32, 33, 64, 65, 128)
TILED_DTYPES = {  # T -> the dtype for each H of TILED_H
    1: ("float16", "bfloat16", "float32", "float16", "bfloat16", "float32", "float16"),
    2: ("bfloat16", "float32", "float16", "bfloat16", "float32", "float16", "bfloat16"),
    5: ("float32", "float16", "bfloat16", "float32", "float16", "bfloat16", "float32"),
    33: ("float16", "bfloat16", "float32", "float16", "bfloat16", "float32", "float16"),
}
TILED_B = {  # B -> direction, whether ragged
    1: ("forward", False), 7: ("bidirectional", True), 8: ("reverse", False), 9: ("bidirectional", False),
    17: ("forward", True),
}  # fmt: skip


CROSSED = ("rnn tanh", "lstm", "gru")


def crossing(kind):
    """Which T, B, H a cell runs: every three that an emulator's patience allows are those of one of the cells, every
    two that may occur together do so in each cell."""
    sizes = [
        size
        for size in itertools.product(TILED_DTYPES, TILED_B, TILED_H)
        if math.prod(size) <= 2500 or size == (5, 9, 128)
    ]
    chosen, pairs = sizes[CROSSED.index(kind) :: len(CROSSED)], set()
    for size in [*chosen, *sizes]:
        two = set(itertools.combinations(enumerate(size), 2))
        if not two <= pairs and size not in chosen:
            chosen.append(size)
        pairs |= two
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("kind", CROSSED)
def test_sizes_that_cross_tiles(kind):
    ops = cuda_ops(checked=False)
    for T, B, H in crossing(kind):
        (direction, ragged), dtype = TILED_B[B], TILED_DTYPES[T][TILED_H.index(H)]
        compare(kind, ops, dtype, T, B, ragged, H=H, schedule="block", **DIRECTIONS[direction])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, kind, T, B, H, N, I, held, inputs, direction, ragged", ACROSS_CASES)
def test_sizes_that_cross_tiles_on_tensor_cores(
    dtype, kind, T, B, H, N, I, held, inputs, direction, ragged, monkeypatch
):
    """Sequences and units that fill tiles of 8 and 16 or not; each cell with each dtype and each size of tile."""
    tensor_cores(monkeypatch, held, N, inputs=inputs)
    more = DIRECTIONS[direction] | {"H": H, "I": I, "schedule": "block"}
    dtype, more = ("float32", more | TF32) if dtype == "tf32" else (dtype, more)
    compare(kind, cuda_ops(checked=False), dtype, T, B, ragged, **more)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_every_option(kind, option, ragged):
    compare(kind, cuda_ops(), "float32", 5, 3, ragged, option != "learned state", **OPTIONS[option], schedule="block")


def tensor_cores(monkeypatch, held, N=1, inputs=False):
    """Every block runs on tensor cores, with so many tiles in registers and 8 N sequences."""

    def tile(problem, HP):
        size = problem.multiplied_bytes
        IP = cost.padded(problem.I, 32 * problem.parts // size) if inputs and not problem.backward else 0
        return schedules.mma_tile(problem, HP, min(held, problem.gates * (HP + IP) * size // 32), N, IP=IP)

    only(monkeypatch, tile)


TILE_CASES = [  # cell, (slices, registers, sequences), dtype
    ("lstm", (2, 0, 1), "float32"), ("gru", (2, 8, 2), "float16"), ("rnn tanh", (4, 4, 4), "bfloat16"),
    ("lstm", (8, 4, 2), "float32"), ("gru", (8, 0, 4), "float16"), ("rnn tanh", (2, 16, 4), "bfloat16"),
]  # fmt: skip
EVERY_TILE = [
    ((2, 0, 1), "float32"), ((2, 8, 2), "float32"), ((4, 4, 4), "float32"), ((8, 4, 2), "bfloat16"),
    ((8, 0, 4), "float32"), ((2, 16, 4), "float16"),
]  # fmt: skip


@pytest.mark.parametrize("kind, tile, dtype", TILE_CASES)
def test_tiles(kind, tile, dtype, monkeypatch):
    """Weights in registers, in shared memory, in both; more slices than sequences and fewer."""
    forced(monkeypatch, *tile)
    compare(kind, cuda_ops(), dtype, 3, 5, ragged=True, bidirectional=True, schedule="block")


TENSOR_SIZES = [  # tiles in registers, H, N, orders of threads: in both directions, forward
    (0, 7, 1, ("ascending", "random")),
    (1, 32, 2, ("random", "interrupted")),
    (5, 33, 2, ("interrupted", "ascending")),
    (99, 40, 1, ("ascending", "random")),
]
TENSOR_CASES = [  # each cell and each type of product with each size, not all three in every combination
    pytest.param(kind, dtype, *size, id=f"{kind}-{dtype}-{size[0]}-H{size[1]}")
    for kind, dtype, sizes in (
        ("lstm", "float16", TENSOR_SIZES[::2]), ("lstm", "tf32", TENSOR_SIZES[1::2]),
        ("lstm", "float32", TENSOR_SIZES[:1]), ("gru", "float32", TENSOR_SIZES[1:2]),
        ("rnn tanh", "float32", TENSOR_SIZES[2:]),
        ("gru", "tf32", TENSOR_SIZES[::2]), ("gru", "bfloat16", TENSOR_SIZES[1::2]),
        ("rnn tanh", "float16", TENSOR_SIZES[1::2]), ("rnn relu", "bfloat16", TENSOR_SIZES[::2]),
    )
    for size in sizes
]  # fmt: skip


@pytest.mark.parametrize("kind, dtype, held, H, N, orders", TENSOR_CASES)
def test_tensor_cores(kind, dtype, held, H, N, orders, monkeypatch):
    """Tiles in registers, in shared memory, in both; odd H, H that fills the tiles; more sequences than a tile has."""
    tensor_cores(monkeypatch, held, N)
    dtype, more = ("float32", TF32) if dtype == "tf32" else (dtype, {})
    for B, order, both in zip((3, 8 * N + 1), orders, (True, False), strict=True):
        ops = cuda_ops(**THREAD_ORDERS[order])
        compare(kind, ops, dtype, 3, B, ragged=True, bidirectional=both, H=H, schedule="block", **more)


def launches(ops, monkeypatch):
    """The name expressions of all launches from now on."""
    launched, launch = [], ops.kernels.launch

    def recorded(file, kernel, types, *args, **more):
        launched.append(f"{kernel}<{', '.join(types)}>")
        return launch(file, kernel, types, *args, **more)

    monkeypatch.setattr(ops.kernels, "launch", recorded)
    return launched


INPUTS = [  # the cell; dtype; I; H; sequences of a tile; weights in registers; orders of threads
    ("gru", "float32", 6, 7, 2, 4, ("random", "interrupted")),
    ("lstm", "bfloat16", 1, 33, 4, 0, ("ascending", "random")),
    ("rnn tanh", "float32", 32, 7, 1, 4, ("random", "interrupted")),
    ("gru", "bfloat16", 5, 33, 8, 3, ("ascending", "random")),
    ("lstm", "float16", 32, 40, 16, 99, ("ascending", "random")),
    ("rnn relu", "bfloat16", 17, 31, 8, 99, ("ascending", "random")),
    ("lstm", "tf32", 9, 33, 8, 0, ("ascending", "random")),
    ("gru", "tf32", 8, 32, 16, 5, ("interrupted", "ascending")),
    ("lstm", "float32", 9, 33, 8, 5, ("random", "ascending")),
    ("gru", "float32", 17, 32, 16, 99, ("ascending", "interrupted")),
]


@pytest.mark.parametrize("kind, dtype, I, H, rows, held, orders", INPUTS)
def test_the_input_within_the_launch(kind, dtype, I, H, rows, held, orders, monkeypatch):
    """W_ih x as more columns of the walk's own product: no product before it, sizes that do not fill four or a tile."""
    if rows < 8:
        forced(monkeypatch, 4, held, rows, inputs=True)
    else:
        tensor_cores(monkeypatch, held, rows // 8, inputs=True)
    dtype, more = ("float32", TF32) if dtype == "tf32" else (dtype, {})
    for B, order, direction in zip((3, rows + 1), orders, ("bidirectional", "reverse"), strict=True):
        ops = cuda_ops(**THREAD_ORDERS[order])
        launched = launches(ops, monkeypatch)
        options = more | DIRECTIONS[direction] | {"H": H, "I": I, "schedule": "block"}
        compare(kind, ops, dtype, 4, B, ragged=direction == "bidirectional", **options)
        (name,) = [name for name in launched if "forward" in name]
        IP = int(name.removesuffix(">").split(", ")[-1 if rows < 8 else -3])
        assert I <= IP < I + (4 if rows < 8 else 16)


def test_the_input_within_a_loop_that_is_recorded(monkeypatch):
    """Forward by block with W_ih x, back by step: replayed with other inputs; without a way back nothing is kept."""

    def block_candidates(problem, device):
        return "one way only" if problem.backward else [schedules.fma_tile(problem, 32, 4, 4, 2, IP=4)]

    schedules.candidates.cache_clear()
    monkeypatch.setitem(schedules.FINDERS, "block", block_candidates)
    monkeypatch.setitem(schedules.FINDERS, "grid", lambda problem, device: "not here")
    monkeypatch.setattr(step, "STEP_SECONDS", 1.0)
    ops = cuda_ops()
    layer, _, exact = twins("gru", ops, "float32", schedule="auto")
    once, _, _ = twins("gru", cuda_ops(graphs=0), "float32", schedule="auto")
    for call in range(3):
        batch = Batch(exact, 4, 3, ragged=True, seed=call)
        got, expected = batch.run(layer), batch.run(once)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value, err_msg=f"{name}, call {call}")
    (key, loop), *_ = ops.pool.free.values()
    assert loop.recorded and loop.inputs == 4 and loop.graphs
    shape = LoopShape(4, 3, 4, 7, 7, "float32", (False,), False, False, False, "auto")
    inference = Loop(ops, ops.loop_plan(loop.cell, shape))
    assert inference.inputs == 4 and inference.gates is None


@pytest.mark.parametrize("schedule", ["block", "step"])
@pytest.mark.parametrize("kind", [*CELLS, "lstm projected", "gru original"])
def test_tf32(kind, schedule, monkeypatch):
    """Products of numbers rounded to tf32, and only those: as far from exact as float16's, further than float32's."""
    if schedule == "block":
        if kind not in CELLS:
            return
        tensor_cores(monkeypatch, 3)
    ops = cuda_ops()
    compare(kind, ops, "float32", 5, 9, ragged=True, bidirectional=True, num_layers=2, schedule=schedule, **TF32)
    layer, _, exact = twins(kind, ops, "float32", schedule=schedule, **TF32)
    strict, _, _ = twins(kind, ops, "float32", schedule="step")
    batch = Batch(exact, 5, 9, ragged=True)
    expected, rounded, plain = (batch.run(one) for one in (exact, layer, strict))
    for name in ("output", "dx", "d weight_hh_l0", "d weight_ih_l0"):
        far, near = (np.abs(got[name] - expected[name]).max() for got in (rounded, plain))
        assert far > 20 * near, name


@pytest.mark.slow
@pytest.mark.parametrize("tile, dtype", EVERY_TILE)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn tanh"])
def test_every_tile(kind, tile, dtype, monkeypatch):
    forced(monkeypatch, *tile)
    for order in THREAD_ORDERS.values():
        compare(kind, cuda_ops(**order), dtype, 3, 5, True, bidirectional=True, schedule="block")


@pytest.mark.parametrize("arch, dtype", [(75, "float16"), (80, "bfloat16"), (90, "float32"), (120, "float32")])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_architectures_and_orders(kind, arch, dtype):
    for order in THREAD_ORDERS.values():
        compare(kind, cuda_ops(arch=arch, **order), dtype, 3, 5, ragged=True, bidirectional=True, schedule="block")


@pytest.mark.parametrize("kind", CELLS)
def test_it_is_the_schedule_that_runs_and_inference_is_forward(kind, monkeypatch):
    ops = cuda_ops()
    launched = launches(ops, monkeypatch)
    layer, _, exact = twins(kind, ops, "float32", bidirectional=True, schedule="block")
    batch = Batch(exact, 4, 5, ragged=True)
    x = layer.xp.asarray(batch.x.astype("float32"))
    for _ in range(3):  # a shape that comes back needs no recording: it is one launch
        output, state, _ = layer.forward(x, lengths=batch.lengths)
        again, state_again = layer(x, lengths=batch.lengths)
        np.testing.assert_array_equal(output.get(), again.get())
        one, two = (leaf if isinstance(leaf, tuple) else (leaf,) for leaf in (state, state_again))
        for mine, other in zip(one, two, strict=True):
            np.testing.assert_array_equal(mine.get(), other.get())
    assert launched and all(name.startswith("block_") for name in launched) and ops.pool.pooled == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_empty_batch_and_no_steps(dtype):
    for (T, B), kind in itertools.product(((0, 2), (3, 0), (0, 0)), CELLS):
        compare(kind, cuda_ops(), dtype, T, B, schedule="block")


def test_two_runs_give_equal_bits():
    for kind in CELLS:
        runs = []
        for order in THREAD_ORDERS.values():
            layer = build(kind, cuda_ops(**order), "float32", bidirectional=True, schedule="block")
            batch = Batch(build(kind, "numpy", "float64", bidirectional=True), 5, 3, ragged=True)
            runs.append(batch.run(layer))
        for other in runs[1:]:
            for name, value in runs[0].items():
                np.testing.assert_array_equal(other[name], value)


SYNC = "__syncthreads();"
RUN = "DEVICE bool run(Alone&, const Position&) {"
AX = "load_ax(t + on, skip(here.gates, here.move, here.gates_row))"
MUTATIONS = {  # planted error -> layer, piece of the source, what it becomes
    "no barrier behind the sums": ("lstm", f"HP + j] = part[g][r];\n        }}\n        {SYNC}",
                                   "HP + j] = part[g][r]; }"),
    "no barrier behind h": ("lstm", f"inputs.commit(x_shared);\n        {SYNC}", "inputs.commit(x_shared);"),
    "no barrier behind d": ("gru", f"{RUN}\n        {SYNC}", RUN),
    "no barrier behind the sums, back": ("gru", f"HP + j] = sum;\n        }}\n        {SYNC}", "HP + j] = sum; }"),
    "a slice left out": ("lstm", "int slice = 0; slice < S; slice++) sum += from[(",
                         "int slice = 1; slice < S; slice++) sum += from[("),
    "sums of another unit": ("gru", "HP + j;\n        float sum = 0.0f;", "HP + 1;\n        float sum = 0.0f;"),
    "columns of another slice": ("lstm", "column = thread / HP * KS + k", "column = (S - 1 - thread / HP) * KS + k"),
    "weights not transposed": ("rnn tanh", "row) * H + column, H, column", "column) * H + row, 1, column"),
    "units past H": ("rnn relu", "rank < B && j < H", "rank < B"),
    "another sequence's place": ("gru", "-1 : order ? order[rank] : rank", "-1 : rank"),
    "length off by one": ("lstm", f"if (lives(k, t)) {{\n{'float h_new':>27}",
                          "if (t <= pos.length[k]) { float h_new"),
    "the tile ends early": ("lstm", "longest = steps > longest ? steps : longest", "longest = 1"),
    "slot of the reverse direction": ("gru", "t, pos.reversed ? 0 : T_, false)", "t, T_, false)"),
    "from the last step to the first": ("lstm", "forward != pos_.reversed ? B : -B", "forward ? B : -B"),
    "another sequence's numbers": ("gru", "skip(at, pos.sequence[k], size)", "skip(at, k, size)"),
    "dgates for gates": ("gru", "here.move_on();\n        t += on;\n        if (t != end) load_ahead(t);",
                         "t += on; if (t != end) load_ahead(t); here.move_on();"),
    "ax of the first step": ("gru", AX, "if (false) {}"),
    "ax of the step itself": ("rnn tanh", AX, "load_ax(t + on, here.gates)"),
    "unpacked in another order": ("lstm", "low.x, low.y, high.x", "low.y, low.x, high.x"),
    "x too early": ("lstm", "if (sends) product.prefetch(t + on)", "if (sends) product.prefetch(t)"),
    "x before the last was read": ("lstm", "float part[SUMS][R] = {};",
                                   "inputs.commit(x_shared); float part[SUMS][R] = {};"),
    "W_ih x of n within r": ("gru", "return g < first_apart<Cell> ? g : Q + g - first_apart<Cell>;", "return g;"),
    "x of another place": ("gru", "(size_t)(order ? order[rank] : rank) * I", "(size_t)rank * I"),
}  # fmt: skip


MMA_MUTATIONS = {
    "no barrier behind h": ("lstm", f"reads + HP, stride, apart);\n        {SYNC}", "reads + HP, stride, apart);"),
    "no barrier behind d": ("gru", f"staged = buffer_size - staged;\n        {SYNC}", "staged = buffer_size - staged;"),
    "no start": ("lstm", "product.next(channel);\n        }\n    }\n\n    // One", "} }\n    // One"),
    "one buffer": ("lstm", "hx_shared + (buffer_size - reads) + pos", "hx_shared + reads + pos"),
    "another row of the fragment": ("gru", "tile / Q * K + pos.lane % 4 * P", "tile / Q * K + pos.lane / 4 * P"),
    "another row, backward": ("gru", "% (HP / K) * K + pos.lane % 4 * P", "% (HP / K) * K + pos.lane / 4 * P"),
    "sequences of another column": ("lstm", "e = u * 2 + n % 2", "e = u * 2 + 1 - n % 2"),
    "units of another row": ("gru", "i = u * 2 + n % 2", "i = 2 - u * 2 + n % 2"),
    "a chain left out": ("rnn tanh", "k = 0; k < chains; k++) low += sums", "k = 1; k < chains; k++) low += sums"),
    "weights not transposed": ("lstm", "row) * H + unit;", "unit) * H + row;"),
    "the last unit of an odd H": ("gru", "if (has(1, H)) to[1] =", "to[1] ="),
    "one unit twice": ("gru", "u ? unpack(stored, T()).y :", "u ? unpack(stored, T()).x :"),
    "x too early": ("lstm", "if (sends) product.prefetch(t + on)", "if (sends) product.prefetch(t)"),
    "x before the last was read": ("lstm", "input.commit(hx_shared + reads",
                                   "input.commit(hx_shared + (buffer_size - reads)"),
    "W_ih x of n within r": ("gru", "k >= KT && g >= first_apart<Cell> ? Q + g - first_apart<Cell> : g", "g"),
    "columns of W_ih past I": ("rnn tanh", "unit < H && column + i < I ?", "unit < H ?"),
}  # fmt: skip


def errors(kind, dtype, B, H, edits):
    """What is wrong with a layer, in two orders of threads, one after another."""
    for order in ("ascending", "random"):
        try:
            ops = cuda_ops(edits=edits, **THREAD_ORDERS[order])
            with np.errstate(invalid="ignore", over="ignore"):  # what a planted error leaves may be no number
                compare(kind, ops, dtype, 5, B, ragged=True, bidirectional=True, H=H, schedule="block")
        except (AssertionError, emulator.KernelError) as error:
            yield error


RIGHT = set()  # cases that are known to be right without the planted error: many errors share one
PLANTED = [("block.cu", name) for name in MUTATIONS] + [("block_mma.cu", name) for name in MMA_MUTATIONS]


@pytest.mark.parametrize("file, mutation", PLANTED)
def test_a_planted_error_is_seen(file, mutation, monkeypatch):
    if file == "block.cu":
        kind, old, new = MUTATIONS[mutation]
        sequences = 8 if "numbers" in mutation else 2
        inputs = not mutation.startswith("ax")
        forced(monkeypatch, 4, 4, sequences, inputs=inputs)
        case = kind, "bfloat16" if "unpacked" in mutation else "float32", 5, 7
    else:
        kind, old, new = MMA_MUTATIONS[mutation]
        sequences, inputs = 16, True
        tensor_cores(monkeypatch, 3, N=2, inputs=inputs)
        case = kind, "bfloat16", 9, 33
    assert kernel_source(file).count(old) == 1
    known = file, case, sequences, inputs
    if known not in RIGHT:
        assert not list(errors(*case, edits=[]))
        RIGHT.add(known)
    assert next(errors(*case, edits=[(old, new)]), None)


THIRDS_MUTATIONS = {  # where floats are three bfloat16 numbers each
    "without the lower thirds": ("sum + join_thirds(high[n / 2][g][e], low)", "sum + high[n / 2][g][e]"),
    "without them, back": ("join_thirds(high[n / 2][i], sum)", "high[n / 2][i]"),
    "one third for all": ("operand[p] = load_matrices(operands + p * apart", "operand[p] = load_matrices(operands"),
}


@pytest.mark.parametrize("mutation", THIRDS_MUTATIONS)
def test_a_planted_error_in_thirds_is_seen(mutation, monkeypatch):
    tensor_cores(monkeypatch, 3)
    assert kernel_source("block_mma.cu").count(THIRDS_MUTATIONS[mutation][0]) == 1
    assert next(errors("rnn tanh", "float32", 3, 33, edits=[THIRDS_MUTATIONS[mutation]]), None)


# ---- the choice


DEVICES = {
    75: Device(75, 40, 64 * 1024),
    80: Device(80, 108, 163 * 1024),
    89: Device(89, 128, 99 * 1024),
    90: Device(90, 132, 227 * 1024),
}


def block(problem, device):
    """The best tile by estimate, or why there is none."""
    found = schedules.block_candidates(problem, device)
    return found if isinstance(found, str) else min(found, key=lambda tile: tile.seconds)


def problem(kernel="lstm", H=128, B=16, dtype="float32", backward=False, directions=1, projected=False, I=0):
    return Problem(RECORDS[kernel], H, 512, B, directions, dtype, projected, backward, I=I)


@pytest.mark.parametrize("arch", [75, 90, pytest.param(80, marks=pytest.mark.slow)])
def test_tiles_that_are_chosen_do_not_spill(arch):
    names = {}
    for kernel, dtype, H, B, backward in itertools.product(
        KERNELS, ("float32", "bfloat16"), (128, 192, 288), (1, 2000), (False, True)
    ):
        for tf32 in (False, True) if dtype == "float32" else (False,):
            asked = dataclasses.replace(problem(kernel, H, B, dtype, backward, I=32), tf32=tf32)
            found = schedules.block_candidates(asked, DEVICES[arch])
            for inputs in (False, True) if H == 128 else (False,):
                some = [] if isinstance(found, str) else [tile for tile in found if bool(tile.inputs) == inputs]
                if some:
                    best = min(some, key=lambda tile: tile.total(512))
                    file, expression, _ = kernel_of(asked, best)
                    names.setdefault(file, {})[expression] = asked, best
    for name, chosen in names.items():
        assert len(chosen) > 7
        check_spills(name, chosen, arch, DEVICES[arch])


def test_what_fits():
    device = DEVICES[90]
    largest = {"lstm": (128, 192), "gru": (160, 224), "rnn_tanh": (288, 384)}
    for kernel, dtype, H in (
        (k, dtype, H) for k, sizes in largest.items() for dtype, H in zip(DTYPES, sizes, strict=False)
    ):
        for backward in (False, True):
            found = block(problem(kernel, H, dtype=dtype, backward=backward), device)
            assert isinstance(found, Block) and found.shared <= device.shared_bytes, (kernel, dtype, H, found)
            assert (found.kernel == "block_mma") == (dtype != "float32" and H < 384)
    assert "KB of recurrent weights do not fit" in block(problem(H=512), device)
    assert block(problem(dtype="float64"), device) == "block computes in float32"
    assert "projection" in block(problem(projected=True), device)
    assert "second product" in block(problem("gru_original"), device)


def test_the_choice_and_its_reasons():
    device = DEVICES[90]
    found, reason = schedules.choose(problem(), device)
    assert found.schedule == "block" and found.rows == 1
    assert "in registers" in reason and "estimated" in reason and "step: 512 timesteps" in reason
    found, reason = schedules.choose(problem(), device, "step")
    assert found.schedule == "step" and reason.startswith("step was asked for") and "block: 512 timesteps" in reason
    found, reason = schedules.choose(dataclasses.replace(problem(), T=1), device)  # loading the weights does not pay
    assert found.schedule == "step" and "after 6.0 us" in reason and "1 timesteps" in reason
    assert schedules.choose(problem(B=20000), device, "block")[0].rows > 1
    assert schedules.choose(problem(B=1500, dtype="bfloat16"), device, "block")[0].rows == 16
    found, reason = schedules.choose(problem(H=2048), device)
    assert found.schedule == "step" and "KB of recurrent weights do not fit" in reason
    with pytest.raises(ValueError, match="schedule: block: .* KB of recurrent weights do not fit"):
        schedules.choose(problem(H=2048), device, "block")
    with pytest.raises(ValueError, match="schedule"):
        schedules.choose(problem(), device, "fastest")


def test_the_input_goes_where_it_costs_less():
    """Within the launch where the input is small and there are many sequences or few timesteps; by the model."""
    device = DEVICES[90]

    def chosen(**more):
        asked = problem(dtype="bfloat16", **more)
        candidate, reason = schedules.choose(asked, device)
        assert candidate.schedule == "block" and ("W_ih x within the launch" in reason) == bool(candidate.inputs)
        return candidate

    assert chosen(I=2, B=1000).inputs == 16 and chosen(I=32, B=1000).inputs == 32
    assert not chosen(I=33, B=1000).inputs and not chosen(I=2, B=1000, backward=True).inputs
    assert schedules.choose(dataclasses.replace(problem(I=32, B=1), T=20), device)[0].inputs == 32
    assert not schedules.choose(problem(I=32, B=1), device)[
        0
    ].inputs  # little to store and read, many steps to lengthen
    # what was measured without the input counts for its twin, too
    candidate = chosen(I=2, B=1000)
    plain = next(
        w for w in schedules.candidates(problem(dtype="bfloat16", B=1000), device)[0] if w.key == candidate.key
    )
    table = Table({key(problem(dtype="bfloat16", B=1000), device): {candidate.key: (plain.seconds / 2, 0.0)}})
    candidate, reason = schedules.choose(problem(dtype="bfloat16", B=1000, I=2), device, measured=table)
    assert candidate.inputs and candidate.measured and candidate.seconds == plain.seconds / 2


def test_the_plan_tells_and_the_layer_obeys():
    for dtype, schedule in (("float32", "block"), ("float64", "step")):
        plan = build("lstm", cuda_ops(), dtype).plan(10, 3)
        assert plan.schedule == schedule and ("in registers" in plan.reason) == (schedule == "block"), plan
    assert build("lstm", cuda_ops(), "float32", schedule="step").plan(10, 3).schedule == "step"
    layer = build("lstm", cuda_ops(), "float64", schedule="block")
    with pytest.raises(ValueError, match="block computes in float32"):
        layer(layer.xp.zeros((2, 3, 4), "float64"))
    with pytest.raises(ValueError, match="schedule"):
        build("lstm", "numpy", "float32", schedule="quick")
