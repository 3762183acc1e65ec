"""Every memory, atomic, warp and barrier instruction of the translator's whitelist, executed and compared with NumPy.

Hand-written PTX, one thread unless lanes matter. Arithmetic is in test_cuda_arithmetic.py, errors in
test_cuda_mutations.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu import emulator
from cuda_on_cpu.translate import BYTES, FORMS, Refused, translate
from helpers import ROOT

pytestmark = pytest.mark.emulated

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
PATTERN = np.array([7 + 37 * k & 255 for k in range(32)], np.uint8)
VARIABLES = (
    f".const .align 16 .b8 fixed[32] = {{{', '.join(map(str, PATTERN))}}};\n.shared .align 16 .b8 shared_memory[32];\n"
)
REGISTERS = (
    ".reg .pred %p<4>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .local .align 16 .b8 depot[32];\n"
    "ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out];\n"
    "mov.u64 %rd2, shared_memory; mov.u64 %rd3, depot; mov.u64 %rd4, fixed;\n"
)
NUMPY = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
NUMPY |= {f"{kind}{n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n // 8}") for kind in "bus" for n in (8, 16, 32, 64)}


def names(*opcodes):
    return sorted(name for name in FORMS if name.split(".")[0] in opcodes)


def chunks(items, size=150):
    return [items[k : k + size] for k in range(0, len(items), size)]


def entry(name, body):
    return f".visible .entry {name}(.param .u64 in, .param .u64 out)\n{{\n{REGISTERS}{body}\nret;\n}}\n"


def execute(bodies, data, out_words, threads=1, arch=90):
    """Each body is an entry of one module; runs them all and returns their outputs (uint64) one under another."""
    ptx = HEAD + VARIABLES + "".join(entry(f"k{k}", body) for k, body in enumerate(bodies))
    emu = emulator.Emulator(arch=arch, checked=False)
    results = []
    for k in range(len(bodies)):
        out = emu.zeros(out_words, np.uint64, "out")
        emu.load_ptx(ptx, f"k{k}")((1,), (threads,), (emu.array(data, "in"), out))
        results.append(out.copy())
    return results


def base(name):
    """The register that holds an address for the instruction's space."""
    if ".shared" in name:
        return "%rd2"
    return {"local": "%rd3", "const": "%rd4"}.get(
        next((p for p in name.split(".") if p in ("local", "const")), ""), "%rd0"
    )


def shape(name):
    """(elements, type) of a load or store."""
    found = re.search(r"\.v(\d)\.", name)
    return int(found[1]) if found else 1, name.rsplit(".", 1)[1]


def target(kind, k):
    """A register that takes a value of the type: small ones are widened to 64 bits by the load itself."""
    return f"%r{8 + k}" if BYTES[kind] == 4 and kind == "f32" else f"%rd{8 + k}"


def braces(registers):
    return registers[0] if len(registers) == 1 else f"{{{', '.join(registers)}}}"


def test_every_load():
    forms = [name for name in names("ld") if not name.startswith("ld.param") and not (".v4" in name and "64" in name)]
    fill = "ld.global.v2.b64 {%rd8, %rd9}, [%rd0]; ld.global.v2.b64 {%rd10, %rd11}, [%rd0+16];\n"
    fill += "".join(
        f"st.{s}.v2.b64 [{r}], {{%rd8, %rd9}}; st.{s}.v2.b64 [{r}+16], {{%rd10, %rd11}};\n"
        for s, r in (("shared", "%rd2"), ("local", "%rd3"))
    )
    parts = chunks(forms)
    bodies = []
    for part in parts:
        lines = [fill]
        for n, name in enumerate(part):
            count, kind = shape(name)
            registers = [target(kind, k) for k in range(count)]
            lines.append(f"{name} {braces(registers)}, [{base(name)}];")
            for k, register in enumerate(registers):
                if register.startswith("%r8") or (kind == "f32"):
                    lines.append(f"cvt.u64.u32 %rd16, {register};")
                    register = "%rd16"
                lines.append(f"st.global.b64 [%rd1+{32 * n + 8 * k}], {register};")
        bodies.append("\n".join(lines))
    results = execute(bodies, PATTERN, 4 * 150)
    for part, result in zip(parts, results, strict=True):
        for n, name in enumerate(part):
            count, kind = shape(name)
            values = PATTERN[: count * BYTES[kind]].view(NUMPY[kind if kind[0] != "f" else "b" + kind[1:]])
            expected = values.astype(np.int64).view(np.uint64) if kind[0] == "s" else values.astype(np.uint64)
            np.testing.assert_array_equal(result[4 * n : 4 * n + count], expected, err_msg=name)


