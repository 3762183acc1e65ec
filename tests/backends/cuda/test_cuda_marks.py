"""Resets and masks of timesteps in every schedule of backend ``cuda``. Executed on the CPU as test_cuda_layers.py does
it, and compared with the array code of NumPy to the same tolerance."""

import re

import numpy as np
import pytest
from cuda_cells import with_dtypes
from cuda_on_cpu import emulator, gate, nvrtc
from cuda_on_cpu.device import Array
from cuda_on_cpu.kernel_list import FIRST
from helpers import THREAD_ORDERS, cuda_ops, needs_nvrtc

import gpurnn
from gpurnn import cells
from gpurnn.backends import marks
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of, step_names
from gpurnn.backends.sources import kernel_path, kernel_source
from gpurnn.cells import CELLS as RECORDS
from gpurnn.check import Batch
from gpurnn.check.recurrent import middle
from gpurnn.dtypes import C_NAMES, ITEMSIZE
from gpurnn.testing.allowed import worst_error

pytestmark = pytest.mark.emulated


def option(kind, **options):
    """A function that makes a layer with options."""
    return lambda *sizes, **more: kind(*sizes, **options, **more)


POINTWISE = {
    "lstm": gpurnn.LSTM,
    "gru": gpurnn.GRU,
    "rnn": gpurnn.RNN,
    "four states": lambda *sizes, **more: gpurnn.Recurrent(cells.slstm, *sizes, **more),
    "drawn": option(gpurnn.LSTM, zoneout=(0.2, 0.1), recurrent_dropout=0.3, peephole=True),
    "one mask": option(gpurnn.LSTM, recurrent_dropout=0.3, recurrent_dropout_each="sequence"),
}
NO_PRODUCT = {"indrnn": lambda *sizes, **more: gpurnn.Recurrent(cells.indrnn, *sizes, **more)}
BY_STEP = {
    "gru original": option(gpurnn.GRU, reset_after=False),
    "inner drawn": option(gpurnn.GRU, reset_after=False, recurrent_dropout=0.3),
    "projected": option(gpurnn.LSTM, proj_size=3),
}
MEANS = {"normalized": option(gpurnn.LSTM, layer_norm=True)}
DIRECTIONS = ({}, {"bidirectional": True}, {"reverse": True})


def anywhere(rng, T, B, rate):
    return rng.random((T, B)) < rate


def at(T, B, *steps):
    """True in these timesteps."""
    found = np.zeros((T, B), bool)
    found[list(steps)] = True
    return found


def shown(rng, T, B):
    """Anywhere; of sequence 0 a timestep that is held between one that is not and a reset."""
    reset, mask = anywhere(rng, T, B, 0.3), anywhere(rng, T, B, 0.6)
    reset[-3:, 0], mask[-3:, 0] = [False, False, True], [True, False, True]
    return reset, mask


def where_held(_, T, B):
    """Resets where a timestep is held; of every second sequence also behind one that is held, after others."""
    reset, held = at(T, B, 0, 2), at(T, B, 0, 1, 2)
    reset[:, 1::2], held[:, 1::2] = at(T, 1, 1, T - 1), at(T, 1, 1, T - 2)
    return reset, ~held


# name -> function(rng, T, B): reset, mask; and options of the layer
PATTERNS = {
    "resets": (lambda rng, T, B: (anywhere(rng, T, B, 0.4), None), {}),
    "first and last": (lambda rng, T, B: (at(T, B, 0, 1, T - 1), None), {}),
    "masks": (lambda rng, T, B: (None, anywhere(rng, T, B, 0.6)), {}),
    "shown": (shown, {"masked_output": "repeat"}),
    "all masked": (lambda rng, T, B: (at(T, B, 2), at(T, B)), {"masked_output": "repeat"}),
    "reset where held": (where_held, {}),
    "every step": (lambda rng, T, B: (~at(T, B), anywhere(rng, T, B, 0.8)), {"reset_to": "initial"}),
}


def everything(layer, batch):
    """All results of a training call, and of inference."""
    found = batch.run(layer)
    layer.eval()
    x = layer.xp.asarray(batch.x.astype(np.float32)).astype(layer.dtype)
    output, state = layer(x, **batch.marks, lengths=batch.lengths)
    layer.train()
    for k, array in enumerate((output, *(state if isinstance(state, tuple) else (state,)))):
        found[f"inference {k}"] = np.asarray(layer.ops.to_numpy(array), np.float64)
    return found


