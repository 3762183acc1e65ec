"""The compile gate over kernels/, and the gate's own rules."""

import dataclasses
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuda_on_cpu import gate, nvrtc
from cuda_on_cpu.kernel_list import FIRST, KERNELS
from helpers import needs_nvrtc

from gpurnn import GRU, LSTM, cells
from gpurnn.backends.cuda import nvrtc as _nvrtc
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.launch import kernel_of, step_names
from gpurnn.backends.sources import kernel_dir, kernel_files, kernel_path, kernel_source

PLAIN = gate.Resources(registers=32, stack=0, spill_stores=0, spill_loads=0, shared=0)


def test_every_kernel_is_on_the_list():
    sources = {name: (kernel_dir() / name).read_text() for name in kernel_files()}
    files = {name.rpartition("/")[2]: text for name, text in sources.items() if name.endswith(".cu")}
    del files["step_means.cu"]  # of generated cells alone: GENERATED has one
    assert gate.list_problems(KERNELS, files) == []
    headers = [name for name in sources if not name.endswith(".cu")]
    assert [name for name in headers if gate.global_functions(sources[name])] == []  # nothing would compile it


def test_no_two_sources_have_the_same_name_and_each_is_found_by_it():
    for name in kernel_files():
        assert kernel_path(name.rpartition("/")[2]) == kernel_dir() / name
    with pytest.raises(FileNotFoundError, match="no file sideways.cu"):
        kernel_path("sideways.cu")


def test_a_kernel_without_an_entry_and_an_entry_without_a_kernel_are_found():
    source = """
    // __global__ void commented_out() {}
    template <typename T> __global__ void __launch_bounds__(128, 2) first(T* x) {}
    __global__ void second() {}
    """
    assert gate.global_functions(source) == ["first", "second"]
    problems = gate.list_problems({"a.cu": ["second", "third<float>"], "b.cu": ["fourth"]}, {"a.cu": source})
    assert problems == [
        "a.cu: first has no entry in kernel_list.py",
        "a.cu: kernel_list.py names third, which is gone",
        "kernel_list.py names b.cu, which is gone",
    ]


@pytest.mark.parametrize(
    "declaration",
    [
        "__global__ void __launch_bounds__(MOST(1), 2) k(",
        "__global__ __launch_bounds__(4 * (2 + 1)) __cluster_dims__(2, 1, 1) void k(",
        "__global__ __maxnreg__(32) void k(",
        "static void __global__ k(",
        'extern "C" __global__ inline void\nk (',
    ],
)
def test_every_way_to_write_a_kernel_is_found(declaration):
    assert gate.global_functions(declaration + "float* x) { f(x); }") == ["k"]


@needs_nvrtc
def test_all_kernels_compile_for_all_architectures_and_need_no_more_than_before():
    table = gate.measure_all()
    assert {arch for _, _, arch in table} == set(nvrtc.ARCHITECTURES)
    assert len(table) == sum(
        len(names) for file, names in KERNELS.items() for arch in nvrtc.ARCHITECTURES if arch >= FIRST.get(file, 0)
    )
    assert gate.spills(table) == []
    version, accepted = gate.read_accepted()
    if version != nvrtc.version():
        pytest.skip(f"nothing spills; resources.json is for NVRTC {version}, here is {nvrtc.version()}: not compared")
    assert gate.growth(table, accepted) == []
    assert accepted.keys() == table.keys()
    assert all(gate.blocks_per_multiprocessor(r, gate.BLOCK, key[2]) >= 1 for key, r in table.items())


# One of each kind: many states, own parameters and masks, a second product, none, means over the units
GENERATED = {
    "four states": cells.slstm,
    "drawn": LSTM(1, 1, zoneout=(0.1, 0.1), recurrent_dropout=0.1, peephole=True, backend="numpy").cell,
    "second product": cells.mgu,
    "no product": cells.indrnn,
    "many means": LSTM(1, 1, layer_norm=True, backend="numpy").cell,
    "means": GRU(1, 1, layer_norm=True, backend="numpy").cell,
}
LIMITS = {75: (40, 64), 80: (108, 163), 86: (84, 99), 89: (128, 99), 90: (132, 227), 100: (148, 227), 120: (170, 99)}


