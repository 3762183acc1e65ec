"""The kernels: sources, signatures, checked launches. The one file that reads ``.cu`` files.

``kernels/`` is a top-level folder of the repository and is installed as package data of ``gpurnn.kernels``; it is read
by path, never imported.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DtypeError, ShapeError


def kernel_dir():
    """Folder of the CUDA sources: inside the package where it is installed, beside it in a source checkout.

    A source checkout is an editable install or the bare repository. Raises FileNotFoundError where neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources of gpurnn are missing from {package}: install gpurnn again")


def kernel_files():
    """Names of all CUDA sources relative to ``kernel_dir()``, sorted, with forward slashes.

    >>> "common.cuh" in kernel_files()
    True
    """
    folder = kernel_dir()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".cu", ".cuh"))


def kernel_source(file):
    """The text of a kernel file with our own headers in place of its ``#include "..."`` lines, ready for NVRTC.

    One text, because CuPy's cache knows only the text it is given: a header that NVRTC finds by itself could change
    unseen. ``#line`` keeps every line under its file's own name in messages. Each header is taken once.
    """
    seen = set()

    def text(name):
        if name in seen:
            return ""
        seen.add(name)
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((kernel_dir() / name).read_text(encoding="utf-8").splitlines(), 1):
            header = re.match(r'\s*#include "([^"]+)"', line)
            lines += [text(header[1]), f'#line {number + 1} "{name}"'] if header else [line]
        return "\n".join(lines) + "\n"

    return text(file)


# ---- signatures

# C++ type -> NumPy dtype name
_DTYPES = {
    "float": "float32", "double": "float64", "__half": "float16", "__nv_bfloat16": "bfloat16", "bool": "bool",
    "int": "int32", "unsigned": "uint32", "unsigned int": "uint32", "long long": "int64",
    "unsigned long long": "uint64", "unsigned char": "uint8",
}  # fmt: skip