def test_every_store():
    forms = [name for name in names("st") if not name.startswith(("st.param", "st.async"))]
    parts = chunks(forms)
    bodies = []
    for part in parts:
        lines = [f"ld.global.b64 %rd{8 + k}, [%rd0+{8 * k}]; cvt.u32.u64 %r{8 + k}, %rd{8 + k};" for k in range(4)]
        lines.append("mov.b64 %rd20, 0;")
        for n, name in enumerate(part):
            count, kind = shape(name)
            where, space = base(name), "generic"
            if where == "%rd0":
                where = f"%rd1+{32 * n}"
            else:
                space = "shared" if where == "%rd2" else "local"
                lines += [f"st.{space}.v2.b64 [{where}+{at}], {{%rd20, %rd20}};" for at in (0, 16)]
            registers = [target(kind, k) for k in range(count)]
            lines.append(f"{name} [{where}], {braces(registers)};")
            if space != "generic":
                for at in (0, 16):
                    lines.append(f"ld.{space}.v2.b64 {{%rd16, %rd17}}, [{where}+{at}];")
                    lines.append(f"st.global.v2.b64 [%rd1+{32 * n + at}], {{%rd16, %rd17}};")
        bodies.append("\n".join(lines))
    results = execute(bodies, PATTERN, 4 * 150)
    words = PATTERN.view(np.uint64)
    for part, result in zip(parts, results, strict=True):
        for n, name in enumerate(part):
            count, kind = shape(name)
            expected = b"".join(int(w).to_bytes(8, "little")[: BYTES[kind]] for w in words[:count]).ljust(32, b"\0")
            assert result[4 * n : 4 * n + 4].tobytes() == expected, name


def bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def add(kind, old, b):
    """old + b on the bit patterns of 8 bytes of memory."""
    size = BYTES[kind]
    x, y = (np.array([v], np.uint64).view(np.uint8)[:size] for v in (old, b))
    if kind.startswith("bf16"):
        with np.errstate(all="ignore"):
            total = to_bf16(bf16(x.view(np.uint16)) + bf16(y.view(np.uint16)))
    else:
        dtype = NUMPY[kind.removesuffix("x2")]
        with np.errstate(all="ignore"):
            total = x.view(dtype) + y.view(dtype)
    return int.from_bytes(total.tobytes(), "little")


def atomic_reference(op, kind, old, b, c):
    bits = 8 * BYTES[kind]
    mask = (1 << bits) - 1
    old, b, c = old & mask, b & mask, c & mask

    def signed(x):
        return x - (1 << bits) if kind[0] == "s" and x >> (bits - 1) else x

    if op == "add":
        return add(kind, old, b) & mask
    if op in ("min", "max"):
        return (min if op == "min" else max)((old, b), key=signed)
    return {
        "and": old & b,
        "or": old | b,
        "xor": old ^ b,
        "exch": b,
        "inc": 0 if old >= b else old + 1,
        "dec": b if old == 0 or old > b else old - 1,
        "cas": c if old == b else old,
    }[op]


ATOMICS = {"add", "min", "max", "and", "or", "xor", "exch", "inc", "dec", "cas"}

# Pairs of operands: as integers below, equal, above, negative; as floats ordinary numbers in every width.
OPERANDS = [
    (0x4200450041804000, 0x3F80380040A03C00, 5),
    (9, 9, 1234567),
    (0xC100C180C1C0C200, 0x4000410042004300, 77),
]


@pytest.mark.parametrize("operands", OPERANDS, ids=["above", "equal", "negative"])
@pytest.mark.parametrize("opcode", ["atom", "red"])
def test_every_atomic(opcode, operands):
    old, b, c = operands
    data = np.array([old, b, c, 0], np.uint64)
    parts = chunks(names(opcode))
    bodies = []
    for part in parts:
        lines = [f"ld.global.b64 %rd{8 + k}, [%rd0+{8 * k}]; cvt.u32.u64 %r{8 + k}, %rd{8 + k};" for k in range(3)]
        lines += [f"cvt.u16.u64 %h{8 + k}, %rd{8 + k};" for k in range(3)]
        for n, name in enumerate(part):
            kind = name.rsplit(".", 1)[1]
            letter = {2: "%h", 4: "%r", 8: "%rd"}[BYTES[kind]]
            where = "%rd2" if ".shared" in name else f"%rd1+{16 * n}"
            space = "shared" if ".shared" in name else "global"
            sources = [f"{letter}9"] + ([f"{letter}10"] if ".cas" in name else [])
            got = [f"{letter}12"] if opcode == "atom" else []
            lines.append(f"st.{space}.b64 [{where}], %rd8;")
            lines.append(f"{name} {', '.join([*got, f'[{where}]', *sources])};")
            lines.append(f"ld.{space}.b64 %rd16, [{where}]; st.global.b64 [%rd1+{16 * n}], %rd16;")
            if got:
                lines.append(f"st.global.b{8 * BYTES[kind]} [%rd1+{16 * n + 8}], {got[0]};")
        bodies.append("\n".join(lines))
    for part, result in zip(parts, execute(bodies, data, 2 * 150), strict=True):
        for n, name in enumerate(part):
            kind = name.rsplit(".", 1)[1]
            op = next(p for p in name.split(".")[1:] if p in ATOMICS)
            mask = (1 << 8 * BYTES[kind]) - 1
            expected = old & ~mask | atomic_reference(op, kind, old, b, c)
            assert int(result[2 * n]) == expected, name
            if opcode == "atom":
                assert int(result[2 * n + 1]) == old & mask, name


