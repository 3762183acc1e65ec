"""Arithmetic instructions of the translator's whitelist against NumPy and exact fractions, on numbers at the edges."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from cuda_on_cpu import emulator
from cuda_on_cpu.translate import BYTES, COMPARE, COMPARE_FLOAT, FORMS

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
NUMPY = {f"{kind}{n}": np.dtype(f"{'i' if kind == 's' else 'u'}{n // 8}") for kind in "bus" for n in (8, 16, 32, 64)}
NUMPY |= {"f32": np.dtype("f4"), "f64": np.dtype("f8"), "f16": np.dtype("f2")}
COUNT = 96
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def numbers(kind, seed):
    """COUNT numbers of a type: every edge beside every other, then random bits."""
    rng = np.random.default_rng([seed, BYTES[kind]])
    dtype = NUMPY[kind]
    if dtype.kind == "f":
        info = np.finfo(dtype)
        edges = [
            0.0,
            -0.0,
            1,
            -1,
            1.5,
            2.5,
            -2.5,
            np.nan,
            np.inf,
            -np.inf,
            info.max,
            info.tiny,
            info.smallest_subnormal,
        ]
        random = rng.normal(size=COUNT) * 10.0 ** rng.integers(-3, 4, COUNT)
    else:
        info = np.iinfo(dtype)
        edges = [0, 1, 2, 3, 31, 32, 64, info.max, info.min, info.max - 1, info.max // 2]
        random = rng.integers(info.min, info.max, COUNT, dtype, endpoint=True)
    values = np.array(random).astype(dtype)
    edges = np.array(edges, dtype) if dtype.kind == "f" else wrapped(edges, kind)
    return np.concatenate([rng.permutation(edges), rng.permutation(edges), values])[:COUNT]


def bits(kind):
    return 8 * max(2, BYTES[kind]) if kind != "pred" else 1


def run(cases):
    """cases: (name, type of d, operands (type, values), tail of the statement) -> list of results; one module."""
    text, emu = HEAD, emulator.Emulator(checked=False)
    for number, (name, to, operands, tail) in enumerate(cases):
        lines = [".reg .pred %p<6>; .reg .b16 %w16_<6>; .reg .b32 %w32_<6>; .reg .b64 %w64_<6>; .reg .b64 %a<8>;"]
        lines.append(
            ".reg .b32 %lane; .reg .b64 %long; .reg .b64 %at; mov.u32 %lane, %tid.x; cvt.u64.u32 %long, %lane;"
        )
        registers = []
        for k, (kind, _) in enumerate(operands):
            size, register = BYTES[kind], f"%w{bits(kind)}_{k + 1}"
            lines.append(f"ld.param.u64 %a{k}, [p{k}]; mad.lo.u64 %at, %long, {size}, %a{k};")
            lines.append(f"ld.global.b{8 * size} {register}, [%at];" if kind != "pred" else "")
            if kind == "pred":
                lines.append(f"ld.global.u8 %w16_{k + 1}, [%at]; setp.ne.u16 %p{k + 1}, %w16_{k + 1}, 0;")
                register = f"%p{k + 1}"
            registers.append(register)
        target = "%p0" if to == "pred" else f"%w{bits(to)}_0"
        lines.append(f"{name} {', '.join([target, *registers, *tail])};")
        size = BYTES[to]
        lines.append(f"ld.param.u64 %a7, [out]; mad.lo.u64 %at, %long, {size}, %a7;")
        if to == "pred":
            lines.append("selp.u16 %w16_0, 1, 0, %p0; st.global.u8 [%at], %w16_0;")
        else:
            lines.append(f"st.global.b{8 * size} [%at], {target};")
        params = ", ".join([f".param .u64 p{k}" for k in range(len(operands))] + [".param .u64 out"])
        text += f".visible .entry k{number}({params})\n{{\n" + "\n".join(lines) + "\nret;\n}\n"
    results = []
    for number, (_, to, operands, _) in enumerate(cases):
        out = emu.empty(COUNT, NUMPY["u8" if to == "pred" else to], "out")
        emu.load_ptx(text, f"k{number}")((1,), (COUNT,), (*(emu.array(v) for _, v in operands), out))
        results.append(out.astype(bool) if to == "pred" else out.copy())
    return results


def compare(cases, references):
    for (name, _, operands, _), got, reference in zip(cases, run(cases), references, strict=True):
        assert name in FORMS
        with np.errstate(all="ignore"):
            expected = np.asarray(reference(*(values for _, values in operands))).astype(got.dtype)
        np.testing.assert_array_equal(got, expected, err_msg=name)  # NaN equals NaN
        if got.dtype.kind == "f":
            number = ~np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(expected[number]), err_msg=name)


def exact(function):
    """The function of Python integers, element by element."""
    return lambda *arrays: np.array([function(*map(int, items)) for items in zip(*arrays, strict=True)], object)


def wrapped(values, kind):
    width = 8 * BYTES[kind]
    return np.array([int(v) & (1 << width) - 1 for v in values], np.dtype(f"u{BYTES[kind]}")).view(NUMPY[kind])


def truncating(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def test_integers():
    def shift_right(a, b):
        return a >> min(b, 200)

    operations = {
        "add.{}": lambda a, b: a + b,
        "sub.{}": lambda a, b: a - b,
        "mul.lo.{}": lambda a, b: a * b,
        "min.{}": min,
        "max.{}": max,
        "div.{}": lambda a, b: truncating(a, b) if b else -1,
        "rem.{}": lambda a, b: a - b * truncating(a, b) if b else a,
    }
    cases, references = [], []

    def enter(name, to, operands, function, tail=()):
        cases.append((name, to, [(kind, numbers(kind, k)) for k, kind in enumerate(operands)], tail))
        references.append(lambda *arrays: wrapped(exact(function)(*arrays), to))

    for kind in INTEGERS:
        for pattern, function in operations.items():
            enter(pattern.format(kind), kind, [kind, kind], function)
        enter(f"mad.lo.{kind}", kind, [kind] * 3, lambda a, b, c: a * b + c)
        width = 8 * BYTES[kind]
        if width > 16:
            enter(f"mul.hi.{kind}", kind, [kind] * 2, lambda a, b, width=width: a * b >> width)
            enter(f"mad.hi.{kind}", kind, [kind] * 3, lambda a, b, c, width=width: (a * b >> width) + c)
        if kind in WIDE:
            enter(f"mul.wide.{kind}", WIDE[kind], [kind] * 2, lambda a, b: a * b)
            enter(f"mad.wide.{kind}", WIDE[kind], [kind, kind, WIDE[kind]], lambda a, b, c: a * b + c)
        if kind[0] == "s":
            enter(f"abs.{kind}", kind, [kind], abs)
            enter(f"neg.{kind}", kind, [kind], lambda a: -a)
        enter(f"shr.{kind}", kind, [kind, "u32"], shift_right)
        if width > 16:
            enter(f"bfind.{kind}", "u32", [kind], lambda a: (a if a >= 0 else ~a).bit_length() - 1)
            enter(
                f"bfind.shiftamt.{kind}",
                "u32",
                [kind],
                lambda a, width=width: width - (a if a >= 0 else ~a).bit_length() if a not in (0, -1) else -1,
            )
    for kind in ("b16", "b32", "b64"):
        width = 8 * BYTES[kind]
        enter(f"and.{kind}", kind, [kind] * 2, lambda a, b: a & b)
        enter(f"or.{kind}", kind, [kind] * 2, lambda a, b: a | b)
        enter(f"xor.{kind}", kind, [kind] * 2, lambda a, b: a ^ b)
        enter(f"not.{kind}", kind, [kind], lambda a: ~a)
        enter(f"cnot.{kind}", kind, [kind], lambda a: a == 0)
        enter(f"shl.{kind}", kind, [kind, "u32"], lambda a, b: a << min(b, 64))
        enter(f"shr.{kind}", kind, [kind, "u32"], shift_right)
        if width > 16:
            enter(f"brev.{kind}", kind, [kind], lambda a, width=width: int(f"{a:0{width}b}"[::-1], 2))
            enter(f"clz.{kind}", "u32", [kind], lambda a, width=width: width - a.bit_length())
            enter(f"popc.{kind}", "u32", [kind], lambda a: bin(a).count("1"))
    enter("shf.l.wrap.b32", "b32", ["b32"] * 3, lambda a, b, c: (b << 32 | a) << (c & 31) >> 32)
    enter("shf.r.wrap.b32", "b32", ["b32"] * 3, lambda a, b, c: (b << 32 | a) >> (c & 31))
    enter("shf.l.clamp.b32", "b32", ["b32"] * 3, lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32)
    enter("shf.r.clamp.b32", "b32", ["b32"] * 3, lambda a, b, c: (b << 32 | a) >> min(c, 32))
    for kind in ("u32", "s32"):
        enter(f"sad.{kind}", kind, [kind] * 3, lambda a, b, c: c + abs(a - b))
    for table in (0x96, 0xE8, 0x1D):
        enter("lop3.b32", "b32", ["b32"] * 3, lambda a, b, c, table=table: lop3(a, b, c, table), (str(table),))
    enter("prmt.b32", "b32", ["b32"] * 3, permute)
    compare(cases, references)


def lop3(a, b, c, table):
    return sum((table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | (c >> k & 1)) & 1) << k for k in range(32))


def permute(a, b, selector):
    source = (b << 32 | a).to_bytes(8, "little")
    picked = [selector >> 4 * k & 15 for k in range(4)]
    return int.from_bytes(
        bytes((0xFF if source[p & 7] >> 7 else 0) if p & 8 else source[p & 7] for p in picked), "little"
    )


def flush(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def directed(function, dtype, rounding):
    """The exact result of finite numbers, rounded towards zero, down or up; IEEE's for the others."""

    def one(*values):
        with np.errstate(all="ignore"):
            plain = function(*values)
        if not np.isfinite([float(v) for v in values]).all() or not np.isfinite(plain) and np.isnan(plain):
            return plain
        try:
            true = function(*(Fraction(float(v)) for v in values))
        except ZeroDivisionError:
            return plain
        near = plain
        if np.isinf(near):
            near = np.copysign(np.finfo(dtype).max, near)
            toward_zero = {"rz": True, "rm": plain > 0, "rp": plain < 0}[rounding]
            return near if toward_zero else plain
        error = Fraction(float(near)) - true
        down = rounding == "rm" or rounding == "rz" and true > 0
        if true == 0:
            signed_zero = all(v == 0 for v in values[-1:]) or near != 0
            return plain if rounding != "rm" or signed_zero else dtype.type(-0.0)
        if down and error > 0:
            return np.nextafter(near, dtype.type(-np.inf))
        if not down and error < 0:
            return np.nextafter(near, dtype.type(np.inf))
        return near

    return lambda *arrays: np.array([one(*items) for items in zip(*arrays, strict=True)], dtype)


