"""The sample kernels on a real GPU: the emulator's instructions, fragments and tolerances put to the test."""

import numpy as np
import pytest
from cuda_on_cpu import emulator, fixtures
from cuda_on_cpu.gpu import Gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case, first, sizes", [pytest.param(*item, id=fixtures.label(item[0], item[2])) for item in fixtures.CASES]
)
def test_the_gpu_and_the_cpu_agree(case, first, sizes):
    gpu = Gpu()
    if gpu.arch < first:
        pytest.skip(f"needs sm_{first}, this is sm_{gpu.arch}")
    on_gpu = case(gpu, **sizes)
    assert fixtures.wrong(on_gpu) is None
    if emulator.missing() is None:
        known = max(arch for arch in emulator.SHARED_LIMIT if arch <= gpu.arch)
        on_cpu = case(emulator.Emulator(arch=known), **sizes)
        # Each is within the tolerance of the same reference, so they are within twice of it of one another.
        assert (np.abs(on_gpu[0] - on_cpu[0]) <= 2 * np.asarray(on_gpu[2])).all()
