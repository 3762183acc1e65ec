"""kernels/step.cu, executed on the CPU: one timestep of every cell, forward and backward, against torch in float64.

The tolerance is twice the error that the plain implementation makes in the same dtype: torch in float32 forward, the
NumPy cells backward, with gates rounded to the storage.
"""

import itertools

import numpy as np
import pytest
import torch
from cuda_on_cpu import emulator
from cuda_on_cpu.fixtures import TYPES, bound, from_storage, to_numpy, to_storage
from cuda_on_cpu.kernel_list import CELLS, STORAGES

from gpurnn import cells
from gpurnn._kernels import kernel_source

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

PLAIN = {
    "RnnTanh": cells.RNNCell("tanh"),
    "RnnRelu": cells.RNNCell("relu"),
    "LstmCell": cells.LSTMCell(),
    "GruCell": cells.GRUCell(),
}
SIZES = list(itertools.product((1, 3, 8), (1, 7, 32, 65)))
SCHEDULES = [{}, {"policy": "random", "seed": 1}, {"policy": "random", "seed": 2, "preemption": 0.02}]


def equations(cell, ax, ah, h, c):
    """(kept gates, h', c') in torch, from lists of gates (B, H)."""
    a = [x + y for x, y in zip(ax, ah, strict=True)]
    if cell == "LstmCell":
        i, f, o = (torch.sigmoid(a[k]) for k in (0, 1, 3))
        g = torch.tanh(a[2])
        c = f * c + i * g
        return [i, f, g, o], o * torch.tanh(c), c
    if cell == "GruCell":
        r, z = torch.sigmoid(a[0]), torch.sigmoid(a[1])
        n = torch.tanh(ax[2] + r * ah[2])
        return [r, z, ah[2], n], (1 - z) * n + z * h, None
    return [], torch.tanh(a[0]) if cell == "RnnTanh" else torch.relu(a[0]), None


