"""Sources, signatures and checked launches, without a GPU."""

import types

import numpy as np
import pytest

from gpurnn.backends import sources
from gpurnn.backends.cuda.launch import EACH, Argument, Kernels, Rows, signature
from gpurnn.errors import DtypeError, ShapeError


class Device:
    """Takes any launch and remembers it; its arrays are NumPy's."""

    xp = types.SimpleNamespace(ndarray=np.ndarray)
    address = staticmethod(lambda array: array.ctypes.data)

    def __init__(self):
        self.launches, self.loads = [], []

    def load(self, file, expression, struct=None):
        self.loads.append((file, expression))
        return lambda grid, block, args, shared_mem=0: self.launches.append((grid, block, args, shared_mem))


# ---- signatures


def test_signatures_come_from_the_source():
    found = {a.name: a for a in signature("step.cu", "step_forward", ("lstm", "__half"))}
    assert found["T_"] == Argument("T_", "int32", pointer=False, optional=False)
    assert found["gates"] == Argument("gates", "float16", pointer=True, optional=False)
    assert found["lengths"] == Argument("lengths", "int32", pointer=True, optional=True)
    assert found["ah"] == Argument("ah", "float32", pointer=True, optional=True)
    assert found["mask"] == Argument("mask", "bool", pointer=True, optional=True)
    assert signature("step.cu", "step_forward", ("lstm", "double"))[10].dtype == "float64"


def test_every_kernel_has_a_signature():
    from cuda_on_cpu.kernel_list import KERNELS

    for file, expressions in KERNELS.items():
        for expression in expressions:
            kernel, _, inside = expression.partition("<")
            assert signature(file, kernel, tuple(filter(None, map(str.strip, inside[:-1].split(",")))))


def test_unknown_kernels_and_wrong_template_arguments():
    with pytest.raises(KeyError, match="no kernel step_sideways"):
        signature("step.cu", "step_sideways", ("float",))
    for wrong in (("float",), ("lstm", "float", "true", "true")):
        with pytest.raises(TypeError, match="CellOf, T, MARKED"):
            signature("step.cu", "step_forward", wrong)
    assert signature("step.cu", "step_forward", ("lstm", "float", "true")) == signature(
        "step.cu", "step_forward", ("lstm", "float")
    )


# ---- launches

