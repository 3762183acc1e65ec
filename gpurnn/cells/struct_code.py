"""The C++ struct of a traced cell, for CUDA and for the CPU; kernels/cells/cell.cuh is its seam."""

from __future__ import annotations

from .derivatives import below
from .names import RESERVED
from .written import Statements

_LEAVES = ("ax", "ah", "state", "own", "mask", "constant", "dstate", "d_inner")
_MEMBERS = {"ax": "in.ax", "ah": "in.ah", "state": "in.state", "own": "in.p", "mask": "in.mask", "dstate": "in.dstate"}


def write(cell):
    """The text of the struct, and what its stages make: ``Cell.stages`` and ``Cell.locals``.

    The text is "" where a cell can only be array code.
    """
    if cell.array_only:
        return "", ((), ()), (0, 0)
    forward = Stages([*cell.new_states, *_saved(cell)], ())
    backward = Stages([*cell.d, *cell.dstates], {*_saved(cell), *cell.free_states})
    lines = [
        f"// {cell.name}: made from equations in Python.",
        "template <typename real>",
        f"struct {cell.name} : PointwiseCell {{",
        f"    static constexpr int gates = {len(cell.gates)}, states = {len(cell.states)}, saved = {len(cell.saved)};",
        f"    static constexpr int preactivations = {len(cell.preactivations)}, separate = {cell.separate};",
        f"    static constexpr int first_product = {cell._rows[0]}, products = {cell._rows[1]};",
    ]
    if cell.vectors or cell.draws:
        lines.append(f"    static constexpr int parameters = {cell.vectors}, draws = {len(cell.draws)};")
    if cell.inner_node is not None:
        lines.append(f"    static constexpr int inner = {len(cell.saved) - 1};")
    if cell.inner_first:
        lines.append("    static constexpr bool inner_first = true;")
    lines += [*forward.constants(""), *backward.constants("back_"), ""]
    if cell.inner_node is not None:
        lines += [*_inner(cell), ""]
    lines += [*_functions(cell, forward, "Forward"), "", *_functions(cell, backward, "Backward")]
    if cell.inner_node is not None:
        lines += ["", *_backward_inner(cell)]
    passes = forward, backward
    text = "\n".join([*lines, "};"]) + "\n"
    return text, tuple(one.counts for one in passes), tuple(len(one.locals) for one in passes)


def _saved(cell):
    return [node for node in cell.saved_nodes if node is not None]


class Stages:
    """The stages of a pass: a mean divides what comes before it from what comes after.

    results: symbols that the pass computes. given: symbols that it has besides leaves.
    """

    def __init__(self, results, given):
        self.given = set(given)
        order = below(results, lambda node: node in self.given)
        self.of = {}  # symbol -> the first stage that can have it
        for node in order:
            self.of[node] = 0 if node in self.given else max([self.of[arg] for arg in node.args], default=0)
            if node.op == "mean" and node not in self.given:
                self.of[node] += 1
        self.means = [node for node in order if node.op == "mean" and node not in self.given]
        self.means.sort(key=lambda node: (self.of[node], node.index))
        self.count = max(self.of.values(), default=0) + 1
        if not self.means:
            self.count = 1
        self.results = [[] for _ in range(self.count)]  # of each stage: what it computes
        self.results[-1] = list(results)
        self.locals = []
        for stage in reversed(range(self.count)):
            self.results[stage] += [mean.args[0] for mean in self.means if self.of[mean] == stage + 1]
            for node in below(self.results[stage], lambda node, stage=stage: self._is_before(node, stage)):
                if self.of[node] < stage and self._is_local(node) and node not in self.locals:
                    self.locals.append(node)
                    self.results[self.of[node]].append(node)
        self.locals.sort(key=lambda node: node.index)

    def _is_before(self, node, stage):
        return node in self.given or node.op == "mean" or (self.of[node] < stage and node.op not in _LEAVES)

    def _is_local(self, node):
        """Whether a later stage cannot have a symbol but as a local."""
        return node.op not in _LEAVES and node.op != "mean" and node not in self.given

    @property
    def counts(self):
        """How many means each stage makes, but the last one, which makes none."""
        return tuple(sum(self.of[mean] == stage for mean in self.means) for stage in range(1, self.count))

    def constants(self, prefix):
        """The members of the struct that say how many stages, means and locals there are."""
        if self.count == 1:
            return []
        values = " : ".join([f"stage == {stage} ? {count}" for stage, count in enumerate(self.counts)] + ["0"])
        return [
            f"    static constexpr int {prefix}stages = {self.count}, {prefix}means = {len(self.means)}, "
            f"{prefix}locals = {len(self.locals)};",
            f"    DEVICE static constexpr int {prefix}means_of(int stage) {{ return {values}; }}",
        ]


