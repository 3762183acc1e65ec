"""Does this machine compute rightly? What ``gpurnn check`` runs: every backend, cell, option and dtype against NumPy.

Six checks of each recurrent layer, two of everything else:

- ``gradient`` (float64): the derivative along a random direction of x, the states and all parameters against finite
  differences, as ``gpurnn.testing.check_gradients`` has it.
- ``reference``: output, final state, dx, dstate and every parameter's gradient against the NumPy backend in float64.
  Errors count as a share of an array's largest value, or of 1. Allowed is twice the largest of the NumPy backend in the
  same dtype, plus two roundings (exp and tanh differ between libraries in their last place). Where that says nothing,
  for NumPy itself and in float64: one rounding for each term of each sum in each step.
- ``repeat``: two runs give equal bits.
- ``ragged``: sequences of different lengths in one batch are what each is on its own; outputs past the end are zero,
  and NaN there, in the derivatives there, and in the initial state of a sequence without steps changes nothing.
- ``pieces``: a sequence that is cut into steps and pieces, the state going from one to the next, and one that runs as
  a wavefront, against NumPy in float64: off by no more than twice what one call is, and a rounding.
- ``gates`` (LSTM, GRU): the logistic function over its whole range, in relative terms: four last places in float32 and
  float64, one rounding in 16 bits.

``reference`` has, among others, one call that is large enough for the memory pool of the backend ``cpu``; batches of
sequences of different lengths with a given state are computed with random resets and masks, too. Of everything
else "padding in front" has NaN in the padding that Linear and LayerNorm read before a recurrent layer.
"""

import functools
import importlib.util
import itertools
from dataclasses import dataclass

from ..backends import backends as available_backends
from ..backends import get_backend
from ..cells import Cell
from ..dtypes import DTYPES, check_dtype
from ..errors import check_choice
from .other_layers import OTHER_CASES, check_other
from .own_cells import differences_say_nothing, is_own_cell, load_cell
from .recurrent import (
    CELLS,
    OPTIONS,
    Batch,
    build,
    check_finite,
    check_gates,
    check_gradients,
    check_pieces,
    check_ragged,
    check_repeat,
    compare,
    twins,
)

QUICK = ("bidirectional", "two layers")
OTHERS = "other layers"


@dataclass
class Result:
    """One check. ``worst`` is the largest error as a share of what is allowed, so 1 or less is right. ``detail`` says
    where that error was."""

    backend: str
    cell: str
    dtype: str
    check: str
    worst: float
    detail: str

    @property
    def right(self):
        """NaN is wrong."""
        return bool(self.worst <= 1)


