"""Whole updates as CUDA graphs: one launch for the forward pass, the backward pass and the optimizer.

A graph freezes every argument of every launch, so an update can be recorded where each of its launches would have the
same ones again. What must be so:

- **Addresses.** Parameters, gradients, state arrays of the optimizer and running statistics stay where they are. Inputs
  and targets are copied into fixed arrays before each launch; a recurrent state that is carried lies in fixed arrays,
  which the graph itself writes at its end. All other arrays of an update come from a private pool: CuPy's memory pools
  know of no graph, and would give an array's memory to the next one as soon as Python drops it. Under capture a pool
  may grow, as CuPy captures in CUDA's "relaxed" mode (cupy/cuda/stream.pyx, ``begin_capture``). All graphs of a
  training share the pool: they run one after another, and what outlives one lies in fixed arrays.
- **No copy from or to the host.** CuPy refuses both under capture (cupy/cuda/memory.pyx), and its cuBLAS wrapper
  (cupy_backends/cuda/libs/cublas.pyx); ours is called through ctypes. So lengths that differ, masks, resets and class
  indices to be ignored are not recorded: how many timesteps count is a number that the host must know.
- **Numbers that change** lie in device memory: the optimizer's (rate, bias corrections), the counters of random draws,
  the factor of the loss, what gradients are divided by with a loss scale. ``UpdateGraph.launch`` has the host compute
  them as ever, so they have the same bits, and copies them in one piece. The epochs of schedule ``grid`` count
  themselves.
- **Decisions.** The host knows no loss before many updates are done. So the kernel ``update_verdict`` decides: where a
  loss or norm is not finite, or an index out of range, or schedule ``grid`` has timed out, no parameter changes and no
  state is carried on, neither there nor in the updates behind it, until the host knows.

While an update is recorded, ``CupyDevice.recording`` is its ``Recording``, which ``CudaOps`` asks for these numbers.
"""

import numpy as np

from ...errors import BackendError
from .launch import c_type, signature

_WORDS = 512  # of 64 bits: the numbers of an update, a few for each layer and each group of parameters
_PINNED = 1 << 26  # most bytes on the host for one input: more goes through CuPy's own
_STEPS = 1 << 13  # most timesteps that run launch by launch inside a graph: it holds two nodes or more for each


def numbers_of(kernel, scalars, dtype):
    """The numbers of an update as its kernel reads them; raises OverflowError for one that becomes infinite."""
    values = np.array(list(scalars.values()), np.float64)
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    for name, value, rounded in zip(scalars, values, found, strict=True):
        if np.isinf(rounded) and not np.isinf(value):
            raise OverflowError(f"{kernel}: {name} = {value} does not fit into {dtype}")
    return found


class Draw(int):
    """A layer's counter of draws while an update is recorded: it counts on from a number in device memory.

    counter: that number, (1,) uint32. later: how far this one is behind it.
    """

    counter = None
    later = 0

    def __new__(cls, value, counter, later=0):
        draw = super().__new__(cls, value)
        draw.counter, draw.later = counter, later
        return draw

    def __add__(self, more):
        return Draw(int(self) + more, self.counter, self.later + more)


class Input:
    """An array of the device that the host writes before each update, while those before may still run.

    Each of ``rows`` updates has pinned memory of its own on the host: from other memory CUDA may copy later than it
    returns, where the GPU can read it by itself.
    """

    def __init__(self, device, array, rows):
        self.xp, self.array = device.xp, array
        small = 0 < rows * array.nbytes <= _PINNED
        self._host = device.pinned((rows, *array.shape), array.dtype) if small else None

    def write(self, row, value):
        """Copy ``value``, of NumPy or CuPy, behind what runs there."""
        if self._host is None or not isinstance(value, np.ndarray):
            self.array[...] = self.xp.asarray(value)
        else:
            self._host[row] = value
            self.array.set(self._host[row])


class Recording:
    """The numbers that one recorded update reads from device memory.

    go: whether the update is made, (1,) int32. wrong: whether an input was, (1,) int32.
    """

    def __init__(self, graphs):
        self.xp, self.go, self.wrong = graphs.xp, graphs.go, graphs.wrong
        self._host, self._words = np.zeros(_WORDS, np.uint64), self.xp.zeros(_WORDS, np.uint64)
        self._input = Input(graphs.device, self._words, graphs.rows)
        self._used = self._steps = 0
        self._updates = []  # the numbers of the optimizer on the host, in the order of its parts
        self._next = None  # while only these are asked for, which one comes next

    def numbers(self, count, dtype):
        """``count`` numbers: as they lie on the device, and as the host writes them before ``send``."""
        dtype = np.dtype(dtype)
        stop = self._used - -count * dtype.itemsize // 8
        if stop > _WORDS:
            raise BackendError(f"an update has more than {_WORDS} numbers that change")
        part, self._used = slice(self._used, stop), stop
        return self._words[part].view(dtype)[:count], self._host[part].view(dtype)[:count]

    def update(self, numbers):
        """The numbers of the optimizer's next part, on the device; None where the host only writes them anew."""
        if self._next is not None:
            self._updates[self._next][...] = numbers
            self._next += 1
            return None
        device, host = self.numbers(numbers.size, numbers.dtype)
        self._updates.append(host)
        return device

    def write_updates(self, step):
        """Have ``step``, an optimizer's, write its numbers. Raises BackendError where it has other parts now."""
        self._next = 0
        try:
            step()
        finally:
            done, self._next = self._next, None
        if done != len(self._updates):
            raise BackendError(f"the optimizer has {done} parts, and had {len(self._updates)}")

    def draw(self, call):
        """What the kernel of a random mask takes: how far behind a counter, and the counter."""
        if not isinstance(call, Draw):
            raise BackendError("a random mask is drawn by a number that is not its layer's counter")
        return call.later, call.counter

    def bounded(self, values, stop):
        """As ``Ops.bounded``."""
        xp = self.xp
        wrong = (values < 0) | (values >= stop)
        if values.size:
            xp.maximum(self.wrong, wrong.any(), out=self.wrong)
        return xp.clip(values, 0, stop - 1), None

    def count_steps(self, steps):
        """Count timesteps that run launch by launch. Raises BackendError where a graph would become too large."""
        self._steps += steps
        if self._steps > _STEPS:
            raise BackendError(
                f"its time loops have more than {_STEPS} timesteps that run launch by launch, by schedule 'step'"
            )

    def send(self, row):
        """Copy the numbers to the device, behind what runs there."""
        self._input.write(row, self._host)


