"""The equations of a cell as loops over its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...cells.names import RESERVED
from ...cells.struct_code import Stages
from ...cells.written import Statements
from .building import Builder, at, behind


class Leaves(NamedTuple):
    """The addresses of what equations read. states: of each one. own, running: a function of the number of a vector."""

    ax: str
    ah: str
    states: Sequence[str]
    own: Callable[[int], str]
    running: Callable[[int], str]


class _Code(Statements):
    """Statements of C. Variables end with an underscore, so that none is a word of C, a macro, or ours."""

    def variable(self, name):
        return super().variable(f"{name}_")


def write_equations(
    b: Builder, units: int, leaves: Leaves, results: Sequence[Any], targets: Sequence[str], first: int
) -> None:
    """Write loops that set ``targets`` to some symbols. first: where scratch memory is free.

    Each mean over the units divides a loop from the next one; what a later one needs is handed on in scratch memory.
    Results are assigned behind all else in the last loop, as they may replace what the equations read.
    """
    stages = Stages(results, ())
    held = {node: b.scratch(first + n * units, units) for n, node in enumerate(stages.locals)}
    first += len(held) * units
    sums = {mean: b.scratch(first + n * units, units) for n, mean in enumerate(stages.means)}
    values = {mean: f"mean{n}" for n, mean in enumerate(stages.means)}
    with b.block():
        for stage in range(stages.count):
            given = values | {node: at(address) for node, address in held.items() if stages.of[node] < stage}
            code = _Code(_leaf(b, units, leaves, given), _call(b), _declared, RESERVED)
            last = stage == stages.count - 1
            ends = [(at(held[node]), node) for node in stages.locals if stages.of[node] == stage and not last]
            means = [mean for mean in stages.means if stages.of[mean] == stage + 1]
            ends += [(at(sums[mean]), mean.args[0]) for mean in means]
            ends += [(at(target), node) for target, node in zip(targets, results, strict=True)] if last else []
            _loop(b, units, code, ends)
            for mean in means:
                b.line(f"const float {values[mean]} = {b.call('mean', sums[mean], units)};")


def _loop(b, units, code, ends):
    """A loop that assigns (place, symbol) pairs."""
    code.compute([node for _, node in ends])
    with b.each(units):
        for line in code.lines:
            b.line(line)
        if len(ends) == 1:
            b.line(f"{ends[0][0]} = {code.expression(ends[0][1])};")
            return
        for n, (_, node) in enumerate(ends):
            b.line(f"const float new{n} = {code.expression(node)};")
        for n, (place, _) in enumerate(ends):
            b.line(f"{place} = new{n};")


def _declared(name, text):
    return f"const float {name} = {text};"


def _leaf(b, units, leaves, given):
    def leaf(node):
        if node in given:
            return given[node]
        match node.op:
            case "constant":
                return b.number(node.value)
            case "ax" | "ah":
                return at(behind(getattr(leaves, node.op), node.value * units))
            case "state":
                return at(leaves.states[node.value])
            case "own" | "running":
                return at(getattr(leaves, node.op)(node.value))
        return None

    return leaf


def _call(b):
    def call(op, arguments, node):
        return b.call(op, *arguments)

    return call
