"""A header in the making: constant arrays, the members of the state, the statements of a step."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .literals import array_text, number

SLOTS = 2  # memory for the outputs of layers: a layer reads one and writes the other


class Value(NamedTuple):
    """A vector in the C code: the text of its address, its size, and the slot that it is in, if it is in one."""

    text: str
    size: int
    slot: int | None = None


class Builder:
    """What a header will hold. name: its prefix. weights: "float32" or "int8". activations: "float32" or "int16".
    tied: the ids of embeddings whose tables are weights of a TiedLinear, too.

    Attributes
    ----------
    functions : dict of str to None
        The functions of kernels/c that are called, in the order of their first call.
    """

    def __init__(self, name: str, weights: str, activations: str, tied: Collection[int] = ()) -> None:
        self.name, self.weights, self.activations, self.tied = name, weights, activations, tied
        self.bytes = 0  # of constants
        self.functions: dict[str, None] = {}
        self.arrays: list[str] = []  # definitions
        self.members: list[str] = []  # declarations
        self.lines: list[str] = []  # of the step
        self.resets: list[str] = []  # statements
        self.tables: dict[int, Any] = {}  # id of an embedding -> its Matrix
        self._names: set[str] = set()
        self._depth = 1
        self._slots = [0] * SLOTS
        self._scratch = self._whole = 0

    # ---- names, arrays, members

    def unique(self, wanted: str) -> str:
        """A name of letters, digits and single underscores that no array and no member has yet."""
        wanted = re.sub(r"[^A-Za-z0-9]+", "_", wanted).strip("_")
        wanted = wanted if wanted[:1].isalpha() else f"layer{wanted}"
        name, number = wanted, 1
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def array(self, wanted: str, values: np.ndarray) -> str:
        """The name of a constant array of float32, int8 or uint16. Raises ValueError where one is not finite."""
        if not np.isfinite(values).all():
            raise ValueError(f"{wanted.strip()}: its numbers are not all finite in float32")
        name = f"{self.name}_{self.unique(wanted)}"
        kind = {"float32": "float", "int8": "int8_t", "uint16": "uint16_t"}[values.dtype.name]
        head = f"static const {kind} {name}[{values.size}] {self.name.upper()}_ALIGNED = {{"
        self.bytes += values.nbytes
        self.arrays.append(f"{head}\n{array_text(values)}\n}};")
        return name

    def floats(self, wanted: str, values: Any) -> str:
        """The name of a constant array of float32, from any numbers."""
        with np.errstate(over="ignore"):  # ``array`` refuses infinity
            return self.array(wanted, np.asarray(values, np.float32))

    def member(self, wanted: str, size: int, initial: Any = None) -> str:
        """The text of a vector of the state. initial: what ``reset`` sets it to, an array; zeros by default."""
        name = self.unique(wanted)
        self.members.append(f"float {name}[{size}];")
        if initial is None or not np.any(initial):
            self.resets.append(f"memset(state->{name}, 0, sizeof state->{name});")
        else:
            values = self.floats(f"initial_{name}", initial)
            self.resets.append(f"memcpy(state->{name}, {values}, sizeof state->{name});")
        return f"state->{name}"

    def counter(self, wanted: str) -> str:
        """The text of a counter of the state, which ``reset`` sets to 0."""
        name = self.unique(wanted)
        self.members.append(f"uint32_t {name};")
        self.resets.append(f"state->{name} = 0;")
        return f"state->{name}"

    # ---- memory of a step

    def output(self, size: int, *read: Value) -> Value:
        """Memory for the output of a layer, in a slot where nothing of what it has ``read`` is."""
        slot = next(n for n in range(SLOTS) if all(value.slot != n for value in read))
        self._slots[slot] = max(self._slots[slot], size)
        return Value(f"state->out{slot}", size, slot)

    def scratch(self, first: int, size: int) -> str:
        """The address of memory within a layer, from the ``first`` number on."""
        self._scratch = max(self._scratch, first + size)
        return f"state->scratch + {first}" if first else "state->scratch"

    def whole_numbers(self, size: int) -> str:
        """The address of memory for quantized vectors."""
        self._whole = max(self._whole, size)
        return "state->whole"

    def memory(self) -> list[str]:
        """The declarations of the memory that a step uses."""
        sizes = {f"out{slot}": size for slot, size in enumerate(self._slots)}
        sizes |= {"scratch": self._scratch}
        found = [f"float {name}[{size}];" for name, size in sizes.items() if size]
        return found + ([f"int16_t whole[{self._whole}];"] if self._whole else [])

    # ---- statements

    def line(self, text: str) -> None:
        """Write a line of the step."""
        self.lines.append("    " * self._depth + text)

    @contextmanager
    def block(self, head: str = "") -> Iterator[None]:
        """Braces around the lines that follow."""
        self.line(f"{head} {{".lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}")

    def each(self, size: int) -> Any:
        """A loop over ``size`` numbers, with the index k."""
        return self.block(f"for (size_t k = 0; k < {size}; ++k)")

    def call(self, function: str, *arguments: Any) -> str:
        """The text of a call of a function of kernels/c."""
        self.functions.setdefault(function)
        return f"{self.name}_{function}({', '.join(map(str, arguments))})"

    def number(self, value: float) -> str:
        """The text of a constant. Raises ValueError where float32 has none for it."""
        return number(value)


def at(address: str, index: str = "k") -> str:
    """The text of the number at an index, of an address like "a" or "a + 8"."""
    base, _, first = address.partition(" + ")
    return f"{base}[{first} + {index}]" if first else f"{base}[{index}]"


def behind(address: str, count: int) -> str:
    """The address ``count`` numbers on."""
    base, _, first = address.partition(" + ")
    count += int(first or 0)
    return f"{base} + {count}" if count else base
