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


def error(cell, seed=0):
    """``(share, detail)`` of the gradients of a layer, the best of four draws of its input: a kink or a jump within the
    step of a difference says nothing."""
    layer = gpurnn.Recurrent(cell, I, H, backend="numpy", dtype="float64", seed=seed)
    found = []
    for draw in range(4):
        rng = np.random.default_rng(100 * seed + draw)
        state = tuple(rng.standard_normal((1, B, H)) for _ in cell.states)
        inputs = rng.standard_normal((T, B, I)), state if len(state) > 1 else state[0]
        found.append(testing.gradient_error(layer, inputs, seed=draw))
        if "there is no derivative" not in found[-1][1]:
            return found[-1]
    return found[-1]


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


@pytest.mark.parametrize("evaluating", [False, True])
def test_stacks_of_random_equations_in_both_directions(evaluating):
    source = random.Random(1)
    for _ in range(20):
        cell = random_cell(source)
        layer = gpurnn.Recurrent(cell, I, H, 2, bidirectional=True, backend="numpy", dtype="float64", seed=1)
        layer.training = not evaluating
        x = np.random.default_rng(2).standard_normal((T, 3, I))
        share, detail = testing.gradient_error(layer, (x, None), lengths=[2, 0, 3])
        assert share <= 1 or "there is no derivative" in detail, f"{detail}; {cell.recipe}"
        if evaluating:
            testing.check_ragged(layer, x, [2, 0, 3])


@pytest.mark.parametrize("rule", ["mul", "tanh", "mean"])
def test_a_wrong_derivative_is_seen(rule, monkeypatch):
    """One rule is off by a part in ten thousand: of 30 random cells some have to show it."""
    right = derivatives._backward

    def wrong(node, d):
        return tuple(g if g is None else g * 1.0001 for g in right(node, d)) if node.op == rule else right(node, d)

    def seen(source):
        shares = [error(random_cell(source)) for _ in range(30)]
        return sum(share > 1 and "there is no derivative" not in detail for share, detail in shares)

    assert seen(random.Random(3)) == 0
    monkeypatch.setattr(derivatives, "_backward", wrong)
    assert seen(random.Random(3)) >= 3
