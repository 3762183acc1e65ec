"""What a process may meet: memory or threads refused, a fork at any moment, nonsense in variables, huge arrays."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import gpurnn
from gpurnn.backends.cpu import memory, native, threads
from gpurnn.backends.cpu import ops as cpu_ops
from gpurnn.errors import BackendError, ShapeError

if cpu_ops.load_native() is None:
    pytest.skip("gpurnn._native was not built", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")


def python(code, timeout=120, **environment):
    """The standard output of a Python that runs ``code``; fails where that ends otherwise than well."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


# ---- variables


@pytest.mark.parametrize(
    "text", ["abc", "-1", "2.5", "0", "1e3", str(2**31), str(2**32), "4097", "2,2", " ", "9" * 5000]
)
def test_a_wrong_number_of_threads_is_named(text, monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"GPURNN_NUM_THREADS should be .* 1 to 4096, got '{text[:50]}"):
        cpu_ops.thread_count()


@pytest.mark.parametrize("text, count", [("abc", None), (str(2**31), 4096), ("7,3", 7), ("0", None), ("", None),
                                         ("9" * 5000, None)])  # fmt: skip
def test_of_another_librarys_variable_only_sense_is_taken(text, count, monkeypatch):
    monkeypatch.delenv("GPURNN_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usual = cpu_ops.thread_count()
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert cpu_ops.thread_count() == (count or usual)


@pytest.mark.long
def test_an_instruction_set_is_chosen():
    code = """
import numpy as np, gpurnn
layer = gpurnn.LSTM(5, 37, backend="cpu", seed=1)
print(layer.ops.level, layer.plan(50, 3).reason)
print(layer(np.ones((3, 2, 5), "float32"))[0].sum())
"""
    best, sums = cpu_ops.load_native()[1], []
    for level, name in enumerate(["baseline", "avx2", "avx512"][: best + 1]):
        found, total = python(code, GPURNN_ISA=name).splitlines()
        assert found.startswith(f"{level} ") and cpu_ops.LEVELS[level] in found
        sums.append(float(total))
    assert np.ptp(sums) <= 1e-5 * abs(sums[0])
    assert python(code).startswith(str(best))


@pytest.mark.parametrize("text, level, match", [
    ("avx1024", 2, "GPURNN_ISA should be one of 'baseline', 'avx2', 'avx512', got 'avx1024'"),
    ("avx512", 1, "GPURNN_ISA=avx512: this processor has no AVX-512"),
    ("avx2", 0, "GPURNN_ISA=avx2: this processor has no AVX2"),
])  # fmt: skip
def test_an_instruction_set_that_is_not_there_is_refused(text, level, match, monkeypatch):
    monkeypatch.setenv("GPURNN_ISA", text)
    with pytest.raises(BackendError if "this" in match else ValueError, match=match):
        native.chosen_level(level)


GROUPS = {  # /proc/self/cgroup, files below /sys/fs/cgroup, processors
    "version 2": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
    "version 2, of the group": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
    "version 1": ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    "version 1, its own name": ("4:cpu,cpuacct:/docker/x\n2:memory:/\n", {
        "cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }, 1),
    "version 1, of the group": ("4:cpuacct,cpu:/g\n", {
        "cpu/g/cpu.cfs_quota_us": "400000", "cpu/g/cpu.cfs_period_us": "100000",
        "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
    }, 4),
    "version 1, no limit": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    "nonsense": ("4:cpu:/\n0::/\n", {"cpu.max": "?", "cpu/cpu.cfs_quota_us": "x", "cpu/cpu.cfs_period_us": "0"}, 8),
    "none": (None, {}, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_a_containers_share_of_time_bounds_the_threads(name, monkeypatch, tmp_path):
    groups, files, count = GROUPS[name]
    for variable in ("GPURNN_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for path, text in files.items():
        (tmp_path / "sys" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / path).write_text(text)
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(threads, "QUOTA", (str(tmp_path / "sys"), str(tmp_path / "cgroup")))
    assert cpu_ops.thread_count() == count


# ---- what is refused


@pytest.mark.parametrize("shape", [(2**31, 1, 1), (2**31 - 1, 1, 1), (1, 2**31, 1)])
def test_sizes_that_an_int_does_not_hold_are_refused(shape):
    layer = gpurnn.RNN(1, 1, backend="cpu")
    x = np.broadcast_to(np.float32(0), shape)
    for call in (layer, layer.forward):
        with pytest.raises(ShapeError, match=r"x: [TB] = \d+ is more than the \d+ that backend 'cpu' takes"):
            call(x)


LIMITED = """
import resource, sys
import numpy as np
import gpurnn
from gpurnn.backends.cpu import ops as cpu_ops, sharing

def limit(megabytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(megabytes * 2**20), resource.RLIM_INFINITY))

def refused(kind, match, call):
    try:
        call()
    except kind as error:
        assert match in str(error), error
    else:
        raise AssertionError("nothing was raised")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.long
@linux
def test_threads_that_the_system_refuses():
    """Each needs address space for a stack. Afterwards, with fewer of them, all is as before."""
    python(LIMITED + """
sharing.WORK, sharing._ROWS, cpu_ops._SMALL = 0, 1, 0
layer = gpurnn.LSTM(5, 40, backend="cpu", seed=1)
x = np.ones((3, 512, 5), "float32")
import os
os.environ["GPURNN_NUM_THREADS"] = "1"
expected = layer(x)[0]
os.environ["GPURNN_NUM_THREADS"] = "500"
limit(300)
refused(gpurnn.BackendError, "GPURNN_NUM_THREADS", lambda: layer(x))
limit(300)
a = np.ones((9000, 30), "float32")
refused(gpurnn.BackendError, "refuses", lambda: layer.ops.product(a, a.T[:, :40], np.empty((9000, 40), "float32")))
os.environ["GPURNN_NUM_THREADS"] = "2"
assert np.array_equal(layer(x)[0], expected)
""")  # fmt: skip


@pytest.mark.long
@linux
@pytest.mark.parametrize("threads", ["1", "3"])
def test_memory_that_the_system_refuses(threads):
    """For packed weights before the threads begin, and for the products of each thread."""
    python(LIMITED + """
sharing.WORK, sharing._ROWS = 0, 1
large = gpurnn.LSTM(64, 2000, backend="cpu", seed=1)
many = gpurnn.LSTM(8, 64, backend="cpu", seed=1)
small = gpurnn.LSTM(8, 64, backend="cpu", seed=1)
x = np.ones((2, 30000, 8), "float32")
expected = small(x[:, :10])[0]
limit(40)
refused(MemoryError, "packed", lambda: large(np.ones((2, 1, 64), "float32")))
native, outside = large.ops.library.gpurnn_native_time_loop, []
def walk(*arguments):
    limit(10)
    return native(*arguments)
large.ops.library.gpurnn_native_time_loop = walk
refused(MemoryError, "backend 'cpu'", lambda: many(x))
sharing._ROWS = 1 << 30  # threads divide the units, and no other waits for one that fails
refused(MemoryError, "backend 'cpu'", lambda: many(x))
large.ops.library.gpurnn_native_time_loop = native
assert np.array_equal(small(x[:, :10])[0], expected)
""", GPURNN_NUM_THREADS=threads)  # fmt: skip


# ---- a fork at any moment

FORK = """
import os, sys, threading, time
import numpy as np
import gpurnn
from gpurnn.backends.cpu import sharing

sys.setswitchinterval(1e-6)
sharing.WORK, sharing._ROWS = 0, 1
layers = [make(64, 64, backend="cpu", seed=0) for make in (gpurnn.LSTM, gpurnn.GRU)]
x = np.random.default_rng(0).standard_normal((20, 32, 64)).astype("float32")

def train():
    for layer in layers:
        y, _, backward = layer.forward(x)
        backward(y)

over = False
def work():
    while not over:
        layers[0].ops.store.empty((300, 300), np.dtype("float32"))

def work_and_train():
    while not over:
        train()

train()
threads = [threading.Thread(target=target, daemon=True) for target in (work, work, work, work_and_train)]
for thread in threads:
    thread.start()
hung = 0
for number in range(40):
    time.sleep(0.002 * (number % 5))
    child = os.fork()
    if child == 0:
        train()
        os._exit(0)
    ends = time.monotonic() + 20
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, f"a child died: {status}"
            break
        if time.monotonic() > ends:
            os.kill(child, 9)
            os.waitpid(child, 0)
            hung += 1
            break
        time.sleep(0.001)
    if hung:
        break
over = True
for thread in threads:
    thread.join()
assert not hung, "a child hung"
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_beside_threads_that_train():
    python(FORK, timeout=300, GPURNN_NUM_THREADS="2")


# ---- memory that is kept


def test_little_more_is_kept_than_was_in_use():
    """Calls of many sizes: 617 MB were kept once where each needed 46."""
    store, single = cpu_ops.MemoryPool(), np.dtype("float32")
    for size in (300, 400, 500, 450, 350, 320, 600, 310) * 3:
        arrays = [store.empty((size, 300 + k), single) for k in range(5)]
        del arrays
        assert store.in_use == 0 and store.bytes <= 1.5 * 1.04 * 4 * 600 * (5 * 300 + 10)
    assert store.bytes == sum(room * len(some) for room, some in store.unused.items())


def test_what_a_large_call_has_used_is_given_back_while_small_ones_go_on():
    store, single = cpu_ops.MemoryPool(), np.dtype("float32")
    store.empty((3000, 3000), single)
    assert store.bytes >= 4 * 3000 * 3000
    for _ in range(2 * memory._STRETCH + 1):
        store.empty((300, 300), single)
    assert store.bytes <= 1.5 * 1.04 * 4 * 300 * 300


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True, "dropout": 0.2}])
@pytest.mark.parametrize("kind", [gpurnn.LSTM, gpurnn.GRU])
def test_a_training_step_finds_its_memory_again(kind, options, monkeypatch):
    """What the pool is there for: from the second step on nothing comes from the system."""
    layer, store = kind(64, 64, backend="cpu", seed=0, **options), cpu_ops.MemoryPool()
    monkeypatch.setattr(layer.ops, "store", store)
    x = np.ones((30, 32, 64), "float32")

    def step():
        y, _, backward = layer.forward(x)
        backward(y)

    step()
    step()
    found, take = [], store._take

    def noted(room):
        found.append(take(room))
        return found[-1]

    store._take = noted
    step()
    assert len(found) > 3 and not any(memory is None for memory in found)


def test_empty_cache():
    layer = gpurnn.GRU(64, 64, backend="cpu", seed=0)
    y, _, backward = layer.forward(np.ones((30, 32, 64), "float32"))
    backward(y)
    del y, backward
    store = layer.ops.store
    assert store.bytes > 1 << 20
    gpurnn.empty_cache()
    assert store.bytes == 0 and not store.unused


def test_memory_that_is_missing_may_be_what_is_kept(monkeypatch):
    store, real, refused = cpu_ops.MemoryPool(), memory.fresh_memory, []
    arrays = [store.empty((1000, 1000), np.dtype("float32")) for _ in range(4)]
    del arrays
    assert store.bytes

    def fresh_memory(size):
        if store.bytes and not refused:
            refused.append(size)
            raise MemoryError
        return real(size)

    monkeypatch.setattr(memory, "fresh_memory", fresh_memory)
    array = store.empty((600, 1000), np.dtype("float64"))
    assert array.shape == (600, 1000) and refused and not store.bytes


@linux
def test_much_memory_lies_in_large_pages_and_is_counted():
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        array = memory.fresh_memory(5 << 20)
        array[:] = 7
        assert array.nbytes == 5 << 20 and array.ctypes.data % (2 << 20) == 0
        counted = tracemalloc.get_traced_memory()[0] - before
        assert 5 << 20 <= counted < 6 << 20
        for text in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
            first, end = (int(number, 16) for number in text.split(maxsplit=1)[0].split("-"))
            if first <= array.ctypes.data < end:
                assert " hg" in re.search(r"^VmFlags:(.*)$", text, re.M)[1], "large pages were not asked for"
        del array
        assert tracemalloc.get_traced_memory()[0] - before < 1 << 20
    finally:
        tracemalloc.stop()


PEAK = """
import ctypes, sys
import numpy as np
import gpurnn

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

kind, I, H, T, B, options = eval(sys.stdin.read())
make = getattr(gpurnn, kind)
layers = make(3, 4, backend="cpu", seed=0), make(I, H, backend="cpu", seed=0, **options)
for layer, x in zip(layers, (np.ones((2, 2, 3), "float32"), np.ones((T, B, I), "float32"))):
    dy = np.ones_like(np.broadcast_to(np.float32(0), (*x.shape[:2], layer._sizes(0)[2] * len(layer._directions)))) + 0
    layer.flat_grads[...] = 0
    plan = layer.plan(*x.shape[:2])
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts anew
    before = status("VmRSS")
    y, _, backward = layer.forward(x)
    backward(dy)
    peak = status("VmHWM") - before
print(peak, plan.total_bytes)
"""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("case", [
    ("LSTM", 1000, 1000, 2, 1, {}),
    ("GRU", 64, 1500, 10, 4, {"bidirectional": True}),
    ("LSTM", 600, 1200, 20, 8, {"proj_size": 300}),
    ("GRU", 300, 600, 20, 32, {"reset_after": False}),
    ("RNN", 1000, 1000, 100, 16, {}),
    ("LSTM", 64, 64, 300, 64, {"num_layers": 2}),
])  # fmt: skip
def test_a_plan_says_what_a_step_takes(case):
    """With what packed weights take, which once were forgotten: calls took 2 to 260 times what the plan said. 6 MB are
    for pages of which only a part is used, as those of large arrays have 2 MB."""
    try:
        open("/proc/self/clear_refs", "a").close()
    except OSError:
        pytest.skip("this system does not say what a process took at most")
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "GPURNN_NUM_THREADS": "2"}
    # what is given back counts as given back: else glibc keeps some 30 MB of it
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], input=repr(case), env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    peak, planned = map(int, done.stdout.split())
    assert 0.6 * planned <= peak <= planned + (6 << 20)


# ---- where equal bits end

TRAINED = """
import hashlib
import numpy as np
import gpurnn
digest = hashlib.sha256()
for make in (gpurnn.LSTM, gpurnn.GRU, gpurnn.RNN):
    layer = make(40, 96, 2, bidirectional=True, dropout=0.2, backend="cpu", seed=1)
    optimizer = gpurnn.Adam(layer, 0.01)
    x = np.random.default_rng(0).standard_normal((12, 24, 40)).astype("float32")
    for _ in range(3):
        layer.zero_grad()
        y, _, backward = layer.forward(x)
        loss, loss_backward = gpurnn.cross_entropy(y, np.zeros(y.shape[:2], int))
        backward(loss_backward())
        gpurnn.clip_grad_norm(layer, 1.0)
        optimizer.step()
    digest.update(layer.flat_params.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.long
def test_bits_are_equal_over_processes_threads_and_blas_settings():
    """For each instruction set that this machine has."""
    for level in range(cpu_ops.load_native()[1] + 1):
        isa = cpu_ops.ISAS[level]
        settings = [
            {"GPURNN_NUM_THREADS": "1"}, {"GPURNN_NUM_THREADS": "3"},
            {"GPURNN_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Haswell"},
        ]  # fmt: skip
        assert len({python(TRAINED, GPURNN_ISA=isa, **more) for more in settings}) == 1, isa


def test_what_decides_bits_is_known():
    """And is JSON."""
    for backend in ("numpy", "cpu"):
        machine = gpurnn.get_backend(backend).machine()
        assert json.loads(json.dumps(machine)) == machine
        assert machine["backend"] == backend and machine["numpy"] == np.__version__ and machine["blas"]
    assert machine["isa"] == cpu_ops.ISAS[gpurnn.get_backend("cpu").level]


@pytest.mark.long
@pytest.mark.parametrize("backend", ["cpu", "numpy"])
def test_a_wrong_number_of_threads_is_refused_before_anything_runs(backend):
    code = f"import gpurnn; gpurnn.LSTM(2, 3, backend={backend!r})"
    environment = os.environ | {"GPURNN_NUM_THREADS": "abc"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode and "ValueError: GPURNN_NUM_THREADS should be" in done.stderr


def test_a_signal_handler_may_run_a_layer_at_any_moment():
    """In the thread that holds the pool's lock, too."""
    store = cpu_ops.MemoryPool()
    with store.lock:
        assert store.empty((300, 300), np.dtype("float32")).shape == (300, 300)
        store.clear()
    assert store.bytes == store.in_use == 0
