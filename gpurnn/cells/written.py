"""Statements from symbols: what array code and C++ share."""

from __future__ import annotations

from .derivatives import below

_BINARY = {"add": (" + ", 1), "sub": (" - ", 1), "mul": (" * ", 2), "div": (" / ", 2)}
_WIDEST = 70  # characters of an expression that is not broken into more statements


class Statements:
    """The statements that compute some symbols, with a variable for each that the user has named or that is read twice.

    leaf: a function of a symbol: its expression if it is given, else None. call: a function (operation, arguments,
    symbol) -> expression. declare: a function (variable, expression) -> statement. reserved: names that variables may
    not have.
    """

    def __init__(self, leaf, call, declare, reserved=()):
        self.leaf, self.call, self.declare = leaf, call, declare
        self.names, self.taken, self.lines = {}, set(reserved), []

    def compute(self, results):
        """Write what computes these; afterwards ``expression`` gives each."""
        order = below(results, lambda node: self.leaf(node) is not None or node in self.names)
        uses = {}
        for node in order:
            if self.leaf(node) is None and node not in self.names:
                for arg in node.args:
                    uses[arg] = uses.get(arg, 0) + 1
        for node in results:
            uses[node] = uses.get(node, 0) + 1
        texts = {}
        for node in order:
            if node in self.names or self.leaf(node) is not None:
                continue
            text, level = self._text(node, texts)
            shared = uses.get(node, 0) > 1 and node.op not in ("neg", "constant")
            if node.name or shared or len(text) > _WIDEST:
                name = self.names[node] = self.variable(node.name or f"t{node.index}")
                self.lines.append(self.declare(name, text))
            else:
                texts[node] = text, level
        self._texts = texts

    def expression(self, node, level=0):
        """The expression of a computed symbol, for a place that binds as ``level``: 1 sums, 2 products, 3 signs."""
        text, own = self._known(node, self._texts)
        return f"({text})" if own < level else text

    def variable(self, name):
        """A variable's name that no other has."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _known(self, node, texts):
        given = self.leaf(node)
        if given is not None:
            return given, 3 if given.startswith("-") else 4
        return (self.names[node], 4) if node in self.names else texts[node]

    def _text(self, node, texts):
        """(expression, level) of one symbol."""

        def argument(k, level):
            text, own = self._known(node.args[k], texts)
            return f"({text})" if own < level else text

        if node.op in _BINARY:
            sign, level = _BINARY[node.op]
            right = level + (node.op in ("sub", "div"))
            return f"{argument(0, level)}{sign}{argument(1, max(right, level + (node.op == 'mul')))}", level
        if node.op == "neg":
            return f"-{argument(0, 3)}", 3
        if node.op in ("clip_gradient", "stop_gradient"):  # nothing but their derivative differs from their argument
            return self._known(node.args[0], texts)
        return self.call(node.op, [argument(k, 0) for k in range(len(node.args))], node), 4