def compare(make, ops, dtype, pattern, schedule, T=5, B=3, I=3, H=7, ragged=False, given=True, seed=0, **options):
    """Every result within twice the error of NumPy's."""
    marks_of, more = PATTERNS[pattern]
    options |= more
    first = make(I, H, backend=ops, dtype=dtype, seed=1, schedule=schedule, **options)
    like = "float16" if options.pop("precision", None) == "tf32" else dtype
    plain, exact = (make(I, H, backend="numpy", dtype=kind, seed=1, **options) for kind in (like, "float64"))
    for other in (plain, exact):
        other.load_state_dict(first.state_dict())

    def once(draw):
        batch = Batch(exact, T, B, ragged, given, draw)
        reset, mask = marks_of(np.random.default_rng(draw), T, B)
        batch.marks = {"reset": reset, "mask": mask}
        got, plain_got, expected = (everything(layer, batch) for layer in (first, plain, exact))
        terms = T * (B + 2 * H + 4) if dtype == "float64" else None
        return worst_error(got, plain_got, expected, like, terms)

    error, detail = middle(once, (seed, seed + 1, seed + 2))
    assert error <= 1, f"{pattern}, {options}: {detail}"


def compare_patterns(make, ops, dtype, schedule, patterns=tuple(PATTERNS), **sizes):
    """Each pattern with a direction, full or ragged, from a state that is given or not."""
    for k, pattern in enumerate(patterns):
        more = DIRECTIONS[k % 3] | {"ragged": k % 2 == 1, "given": k % 4 < 3}
        compare(make, ops, dtype, pattern, schedule, seed=k, **more, **sizes)


BLOCK = POINTWISE | NO_PRODUCT | MEANS
STEP = BLOCK | BY_STEP


@pytest.mark.parametrize("kind, dtype", with_dtypes(STEP))
def test_step(kind, dtype):
    ops = cuda_ops(**THREAD_ORDERS["random" if dtype == "float64" else "ascending"])
    compare_patterns(STEP[kind], ops, dtype, "step")


def test_step_with_several_units_a_thread():
    """A thread block of step_means.cu has 256 threads."""
    compare(MEANS["normalized"], cuda_ops(checked=False), "float32", "shown", "step", H=300, bidirectional=True)


SIXTEEN_BITS = dict(zip(BLOCK, ("float16", "bfloat16") * 4, strict=True))


@pytest.fixture
def only(monkeypatch):
    """``only(schedule, tile)``: the schedule has one candidate, ``tile(problem, device)``."""

    def force(schedule, tile):
        schedules.candidates.cache_clear()
        monkeypatch.setitem(schedules.FINDERS, schedule, lambda problem, device: [tile(problem, device)])

    yield force
    schedules.candidates.cache_clear()


@pytest.mark.parametrize("kind", BLOCK)
def test_block(kind):
    for dtype, order in (("float32", "ascending"), (SIXTEEN_BITS[kind], "random")):
        compare_patterns(BLOCK[kind], cuda_ops(**THREAD_ORDERS[order]), dtype, "block")


@pytest.mark.parametrize("kind, S, R, IP", [
    ("lstm", 2, 4, 0), ("gru", 8, 2, 4), ("rnn", 2, 2, 0), ("drawn", 4, 4, 4),
    ("normalized", 2, 4, 0), ("one mask", 4, 2, 4)])  # fmt: skip
