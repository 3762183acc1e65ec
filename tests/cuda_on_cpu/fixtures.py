"""The sample kernels with their NumPy references: ``case(emu, edits=(), **sizes) -> (got, expected, tolerance)``.

``emu`` is an ``Emulator``, or anything with its ``load``, ``array`` and ``empty``. ``expected`` is computed in float64.
``edits`` plants bugs: each (old, new) or (old, new, occurrence) replaces one piece of the source.

Tolerance: twice the error of the same computation in NumPy in the kernel's own dtype, with sums in plain order of the
index, plus two roundings of the largest value (at least 1, the range of all inputs) in the arithmetic's dtype: the
allowance for exp and tanh, which differ by an ulp or two between libraries, and for sizes so small that NumPy happens
to be exact.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "kernels"

# C++ type of the storage -> (storage in NumPy, arithmetic). NumPy has no bfloat16: its bits stand in uint16.
TYPES = {
    "float": (np.float32, np.float32),
    "double": (np.float64, np.float64),
    "__half": (np.float16, np.float32),
    "__nv_bfloat16": (np.uint16, np.float32),
}


def source(file, edits=()):
    """The text of a sample kernel's file. An ``old`` that does not stand there exactly once, or ``occurrence``
    (0 is the first) where there are more, is an error: a mutation must never turn into a no-op."""
    text = (FOLDER / file).read_text()
    for old, new, *occurrence in edits:
        pieces = text.split(old)
        if len(pieces) == 1 or (len(pieces) > 2 and not occurrence):
            raise ValueError(f"{old!r} stands {len(pieces) - 1} times in {file}")
        at = occurrence[0] + 1 if occurrence else 1
        text = old.join(pieces[:at]) + new + old.join(pieces[at:])
    return text


def wrong(result):
    """What is wrong with a case's result, or None."""
    got, expected, tolerance = result
    if not np.isfinite(got).all():
        return f"{np.count_nonzero(~np.isfinite(got))} of {got.size} numbers are not finite"
    excess = np.abs(got - expected) - tolerance
    if (excess > 0).any():
        at = np.unravel_index(np.argmax(excess), excess.shape)
        return (
            f"at {tuple(map(int, at))}: got {got[at]}, expected {expected[at]}, {np.count_nonzero(excess > 0)} outside"
        )
    return None


def to_storage(x, dtype):
    """``x`` rounded to the storage of a C++ type."""
    if dtype != "__nv_bfloat16":
        return x.astype(TYPES[dtype][0])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even


def from_storage(x, dtype, arithmetic=np.float64):
    """Numbers in storage, as ``arithmetic``; exact."""
    if dtype != "__nv_bfloat16":
        return x.astype(arithmetic)
    return (x.astype(np.uint32) << 16).view(np.float32).astype(arithmetic)


def round_tf32(x):
    """float32 rounded to tf32's 10 bits as ``cvt.rna`` does: to nearest, ties away from zero."""
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def to_numpy(x):
    """A kernel's output on the host: the emulator's arrays are NumPy's, a GPU's have ``get``."""
    return x.get() if hasattr(x, "get") else np.array(x)


def product(a, b):
    """a (M, K) times b (K, N), summed in the order of k in the dtype of a."""
    total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[k]
    return total


def bound(plain, expected, arithmetic):
    """The tolerance described at the top of this file."""
    largest = np.abs(expected).max(initial=1)
    return 2 * np.abs(plain - expected).max(initial=0) + 2 * np.finfo(arithmetic).eps * largest


def uniform(rng, *shape):
    return rng.uniform(-1, 1, shape)


# ---------------------------------------------------------------- recurrent steps


