"""What is chosen between: a GPU, the time loop of a layer, and a candidate for it."""

from dataclasses import dataclass

from ....cells import Cell
from ....dtypes import ITEMSIZE


@dataclass(frozen=True)
class Device:
    """What a schedule must know of a GPU.

    capability: 90 for compute capability 9.0. shared_bytes: most bytes of shared memory that one block may ask for.
    clock: in Hz. cooperative, clusters: whether the thread blocks of a grid, of a cluster may wait for one another.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    clock: float = 1.7e9
    name: str = ""
    cooperative: bool = True
    clusters: bool = True


@dataclass(frozen=True)
class Problem:
    """The time loop of one layer.

    directions: how many run at once. tf32: whether float32 may be multiplied as tf32. I: size of its input; with 0 the
    product W_ih x is not counted. concurrent: how many time loops run on the device at once, each on its part of the
    multiprocessors. marked: whether timesteps may be held or reset. fma: whether float32 is multiplied by multiply-adds
    only, not on tensor cores.
    """

    cell: Cell
    H: int
    T: int
    B: int
    directions: int
    dtype: str
    projected: bool
    backward: bool
    tf32: bool = False
    I: int = 0
    concurrent: int = 1
    marked: bool = False
    fma: bool = False

    @property
    def parts(self):
        """As how many bfloat16 numbers tensor cores multiply one number; 1 where they multiply it as it is stored."""
        return 3 if self.dtype == "float32" and not self.tf32 else 1

    @property
    def multiplied_bytes(self):
        """Bytes of a number as tensor cores multiply it."""
        return 6 if self.parts == 3 else ITEMSIZE[self.dtype]

    @property
    def gates(self):
        """G, the row blocks of W_ih."""
        return len(self.cell.gates)

    @property
    def products(self):
        """Q, the row blocks of W_hh."""
        return len(self.cell.hidden)

    @property
    def stages(self):
        """How many means over the units of a sequence each stage of this pass makes but the last; () has none."""
        forward, backward = self.cell.stages
        return backward if self.backward else forward

    def __str__(self):
        both, which = ", both directions" if self.directions == 2 else "", "backward" if self.backward else "forward"
        sizes, marked = f"T {self.T}, B {self.B}, I {self.I}, H {self.H}", ", masks and resets" if self.marked else ""
        dtype = "tf32" if self.tf32 else f"{self.dtype} by multiply-adds" if self.fma else self.dtype
        return f"{self.cell.name} {sizes}, {dtype}{both}{marked}, {which}"


@dataclass(frozen=True)
class Candidate:
    """One candidate for a problem: a schedule with its tile.

    seconds: per timestep. before: per call, ahead of the first timestep. measured: whether these two were measured;
    else they are estimates. product: estimated seconds of all W_ih x GEMMs. It is negative where the kernel multiplies
    x itself, because it then loads nothing.
    """

    schedule: str
    seconds: float
    before: float = 0.0
    measured: bool = False
    product: float = 0.0
    waits = False  # whether its thread blocks wait for one another
    inputs = 0  # columns of W_ih whose products the kernel makes; 0: W_ih x is ready before it starts

    def total(self, T):
        """Seconds of T timesteps, with all that comes before them."""
        return self.before + T * self.seconds + self.product

    def price(self, T):
        """What T timesteps cost, in words."""
        first = f" after {self.before * 1e6:.1f} us" if self.before else ""
        known = "measured" if self.measured else "estimated"
        product = f", and {self.product * 1e6:.1f} us for W_ih x" if self.product and not self.inputs else ""
        seconds = self.seconds + (self.product / T if self.inputs and T else 0.0)
        return f"{self.schedule}: {T} timesteps of {seconds * 1e6:.2f} us{first}, {known}{product}"

    @property
    def key(self):
        """What distinguishes this candidate from the others for the same problem."""
        return self.schedule

    def __str__(self):
        """What a plan says of this candidate besides its price."""
        return ""


@dataclass(frozen=True)
class Tile(Candidate):
    """A candidate that is a kernel of its own, compiled for a tile.

    kernel: the .cu file and the start of the kernels' names. numbers: its template arguments after cell and storage.
    shared: bytes of shared memory of a thread block.
    """

    kernel: str = ""
    numbers: tuple = ()
    shared: int = 0

    @property
    def types(self):
        """The template arguments ``numbers`` as C++."""
        return tuple(map(str, self.numbers))

    @property
    def key(self):
        return f"{self.kernel}<{', '.join(self.types)}>"
