"""The record of a cell: what it declares, so that everything else treats all cells alike.

A cell is the only place that knows its gates, its states, its products and the equations of one timestep. It knows
nothing of time, lengths, layers or devices. Arrays of a timestep are feature-major, ``(rows, B)``: the hidden product
is ``W h`` as the books write it, every gate is a contiguous block of rows, and BLAS is faster in this order at small B.
Its equations in array code are ``forward`` and ``backward``, which get:

    xp              NumPy or CuPy
    w               the ``HiddenWeights``
    ax              (G*H, B)  input pre-activations W_ih x + b, with every bias that may be added before the timestep
    old, new        the states before and after the timestep, tuples of (H, B) arrays in the order of ``states`` (h has
                    P rows); ``forward`` writes into ``new``
    dstate          the gradients with respect to ``new``, a tuple, which ``backward`` overwrites with those with
                    respect to ``old``
    scratch         the ``Scratch``, in which ``forward`` leaves what it saves and ``backward`` the gradients
    hook            a function, called once as ``hook(*dstate)`` with the complete gradients of the new states

``name`` is also the struct of the same equations in kernels/cells, or in ``struct``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .._typing import Array


@dataclass(slots=True)
class Weights:
    """The parameters of one layer and direction: ih (G*H, I), hh (rows*H, P) or None, bias_ih and bias_hh (G*H,) or
    None, hr (P, H) of a projection or None, and own, those that the cell has besides, in the order of
    ``Cell.parameters``. Of gradients: the arrays to add to, None where a parameter is not trained.

    reads: the columns of x that ih multiplies, None for all. ready: for a backend, what it has made of these arrays for
    its calls, without copying them; None at first.
    """

    ih: Array | None
    hh: Array | None
    bias_ih: Array | None = None
    bias_hh: Array | None = None
    hr: Array | None = None
    own: tuple[Array | None, ...] = ()
    reads: slice | None = None
    ready: object = field(default=None, repr=False)

    def read(self, x: Array) -> Array:
        """What is read of x (..., I): a view."""
        return x if self.reads is None else x[..., self.reads]


@dataclass(slots=True)
class HiddenWeights:
    """The weights inside the time loop: hh (rows*H, P), bias_apart (rows of ``Cell.apart``, 1) or None, hr (P, H) of
    the projection or None, and own: for each vector of the cell's own parameters a column (H, 1).

    bias_apart is the part of b_hh that cannot be added to ax, see ``Cell.apart``.
    """

    hh: Array
    bias_apart: Array | None = None
    hr: Array | None = None
    own: tuple[Array, ...] = ()


class Scratch(NamedTuple):
    """Memory of one timestep.

    z: (K*H, B), in which ``forward`` leaves the blocks ``saved``; ``backward`` reads and destroys it. tmp: (H, B). d:
    (N*H, B), the gradients with respect to the N ``preactivations``, which ``backward`` writes. masks: (M*H, B), those
    of the M ``draws``, or None. batch: the ``BatchStep`` of a cell that normalizes over the batch, or None.
    """

    z: Array
    tmp: Array
    d: Array | None = None
    masks: Array | None = None
    batch: object = None


class Product(NamedTuple):
    """A product with rows of W_hh in each timestep.

    rows: the pre-activations that it makes or adds to, neighbors in ``Cell.preactivations``. reads: what the rows
    multiply: "h", or a block that ``forward`` saves and ``backward`` leaves alone.
    """

    rows: tuple[str, ...]
    reads: str = "h"


class Parameter(NamedTuple):
    """A parameter of a cell besides its weights.

    gates: for which gates it has a vector of H, () for a single vector. initial: "zeros", "ones", "biases" (as those),
    or a number. Its gradient is in the blocks ``blocks`` of ``Cell.preactivations``.
    """

    name: str
    gates: tuple[str, ...] = ()
    initial: str | float = "zeros"

    @property
    def vectors(self) -> int:
        """How many vectors of H it has."""
        return len(self.gates) or 1

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that its gradient is summed from; no gate has such a name."""
        return tuple(f"p:{self.name}.{gate}" for gate in self.gates) or (f"p:{self.name}",)


class Draw(NamedTuple):
    """A random mask of a cell: one number for each unit, 1 with probability 1 - rate, else 0.

    each: "timestep", or "sequence" for one mask for all timesteps of a call.
    """

    name: str
    rate: float
    each: str = "timestep"


