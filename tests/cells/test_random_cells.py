"""The derivatives of random equations, in float64, by finite differences; and that a wrong derivative is seen."""

import random

import numpy as np
import pytest
from optional import given, needs, optional
from random_cells import random_cell

import gpurnn
from gpurnn import testing
from gpurnn.cells import derivatives

pytestmark = [pytest.mark.long, needs("hypothesis")]
st = optional("hypothesis.strategies")
T, B, I, H = 3, 2, 2, 3


def error(cell, seed=0, **options):
    """``(share, detail)`` of the gradients of a layer: of the first draw of its input where that is right, else the
    second best of four. A kink or a jump within the step of a difference spoils a draw; a wrong rule spoils all."""
    layer = gpurnn.Recurrent(cell, I, H, backend="numpy", dtype="float64", seed=seed, **options)
    passes, found = len(layer._passes()), []
    for draw in range(4):
        rng = np.random.default_rng(100 * seed + draw)
        state = tuple(rng.standard_normal((passes, B, H)) for _ in cell.states)
        inputs = rng.standard_normal((T, B, I)), state if len(state) > 1 else state[0]
        found.append(testing.gradient_error(layer, inputs, seed=draw, lengths=[T, T - 1]))
        if found[0][0] <= 1:
            return found[0]
    return sorted(found)[1]


checked = []


@given(lambda: st.randoms(use_true_random=False), max_examples=200)
def check_random_equations(source):
    cell = random_cell(source)
    share, detail = error(cell)
    assert share <= 1, f"{detail}; {cell.recipe}\n{cell.source('numpy')}"
    checked.append(cell)


def test_random_equations_have_the_derivatives_that_differences_have():
    checked.clear()
    check_random_equations()
    assert len(checked) >= 200
    for what in (
        {cell.states for cell in checked if len(cell.states) == 4},
        [cell for cell in checked if cell.inner_node is not None and cell.inner_node.op != "constant"],
        [cell for cell in checked if cell.means],
        [cell for cell in checked if cell.draws],
        [cell for cell in checked if cell.vectors],
        [cell for cell in checked if not cell.products],
        [cell for cell in checked if cell.separate],
        [cell for cell in checked if not cell.struct],
    ):
        assert len(what) > 0


def test_stacks_of_random_equations_in_both_directions():
    source = random.Random(1)
    for _ in range(20):
        cell = random_cell(source)
        for one in (cell, cell.evaluating):
            share, detail = error(one, num_layers=2, bidirectional=True)
            assert share <= 1, f"{detail}; {cell.recipe}"
        layer = gpurnn.Recurrent(cell, I, H, 2, bidirectional=True, backend="numpy", dtype="float64", seed=1)
        testing.check_ragged(layer, np.random.default_rng(2).standard_normal((T, 3, I)), [2, 0, 3])


@pytest.mark.parametrize("rule", ["mul", "tanh", "mean"])
def test_a_wrong_derivative_is_seen(rule, monkeypatch):
    """One rule is off by a part in ten thousand: of 30 random cells some have to show it."""
    right = derivatives._backward

    def wrong(node, d):
        return tuple(g if g is None else g * 1.0001 for g in right(node, d)) if node.op == rule else right(node, d)

    def seen(source):
        shares = [error(random_cell(source)) for _ in range(30)]
        return sum(share > 1 for share, _ in shares)

    assert seen(random.Random(3)) == 0
    monkeypatch.setattr(derivatives, "_backward", wrong)
    assert seen(random.Random(3)) >= 3
