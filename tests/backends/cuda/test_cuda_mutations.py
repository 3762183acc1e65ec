"""Bugs planted in the sample kernels: each must be found by one ascending run or one random seed."""

import re
from dataclasses import dataclass, field

import pytest
from cuda_on_cpu import emulator, fixtures

pytestmark = pytest.mark.emulated

SCHEDULES = [{"policy": "ascending"}, {"policy": "random", "seed": 1}]


@dataclass(frozen=True)
class Mutation:
    """A bug: the case that shows it, the edits of the source that plant it, or sizes and launch that do."""

    name: str
    case: object
    edits: tuple = ()
    sizes: dict = field(default_factory=dict)
    kind: str = ""  # pattern at the start of the error's text; empty: any error, or wrong numbers
    line: bool = True  # whether an error can name a line of the .cu file: a launch that is refused has none


# The case that shows the absence of each __syncthreads(), in the order of the file.
BARRIERS = {
    "lstm_step.cu": [fixtures.lstm_step] * 2,
    "rnn_persistent.cu": [fixtures.rnn_persistent] * 3,
    "warp_sum.cu": [fixtures.row_sum_block, fixtures.grid_sum],
    "mma_tile.cu": [],
    "cluster_sum.cu": [fixtures.cluster_sum],
    "cluster_push.cu": [],
    "async_copy.cu": [fixtures.async_copy] * 3,
    "clean.cu": [fixtures.smooth, *[fixtures.histogram] * 2, *[fixtures.volatile_flag] * 2, fixtures.early_exit],
}

# Sizes at which every barrier is needed: more than one tile, more than one step.
SIZES = {
    fixtures.lstm_step: {"B": 5, "H": 33},
    fixtures.rnn_persistent: {"T": 6, "B": 4, "H": 32, "units": 8, "threads": 64},
}

FIRST_CLUSTER_BARRIER = "cluster_barrier();  // the partial sums are complete"
LAST_CLUSTER_BARRIER = "cluster_barrier();  // nobody leaves while a peer may still read its shared memory"
TARGET = "(round + 1) * gridDim.x"
# Both sides meet a barrier, so that nothing races before the report; as assembly on one side, so that the compiler does
# not merge the two.
DIVERGENT = 'if (threadIdx.x < 32) {\n asm volatile("bar.sync 0;" ::: "memory");\n} else {\n __syncthreads();\n}'
RELEASE, ACQUIRE = "__threadfence();  // release", "__threadfence();  // acquire"

PUSH_BARRIERS = "cluster_barrier();  // all mbarriers are there", "cluster_barrier();  // nobody leaves"
EXPECT, WAIT = "expect(barrier, sizeof slots[0]);", "while (!ended(barrier, step / 2 % 2)) {\n        }"
ACQUIRE_BYTES = "try_wait.parity.acquire.cluster"
EXPECT_BYTES = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
TO, FIRST = "in_block(shared_address(&slots[slot][rank]), to)", "float number = x[blockIdx.x];"
NOTE = f"{FIRST}\n__shared__ float note;\nif (lane == 0) note = number;"
READ_NOTE = """sum = 0;
        if (lane == 1) {
            const unsigned from = in_block(shared_address(&note), rank ^ 1);
            asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(sum) : "r"(from) : "memory");
        }"""