ALIGNMENT = 16  # bytes: of the largest word that a kernel loads


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel.

    dtype: a NumPy name. optional: a pointer that may be null. aligned: one that must start at a multiple of
    ``ALIGNMENT`` bytes, as the kernel reads or writes several numbers at once.
    """

    name: str
    dtype: str
    pointer: bool
    optional: bool
    aligned: bool = False


@functools.cache
def signature(file, kernel, types):
    """The arguments of a kernel of a ``.cu`` file with the template arguments ``types``: a tuple of ``Argument``.

    A pointer may be null where the comment behind it says "or null", and must be aligned where it says "aligned".
    Raises KeyError where the file has no such kernel.

    >>> signature("step.cu", "step_project", ("float",))[0]
    Argument(name='T_', dtype='int32', pointer=False, optional=False, aligned=False)
    """
    text = (kernel_dir() / file).read_text(encoding="utf-8")
    head = rf"(?:template <((?:[^<>]|<[^<>]*>)*)>\s*)?__global__ void (?:__launch_bounds__\([^)]*\) )?{kernel}\("
    found = re.search(head, text)
    if not found:
        raise KeyError(f"{file} has no kernel {kernel}")
    template = re.sub(r"<[^<>]*>", "", found[1] or "")
    parameters = [part.split()[-1] for part in template.split(",") if part.strip()]
    if len(parameters) != len(types):
        raise TypeError(f"{kernel}: expected template arguments for {', '.join(parameters)}, got {types}")
    bound = dict(zip(parameters, types, strict=True))
    arguments = []
    for line in text[found.end() :].splitlines():
        code, _, comment = line.partition("//")
        code, end, _ = code.replace("__restrict__", "").partition(")")
        for piece in filter(None, (part.strip() for part in code.split(","))):
            kind, name = re.fullmatch(r"(.*?)(\w+)", piece).groups()
            of, pointer = re.sub(r"\b(const|typename)\b|\*", "", kind).strip(), "*" in kind
            computed = re.fullmatch(r"Compute<(\w+)>::real", of)
            if computed:
                of = "double" if bound.get(computed[1], computed[1]) == "double" else "float"
            said = [pointer and words in comment for words in ("or null", "aligned")]
            arguments.append(Argument(name, _DTYPES[bound.get(of, of)], pointer, *said))
        if end:
            break
    return tuple(arguments)


class Kernels:
    """Checked launches on a device.

    A device is ``CupyDevice``, or another with its ``load`` and ``xp``.
    """

    def __init__(self, device):
        self.device = device
        self._ready = {}

    def launch(self, file, kernel, types, grid, block, *args, shared=0, cooperative=False):
        """Launch ``kernel<types>`` of ``kernels/file``; nothing where the grid is empty.

        args: Python numbers for scalars, cast to the declared type; for pointers C-contiguous arrays of the declared
        dtype, ``Rows(array)`` for a strided one, or None where it may be null. Raises TypeError for a wrong number of
        arguments, DtypeError, ShapeError, OverflowError naming the argument. cooperative: all blocks are there at once.
        """
        self.bind(file, kernel, types, grid, block, *args, shared=shared, cooperative=cooperative)()

    def bind(self, file, kernel, types, grid, block, *args, shared=0, cooperative=False):
        """A function that launches as ``launch`` does, with everything checked now.

        Where ``EACH`` stands for a number among the arguments, the function takes it.
        """
        key = (file, kernel, types)
        if key not in self._ready:
            expression = f"{kernel}<{', '.join(types)}>" if types else kernel
            converters = [self._converter(kernel, argument) for argument in signature(file, kernel, types)]
            self._ready[key] = (self.device.load(file, expression), converters)
        run, converters = self._ready[key]
        if len(args) != len(converters):
            raise TypeError(f"{kernel}: expected {len(converters)} arguments, got {len(args)}")
        if 0 in grid:
            return lambda *numbers: None
        if any(size > 65535 for size in grid[1:]):
            raise ValueError(f"{kernel}: the grid {grid} has more than 65535 blocks along y or z")
        options = {"shared_mem": shared} | ({"cooperative": True} if cooperative else {})
        each = next((k for k, value in enumerate(args) if value is EACH), None)
        pairs = zip(converters, args, strict=True)
        given = tuple(value if value is EACH else convert(value) for convert, value in pairs)
        if each is None:
            return lambda: run(grid, block, given, **options)
        before, convert, after = given[:each], converters[each], given[each + 1 :]
        return lambda number: run(grid, block, (*before, convert(number), *after), **options)

    def _converter(self, kernel, argument):
        """The function that checks and casts one argument; made once, as launches are many."""
        name, dtype = argument.name, argument.dtype
        if not argument.pointer:
            cast = np.dtype(dtype).type
            if cast(0).dtype.kind == "f":  # rounding is what floats do; becoming an infinity is not
                most = float(np.finfo(cast).max)

                def fits(value):
                    return not most < abs(value) < np.inf
            else:
                low, high = (0, 1) if cast is np.bool_ else (np.iinfo(cast).min, np.iinfo(cast).max)

                def fits(value):
                    return low <= value <= high and cast(value) == value

            def scalar(value):
                if not fits(value):
                    raise OverflowError(f"{kernel}: {name} = {value} does not fit into {dtype}")
                return cast(value)

            return scalar
        wanted = None if dtype == "bfloat16" else np.dtype(dtype)
        ndarray, null, optional = self.device.xp.ndarray, np.uint64(0), argument.optional
        aligned, address = argument.aligned, self.device.address

        def pointer(value):
            if value is None:
                if not optional:
                    raise TypeError(f"{kernel}: {name} may not be None")
                return null
            strided = isinstance(value, Rows)
            array = value.array if strided else value
            if not isinstance(array, ndarray):
                raise TypeError(f"{kernel}: {name} should be an array on the device, got {type(array).__name__}")
            if array.dtype != wanted and array.dtype.name != dtype:  # a name is dear to ask for
                raise DtypeError(f"{kernel}: {name} should be {dtype}, got {array.dtype}")
            if not strided and not array.flags.c_contiguous:
                raise ShapeError(f"{kernel}: {name} should be C-contiguous, got strides {array.strides}")
            if aligned and address(array) % ALIGNMENT and array.size:
                raise ShapeError(
                    f"{kernel}: {name} should start at a multiple of {ALIGNMENT} bytes, got address "
                    f"{address(array):#x}: copy it"
                )
            return array

        return pointer


EACH = object()  # stands for a number that each launch brings


@dataclass(frozen=True)
class Rows:
    """A strided array for a kernel that is told the stride."""

    array: object