def test_floats():
    operations = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
    }
    unary = {"abs": np.abs, "neg": np.negative}
    cases, references = [], []

    def enter(name, kind, operands, function):
        cases.append((name, kind, [(k, numbers(k, n)) for n, k in enumerate(operands)], ()))
        if ".ftz" in name:
            references.append(lambda *arrays: flush(function(*map(flush, arrays)).astype(np.float32)))
        else:
            references.append(function)

    for kind, ftz in (("f32", ""), ("f32", ".ftz"), ("f64", "")):
        for name, function in operations.items():
            enter(f"{name}{ftz}.{kind}", kind, [kind] * 2, function)
            enter(f"{name}.rn{ftz}.{kind}", kind, [kind] * 2, function)
        enter(f"div.rn{ftz}.{kind}", kind, [kind] * 2, lambda a, b: a / b)
        enter(f"sqrt.rn{ftz}.{kind}", kind, [kind], np.sqrt)
        enter(f"rcp.rn{ftz}.{kind}", kind, [kind], lambda a: 1 / a)
        for name, function in unary.items():
            enter(f"{name}{ftz}.{kind}", kind, [kind], function)
        enter(f"min{ftz}.{kind}", kind, [kind] * 2, least)
        enter(f"max{ftz}.{kind}", kind, [kind] * 2, lambda a, b: -least(-a, -b))
        if not ftz:
            enter(f"copysign.{kind}", kind, [kind] * 2, lambda a, b: np.copysign(b, a))
    enter(
        "add.sat.f32",
        "f32",
        ["f32"] * 2,
        lambda a, b: np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1) + np.float32(0)),
    )
    compare(cases, references)