def generated_kernels(cell, arch):
    """file -> name expressions of a generated cell: those of `step`, and the best tile of the other schedules."""
    found = {}
    for storage in (
        ("float", "__half") if cell.means else ("float", "double", "__half")
    ):  # double spills 8 bytes on sm_80
        for file, expression, _ in step_names(cell, storage):
            found.setdefault(file, []).append(expression)
    multiprocessors, kilobytes = LIMITS[arch]
    device = schedules.Device(arch, multiprocessors, kilobytes << 10)
    sizes = {"block": 64, "grid": 256}
    for dtype, schedule, backward in itertools.product(("float32", "bfloat16"), sizes, (False, True)):
        problem = schedules.Problem(cell, sizes[schedule], 100, 16, 1, dtype, False, backward)
        tiles = [one for one in schedules.candidates(problem, device)[0] if one.schedule == schedule]
        if cell.means:  # with and without tensor cores
            tiles = list({one.kernel: one for one in reversed(tiles)}.values())
        for best in tiles if cell.means else tiles[:1]:
            file, expression, _ = kernel_of(problem, best)
            found.setdefault(file, []).append(expression)
    return {file: list(dict.fromkeys(expressions)) for file, expressions in found.items()}


@needs_nvrtc
@pytest.mark.parametrize("kind", GENERATED)
def test_generated_kernels_compile_for_all_architectures_and_do_not_spill(kind):
    """For tensor cores and without; what is held in registers is right at once (``cost.extra_registers``). Of two
    kinds that are alike one takes one half of the architectures, the next one the other."""
    cell, wanted = GENERATED[kind], {}  # (file, architecture) -> name expressions
    for arch in nvrtc.ARCHITECTURES[list(GENERATED).index(kind) % 2 :: 2]:
        for file, expressions in generated_kernels(cell, arch).items():
            wanted.setdefault((file, gate.SAME.get(arch, arch)), {}).update(dict.fromkeys(expressions))
    jobs = [
        (file, kernel_source(file, cell.struct), list(expressions), arch)
        for (file, arch), expressions in wanted.items()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = list(pool.map(lambda job: gate.measure(*job), jobs))
    table = {
        (file, expression, arch): resources
        for (file, _, _, arch), found in zip(jobs, tables, strict=True)
        for expression, resources in found.items()
    }
    assert len({file for file, _, _ in table}) == {
        "second product": 1,
        "no product": 2,
        "many means": 2,
        "means": 3,
    }.get(kind, 5)
    if nvrtc.version() == gate.read_accepted()[0]:  # of another compiler `CudaOps.without_spills` takes care
        assert gate.spills(table) == []


@needs_nvrtc
@pytest.mark.parametrize("file", gate.BOTH)
def test_what_is_the_same_for_two_architectures_is_the_same(file):
    """The PTX of two kernels, too, but for the architecture's name. No source asks which of them it is compiled for."""
    asked = {
        line
        for name in kernel_files()
        for line in (kernel_dir() / name).read_text().splitlines()
        if "__CUDA_ARCH__" in line
    }
    assert asked <= {"#if __CUDA_ARCH__ >= 900"} and not any(one < 90 <= two for one, two in gate.SAME.items())
    _, accepted = gate.read_accepted()
    for (name, expression, arch), resources in accepted.items():
        if arch in gate.SAME:
            assert resources == accepted[name, expression, gate.SAME[arch]]
    for arch, other in gate.SAME.items():
        names = KERNELS[file][:: len(KERNELS[file]) - 1]
        one, two = (
            nvrtc.compile(kernel_source(file), file=file, arch=number, expressions=names, machine_code=False).ptx
            for number in (arch, other)
        )
        assert f".target sm_{arch}" in one and one.replace(f".target sm_{arch}", f".target sm_{other}") == two


@needs_nvrtc
def test_a_kernel_that_spills_is_found():
    source = """
    __global__ void __launch_bounds__(1024, 2) hungry(const float* x, float* y) {
        float v[64];
        for (int k = 0; k < 64; k++) v[k] = x[threadIdx.x + 1024 * k];
        for (int j = 0; j < 64; j++) {
            float sum = 0;
            for (int k = 0; k < 64; k++) sum += v[k] * v[(k * j) % 64];
            y[threadIdx.x + 1024 * j] = sum;
        }
        for (int k = 0; k < 64; k++) y[threadIdx.x + 1024 * k] += v[k];
    }
    """
    table = {("hungry.cu", "hungry", 90): gate.measure("hungry.cu", source, ["hungry"], 90)["hungry"]}
    (problem,) = gate.spills(table)
    assert "hungry.cu: hungry for sm_90" in problem


@needs_nvrtc
def test_static_shared_memory_is_counted():
    source = """
    __global__ void turn(float* x) {
        __shared__ float kept[256];
        kept[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = kept[255 - threadIdx.x];
    }
    """
    assert gate.measure("turn.cu", source, ["turn"], 80)["turn"].shared == 1024


@needs_nvrtc
def test_a_compile_error_names_the_real_file_and_line():
    source = kernel_source("bptt.cu") + '\n#line 7 "broken.cu"\n__global__ void broken() { nothing; }\n'
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu\(7\)"):
        nvrtc.compile(source, file="joined.cu")


def test_growth_is_told_and_shrinking_is_not():
    key = ("a.cu", "k<float>", 90)
    more = dataclasses.replace(PLAIN, registers=40, shared=512)
    problems = gate.growth({key: more}, {key: PLAIN})
    assert problems[0] == "a.cu: k<float> for sm_90: registers grew from 32 to 40"
    assert problems[1] == "a.cu: k<float> for sm_90: shared grew from 0 to 512"
    assert "--accept" in problems[2]
    assert gate.growth({key: PLAIN}, {key: more}) == []
    assert "is not in resources.json" in gate.growth({key: PLAIN}, {})[0]


@needs_nvrtc
def test_what_is_accepted_is_read_back(tmp_path):
    table = {("a.cu", "k<float>", 90): PLAIN, ("a.cu", "k<float>", 75): dataclasses.replace(PLAIN, shared=8)}
    gate.accept(table, tmp_path / "resources.json")
    assert gate.read_accepted(tmp_path / "resources.json") == (nvrtc.version(), table)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "arch", "blocks"),
    [
        (32, 0, 1024, 90, 2),  # 65536 / (32 * 1024)
        (33, 0, 1024, 90, 1),  # 33 * 32 rounds up to 1280 a warp: 12 warps in each of 4 parts
        (255, 0, 256, 80, 1),  # 8192 a warp: 8 warps
        (255, 0, 257, 80, 0),  # 9 warps do not fit
        (73, 0, 160, 75, 4),  # 2560 a warp: 6 in each of 4 parts, not 25 in all
        (33, 0, 544, 80, 2),  # 1280 a warp: 12 in each of 4 parts, not 51 in all
        (16, 0, 1056, 80, 0),  # a block has 1024 threads at most
        (16, 0, 32, 86, 16),  # the limit of blocks
        (16, 0, 256, 75, 4),  # the limit of warps
        (16, 0, 256, 120, 6),
        (16, 100 * 1024, 128, 90, 2),  # 228 KB hold two blocks of 101
        (16, 227 * 1024, 128, 90, 1),
        (16, 228 * 1024, 128, 90, 0),
        (16, 64 * 1024, 128, 75, 1),
        (16, 99 * 1024, 128, 89, 1),
    ],
)
def test_blocks_per_multiprocessor(registers, shared, threads, arch, blocks):
    resources = dataclasses.replace(PLAIN, registers=registers)
    assert gate.blocks_per_multiprocessor(resources, threads, arch, dynamic_shared=shared) == blocks