PROJECT = ("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4))


def arguments():
    h, now, output = (np.zeros(shape, np.float32) for shape in ((1, 4, 2, 3), (1, 2, 3), (3, 2, 3)))
    return [3, 2, 3, 0, None, 0, None, now, h, now.copy(), output, None, None]


def project(*changes):
    args = arguments()
    for place, value in changes:
        args[place] = value
    device = Device()
    Kernels(device).launch(*PROJECT, *args)
    return device.launches[0]


def test_scalars_are_cast_and_null_is_an_address():
    _, _, args, _ = project()
    assert [type(arg) for arg in args[:7]] == [np.int32] * 4 + [np.uint64, np.int32, np.uint64]
    assert args[4] == args[6] == 0


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(OverflowError, match="P = 2147483648 does not fit into int32"):
        project((2, 2**31))
    with pytest.raises(OverflowError, match="P = 2.5 does not fit into int32"):
        project((2, 2.5))
    with pytest.raises(OverflowError, match="P = nan does not fit into int32"):
        project((2, float("nan")))
    with pytest.raises(DtypeError, match="h should be float32, got float64"):
        project((8, np.zeros((1, 4, 2, 3))))
    with pytest.raises(ShapeError, match="h should be C-contiguous"):
        project((8, np.zeros((1, 4, 3, 2), np.float32).swapaxes(2, 3)))
    project((8, Rows(np.zeros((1, 4, 3, 2), np.float32).swapaxes(2, 3))))
    with pytest.raises(TypeError, match="h may not be None"):
        project((8, None))
    with pytest.raises(TypeError, match="should be an array on the device, got list"):
        project((8, [1.0]))
    with pytest.raises(TypeError, match="expected 13 arguments, got 1"):
        Kernels(Device()).launch(*PROJECT, 1)


@pytest.mark.parametrize(
    "dtype, fits, others",
    [
        ("float32", [0.1, 2, float("inf"), np.float64(1e38)], [1e300, -1e300]),
        ("float64", [0.1, 1e300, float("inf")], []),
        ("bool", [True, False, 1, np.True_], [2, -1, 0.5]),
        ("uint8", [0, 255, 3.0, np.int64(7)], [-1, 256]),
        ("int64", [2**63 - 1, -(2**63)], [2**63]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_scalars_of_every_kind(dtype, fits, others):
    convert = Kernels(Device())._converter("k", Argument("rate", dtype, pointer=False, optional=False))
    for value in fits:
        assert convert(value) == np.dtype(dtype).type(value) and convert(value).dtype == dtype
    for value in others:
        with pytest.raises(OverflowError, match=f"k: rate = .* does not fit into {dtype}"):
            convert(value)


def test_nan_is_a_float():
    convert = Kernels(Device())._converter("k", Argument("rate", "float32", pointer=False, optional=False))
    assert np.isnan(convert(float("nan")))


def test_empty_and_too_large_grids():
    device = Device()
    kernels = Kernels(device)
    args = arguments()
    kernels.launch("step.cu", "step_project", ("float",), (1, 0, 1), (32, 4), *args)
    assert not device.launches
    with pytest.raises(ValueError, match="more than 65535 blocks"):
        kernels.launch("step.cu", "step_project", ("float",), (1, 65536, 1), (32, 4), *args)
    kernels.launch("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4), *args)
    kernels.launch("step.cu", "step_project", ("float",), (1, 1, 1), (32, 4), *args)
    assert device.loads == [("step.cu", "step_project<float>")]


def test_a_bound_launch_takes_one_number():
    device = Device()
    args = arguments()
    args[3] = EACH
    run = Kernels(device).bind(*PROJECT, *args)
    assert not device.launches
    for step in (0, 7):
        run(step)
    assert [launch[2][3] for launch in device.launches] == [0, 7] and type(device.launches[0][2][3]) is np.int32
    assert all(a is b for a, b in zip(device.launches[0][2][7:11], args[7:11], strict=True))
    with pytest.raises(OverflowError, match="step = 2147483648 does not fit into int32"):
        run(2**31)
    with pytest.raises(ShapeError, match="h should be C-contiguous"):
        args[8] = args[8].swapaxes(2, 3)
        Kernels(device).bind(*PROJECT, *args)


def test_what_a_kernel_reads_in_vectors_starts_at_16_bytes():
    """Every pointer that the sources mark; others may lie anywhere."""
    marked = {
        (file, kernel, argument.name)
        for file, kernels in (("block.cu", ("block_forward", "block_backward")), ("step.cu", ("step_backward",)))
        for kernel in kernels
        for argument in signature(file, kernel, ("lstm", "float", *"1234567"[: 4 if "back" in kernel else 5])
                                  if file == "block.cu" else ("lstm", "float"))
        if argument.aligned
    }  # fmt: skip
    assert marked == {("block.cu", kernel, "weight_hh") for kernel in ("block_forward", "block_backward")}
    convert = Kernels(Device())._converter("k", Argument("W", "float32", pointer=True, optional=False, aligned=True))
    memory = np.zeros(64, np.float32)
    start = -memory.ctypes.data % 16 // 4
    assert convert(memory[start:]) is not None and convert(memory[start + 4 :]) is not None
    for off in (1, 2, 3):
        with pytest.raises(ShapeError, match="k: W should start at a multiple of 16 bytes, got address 0x.*: copy it"):
            convert(memory[start + off :])
    anywhere = Kernels(Device())._converter("k", Argument("W", "float32", pointer=True, optional=False))
    assert anywhere(memory[start + 1 :]) is not None


def test_the_sources_are_one_text():
    text = sources.kernel_source("step.cu")
    assert '\n#include "' not in text
    assert text.count("struct lstm") == 1