def run_checks(backends=None, cells=None, dtypes=None, quick=False, progress=None):
    """Run the checks; returns a list of ``Result``, the worst of each backend, cell, dtype and check.

    backends: names or ``Ops`` objects, by default all that work here. cells: of ``CELLS`` and ``OTHERS``, or cells of
    one's own; by default all of ours. dtypes: of ``DTYPES``. quick: two options instead of nine. progress: wraps the
    list of jobs, as ``tqdm`` does.
    Raises BackendError for a backend that does not work here, ValueError for an unknown cell or dtype.
    """
    backends = _backends(backends)
    cells = cells or (*CELLS, OTHERS)
    if not dtypes:  # bfloat16 is an extra: left out where it is not installed and nobody asked for it
        dtypes = [dtype for dtype in DTYPES if dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes")]
    for cell in cells:
        if not isinstance(cell, Cell):
            check_choice("cells", cell, (*CELLS, OTHERS))
    for dtype in dtypes:
        check_dtype(dtype)
    options = [(name, OPTIONS[name]) for name in (QUICK if quick else OPTIONS)]
    results = []
    for cell in [cell for cell in cells if isinstance(cell, Cell)]:
        share, detail = check_finite(cell)
        if share:  # then no other check says anything
            results.append(Result("numpy", cell.name, "float64", "reference", share, detail))
            cells = [other for other in cells if other is not cell]
    jobs = list(itertools.product(backends, cells, dtypes))
    for backend, cell, dtype in progress(jobs) if progress else jobs:
        found = {}
        for check, option, (worst, detail) in _checks(backend, cell, dtype, options):
            if check not in found or not worst <= found[check].worst:
                name = cell.name if isinstance(cell, Cell) else cell
                found[check] = Result(backend.name, name, dtype, check, worst, f"{option}: {detail}")
        results += found.values()
    return results


def plans(cells, backends=None):
    """How each backend runs cells of one's own: (backend, cell, schedule, reason)."""
    for cell in cells:
        for backend in _backends(backends):
            plan = build(cell, backend, "float32").plan(100, 32)
            yield backend.name, cell.name, plan.schedule, plan.reason


def _backends(chosen):
    """``Ops`` objects; by default all that work here."""
    chosen = chosen or [name for name, problem in available_backends().items() if problem is None]
    return [get_backend(backend) for backend in chosen]


def _checks(backend, cell, dtype, options):
    """All checks of one backend, cell and dtype: (check, option, (worst, detail)). An exception counts as wrong."""
    if cell == OTHERS:
        for name in OTHER_CASES:
            reference, repeat = _caught(lambda name=name: check_other(name, backend, dtype), 2)
            yield "reference", name, reference
            yield "repeat", name, repeat
        return
    own = isinstance(cell, Cell)
    differences = dtype == "float64" and not (own and differences_say_nothing(cell))
    for name, option in options:
        given = name != "learned state"
        for ragged in (False, True):
            full = f"{name}, ragged" if ragged else name
            if differences:
                yield (
                    "gradient",
                    full,
                    _caught(lambda r=ragged, o=option, g=given: check_gradients(cell, backend, r, g, **o)),
                )
            if dtype != "float64" or backend.name != "numpy":
                yield from _references(backend, cell, dtype, full, option, ragged, given)
        yield "repeat", name, _caught(lambda o=option: check_repeat(cell, backend, dtype, **o))
        yield "ragged", name, _caught(lambda o=option: check_ragged(cell, backend, dtype, **o))
    large = {"I": 64, "H": 32, "bidirectional": True}  # all arrays of 128 KiB and more, in 16 bits, too
    if backend.name == "cpu" and dtype != "float64":
        yield "reference", "large", _caught(lambda: compare(cell, backend, dtype, 16, 64, **large))
    yield "pieces", "two layers", _caught(lambda: check_pieces(cell, backend, dtype))
    if not own and not cell.startswith("rnn"):
        yield "gates", "no recurrent weights", _caught(lambda: check_gates(cell, backend, dtype))


def _references(backend, cell, dtype, name, option, ragged, given):
    """Of ``_checks``: those against the reference of one option, by every schedule."""
    shown = {"marked": True, "masked_output": "zero" if option.get("bidirectional") else "repeat"}
    for label, more in _kernel_choices(backend, cell, dtype, option):
        for what, marks in (("", {}), (", resets and masks", shown))[: 1 + (ragged and given)]:
            options = option | more | marks
            yield (
                "reference",
                f"{name}{what}{label}",
                _caught(functools.partial(compare, cell, backend, dtype, 5, 3, ragged, given, **options)),
            )


def _kernel_choices(backend, cell, dtype, option):
    """(label, options) that make the layer choose other kernels."""
    if backend.name != "cuda":
        return [("", {})]
    choices = [(f", {schedule}", {"schedule": schedule}) for schedule in ("auto", "step")]
    if dtype == "float32":
        choices += [(f"{label}, tf32", more | {"precision": "tf32"}) for label, more in choices]
        choices.append((", multiply-adds", {"schedule": "auto", "precision": "fma"}))
    refused = isinstance(cell, Cell) or not CELLS[cell][1].keys().isdisjoint(("proj_size", "reset_after"))
    if dtype != "float64" and not refused and "hidden_size" not in option:
        choices.append((", grid", {"schedule": "grid", "H": 11}))  # units for more than one thread block
    return choices


def _caught(check, parts=1):
    """The check's result. An exception becomes a wrong result."""
    try:
        return check()
    except Exception as error:  # whatever a broken installation raises must show in the table, with the other results
        wrong = float("inf"), f"{type(error).__name__}: {' '.join(str(error).split())}"
        return wrong if parts == 1 else (wrong,) * parts
