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


# ---- dependent launches: what may not happen before the launch before has ended

DEPENDENT = """
__global__ void add_one(const float* from, float* to, int load_early, int store_early, int let_early) {
    const int i = threadIdx.x;
    float x = 0.0f;
    if (let_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (load_early) x = from[i];
    if (store_early) to[i] = x;
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (!let_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (!load_early) x = from[i];
    to[i] = x + 1.0f;
}
"""


def chain(*launches, dependent=True, size=40):
    """Launches of arrays by their numbers: (from, to, and whether to load, to store, to let the next begin early)."""
    emu = emulator.Emulator()
    kernel = emu.load(DEPENDENT, name="add_one")
    arrays = [emu.array(np.zeros(size, np.float32), f"array {k}") for k in range(5)]
    for k, (start, to, *early) in enumerate(launches):
        args = arrays[start], arrays[to], *(np.int32(one) for one in early)
        kernel((1,), (size,), args, dependent=dependent and k > 0)
    return arrays


PLAIN = (0, 1, 0, 0, 0), (1, 2, 0, 0, 0), (2, 3, 0, 0, 0)
RACES = {  # launches, what is said
    "it reads what the one before writes": (((0, 1, 0, 0, 0), (1, 2, 1, 0, 0)), "read of array 1.*which writes it"),
    "it writes what the one before reads": (((0, 1, 0, 0, 0), (2, 0, 0, 1, 0)), "write of array 0.*which reads it"),
    "it writes what the one before writes": (((0, 1, 0, 0, 0), (2, 1, 0, 1, 0)), "write of array 1.*which writes it"),
    "the one between let it begin before it had waited": (
        ((0, 1, 0, 0, 0), (2, 3, 0, 0, 1), (1, 4, 1, 0, 0)),
        "read of array 1.*not ordered after the launch before",
    ),
}


@pytest.mark.parametrize("case", RACES)
def test_a_dependent_launch_that_does_not_wait_is_a_race(case):
    launches, text = RACES[case]
    with pytest.raises(emulator.KernelError, match=f"^race: {text}"):
        chain(*launches)
    chain(*launches, dependent=False)  # one after another


def test_dependent_launches_that_wait_see_what_was_written():
    assert chain(*PLAIN)[3].tolist() == [3.0] * 40
    chain((0, 1, 0, 0, 0), (2, 3, 0, 0, 0), (1, 4, 1, 0, 0))  # the one before the last has ended when the last begins
    chain((0, 1, 0, 0, 0), (0, 2, 1, 0, 0))  # nobody writes what both read
