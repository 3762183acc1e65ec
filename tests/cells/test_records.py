"""The hand-written structs of kernels/cells and the records of gpurnn.cells say the same of each cell."""

import re

import pytest

from gpurnn.backends.sources import kernel_path
from gpurnn.cells import CELLS

STRUCT = re.compile(r"struct (\w+) : PointwiseCell \{(.*?)\n\};", re.S)


def constants():
    """Struct -> the name and value of its constants, in rnn.cuh, lstm.cuh and gru.cuh."""
    found = {}
    for file in ("rnn.cuh", "lstm.cuh", "gru.cuh"):
        for name, body in STRUCT.findall(kernel_path(file).read_text(encoding="utf-8")):
            lines = " ".join(re.findall(r"static constexpr int ([^;]*);", body))
            found[name] = {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", lines)}
    return found


def listed():
    """The cells of all.cuh."""
    return re.findall(r"DO\((\w+)\)", kernel_path("all.cuh").read_text(encoding="utf-8").split("FOR_EACH_CELL(DO)")[1])


def test_one_list():
    assert listed() == list(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_constants(name):
    cell, found = CELLS[name], constants()
    struct = found[name if name in found else name.partition("_")[0]]  # rnn_tanh is rnn<real, false>
    assert struct.pop("inner", None) == (len(cell.saved) - 1 if len(cell.products) > 1 else None)
    assert struct.pop("separate", 0) == len(cell.apart)
    assert struct == {
        "gates": len(cell.gates), "states": len(cell.states), "saved": len(cell.saved),
        "preactivations": len(cell.preactivations), "first_product": cell.first, "products": len(cell.hidden),
    }  # fmt: skip
