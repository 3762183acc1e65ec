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
    for kind, tests in (*((kind, INTEGER_TESTS) for kind in INTEGERS), ("f32", FLOAT_TESTS), ("f64", FLOAT_TESTS)):
        for word, test in tests.items():
            name = f"setp.{word}.{kind}"
            if name not in FORMS:  # lo and its kind are for unsigned numbers
                assert kind[0] == "s" and word in ("lo", "ls", "hi", "hs")
                continue
            operands = [
                (kind, numbers(kind, 0)),
                (kind, np.where(np.arange(COUNT) % 4, numbers(kind, 1), numbers(kind, 0))),
            ]
            cases.append((name, "pred", operands, ()))
            references.append(test)
            if word in ("eq", "lt", "ge"):
                given = ("pred", np.arange(COUNT) % 2 == 0)
                for join in ("and", "or", "xor"):
                    cases.append((f"setp.{word}.{join}.{kind}", "pred", [*operands, given], ()))
                    combine = getattr(np, f"logical_{join}")
                    references.append(lambda a, b, c, test=test, combine=combine: combine(test(a, b), c))
    compare(cases, references)


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


def test_halves():
    def once(function):
        return lambda *arrays: function(*(a.astype(np.float64) for a in arrays)).astype(np.float16)

    operations = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
    cases = [(f"{name}.f16", "f16", [("f16", numbers("f16", k)) for k in range(2)], ()) for name in operations]
    references = [once(function) for function in operations.values()]
    cases.append(("fma.rn.f16", "f16", [("f16", numbers("f16", k)) for k in range(3)], ()))
    references.append(once(lambda a, b, c: a * b + c))
    for name, function in (("min", least), ("max", lambda a, b: -least(-a, -b))):
        cases.append((f"{name}.f16", "f16", [("f16", numbers("f16", k)) for k in range(2)], ()))
        references.append(function)
    compare(cases, references)