def lstm_step(emu, edits=(), *, dtype="float", B=8, H=64, scalar=np.int32):
    """One LSTM step; ``scalar`` is the type in which the sizes are passed."""
    rng = np.random.default_rng(0)
    ax, h_old, c_old = (to_storage(uniform(rng, B, n), dtype) for n in (4 * H, H, H))
    weight = to_storage(uniform(rng, 4 * H, H) / np.sqrt(H), dtype)

    def reference(arithmetic):
        a, w, h, c = (from_storage(x, dtype, arithmetic) for x in (ax, weight, h_old, c_old))
        i, f, g, o = np.split(a + product(h, w.T), 4, axis=1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        return np.stack([o * np.tanh(c), c])

    storage, arithmetic = TYPES[dtype]
    expected = reference(np.float64)
    plain = from_storage(to_storage(reference(arithmetic), dtype), dtype)
    tolerance = bound(plain, expected, arithmetic)
    if dtype == "double":  # the reference has errors of its own: a rounding for each of the H terms instead of none
        tolerance *= H + 1

    kernel = emu.load(source("lstm_step.cu", edits), name=f"lstm_step<{dtype}>", file="lstm_step.cu")
    h, c = emu.empty((B, H), storage, "h"), emu.empty((B, H), storage, "c")
    arrays = [emu.array(x, name) for x, name in ((ax, "ax"), (weight, "weight"), (h_old, "h_old"), (c_old, "c_old"))]
    kernel((-(-H // 16), -(-B // 4)), (4, 16), (scalar(B), scalar(H), *arrays, h, c))
    got = np.stack([from_storage(to_numpy(x), dtype) for x in (h, c)])
    return got, expected, tolerance


def rnn_persistent(emu, edits=(), *, T=16, B=8, H=64, units=8, threads=64, cooperative=True, shared_mem=None):
    """Tanh RNN over T steps. ``shared_mem`` in bytes, where not what the kernel needs."""
    rng = np.random.default_rng(0)
    ax, weight = uniform(rng, T, B, H).astype(np.float32), (uniform(rng, H, H) / np.sqrt(H)).astype(np.float32)
    h0 = uniform(rng, B, H).astype(np.float32)

    def reference(arithmetic):
        h, w = [h0.astype(arithmetic)], weight.astype(arithmetic)
        for a in ax.astype(arithmetic):
            h.append(np.tanh(a + product(h[-1], w.T)))
        return np.stack(h)

    expected = reference(np.float64)
    tolerance = bound(reference(np.float32), expected, np.float32)

    kernel = emu.load(source("rnn_persistent.cu", edits), name="rnn_persistent", file="rnn_persistent.cu")
    slots = np.full((T + 1, B, H), np.nan, np.float32)  # a slot that is read before it is written shows as NaN
    slots[0] = h0
    h, counter = emu.array(slots, "h"), emu.array(np.zeros(1, np.uint32), "counter")
    args = (*map(np.int32, (T, B, H, units)), emu.array(ax, "ax"), emu.array(weight, "weight"), h, counter)
    needed = (units + B) * H * 4
    kernel(
        (-(-H // units), 1),
        (threads,),
        args,
        shared_mem=needed if shared_mem is None else shared_mem,
        cooperative=cooperative,
    )
    return to_numpy(h), expected, tolerance


# ---------------------------------------------------------------- sums


def row_sum_warp(emu, edits=(), *, rows=5, n=100):
    """One warp per row, two warps per block."""
    x = uniform(np.random.default_rng(0), rows, n).astype(np.float32)
    kernel = emu.load(source("warp_sum.cu", edits), name="row_sum_warp", file="warp_sum.cu")
    y = emu.empty(rows, np.float32, "y")
    kernel((-(-rows // 2),), (64,), (np.int32(rows), np.int32(n), emu.array(x, "x"), y))
    return _sum_result(y, x)


def row_sum_block(emu, edits=(), *, rows=3, n=200, threads=96):
    """One block per row."""
    x = uniform(np.random.default_rng(0), rows, n).astype(np.float32)
    kernel = emu.load(source("warp_sum.cu", edits), name="row_sum_block", file="warp_sum.cu")
    y = emu.empty(rows, np.float32, "y")
    kernel((rows,), (threads,), (np.int32(n), emu.array(x, "x"), y))
    return _sum_result(y, x)


def grid_sum(emu, edits=(), *, n=1000, blocks=5, threads=64):
    """The last block to arrive adds the parts of all."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    kernel = emu.load(source("warp_sum.cu", edits), name="grid_sum", file="warp_sum.cu")
    part, y = emu.empty(blocks, np.float32, "part"), emu.empty(1, np.float32, "y")
    tickets = emu.array(np.zeros(1, np.uint32), "tickets")
    kernel((blocks,), (threads,), (np.int32(n), emu.array(x, "x"), part, tickets, y))
    return _sum_result(y, x[None])


def _sum_result(y, x):
    expected, plain = x.sum(1, dtype=np.float64), np.cumsum(x, 1)[:, -1]  # cumsum adds one after the other
    return to_numpy(y), expected, bound(plain, expected, np.float32)


def cluster_sum(emu, edits=(), *, rows=2, n=300):
    """Rows minus their means; a cluster per row. sm_90 and later."""
    x = uniform(np.random.default_rng(0), rows, n).astype(np.float32)

    def reference(x):
        return x - np.cumsum(x, 1)[:, -1:] / x.dtype.type(n)

    kernel = emu.load(source("cluster_sum.cu", edits), name="cluster_sum", file="cluster_sum.cu")
    y = emu.empty((rows, n), np.float32, "y")
    kernel((4 * rows,), (64,), (np.int32(n), emu.array(x, "x"), y))
    expected = reference(x.astype(np.float64))
    return to_numpy(y), expected, bound(reference(x), expected, np.float32)


def cluster_push(emu, edits=(), *, rows=2, steps=5):
    """Numbers that go round by asynchronous stores; a cluster per row. sm_90 and later."""
    x = uniform(np.random.default_rng(0), rows, 4).astype(np.float32)

    def reference(x):
        weights = np.arange(2, 6).astype(x.dtype)
        for step in range(steps):
            x = np.repeat((x @ weights + 4 * step)[:, None] / 16, 4, axis=1).astype(x.dtype)
        return x

    kernel = emu.load(source("cluster_push.cu", edits), name="cluster_push", file="cluster_push.cu")
    y = emu.empty((rows, 4), np.float32, "y")
    kernel((4 * rows,), (32,), (np.int32(steps), emu.array(x, "x"), y))
    expected = reference(x.astype(np.float64))
    return to_numpy(y), expected, bound(reference(x), expected, np.float32)


# ---------------------------------------------------------------- matrices


def mma_tile(emu, edits=(), *, dtype="__half", ldmatrix=False, M=20, N=12, K=33):
    """C += A B on the tensor cores; ``float`` means tf32."""
    rng = np.random.default_rng(0)
    A, B = to_storage(uniform(rng, M, K), dtype), to_storage(uniform(rng, K, N), dtype)
    C = uniform(rng, M, N).astype(np.float32)
    name = f"mma_tile<{dtype}, {str(ldmatrix).lower()}>"
    kernel = emu.load(source("mma_tile.cu", edits), name=name, file="mma_tile.cu")
    out = emu.array(C, "C")
    sizes = map(np.int32, (M, N, K))
    kernel((-(-N // 8), -(-M // 16)), (32,), (*sizes, emu.array(A, "A"), emu.array(B, "B"), out))

    a, b = (from_storage(round_tf32(x) if dtype == "float" else x, dtype) for x in (A, B))
    # Products of such operands are exact in float32. Tensor cores add them in an order of their own and cut instead of
    # rounding, so NumPy's error says nothing here: each of the K additions loses at most an ulp of the largest sum.
    tolerance = K * np.finfo(np.float32).eps * (np.abs(C) + np.abs(a) @ np.abs(b))
    return to_numpy(out), C + a @ b, tolerance


def async_copy(emu, edits=(), *, M=20, K=36):
    """A matrix times a vector through two buffers filled by cp.async. sm_80 and later."""
    rng = np.random.default_rng(0)
    A, x = uniform(rng, M, K).astype(np.float32), uniform(rng, K).astype(np.float32)
    name = f"async_copy<{1 if K % 4 else 4}>"
    kernel = emu.load(source("async_copy.cu", edits), name=name, file="async_copy.cu")
    y = emu.empty(M, np.float32, "y")
    kernel((-(-M // 16),), (64,), (np.int32(M), np.int32(K), emu.array(A, "A"), emu.array(x, "x"), y))
    expected = A.astype(np.float64) @ x.astype(np.float64)
    return to_numpy(y), expected, bound(product(A, x[:, None])[:, 0], expected, np.float32)


# ---------------------------------------------------------------- clean.cu: right, and easily mistaken for wrong


def smooth(emu, edits=(), *, steps=5, n=64):
    """Two buffers with one barrier per step."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    y = emu.empty(n, np.float32, "y")
    _load_clean(emu, edits, "smooth")((1,), (n,), (np.int32(steps), emu.array(x, "x"), y))

    def reference(x):
        for _ in range(steps):
            x = (np.roll(x, -1) + np.roll(x, 1)) / 2
        return x

    expected = reference(x.astype(np.float64))
    return to_numpy(y), expected, bound(reference(x), expected, np.float32)


def histogram(emu, edits=(), *, n=300, bins=20):
    """Atomics in shared memory."""
    x = np.random.default_rng(0).integers(0, bins, n).astype(np.int32)
    counts = emu.array(np.zeros(bins, np.int32), "counts")
    _load_clean(emu, edits, "histogram")((2,), (64,), (np.int32(n), np.int32(bins), emu.array(x, "x"), counts))
    return to_numpy(counts), np.bincount(x, minlength=bins), 0


def volatile_flag(emu, edits=(), *, n=64):
    """A volatile flag between two fences."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    box, y = emu.empty(n, np.float32, "box"), emu.empty(n, np.float32, "y")
    flag = emu.array(np.zeros(1, np.int32), "flag")
    kernel = _load_clean(emu, edits, "volatile_flag")
    kernel((2, 1), (n,), (emu.array(x, "x"), box, flag, y), cooperative=True)
    return to_numpy(y), 2 * x + np.float32(1), 0  # equal although the compiler fuses: doubling is exact


def float_max(emu, edits=(), *, n=150, sign=1):
    """The largest float by integer atomics; sign -1: all numbers are negative."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    x = x if sign > 0 else -np.abs(x)
    y = emu.array(np.array([-np.inf], np.float32), "y")
    _load_clean(emu, edits, "float_max")((-(-n // 64),), (64,), (np.int32(n), emu.array(x, "x"), y))
    return to_numpy(y), x.max(keepdims=True), 0


def early_exit(emu, edits=(), *, n=100):
    """Threads that leave before a barrier."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    y = emu.empty(n, np.float32, "y")
    _load_clean(emu, edits, "early_exit")((-(-n // 64),), (64,), (np.int32(n), emu.array(x, "x"), y))
    return to_numpy(y), np.concatenate([x[i : i + 64][::-1] for i in range(0, n, 64)]), 0


def warp_reverse(emu, edits=()):
    """Lanes that exchange through shared memory."""
    x = uniform(np.random.default_rng(0), 32).astype(np.float32)
    y = emu.empty(32, np.float32, "y")
    _load_clean(emu, edits, "warp_reverse")((1,), (32,), (emu.array(x, "x"), y))
    return to_numpy(y), x[::-1], 0


def twice_float4(emu, edits=(), *, n=100):
    """Vector loads and stores."""
    x = uniform(np.random.default_rng(0), n).astype(np.float32)
    y = emu.empty(n, np.float32, "y")
    _load_clean(emu, edits, "twice_float4")((-(-n // 128),), (32,), (np.int32(n), emu.array(x, "x"), y))
    return to_numpy(y), 2 * x, 0


def named_barrier(emu, edits=()):
    """Two warps of three meet at a barrier of their own."""
    x = uniform(np.random.default_rng(0), 32).astype(np.float32)
    y = emu.empty(32, np.float32, "y")
    _load_clean(emu, edits, "named_barrier")((1,), (96,), (emu.array(x, "x"), y))
    return to_numpy(y), 3 * x[::-1], 0


def _load_clean(emu, edits, name):
    return emu.load(source("clean.cu", edits), name=name, file="clean.cu")


# case, first architecture, sizes: odd ones, single ones, and ones that fill the tiles
CASES = [
    *[(lstm_step, 75, {"dtype": dtype, "B": 5, "H": 33}) for dtype in TYPES],
    *[(lstm_step, 75, {"dtype": dtype, "B": 1, "H": 1}) for dtype in TYPES],
    (lstm_step, 75, {"B": 4, "H": 32}),
    (rnn_persistent, 75, {"T": 3, "B": 3, "H": 33, "units": 8, "threads": 32}),
    (rnn_persistent, 75, {"T": 1, "B": 1, "H": 1, "units": 1, "threads": 32}),
    (rnn_persistent, 75, {"T": 4, "B": 1, "H": 16, "units": 4, "threads": 32}),
    (row_sum_warp, 75, {}),
    (row_sum_warp, 75, {"rows": 1, "n": 1}),
    (row_sum_block, 75, {}),
    (row_sum_block, 75, {"rows": 1, "n": 1}),
    (grid_sum, 75, {}),
    (grid_sum, 75, {"n": 1, "blocks": 1, "threads": 32}),
    (mma_tile, 75, {"dtype": "__half"}),
    (mma_tile, 80, {"dtype": "__half", "ldmatrix": True}),
    (mma_tile, 80, {"dtype": "__nv_bfloat16"}),
    (mma_tile, 80, {"dtype": "__nv_bfloat16", "ldmatrix": True}),
    (mma_tile, 80, {"dtype": "float"}),
    (mma_tile, 75, {"dtype": "__half", "M": 1, "N": 1, "K": 1}),
    (mma_tile, 80, {"dtype": "__nv_bfloat16", "ldmatrix": True, "M": 16, "N": 8, "K": 16}),
    (cluster_sum, 90, {}),
    (cluster_sum, 90, {"rows": 1, "n": 1}),
    (cluster_push, 90, {}),
    (cluster_push, 90, {"rows": 1, "steps": 1}),
    (async_copy, 80, {}),
    (async_copy, 80, {"M": 1, "K": 1}),
    (async_copy, 80, {"M": 17, "K": 33}),
    (smooth, 75, {}),
    (histogram, 75, {}),
    (volatile_flag, 75, {}),
    (float_max, 75, {}),
    (float_max, 75, {"sign": -1}),
    (early_exit, 75, {}),
    (warp_reverse, 75, {}),
    (twice_float4, 75, {}),
    (named_barrier, 75, {}),
]


def label(case, sizes):
    """The name of a case in a test's id."""
    return "-".join([case.__name__, *(f"{key}={value}" for key, value in sizes.items())])
