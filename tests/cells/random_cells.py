"""Cells of random equations, from a ``random.Random``: the tests of derivatives and of generated C++ draw them."""

import gpurnn
from gpurnn import cells

# One number to one number; all are within bounds where their argument is large.
UNARY = {
    "sigmoid": cells.sigmoid,
    "tanh": cells.tanh,
    "relu": lambda x: cells.relu(x) - 0.1 * x,
    "exp": lambda x: cells.exp(cells.minimum(x, 1)),
    "expm1": lambda x: cells.expm1(cells.clip(x, -3, 1)),
    "log": lambda x: cells.log(1.5 + x * x),
    "log1p": lambda x: cells.log1p(x**2),
    "sqrt": lambda x: cells.sqrt(x * x + 0.3),
    "power": lambda x: (1 + x**4) ** 0.5,
    "softplus": cells.softplus,
    "log_sigmoid": cells.log_sigmoid,
    "fabs": lambda x: abs(x),
    "neg": lambda x: -x,
    "scale": lambda x: 0.7 * x - 0.2,
    "fraction": lambda x: 2 / (1 + x * x),
    "clip": lambda x: cells.clip(x, -0.6, 0.9),
    "hard_sigmoid": cells.hard_sigmoid,
    "hard_sigmoid_2": cells.hard_sigmoid_2,
    "softsign": cells.softsign,
    "elu": cells.elu,
    "leaky_relu": cells.leaky_relu,
    "silu": cells.silu,
    "identity": cells.identity,
    "clip_gradient": lambda x: cells.clip_gradient(x, 1e6),
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: cells.tanh(a) * b,
    "square": lambda a, b: a * cells.sigmoid(b) + b * b / (1 + b * b),
    "div": lambda a, b: a / (1.2 + cells.tanh(b)),
    "maximum": cells.maximum,
    "minimum": cells.minimum,
    "greater": lambda a, b: cells.where(a > b, a, cells.tanh(b) + a - b),
    "smaller": lambda a, b: cells.where(a <= b, b * 0.5, a - 0.5 * b),
}
MEANS = {
    "mean": cells.mean,
    "centered": lambda x: x - cells.mean(x),
    "normalized": lambda x: cells.normalized(x, 0.05),
    "norm of gates": lambda x: cells.normalized_together(x, cells.tanh(x), epsilon=0.05)[1],
}
DRAWN = {
    "dropout": lambda x: cells.dropout(x, 0.4),
    "one mask": lambda x: cells.dropout(x, 0.3, "sequence"),
}


def tree(random, depth, leaves, means, draws):
    """An expression as nested tuples: ("unary", name, a), ("binary", name, a, b), or a leaf."""
    kind = random.random()
    if depth == 0 or kind < 0.1:
        return random.choice(leaves)
    inner = [tree(random, depth - 1, leaves, means, draws) for _ in range(2)]
    if means and kind < 0.2:
        return "mean", random.choice(sorted(MEANS)), inner[0]
    if draws and kind < 0.27:
        return "drawn", random.choice(sorted(DRAWN)), inner[0]
    if kind < 0.6:
        return "unary", random.choice(sorted(UNARY)), inner[0]
    return "binary", random.choice(sorted(BINARY)), *inner


def value(expression, leaves):
    """The symbol of an expression. leaves: (kind, name) -> symbol."""
    kind, name, *arguments = expression
    table = {"unary": UNARY, "binary": BINARY, "mean": MEANS, "drawn": DRAWN}.get(kind)
    return table[name](*(value(one, leaves) for one in arguments)) if table else leaves[kind, name]


def random_cell(random, name="drawn", means=True, draws=True, second=True):
    """A ``TracedCell``: 1 to 4 gates and states, up to 2 parameters, each gate used at least once.

    Some gates multiply h, some another vector, some nothing; their two parts are added, multiplied or nested.
    """
    gates = [f"g{k}" for k in range(random.randint(1, 4))]
    states = [f"s{k}" for k in range(random.randint(1, 4))]
    own = [f"p{k}" for k in range(random.randint(0, 2))]
    first = random.randint(0, len(gates))
    rows = random.randint(first, len(gates)) if second else first
    joined = [random.choice(["sum", "sum", "product", "nested"]) for _ in gates]
    early = [("state", one) for one in states] + [("own", one) for one in own] + [("gate", g) for g in gates[:first]]
    inner = ("binary", "mul", tree(random, 1, early, means, draws), random.choice(early))
    late = early + [("gate", gate) for gate in gates[first:]]
    new = [tree(random, 3, late, means, draws) for _ in states]
    carrier = random.randrange(len(states))  # the state that is made of every gate
    bare = [random.choice(late) if k != carrier and random.random() < 0.4 else None for k in range(len(states))]

    pairs = list(zip(new, bare, strict=True))

    def join(how, ax, ah):
        if how == "sum":
            return ax + ah
        return cells.tanh(ax) * ah if how == "product" else cells.sigmoid(ah) - cells.tanh(ax + 0.5 * ah)

    def equations(ax, ah, s, p):
        leaves = {("state", one): getattr(s, one) for one in states} | {("own", one): getattr(p, one) for one in own}
        for k, gate in enumerate(gates):
            hidden = getattr(ah, gate)
            if k == first < rows:
                vector = value(inner, leaves)
            if first <= k < rows:
                hidden = hidden(vector)
            leaves["gate", gate] = join(joined[k], getattr(ax, gate), hidden) if k < rows else getattr(ax, gate)
        everything = sum((leaves[one] for one in late if one[0] != "state"), 0.0)
        results = [cells.tanh(0.5 * value(one, leaves)) if raw is None else leaves[raw] for one, raw in pairs]
        results[carrier] = cells.tanh(0.3 * everything) + 0.5 * results[carrier]
        return tuple(results)

    made = gpurnn.cell(gates, states, own, name=name)(equations)
    made.recipe = {
        "gates": list(zip(gates, joined, strict=True)),
        "products": (first, rows),
        "inner": inner,
        "new": new,
    }
    return made
