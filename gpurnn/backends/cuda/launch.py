"""The kernels: signatures, checked launches, and the list of them."""

import functools
import re
import threading
from dataclasses import dataclass

import numpy as np

from ...cells import CELLS
from ...dtypes import C_NAMES, bfloat16_or_none_such, dtype_name
from ...errors import DtypeError, ShapeError
from ..sources import kernel_path

# ---- signatures

# C++ type -> NumPy dtype name
_DTYPES = {
    **{c_name: name for name, c_name in C_NAMES.items()}, "bool": "bool",
    "int": "int32", "unsigned": "uint32", "unsigned int": "uint32", "long long": "int64",
    "unsigned long long": "uint64", "unsigned char": "uint8",
}  # fmt: skip


ALIGNMENT = 16  # bytes of the largest word that a kernel loads


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

    types: those at the end may be missing where the kernel has a default.
    A pointer may be null where the comment after it says "or null", and must be aligned where it says "aligned".
    Raises KeyError where the file has no such kernel.

    >>> signature("step.cu", "step_project", ("float",))[0]
    Argument(name='T_', dtype='int32', pointer=False, optional=False, aligned=False)
    """
    text = kernel_path(file).read_text(encoding="utf-8")
    head = rf"(?:template <((?:[^<>]|<[^<>]*>)*)>\s*)?__global__ void (?:__\w+__\([^)]*\) )*{kernel}\("
    found = re.search(head, text)
    if not found:
        raise KeyError(f"{file} has no kernel {kernel}")
    template = re.sub(r"<[^<>]*>", "", found[1] or "")
    parts = [part.partition("=") for part in template.split(",") if part.strip()]
    parameters, defaults = [part[0].split()[-1] for part in parts], sum(bool(part[1]) for part in parts)
    if not 0 <= len(parameters) - len(types) <= defaults:
        raise TypeError(f"{kernel}: expected template arguments for {', '.join(parameters)}, got {types}")
    bound = dict(zip(parameters, types, strict=False))
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
            flags = [pointer and words in comment for words in ("or null", "aligned")]
            arguments.append(Argument(name, _DTYPES[bound.get(of, of)], pointer, *flags))
        if end:
            break
    return tuple(arguments)


class Kernels:
    """Checked launches on a device: a ``CupyDevice``, or an object with its ``load``, ``xp`` and ``address``."""

    def __init__(self, device):
        self.device = device
        self._ready, self._loading = {}, threading.Lock()

    def launch(self, file, kernel, types, grid, block, *args, shared=0, cooperative=False, struct=None):
        """Launch ``kernel<types>`` of ``file``; do nothing where the grid is empty.

        args: for scalars Python numbers, which are cast to the declared type; for pointers C-contiguous arrays of the
        declared dtype, ``Rows(array)`` for a strided one, or None where it may be null. cooperative: all blocks run at
        once. struct: as in ``sources.kernel_source``. Raises TypeError for a wrong number of arguments; DtypeError,
        ShapeError and OverflowError, which name the argument.
        """
        ready = self._ready.get((file, kernel, types, struct))
        if ready is None or len(args) != len(ready[1]) or max(grid) > 65535:
            ready = self._loaded(file, kernel, types, struct, grid, len(args))
        if 0 in grid:
            return
        run, converters = ready
        converted = tuple([convert(value) for convert, value in zip(converters, args, strict=True)])
        if cooperative:
            run(grid, block, converted, shared_mem=shared, cooperative=True)
        else:
            run(grid, block, converted, shared_mem=shared)

    def bind(self, file, kernel, types, grid, block, *args, struct=None, shared=0, dependent=False):
        """A function of one number that launches as ``launch`` does, with that number in place of ``EACH``.

        All other arguments are checked now. dependent: the kernel may begin before the launch before it has ended, and
        waits for that by itself.
        """
        run, converters = self._loaded(file, kernel, types, struct, grid, len(args))
        if 0 in grid:
            return lambda number: None
        each = next(k for k, value in enumerate(args) if value is EACH)
        before, after = (
            tuple([convert(value) for convert, value in zip(converters[part], args[part], strict=True)])
            for part in (slice(each), slice(each + 1, None))
        )
        convert = converters[each]
        how = {"shared_mem": shared} | ({"dependent": True} if dependent else {})
        return lambda number: run(grid, block, (*before, convert(number), *after), **how)

    def _loaded(self, file, kernel, types, struct, grid, count):
        """The kernel and the converters of its ``count`` arguments; loads it at its first use."""
        key = (file, kernel, types, struct)
        ready = self._ready.get(key)
        if ready is None:
            expression = f"{kernel}<{', '.join(types)}>" if types else kernel
            converters = [self._converter(kernel, argument) for argument in signature(file, kernel, types)]
            with self._loading:  # once, however many threads want it
                ready = self._ready.get(key) or (self.device.load(file, expression, struct), converters)
                self._ready[key] = ready
        if count != len(ready[1]):
            raise TypeError(f"{kernel}: expected {len(ready[1])} arguments, got {count}")
        if len(grid) > 1 and max(grid[1:]) > 65535:
            raise ValueError(f"{kernel}: the grid {grid} has more than 65535 blocks along y or z")
        return ready

    def _converter(self, kernel, argument):
        """A function that checks and casts one argument. It is made once per kernel, because launches are many."""
        name, dtype = argument.name, argument.dtype
        if not argument.pointer:
            cast, whole = np.dtype(dtype).type, np.dtype(dtype).kind != "f"
            if not whole:  # a number may be rounded; it may not become an infinity
                most = float(np.finfo(cast).max)

                def fits(value):
                    return not most < abs(value) < np.inf
            else:
                low, high = (0, 1) if cast is np.bool_ else (np.iinfo(cast).min, np.iinfo(cast).max)

                def fits(value):
                    return low <= value <= high and cast(value) == value

            known = {}  # most numbers are sizes, which recur

            def scalar(value):
                try:
                    return known[value]
                except (KeyError, TypeError):  # TypeError: an array of one number is not hashable
                    if not fits(value):
                        raise OverflowError(f"{kernel}: {name} = {value} does not fit into {dtype}") from None
                found = cast(value)
                if len(known) < 64 and whole and isinstance(value, int):
                    known[value] = found
                return found

            return scalar
        wanted = np.dtype(dtype) if dtype != "bfloat16" else bfloat16_or_none_such()
        ndarray, null, optional = self.device.xp.ndarray, np.uint64(0), argument.optional
        aligned, address = argument.aligned, self.device.address

        def pointer(value):
            if type(value) is ndarray and value.dtype is wanted and not aligned and value.flags.c_contiguous:
                return value  # as most are
            if value is None:
                if not optional:
                    raise TypeError(f"{kernel}: {name} may not be None")
                return null
            array = value.array if isinstance(value, Rows) else value
            if not isinstance(array, ndarray):
                raise TypeError(f"{kernel}: {name} should be an array on the device, got {type(array).__name__}")
            if array.dtype is not wanted and array.dtype != wanted:
                raise DtypeError(f"{kernel}: {name} should be {dtype}, got {array.dtype}")
            if array is value and not array.flags.c_contiguous:
                raise ShapeError(f"{kernel}: {name} should be C-contiguous, got strides {array.strides}")
            if aligned and address(array) % ALIGNMENT and array.size:
                raise ShapeError(
                    f"{kernel}: {name} should start at a multiple of {ALIGNMENT} bytes, got address "
                    f"{address(array):#x}: copy it"
                )
            return array

        return pointer


EACH = object()  # in ``bind``, the argument that differs between launches


@dataclass(frozen=True)
class Rows:
    """A strided array for a kernel that takes the stride as an argument."""

    array: object


# ---- the list of kernels

MEANS_THREADS = 256  # of a thread block in step_means.cu
BY_STEP = ("step", "fused")  # the schedules that launch for every timestep
_CELLS = tuple(CELLS.values())


def c_type(dtype):
    """The C++ type of a NumPy dtype."""
    return C_NAMES[dtype_name(dtype)]


def cell_type(cell):
    """The C++ name of a cell's struct."""
    return cell.name if cell.struct is None else f"generated::{cell.name}"