def least(a, b):
    smaller = np.where((a == b) & np.signbit(a), a, np.where((a == b), b, np.fmin(a, b)))
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, smaller))


def test_directed_rounding():
    operations = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
    operations["div"] = lambda a, b: a / b
    cases, references = [], []
    for kind, rounding, (name, function) in itertools.product(("f32", "f64"), ("rz", "rm", "rp"), operations.items()):
        operands = [(kind, ordinary(kind, k)) for k in range(2)]
        cases.append((f"{name}.{rounding}.{kind}", kind, operands, ()))
        references.append(directed(function, NUMPY[kind], rounding))
    compare(cases, references)


def ordinary(kind, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=COUNT) * 2.0 ** rng.integers(-20, 20, COUNT)).astype(NUMPY[kind])


def test_fused_multiply_add_rounds_once():
    cases, references = [], []
    for kind, rounding in itertools.product(("f32", "f64"), ("rn", "rz", "rm", "rp")):
        dtype = NUMPY[kind]
        a, b = ordinary(kind, 1), ordinary(kind, 2)
        c = (-a.astype(np.float64) * b * (1 + ordinary("f64", 3) * 2.0**-40)).astype(dtype)  # cancels
        cases.append((f"fma.{rounding}.{kind}", kind, [(kind, a), (kind, b), (kind, c)], ()))

        def reference(a, b, c, dtype=dtype, rounding=rounding):
            true = [
                Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)
            ]
            return np.array([nearest(value, dtype, rounding) for value in true], dtype)

        references.append(reference)
    compare(cases, references)


