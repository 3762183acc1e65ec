"""More of ``gpurnn bench probe``: memory, fences, the exchange of schedule grid, cuBLAS in a graph, two streams."""

import statistics
import time

import numpy as np

from .probe_device import THREADS, all_equal, per_step, summed

CHASES = {"L2": 1 << 15, "memory": 1 << 28}  # words of a chain: far below the size of any L2, and far above it
KILOBYTES = 12, 48  # that a block receives: about those of an LSTM of 768 units and 8 sequences, forward and backward
STRIDE = 32 * 1031  # words: an odd number of lines of 128 bytes, so that a chain comes to every line before it returns


def latencies(device):
    """Seconds of one ``ld.relaxed.gpu`` that the next one waits for: from L2, and from the GPU's memory."""
    kernel, found = device.load("chase"), {}
    for name, words in CHASES.items():
        chain, begun = device.chain(words, STRIDE), [0]

        def launch(steps, name=name, chain=chain, words=words, begun=begun):
            start = begun[0]
            if name == "memory":  # the next launch goes on where none has been
                begun[0] = (start + steps * STRIDE) % words
            out = device.zeros(1, "uint32")
            kernel((1,), (1,), (np.int32(steps), np.uint32(start), chain, out))
            return [out, (start + steps * STRIDE) % words]

        def check(arrays, steps):
            out, expected = int(device.host(arrays[0])[0]), arrays[1]
            if out != expected:
                raise ValueError(f"the chain ends at {out}, expected {expected}")

        found[name] = per_step(device, launch, check)
        del chain
    return found


def fences(device, counts=(1, 4, 8)):
    """Seconds for this many stores by each thread of a block, with and without a GPU-wide fence after them."""
    found = {}
    for count in counts:
        for fence, text in ((0, ""), (1, " and a fence")):
            kernel = device.load("stores", f"-DSTORES={count}", f"-DFENCE={fence}")

            def launch(steps, kernel=kernel, count=count):
                words, out = device.zeros((count, THREADS), "uint32"), device.zeros(THREADS, "uint32")
                kernel((1,), (THREADS,), (np.int32(steps), words, out))
                return [out]

            found[f"{count} stores{text}"] = per_step(device, launch, all_equal(device))
    return found


def ring(device):
    """The exchange of exchange.cuh as grid_mma.cu uses it, without any product: seconds of one exchange by
    kilobytes that each block receives, blocks of a group, and groups."""
    blocks = 48 if device.multiprocessors >= 96 else max(2, device.multiprocessors // 2)
    found = {}
    for size in KILOBYTES:
        for group, groups in ((blocks, 1), (blocks, 2), (device.multiprocessors, 1)):
            loads, words = size // 2, size * 256
            sent = -(-words // group)  # by a block
            options = f"-DLOADS={loads}", f"-DWORDS_SENT={-(-sent // 256)}"
            kernel = device.load("ring", *options, cooperative=True)

            def launch(steps, kernel=kernel, group=group, groups=groups, words=words):
                slots = device.filled((groups, 32, words), "uint32", 0xFFFFFFFF)
                out, lost = device.zeros((groups, group, 256), "uint32"), device.zeros(1, "int32")
                kernel((1, group, groups), (256,), (np.int32(steps), np.int32(device.polls), slots, out, lost))
                return [out, lost]

            label = f"{size} KB, {groups} x {group} blocks"
            try:
                found[label] = per_step(device, launch, all_equal(device))
            except Exception as error:
                found[label] = {"failed": str(error)}
    return found


def cublas_capture(device, shape=(64, 1024, 4096), count=100):
    """Whether a CUDA graph holds the library's own cuBLAS calls; seconds of a product launched by Python, and in a
    graph. The product is that of a timestep of schedule ``step``: bfloat16 in, float32 out."""
    from gpurnn.dtypes import check_dtype

    B, H, rows = shape
    values = np.random.default_rng(0).standard_normal((B + H, max(H, rows)), dtype="float32") / 32
    dtype = check_dtype("bfloat16")
    a, b = (device.xp.asarray(part.astype(dtype)) for part in (values[:B, :H], values[B:, :rows]))
    out = device.zeros((B, rows), "float32")

    def many():
        for _ in range(count):
            device.gemm(a, b, out)

    many()
    expected, launched, recorded = device.host(out).copy(), [], []
    for _ in range(7):
        launched.append(_host_seconds(device, many) / count)
    try:
        graph = device.record(many)
    except Exception as error:
        return {"works": False, "reason": str(error), "launched": summed(launched)}
    out.fill(0)
    for _ in range(7):
        recorded.append(device.seconds(graph.launch) / count)
    if not np.allclose(device.host(out), expected, rtol=1e-3, atol=1e-3):
        raise ValueError("the graph's product is not what the same calls gave before")
    return {"works": True, "launched": summed(launched), "graph": summed(recorded)}


def _host_seconds(device, action):
    start = time.perf_counter()
    device.seconds(action)
    return time.perf_counter() - start


def two_streams(device, steps=3000):
    """Two cooperative launches, each for under half of the GPU, on two streams: seconds of one, and of both."""
    blocks = max(2, device.multiprocessors // 2 - 2)
    kernel = device.load("hop_all", cooperative=True)

    def launch():
        words, out = device.zeros((2, blocks), "uint64"), device.zeros(blocks, "uint32")
        lost = device.zeros(1, "int32")
        kernel((1, blocks), (256,), (np.int32(steps), words, out, lost))
        return out, lost

    alone, both, arrays = [], [], []

    def one():
        arrays.append(launch())

    for _ in range(4):
        alone.append(device.seconds(one))
        both.append(device.together([one, one]))
    for out, lost in arrays:
        all_equal(device)([out, lost], steps)
    alone, both = alone[1:], both[1:]  # the first compile and warm up
    overlap = statistics.median(both) < 1.5 * statistics.median(alone)
    return {"alone": summed(alone), "both": summed(both), "overlap": overlap}


MEASUREMENTS = (latencies, fences, ring, cublas_capture, two_streams)
