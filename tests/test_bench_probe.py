"""The device measurements without a device: their kernels compile, exchange what they should on the emulated GPU, and a
measurement that fails is told."""

import numpy as np
import pytest
from cuda_on_cpu import emulator, nvrtc

from bench import probe

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
SOURCE = probe.SOURCE.read_text()


class EmulatedGpu:
    """``probe.Gpu`` on the emulator: few multiprocessors, few steps, a clock of 5 us a launch and 1 us a step."""

    steps = 1, 4
    multiprocessors = 4

    def __init__(self, arch=90, edits=(), **how):
        self.emulator, self.capability, self.edits = emulator.Emulator(arch=arch, **how), arch, edits

    def load(self, name, *options, cooperative=False):
        source = SOURCE
        for old, new in self.edits:
            assert old in source
            source = source.replace(old, new)
        kernel = self.emulator.load(source, options=("-DPATIENCE=2000", *options), name=name, file="probe.cu")

        def run(grid, block, arguments, shared_mem=0):
            kernel(grid, block, arguments, shared_mem=shared_mem, cooperative=cooperative)
            self.ran = arguments[0]

        return run

    def zeros(self, shape, dtype):
        return self.emulator.zeros(shape, dtype)

    def host(self, array):
        return np.array(array)

    def seconds(self, action):
        action()
        return (5 + self.ran) * 1e-6


def small(monkeypatch):
    """Launches as small as the emulator likes them: the measurements ask for ``THREADS``."""
    monkeypatch.setattr(probe, "THREADS", 64)


@pytest.mark.parametrize("options, first", [((), 75), (("-DCLUSTER=8", "-DASYNC"), 90), (("-DCLUSTER=16",), 90)])
def test_kernels_compile_without_spills(options, first):
    from cuda_on_cpu.gate import parse_log

    for arch in nvrtc.ARCHITECTURES:
        if arch >= first:
            program = nvrtc.compile(SOURCE, file="probe.cu", arch=arch, options=options)
            found = parse_log(program.log)
            assert len(found) >= 5 and not any(r.spill_stores or r.spill_loads or r.stack for r in found.values()), arch


@pytest.mark.parametrize("how", [{}, {"policy": "random", "seed": 1}], ids=["ascending", "random"])
@pytest.mark.parametrize("arch", [75, 90])
def test_exchanges_take_place(arch, how, monkeypatch):
    small(monkeypatch)
    names = ("block_barrier", "hop_one", "hop_all", "hop_counter")
    found = probe.probe(EmulatedGpu(arch, **how), names)
    assert found["block_barrier"]["seconds"] == pytest.approx(1e-6) and len(found["block_barrier"]["samples"]) == 7
    for name in names[1:]:
        assert found[name].keys() >= {"2 blocks", "4 blocks"} and found[name]["4 blocks"]["seconds"] == pytest.approx(
            1e-6
        ), found[name]


def test_weights_and_clusters(monkeypatch):
    small(monkeypatch)
    device = EmulatedGpu(90)
    assert probe.weights_read(device, 8192)["bytes_per_second"] == pytest.approx(8192e6)
    found = probe.cluster_exchange(device, sizes=(4,), kilobytes=(1,))
    assert found["cluster 4, 1 KB"]["seconds"] == pytest.approx(1e-6), found


def test_what_an_architecture_has_not_is_told():
    found = probe.probe(EmulatedGpu(75), ("weights_read", "cluster_exchange", "active_clusters", "gemm"))
    assert found["weights_read"] == {"failed": "ValueError: bfloat16 products need compute capability 8.0"}
    assert "clusters need compute capability 9.0" in found["cluster_exchange"]["failed"]
    assert "failed" in found["gemm"]  # this device has no cuBLAS
    assert any("failed: " in line for line in probe.lines(found))


@pytest.mark.parametrize(
    "name, edit, words",
    [
        ("hop_all", ("data + 1, s + 1)", "data, s + 1)"), "expected 1 everywhere"),
        ("hop_one", ("publish(words, ++data, s + 1)", "publish(words, ++data, s)"), "livelock"),
        (
            "hop_counter",
            ("if (threadIdx.x == 0) here[blockIdx.x] = data + 1", "if (0) here[blockIdx.x] = 0"),
            "expected 1",
        ),
        ("hop_counter", ("red.release.gpu", "red.relaxed.gpu"), "race"),
        ("block_barrier", ("        __syncthreads();\n        value = box", "        value = box"), "uninitialised"),
        ("weights_read", ("tile += 4", "tile += 8"), "expected 2048"),
    ],
)
def test_planted_errors_are_seen(name, edit, words, monkeypatch):
    small(monkeypatch)
    found = probe.probe(EmulatedGpu(90, edits=[edit]), (name,))[name]
    told = [found, *(value for value in found.values() if isinstance(value, dict))]
    assert any(words in value.get("failed", "") for value in told), found


def test_a_block_that_waited_in_vain_is_a_failed_measurement():
    out, lost = np.full(4, 3), np.array([1])
    with pytest.raises(ValueError, match="a block waited in vain"):
        probe._all_equal(EmulatedGpu())([out, lost], 3)
    probe._all_equal(EmulatedGpu())([out, 0 * lost], 3)


def test_without_a_gpu_it_says_so():
    from click.testing import CliRunner

    from bench.cli import main
    from bench.rivals import missing

    if missing("gpurnn-cuda") is None:
        pytest.skip("there is a GPU here")
    done = CliRunner().invoke(main, ["probe"])
    assert done.exit_code == 1 and "no GPU to measure" in done.output
