"""A rival's cell without the option of a case: how far is the one from the other?"""

from dataclasses import replace

from ..cells import CELLS
from .gpurnn import build


def plain_rival(prepare):
    """``prepare`` for the plain cell in place of a case's. It computes other numbers, so that it is not judged."""

    def prepare_plain(case, weights, x, y):
        plain = replace(case, cell=CELLS[case.cell].plain)
        return replace(prepare(plain, build(plain, "numpy", "float32").state_dict(), x, y), results=None)

    return prepare_plain
