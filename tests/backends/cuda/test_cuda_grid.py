"""The schedule ``grid``: a group of thread blocks runs the whole time loop, with one exchange a step. Executed on the
CPU as test_cuda_block.py does it, all blocks of a launch at once and interleaved in several orders."""

import itertools
import re

import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import THREAD_ORDERS, check_spills, compare, cuda_ops

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.exchange import Exchange
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.schedules import Device, Grid, Problem
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS as RECORDS
from gpurnn.check import OPTIONS, Batch, build, twins
from gpurnn.errors import BackendError

pytestmark = pytest.mark.emulated

CELLS = ("rnn tanh", "rnn relu", "lstm", "gru")
DTYPES = ("float32", "float16", "bfloat16")
DIRECTIONS = {"forward": {}, "bidirectional": {"bidirectional": True}, "reverse": {"reverse": True}}


@pytest.fixture
def forced(monkeypatch):
    """``forced(U, R, threads, KREG=None)``: layers walk so, in groups of as many blocks as H needs; on tensor cores
    with "mma" for threads, and then KREG tiles in registers and P blocks on a multiprocessor. AT: tiles at once, where
    there are more than groups."""

    def force(U, R, threads, KREG=None, P=1, AT=1):
        def grid_candidates(problem, device):
            # a launch of all blocks at once; on the emulated GPU some more may be there than on a real one of its size
            size = Device(device.capability, 12, device.shared_bytes)
            if threads == "mma":
                return [schedules.grid_mma_tile(problem, size, U, R, P, KREG, AT)]
            some = (grid_tile for n in (threads, 2 * threads, 4 * threads, threads // 2)
                    if (grid_tile := schedules.grid_tile(problem, size, U, R, n, KREG, AT)))  # fmt: skip
            return [next(some)]

        schedules.candidates.cache_clear()
        monkeypatch.setitem(schedules.FINDERS, "grid", grid_candidates)

    yield force
    schedules.candidates.cache_clear()


SIZES = [  # T, B, H, U, R, weights in registers, ragged, bidirectional, the dtype for each of CELLS
    (1, 1, 7, 8, 1, None, False, False, ("float32", "float16", "bfloat16", "float32")),
    (3, 5, 33, 16, 2, 0, True, True, ("float16", "bfloat16", "float32", "float16")),
    (5, 9, 65, 32, 4, 4, False, False, ("bfloat16", "float32", "float16", "bfloat16")),
    (2, 3, 32, 16, 1, None, True, False, ("float32", "float16", "bfloat16", "float32")),
]
SIZE_CASES = [
    pytest.param(kind, dtype, *size, id=f"{kind}-{dtype}-T{size[0]}-B{size[1]}-H{size[2]}")
    for *size, dtypes in SIZES
    for kind, dtype in zip(CELLS, dtypes, strict=True)
]


@pytest.mark.parametrize("kind, dtype, T, B, H, U, R, KREG, ragged, bidirectional", SIZE_CASES)
def test_sizes(kind, dtype, T, B, H, U, R, KREG, ragged, bidirectional, forced):
    """Groups of 1, 2, 3 blocks; weights in registers, in shared memory, in both; tiles that queue."""
    forced(U, R, 128, KREG)
    compare(kind, cuda_ops(), dtype, T, B, ragged, H=H, bidirectional=bidirectional, schedule="grid")


TWO_TILES = [  # kind, dtype, T, B, H, R, threads, both directions, order of threads
    ("lstm", "float32", 4, 7, 19, 2, 64, True, "random"),
    ("gru", "float32", 3, 5, 35, 1, 64, False, "interrupted"),
    ("lstm", "float16", 5, 7, 19, 2, "mma", True, "interrupted"),
    ("gru", "bfloat16", 35, 9, 17, 2, "mma", False, "ascending"),
    ("rnn tanh", "tf32", 3, 5, 19, 1, "mma", True, "random"),
]


@pytest.mark.parametrize("kind, dtype, T, B, H, R, threads, both, order", TWO_TILES)
def test_two_tiles_at_once(kind, dtype, T, B, H, R, threads, both, order, forced):
    """Each group computes two tiles in turn; the last tile has no other, and tiles end at different timesteps."""
    forced(8, R, threads, AT=2)
    ops, types = cuda_ops(**THREAD_ORDERS[order]), []
    launch = ops.kernels.launch
    ops.kernels.launch = lambda file, kernel, of, *a, **more: (
        types.append((kernel, of)) or launch(file, kernel, of, *a, **more)
    )
    compare(kind, ops, *precise(dtype), T, B, True, H=H, bidirectional=both, schedule="grid", **tf32(dtype))
    at = -2 if threads == "mma" else -1  # tensor cores have the parts of a float behind it
    assert {of[at] for kernel, of in types if kernel.startswith("grid")} == {"2"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
def test_every_option(kind, option, forced):
    forced(8, 2, 64)
    options = OPTIONS[option] | ({} if "hidden_size" in OPTIONS[option] else {"H": 11})
    compare(kind, cuda_ops(), "float32", 4, 3, True, option != "learned state", **options, schedule="grid")


MMA_SIZES = [  # tiles in registers, blocks on a multiprocessor, ragged, bidirectional, order of threads
    # kind, dtype, T, B, H, U, R, held, P
    ("lstm", "float16", 4, 9, 33, 16, 8, None, 1, True, True, "ascending"),
    ("gru", "bfloat16", 3, 5, 19, 8, 4, 1, 2, False, True, "random"),
    ("rnn relu", "bfloat16", 5, 17, 40, 32, 16, 0, 1, True, True, "interrupted"),
    ("lstm", "tf32", 35, 3, 16, 16, 1, None, 1, False, False, "ascending"),
    ("gru", "tf32", 1, 1, 7, 8, 2, None, 1, True, False, "random"),
    ("lstm", "float32", 4, 9, 33, 16, 8, None, 1, True, True, "random"),
    ("gru", "float32", 3, 5, 19, 8, 4, 1, 1, False, True, "interrupted"),
    ("rnn tanh", "float32", 35, 17, 16, 8, 16, 0, 1, True, False, "ascending"),
]


@pytest.mark.parametrize("kind, dtype, T, B, H, U, R, held, P, ragged, both, order", MMA_SIZES)
def test_tensor_cores(kind, dtype, T, B, H, U, R, held, P, ragged, both, order, forced):
    """Tiles of weights in registers, in shared memory, in both; columns of a product that are no sequence."""
    forced(U, R, "mma", held, P)
    ops = cuda_ops(**THREAD_ORDERS[order])
    compare(kind, ops, *precise(dtype), T, B, ragged, H=H, bidirectional=both, schedule="grid", **tf32(dtype))


def test_words_come_in_several_batches(forced):
    """Each is asked for before the one before it is waited for: three and four batches, the last one half empty."""
    forced(8, 4, "mma")
    for kind, batch in (("gru", 1), ("lstm", 3)):
        ops = cuda_ops(edits=[("batch = 8 / (N * P)", f"batch = {batch}")], **THREAD_ORDERS["interrupted"])
        compare(kind, ops, "float16", 3, 5, True, H=19, schedule="grid")


def tf32(dtype):
    return {"precision": "tf32"} if dtype == "tf32" else {}


def precise(dtype):
    return ("float32" if dtype in ("fma", "tf32") else dtype,)


# Pairs of everything that the schedule knows, each with a third of the batches.
BATCHES = {  # T, B, ragged, direction
    "first": [
        (1, 1, True, "bidirectional"),
        (1, 9, False, "forward"),
        (2, 7, True, "bidirectional"),
        (2, 17, False, "reverse"),
        (5, 8, True, "bidirectional"),
        (33, 1, True, "forward"),
        (33, 9, False, "bidirectional"),
    ],
    "second": [
        (1, 8, True, "bidirectional"),
        (2, 1, True, "reverse"),
        (2, 9, False, "bidirectional"),
        (5, 7, True, "forward"),
        (5, 17, False, "bidirectional"),
        (33, 8, True, "reverse"),
    ],
    "third": [
        (1, 7, True, "reverse"),
        (1, 17, False, "bidirectional"),
        (2, 8, True, "forward"),
        (5, 1, True, "bidirectional"),
        (5, 9, False, "reverse"),
        (33, 7, True, "bidirectional"),
        (33, 17, False, "forward"),
    ],
}
CROSSING = [  # kind, dtype, H, U, R, threads, batches
    ("rnn tanh", "float16", 32, 32, 2, 128, "first"),
    ("rnn tanh", "bfloat16", 33, 16, 4, 128, "second"),
    ("rnn tanh", "float32", 64, 32, 1, 128, "third"),
    ("rnn tanh", "float16", 65, 32, 2, 128, "first"),
    ("rnn tanh", "bfloat16", 129, 64, 1, 128, "second"),
    ("lstm", "float32", 32, 32, 2, 128, "third"),
    ("lstm", "float16", 33, 16, 4, 128, "first"),
    ("lstm", "bfloat16", 64, 32, 1, 128, "second"),
    ("lstm", "float32", 65, 32, 2, 128, "third"),
    ("lstm", "float16", 129, 64, 1, 128, "first"),
    ("gru", "bfloat16", 32, 32, 2, 128, "second"),
    ("gru", "float32", 33, 16, 4, 128, "third"),
    ("gru", "float16", 64, 32, 1, 128, "first"),
    ("gru", "bfloat16", 65, 32, 2, 128, "second"),
    ("gru", "float32", 129, 64, 1, 128, "third"),
    ("lstm", "float16", 129, 64, 8, "mma", "first"),
    ("gru", "float16", 65, 32, 16, "mma", "second"),
    ("gru", "tf32", 64, 16, 8, "mma", "third"),
    ("rnn tanh", "tf32", 33, 16, 4, "mma", "first"),
    ("rnn relu", "bfloat16", 129, 32, 2, "mma", "second"),
    ("lstm", "bfloat16", 32, 32, 16, "mma", "third"),
    ("lstm", "float32", 65, 16, 8, "mma", "first"),
    ("gru", "float32", 129, 32, 4, "mma", "second"),
    ("rnn relu", "float32", 33, 16, 16, "mma", "third"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype, H, U, R, threads, batches", CROSSING)
def test_sizes_that_cross_tiles(kind, dtype, H, U, R, threads, batches, forced):
    forced(U, R, threads)
    ops = cuda_ops(checked=False)
    for T, B, ragged, direction in BATCHES[batches]:
        if T * B * H <= 5000:  # as much as an emulator's patience allows
            options = DIRECTIONS[direction] | tf32(dtype)
            compare(kind, ops, *precise(dtype), T, B, ragged, H=H, schedule="grid", **options)


@pytest.mark.parametrize("order", ["random", "interrupted"])
@pytest.mark.parametrize("arch, kind", [(75, "gru"), (80, "lstm"), (120, "rnn tanh")])
def test_architectures_and_orders(kind, arch, order, forced):
    forced(8, 2, 64)
    compare(
        kind,
        cuda_ops(arch=arch, **THREAD_ORDERS[order]),
        "float32",
        4,
        5,
        True,
        H=17,
        bidirectional=True,
        schedule="grid",
    )


@pytest.mark.parametrize("threads", [64, "mma"])
def test_two_runs_give_equal_bits(threads, forced):
    forced(8, 1, threads)
    kinds = [(kind, "float32") for kind in CELLS] if threads == 64 else [("gru", "float16"), ("lstm", "float32")]
    for kind, dtype in kinds:
        runs = []
        for order in THREAD_ORDERS.values():
            layer = build(kind, cuda_ops(**order), dtype, H=19, schedule="grid")
            batch = Batch(build(kind, "numpy", "float64", H=19), 4, 3, ragged=True)
            runs.append(batch.run(layer))
        for other in runs[1:]:
            for name, value in runs[0].items():
                np.testing.assert_array_equal(other[name], value)


def test_it_is_the_schedule_that_runs_and_epochs_go_on(forced, monkeypatch):
    """Calls of several shapes share the words of a stream; inference is forward."""
    forced(8, 2, 64)
    ops, launched = cuda_ops(), []
    launch = ops.kernels.launch
    monkeypatch.setattr(
        ops.kernels, "launch", lambda file, *a, **more: launched.append(file) or launch(file, *a, **more)
    )
    layer, _, exact = twins("lstm", ops, "float32", H=17, schedule="grid")
    epochs = []
    for T, B in ((4, 5), (2, 2), (4, 5), (6, 7)):
        batch = Batch(exact, T, B, ragged=True)
        x = layer.xp.asarray(batch.x.astype("float32"))
        output, _, _ = layer.forward(x, lengths=batch.lengths)
        np.testing.assert_array_equal(layer(x, lengths=batch.lengths)[0].get(), output.get())
        epochs.append(int(ops.exchange().epoch[0]))
    assert "grid.cu" in launched and "step.cu" not in launched and "block.cu" not in launched
    assert epochs[0] < epochs[1] < epochs[2]
    # an epoch that no word may have twice
    ops.exchange().epoch[...] = (1 << 31) - 5
    compare_again = Batch(exact, 4, 5, ragged=False)
    got, expected = compare_again.run(layer), compare_again.run(exact)
    assert np.abs(got["output"] - expected["output"]).max() < 1e-5 and 0 < int(ops.exchange().epoch[0]) < 100


# A block that comes late to what the others have sent: slots that are used again too early are missed by it, and others
# find what lay in its own before.
_WAIT = "for (int polls = 0; !timed_out; polls++) {", "channel.acquire();"
_LATE = "for (int k = 0; blockIdx.y == 1 && k < 60; k++) (void)*(volatile int*)"
LATE = {
    64: (_WAIT[0], f"{_LATE}failed;\n{_WAIT[0]}"),
    "mma": (_WAIT[1], f"{_LATE}channel.failed;\n{_WAIT[1]}"),
}


@pytest.mark.parametrize("threads", [64, "mma"])
def test_streams_share_nothing_and_an_earlier_launch_is_not_taken_for_this_one(threads, forced, monkeypatch):
    forced(8, 2, threads)
    ops = cuda_ops(edits=[LATE[threads]])
    layer, _, exact = twins("rnn tanh", ops, "float16", H=19, schedule="grid")
    xs = [np.random.default_rng(k).normal(size=(2, 3, layer.input_size)) for k in range(3)]

    def far(x):
        return np.abs(layer(layer.xp.asarray(x.astype("float16")))[0].get() - exact(x)[0]).max()

    near = 0.01  # float16's rounding of numbers below 1, a few times
    assert far(xs[0]) < near
    with ops.device.streams(1)[0]:
        assert far(xs[0]) < near and far(xs[1]) < near
    one, other = ops.exchanges.values()
    assert one.words is not other.words and one.ring is not other.ring
    first = ops.xp.zeros(1, np.uint32)
    monkeypatch.setattr(Exchange, "take", lambda self, *sizes: (first, self.patience, self.words, self.failed))
    monkeypatch.setattr(Exchange, "empty", lambda self, *sizes: (self.patience, self.ring, self.failed))
    far(xs[1])  # leaves what the next launch must not take: the same epochs, slots that are not empty
    assert far(xs[2]) > 10 * near


def test_no_launch_of_all_blocks_is_one_dimensional(monkeypatch):
    """CuPy refuses a cooperative grid that does not fit, but makes one that is 1 along y and z smaller, in silence."""
    ops, grids = cuda_ops(checked=False), []
    launch = ops.kernels.launch

    def noted(file, kernel, types, grid, *args, cooperative=False, **more):
        if cooperative:
            grids.append(grid)
        launch(file, kernel, types, grid, *args, cooperative=cooperative, **more)

    monkeypatch.setattr(ops.kernels, "launch", noted)
    for dtype, both in (("float32", False), ("float16", False), ("float32", True)):
        compare("lstm", ops, dtype, 2, 1, H=19, schedule="grid", bidirectional=both)
    assert len(grids) >= 6 and all(grid[1] > 1 for grid in grids)


SYNC = "__syncthreads();"
STOP = f"perhaps\n{{0}}{SYNC}\n{{0}}if (stop)"
TIMED_OUT, SUMS = "if (__syncthreads_or(channel.timed_out))", "inner.store_sums();"
MUTATIONS = {  # planted error -> layer, piece of the source, what it becomes
    "no wait": ("lstm", "return (unsigned)(received[k] >> 32) == epoch;", "return true;"),
    "stale epoch": ("gru", "(received[k] >> 32) == epoch;", "(received[k] >> 32) != 0;"),
    "one slot": ("lstm", "(when & 1) * size", "0 * size"),
    "sent after the last step": ("lstm", "active && t + on >= 0 && t + on < pos.longest", "active"),
    "no barrier behind what came": ("lstm", f"{TIMED_OUT} return false;", "if (channel.timed_out) return false;"),
    "no barrier behind the sums": (
        "gru",
        f"% U] = sum;\n            }}\n        }}\n        {SYNC}",
        "% U] = sum; } }",
    ),
    "ax of the first step": ("gru", "load_ax(t + on, here.gates);", ";"),
    "no barrier behind d": ("gru", f"N = gridDim.y;\n{SYNC:>24}", "N = gridDim.y;"),
    "no barrier behind the parts": ("lstm", f"quad * 4) = part[r];\n{SYNC:>24}", "quad * 4) = part[r];"),
    "no barrier behind the last sums": ("lstm", "return !__syncthreads_or(channel.timed_out);", "return true;"),
    "a part left out": ("gru", "for (int p = 0; p < S; p++) sum", "for (int p = 1; p < S; p++) sum"),
    "another block's part": ("gru", "(k / U * N + blockIdx.y) * OWNED", "(k / U * N + k / U) * OWNED"),
    "rows of another slice": ("rnn tanh", "thread / QUADS * RS + k / 4, u", "(S - 1 - thread / QUADS) * RS + k / 4, u"),
    "columns of another slice": ("lstm", "= thread / U * KS + k", "= (S - 1 - thread / U) * KS + k"),
    "unit of the next block": ("gru", "int row = unit + thread % U", "int row = unit + U + thread % U"),
}

# On tensor cores, with what both share.
MMA_MUTATIONS = {
    "no wait": ("rnn tanh", "if (empty) {", "if (false) {"),
    "one word's wait": ("rnn tanh", "empty = empty ||", "empty = empty || i % WORDS == 0 &&"),
    "one poll": ("rnn tanh", "if (!late) break;", "break;"),
    "words that nobody sends": ("rnn tanh", "words[i][w] = sent(i, w) ? words[i][w] : 0;", ";"),
    "one slot": ("rnn tanh", "(when % (2 * TURNS)) * size", "0 * size"),
    "slots are not emptied": ("rnn tanh", "if (turn % TURNS != 1) return;", "return;"),
    "emptied before it is read": ("rnn tanh", "TURNS - 1; n < 2 * TURNS - 1", "TURNS + 1; n < 2 * TURNS + 1"),
    "a store that is no message": ("rnn tanh", "st.relaxed.gpu.global.u32", "st.global.u32"),
    "a look that is none": ("rnn tanh", "ld.relaxed.gpu.global.v2.u32", "ld.global.v2.u32"),
    "no barrier before the sums": (
        "rnn tanh",
        f"H - group * 16; }});\n        {TIMED_OUT} return false;",
        "H - group * 16; }); if (channel.timed_out) return false;",
    ),
    "no barrier behind the sums, back": (
        "rnn tanh",
        f"gate * 16; }});\n        {TIMED_OUT} return false;\n        {SUMS}\n        {SYNC}",
        f"gate * 16; }}); {TIMED_OUT} return false; {SUMS}",
    ),
    "no barrier before them, back": (
        "gru",
        f"gate * 16; }});\n        {TIMED_OUT} return false",
        "gate * 16; }); if (false) return false",
    ),
    "a warp's sum left out": ("rnn tanh", "part[p] += part[p + step];", "if (step > 1) part[p] += part[p + step];"),
    "another sequence": ("rnn tanh", "return column % 4 * 2 + column / 4;", "return column;"),
    "words of the fragment": ("rnn tanh", "(low.x, high.x, low.y, high.y)", "(low.y, high.y, low.x, high.x)"),
    "another gate, back": ("gru", "(size_t)(group / gate) * H_ + row", "(size_t)(Q - 1 - group / gate) * H_ + row"),
    "the group ends early": ("rnn tanh", "longest = steps > longest ? steps : longest", "longest = 1"),
    "length off by one": (
        "gru",
        f"if (lives(k, t)) {{\n{'float h_new':>27}",
        "if (t <= pos.length[k]) { float h_new",
    ),
    "h of the step itself": ("rnn tanh", "if (ahead) h_new[k] = h_old[k];", ";"),
    "asked for the same again": (
        "gru",
        "here.move_on();\n        t += on;\n        if (t != end) load_ahead(t);",
        "t += on; if (t != end) load_ahead(t); here.move_on();",
    ),
}


def errors(kind, dtype, T, edits):
    """What is wrong with a layer, in two orders of threads, one after another."""
    for order in ("ascending", "random"):
        try:
            ops = cuda_ops(edits=edits, **THREAD_ORDERS[order])
            with np.errstate(invalid="ignore", over="ignore"):  # what a planted error leaves may be no number
                compare(kind, ops, dtype, T, 7, ragged=True, bidirectional=True, H=19, schedule="grid")
        except (AssertionError, emulator.KernelError, BackendError) as error:
            yield error


RIGHT = set()  # cases that are known to be right without the planted error: many errors share one
PLANTED = [(64, name) for name in MUTATIONS] + [("mma", name) for name in MMA_MUTATIONS]


@pytest.mark.parametrize("threads, mutation", PLANTED)
def test_a_planted_error_is_seen(threads, mutation, forced, monkeypatch):
    forced(8, 2, threads)
    file, mutations = ("grid.cu", MUTATIONS) if threads == 64 else ("grid_mma.cu", MMA_MUTATIONS)
    kind, old, new = mutations[mutation]
    case = (kind, "float32", 4) if threads == 64 else (kind, "float16", 7)
    monkeypatch.setattr(Exchange, "patience", 3000)
    assert kernel_source(file).count(old) == 1
    edits = [LATE[threads]] if mutation in ("one slot", "sent after the last step") else []
    edits += [("TURNS = 16", "TURNS = 3")] * (threads == "mma")  # slots come back soon
    if (case, *edits) not in RIGHT:
        assert not list(errors(*case, edits=edits))
        RIGHT.add((case, *edits))
    assert next(errors(*case, edits=[*edits, (old, new)]), None)


THIRDS_MUTATIONS = {  # where floats are three bfloat16 numbers each
    "sent as tf32": ("PARTS == 3 ? __float_as_uint(x) : tf32(x)", "tf32(x)"),
    "without the lower thirds": ("sum = join_thirds(high[m][n][i], sum)", "sum = high[m][n][i]"),
    "the thirds of another number": ("float(words[n][2 * w + 1])", "float(words[n][2 * w])"),
    "another third of the weights": ("weights.get(tile + 1), weights.get(tile + 2)", "weights.get(tile + 2), uint4()"),
}


@pytest.mark.parametrize("mutation", THIRDS_MUTATIONS)
def test_a_planted_error_in_thirds_is_seen(mutation, forced):
    """By the tolerance of float32, test_tensor_cores has the same kernels without it."""
    forced(8, 2, "mma")
    assert kernel_source("grid_mma.cu").count(THIRDS_MUTATIONS[mutation][0]) == 1
    assert next(errors("rnn tanh", "float32", 3, edits=[THIRDS_MUTATIONS[mutation]]), None)


@pytest.mark.parametrize("threads, kind, dtype", [(64, "gru", "float32"), ("mma", "rnn tanh", "float16")])
def test_two_tiles_that_share_a_channel_are_seen(threads, kind, dtype, forced, monkeypatch):
    forced(8, 2, threads, AT=2)
    monkeypatch.setattr(Exchange, "patience", 3000)
    assert not list(errors(kind, dtype, 4, edits=[]))
    assert next(errors(kind, dtype, 4, edits=[("{channel(0), channel(1)}", "{channel(0), channel(0)}")]), None)


@pytest.mark.parametrize("threads, dtype", [(64, "float32"), ("mma", "float16")])
def test_a_block_that_never_comes_is_an_error_and_then_another_schedule_runs(threads, dtype, forced, monkeypatch):
    forced(8, 2, threads)
    monkeypatch.setattr(Exchange, "patience", 500)
    send = 'asm volatile("st.relaxed.gpu.global.u'
    ops = cuda_ops(edits=[(f"{send}{n}", f"if (blockIdx.y != 1) {send}{n}") for n in (32, 64)])
    layer, _, exact = twins("gru", ops, dtype, H=19, schedule="grid")
    batch = Batch(exact, 4, 3, ragged=False)
    with pytest.raises(BackendError, match="timed out waiting for another thread block"):
        batch.run(layer)
    assert not ops.device.limits.cooperative
    monkeypatch.setitem(schedules.FINDERS, "grid", schedules.grid_candidates)
    schedules.candidates.cache_clear()
    compare("gru", ops, dtype, 4, 3, H=19)  # auto
    with pytest.raises(ValueError, match="failed on this device"):
        batch.run(layer)


def test_where_the_device_refuses_a_launch_of_all_blocks_step_does_it(forced, monkeypatch):
    forced(8, 2, 64)
    ops = cuda_ops()
    load = ops.device.load

    def refusing(file, *kernel):
        kernel = load(file, *kernel)

        def launch(*args, cooperative=False, **more):
            if cooperative:
                raise BackendError("too many blocks")
            kernel(*args, **more)

        return launch

    monkeypatch.setattr(ops.device, "load", refusing)
    compare("gru", ops, "float32", 4, 3, ragged=True, H=19, bidirectional=True, schedule="grid")
    assert not ops.device.limits.cooperative


# ---- the choice

DEVICES = {
    75: Device(75, 40, 64 * 1024),
    80: Device(80, 108, 163 * 1024),
    90: Device(90, 132, 227 * 1024),
    120: Device(120, 170, 99 * 1024),
}
KERNELS = "rnn_tanh", "lstm", "gru"


def problem(kernel="lstm", H=512, B=1, dtype="float32", backward=False, **more):
    more = {"T": 512, "directions": 1, "projected": False} | more
    return Problem(RECORDS[kernel], H, B=B, dtype=dtype, backward=backward, **more)


# ptxas keeps so many addresses in registers here, whatever is left to them: 20 bytes a thread
KNOWN_SPILLS = {80: ("gru", "tf32", 1024, False)}


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (75, 80, 120))])
def test_tiles_that_are_chosen_do_not_spill(arch):
    names = {}
    kinds = ("fma", 1), ("fma", 64), ("bfloat16", 1), ("bfloat16", 64), ("tf32", 16), ("float32", 16)
    sizes = {75: (256,), 90: (256, 1024, 1536)}.get(arch, (1024,))
    for kernel, (dtype, B), H, backward in itertools.product(KERNELS, kinds, sizes, (False, True)):
        if (kernel, dtype, H, backward) == KNOWN_SPILLS.get(arch) or (dtype == "float32" and H != 1024):
            continue
        how = {dtype: True} if dtype in ("fma", "tf32") else {}
        asked = problem(kernel, H, B, *precise(dtype), backward, **how)
        found = schedules.grid_candidates(asked, DEVICES[arch])
        if not isinstance(found, str):
            best = min(found, key=lambda candidate: candidate.seconds)
            file, expression, _ = kernel_of(asked, best)
            names.setdefault(file, {})[expression] = asked, best
    assert set(names) == ({"grid.cu"} if arch == 75 else {"grid.cu", "grid_mma.cu"})  # mma.m16n8k16 is sm_80's
    for name, chosen in names.items():
        assert len(chosen) > 3
        check_spills(name, chosen, arch, DEVICES[arch])


def test_what_fits_and_what_is_chosen():
    device = DEVICES[90]
    for kernel, dtype, H in (
        ("lstm", "float32", 1152),
        ("lstm", "bfloat16", 2048),
        ("gru", "float32", 1536),
        ("rnn_tanh", "bfloat16", 4096),
    ):
        for backward in (False, True):
            candidate = schedules.choose(problem(kernel, H, dtype=dtype, backward=backward), device, "grid")[0]
            assert isinstance(candidate, Grid) and candidate.shared <= device.shared_bytes
            assert candidate.blocks * candidate.groups <= device.multiprocessors
    candidate, reason = schedules.choose(problem(H=512), device)
    assert (
        candidate.schedule == "grid"
        and re.search(r"\d groups? of \d+ thread blocks", reason)
        and "block: 4096 KB" in reason
    )
    assert schedules.choose(problem(H=64), device)[0].schedule == "block"
    assert schedules.choose(problem(H=1024, B=256, fma=True), device)[0].schedule == "step"
    both = schedules.choose(problem(H=256, B=64, directions=2), device, "grid")[0]
    assert 2 * both.blocks * both.groups <= device.multiprocessors
    with pytest.raises(ValueError, match="MB of recurrent weights do not fit on 132 multiprocessors"):
        schedules.choose(problem(H=4096), device, "grid")
    with pytest.raises(ValueError, match="grid shares the units among thread blocks, 8 or more each, and H is 8"):
        schedules.choose(problem(H=8), device, "grid")
    assert schedules.choose(problem(H=9), device, "grid")[0].blocks == 2
    assert "computes in float32" in schedules.grid_candidates(problem(dtype="float64"), device)


def test_when_tensor_cores_are_taken():
    asked = problem(H=768, B=16, dtype="float16")
    candidate, reason = schedules.choose(asked, DEVICES[90])
    assert candidate.kernel == "grid_mma" and "on tensor cores" in reason and candidate.blocks * candidate.groups <= 132
    assert schedules.choose(problem(H=768, B=16, tf32=True), DEVICES[90])[0].numbers[-1] == 1
    candidate, reason = schedules.choose(problem(H=768, B=16), DEVICES[90])
    assert candidate.numbers[-1] == 3 and "float32 as three bfloat16 numbers" in reason
    assert schedules.choose(problem(H=768, B=16, fma=True), DEVICES[90], "grid")[0].kernel == "grid"
    assert schedules.choose(problem(H=256, B=16, dtype="float16"), DEVICES[75], "grid")[0].kernel == "grid"
    found = schedules.grid_candidates(problem(H=256, B=64, dtype="float16"), DEVICES[90])
    two = [candidate for candidate in found if candidate.kernel == "grid_mma" and candidate.numbers[4] == 2]
    assert any(candidate.blocks * candidate.groups > 132 for candidate in two)
    for candidate in two:
        assert candidate.blocks * candidate.groups <= 264 and 2 * (candidate.shared + 1024) <= 228 * 1024
    assert any("two on a multiprocessor" in str(candidate) for candidate in two)
    candidate = schedules.choose(problem(H=1024, B=64, dtype="float16"), DEVICES[90], "grid")[0]
    assert candidate.at_once == 2 and "two tiles at once" in str(candidate)
    assert all(other.at_once == 1 for other in schedules.grid_candidates(problem(H=1024), DEVICES[90]))