def nearest(value, dtype, rounding):
    """A fraction rounded to a float type."""
    near = dtype.type(float(value)) if dtype == np.float64 else dtype.type(np.float64(float(value)))
    candidates = [np.nextafter(near, dtype.type(-np.inf)), near, np.nextafter(near, dtype.type(np.inf))]
    gaps = [Fraction(float(x)) - value for x in candidates]
    if rounding == "rn":
        best = min(range(3), key=lambda k: (abs(gaps[k]), int(candidates[k].view(f"u{dtype.itemsize}")) & 1))
        return candidates[best]
    down = rounding == "rm" or rounding == "rz" and value > 0
    allowed = [x for x, gap in zip(candidates, gaps, strict=True) if (gap <= 0 if down else gap >= 0)]
    return max(allowed) if down else min(allowed)


FLOAT_TESTS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
INTEGER_TESTS = FLOAT_TESTS | {"lo": FLOAT_TESTS["lt"], "ls": FLOAT_TESTS["le"]}
INTEGER_TESTS |= {"hi": FLOAT_TESTS["gt"], "hs": FLOAT_TESTS["ge"]}
FLOAT_TESTS |= {
    f"{name}u": lambda a, b, test=test: test(a, b) | np.isnan(a) | np.isnan(b) for name, test in FLOAT_TESTS.items()
}
FLOAT_TESTS |= {"num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b)}


def test_comparisons():
    assert FLOAT_TESTS.keys() == COMPARE_FLOAT.keys() and INTEGER_TESTS.keys() == COMPARE.keys()
    cases, references = [], []
    for name in (name for name in FORMS if name.startswith("setp.")):
        _, word, *joined, kind = name.split(".")
        test = (FLOAT_TESTS if "f" in kind else INTEGER_TESTS)[word]
        first, second = (numbers(kind if kind != "bf16" else "b16", k) for k in (0, 1))
        operands = [(kind, first), (kind, np.where(np.arange(COUNT) % 4, second, first))]
        given = [("pred", np.arange(COUNT) % 2 == 0)] if set(joined) & {"and", "or", "xor"} else []
        cases.append((name, "pred", [*operands, *given], ()))

        def reference(a, b, c=None, test=test, joined=joined, kind=kind):
            if kind == "bf16":
                a, b = from_bf16(a), from_bf16(b)
            if "ftz" in joined:
                a, b = flush(a), flush(b)
            return test(a, b) if c is None else getattr(np, f"logical_{(set(joined) - {'ftz'}).pop()}")(test(a, b), c)

        references.append(reference)
    for k in range(0, len(cases), 100):
        compare(cases[k : k + 100], references[k : k + 100])


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x):
    """The nearest bfloat16's bits, ties to even, of float64 numbers that float32 holds or nearly."""
    bits = np.asarray(x, np.float64).astype(np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def test_integer_conversions():
    kinds = [f"{sign}{width}" for width in (8, 16, 32, 64) for sign in "us"]
    cases, references = [], []
    for to, kind in itertools.product(kinds, kinds):
        for sat in ("", ".sat"):
            cases.append((f"cvt{sat}.{to}.{kind}", to, [(kind, numbers(kind, 0))], ()))
            info = np.iinfo(NUMPY[to])
            if sat:
                references.append(exact(lambda a, info=info: min(max(a, int(info.min)), int(info.max))))
            else:
                references.append(lambda a, to=to: wrapped(a, to))
    compare(cases, references)


def test_conversions_between_floats_and_integers():
    round_to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    cases, references = [], []
    for (mode, rounded), kind in itertools.product(round_to.items(), ("f32", "f64")):
        for to in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
            info = np.iinfo(NUMPY[to])

            def reference(a, rounded=rounded, info=info):
                return np.array(
                    [
                        0 if np.isnan(x) else int(info.max) if x >= info.max else max(int(info.min), int(max(x, -1e30)))
                        for x in rounded(a.astype(np.float64))
                    ],
                    object,
                )

            cases.append((f"cvt.{mode}.{to}.{kind}", to, [(kind, numbers(kind, 0))], ()))
            references.append(reference)
        cases.append((f"cvt.{mode}.{kind}.{kind}", kind, [(kind, numbers(kind, 0))], ()))
        references.append(rounded)
    for to, kind in itertools.product(("f32", "f64"), ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")):
        cases.append((f"cvt.rn.{to}.{kind}", to, [(kind, numbers(kind, 0))], ()))
        references.append(lambda a, to=to: a.astype(NUMPY[to]))
    cases += [
        ("cvt.f64.f32", "f64", [("f32", numbers("f32", 0))], ()),
        ("cvt.rn.f32.f64", "f32", [("f64", numbers("f64", 0))], ()),
    ]
    references += [lambda a: a.astype(np.float64), lambda a: a.astype(np.float32)]
    for to, kind in (("f16", "f32"), ("f32", "f16"), ("f16", "f64"), ("f64", "f16")):
        name = f"cvt.{to}.{kind}" if kind == "f16" else f"cvt.rn.{to}.{kind}"
        cases.append((name, to, [(kind, numbers(kind, 0))], ()))
        references.append(lambda a, to=to: a.astype(NUMPY[to]))
    compare(cases, references)


HALF_OPERATIONS = {
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "add.rn": (2, lambda a, b: a + b),
    "sub.rn": (2, lambda a, b: a - b),
    "mul.rn": (2, lambda a, b: a * b),
    "fma.rn": (3, lambda a, b, c: a * b + c),
    "fma.rn.relu": (3, lambda a, b, c: np.where(a * b + c <= 0, 0.0, a * b + c)),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f16x2", "bf16x2"])
def test_halves(kind):
    """Small numbers, so that float64 holds every intermediate result and one rounding is left."""
    brain, pairs = kind.startswith("bf16"), kind.endswith("x2")
    rng = np.random.default_rng(5)
    values = [np.concatenate([[0, -0.0, np.inf, -np.inf, 1, -1], rng.normal(size=2 * COUNT - 6)]) for _ in range(3)]
    stored = [to_bf16(v) if brain else v.astype(np.float16).view(np.uint16) for v in values]

    def read(bits):
        return (from_bf16(bits) if brain else bits.view(np.float16)).astype(np.float64)

    def store(x):
        return to_bf16(x) if brain else x.astype(np.float16).view(np.uint16)

    def numbered(bits):
        return np.where(np.isnan(read(bits)), 0x7FFF, bits)  # one NaN for all

    operations = HALF_OPERATIONS | {"min": (2, least), "max": (2, lambda a, b: -least(-a, -b))}
    cases = []
    for name, (count, _) in operations.items():
        given = [bits.view(np.uint32) if pairs else bits[:COUNT] for bits in stored[:count]]
        cases.append(
            (f"{name}.{kind}", "b32" if pairs else "b16", [(("b32" if pairs else "b16"), g) for g in given], ())
        )
    for (name, (count, function)), got in zip(operations.items(), run(cases), strict=True):
        with np.errstate(all="ignore"):
            expected = store(function(*map(read, stored[:count])))
        got = got.view(np.uint16)
        np.testing.assert_array_equal(numbered(got), numbered(expected[: len(got)]), err_msg=f"{name}.{kind}")


def test_conversions_to_halves():
    x, y = ordinary("f32", 1), ordinary("f32", 2)
    x, y = np.clip(x, -6e4, 6e4), np.clip(y, -6e4, 6e4)

    def store(v, kind, rounding):
        if kind == "f16":
            near = v.astype(np.float16)
            over = np.abs(near.astype(np.float64)) > np.abs(v)
            return np.where(over & (rounding == "rz"), np.nextafter(near, np.float16(0)), near).view(np.uint16)
        return (v.view(np.uint32) >> 16).astype(np.uint16) if rounding == "rz" else to_bf16(v)

    for kind, rounding in itertools.product(("f16", "bf16"), ("rn", "rz")):
        single, pair = run(
            [
                (f"cvt.{rounding}.{kind}.f32", "b16", [("f32", x)], ()),
                (f"cvt.{rounding}.{kind}x2.f32", "b32", [("f32", x), ("f32", y)], ()),
            ]
        )
        low, high = store(y, kind, rounding), store(x, kind, rounding)
        np.testing.assert_array_equal(single, high, err_msg=f"{kind} {rounding}")
        np.testing.assert_array_equal(pair, low.astype(np.uint32) | high.astype(np.uint32) << 16)
    bits = to_bf16(x)
    cases = [("cvt.f32.bf16", "f32", [("b16", bits)], ()), ("cvt.f64.bf16", "f64", [("b16", bits)], ())]
    cases.append(("cvt.ftz.f32.bf16", "f32", [("b16", bits)], ()))
    for got in run(cases):
        np.testing.assert_array_equal(got, from_bf16(bits))
    for name, half in (("cvt.rna.tf32.f32", True), ("cvt.rn.tf32.f32", False)):
        (got,) = run([(name, "b32", [("f32", x)], ())])
        pattern = x.view(np.uint32).astype(np.uint64)
        tie = pattern & 0x1FFF == 0x1000
        up = (pattern & 0x1FFF) >= 0x1000 if half else ((pattern & 0x1FFF) > 0x1000) | tie & (pattern >> 13 & 1 == 1)
        np.testing.assert_array_equal(got, ((pattern >> 13) + up << 13).astype(np.uint32))


def test_directed_conversions():
    cases, references = [], []
    for rounding, to, kind in itertools.product(("rz", "rm", "rp"), ("f32", "f64"), ("u8", "s8", *INTEGERS)):
        cases.append((f"cvt.{rounding}.{to}.{kind}", to, [(kind, numbers(kind, 0))], ()))
        references.append(
            lambda a, to=to, rounding=rounding: [
                nearest(Fraction(int(x)), NUMPY[to], rounding) if x else 0.0 for x in a
            ]
        )
    for rounding in ("rz", "rm", "rp"):
        x = ordinary("f64", 3)
        for ftz in ("", ".ftz"):
            cases.append((f"cvt.{rounding}{ftz}.f32.f64", "f32", [("f64", x)], ()))
            references.append(
                lambda a, rounding=rounding: [nearest(Fraction(float(v)), NUMPY["f32"], rounding) for v in a]
            )
    for kind in ("u8", "s8", *INTEGERS):
        small = numbers(kind, 0) % 100
        cases.append((f"cvt.rn.f16.{kind}", "f16", [(kind, small)], ()))
        references.append(lambda a: a.astype(np.float16))
    compare(cases, references)


def test_directed_roots_and_reciprocals():
    cases, references = [], []
    for kind, rounding, ftz in itertools.product(("f32", "f64"), ("rz", "rm", "rp"), ("", ".ftz")):
        if kind == "f64" and ftz:
            continue
        dtype, x = NUMPY[kind], np.abs(ordinary(kind, 4))
        cases.append((f"rcp.{rounding}{ftz}.{kind}", kind, [(kind, x)], ()))
        references.append(lambda a, d=dtype, r=rounding: [nearest(1 / Fraction(float(v)), d, r) for v in a])

        def root(a, dtype=dtype, rounding=rounding):
            result = []
            for v in a:
                near, square = np.sqrt(v), Fraction(float(v))
                below = near if Fraction(float(near)) ** 2 <= square else np.nextafter(near, dtype.type(0))
                exact_root = Fraction(float(below)) ** 2 == square
                result.append(below if rounding != "rp" or exact_root else np.nextafter(below, dtype.type(np.inf)))
            return result

        cases.append((f"sqrt.{rounding}{ftz}.{kind}", kind, [(kind, x)], ()))
        references.append(root)
    operations = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
    operations["div"] = lambda a, b: a / b
    for rounding, (name, function) in itertools.product(("rz", "rm", "rp"), operations.items()):
        operands = [("f32", ordinary("f32", k)) for k in range(2)]
        cases.append((f"{name}.{rounding}.ftz.f32", "f32", operands, ()))
        references.append(directed(function, NUMPY["f32"], rounding))
    compare(cases, references)


def test_approximations():
    """The exact function, rounded: a GPU differs in the last places."""
    functions = {
        "rcp": lambda x: 1 / x,
        "sqrt": np.sqrt,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }
    x = np.random.default_rng(0).uniform(0.1, 9, COUNT)
    for name in (name for name in FORMS if ".approx" in name or ".full" in name):
        op, kind = name.split(".")[0], name.rsplit(".", 1)[1]
        given = x.astype(NUMPY[kind])
        if op == "div":
            (got,) = run([(name, kind, [(kind, given), (kind, given[::-1].copy())], ())])
            expected = given.astype(np.float64) / given[::-1]
        else:
            (got,) = run([(name, kind, [(kind, given)], ())])
            expected = functions[op](given.astype(np.float64))
        np.testing.assert_allclose(got, expected, rtol=2 * np.finfo(NUMPY[kind]).eps, atol=1e-30, err_msg=name)


def test_classes_of_numbers():
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
    }
    cases = [
        (f"testp.{name}.{kind}", "pred", [(kind, numbers(kind, 0))], ()) for name in tests for kind in ("f32", "f64")
    ]
    compare(cases, [tests[name.split(".")[1]] for name, *_ in cases])


def test_bit_fields():
    cases, references = [], []

    def extract(a, position, length, width, signed):
        a &= (1 << width) - 1
        field = a >> position & (1 << length) - 1
        last = min(position + length - 1, width - 1)
        if signed and length and a >> last & 1:
            field |= -1 << max(0, min(length, width - position))
        return field

    rng = np.random.default_rng(0)
    position, length = (rng.integers(0, 256, COUNT) % 80 for _ in range(2))
    where = [("u32", position.astype(np.uint32)), ("u32", length.astype(np.uint32))]
    for kind in ("u32", "s32", "u64", "s64"):
        width, signed = 8 * BYTES[kind], kind[0] == "s"
        cases.append((f"bfe.{kind}", kind, [(kind, numbers(kind, 0)), *where], ()))
        references.append(
            lambda a, p, n, k=kind, w=width, s=signed: wrapped(exact(lambda *v: extract(*v, w, s))(a, p, n), k)
        )
    for kind in ("b32", "b64"):
        width = 8 * BYTES[kind]

        def insert(a, b, p, n, width=width):
            mask = ((1 << n) - 1) << p & (1 << width) - 1
            return b & ~mask | a << p & mask

        cases.append((f"bfi.{kind}", kind, [(kind, numbers(kind, 0)), (kind, numbers(kind, 1)), *where], ()))
        references.append(lambda a, b, p, n, k=kind, f=insert: wrapped(exact(f)(a, b, p, n), k))
    compare(cases, references)


def test_flushing_and_saturating():
    round_to = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    cases, references = [], []

    def whole(a, to, rounded):
        info = np.iinfo(NUMPY[to])
        values = rounded(a.astype(np.float64))
        return np.array(
            [
                0 if np.isnan(x) else int(info.max) if x >= info.max else max(int(info.min), int(max(x, -1e30)))
                for x in values
            ],
            object,
        )

    for mode, rounded in round_to.items():
        for to in ("u8", "s8", *INTEGERS):
            cases.append((f"cvt.{mode}.ftz.{to}.f32", to, [("f32", numbers("f32", 0))], ()))
            references.append(lambda a, to=to, rounded=rounded: whole(flush(a), to, rounded))
            cases.append((f"cvt.{mode}.{to}.f16", to, [("f16", numbers("f16", 0))], ()))
            references.append(lambda a, to=to, rounded=rounded: whole(a, to, rounded))
        cases.append((f"cvt.{mode}.ftz.f32.f32", "f32", [("f32", numbers("f32", 0))], ()))
        references.append(lambda a, rounded=rounded: rounded(flush(a)))
        cases.append((f"cvt.{mode}.f16.f16", "f16", [("f16", numbers("f16", 0))], ()))
        references.append(rounded)

    def saturated(x):
        return np.where(x > 0, np.where(x < 1, x, 1), 0).astype(np.float32)

    operations = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
    operands = [("f32", numbers("f32", k)) for k in range(2)]
    for name, function in operations.items():
        cases += [(f"{name}.sat.f32", "f32", operands, ()), (f"{name}.ftz.sat.f32", "f32", operands, ())]
        references.append(lambda a, b, f=function: saturated(f(a, b)))
        references.append(lambda a, b, f=function: flush(saturated(f(flush(a), flush(b)))))
    cases += [("cvt.sat.f32.f32", "f32", operands[:1], ()), ("cvt.ftz.sat.f32.f32", "f32", operands[:1], ())]
    references += [saturated, lambda a: flush(saturated(flush(a)))]
    cases += [
        ("cvt.ftz.f64.f32", "f64", operands[:1], ()),
        ("cvt.rn.ftz.f32.f64", "f32", [("f64", numbers("f64", 0))], ()),
    ]
    references += [lambda a: flush(a).astype(np.float64), lambda a: flush(a.astype(np.float32))]
    cases.append(("cvt.ftz.f32.f16", "f32", [("f16", numbers("f16", 0))], ()))
    references.append(lambda a: a.astype(np.float32))
    three = [("f32", ordinary("f32", k)) for k in range(3)]
    for rounding in ("rn", "rz", "rm", "rp"):
        cases.append((f"fma.{rounding}.ftz.f32", "f32", three, ()))
        references.append(
            lambda a, b, c, r=rounding: [
                nearest(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), NUMPY["f32"], r)
                for x, y, z in zip(a, b, c, strict=True)
            ]
        )
    compare(cases, references)


def test_moves_and_choices():
    cases, references = [], []
    given = ("pred", np.arange(COUNT) % 3 == 0)
    for name in FORMS:
        op, kind = name.split(".")[0], name.rsplit(".", 1)[-1]
        if op == "selp":
            cases.append((name, kind, [(kind, numbers(kind, 0)), (kind, numbers(kind, 1)), given], ()))
            references.append(lambda a, b, c: np.where(c, a, b))
        elif op == "mov" and kind != "pred":
            cases.append((name, kind, [(kind, numbers(kind, 0))], ()))
            references.append(lambda a: a)
    other = ("pred", np.arange(COUNT) % 2 == 0)
    for word in ("and", "or", "xor"):
        cases.append((f"{word}.pred", "pred", [given, other], ()))
        references.append(getattr(np, f"logical_{word}"))
    cases += [("not.pred", "pred", [given], ()), ("mov.pred", "pred", [given], ())]
    references += [np.logical_not, lambda a: a]
    compare(cases, references)