LANES = np.arange(32)
VALUES = (LANES * 2654435761 % 2**32).astype(np.uint32)


def run_lanes(statements, values=VALUES):
    """Statements over %r8 (a value per lane) that leave the result in %r9 and a predicate in %p1; (32,) of each."""
    body = (
        "mov.u32 %r0, %laneid; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd0, %rd5; ld.global.b32 %r8, [%rd6];\n"
        "mov.u32 %r9, 0; setp.ne.u32 %p1, %r9, 0; setp.ge.s32 %p2, %r8, 0;\n"
        + statements
        + "\nmul.wide.u32 %rd5, %r0, 16; add.s64 %rd6, %rd1, %rd5; cvt.u64.u32 %rd7, %r9; st.global.b64 [%rd6], %rd7;\n"
        "selp.b32 %r10, 1, 0, %p1; cvt.u64.u32 %rd7, %r10; st.global.b64 [%rd6+8], %rd7;"
    )
    (result,) = execute([body], values, 64, threads=32)
    return result[0::2].astype(np.uint32), result[1::2].astype(bool)


@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("amount", [0, 1, 5, 31])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffles(mode, amount, width):
    segment = 32 - width << 8
    clamp = segment | (0 if mode == "up" else 31)
    got, inside = run_lanes(f"shfl.sync.{mode}.b32 %r9|%p1, %r8, {amount}, {clamp}, -1;")
    first = LANES // width * width
    last = first + width - 1
    source = {
        "idx": first + amount % width,
        "up": LANES - amount,
        "down": LANES + amount,
        "bfly": LANES ^ amount,
    }[mode]
    valid = (source >= first) if mode == "up" else (source <= last)
    np.testing.assert_array_equal(inside, valid)
    np.testing.assert_array_equal(got, VALUES[np.where(valid, source, LANES)])


def test_votes_and_matches():
    yes = VALUES.view(np.int32) >= 0
    ballot = int(sum(1 << int(k) for k in LANES[yes]))
    assert set(run_lanes("vote.sync.ballot.b32 %r9, %p2, -1;")[0].tolist()) == {ballot}
    for kind, expected in (("all", yes.all()), ("any", yes.any()), ("uni", len(set(yes)) == 1)):
        assert set(run_lanes(f"vote.sync.{kind}.pred %p1, %p2, -1;")[1].tolist()) == {bool(expected)}
        assert run_lanes(f"vote.sync.{kind}.pred %p1, %p2, -1;", np.zeros(32, np.uint32))[1].all()
    few = (LANES % 3).astype(np.uint32)
    masks = [sum(1 << int(j) for j in LANES[few == value]) for value in few]
    wide = "cvt.u64.u32 %rd12, %r8; "
    for statement in ("match.any.sync.b32 %r9, %r8, -1;", wide + "match.any.sync.b64 %r9, %rd12, -1;"):
        assert run_lanes(statement, few)[0].tolist() == masks
    for statement in ("match.all.sync.b32 %r9|%p1, %r8, -1;", wide + "match.all.sync.b64 %r9|%p1, %rd12, -1;"):
        got, same = run_lanes(statement, few)
        assert not got.any() and not same.any()
        got, same = run_lanes(statement, np.full(32, 7, np.uint32))
        assert (got == 0xFFFFFFFF).all() and same.all()


@pytest.mark.parametrize("name", names("redux"))
def test_warp_reductions(name):
    op, kind = name.split(".")[2:]
    values = VALUES.view(np.int32) if kind == "s32" else VALUES
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    reduce["xor"] = np.bitwise_xor
    expected = reduce[op].reduce(values, dtype=values.dtype)
    got, _ = run_lanes(f"{name} %r9, %r8, -1;")
    assert set(got.tolist()) == {int(np.uint32(int(expected) & 0xFFFFFFFF))}


