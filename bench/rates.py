"""How fast this processor multiplies and reads: loops in C, compiled for one instruction set, on several threads.

A large product in NumPy is 5 to 10 % slower than these multiplications, and a copy says nothing of a cache.
"""

import ctypes
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from gpurnn.backends.cpu.native import ISAS, load_native
from gpurnn.files import write_text_atomic

SIZES = tuple(1 << n for n in range(13, 27))  # bytes of a thread's block: 8 KiB to 64 MiB
_TURNS = 5  # the fastest counts
_MULTIPLICATIONS = 1_000_000  # times 12 vectors: some milliseconds
_READ = 1 << 28  # bytes of a turn, at least one block
_CHAINS = 12  # enough to hide a latency of 4 cycles in 2 units, and 14 registers of AVX2's 16
_SETS = {"baseline": (16, ()), "avx2": (32, ("-mavx2", "-mfma")), "avx512": (64, ("-mavx512f", "-mfma"))}
_FLAGS = ("-O3", "-ffp-contract=fast", "-fPIC", "-shared")
_PROGRAM = """
typedef float vector __attribute__((vector_size(BYTES)));

/* Multiply-adds in CHAINS independent registers; the result is used, so that none is left out. */
float multiply(long times) {
    vector sums[CHAINS], by = (vector){0} + 0.5f, more = (vector){0} + 1.0f, all = {0};
    for (int k = 0; k < CHAINS; ++k) sums[k] = (vector){0} + (float)k;
    for (long n = 0; n < times; ++n) {
        for (int k = 0; k < CHAINS; ++k) sums[k] = sums[k] * by + more;
        __asm__ volatile("" : "+r"(times));
    }
    for (int k = 0; k < CHAINS; ++k) all += sums[k];
    return all[0];
}

/* Read a block again and again. count: its vectors, a multiple of 8. */
float read_block(const vector *block, long count, long times) {
    vector sums[8] = {{0}}, all = {0};
    for (long n = 0; n < times; ++n) {
        for (long i = 0; i < count; i += 8)
            for (int k = 0; k < 8; ++k) sums[k] += block[i + k];
        __asm__ volatile("" ::: "memory");
    }
    for (int k = 0; k < 8; ++k) all += sums[k];
    return all[0];
}
"""


def rates(threads, isa=None):
    """What ``threads`` threads reach together: {"flops": a second, "reads": [[bytes, bytes a second], ...]}.

    flops: multiply-adds of float32 in registers, each counted as 2. reads: by the bytes of each thread's own block,
    which it reads again and again. isa: a name of ``GPURNN_ISA``; None: what gpurnn takes here. None where no C
    compiler is found, or gpurnn's own library was not built.
    """
    compiler, native = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"), load_native()
    if compiler is None or native is None:
        return None
    width, flags = _SETS[isa or ISAS[native[1]]]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = _compiled(compiler, width, flags, Path(folder))
        flops = 2 * _CHAINS * (width // 4) * _MULTIPLICATIONS
        found = {"flops": flops * _fastest([lambda: library.multiply(_MULTIPLICATIONS)] * threads), "reads": []}
        for size in SIZES:
            times = max(1, _READ // size)
            calls = [_reader(library, _block(size), width, times) for _ in range(threads)]
            found["reads"].append([size, size * times * _fastest(calls)])
    return found


def read_rate(reads, size):
    """The bytes a second that blocks of ``size`` bytes cannot exceed: the best of any block that is not smaller than
    the largest measured one that fits into ``size``."""
    start = max((n for n, (measured, _) in enumerate(reads) if measured <= size), default=0)
    return max(rate for _, rate in reads[start:])


def _compiled(compiler, width, flags, folder):
    source, library = folder / "rates.c", folder / "rates.so"
    write_text_atomic(source, _PROGRAM)
    sizes = (f"-DBYTES={width}", f"-DCHAINS={_CHAINS}")
    subprocess.run([compiler, *_FLAGS, *flags, *sizes, "-o", str(library), str(source)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.multiply.argtypes = [ctypes.c_long]
    loaded.read_block.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    loaded.multiply.restype = loaded.read_block.restype = ctypes.c_float
    return loaded


def _block(size):
    """An array of ``size`` bytes at a multiple of 64."""
    memory = np.ones(size // 4 + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size // 4]


def _reader(library, block, width, times):
    return lambda: library.read_block(block.ctypes.data, block.nbytes // width, times)


def _fastest(calls):
    """Calls a second of all threads together, one call each at the same time: the fastest of ``_TURNS`` turns."""
    best = 0.0
    for _ in range(_TURNS):
        start, seconds = threading.Barrier(len(calls)), [0.0] * len(calls)

        def timed(n, start=start, seconds=seconds):
            start.wait()
            begun = time.perf_counter()
            calls[n]()
            seconds[n] = time.perf_counter() - begun

        threads = [threading.Thread(target=timed, args=(n,)) for n in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(1 / each for each in seconds))
    return best
