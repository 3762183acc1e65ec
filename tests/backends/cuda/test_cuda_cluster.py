"""The schedule ``cluster``: a cluster of thread blocks runs the whole time loop, with one exchange a step through their
shared memory. Executed on the CPU as test_cuda_block.py does it, all blocks at once, interleaved in several orders."""

import itertools

import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import THREAD_ORDERS, check_spills, compare, cuda_ops, precision

from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.exchange import Exchange
from gpurnn.backends.cuda.launch import kernel_of
from gpurnn.backends.cuda.schedules import Cluster, Device, Problem
from gpurnn.backends.sources import kernel_source
from gpurnn.cells import CELLS as RECORDS
from gpurnn.check import OPTIONS, Batch, build, twins
from gpurnn.errors import BackendError

pytestmark = pytest.mark.emulated

CELLS = ("rnn tanh", "rnn relu", "lstm", "gru")


@pytest.fixture
def forced(monkeypatch):
    """``forced(C, R, held=None)``: layers run in clusters of C thread blocks, R sequences a tile."""

    def force(C, R, held=None):
        def cluster_candidates(problem, device):
            size = Device(device.capability, 12, device.shared_bytes)  # more than the emulated GPU says it has
            return [schedules.cluster_tile(problem, size, C, R, held)]

        schedules.candidates.cache_clear()
        monkeypatch.setitem(schedules.FINDERS, "cluster", cluster_candidates)

    yield force
    schedules.candidates.cache_clear()


SIZES = [  # kind, dtype, T, B, H, C, R, weights in registers, ragged, both directions, order of threads
    ("lstm", "float16", 4, 9, 33, 4, 8, None, True, True, "ascending"),
    ("gru", "bfloat16", 3, 5, 19, 2, 4, 1, False, True, "random"),
    ("rnn relu", "bfloat16", 5, 17, 40, 4, 16, 0, True, True, "interrupted"),
    ("lstm", "tf32", 7, 3, 16, 4, 1, None, False, False, "random"),
    ("gru", "tf32", 1, 1, 7, 2, 2, None, True, False, "descending"),
    ("rnn tanh", "float16", 6, 3, 21, 2, 2, None, True, True, "random"),
    ("rnn tanh", "tf32", 4, 2, 35, 2, 1, 2, True, False, "ascending"),
    ("gru", "float16", 3, 11, 12, 8, 16, None, True, False, "descending"),
]


@pytest.mark.parametrize("kind, dtype, T, B, H, C, R, held, ragged, both, order", SIZES)
def test_sizes(kind, dtype, T, B, H, C, R, held, ragged, both, order, forced):
    """Units and sequences that fill no tile, in registers, in shared memory and in both; tiles that queue."""
    forced(C, R, held)
    dtype, options = precision(dtype)
    ops = cuda_ops(**{"policy": "descending"} if order == "descending" else THREAD_ORDERS[order])
    compare(kind, ops, dtype, T, B, ragged, H=H, bidirectional=both, schedule="cluster", **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, forced):
    """Each with one cell; what differs between cells is in the sizes above."""
    forced(2, 2)
    options = OPTIONS[option] | ({} if "hidden_size" in OPTIONS[option] else {"H": 11})
    for kind, dtype in [("lstm", "float16"), ("gru", "bfloat16")][list(OPTIONS).index(option) % 2 :][:1]:
        compare(kind, cuda_ops(), dtype, 4, 3, True, option != "learned state", **options, schedule="cluster")


def test_heads(forced):
    """Heads are to a schedule what directions are."""
    forced(2, 2)
    compare("lstm", cuda_ops(), "float16", 3, 3, True, H=14, heads=2, bidirectional=True, schedule="cluster")


def test_two_runs_give_equal_bits(forced):
    forced(2, 2)
    runs = []
    for order in THREAD_ORDERS.values():
        layer = build("gru", cuda_ops(**order), "float16", H=11, schedule="cluster")
        runs.append(Batch(build("gru", "numpy", "float64", H=11), 4, 3, ragged=True).run(layer))
    for other in runs[1:]:
        for name, value in runs[0].items():
            np.testing.assert_array_equal(other[name], value)


def test_it_is_the_schedule_that_runs_and_not_as_a_cooperative_launch(forced, monkeypatch):
    forced(2, 2)
    ops, launched = cuda_ops(), []
    launch = ops.kernels.launch

    def noted(file, kernel, types, grid, *args, **options):
        launched.append((kernel, grid, options.get("cooperative", False)))
        launch(file, kernel, types, grid, *args, **options)

    monkeypatch.setattr(ops.kernels, "launch", noted)
    compare("lstm", ops, "float16", 3, 9, H=11, bidirectional=True, schedule="cluster")
    found = [entry for entry in launched if entry[0].startswith(("cluster", "step_f", "step_b", "block", "grid"))]
    assert found == [("cluster_forward", (2, 2, 2), False), ("cluster_backward", (2, 2, 2), False)]