def matrix_statements(name, out):
    """ldmatrix from 32 rows of 8 halves that hold their own numbers; ``out`` registers."""
    fill = "shl.b32 %r16, %r0, 3; mov.u32 %r17, 0;\n"
    for k in range(4):  # row r: r * 8 + 0 .. 7, in pairs
        fill += f"add.u32 %r18, %r16, {2 * k}; add.u32 %r19, %r16, {2 * k + 1}; shl.b32 %r19, %r19, 16;\n"
        fill += "or.b32 %r18, %r18, %r19; mul.wide.u32 %rd20, %r0, 16;\n"
        fill += f"add.s64 %rd20, %rd2, %rd20; st.shared.b32 [%rd20+{4 * k}], %r18;\n"
    return fill + f"bar.sync 0; {name} {braces(out)}, [%rd20]; mov.b32 %r9, {out[-1]};"


@pytest.mark.parametrize("name", names("ldmatrix"))
def test_matrix_loads(name):
    global VARIABLES
    count, trans = int(re.search(r"\.x(\d)", name)[1]), ".trans" in name
    before, VARIABLES = VARIABLES, VARIABLES.replace("shared_memory[32]", "shared_memory[512]")
    try:
        # a single register needs its braces, too
        out = [f"%r{20 + k}" for k in range(count)]
        statements = matrix_statements(name, out).replace(f"{name} {out[0]},", f"{name} {{{out[0]}}},")
        got, _ = run_lanes(statements)
    finally:
        VARIABLES = before
    matrix = np.arange(64).reshape(8, 8) + 64 * (count - 1)
    matrix = matrix.T if trans else matrix
    low, high = matrix[LANES // 4, LANES % 4 * 2], matrix[LANES // 4, LANES % 4 * 2 + 1]
    np.testing.assert_array_equal(got, (high << 16 | low).astype(np.uint32))


@pytest.mark.parametrize("name", names("mma"))
def test_matrix_products(name):
    """Fragments as the PTX ISA draws them: group g = lane / 4, t = lane % 4."""
    parts = name.split(".")
    K, result, kind = int(parts[3].split("k")[1]), parts[6], parts[7]
    rng = np.random.default_rng(K)
    A, B, C = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, K), (K, 8), (16, 8)))  # exact in all
    g, t = LANES // 4, LANES % 4

    def pack(low, high):
        if kind == "bf16":
            low, high = to_bf16(low), to_bf16(high)
        else:
            low, high = (x.astype(np.float16).view(np.uint16) for x in (low, high))
        return low.astype(np.uint32) | high.astype(np.uint32) << 16

    if kind == "tf32":
        a = [A[g + 8 * (r % 2), t + 4 * (r // 2)].view(np.uint32) | 5 for r in range(K // 2)]  # low bits do not count
        b = [B[t + 4 * r, g].view(np.uint32) | 3 for r in range(K // 4)]
    else:
        a = [pack(*(A[g + 8 * (r % 2), 8 * (r // 2) + 2 * t + e] for e in (0, 1))) for r in range(K // 4)]
        b = [pack(*(B[8 * r + 2 * t + e, g] for e in (0, 1))) for r in range(K // 8)]
    if result == "f32":
        c = [C[g + 8 * (r // 2), 2 * t + r % 2].view(np.uint32) for r in range(4)]
    else:
        c = [pack(C[g + 8 * r, 2 * t], C[g + 8 * r, 2 * t + 1]) for r in range(2)]
    registers = [*a, *b, *c]
    lines = ["mov.u32 %r0, %laneid; mul.wide.u32 %rd5, %r0, 64; add.s64 %rd6, %rd0, %rd5; add.s64 %rd7, %rd1, %rd5;"]
    lines += [f"ld.global.b32 %r{1 + k}, [%rd6+{4 * k}];" for k in range(len(registers))]
    used = iter(range(1, 32))
    sources = ["{" + ", ".join(f"%r{next(used)}" for _ in part) + "}" for part in (a, b, c)]
    out = [f"%r{20 + k}" for k in range(len(c))]
    lines.append(f"{name} {braces(out)}, {', '.join(sources)};")
    lines += [f"st.global.b32 [%rd7+{4 * k}], {register};" for k, register in enumerate(out)]
    data = np.zeros((32, 16), np.uint32)
    data[:, : len(registers)] = np.stack(registers, 1)
    got = execute(["\n".join(lines)], data, 32 * 8, threads=32)[0].view(np.uint32).reshape(32, 16)[:, : len(c)]
    D = C + A @ B
    for r in range(len(c)):
        if result == "f32":
            np.testing.assert_array_equal(got[:, r].view(np.float32), D[g + 8 * (r // 2), 2 * t + r % 2])
        else:
            np.testing.assert_array_equal(got[:, r], pack(D[g + 8 * r, 2 * t], D[g + 8 * r, 2 * t + 1]))


def test_barriers():
    """64 threads hand numbers over through shared memory, once for each form of a barrier of the whole block."""
    for statement in ("bar.sync 0;", "barrier.sync 3;", "barrier.sync.aligned 15, 64;", "bar.sync 1, 64;"):
        body = (
            "mov.u32 %r0, %tid.x; xor.b32 %r1, %r0, 63; mul.wide.u32 %rd5, %r0, 4; mul.wide.u32 %rd6, %r1, 4;\n"
            "add.s64 %rd7, %rd0, %rd5; add.s64 %rd8, %rd0, %rd6; add.s64 %rd9, %rd1, %rd5;\n"
            f"st.global.u32 [%rd7], %r0; {statement} ld.global.u32 %r2, [%rd8]; st.global.u32 [%rd9], %r2;"
        )
        (result,) = execute([body], np.zeros(64, np.uint32), 32, threads=64)
        assert result.view(np.uint32).tolist() == list(range(63, -1, -1)), statement
    for form, expected in (("popc{}.u32 %r2, 0", 22), ("and{}.pred %p2, 0", 0), ("or{}.pred %p2, 0", 1)):
        for opcode in ("bar", "barrier"):
            name = f"{opcode}.red.{form.format('')}"
            body = (
                "mov.u32 %r0, %tid.x; rem.u32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 0; mul.wide.u32 %rd5, %r0, 4;\n"
                f"add.s64 %rd9, %rd1, %rd5; {name}, %p1;\n"
                + ("" if "popc" in form else "selp.b32 %r2, 1, 0, %p2;\n")
                + "st.global.u32 [%rd9], %r2;"
            )
            (result,) = execute([body], np.zeros(64, np.uint32), 32, threads=64)
            assert set(result.view(np.uint32).tolist()) == {expected}, name


def test_arrivals_without_waiting():
    """Warp 0 writes and goes on, warp 1 waits for it."""
    for arrive, wait in (("bar.arrive", "bar.sync"), ("barrier.arrive", "barrier.sync")):
        for aligned in ("", ".aligned") if arrive.startswith("barrier") else ("",):
            body = (
                "mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 31; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd6, %rd0, %rd5;\n"
                "add.s64 %rd7, %rd1, %rd5; setp.ge.u32 %p1, %r0, 32; @%p1 bra waiting;\n"
                f"st.global.u32 [%rd6], %r0; {arrive}{aligned} 1, 64; exit;\n"
                f"waiting: {wait} 1, 64; ld.global.u32 %r2, [%rd6]; st.global.u32 [%rd7], %r2; ret.uni;"
            )
            (result,) = execute([body], np.zeros(32, np.uint32), 16, threads=64)
            assert result.view(np.uint32).tolist() == list(range(32))


@pytest.mark.parametrize("arrive", [name for name in names("barrier") if "cluster.arrive" in name])
def test_cluster_barriers(arrive):
    for wait in (name for name in names("barrier") if "cluster.wait" in name):
        body = (
            "mov.u32 %r0, %tid.x; xor.b32 %r1, %r0, 31; mul.wide.u32 %rd5, %r0, 4; mul.wide.u32 %rd6, %r1, 4;\n"
            "add.s64 %rd7, %rd0, %rd5; add.s64 %rd8, %rd0, %rd6; add.s64 %rd9, %rd1, %rd5; st.global.u32 [%rd7], %r0;\n"
            f"{arrive}; {wait}; ld.global.u32 %r2, [%rd8]; st.global.u32 [%rd9], %r2;"
        )
        (result,) = execute([body], np.zeros(32, np.uint32), 16, threads=32)
        assert result.view(np.uint32).tolist() == list(range(31, -1, -1))


# ---- mbarriers: at shared_memory; its third and fourth word are what asynchronous stores write

WAITS = [name for name in names("mbarrier") if "_wait" in name]
ARRIVALS = [name for name in names("mbarrier") if name.startswith("mbarrier.arrive")]
PLAIN = "mbarrier.arrive.shared::cta.b64 _"


def phases(steps, waits=WAITS):
    """Whether the phases 0 and 1 are over at the beginning and after each step, as every form of a wait says."""
    lines = ["mapa.shared::cluster.u64 %rd5, %rd2, 0;"]
    for k, step in enumerate(("", *steps)):
        lines.append(step)
        for n, wait in enumerate(waits):
            for parity in (0, 1):
                lines.append(f"{wait} %p1, [%rd2], {parity}; selp.b64 %rd8, 1, 0, %p1;")
                lines.append(f"st.global.b64 [%rd1+{8 * (2 * (k * len(waits) + n) + parity)}], %rd8;")
    first = "mbarrier.init.shared.b64 [%rd2], 2;"
    (result,) = execute([first + "\n".join(lines)], PATTERN, 2 * len(waits) * (len(steps) + 1))
    found = result.reshape(len(steps) + 1, len(waits), 2).astype(int)
    assert (found == found[:, :1]).all()
    return found[:, 0].tolist()


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_at_an_mbarrier(name):
    """Two of them end a phase, and the next one begins; bytes that are expected have to come, too."""
    where = "[%rd5]" if name.endswith("::cluster.b64") else "[%rd2]"
    running, over = [0, 1], [1, 0]
    if ".expect_tx" in name:
        steps = f"{name} _, {where}, 24;", f"{PLAIN}, [%rd2];"
        complete = "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%rd2], 24;"
        assert phases((*steps, complete, *steps), WAITS[:1]) == [running, running, running, over, over, over]
        assert phases((complete, *steps), WAITS[:1]) == [running, running, running, over]  # bytes may come first
        return
    one = f"{name} _, {where};"
    assert phases((one, one, one, one)) == [running, running, over, over, running]
    if "release" in name:
        assert phases((f"{name} _, {where}, 2;",), WAITS[:1]) == [running, over]


def test_bytes_of_an_mbarrier():
    """They alone do not end a phase; arrivals alone do not while some are missing."""
    both = f"{PLAIN}, [%rd2]; {PLAIN}, [%rd2];"
    changes = [name for name in names("mbarrier") if name.startswith(("mbarrier.expect", "mbarrier.complete"))]
    for expect in (name for name in changes if "expect" in name):
        for complete in (name for name in changes if "complete" in name):
            of = {name: "[%rd5]" if "::cluster." in name[-16:] else "[%rd2]" for name in (expect, complete)}
            steps = (
                f"{expect} {of[expect]}, 40;",
                both,
                f"{complete} {of[complete]}, 16;",
                f"{complete} {of[complete]}, 24;",
            )
            assert phases(steps, WAITS[:1]) == [[0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize("name", [name for name in names("st") if name.startswith("st.async")])
def test_asynchronous_stores(name):
    count, kind = shape(name)
    size = count * BYTES[kind]
    lines = [f"ld.global.b64 %rd{8 + k}, [%rd0+{8 * k}]; cvt.u32.u64 %r{8 + k}, %rd{8 + k};" for k in range(4)]
    registers = [f"%rd{8 + k}" if BYTES[kind] == 8 else f"%r{8 + k}" for k in range(count)]
    lines += [
        "mbarrier.init.shared::cta.b64 [%rd2], 1; mapa.shared::cluster.u64 %rd5, %rd2, 0;",
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%rd2], {size};",
        f"{name} [%rd5+16], {braces(registers)}, [%rd5];",
        "again: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%rd2], 0; @!%p1 bra again;",
        *(f"ld.shared.b32 %r20, [%rd2+{16 + k}]; st.global.b32 [%rd1+{k}], %r20;" for k in range(0, size, 4)),
        "mbarrier.inval.shared.b64 [%rd2]; mbarrier.init.shared.b64 [%rd2], 1; mbarrier.inval.shared::cta.b64 [%rd2];",
    ]
    (result,) = execute(["\n".join(lines)], PATTERN, 2)
    words = PATTERN.view(np.uint64)
    assert result.tobytes()[:size] == b"".join(int(w).to_bytes(8, "little")[: BYTES[kind]] for w in words[:count])


MISUSES = {  # what a kernel does with an mbarrier for two arrivals -> what is found
    f"{PLAIN}, [%rd2+16];": "^(mbarrier: there is none|uninitialised)",
    f"{PLAIN}, [%rd2], 3;": "^mbarrier: 3 arrivals where 2 are missing",
    f"{PLAIN}, [%rd2+4];": "^misaligned",
    "mbarrier.init.shared.b64 [%rd2], 2;": "^mbarrier: initialised twice",
    "mbarrier.init.shared.b64 [%rd2+8], 0;": "^mbarrier: initialised for 0 arrivals",
    f"mbarrier.inval.shared.b64 [%rd2]; {PLAIN}, [%rd2];": "^mbarrier: there is none",
    "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%rd2], 1048576;": "^mbarrier: 1048576 bytes under way",
    "again: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%rd2], 0; @!%p1 bra again;": "^livelock",
    "mapa.shared::cluster.u64 %rd5, %rd2, 0; mov.b32 %r8, 7;\n"
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%rd5+16], %r8, [%rd5]; ld.shared.b32 %r9, [%rd2+16];":
        "^(uninitialised|race)",
}  # fmt: skip


@pytest.mark.parametrize("statement", MISUSES)
def test_an_mbarrier_that_is_misused(statement):
    ptx = HEAD + VARIABLES + entry("k", f"mbarrier.init.shared.b64 [%rd2], 2;\n{statement}")
    emu = emulator.Emulator(arch=90)
    with pytest.raises(emulator.KernelError, match=MISUSES[statement]):
        emu.load_ptx(ptx, "k")((1,), (1,), (emu.array(PATTERN, "in"), emu.zeros(1, np.uint64, "out")))


def test_a_state_of_an_mbarrier_is_refused():
    with pytest.raises(Refused, match="wait for a parity"):
        translate(HEAD + VARIABLES + entry("k", "mbarrier.arrive.shared::cta.b64 %rd8, [%rd2];"))


def test_every_parameter_access():
    """A local parameter is what a call's arguments are: store, then load with the form of the same type."""
    forms = [name for name in names("ld") if name.startswith("ld.param")]
    lines = [f"ld.global.b64 %rd{8 + k}, [%rd0+{8 * k}]; cvt.u32.u64 %r{8 + k}, %rd{8 + k};" for k in range(4)]
    lines.append("{ .param .align 16 .b8 passed[16];")
    for n, name in enumerate(forms):
        count, kind = shape(name)
        registers = [target(kind, k) for k in range(count)]
        got = [f"%rd{20 + k}" if "rd" in registers[k] else f"%r{20 + k}" for k in range(count)]
        lines.append(f"st{name[2:]} [passed], {braces(registers)}; {name} {braces(got)}, [passed+0];")
        for k, register in enumerate(got):
            wide = register if "rd" in register else "%rd30"
            lines.append(
                ("" if "rd" in register else f"cvt.u64.u32 %rd30, {register}; ")
                + f"st.global.b64 [%rd1+{32 * n + 8 * k}], {wide};"
            )
    lines.append("}")
    (result,) = execute(["\n".join(lines)], PATTERN, 4 * len(forms))
    words = PATTERN.view(np.uint64)
    for n, name in enumerate(forms):
        count, kind = shape(name)
        for k in range(count):
            value = (
                np.array([words[k]])
                .view(np.uint8)[: BYTES[kind]]
                .view(NUMPY["b" + kind[1:] if kind[0] == "f" else kind])
            )
            assert result[4 * n + k] == value.astype(np.int64 if kind[0] == "s" else np.uint64).view(np.uint64)[0], name


def test_lanes_meet():
    """bar.warp.sync: what one lane wrote before it, another reads after it."""
    body = (
        "mov.u32 %r0, %tid.x; xor.b32 %r1, %r0, 31; mul.wide.u32 %rd5, %r0, 4; mul.wide.u32 %rd6, %r1, 4;\n"
        "add.s64 %rd7, %rd0, %rd5; add.s64 %rd8, %rd0, %rd6; add.s64 %rd9, %rd1, %rd5; st.global.u32 [%rd7], %r0;\n"
        "bar.warp.sync -1; ld.global.u32 %r2, [%rd8]; st.global.u32 [%rd9], %r2;"
    )
    (result,) = execute([body], np.zeros(32, np.uint32), 16, threads=32)
    assert result.view(np.uint32).tolist() == list(range(31, -1, -1))


def test_a_trap_ends_the_launch():
    with pytest.raises(emulator.KernelError, match="^trap"):
        execute(["trap;"], PATTERN, 1)


def test_every_form_of_a_fence_and_a_hint_is_taken():
    """They change no value; that they order is for test_cuda_mutations.py and test_cuda_fixtures.py to show."""
    lines = [f"{name};" for name in names("fence", "membar", "griddepcontrol")]
    lines += [f"{name} [%rd0];" for name in names("prefetch", "prefetchu")]
    lines += ["discard.global.L2 [%rd0], 128;", "nanosleep.u32 20;", "st.global.b64 [%rd1], 7;"]
    assert execute(["\n".join(lines)], PATTERN, 1)[0][0] == 7


def test_addresses_of_spaces():
    cases = {
        "cvta.shared.u64 %rd8, %rd2; ld.b64 %rd9, [%rd8];": 5,
        "cvta.shared.u64 %rd8, %rd2; cvta.to.shared.u64 %rd8, %rd8; ld.shared.b64 %rd9, [%rd8];": 5,
        "cvta.local.u64 %rd8, %rd3; ld.b64 %rd9, [%rd8];": 6,
        "cvta.local.u64 %rd8, %rd3; cvta.to.local.u64 %rd8, %rd8; ld.local.b64 %rd9, [%rd8];": 6,
        "cvta.global.u64 %rd8, %rd0; ld.b64 %rd9, [%rd8];": 7,
        "cvta.const.u64 %rd8, %rd4; cvta.to.const.u64 %rd8, %rd8; ld.const.b64 %rd9, [%rd8];": int(
            PATTERN[:8].view(np.uint64)[0]
        ),
        "cvta.shared::cta.u64 %rd8, %rd2; cvta.to.shared::cta.u64 %rd8, %rd8; ld.shared::cta.b64 %rd9, [%rd8];": 5,
        "cvta.shared::cluster.u64 %rd8, %rd2; cvta.to.shared::cluster.u64 %rd8, %rd8; ld.shared.b64 %rd9, [%rd8];": 5,
        "cvta.shared.u64 %rd8, %rd2; isspacep.shared::cta %p1, %rd8; selp.b64 %rd9, 1, 0, %p1;": 1,
        "cp.async.ca.shared.global [%rd2], [%rd0], 8; cp.async.wait_all; ld.shared.b64 %rd9, [%rd2];": 7,
        "cvta.to.global.u64 %rd8, %rd0; ld.global.b64 %rd9, [%rd8];": 7,
        "mapa.shared::cluster.u64 %rd8, %rd2, 0; ld.shared::cluster.b64 %rd9, [%rd8];": 5,
        "cvt.u32.u64 %r8, %rd2; mapa.shared::cluster.u32 %r9, %r8, 0; ld.shared::cluster.b64 %rd9, [%r9];": 5,
        "bra.uni there; trap; there: mov.b64 %rd9, 3;": 3,
        "cvta.shared.u64 %rd8, %rd2; mapa.u64 %rd8, %rd8, 0; ld.b64 %rd9, [%rd8];": 5,
    }
    fill = "mov.b64 %rd10, 5; st.shared.b64 [%rd2], %rd10; mov.b64 %rd10, 6; st.local.b64 [%rd3], %rd10;\n"
    bodies = [fill + statement + " st.global.b64 [%rd1], %rd9;" for statement in cases]
    for expected, result in zip(cases.values(), execute(bodies, np.array([7], np.uint64), 1), strict=True):
        assert result[0] == expected
    spaces = {"shared": "cvta.shared.u64 %rd8, %rd2;", "local": "mov.b64 %rd8, %rd3;", "global": "mov.b64 %rd8, %rd0;"}
    for space, statement in spaces.items():
        for asked in spaces:
            body = f"{statement} isspacep.{asked} %p1, %rd8; selp.b64 %rd9, 1, 0, %p1; st.global.b64 [%rd1], %rd9;"
            assert execute([body], PATTERN, 1)[0][0] == (asked == space), (space, asked)


def test_asynchronous_copies_fill_with_zeros_and_wait_for_groups():
    for name in names("cp"):
        if name in ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all"):
            continue
        for used in (16, 8, 0):
            body = (
                f"{name} [%rd2], [%rd0], 16, {used}; cp.async.commit_group; cp.async.wait_group 0;\n"
                "ld.shared.v2.b64 {%rd8, %rd9}, [%rd2]; st.global.v2.b64 [%rd1], {%rd8, %rd9};"
            )
            expected = PATTERN[:used].tobytes().ljust(16, b"\0")
            assert execute([body], PATTERN, 2)[0].tobytes() == expected, (name, used)


@pytest.mark.parametrize("name", ["tcgen05.mma", "add.foo.u32", "bfind.shiftamt.u16", "shfl.idx.b32", "activemask.b32"])
def test_what_is_not_on_the_list_is_refused_by_name(name):
    with pytest.raises(Refused, match=re.escape(name)):
        translate(
            HEAD
            + entry("k", f"{name} %r1, %r2, %r3;")
            .replace("mov.u64 %rd2, shared_memory;", "")
            .replace("mov.u64 %rd4, fixed;", "")
        )


WHOLE = """
import sys
import pytest
from cuda_on_cpu.translate import FORMS, USED

status = pytest.main(["-q", *sys.argv[1:]])
left = sorted(FORMS.keys() - USED)
sys.exit(status or (f"not translated by any test: {left}" if left else 0))
"""


@pytest.mark.slow
def test_no_form_was_left_out():
    """What this file, test_cuda_arithmetic.py and the samples translate, in one process, is the whole whitelist."""
    files = [str(Path(__file__).with_name("test_cuda_arithmetic.py")), __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([sys.executable, "-c", WHOLE, *files], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-3000:]