def marked_types(marked):
    """The last template argument of a kernel of a time loop: none where a call has no marks."""
    return ("true",) if marked else ()


def means_units(H):
    """Units of a thread in step_means.cu: the fewest, of powers of two, that make ``MEANS_THREADS`` threads enough."""
    return 1 << max(0, -(-H // MEANS_THREADS) - 1).bit_length()


def step_names(cell, storage, H=1):
    """(file, name expression, struct) of the kernels that the schedule step needs for a cell and an H."""
    two = ("inner", "inner_backward") if cell.first < len(cell.hidden) else ()
    more = f", {means_units(H)}" if cell.means else ""
    file, which = ("step_means.cu", "means_") if cell.means else ("step.cu", "")
    kernels = [f"step_{which}{name}" for name in ("forward", "backward", *two)]
    return [(file, f"{kernel}<{cell_type(cell)}, {storage}{more}>", cell.struct) for kernel in kernels]


def kernel_names(dtypes=tuple(C_NAMES), cells=_CELLS):
    """(file, name expression, struct) of every kernel that layers of these dtypes and cells use at any size.

    Of a cell with means those for H up to ``MEANS_THREADS``.
    """
    storages = [C_NAMES[dtype] for dtype in dtypes]
    reals = sorted({"double" if storage == "double" else "float" for storage in storages})
    of_cells, names = [], []
    for storage in storages:
        of_cells += [name for cell in cells for name in step_names(cell, storage)]
        if any(cell.may_project for cell in cells):
            names += [("step.cu", f"step_{which}<{storage}>") for which in ("project", "project_backward")]
        names += [("bptt.cu", f"sum_steps_partial<{storage}>"), ("embedding.cu", f"embedding_chunks<{storage}>")]
    for real in reals:
        names += [("bptt.cu", f"sum_steps_finish<{real}>"), ("embedding.cu", f"embedding_borders<{real}>")]
        names += [("loss.cu", f"cross_entropy_{which}<{real}>") for which in ("forward", "backward")]
        kernels = ("sgd", "rmsprop", "adam", "norm_partial", "scale_grads")
        names += [("optimize.cu", f"{kernel}<{real}>") for kernel in kernels]
    names += [("step.cu", "step_done"), ("epochs.cu", "epochs_done"), ("dropout.cu", "dropout_mask")]
    names += [("optimize.cu", kernel) for kernel in ("norm_finish", "update_verdict")]
    return of_cells + [(*name, None) for name in names]


def kernel_of(problem, candidate):
    """(file, name expression, struct) of a candidate's kernel; None for ``step``, whose kernels fit every size."""
    if candidate.schedule == "step":
        return None
    which = "backward" if problem.backward else "forward"
    own = cell_type(problem.cell), C_NAMES[problem.dtype], *candidate.types, *marked_types(problem.marked)
    types = ", ".join(own)
    return f"{candidate.kernel}.cu", f"{candidate.kernel}_{which}<{types}>", problem.cell.struct


def kernels_of(problem, candidate):
    """As ``kernel_of``, of all kernels that a pass by this candidate needs besides ``kernel_names``; a list."""
    found = [name for name in (kernel_of(problem, candidate),) if name]
    if candidate.schedule == "fused":
        storage, parts = C_NAMES[problem.dtype], candidate.numbers[-1]
        transposed = ("false", "true") if problem.backward else ("false",)
        found += [("fused.cu", f"to_panels<{storage}, {parts}, {how}>", None) for how in transposed]
    return found
