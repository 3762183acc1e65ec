"""What ``bench on-gpu`` asks, in order of worth: what must be right, what is timed against cuDNN, what is tuned.

A rehearsal has the same lists in small: ``small`` of a case.
"""

from dataclasses import asdict, dataclass, fields, replace

from .cases import Case

KERNELS = ("block", "block_mma", "grid", "grid_mma", "step", "step recorded")


@dataclass(frozen=True)
class Smoke:
    """One layer, forward and backward, against float64. kernel: of ``KERNELS``. norm: a ``LayerNorm`` stands before
    it, whose parameters move the layer's own to another address."""

    cell: str
    kernel: str
    dtype: str
    precision: str = "float32"
    T: int = 33
    B: int = 17
    I: int = 40
    H: int = 64
    bidirectional: bool = False
    ragged: bool = False
    norm: bool = False

    @property
    def name(self):
        parts = [self.cell, self.kernel, "tf32" if self.precision == "tf32" else self.dtype]
        parts += [f"{field}{getattr(self, field)}" for field in "TBIH"]
        parts += [field for field in ("bidirectional", "ragged", "norm") if getattr(self, field)]
        return " ".join(parts)

    @property
    def schedule(self):
        return self.kernel.split("_")[0].split()[0]

    def as_dict(self):
        return asdict(self)


def from_dict(values):
    """The ``Smoke`` or ``Case`` that ``as_dict`` gave."""
    kind = Smoke if "kernel" in values else Case
    return kind(**{name: value for name, value in values.items() if name in {field.name for field in fields(kind)}})


def _smoke():
    """Each kernel with two dtypes for LSTM and GRU; some of them ragged, some in both directions."""
    dtypes = {
        "block": ("float32", "bfloat16"), "block_mma": ("bfloat16", "tf32"), "grid": ("float32", "float16"),
        "grid_mma": ("bfloat16", "tf32"), "step": ("float32", "float16"), "step recorded": ("bfloat16", "float32"),
    }  # fmt: skip
    sizes = {"block": (17, 100), "block_mma": (17, 128), "grid": (17, 256), "grid_mma": (40, 384)}
    found, number = [], 0
    for second in (0, 1):
        for kernel in KERNELS:
            for cell in ("lstm", "gru"):
                name = dtypes[kernel][second]
                kind = {"dtype": "float32", "precision": "tf32"} if name == "tf32" else {"dtype": name}
                B, H = sizes.get(kernel, (17, 256))
                extra = {"bidirectional": number % 5 in (1, 3), "ragged": number % 3 == 2}
                I = 20 if second and kernel.startswith("block") else 40  # 20: the launch may make W_ih x itself
                T = 150 if kernel == "step recorded" else 33  # a graph of 64 timesteps twice, and one of the rest
                found.append(Smoke(cell, kernel, T=T, B=B, H=H, I=I, **kind, **extra))
                number += 1
    return found


SMOKE = (
    *_smoke(),
    # 3 + 3 numbers stand before the weights: an address that is no multiple of 16 bytes, unless somebody pads
    *(Smoke("lstm", kernel, "float32", I=3, H=32, norm=True) for kernel in ("block", "grid")),
    Smoke("lstm", "grid_mma", "bfloat16", B=40, H=384, ragged=True, norm=True),
    # as three bfloat16 numbers each
    Smoke("lstm", "grid_mma", "float32", B=16, H=768, ragged=True),
    Smoke("lstm", "block_mma", "float32", H=32, I=20, bidirectional=True),
    # clusters of thread blocks, of which a rehearsal has none
    Smoke("lstm", "cluster", "bfloat16", H=256, bidirectional=True),
    Smoke("gru", "cluster", "float32", "tf32", H=384, ragged=True),
    # two tiles at once
    Smoke("lstm", "grid_mma", "bfloat16", B=64, H=1024),
    # a launch for each timestep, of which all but the first begin early, in graphs and not
    Smoke("lstm", "fused", "bfloat16", T=150, B=70, H=300, bidirectional=True),
    Smoke("gru", "fused", "float32", B=40, H=260, ragged=True),
    Smoke("gru", "fused", "float32", "tf32", H=384, ragged=True),
)