PUSH = {  # of mbarriers and asynchronous stores: name -> edits, what is found
    "bytes are not expected": (
        (EXPECT_BYTES, "mbarrier.arrive.shared::cta.b64 _, [%0];"),
        "race|mbarrier|livelock",
    ),
    "no turn is expected": ((EXPECT, ";"), "livelock"),
    "too few bytes": ((EXPECT, "expect(barrier, sizeof slots[0] - 8);"), "race|uninitialised|livelock"),
    "too many bytes": ((EXPECT, "expect(barrier, sizeof slots[0] + 8);"), "livelock"),
    "the other parity": (("step / 2 % 2", "step / 2 % 2 ^ 1"), "race|uninitialised|livelock"),
    "no wait": ((WAIT, ""), "race|uninitialised|mbarrier"),
    "one slot": (("slot = step % 2", "slot = 0"), "race|uninitialised|livelock"),
    "a wait that does not acquire": ((ACQUIRE_BYTES, "try_wait.parity.relaxed.cluster"), "race"),
    "a wait for this block alone": ((ACQUIRE_BYTES, "try_wait.parity.acquire.cta"), "race"),
    "another block's mbarrier": (("in_block(barrier, to)", "in_block(barrier, to ^ 1)"), "mbarrier"),
    "no mbarrier": (("mbarrier.init.shared::cta.b64 [%0], 1;", "// %0"), "uninitialised|mbarrier"),
    "nobody waits for the mbarriers": ((PUSH_BARRIERS[0], "// "), "race|uninitialised|mbarrier"),
    "a misaligned store": ((TO, TO.replace("[rank]", "[rank].y")), "misaligned|out of bounds"),
    "a plain store that nothing releases": ((FIRST, NOTE), ("sum = 0;", READ_NOTE), "race"),
    "exit before everything has come": (
        (WAIT, f"if (rank == 1 && step == steps - 1) break;\n        {WAIT}"),
        (PUSH_BARRIERS[1], "// nobody leaves"),
        "dead shared memory",
    ),
}

