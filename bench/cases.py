"""Cases, the suites that list them, and the flops and bytes that each case needs at least."""

import random
from dataclasses import asdict, dataclass, replace

from gpurnn.dtypes import ITEMSIZE

from .cells import OPTIONS, PLAIN, record

PASSES = ("inference", "forward", "train", "step")
KINDS = (
    ("float32", "float32"),
    ("float32", "tf32"),
    ("float16", "float32"),
    ("bfloat16", "float32"),
)  # (dtype, precision)


@dataclass(frozen=True)
class Case:
    """One layer or stack on x (T, B, I).

    cell: one of ``cells.CELLS``.
    what: "inference"; "forward", which saves what the backward pass needs; "train", forward and backward to every
    gradient, dx included; "step", a whole training step of a language model with V words: embedding of size I, stack,
    linear layer, cross-entropy, backward pass, clipping of the global norm at 1, Adam.
    precision: "float32", "fma" or "tf32", for float32 on a GPU. The input GEMM is always part of the work.
    ragged: the sequences have lengths between T/4 and T, the first of them T.
    heads: into how many the hidden units are divided. resets: the share of timesteps before which a sequence begins
    again, from zeros.
    """

    cell: str
    T: int
    B: int
    H: int
    I: int
    L: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    precision: str = "float32"
    what: str = "inference"
    V: int = 0
    ragged: bool = False
    heads: int = 1
    resets: float = 0.0

    @property
    def name(self):
        """One line, the same in every run; ``compare`` pairs cases by it."""
        options = {
            f"L{self.L}": self.L > 1,
            "bidirectional": self.bidirectional,
            "tf32": self.precision == "tf32",
            f"V{self.V}": self.V > 0,
            "ragged": self.ragged,
            f"heads{self.heads}": self.heads > 1,
            f"resets{100 * self.resets:g}%": self.resets > 0,
        }
        extra = [text for text, applies in options.items() if applies]
        sizes = (f"{axis}{getattr(self, axis)}" for axis in "TBIH")
        return " ".join([self.cell, *sizes, *extra, self.dtype, self.what])

    @property
    def lengths(self):
        """The lengths of the sequences, the same at every call; None where all are T."""
        draw = random.Random(2)
        return [self.T, *(draw.randint(self.T // 4, self.T) for _ in range(self.B - 1))] if self.ragged else None

    @property
    def reset(self):
        """For each timestep, for each sequence whether it begins again, always the same; None where none does."""
        draw = random.Random(3)
        steps = [[draw.random() < self.resets for _ in range(self.B)] for _ in range(self.T)]
        return steps if self.resets else None

    @property
    def tokens(self):
        """Timesteps of all sequences together."""
        return sum(self.lengths) if self.ragged else self.T * self.B

    @property
    def steps(self):
        """Timesteps that depend on one another: a layer may follow the one below by one step, unless that has two
        directions; backward reads them again."""
        one_way = self.T * self.L if self.bidirectional else self.T + self.L - 1
        return one_way * (2 if self.what in ("train", "step") else 1)

    @property
    def record(self):
        """What the cell declares."""
        return record(self.cell)

    def _layers(self):
        """(weights, inputs, directions) of each layer: of both directions, the numbers of W_ih and W_hh."""
        D, cell = 2 if self.bidirectional else 1, self.record
        inputs = [self.I if layer == 0 else D * self.H for layer in range(self.L)]
        return [(D * self.H * (len(cell.gates) * I + len(cell.hidden) * self.H // self.heads), I, D) for I in inputs]

    @property
    def flops(self):
        """Of the matrix products: 2 for each weight, step and sequence; three times that with backward (by x and h, and
        by the weights)."""
        forward = sum(2 * self.tokens * weights for weights, _, _ in self._layers())
        D = 2 if self.bidirectional else 1
        forward += 2 * self.tokens * D * self.H * self.V
        return forward * (3 if self.what in ("train", "step") else 1)

    @property
    def bytes(self):
        """That must move if every array is read or written once and what stays on the chip costs nothing: x, output,
        weights; with backward dx, doutput, the weights' gradients, and what forward keeps, written and read; in a whole
        step the probabilities and what Adam reads and writes (weight, gradient, two averages), too."""
        cell, size = self.record, ITEMSIZE[self.dtype]
        total = 0
        for weights, inputs, D in self._layers():
            arrays = self.tokens * (inputs + D * self.H)
            saved = self.tokens * D * self.H * (len(cell.saved) + len(cell.states) - 1)
            times = {"inference": (1, 1, 0), "forward": (1, 1, 1), "train": (3, 2, 2), "step": (10, 2, 2)}[self.what]
            total += sum(n * count for n, count in zip(times, (weights, arrays, saved), strict=True))
        D = 2 if self.bidirectional else 1
        total += self.V * (10 * (self.I + D * self.H) + 2 * self.tokens)
        return total * size

    @property
    def parameters(self):
        """How many weights, biases and other parameters there are, with those of embedding and linear layer."""
        D, cell = 2 if self.bidirectional else 1, self.record
        vectors = cell.vectors + (2 * len(cell.gates) if cell.biases else 0)
        layers = sum(weights + D * self.H * vectors for weights, _, _ in self._layers())
        return layers + self.V * (self.I + D * self.H + 1)

    @property
    def recurrent_bytes(self):
        """Of one direction's recurrent weights: whether they fit on one multiprocessor."""
        return len(self.record.hidden) * self.H**2 // self.heads * ITEMSIZE[self.dtype]

    @property
    def weights_read(self):
        """(bytes of the weights that are read again and again, bytes that this reads in all): a direction's recurrent
        weights in each of its timesteps, all weights where there is one timestep; backward reads them again."""
        passes = 2 if self.what in ("train", "step") else 1
        if self.T == 1:
            everything = sum(weights for weights, _, _ in self._layers()) * ITEMSIZE[self.dtype]
            return everything, passes * everything
        loops = self.L * (2 if self.bidirectional else 1)
        return self.recurrent_bytes, passes * loops * self.T * self.recurrent_bytes

    def as_dict(self):
        return asdict(self)


def _house():
    sizes = (128, 129, 192, 256, 512, 768, 1024, 1536, 2048)
    return [
        Case(cell, 512, B, H, H, dtype=dtype, precision=precision, what=what)
        for cell in PLAIN
        for H in sizes
        for B in (1, 7, 8, 16, 64, 128)
        for dtype, precision in KINDS
        for what in ("inference", "forward", "train")
    ]


def _small():
    """What one multiprocessor can hold: sizes with cuDNN's kernel for small H, those just past it; a small input."""
    return [
        Case(cell, 512, B, H, H, dtype=dtype, precision=precision, what=what)
        for cell in PLAIN
        for H in (32, 64, 128, 129, 192)
        for B in (1, 16, 128)
        for dtype, precision in KINDS
        for what in ("inference", "train")
    ] + [  # a small input: its product is made within the launch
        Case(cell, 512, B, 8, 128, dtype=dtype, precision=precision, what=what)
        for cell in PLAIN
        for B in (16, 128)
        for dtype, precision in KINDS
        for what in ("inference", "train")
    ]


def _quick():
    return [
        Case(cell, 32, B, H, H, what=what)
        for cell in PLAIN
        for B, H in ((1, 64), (16, 128), (32, 256))
        for what in ("inference", "train")
    ]


def _cpu():
    """The table of the CPU in gpurnn/docs/speed.md: sizes from streaming to training a big layer."""
    return [
        Case(cell, 50, B, H, H, what=what)
        for cell in ("lstm", "gru", "rnn")
        for B, H in ((1, 64), (1, 256), (16, 128), (32, 256), (64, 512), (128, 1024))
        for what in ("inference", "train")
    ]


def _grid():
    """All sizes of a layer that people run on a CPU. The large ones, which take longest, come last."""
    sizes = [(B, H) for H in (64, 128, 256, 512, 1024) for B in (1, 2, 4, 8, 16, 32, 64, 128)]
    return [
        Case(cell, 50, B, H, H, what=what)
        for B, H in sizes
        for what in ("inference", "train")
        for cell in ("lstm", "gru", "rnn")
    ]


def _cells():
    """Each option beside the cells without it. The first cases of a pass are of the plain cells."""
    names = [*PLAIN, *(f"{option}_{kind}" for kind in ("lstm", "gru") for option in OPTIONS[kind])]
    return [Case(name, 50, 32, 256, 256, what=what) for what in ("train", "inference") for name in names]


def _applications():
    """Language models: characters small and large, a tagger, words (Zaremba et al. 2014, medium), in one step each."""
    models = (
        Case("lstm", 50, 50, 128, 128, L=2, V=65, what="step"),
        Case("gru", 100, 64, 256, 64, V=100, what="step"),
        Case("lstm", 32, 32, 128, 100, L=1, bidirectional=True, V=50, what="step"),
        Case("lstm", 35, 20, 650, 650, L=2, V=10000, what="step"),
        Case("lstm", 128, 64, 1024, 1024, L=2, V=256, what="step"),
    )
    kinds = (("float32", "float32"), ("float32", "tf32"), ("bfloat16", "float32"))
    return [replace(model, dtype=dtype, precision=precision) for model in models for dtype, precision in kinds]


# DeepBench's problems (baidu-research/DeepBench, rnn_problems.h): (H, batches, timesteps)
_DEEPBENCH_TRAIN = {
    "rnn": [(H, (16, 32, 64, 128), (50,)) for H in (1760, 2048, 2560)],
    "lstm": [(H, (16, 32, 64, 128), (25,)) for H in (512, 1024, 2048, 4096)]
    + [(1536, (8, 16, 32), (50,)), (256, (16, 32, 64), (150,))],
    "gru": [(H, (32,), (1500, 750, 375, 187)) for H in (2816, 2048, 1536, 2560)]
    + [(512, (32,), (1,)), (1024, (32, 64), (1500,))],
}
_DEEPBENCH_INFERENCE = {
    "lstm": [(H, (1, 2, 4), (25,)) for H in (512, 1024, 2048)] + [(1536, (1, 2, 4), (50,)), (256, (1, 2, 4), (150,))],
    "gru": [(H, (1, 2, 4), (1500, 750, 375, 187)) for H in (2816, 2048, 1536, 2560)]
    + [(512, (1, 2, 4), (1,)), (1024, (1, 2, 4), (1500,))],
}


def _deepbench():
    cases = []
    for problems, what in ((_DEEPBENCH_INFERENCE, "inference"), (_DEEPBENCH_TRAIN, "train")):
        for cell, sizes in problems.items():
            cases += [Case(cell, T, B, H, H, what=what) for H, batches, steps in sizes for B in batches for T in steps]
    return cases


def _flashrnn():
    """FlashRNN's grid (arXiv 2412.07752): T 1024, H 768, and its sweeps of B and T."""
    sizes = [(B, 1024) for B in (2, 4, 8, 16, 32, 64, 128, 256)] + [(16, T) for T in (256, 512, 2048)]
    return [
        Case(cell, T, B, 768, 768, dtype=dtype, what=what)
        for cell in PLAIN
        for B, T in sizes
        for dtype in ("float16", "bfloat16")
        for what in ("forward", "train")
    ]


def _kernelbench():
    """KernelBench level 3, problems 33 to 42: six layers, forward."""
    return [
        Case(cell, 512, 10, 256, 128, L=6, bidirectional=both, what="inference")
        for cell in ("lstm", "gru")
        for both in (False, True)
    ]


def _stacks():
    """Stacked layers that can run at once: one after another, as a wavefront, and cuDNN."""
    return [
        Case(cell, 1024, B, H, H, L=L, dtype=dtype, what=what)
        for cell in ("lstm", "gru")
        for L in (2, 4, 8)
        for H in (128, 512, 1024)
        for B in (16, 64)
        for dtype in ("float32", "bfloat16")
        for what in ("inference", "train")
    ]


def _reset():
    """Rollouts of reinforcement learning, whose episodes end anywhere; beside the same without an end."""
    sizes = ((128, 0.03), (16, 0.001), (16, 0.03), (16, 0.11), (64, 0.001), (64, 0.03), (64, 0.11))
    return [
        Case("lstm", T, 128, 256, 256, what=what, resets=rate)
        for what in ("train", "inference")
        for T, rate in ((128, 0.0), *sizes)
    ]


def _streaming():
    """One timestep, as in sampling and streaming."""
    return [
        Case(cell, 1, B, H, H, what="inference")
        for cell in ("lstm", "gru")
        for B in (1, 8, 32)
        for H in (64, 128, 256, 512, 1024)
    ]


def _heads():
    """Heads of 16 to 256 units, FlashRNN's H among them, beside one head."""
    return [
        Case("lstm", T, 16, H, H, what=what, heads=heads)
        for what in ("train", "inference")
        for T in (64, 512)
        for H, heads in ((512, 1), (512, 8), (768, 1), (768, 3), (768, 12), (768, 48))
    ]


SUITES = {
    "quick": (_quick, "small sizes, under a minute on 2 cores"),
    "cpu": (_cpu, "B 1 to 128, H 64 to 1024, T 50: the table of gpurnn/docs/speed.md"),
    "grid": (_grid, "B 1 to 128 x H 64 to 1024, T 50: the maps of gpurnn/docs/speed.md"),
    "cells": (_cells, "each option of LSTM and GRU beside the plain cells: B 32, H 256, T 50"),
    "applications": (_applications, "whole training steps of language models: embedding to Adam"),
    "small": (_small, "H 32 to 192, T 512: schedule block beside step, cuDNN, FlashRNN"),
    "house": (_house, "cells x H x B x dtype x pass at T 512, with cuDNN's cliffs (H 129, B 7)"),
    "deepbench": (_deepbench, "Baidu's training and inference lists"),
    "flashrnn": (_flashrnn, "FlashRNN's grid: H 768, T and B swept, 16-bit"),
    "stacks": (_stacks, "2 to 8 layers, T 1024: one after the other, as a wavefront, cuDNN"),
    "reset": (_reset, "states that are reset in the middle of a sequence: B 128, H 256, 0.1 to 11 % of timesteps"),
    "streaming": (_streaming, "one timestep: B 1 to 32, H 64 to 1024; with gpurnn-cpu-stepper and torch-cell"),
    "heads": (_heads, "block-diagonal recurrent weights: H 512 and 768 in heads of 16 to 256 units"),
    "kernelbench": (_kernelbench, "KernelBench level 3: six layers, B 10, T 512"),
}


def select(suite, **axes):
    """The cases of a suite, each axis replaced by the given values (repeated ones multiply), in order, without doubles.

    axes: field of ``Case`` -> tuple of values, empty to leave the suite's own. A pass other than "step" drops V, and
    "step" without V is given 100 words.
    """
    cases = SUITES[suite][0]()
    for axis, values in axes.items():
        if values:
            cases = [replace(case, **{axis: value}) for case in cases for value in values]
            if axis == "H":  # suites have I = H
                cases = [replace(case, I=case.H) for case in cases]
    cases = [replace(case, V=(case.V or 100) if case.what == "step" else 0) for case in cases]
    return list(dict.fromkeys(cases))