def _headline():
    half, brain = {"dtype": "float16"}, {"dtype": "bfloat16"}
    single, tf32 = {}, {"precision": "tf32"}

    def layer(cell, T, B, H, kind, what="train", I=None, **more):
        return Case(cell, T, B, H, I or H, what=what, **kind, **more)

    return (
        # cuDNN's best kernel, and FlashRNN's size
        *(layer("lstm", 1024, 16, 768, kind, what) for kind in (half, brain) for what in ("forward", "train")),
        *(layer(cell, 512, 16, 256, kind) for kind in (single, tf32, brain) for cell in ("lstm", "gru")),
        *(layer("gru", 512, B, 1024, kind) for kind in (brain, half) for B in (16, 64)),
        *(layer(cell, 512, 10, 256, single, "inference", 128, L=6) for cell in ("lstm", "gru")),  # KernelBench
        # on both sides of the largest H that cuDNN has a kernel of its own for
        *(layer("lstm", 512, B, H, kind) for kind in (single, brain) for B in (16, 128) for H in (128, 129)),
        *(layer("lstm", 512, B, 1024, brain) for B in (64, 128)),
        *(layer("lstm", 512, B, 1024, single) for B in (16, 64)),
        layer("lstm", 512, 64, 2048, brain),  # whose weights fit on no GPU at once
        *(layer("lstm", 512, 32, 512, kind, ragged=True) for kind in (single, brain)),
        Case("lstm", 50, 50, 128, 128, L=2, V=65, what="step"),  # a language model of characters
    )


HEADLINE = _headline()

# Measurements of ``bench probe``, the most wanted first.
PROBES = (
    "launches", "captures", "cublas_capture", "hop_one", "hop_all", "ring", "block_barrier", "latencies", "fences",
    "two_streams", "active_clusters", "cluster_async", "weights_read", "weights_read_plain", "copy", "gemm",
)  # fmt: skip
REHEARSED = ("hop_one", "hop_all", "ring", "block_barrier", "latencies", "fences", "weights_read")  # on the emulator

# (cell, H, B, dtype, tf32) of ``tune``
TUNED = tuple(
    (cell, H, B, dtype, tf32)
    for dtype, tf32 in (("float32", False), ("bfloat16", False), ("float32", True))
    for cell in ("lstm", "gru")
    for H in (128, 256, 512, 1024)
    for B in (16, 64)
)
PROFILED = (HEADLINE[3], HEADLINE[9], HEADLINE[4])  # by ncu


def small(case):
    """The same in the size of a rehearsal: four multiprocessors, and seconds for a case."""
    H = {32: 20, 64: 24, 100: 28, 128: 32, 129: 33, 256: 40, 384: 44, 512: 48, 768: 52, 1024: 56}.get(case.H, 24)
    if isinstance(case, Smoke):
        return replace(case, B=3 if case.B == 17 else 9, I=case.I if case.norm else 5, H=H)
    V = 11 if case.V else 0
    return replace(case, T=4, B=2 if case.B < 64 else 9, I=H if case.I == case.H else 6, H=H, L=min(case.L, 2), V=V)


def variants(case, limit=12):
    """A smoke case with one thing changed at a time: which of them makes it wrong?"""
    changes = [{"T": T} for T in (1, 2, 17) if T < case.T]
    changes += [{name: False} for name in ("ragged", "bidirectional", "norm") if getattr(case, name)]
    changes += [{"B": 1}, {"B": 8}, {"H": case.H - case.H % 32}, {"I": case.H}]
    changes += [{"kernel": kernel} for kernel in KERNELS if kernel.endswith("recorded") == case.kernel.endswith("d")]
    changes += [{"dtype": dtype, "precision": "float32"} for dtype in ("float32", "float16", "bfloat16")]
    changes += [{"cell": cell} for cell in ("lstm", "gru")]
    found = [replace(case, **change) for change in changes]
    if case.schedule == "step":
        found.insert(0, replace(case, kernel="step" if case.kernel == "step recorded" else "step recorded"))
    return [other for other in dict.fromkeys(found) if other != case and other.H > 0][:limit]