class UpdateGraphs:
    """The graphs of one training: what they share.

    rows: most updates between two ``fetch``. width: losses of an update. alive: whether nothing was wrong so far, a
    boolean of the device.
    """

    def __init__(self, ops, rows, width):
        self.ops, self.xp, self.device, self.rows, self.width = ops, ops.xp, ops.device, rows, width
        self.memory = self.device.private_memory()
        self.alive, self.go = self.xp.ones((), dtype=bool), self.xp.ones(1, dtype=np.int32)
        self.wrong = self.xp.zeros(1, np.int32)
        self.results = self.xp.zeros((rows, 2 + width), np.float64)

    def fetch(self, rows):
        """What ``rows`` updates have noted, (rows, 2 + width): whether all was well, the norm, the losses.

        It waits for them. Raises BackendError where schedule ``grid`` timed out.
        """
        for exchange in self.ops.exchanges.values():
            exchange.refresh()
        return self.ops.to_numpy(self.results[:rows])

    def input(self, array):
        """An ``Input`` of this array."""
        return Input(self.device, array, self.rows)

    def go_on(self):
        """Let updates be made again."""
        self.alive.fill(True)

    def load(self, kernel, dtype):
        """Load an optimizer's kernel: a capture may not, and an overflow may have left out every update so far."""
        kind = (c_type(dtype),)
        empty = [None] * len(signature("optimize.cu", kernel, kind))
        self.ops.kernels.launch("optimize.cu", kernel, kind, (0,), (1,), *empty)

    def record(self, update, modules):
        """A ``UpdateGraph`` of ``update``, a function that is called with it once and launches everything.

        modules: those whose counters of draws go on in it. Raises BackendError where it cannot be recorded, and says
        why; then nothing has changed.
        """
        # with an empty grid it is only loaded, which a capture may not do
        self.ops.kernels.launch("optimize.cu", "update_verdict", (), (0,), (1,), *[None] * 8)
        graph, before = UpdateGraph(self, modules), [module.calls for module in modules]
        try:
            self.device.recording = graph.recording
            for module, counter in zip(modules, graph.counters, strict=True):
                module.calls = Draw(module.calls, counter)
            graph.graph = self.device.record(lambda: update(graph), self.memory)
            graph.draws = [module.calls - was for module, was in zip(modules, before, strict=True)]
        finally:
            self.device.recording = None
            for module, was in zip(modules, before, strict=True):
                module.calls = was
        return graph


class UpdateGraph:
    """One recorded update. losses: where it writes them, float64 (width,)."""

    def __init__(self, graphs, modules):
        self.graphs, self.modules, self.recording = graphs, modules, Recording(graphs)
        self.losses = graphs.xp.zeros(graphs.width, np.float64)
        self._where, self._where_host = self.recording.numbers(2, np.int64)
        both = [self.recording.numbers(1, np.uint32) for _ in modules]
        self.counters, self._counters = [device for device, _ in both], [host for _, host in both]
        self.graph, self.draws = None, []
        exchanges = graphs.ops.exchanges.values()  # whose memory the graph uses, whatever they have later
        self._held = [(one.words, one.epoch, one.ring, one.failed) for one in exchanges]

    def begin(self, buffers):
        """To be called first: note the buffers, (copy, array) pairs, as they are before the update."""
        for copy, array in buffers:
            self.graphs.xp.copyto(copy, array, where=self.graphs.alive)
        self.graphs.wrong.fill(0)

    def judge(self, norm):
        """To be called when losses and gradients are there, before the update: decide whether it is made."""
        graphs, wrong = self.graphs, self.graphs.wrong
        for _, _, _, failed in self._held:
            graphs.xp.maximum(wrong, failed, out=wrong)
        graphs.ops.kernels.launch(
            "optimize.cu", "update_verdict", (), (1,), (1,), graphs.width, self.losses, norm.reshape(1), wrong,
            self._where, graphs.alive, graphs.go, graphs.results,
        )  # fmt: skip

    def carry(self, to, values):
        """Copy arrays, unless something was wrong."""
        for array, value in zip(to, values, strict=True):
            self.graphs.xp.copyto(array, value, where=self.graphs.alive)

    def launch(self, row, scaled, update):
        """Run the update behind what runs there. What it finds goes to this row of ``UpdateGraphs.results``.

        scaled: whether a norm that is not finite only skips the update. update: the optimizer's ``step``, of which
        only the numbers are taken.
        """
        device = self.graphs.device
        self._where_host[...] = row, scaled
        for host, module in zip(self._counters, self.modules, strict=True):
            host[...] = module.calls & 0xFFFFFFFF
        device.recording = self.recording
        try:
            self.recording.write_updates(update)
        finally:
            device.recording = None
        self.recording.send(row)
        self.graph.launch()
        for module, draws in zip(self.modules, self.draws, strict=True):
            module.calls += draws
