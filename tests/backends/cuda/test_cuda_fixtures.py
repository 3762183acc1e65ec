"""The sample kernels, executed on the CPU with all checks, agree with NumPy whatever the order of execution."""

import re

import numpy as np
import pytest
from cuda_on_cpu import emulator, fixtures

pytestmark = pytest.mark.emulated

ARCHITECTURES = (75, 80, 90, 120)
SCHEDULES = {
    "ascending": {"policy": "ascending"},
    "descending": {"policy": "descending"},
    "random": {"policy": "random", "seed": 1},
    "preempted": {"policy": "random", "seed": 2, "preemption": 0.02},
}


@pytest.fixture(scope="module", autouse=True)
def built():
    """Everything compiled in parallel first: one after another takes twice as long."""
    emulators = {arch: emulator.Emulator(arch=arch) for arch in ARCHITECTURES}
    emulator.build_ahead(
        (emulators[arch], case, sizes)
        for case, first, sizes in fixtures.CASES
        for arch in ARCHITECTURES
        if arch >= first
    )


def run(case, arch, schedule, sizes, **options):
    """A case's result, checked."""
    emu = emulator.Emulator(arch=arch, **schedule, **options)
    problem = fixtures.wrong(case(emu, **sizes))
    assert problem is None, f"{fixtures.label(case, sizes)} on sm_{arch}, {schedule}: {problem}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "case, arch, sizes",
    [
        pytest.param(case, arch, sizes, id=f"{fixtures.label(case, sizes)}-sm_{arch}")
        for case, first, sizes in fixtures.CASES
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
    for case, first, sizes in fixtures.CASES:
        if arch >= first:
            run(case, arch, schedule, sizes)


def test_every_kernel_has_a_case():
    text = "".join(path.read_text() for path in fixtures.FOLDER.glob("*.cu"))
    kernels = re.findall(r"__global__ void (?:__\w+__\(.*?\) )?(\w+)\(", text)
    assert set(kernels) == {case.__name__ for case, _, _ in fixtures.CASES}
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