def test_tiles(kind, S, R, IP, only):
    """Several sequences of a thread and threads without one; units and sequences that fill no tile; W_ih x made before
    the launch and within."""
    only("block", lambda problem, device: schedules.fma_tile(
        problem, -(-problem.H // 32) * 32, S, 4, R, IP=0 if problem.backward else IP))  # fmt: skip
    compare_patterns(BLOCK[kind], cuda_ops(), "float32", "block", ("shown", "resets", "all masked"), B=5, H=33)


@pytest.mark.parametrize("kind, dtype, N, inputs, H", [
    ("lstm", "float16", 1, True, 7), ("gru", "bfloat16", 2, False, 32), ("rnn", "tf32", 1, False, 19),
    ("drawn", "float16", 2, False, 33), ("lstm", "float32", 1, False, 19),
    ("normalized", "bfloat16", 1, False, 19), ("one mask", "tf32", 1, False, 32),
])  # fmt: skip
def test_tensor_cores(kind, dtype, N, inputs, H, only):
    def tile(problem, device):
        size, HP = ITEMSIZE[problem.dtype], -(-problem.H // 32) * 32
        return schedules.mma_tile(problem, HP, 3, N, IP=32 // size if inputs and not problem.backward else 0)

    only("block", tile)
    dtype, more = ("float32", {"precision": "tf32"}) if dtype == "tf32" else (dtype, {})
    patterns = ("shown", "first and last", "every step", "reset where held")
    compare_patterns(BLOCK[kind], cuda_ops(), dtype, "block", patterns, B=8 * N + 1, H=H, **more)


def grid_tile(problem, device, tensor_cores):
    size = schedules.Device(device.capability, 12, device.shared_bytes)
    if tensor_cores:
        return schedules.grid_mma_tile(problem, size, 8, 4, 1, 1)
    tiles = (schedules.grid_tile(problem, size, 16, 2, threads, 4) for threads in (128, 256, 64, 512))
    return next(tile for tile in tiles if tile)


@pytest.mark.parametrize(
    "kind, tensor_cores",
    [*((kind, False) for kind in POINTWISE), *((kind, True) for kind in ("lstm", "gru", "one mask", "drawn"))],
)
def test_grid(kind, tensor_cores, only):
    """Groups of several blocks, tiles that queue."""
    only("grid", lambda problem, device: grid_tile(problem, device, tensor_cores))
    patterns = ("shown", "resets", "first and last", "all masked", "reset where held")
    ops = cuda_ops(**THREAD_ORDERS["interrupted" if kind == "lstm" else "ascending"])
    compare_patterns(
        POINTWISE[kind], ops, SIXTEEN_BITS[kind] if tensor_cores else "float32", "grid", patterns, B=5, H=33
    )


@pytest.mark.parametrize(
    "kind",
    [
        "lstm",
        "gru",
        "one mask",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rnn", "four states", "drawn")),
    ],
)
def test_cluster(kind, only):
    """Clusters of two thread blocks, tiles that queue."""
    device = schedules.Device(90, 4, 227 * 1024)
    only("cluster", lambda problem, _: schedules.cluster_tile(problem, device, 2, 4, 1))
    patterns = ("shown", "resets", "first and last", "all masked", "reset where held")
    ops = cuda_ops(**THREAD_ORDERS["interrupted" if kind == "lstm" else "ascending"])
    compare_patterns(POINTWISE[kind], ops, SIXTEEN_BITS[kind], "cluster", patterns, B=5, H=19)


@pytest.mark.parametrize(
    "kind",
    [
        "lstm",
        "gru",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rnn", "four states", "drawn")),
    ],
)
def test_fused(kind, only):
    """A launch for each timestep, which multiplies, too."""
    device = schedules.Device(90, 132, 227 * 1024)
    only("fused", lambda problem, _: schedules.fused_tile(problem, device, 16, 64, 1))
    patterns = ("shown", "resets", "first and last", "all masked", "reset where held")
    compare_patterns(POINTWISE[kind], cuda_ops(), SIXTEEN_BITS[kind], "fused", patterns, B=5, H=19)


def test_no_sequence_no_timestep_and_no_unit_to_spare():
    for T, B in ((0, 2), (2, 0), (1, 1)):
        for schedule in ("step", "block"):
            layer = gpurnn.LSTM(3, 5, backend=cuda_ops(), dtype="float32", seed=1, schedule=schedule)
            like = gpurnn.LSTM(3, 5, backend="numpy", dtype="float32", seed=1)
            found = []
            for one in (layer, like):
                x, h = np.ones((T, B, 3), np.float32), np.ones((1, B, 5), np.float32)
                x, h = one.xp.asarray(x), one.xp.asarray(h)
                output, state, backward = one.forward(
                    x, (h, h), reset=np.ones((T, B), bool), mask=np.ones((T, B), bool)
                )
                found.append([one.ops.to_numpy(part) for part in (output, *state, *backward(output)[1])])
            for mine, expected in zip(*found, strict=True):
                np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", ["step", "block"])
def test_stacks_wavefronts_heads_and_learned_states(schedule):
    """What a layer above reads is 0 where the timestep is held; the state that resets give is learned from all."""
    for more in (
        {"num_layers": 2, "bidirectional": True, "residual": True},
        {"num_layers": 2, "wavefront": 2, "learn_state": True},
        {"heads": 2, "bidirectional": True, "H": 10},
    ):
        pattern, given = "reset where held" if "residual" in more else "every step", "learn_state" not in more
        compare(gpurnn.LSTM, cuda_ops(), "float32", pattern, schedule, ragged=True, given=given, **more)


# ---- recorded loops


@pytest.mark.parametrize("kind", ["lstm", "gru original", "projected", "normalized"])
def test_a_recorded_loop_takes_new_marks(kind):
    """The second call of a shape is recorded, later ones are replayed. Calls without marks, with masks alone, with
    resets: what is recorded for one does not run for another."""
    make, ops = STEP[kind], cuda_ops()
    layer, once, exact = (
        make(3, 5, backend=backend, dtype=dtype, seed=1, bidirectional=True, schedule="step")
        for backend, dtype in ((ops, "float32"), (cuda_ops(graphs=0), "float32"), ("numpy", "float64"))
    )
    for call in range(9):
        batch = Batch(exact, 4, 3, ragged=True, seed=call)
        reset, mask = PATTERNS["shown"][0](np.random.default_rng(call), 4, 3)
        batch.marks = ({}, {"mask": mask}, {"reset": reset, "mask": mask})[call % 3]
        results = [everything(one, batch) for one in (layer, once)]
        for name, mine in results[0].items():
            np.testing.assert_array_equal(mine, results[1][name], err_msg=f"{name}, call {call}")
    assert any(loop.graphs for _, loop in ops.pool.free.values())
    shapes = [loop.plan.shape.marked for _, loop in ops.pool.free.values()]
    assert True in shapes and False in shapes


def test_a_recorded_loop_counts_its_marks():
    """Of the memory that all recorded loops may take: exactly what the arrays have."""
    ops = cuda_ops()
    layer = gpurnn.LSTM(3, 5, backend=ops, dtype="float16", seed=1, schedule="step", bidirectional=True)
    x, held = ops.xp.ones((4, 3, 3), "float16"), np.ones((4, 3), bool)
    for more in ({}, {"reset": held}) * 2:
        layer.forward(x, **more)[2](ops.xp.ones((4, 3, 10), "float16"))
    plain, marked = sorted((loop for _, loop in ops.pool.free.values()), key=lambda loop: loop.nbytes)
    arrays = marked.marks.bits, *marked.marks.read[1:], *marked.marks.sums
    assert marked.nbytes - plain.nbytes == sum(array.nbytes for array in arrays)


def test_two_calls_at_once_have_marks_of_their_own():
    """Between forward and backward of one call another one runs, of the same shape."""
    ops = cuda_ops()
    layer = gpurnn.GRU(3, 5, backend=ops, dtype="float32", seed=1, schedule="step")
    x = ops.xp.asarray(np.random.default_rng(0).normal(size=(4, 3, 3)).astype("float32"))
    patterns = [PATTERNS["shown"][0](np.random.default_rng(k), 4, 3) for k in range(2)]

    def dx_of(backward):
        return backward(ops.xp.ones((4, 3, 5), "float32"))[0].get()

    alone = [dx_of(layer.forward(x, reset=reset, mask=mask)[2]) for reset, mask in patterns * 2][2:]
    together = [layer.forward(x, reset=reset, mask=mask)[2] for reset, mask in patterns]
    for backward, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(dx_of(backward), expected)
    assert np.abs(alone[0] - alone[1]).max() > 0


@pytest.mark.parametrize("schedule", ["step", "block"])
def test_the_host_does_not_look_at_marks(schedule, monkeypatch):
    """They may be results of what the device still computes."""
    ops = cuda_ops()
    layer = gpurnn.LSTM(3, 5, 2, backend=ops, dtype="float32", seed=1, schedule=schedule, bidirectional=True)
    rng = np.random.default_rng(0)
    x = ops.xp.asarray(rng.normal(size=(4, 3, 3)).astype("float32"))
    given = {name: ops.xp.asarray(anywhere(rng, 4, 3, 0.5)) for name in ("reset", "mask")}

    def looked(self):
        raise AssertionError("copied to the host")

    with monkeypatch.context() as patch:
        patch.setattr(Array, "get", looked)
        for _ in range(3):
            output, _, backward = layer.forward(x, **given)
            backward(output)
            layer(x, **given)
    assert np.isfinite(layer.flat_grads.get()).all()


# ---- what the sources say


def test_the_kernels_know_the_same_marks():
    text = kernel_path("arrays.cuh").read_text()
    found = re.search(r"struct Mark \{\s*static constexpr unsigned char held = (\d), reset = (\d), shown = (\d);", text)
    assert tuple(map(int, found.groups())) == (marks.HELD, marks.RESET, marks.SHOWN)


TILED = [  # tf32, backward, H, I of a kernel that multiplies x itself
    (False, False, 64, 8), *((tf32, backward, H, 0) for tf32 in (0, 1) for backward in (0, 1) for H in (64, 256)),
]  # fmt: skip


def marked_kernels(arch, records):
    """(file, struct) -> name expressions with marks: those of `step`, and the best tiles of the other schedules."""
    found = {}
    multiprocessors, kilobytes = {80: (108, 163), 90: (132, 227), 100: (148, 227)}[arch]
    device = schedules.Device(arch, multiprocessors, kilobytes << 10)
    for cell in records:
        for dtype, storage in C_NAMES.items():
            if cell.means and dtype == "float64":  # of step_means.cu in double spills a little without marks, too
                continue
            for file, expression, struct in step_names(cell, storage):
                found.setdefault((file, struct), []).append(expression[:-1] + ", true>")
            for tf32, backward, H, I in TILED if dtype in ("float32", "bfloat16") else ():
                problem = schedules.Problem(
                    cell, H, 100, 16, 1, dtype, False, bool(backward), bool(tf32), I=I, marked=True
                )
                every = schedules.candidates(problem, device)[0]
                for schedule in ("block", "grid", "cluster", "fused") if dtype == "float32" or not tf32 else ():
                    best = next((one for one in every if one.schedule == schedule), None)
                    if best:
                        file, expression, struct = kernel_of(problem, best)
                        found.setdefault((file, struct), []).append(expression)
    for storage in C_NAMES.values():
        for which in ("project", "project_backward"):
            found.setdefault(("step.cu", None), []).append(f"step_{which}<{storage}, true>")
    return {key: list(dict.fromkeys(names)) for key, names in found.items()}


GENERATED = tuple(STEP[kind](1, 1, backend="numpy").cell for kind in ("one mask", "normalized"))


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_with_marks_compile_and_do_not_spill(arch):
    """Of some cells on one architecture, of the LSTM on another: compiling takes minutes."""
    some = (RECORDS["lstm"], RECORDS["gru"], RECORDS["gru_original"], *GENERATED)
    table, records = {}, some if arch == 90 else (RECORDS["lstm"],)
    for (file, struct), expressions in marked_kernels(arch, records).items():
        assert arch >= FIRST.get(file, 0)
        found = gate.measure(file, kernel_source(file, struct), expressions, arch)
        table |= {(file, expression, arch): resources for expression, resources in found.items()}
    files = {"step.cu", "block.cu", "block_mma.cu", "grid.cu"} | ({"step_means.cu"} if arch == 90 else set())
    assert {file for file, _, _ in table} >= files
    if nvrtc.version() == gate.read_accepted()[0]:  # of another compiler `CudaOps.without_spills` takes care
        assert gate.spills(table) == []


# ---- planted errors


# planted error -> layer, schedule, piece of the source, what it becomes
MUTATIONS = {
    "a reset one step late": ("lstm", "block", "if (next_mark[k] & Mark::reset)", "if (mark[k] & Mark::reset)"),
    "a reset one step late, step": ("lstm", "step", "bool(then & Mark::reset)", "bool(now & Mark::reset)"),
    "a reset of h alone": ("lstm", "block", "others[s][k][u] = marks.others[place + u];", ";"),
    "a reset of h alone, step": ("lstm", "step", "return m.reset ? a.marks.others", "return false ? a.marks.others"),
    "a hold that leaks into dh": (
        "lstm", "block", "live = lives(k, t);", "live = within(k, t);",
    ),
    "a hold that leaks into dh, step": (
        "gru", "step", "if (now.shown) add_shown(a, at);", "add_shown(a, at);",
    ),
    "a gradient that crosses a reset": ("gru", "block", "dh[k][u] = 0.0f;", ""),
    "a gradient that crosses a reset, step": ("gru", "step", "        a.dh[at.index] = real(0);\n", ""),
    "a sum that a reset does not reach": ("gru", "block", "marks.dh[to + u] += dh[k][u];", ""),
    "the old h of backward": ("gru", "block", "in.state[0] = float(marks.h[from]);", ""),
    "the old h of backward, step": (
        "gru", "step", "(m.reset ? a.marks.h + at.index : a.h + at.old_h)", "(a.h + at.old_h)",
    ),
    "an output that is not silent": ("rnn", "block", "live || (MARKED && (mark[k] & Mark::shown))", "true"),
    "the marks of direction 0": ("rnn", "block", "((long long)pos.d * T_ + t) * B;", "(long long)t * B;"),
    "the projection's hold": ("projected", "step", "h_now[index] = now.next_reset ? reset_h[index]",
                              "h_now[index] = false ? reset_h[index]"),
    "the projection's sum": ("projected", "step", "dreset_h[index] += dh[index];", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_error_is_found(name):
    kind, schedule, old, new = MUTATIONS[name]
    file = {"block": "block.cu"}.get(schedule, "step.cu")
    assert kernel_source(file).count(old) == 1
    with pytest.raises((AssertionError, emulator.KernelError)):
        for pattern in ("shown", "resets", "masks"):
            compare(STEP[kind], cuda_ops(edits=[(old, new)], checked=False), "float32", pattern, schedule, T=6,
                    bidirectional=True, given=True)  # fmt: skip
