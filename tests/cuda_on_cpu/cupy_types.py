"""Which dtype CuPy's functions give for which operands: its own answers, kept in ``cupy_types.json``.

CuPy takes the first loop of a function that all operands can be cast to, and its loops are not NumPy's: ``where`` has
none for bfloat16 and returns float32. CuPy says without a GPU which loop it takes, so the table is its word, not ours;
``Types`` reads it for the emulated device. After an update of CuPy, write it anew:

    PYTHONPATH=tests python -m cuda_on_cpu.cupy_types
"""

import gc
import itertools
import json
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix(".json")
# The dtypes of the library's arrays -> how the table writes them.
DTYPES = {
    "bool": "b1", "uint8": "u1", "uint32": "u4", "uint64": "u8", "int32": "i4", "int64": "i8",
    "float16": "f2", "bfloat16": "bf", "float32": "f4", "float64": "f8",
}  # fmt: skip
WRITTEN = DTYPES | {"int8": "i1"}  # which CuPy gives for the power of two booleans
# Python's numbers, which take the dtype of the array beside them where they can.
NUMBERS = {"bool": True, "int": 1, "float": 0.5}
OPERANDS = (*DTYPES.values(), *NUMBERS)
NO_LOOP = "--"  # CuPy raises TypeError

UNARY = "abs cos exp invert isfinite log log1p logical_not negative sign sin sqrt square tanh"
BINARY = (
    "add bitwise_and bitwise_or bitwise_xor divide equal floor_divide greater greater_equal left_shift less less_equal "
    "logical_and maximum minimum multiply not_equal power remainder right_shift subtract"
)
REDUCTIONS = "all any argmax max mean min sum"
_OPERATORS = {  # __add__, __radd__, __iadd__ -> add
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "left_shift", "rshift": "right_shift", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal", "eq": "equal", "ne": "not_equal", "neg": "negative", "invert": "invert", "abs": "abs",
}  # fmt: skip


# ---- what the table says


def read():
    """The table as it was committed."""
    return json.loads(PATH.read_text())


class Types:
    """The table as the emulated device asks it."""

    def __init__(self, table=None):
        table = read() if table is None else table
        self._unary = {
            name: dict(zip(DTYPES.values(), row.split(), strict=True)) for name, row in _each(table["one operand"])
        }
        self._binary = {
            name: {first: dict(zip(OPERANDS, row.split(), strict=True)) for first, row in rows.items()}
            for name, rows in _each(table["two operands"])
        }
        self._given = {name: row.split() for name, row in _each(table["dtype="])}
        self._out = {computed: row.split() for computed, row in table["out="].items()}

    def computed(self, name, operands, dtype=None, out=None):
        """The dtype that CuPy computes in, and gives where there is no ``out``; raises TypeError where CuPy does.

        name: of a function, method or operator; operands: arrays and numbers in the order of the call; dtype, out: the
        arguments of these names. None for what is not in the table, because there CuPy asks NumPy (``promote_types``
        for concatenate and stack, ``can_cast`` for copyto), or because the call names the dtype or keeps it.
        """
        name = _function(name)
        if name == "matmul":  # NumPy's rule, too, but NumPy itself multiplies bfloat16 as float32
            computed = np.promote_types(*(operand.dtype for operand in operands))
            if computed.name == "bfloat16" and max(operand.ndim for operand in operands) > 2:
                raise TypeError("cupy multiplies no stacks of bfloat16 matrices")
            return computed  # and copied into any ``out``
        if name not in self._unary and name not in self._binary:
            return None
        computed = np.dtype(dtype) if dtype is not None else self._result(name, operands)
        if dtype is not None and WRITTEN.get(computed.name) not in self._given.get(name, ()):
            raise TypeError(f"cupy's {name} has no loop that gives {computed}")
        if out is not None and WRITTEN[out.dtype.name] not in self._out[WRITTEN[computed.name]]:
            raise TypeError(f"cupy's {name} does not cast {computed} to {out.dtype} by the rule 'same_kind'")
        return computed

    def _result(self, name, operands):
        if name in self._unary:
            codes = [_code(operands[0])]  # an axis may follow
            code = self._unary[name].get(*codes, NO_LOOP)
        else:
            if name == "where":
                operands = operands[1:]  # the condition is made boolean first
            codes = [_code(operand) for operand in operands]
            if len(set(codes[1:])) > 1:
                raise TypeError("the table has clip with two bounds of one type")
            code = self._binary[name][codes[0]][codes[1]]
        if code == NO_LOOP:
            raise TypeError(f"cupy's {name} has no loop for {', '.join(codes)}")
        return _dtype(code)


