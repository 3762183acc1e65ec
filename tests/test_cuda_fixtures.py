"""The sample kernels, executed on the CPU with all checks, agree with NumPy whatever the order of execution."""

import re
import shutil

import numpy as np
import pytest
from cuda_on_cpu import emulator, fixtures, nvrtc

pytestmark = [
    pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing())),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]

ARCHITECTURES = (75, 80, 90, 120)
SCHEDULES = {
    "ascending": {"policy": "ascending"},
    "descending": {"policy": "descending"},
    "random": {"policy": "random", "seed": 1},
    "preempted": {"policy": "random", "seed": 2, "preemption": 0.02},
}

# case, first architecture, sizes: odd ones, single ones, and ones that fill the tiles
CASES = [
    *[(fixtures.lstm_step, 75, {"dtype": dtype, "B": 5, "H": 33}) for dtype in fixtures.TYPES],
    *[(fixtures.lstm_step, 75, {"dtype": dtype, "B": 1, "H": 1}) for dtype in fixtures.TYPES],
    (fixtures.lstm_step, 75, {"B": 4, "H": 32}),
    (fixtures.rnn_persistent, 75, {"T": 3, "B": 3, "H": 33, "units": 8, "threads": 32}),
    (fixtures.rnn_persistent, 75, {"T": 1, "B": 1, "H": 1, "units": 1, "threads": 32}),
    (fixtures.rnn_persistent, 75, {"T": 4, "B": 1, "H": 16, "units": 4, "threads": 32}),
    (fixtures.row_sum_warp, 75, {}),
    (fixtures.row_sum_warp, 75, {"rows": 1, "n": 1}),
    (fixtures.row_sum_block, 75, {}),
    (fixtures.row_sum_block, 75, {"rows": 1, "n": 1}),
    (fixtures.grid_sum, 75, {}),
    (fixtures.grid_sum, 75, {"n": 1, "blocks": 1, "threads": 32}),
    (fixtures.mma_tile, 75, {"dtype": "__half"}),
    (fixtures.mma_tile, 80, {"dtype": "__half", "ldmatrix": True}),
    (fixtures.mma_tile, 80, {"dtype": "__nv_bfloat16"}),
    (fixtures.mma_tile, 80, {"dtype": "__nv_bfloat16", "ldmatrix": True}),
    (fixtures.mma_tile, 80, {"dtype": "float"}),
    (fixtures.mma_tile, 75, {"dtype": "__half", "M": 1, "N": 1, "K": 1}),
    (fixtures.mma_tile, 80, {"dtype": "__nv_bfloat16", "ldmatrix": True, "M": 16, "N": 8, "K": 16}),
    (fixtures.cluster_sum, 90, {}),
    (fixtures.cluster_sum, 90, {"rows": 1, "n": 1}),
    (fixtures.async_copy, 80, {}),
    (fixtures.async_copy, 80, {"M": 1, "K": 1}),
    (fixtures.async_copy, 80, {"M": 17, "K": 33}),
    (fixtures.smooth, 75, {}),
    (fixtures.histogram, 75, {}),
    (fixtures.volatile_flag, 75, {}),
    (fixtures.float_max, 75, {}),
    (fixtures.float_max, 75, {"sign": -1}),
    (fixtures.early_exit, 75, {}),
    (fixtures.warp_reverse, 75, {}),
    (fixtures.twice_float4, 75, {}),
    (fixtures.named_barrier, 75, {}),
]


def label(case, sizes):
    """The name of a case in a test's id."""
    return "-".join([case.__name__, *(f"{key}={value}" for key, value in sizes.items())])


@pytest.fixture(scope="module", autouse=True)
def built():
    """Everything compiled in parallel first: one after another takes twice as long."""
    emulators = {arch: emulator.Emulator(arch=arch) for arch in ARCHITECTURES}
    emulator.build_ahead(
        (emulators[arch], case, sizes) for case, first, sizes in CASES for arch in ARCHITECTURES if arch >= first
    )


def run(case, arch, schedule, sizes, **options):
    """A case's result, checked."""
    emu = emulator.Emulator(arch=arch, **schedule, **options)
    problem = fixtures.wrong(case(emu, **sizes))
    assert problem is None, f"{label(case, sizes)} on sm_{arch}, {schedule}: {problem}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "case, arch, sizes",
    [
        pytest.param(case, arch, sizes, id=f"{label(case, sizes)}-sm_{arch}")
        for case, first, sizes in CASES
        for arch in ARCHITECTURES
        if arch >= first
    ],
)
def test_numbers_agree_and_no_error_is_reported(case, arch, sizes, schedule):
    run(case, arch, SCHEDULES[schedule], sizes)


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
@pytest.mark.parametrize("case", [fixtures.lstm_step, fixtures.rnn_persistent], ids=lambda case: case.__name__)
def test_larger_sizes(case, checked):
    sizes = {"B": 8, "H": 64} | ({"T": 16} if case is fixtures.rnn_persistent else {})
    run(case, 90, SCHEDULES["random"], sizes, checked=checked)


@pytest.mark.parametrize("schedule", ["ascending", "preempted"])
def test_portable_fibers(schedule):
    """ucontext instead of the assembly for x86-64: what an Arm laptop runs."""
    for case in (fixtures.rnn_persistent, fixtures.row_sum_block, fixtures.cluster_sum, fixtures.async_copy):
        sizes = {"T": 4, "H": 32} if case is fixtures.rnn_persistent else {}
        run(case, 90, SCHEDULES[schedule], sizes, portable=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(20))
def test_no_false_report(seed, arch):
    schedule = {"policy": "random", "seed": seed, "preemption": 0.02 * (seed % 2)}
    for case, first, sizes in CASES:
        if arch >= first:
            run(case, arch, schedule, sizes)


def test_every_kernel_has_a_case():
    text = "".join(path.read_text() for path in fixtures.FOLDER.glob("*.cu"))
    kernels = re.findall(r"__global__ void (?:__\w+__\(.*?\) )?(\w+)\(", text)
    assert set(kernels) == {case.__name__ for case, _, _ in CASES}
    assert len(kernels) == text.count("__global__")


def test_an_edit_must_match_exactly_once():
    for edit in [("no such text", ""), ("__syncthreads();", "")]:
        with pytest.raises(ValueError, match="stands"):
            fixtures.source("lstm_step.cu", [edit])
    edited = fixtures.source("lstm_step.cu", [("__syncthreads();", "", 1)])
    assert edited.count("__syncthreads();") == fixtures.source("lstm_step.cu").count("__syncthreads();") - 1


@pytest.mark.parametrize("got", [np.nan, np.inf, 1.1])
def test_wrong_sees_wrong_numbers(got):
    assert fixtures.wrong((np.array([1.0, got]), np.array([1.0, 1.0]), 1e-3))