SEND, GIVE_UP = "if (!timed_out) store_async", "if (!timed_out && blockIdx.y != 1) store_async"
WAIT, LAST = "!timed_out && !ended(barrier, parity)", "cluster_barrier();  // a block that gives up stays"
SYNC = "lost = __syncthreads_or(channel.timed_out);"
FENCE = "fence.acquire.sync_restrict::shared::cluster.cluster;"
MUTATIONS = {  # planted error -> layer, edits
    "no wait": ("rnn tanh", (WAIT, "false")),
    "a wait that orders nothing": ("rnn tanh", (FENCE, "")),
    "a wait for this block alone": ("rnn tanh", ("parity.relaxed.cluster", "parity.relaxed.cta")),
    "one slot": (
        "rnn tanh",
        ("BARRIERS + slot * SLOT + place", "BARRIERS + place"),
        ("base + BARRIERS + turn % 2 * SLOT", "base + BARRIERS"),
    ),
    "half of the bytes": ("rnn tanh", ('"r"(BYTES)', '"r"(BYTES / 2)')),
    "the other parity": ("rnn tanh", ("(turn - 1) / 2 % 2", "turn / 2 % 2")),
    "no turn is expected": ("rnn tanh", ("if (threadIdx.x == 0 && !timed_out) expect(turn);", "")),
    "nobody waits for the mbarriers": ("rnn tanh", ("cluster_barrier();  // all mbarriers", "// all mbarriers")),
    "nothing is cleared": ("rnn tanh", ("i < size / 16", "i < 1")),
    "no barrier behind dgates": ("rnn tanh", (SYNC, "lost = channel.timed_out;")),
    "lanes that have not read yet": ("rnn tanh", ("__syncwarp();  // all lanes have read", "// all")),
    "a part left out": ("rnn tanh", ("int from = 0; from < C", "int from = 1; from < C")),
    "units of another order": ("rnn tanh", ("first + row % 8 * 2 + row / 8", "first + row")),
    "halves of a word": ("rnn tanh", ("__byte_perm(other, both, 0x5410)", "__byte_perm(both, other, 0x5410)")),
    "words of a fragment": ("rnn tanh", ("(part * 2 + w) * P", "(part * 2 + 1 - w) * P")),
    "gates of another column": ("gru", ("= upper ? other : own;", "= own;")),
    "another sequence": ("gru", ("? lane / 16 : k % per_octet", "? 0 : k % per_octet")),
}
CHECKED = set()  # cases that are known to be right without the planted error


def errors(kind, edits):
    """What is wrong with a layer, in two orders of threads, one after another."""
    for order in ("ascending", "random"):
        try:
            ops = cuda_ops(edits=edits, **THREAD_ORDERS[order])
            with np.errstate(invalid="ignore", over="ignore"):  # what a planted error leaves may be no number
                compare(kind, ops, "float16", 6, 3, ragged=True, H=19, schedule="cluster")
        except (AssertionError, emulator.KernelError, BackendError) as error:
            yield error


# The errors that the emulator's own tests plant in cluster_push.cu, and those that any wrong number shows
SLOW = {
    "the other parity",
    "half of the bytes",
    "no turn is expected",
    "words of a fragment",
    "halves of a word",
    "one slot",
}


@pytest.mark.parametrize(
    "mutation", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MUTATIONS]
)
def test_a_planted_error_is_seen(mutation, forced, monkeypatch):
    forced(2, 2, 0)
    kind, *edits = MUTATIONS[mutation]
    monkeypatch.setattr(Exchange, "patience", 3000)
    assert all(kernel_source("cluster.cu").count(old) == 1 for old, _ in edits)
    if kind not in CHECKED:
        assert not list(errors(kind, []))
        CHECKED.add(kind)
    assert next(errors(kind, edits), None)


def test_a_block_that_sends_nothing_is_an_error_and_then_another_schedule_runs(forced, monkeypatch):
    forced(2, 2)
    monkeypatch.setattr(Exchange, "patience", 500)
    ops = cuda_ops(edits=[(SEND, GIVE_UP)])
    layer, _, exact = twins("gru", ops, "float16", H=11, schedule="cluster")
    batch = Batch(exact, 4, 3, ragged=False)
    with pytest.raises(BackendError, match="timed out waiting for another thread block"):
        batch.run(layer)
    assert not ops.device.limits.clusters and not ops.device.limits.cooperative
    monkeypatch.setitem(schedules.FINDERS, "cluster", schedules.cluster_candidates)
    schedules.candidates.cache_clear()
    with pytest.raises(ValueError, match="clusters of thread blocks, which failed on this device"):
        batch.run(layer)