class Step:
    """Random inputs of one step in a storage type, the kernels' results, the reference's, the tolerances."""

    def __init__(self, emu, cell, storage, B, H, ragged, bias=True, seed=0):
        self.cell, self.storage, self.B, self.H = cell, storage, B, H
        self.number, self.real = TYPES[storage]
        self.plain = PLAIN[cell]
        self.G, self.K = self.plain.gates, len(self.plain.names)
        self.leaves = len(self.plain.leaves)
        self.two = self.plain.states == 2
        rng = np.random.default_rng(seed)

        def draw(*shape):
            return to_storage(rng.normal(size=shape), storage)

        self.ax, self.ah, self.bias = draw(B, self.G, H), draw(B, self.G, H), draw(self.G, H) if bias else None
        self.h, self.doutput = draw(B, H), draw(B, H)
        self.c, self.dh, self.dc = (rng.normal(size=(B, H)).astype(self.real) for _ in range(3))
        self.t = 3
        self.lengths = rng.integers(1, 7, B).astype(np.int32) if ragged else None
        self.held = np.zeros(B, bool) if self.lengths is None else self.t >= self.lengths
        self.emu, self.source = emu, kernel_source("step.cu")

    def launch(self, way, *arrays):
        kernel = self.emu.load(self.source, name=f"step_{way}<{self.cell}, {self.storage}>", file="step.cu")
        given = [None if x is None else x if isinstance(x, Named) else self.emu.array(x, "input") for x in arrays]
        given = [x.array if isinstance(x, Named) else x for x in given]
        lengths = None if self.lengths is None else self.emu.array(self.lengths, "lengths")
        block = (16, 4)
        grid = (-(-self.H // block[0]), -(-self.B // block[1]))
        kernel(grid, block, (np.int32(self.B), np.int32(self.H), np.int32(self.t), lengths, *given))

    def run(self):
        B, H, empty = self.B, self.H, self.emu.empty
        c, dc = (self.c, self.dc) if self.two else (None, None)
        keep = Named(empty((B, max(1, self.K), H), self.number, "keep"))
        h_new = Named(empty((B, H), self.number, "h_new"))
        c_new = Named(empty((B, H), self.real, "c_new")) if self.two else None
        self.launch("forward", self.ax, self.ah, self.bias, self.h, c, keep if self.K else None, h_new, c_new)
        d = Named(empty((B, self.leaves, H), self.number, "d"))
        dh, dc = Named(self.emu.array(self.dh, "dh")), Named(self.emu.array(dc, "dc")) if self.two else None
        kept = keep if self.K else None
        self.launch("backward", kept, self.h, c, h_new, c_new, self.doutput, dh, dc, d)
        results = {"h_new": h_new, "dh": dh, "d": d} | ({"c_new": c_new, "dc": dc} if self.two else {})
        wide = ("dh", "dc", "c_new")
        return {
            name: to_numpy(x.array) if name in wide else from_storage(to_numpy(x.array), self.storage)
            for name, x in results.items()
        }

    def reference(self, dtype):
        """The same results by torch and autograd in ``dtype``; a sequence past its end holds its state."""

        def leaf(x, storage=True):
            x = from_storage(x, self.storage) if storage else x
            return torch.tensor(x, dtype=dtype).requires_grad_()

        ax, h, c = leaf(self.ax), leaf(self.h), leaf(self.c, False)
        ah = leaf(self.ah)
        full = ah + (0 if self.bias is None else leaf(self.bias))
        full.retain_grad()
        kept, h_new, c_new = equations(self.cell, ax.unbind(1), full.unbind(1), h, c)
        self.kept = [k.detach().numpy() for k in kept]
        dh = torch.tensor(self.dh, dtype=dtype) + torch.tensor(from_storage(self.doutput, self.storage), dtype=dtype)
        loss = (h_new * dh).sum()
        if self.two:
            loss = loss + (c_new * torch.tensor(self.dc, dtype=dtype)).sum()
        loss.backward()
        held = self.held[:, None]
        d = ax.grad.numpy()
        if self.cell == "GruCell":
            d = np.stack([d[:, 0], d[:, 1], full.grad.numpy()[:, 2], d[:, 2]], 1)
        direct = np.zeros_like(self.dh, d.dtype) if h.grad is None else h.grad.numpy()
        results = {
            "h_new": np.where(held, h.detach().numpy(), h_new.detach().numpy()),
            "dh": np.where(held, self.dh, direct),
            "d": np.where(held[:, None], 0, d),
        }
        if self.two:
            results["c_new"] = np.where(held, self.c, c_new.detach().numpy())
            results["dc"] = np.where(held, self.dc, c.grad.numpy())
        return results

    def plain_backward(self, forward):
        """The NumPy cell's backward from what the storage holds of the forward pass."""
        real, H = self.real, self.H

        def stored(x):
            return from_storage(to_storage(x, self.storage), self.storage).astype(real).T.copy()

        kept = [stored(k) for k in self.kept]
        z = np.concatenate(kept) if kept else np.empty((H, self.B), real)
        h, h_new = stored(from_storage(self.h, self.storage)), stored(forward["h_new"])
        c, c_new = (self.c.T.copy(), forward["c_new"].T.astype(real)) if self.two else (None, None)
        dh = (self.dh + from_storage(self.doutput, self.storage)).astype(real).T.copy()
        dc = self.dc.T.copy() if self.two else None
        d, tmp = np.empty((self.leaves * H, self.B), real), np.empty((H, self.B), real)
        weights = cells.HiddenWeights(np.zeros((self.G * H, H), real))  # no way back through W_hh
        self.plain.backward(np, weights, z, h, c, h_new, c_new, dh, dc, d, tmp, lambda dh, dc: None)
        d = from_storage(to_storage(d.T.reshape(self.B, self.leaves, H), self.storage), self.storage)
        held = self.held[:, None]
        results = {"dh": np.where(held, self.dh, dh.T), "d": np.where(held[:, None], 0, d)}
        return results | ({"dc": np.where(held, self.dc, dc.T)} if self.two else {})

    def check(self):
        got, expected = self.run(), self.reference(torch.float64)
        plain = self.reference(torch.float64 if self.storage == "double" else torch.float32)
        plain |= self.plain_backward(plain)
        plain["h_new"] = from_storage(to_storage(plain["h_new"], self.storage), self.storage)
        for name, value in got.items():
            tolerance = bound(plain[name], expected[name], self.real)
            if self.storage == "double":  # torch and NumPy share a library's tanh; CUDA's differs in the last places
                tolerance = tolerance + 8 * np.finfo(np.float64).eps * (1 + np.abs(expected[name]))
            assert (np.abs(value - expected[name]) <= tolerance).all(), (
                f"{name}: off by {np.abs(value - expected[name]).max():.3g}, allowed {np.max(tolerance):.3g}"
            )


class Named:
    """An array that is on the device already."""

    def __init__(self, array):
        self.array = array


@pytest.fixture(scope="module", autouse=True)
def built():
    requests = [
        (kernel_source("step.cu"), (), f"step_{way}<{cell}, {storage}>", "step.cu")
        for cell, storage, way in itertools.product(CELLS, STORAGES, ("forward", "backward"))
    ]
    emulator.build_all((emulator.Emulator(arch=arch), request) for arch in (75, 80, 90, 120) for request in requests)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cell", CELLS)
def test_one_step_of_every_size(cell, storage, ragged):
    for k, (B, H) in enumerate(SIZES):
        emu = emulator.Emulator(arch=90, **SCHEDULES[k % 3])
        Step(emu, cell, storage, B, H, ragged, bias=k % 2 == 0, seed=k).check()


@pytest.mark.parametrize("arch", [75, 80, 120])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("cell", CELLS)
def test_other_architectures(cell, storage, arch):
    for schedule in SCHEDULES:
        Step(emulator.Emulator(arch=arch, **schedule), cell, storage, 3, 7, ragged=True).check()


@pytest.mark.parametrize("cell", CELLS)
def test_inference_keeps_nothing(cell):
    emu = emulator.Emulator()
    step = Step(emu, cell, "float", 3, 7, ragged=True)
    h_new = Named(emu.empty((3, 7), np.float32, "h_new"))
    c_new = Named(emu.empty((3, 7), np.float32, "c_new")) if step.two else None
    step.launch("forward", step.ax, step.ah, step.bias, step.h, step.c if step.two else None, None, h_new, c_new)
    np.testing.assert_array_equal(h_new.array, step.run()["h_new"].astype(np.float32))


MUTATIONS = {
    "sign of d_n": ("GruCell", "dtanh(n);\n        d[2]", "-dtanh(n);\n        d[2]"),
    "forget gate's derivative": ("LstmCell", "d[1] = dc * c * dsigmoid(f)", "d[1] = dc * c_new * dsigmoid(f)"),
    "dc before its own share": ("LstmCell", "dc += dh * o * dtanh(m)", "dc += dh * dtanh(m)"),
    "derivative of tanh": ("RnnTanh", "drelu(h_new) : dtanh(h_new)", "drelu(h_new) : dsigmoid(h_new)"),
    "derivative of relu": ("RnnRelu", "RELU ? drelu(h_new)", "RELU ? relu(h_new)"),
    "gates in another order": ("LstmCell", "sigmoid(ax[1] + ah[1])", "sigmoid(ax[3] + ah[1])"),
    "length off by one": ("GruCell", "lengths && t >= lengths[b]", "lengths && t > lengths[b]"),
    "index of kept gates": ("LstmCell", "Cell::kept + k) * H + j] = T", "Cell::kept + k) * H + j + 1] = T"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation):
    cell, old, new = MUTATIONS[mutation]
    step = Step(emulator.Emulator(), cell, "float", 8, 33, ragged=True)
    assert old in step.source
    step.source = step.source.replace(old, new)
    with pytest.raises((AssertionError, emulator.KernelError)):
        step.check()