class Cell:
    """What every cell declares, and what follows from it. A block is H rows, one for each hidden unit.

    Attributes
    ----------
    name : str
        Of the cell, and of its struct in kernels/cells or in ``struct``.
    gates : tuple of str
        The blocks of W_ih and of the biases, in their order.
    states : tuple of str
        "h", which is the output, then the others.
    saved : tuple of str
        The blocks that ``forward`` saves for ``backward``.
    shown : tuple of str
        Those of them that ``return_all`` shows.
    preactivations : tuple of str
        The blocks that ``backward`` makes: for each gate the gradient with respect to its hidden pre-activation, or to
        that of the input, where it has no hidden one; then to those of the input that differ; then to ``parameters``.
    inputs : tuple of str
        For each gate the pre-activation to which W_ih x and b_ih are added.
    products : tuple of Product
        What the rows of W_hh multiply, in the order of the rows; they are of the first gates. () without W_hh.
    parameters : tuple of Parameter
        What it has besides weights and biases.
    draws : tuple of Draw
        Its random masks, in training mode.
    inner_first : bool
        Whether all rows of W_hh multiply one block that the struct makes of the old state and masks of a sequence
        alone, so that it is known before the timestep.
    biases : bool
        Whether b_ih and b_hh are added to W_ih x and W_hh h, before anything else.
    projects : str or None
        The saved block that W_hr multiplies.
    may_project : bool
        Whether there is a form of the cell with a projection.
    remembers, writes : str or None
        The gate that preserves the old state, and the one that lets the new state in, where that is another.
    means : bool
        Whether it averages over the units of a sequence (layer norm).
    stages : tuple of two tuples of int
        How many means each stage of the struct makes but the last: forward, then backward. () has no means.
    locals : tuple of two int
        How many numbers of a unit these stages hand on, forward and backward.
    over_batch : bool
        Whether it normalizes over the sequences of the batch.
    array_only : str or None
        Why it is array code on every backend; None where it is not.
    normalizations, timesteps : int
        How many numbers it normalizes so, and for how many timesteps it has statistics.
    struct : str or None
        C++ of its struct; None where kernels/cells has it.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)
    saved: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    preactivations: tuple[str, ...]
    inputs: tuple[str, ...]
    products: tuple[Product, ...]
    parameters: tuple[Parameter, ...] = ()
    draws: tuple[Draw, ...] = ()
    inner_first: bool = False
    biases: bool = True
    projects: str | None = None
    may_project: bool = False
    remembers: str | None = None
    writes: str | None = None
    means: bool = False
    stages: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    locals: tuple[int, int] = (0, 0)
    over_batch: bool = False
    array_only: str | None = None
    normalizations: int = 0
    timesteps: int = 0
    struct: str | None = None

    @functools.cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for cells of the same equations."""
        return self.name, self.struct, self.saved, self.draws

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def evaluating(self) -> Cell:
        """The cell of evaluation mode."""
        return self

    @functools.cached_property
    def saved_blocks(self) -> int:
        """K, the blocks that an array needs for what ``forward`` saves, and later for what ``backward`` makes."""
        return max(len(self.saved), len(self.preactivations))

    @functools.cached_property
    def vectors(self) -> int:
        """N, the vectors of H of all ``parameters``."""
        return sum(parameter.vectors for parameter in self.parameters)

    @functools.cached_property
    def hidden(self) -> tuple[str, ...]:
        """For each row block of W_hh the pre-activation to which its product and b_hh are added."""
        return tuple(name for product in self.products for name in product.rows)

    @functools.cached_property
    def first(self) -> int:
        """Row blocks of W_hh that multiply h; those behind them multiply what the equations make of it."""
        return sum(len(product.rows) for product in self.products if product.reads == "h")

    @functools.cached_property
    def apart(self) -> tuple[int, ...]:
        """The places of gates whose two products meet only after an equation, so that b_hh may not be added to b_ih."""
        pairs = zip(self.inputs, self.hidden, strict=False)
        return tuple(place for place, (of_input, of_hidden) in enumerate(pairs) if of_input != of_hidden)

    def columns(self, names: tuple[str, ...], H: int) -> slice:
        """The columns of some neighboring blocks, in the array that ``backward`` has filled."""
        blocks = self.preactivations + self.saved[len(self.preactivations) :]
        first = blocks.index(names[0])
        return slice(first * H, (first + len(names)) * H)