def test_a_block_that_gives_up_stays_until_nobody_sends_it_anything(forced, monkeypatch):
    """It has sent its first numbers, so others go on and send theirs."""
    forced(2, 2)
    monkeypatch.setattr(Exchange, "patience", 500)
    gives_up = (
        "for (int polls = 0; !timed_out",
        "timed_out = timed_out || blockIdx.y == 1;\nfor (int polls = 0; !timed_out",
    )
    for edits, error, text in (
        ([gives_up], BackendError, "timed out waiting"),
        ([gives_up, (LAST, f"// {LAST}")], emulator.KernelError, "^dead shared memory"),
    ):
        layer, _, exact = twins("gru", cuda_ops(edits=edits), "float16", H=11, schedule="cluster")
        with pytest.raises(error, match=text):
            Batch(exact, 4, 3, ragged=False).run(layer)


def test_where_the_device_refuses_a_launch_of_clusters_step_does_it(forced, monkeypatch):
    forced(2, 2)
    ops = cuda_ops()
    load = ops.device.load

    def refusing(file, *kernel):
        def launch(*args, **options):
            raise BackendError("no clusters here")

        return launch if file == "cluster.cu" else load(file, *kernel)

    monkeypatch.setattr(ops.device, "load", refusing)
    compare("gru", ops, "float16", 4, 3, ragged=True, H=11, schedule="cluster")
    assert not ops.device.limits.clusters and ops.device.limits.cooperative


# ---- the choice

H100 = Device(90, 132, 227 * 1024, 1.755e9)
KERNELS = "rnn_tanh", "lstm", "gru"


def problem(kernel="lstm", H=256, B=16, dtype="bfloat16", backward=False, **more):
    more = {"T": 512, "directions": 1, "projected": False} | more
    return Problem(RECORDS[kernel], H, B=B, dtype=dtype, backward=backward, **more)


SOME, MORE = (("bfloat16", 512, 16), ("tf32", 256, 16)), (("bfloat16", 256, 64), ("float16", 576, 64), ("tf32", 384, 4))


@pytest.mark.parametrize("cases", [SOME, pytest.param(MORE, marks=pytest.mark.slow)], ids=["some", "more"])
def test_tiles_that_are_chosen_do_not_spill(cases):
    chosen = {}
    for kernel, (dtype, H, B), backward in itertools.product(KERNELS, cases, (False, True)):
        dtype, options = precision(dtype)
        asked = problem(kernel, H, B, dtype, backward, tf32=bool(options))
        best = min(schedules.cluster_candidates(asked, H100), key=lambda candidate: candidate.seconds)
        chosen[kernel_of(asked, best)[1]] = asked, best
    assert len(chosen) > 8
    check_spills("cluster.cu", chosen, 90, H100)


def test_what_fits_and_what_is_chosen():
    for kernel, dtype, H in (("lstm", "bfloat16", 576), ("lstm", "tf32", 384), ("gru", "float16", 576)):
        dtype, options = precision(dtype)
        for backward in (False, True):
            asked = problem(kernel, H, 16, dtype, backward, tf32=bool(options))
            candidate, reason = schedules.choose(asked, H100, "cluster")
            assert isinstance(candidate, Cluster) and candidate.shared <= H100.shared_bytes
            assert candidate.threads <= 512 and "thread blocks, on tensor cores" in reason
    assert schedules.choose(problem(H=256), H100)[0].schedule == "cluster"
    both = schedules.choose(problem(B=64, directions=2), H100, "cluster")[0]
    assert 2 * both.groups <= 15
    less = schedules.hold_less(problem(H=512), schedules.choose(problem(H=512), H100, "cluster")[0], H100)
    assert less.schedule == "cluster"


@pytest.mark.parametrize("change, reason", [
    ({"device": Device(89, 128, 99 * 1024)}, "from compute capability 9.0 on; this one has 8.9"),
    ({"dtype": "float32"}, "float32 would be rounded to tf32 there: ask for precision='tf32'"),
    ({"dtype": "float32", "fma": True}, "and precision='fma' asks for multiply-adds"),
    ({"dtype": "float64"}, r"computes in float32 \(lstm T 512, .*float64, .*Take one that fits: step, or 'auto'$"),
    ({"projected": True}, "has no projection"),
    ({"H": 2048}, "32768 KB of recurrent weights do not fit on 16 multiprocessors"),
    ({"device": Device(90, 4, 227 * 1024)}, "needs 8 multiprocessors, and there are 4"),
])  # fmt: skip
def test_who_is_refused_is_told_why(change, reason):
    sizes = {name: value for name, value in change.items() if name != "device"}
    with pytest.raises(ValueError, match=f"^schedule: cluster.*{reason}"):
        schedules.choose(problem(**sizes), change.get("device", H100), "cluster")