def _function(name):
    """The name in the table of a function, method or operator."""
    if name.startswith("__"):
        inner = name.strip("_")
        name = _OPERATORS.get(inner) or _OPERATORS.get(inner[1:], inner)
    return {"argpartition": "argsort"}.get(name, name)


def _code(operand):
    if type(operand).__name__ in NUMBERS:
        return type(operand).__name__
    if not hasattr(operand, "dtype"):
        raise TypeError(f"Unsupported type {type(operand)}")
    if operand.dtype.name not in DTYPES:
        raise TypeError(f"{operand.dtype} is not in the table: add it to DTYPES, and write the table anew")
    return DTYPES[operand.dtype.name]


def _each(groups):
    """(name, value) of every name in the keys, which stand for several functions."""
    return [(name, value) for names, value in groups.items() for name in names.split()]


def _dtype(code):
    name = next(name for name, written in WRITTEN.items() if written == code)
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


# ---- asking CuPy


def ask():
    """The table, from the CuPy that is installed."""
    import cupy
    import ml_dtypes
    from cupy._core import _kernel, _reduction

    kinds = (_kernel.ufunc, _reduction._SimpleReductionKernel)
    known = {kind.name: kind for kind in gc.get_objects() if type(kind) in kinds}  # some have no name in a module
    functions = {name: getattr(cupy, name) for name in f"{UNARY} {BINARY}".split()}
    functions |= {name: known[f"cupy_{name}"] for name in REDUCTIONS.split()}
    functions |= {name: known[f"cupy_{name}"] for name in ("where", "clip")}
    operands = _operands(cupy)

    def row(name, before=(), twice=False, among=OPERANDS):
        first = [operands[code] for code in before]
        return " ".join(_loop(functions[name], [*first, *[operands[code]] * (1 + twice)]) for code in among)

    def square(name):
        before = ("b1",) if name == "where" else ()
        return {code: row(name, (*before, code), twice=name == "clip") for code in OPERANDS}

    # sum(dtype=) is another function than sum
    given = functions | {"sum": known["cupy_sum_with_dtype"]}
    return {
        "made with": {module.__name__: module.__version__ for module in (cupy, np, ml_dtypes)},
        "operands": " ".join(OPERANDS),
        "one operand": _grouped(
            {name: row(name, among=DTYPES.values()) for name in f"{UNARY} {REDUCTIONS}".split()}
            | {"argsort": _sorted_by(cupy)}
        ),
        "two operands": _grouped({name: square(name) for name in f"{BINARY} where clip".split()}),
        "dtype=": _grouped({name: _given(given[name]) for name in f"{UNARY} {BINARY} sum mean".split()}),
        "out=": {code: _out(code) for code in DTYPES.values()},
    }


def _operands(cupy):
    """Code -> an operand of CuPy's. An empty array in memory that does not exist needs no GPU."""
    from cupy._core._scalar import CScalar

    nowhere = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1, 0, None, device_id=0), 0)
    arrays = {code: cupy.ndarray((0,), _dtype(code), memptr=nowhere) for code in DTYPES.values()}
    return arrays | {name: CScalar(number) for name, number in NUMBERS.items()}


def _loop(function, operands, dtype=None):
    """The code of what the loop gives that CuPy takes; NO_LOOP where it refuses."""
    try:
        chosen = function._ops.guess_routine(function.name, {}, operands, dtype, getattr(function, "_out_ops", None))
    except TypeError:
        return NO_LOOP
    return WRITTEN.get(chosen.out_types[0].name, NO_LOOP)  # else complex, of operands that the library has not


def _given(function):
    return " ".join(code for code in DTYPES.values() if _loop(function, [], _dtype(code)) != NO_LOOP)


def _out(computed):
    """Into arrays of which dtypes CuPy writes."""
    from cupy._core._dtype import _raise_if_invalid_cast

    def writes(out):
        try:
            _raise_if_invalid_cast(_dtype(computed), _dtype(out), "same_kind")
        except TypeError:
            return False
        return True

    return " ".join(filter(writes, DTYPES.values()))


def _sorted_by(cupy):
    """int64 where Thrust sorts by the dtype; a GPU is asked for only later."""

    def sorts(name):
        try:
            cupy.cuda.common._get_dtype_id(_dtype(DTYPES[name]))
        except (TypeError, ValueError):
            return False
        return True

    return " ".join("i8" if sorts(name) else NO_LOOP for name in DTYPES)


def _grouped(values):
    """{name: value} with the names that have equal values joined in one key."""
    names = sorted(values, key=lambda name: (str(values[name]), name))
    groups = itertools.groupby(names, key=lambda name: values[name])
    return dict(sorted((" ".join(members), value) for value, members in ((v, list(m)) for v, m in groups)))


if __name__ == "__main__":
    PATH.write_text(json.dumps(ask(), indent=1) + "\n")