MUTATIONS = [
    *[
        Mutation(name, fixtures.cluster_push, tuple(edits), kind=kind, line=False)
        for name, (*edits, kind) in PUSH.items()
    ],
    # CUDA_ON_CPU.md section 5, first list
    *[
        Mutation(f"{file} without __syncthreads {i}", case, (("__syncthreads();", "", i),))
        for file, cases in BARRIERS.items()
        for i, case in enumerate(cases)
    ],
    Mutation("acquire relaxed", fixtures.rnn_persistent, (("ld.acquire.gpu", "ld.relaxed.gpu"),), kind="race"),
    Mutation("release relaxed", fixtures.rnn_persistent, (("red.release.gpu", "red.relaxed.gpu"),), kind="race"),
    Mutation("barrier target one less", fixtures.rnn_persistent, ((TARGET, f"{TARGET} - 1"),)),
    Mutation("barrier target of the round before", fixtures.rnn_persistent, ((TARGET, "round * gridDim.x"),)),
    Mutation(
        "h in place",
        fixtures.rnn_persistent,
        (("h_old = h + t * B * H", "h_old = h"), ("h_new = h + (t + 1) * B * H", "h_new = h")),
    ),
    Mutation(
        "weight row off by one",
        fixtures.rnn_persistent,
        (("weight[first * H + i]", "weight[(first + 1) * H + i]"),),
        kind="out of bounds",
    ),
    Mutation("shared memory loop one too far", fixtures.lstm_step, (("k < columns", "k <= columns"),)),
    Mutation("dynamic shared memory loop one too far", fixtures.rnn_persistent, (("k < H; ++k", "k <= H; ++k"),)),
    Mutation("every lane writes", fixtures.row_sum_warp, (("if (lane == 0) y[row]", "y[row]"),), kind="race"),
    Mutation("half mask", fixtures.row_sum_warp, (("__shfl_xor_sync(ALL", "__shfl_xor_sync(0xffff"),), kind="warp"),
    Mutation("cluster barrier missing", fixtures.cluster_sum, ((FIRST_CLUSTER_BARRIER, ""),)),
    Mutation("block barrier for cluster barrier", fixtures.cluster_sum, ((FIRST_CLUSTER_BARRIER, "__syncthreads();"),)),
    Mutation("cluster rank off by one", fixtures.cluster_sum, (("peer(&partial, rank)", "peer(&partial, rank + 1)"),)),
    # second list
    Mutation("last block without release", fixtures.grid_sum, ((RELEASE, ""),), kind="race"),
    Mutation("last block without acquire", fixtures.grid_sum, ((ACQUIRE, ""),), kind="race"),
    Mutation("flag without release", fixtures.volatile_flag, ((RELEASE, ""),), kind="race"),
    Mutation("flag without acquire", fixtures.volatile_flag, ((ACQUIRE, ""),), kind="race"),
    Mutation("single buffer", fixtures.smooth, (("buffers[t % 2]", "buffers[0]"),), kind="race"),
    Mutation("__syncwarp missing", fixtures.warp_reverse, (("__syncwarp();", ""),), kind="race|uninitialised"),
    Mutation("mma before its operands", fixtures.mma_tile, (("__syncwarp();", "", 0),), kind="race|uninitialised"),
    Mutation("operands overwritten before mma", fixtures.mma_tile, (("__syncwarp();", "", 1),)),
    Mutation(
        "misaligned float4", fixtures.twice_float4, (("float4*>(&x[i])", "float4*>(&x[i + 1])"),), kind="misaligned"
    ),
    Mutation(
        "divergent barrier",
        fixtures.histogram,
        (("__syncthreads();", DIVERGENT, 1),),
        kind="divergent barrier|race",  # the other half of the block has not waited
    ),
    Mutation(
        "grid barrier in an ordinary launch",
        fixtures.rnn_persistent,
        sizes={"cooperative": False},
        kind="livelock|deadlock",
    ),
    Mutation("finished block's shared memory", fixtures.cluster_sum, ((LAST_CLUSTER_BARRIER, ""),)),
    Mutation(
        "shared memory over the limit",
        fixtures.rnn_persistent,
        sizes={"shared_mem": 1 << 20},
        kind="bad launch",
        line=False,
    ),
    Mutation("wrong scalar size", fixtures.lstm_step, sizes={"scalar": int}, kind="wrong scalar", line=False),
    Mutation("cp.async without wait", fixtures.async_copy, (("copy_wait<1>();", ""),)),
    Mutation("cp.async waits one group too few", fixtures.async_copy, (("copy_wait<1>();", "copy_wait<2>();"),)),
    Mutation(
        "two barriers", fixtures.named_barrier, (("pair_barrier<1>();", "pair_barrier<2>();", 1),), kind="deadlock"
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_planted_bug_is_found(mutation):
    sizes = SIZES.get(mutation.case, {}) | mutation.sizes
    reports = [report for schedule in SCHEDULES if (report := found(mutation, schedule, sizes))]
    assert reports, "neither schedule found it"
    for report in reports:
        if not isinstance(report, emulator.KernelError):
            assert not mutation.kind, f"expected an error ({mutation.kind}), not only wrong numbers: {report}"
            continue
        text = str(report)
        assert re.match(mutation.kind, text), text
        if mutation.line:
            assert re.search(r"\b[a-z_]+\.cu:[1-9]\d*", text), text


def found(mutation, schedule, sizes):
    """The error of one run, or what is wrong with its numbers, or None."""
    emu = emulator.Emulator(arch=90, **schedule)
    try:
        return fixtures.wrong(mutation.case(emu, edits=mutation.edits, **sizes))
    except emulator.KernelError as error:
        return error


@pytest.mark.parametrize("case", {m.case: None for m in MUTATIONS}, ids=lambda case: case.__name__)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["policy"])
def test_the_cases_are_clean_without_a_bug(case, schedule):
    emu = emulator.Emulator(arch=90, **schedule)
    assert fixtures.wrong(case(emu, **SIZES.get(case, {}))) is None


def test_every_barrier_is_in_the_list():
    assert BARRIERS.keys() == {path.name for path in fixtures.FOLDER.glob("*.cu")}
    for file, cases in BARRIERS.items():
        assert fixtures.source(file).count("__syncthreads();") == len(cases), file
