"""The device measurements without a device: their kernels compile, exchange what they should on the emulated GPU, and a
measurement that fails is told."""

import numpy as np
import pytest
from cuda_on_cpu import nvrtc

from bench import probe, probe_memory
from bench.gpu_rehearsal import EmulatedGpu
from bench.probe_device import all_equal, source

pytestmark = pytest.mark.emulated


def small(monkeypatch):
    """Launches as small as the emulator likes them: the measurements ask for ``THREADS``."""
    monkeypatch.setattr(probe, "THREADS", 64)
    monkeypatch.setattr(probe_memory, "THREADS", 64)
    monkeypatch.setattr(probe_memory, "CHASES", {"L2": 1 << 10, "memory": 1 << 16})
    monkeypatch.setattr(probe_memory, "KILOBYTES", (2,))


@pytest.mark.parametrize(
    "kernel, options, first",
    [
        ("hop_all", (), 75),
        ("hop_all", ("-DCLUSTER=8", "-DASYNC", "-DSTORES=8", "-DFENCE=1", "-DLDS"), 90),
        ("hop_all", ("-DCLUSTER=16",), 90),
        *(("ring", (f"-DLOADS={groups}", f"-DWORDS_SENT={sent}"), 75) for groups, sent in ((6, 1), (24, 1), (1, 4))),
    ],
)
def test_kernels_compile_without_spills(kernel, options, first):
    from cuda_on_cpu.gate import parse_log

    for arch in nvrtc.ARCHITECTURES:
        if arch >= first:
            program = nvrtc.compile(source(kernel), file="probe.cu", arch=arch, options=options)
            found = parse_log(program.log)
            assert len(found) >= (1 if kernel == "ring" else 6)
            assert not any(r.spill_stores or r.spill_loads or r.stack for r in found.values()), arch


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
    assert probe.weights_read_plain(device, 8192)["bytes_per_second"] == pytest.approx(8192e6)
    found = probe.cluster_exchange(device, sizes=(4,), kilobytes=(1,))
    assert found["cluster 4, 1 KB"]["seconds"] == pytest.approx(1e-6), found


@pytest.mark.parametrize("how", [{}, {"policy": "random", "seed": 1}], ids=["ascending", "random"])
def test_memory_fences_and_the_ring(how, monkeypatch):
    small(monkeypatch)
    device = EmulatedGpu(90, **how)
    found = probe_memory.latencies(device) | probe_memory.fences(device)
    assert len(found) == 8 and all(row["seconds"] == pytest.approx(1e-6) for row in found.values()), found
    device.steps = 1, 34  # all slots of the ring in turn
    found = probe_memory.ring(device)
    assert found.keys() == {"2 KB, 1 x 2 blocks", "2 KB, 2 x 2 blocks", "2 KB, 1 x 4 blocks"}
    assert all(row.get("seconds") == pytest.approx(1e-6) for row in found.values()), found


def test_the_blocks_of_a_cooperative_launch_stand_along_y(monkeypatch):
    """CuPy takes a grid without blocks along y and z for one-dimensional and shrinks it where it does not fit."""

    class Recorder(EmulatedGpu):
        def load(self, name, *options, cooperative=False):
            kernel = super().load(name, *options, cooperative=cooperative)

            def run(grid, *rest, **more):
                grids.append((cooperative, grid))
                kernel(grid, *rest, **more)

            return run

    small(monkeypatch)
    grids = []
    probe.probe(Recorder(90), ("hop_one", "hop_all", "hop_counter", "ring"))
    assert all(grid[0] == 1 and grid[1] > 1 for cooperative, grid in grids if cooperative)
    assert any(cooperative for cooperative, _ in grids)


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
            ("if (threadIdx.x == 0) here[blockIdx.y] = data + 1", "if (0) here[blockIdx.y] = 0"),
            "expected 1",
        ),
        ("hop_counter", ("red.release.gpu", "red.relaxed.gpu"), "race"),
        ("block_barrier", ("        __syncthreads();\n        value = box", "        value = box"), "uninitialised"),
        ("weights_read", ("tile += 4", "tile += 8"), "expected 2048"),
        ("latencies", ("chain + at", "chain + (at ^ 1)"), "the chain ends at"),
        ("fences", ("k < STORES; k++) {", "k < STORES - 1; k++) {"), "expected 1 everywhere"),
        ("ring", ("first + i, seen + 1)", "first + i, seen + 2)"), "expected 1 everywhere"),
        ("ring", ("i < sent &&", "i + 1 < sent &&"), "livelock"),
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
        all_equal(EmulatedGpu())([out, lost], 3)
    all_equal(EmulatedGpu())([out, 0 * lost], 3)


def test_without_a_gpu_it_says_so():
    from click.testing import CliRunner

    from bench.cli import main
    from bench.rivals import missing

    if missing("gpurnn-cuda") is None:
        pytest.skip("there is a GPU here")
    done = CliRunner().invoke(main, ["probe"])
    assert done.exit_code == 1 and "no GPU to measure" in done.output
