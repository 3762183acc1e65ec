"""``gpurnn bench probe``: what one dependent step costs on this GPU, piece by piece, with small kernels (probe.cu).

Every measurement checks what its kernel returned; one that fails (an architecture without clusters, say) is a line of
the result. Seconds are of one step: the time of many steps less that of few, divided by their difference, so that the
launch is not in them. The median of several counts; all are in the file.
"""

import ctypes
import time

import numpy as np

from . import probe_memory
from .machine import clocks
from .probe_device import THREADS, all_equal, per_step, summed


def launches(device):
    """An empty kernel: host seconds to launch one, device seconds from one to the next, and in a CUDA graph."""
    kernel, count = device.load("nothing"), 200

    def many():
        for _ in range(count):
            kernel((1,), (32,), ())

    many()
    host, queued, graph = [], [], []
    stream = device.xp.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        many()
        recorded = stream.end_capture()
        for _ in range(7):
            start = time.perf_counter()
            many()
            host.append((time.perf_counter() - start) / count)
            stream.synchronize()
            queued.append(device.seconds(many) / count)
            graph.append(device.seconds(lambda: recorded.launch(stream)) / count)
    return {"host": summed(host), "queued": summed(queued), "graph": summed(graph)}


def copy(device):
    """Bytes a second, read and written, of a copy far larger than L2."""
    a = device.zeros(1 << 28, "float32")
    b = device.xp.empty_like(a)
    samples = [2 * a.nbytes / device.seconds(lambda: device.xp.copyto(b, a)) for _ in range(8)][1:]
    return {"bytes_per_second": max(samples), "samples": samples}


def gemm(device):
    """flop/s of a product of 4096 x 4096, for each arithmetic that works here."""
    n, found = 4096, {}
    blas = device.xp.cuda.cublas
    code = {"float64": (1, 70), "float32": (0, 68), "tf32": (0, 77), "float16": (2, 68), "bfloat16": (14, 68)}
    values = device.xp.random.default_rng(0).standard_normal((2, n, n), dtype="float32")  # zeros would cost no power
    for name, (kind, compute) in code.items():
        computed = "float64" if name == "float64" else "float32"
        if name == "bfloat16":  # the upper halves of float32
            a, b = values.view("uint16").reshape(2, n, n, 2)[..., 1].copy()
        else:
            a, b = values.astype(computed if name == "tf32" else name)
        c = device.xp.empty_like(a)
        one, zero = np.ones(1, computed), np.zeros(1, computed)
        arguments = (
            0, 0, n, n, n, one.ctypes.data, a.data.ptr, kind, n, b.data.ptr, kind, n, zero.ctypes.data,
            c.data.ptr, kind, n, compute, -1,
        )  # fmt: skip
        handle = device.xp.cuda.get_cublas_handle()
        blas.setPointerMode(handle, 0)
        try:
            took = [device.seconds(lambda: blas.gemmEx(handle, *arguments)) for _ in range(8)][1:]  # noqa: B023
        except Exception as error:
            found[name] = {"failed": str(error)}
        else:
            found[name] = {"flops_per_second": 2 * n**3 / min(took), "samples": took}
    return found


def block_barrier(device):
    """A write to shared memory, a barrier of the block, a read: seconds of one exchange."""
    kernel = device.load("block_barrier")

    def launch(steps):
        out = device.zeros(THREADS, "uint32")
        kernel((1,), (THREADS,), (np.int32(steps), out))
        return [out]

    return per_step(device, launch, all_equal(device))


def weights_read(device, size=128 * 1024, options=()):
    """Weights from shared memory through ldmatrix and mma, on one multiprocessor: seconds for all of them once."""
    if device.capability < 80:
        raise ValueError("bfloat16 products need compute capability 8.0")
    kernel = device.load("weights_read", *options)

    def launch(steps):
        out = device.zeros(THREADS, "float32")
        kernel((1,), (THREADS,), (np.int32(steps), np.int32(size), out), shared_mem=size)
        return [out]

    per_warp = size // 512 // (THREADS // 32) * 16
    found = per_step(device, launch, all_equal(device, lambda steps: steps * per_warp))
    return found | {"bytes": size, "bytes_per_second": size / found["seconds"]}