def test_the_source_of_a_kernel_holds_its_headers_once():
    source = kernel_source("step.cu")
    assert source.startswith('#line 1 "schedules/step.cu"\n')
    for header in ("common.cuh", "cells/rnn.cuh", "cells/lstm.cuh", "cells/gru.cuh"):
        assert source.count(f'#line 1 "{header}"\n') == 1
    assert '\n#include "' not in source and "../" not in source
    line = next(k for k, text in enumerate(source.splitlines()) if "void step_forward(" in text)
    marker = max(k for k, text in enumerate(source.splitlines()[:line]) if text.startswith("#line"))
    number = int(source.splitlines()[marker].split()[1]) + line - marker - 1
    assert "void step_forward(" in kernel_path("step.cu").read_text().splitlines()[number - 1]


@pytest.mark.slow
@needs_nvrtc
def test_float_and_double_need_no_headers_of_16_bit_types():
    """tf32 on tensor cores, too: an installation of CUDA without cuda_fp16.h still computes in 32 and 64 bits."""
    options = (*_nvrtc.OPTIONS, "-arch=sm_90")
    for file, names in KERNELS.items():
        plain = tuple(name for name in names if "half" not in name and "bfloat16" not in name)
        if plain:
            assert len(_nvrtc.compile(kernel_source(file), options, plain, file).lowered) == len(plain)
    with pytest.raises(nvrtc.CompileError, match="__half"):
        _nvrtc.compile(kernel_source("step.cu"), options, ("step_project<__half>",), "step.cu")


def test_no_lambda_takes_arguments_of_any_type():
    """NVRTC 13.0 takes one with ``auto`` parameters for a function of the host, and refuses it; 13.5 does not."""
    texts = {file: (kernel_dir() / file).read_text(encoding="utf-8") for file in kernel_files()}
    assert [file for file, text in texts.items() if re.search(r"\[[&=\w, ]*\]\s*\([^)]*\bauto\b", text)] == []
    assert re.search(r"\[[&=\w, ]*\]\s*\([^)]*\bauto\b", "run([&](auto& pos, auto& channels) {")