def _statements(given):
    """``Statements`` of C++. given: symbol -> expression, besides leaves."""

    def leaf(node):
        if node in given:
            return given[node]
        if node.op == "constant":
            return f"real({node.value!r})"
        if node.op == "d_inner":
            return "d_inner"
        return f"{_MEMBERS[node.op]}[{node.value}]" if node.op in _MEMBERS else None

    def call(op, arguments, node):
        return f"{op}({', '.join(arguments)})"

    return Statements(leaf, call, lambda name, text: f"const real {name} = {text};", RESERVED)


def _given(cell, stages, which):
    """Symbol -> expression of what a pass has besides leaves."""
    given = {mean: f"in.mean[{k}]" for k, mean in enumerate(stages.means)}
    if which == "Backward":
        given |= {node: f"in.new_state[{k}]" for node, k in cell.free_states.items()}
        given |= {node: f"in.saved[{k}]" for k, node in enumerate(cell.saved_nodes) if node is not None}
    return given


def _functions(cell, stages, which):
    """The function of one pass, with its stages."""
    name, arguments = which.lower(), f"const {which}In<{cell.name}, real>& in, {which}Out<{cell.name}, real>& out"
    if stages.count == 1:
        yield f"    DEVICE static void {name}({arguments}) {{"
        yield from (f"        {line}" for line in _stage(cell, stages, which, 0))
        yield "    }"
        return
    yield "    template <int stage>"
    yield f"    DEVICE static void {name}({arguments}) {{"
    for stage in range(stages.count):
        yield f"        {'} else ' if stage else ''}if constexpr (stage == {stage}) {{"
        yield from (f"            {line}" for line in _stage(cell, stages, which, stage))
    yield "        }"
    yield "    }"


def _stage(cell, stages, which, stage):
    given = _given(cell, stages, which)
    held = {node: f"out.local[{k}]" for k, node in enumerate(stages.locals)}
    code = _statements(given | {node: text for node, text in held.items() if stages.of[node] < stage})
    last = stage == stages.count - 1
    results = [node for node in stages.locals if stages.of[node] == stage and not last]
    sums = [(k, mean.args[0]) for k, mean in enumerate(stages.means) if stages.of[mean] == stage + 1]
    final = []
    if last:
        final = _final(cell, which)
    code.compute([*results, *(node for _, node in sums), *(node for _, node in final)])
    yield from code.lines
    for node in results:
        yield f"{held[node]} = {code.expression(node)};"
    for k, node in sums:
        yield f"out.sum[{k}] = {code.expression(node)};"
    for target, node in final:
        yield f"{target} = {code.expression(node)};"


def _final(cell, which):
    """(place, symbol) of all that a pass returns."""
    if which == "Forward":
        states = [(f"out.state[{k}]", node) for k, node in enumerate(cell.new_states)]
        return states + [(f"out.saved[{k}]", node) for k, node in enumerate(cell.saved_nodes) if node is not None]
    d = [(f"out.d[{k}]", node) for k, node in enumerate(cell.d)]
    return d + [(f"out.dstate[{k}]", node) for k, node in enumerate(cell.dstates)]


def _inner(cell):
    """What the second product multiplies."""
    code = _statements({})
    code.compute([cell.inner_node])
    yield f"    DEVICE static real forward_inner(const ForwardIn<{cell.name}, real>& in) {{"
    yield from (f"        {line}" for line in code.lines)
    yield f"        return {code.expression(cell.inner_node)};"
    yield "    }"


def _backward_inner(cell):
    """What the gradient of the second product's vector adds."""
    code = _statements(
        _given(cell, Stages([*cell.d_inner, *cell.dstates_inner], {*_saved(cell), *cell.free_states}), "Backward")
    )
    targets = [(f"out.d[{k}]", node) for k, node in enumerate(cell.d_inner)]
    targets += [(f"out.dstate[{k}]", node) for k, node in enumerate(cell.dstates_inner)]
    targets = [(target, node) for target, node in targets if not (node.op == "constant" and not node.value)]
    code.compute([node for _, node in targets])
    yield (
        f"    DEVICE static void backward_inner(const BackwardIn<{cell.name}, real>& in, real d_inner, "
        f"BackwardOut<{cell.name}, real>& out) {{"
    )
    yield from (f"        {line}" for line in code.lines)
    for target, node in targets:
        yield f"        {target} += {code.expression(node)};"
    yield "    }"