def weights_read_plain(device, size=128 * 1024):
    """The same by loads of 16 bytes a lane, as the kernels of schedule grid read theirs."""
    return weights_read(device, size, ("-DLDS",))


def _hops(device, name, buffers, more=()):
    """Seconds of one exchange for several numbers of blocks, one on each multiprocessor."""
    found = {}
    for blocks in sorted({2, max(2, device.multiprocessors // 8), device.multiprocessors // 2, device.multiprocessors}):
        kernel = device.load(name, *more, cooperative=True)

        def launch(steps, blocks=blocks, kernel=kernel):
            out, lost = device.zeros(blocks, "uint32"), device.zeros(1, "int32")
            memory = [device.zeros(shape(blocks), dtype) for shape, dtype in buffers]
            last = () if name == "grid_sync" else (lost,)
            # along y: CuPy shrinks a cooperative grid in silence where it has no blocks along y or z
            kernel((1, blocks), (THREADS,), (np.int32(steps), *memory, out, *last))
            return [out, lost]

        found[f"{blocks} blocks"] = per_step(device, launch, all_equal(device))
    return found


def hop_one(device):
    """A word with its epoch, one writer, all others polling."""
    return _hops(device, "hop_one", [(lambda blocks: 1, "uint64")])


def hop_all(device):
    """Words with their epochs, everybody to everybody."""
    return _hops(device, "hop_all", [(lambda blocks: (2, blocks), "uint64")])


def hop_counter(device):
    """A barrier of one counter."""
    return _hops(device, "hop_counter", [(lambda blocks: 1, "uint32"), (lambda blocks: (2, blocks), "uint32")])


def grid_sync(device):
    """The grid barrier of CUDA's cooperative groups."""
    return _hops(device, "grid_sync", [(lambda blocks: (2, blocks), "uint32")], ("-DGRID_SYNC",))


def _needs_clusters(device):
    if device.capability < 90:
        raise ValueError("clusters need compute capability 9.0")


def cluster_exchange(device, name="cluster_push", sizes=(8, 16), kilobytes=(1, 4, 16)):
    """Everybody of a cluster pushes to everybody's shared memory: seconds by cluster and kilobytes received."""
    _needs_clusters(device)
    found = {}
    for cluster in sizes:
        for size in kilobytes:
            words = size * 1024 // 4 // cluster
            label = f"cluster {cluster}, {size} KB"
            try:
                options = (f"-DCLUSTER={cluster}", *(["-DASYNC"] if name == "cluster_async" else []))
                kernel = device.load(name, *options)
                if cluster > 8:
                    allow_large_clusters(device, kernel)

                def launch(steps, kernel=kernel, cluster=cluster, words=words):
                    out, lost = device.zeros(cluster, "uint32"), device.zeros(1, "int32")
                    arguments = np.int32(steps), np.int32(words), out, *([lost] if name == "cluster_async" else [])
                    kernel((cluster,), (THREADS,), arguments, shared_mem=2 * cluster * words * 4)
                    return [out, lost]

                found[label] = per_step(device, launch, all_equal(device))
            except Exception as error:
                found[label] = {"failed": str(error)}
    return found


def cluster_async(device):
    """The same with asynchronous stores that the receiver's own barrier counts."""
    return cluster_exchange(device, "cluster_async")


def allow_large_clusters(device, kernel):
    """Clusters above 8 are not portable and must be asked for: attribute 14."""
    from cupy_backends.cuda.api import driver

    driver.funcSetAttribute(kernel.kernel.kernel.ptr, 14, 1)


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


def active_clusters(device, shared=200 * 1024):
    """How many clusters of 8 and 16 live on the device at once with 200 KB of shared memory to each block."""
    _needs_clusters(device)
    cuda, found = ctypes.CDLL("libcuda.so.1"), {}
    for cluster in (8, 16):
        kernel = device.load("cluster_push", f"-DCLUSTER={cluster}")
        if cluster > 8:
            allow_large_clusters(device, kernel)
        kernel.kernel.max_dynamic_shared_size_bytes = shared
        attribute = _Attribute(4)  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value[0:3] = [cluster, 1, 1]
        grid, block = (ctypes.c_uint * 3)(cluster * 64, 1, 1), (ctypes.c_uint * 3)(THREADS, 1, 1)
        launch = _Launch(grid, block, shared, None, ctypes.pointer(attribute), 1)
        count = ctypes.c_int()
        code = cuda.cuOccupancyMaxActiveClusters(
            ctypes.byref(count), ctypes.c_void_p(kernel.kernel.kernel.ptr), ctypes.byref(launch)
        )
        found[f"cluster {cluster}"] = {"failed": f"CUDA error {code}"} if code else {"clusters": count.value}
    return found


def captures(device):
    """Which launches a CUDA graph can hold, through CuPy: ordinary, cooperative, with clusters."""
    kinds = {"ordinary": ("block_barrier", (), False), "cooperative": ("hop_all", (), True)}
    if device.capability >= 90:
        kinds["cluster"] = ("cluster_push", ("-DCLUSTER=8",), False)
    found = {}
    for label, (name, options, cooperative) in kinds.items():
        kernel = device.load(name, *options, cooperative=cooperative)
        out, lost, words = device.zeros(1024, "uint32"), device.zeros(1, "int32"), device.zeros((2, 8), "uint64")
        grid, arguments = {
            "ordinary": ((1,), (np.int32(5), out)),
            "cooperative": ((1, 8), (np.int32(5), words, out, lost)),
            "cluster": ((8,), (np.int32(5), np.int32(8), out)),
        }[label]
        stream = device.xp.cuda.Stream(non_blocking=True)
        try:
            with stream:
                stream.begin_capture()
                try:
                    kernel(grid, (THREADS,), arguments, shared_mem=8 * 8 * 4 * 2)
                finally:
                    graph = stream.end_capture()
                graph.launch(stream)
                stream.synchronize()
            found[label] = {"works": bool((device.host(out)[:8] == 5).all())}
        except Exception as error:
            found[label] = {"failed": str(error)}
    return found


def attributes(device):
    """What the driver says of a kernel with clusters: function attributes 11 to 15."""
    _needs_clusters(device)
    from cupy_backends.cuda.api import driver

    kernel = device.load("cluster_push", "-DCLUSTER=8")
    names = ("required_width", "required_height", "required_depth", "non_portable_allowed", "scheduling_preference")
    found = {}
    for number, name in enumerate(names, 11):
        try:
            found[name] = driver.funcGetAttribute(number, kernel.kernel.kernel.ptr)
        except Exception as error:
            found[name] = {"failed": str(error)}
    return found


MEASUREMENTS = {
    function.__name__: function
    for function in (
        launches, copy, gemm, block_barrier, hop_one, hop_all, hop_counter, grid_sync, weights_read, weights_read_plain,
        cluster_exchange, cluster_async, active_clusters, captures, attributes, *probe_memory.MEASUREMENTS,
    )
}  # fmt: skip


def probe(device, names=tuple(MEASUREMENTS), progress=lambda names: names):
    """name -> what was measured, or {"failed": why}."""
    found = {}
    for name in progress(names):
        try:
            found[name] = MEASUREMENTS[name](device)
            if clocks():
                found[name]["clocks"] = clocks()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def lines(found):
    """A document's measurements for a terminal."""
    for name, value in found.items():
        yield name
        yield from _described(value, "  ")


def _described(value, indent):
    for key in ("bytes_per_second", "flops_per_second", "seconds"):
        if key in value:
            figure = value[key]
            text = f"{figure * 1e9:,.0f} ns" if key == "seconds" else f"{figure / 1e9:,.0f} G{key.partition('_')[0]}/s"
            yield f"{indent}{text}"
            return
    for key, inner in value.items():
        if isinstance(inner, dict):
            text = list(_described(inner, ""))
            yield f"{indent}{key}: {'; '.join(text) or 'nothing'}"
        elif key != "samples":
            yield f"{indent}{key}: {inner}"
