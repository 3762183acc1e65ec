"""Every arithmetic instruction form of the emulator against its definition in the PTX ISA.

The references are exact: Python integers for integer instructions, fractions rounded once for floating point. Only the
instructions that a GPU approximates are compared within a few units in the last place.
"""

import itertools
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from cuda_on_cpu import emulator
from cuda_on_cpu.translate import FORMS, Refused, expand, translate

pytestmark = pytest.mark.emulated

OPCODES = (
    *("add", "sub", "mul", "mad", "div", "rem", "abs", "neg", "min", "max", "sad", "and", "or", "xor", "not", "cnot"),
    *("shl", "shr", "shf", "brev", "clz", "popc", "bfind", "bfe", "bfi", "prmt", "dp4a", "fma", "rcp", "sqrt", "rsqrt"),
    *("ex2", "lg2", "sin", "cos", "tanh", "copysign", "testp", "lop3", "mov", "selp", "slct", "setp", "set", "cvt"),
)

# ---- types

BITS = {f"{letter}{n}": n for letter in "busf" for n in (8, 16, 32, 64) if f"{letter}{n}" != "f8"}
BITS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "pred": 32}  # a predicate is kept as 0 or 1 in memory
FORMAT = {"f16": (11, 15), "bf16": (8, 127), "tf32": (11, 127), "f32": (24, 127), "f64": (53, 1023)}  # digits, exponent
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def scalar(kind):
    return kind.removesuffix("x2")


def decode(bits, kind):
    """Numbers of a bit pattern: Python integers, or float64; two along the last axis for a packed type."""
    if kind.endswith("x2"):
        return decode(np.stack([bits & 0xFFFF, bits >> 16], -1).astype(np.uint16), scalar(kind))
    if kind == "bf16":
        return decode(bits.astype(np.uint32) << 16, "f32")
    if kind in FORMAT:
        with np.errstate(invalid="ignore"):  # signalling NaN
            return bits.view(f"f{bits.itemsize}" if kind != "tf32" else "f4").astype(np.float64)
    if kind[0] == "s":
        width = BITS[kind]
        whole = bits.astype(object) & (1 << width) - 1
        return whole - ((whole >> width - 1) << width)
    return bits.astype(object) & (1 << BITS[kind]) - 1


def encode(values, kind):
    """Bit patterns of numbers that the type can hold."""
    if kind == "bf16":
        return (encode(values, "f32") >> 16).astype(np.uint16)
    if kind in FORMAT:
        kind = "f32" if kind == "tf32" else kind
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float64).astype(f"f{BITS[kind] // 8}").view(f"u{BITS[kind] // 8}")
    width = max(16, BITS[kind])
    return np.array([int(v) & (1 << width) - 1 for v in values], f"u{width // 8}")


# ---- exact floating-point arithmetic


def rounded(x, kind, mode="rn"):
    """The float64 that is ``x`` (a fraction, not zero) rounded to a format: nearest even, away (rna), rz, rm or rp."""
    digits, top = FORMAT[kind]
    size, negative = abs(x), x < 0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    place = max(exponent, 1 - top) - digits + 1  # of the last digit; subnormal numbers have a fixed one
    whole, rest = divmod(size / Fraction(2) ** place, 1)
    half = Fraction(1, 2)
    up = {
        "rn": rest > half or (rest == half and whole % 2 == 1),
        "rna": rest >= half,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    whole += up
    if whole * Fraction(2) ** place >= Fraction(2) ** (top + 1):
        largest = (2.0 - 2.0 ** (1 - digits)) * 2.0**top
        size = math.inf if mode in ("rn", "rna") or up else largest
    else:
        size = math.ldexp(whole, place)
    return -size if negative else size


def root(x):
    """Square root with more digits than any format has, an odd last digit where it is not exact."""
    shift = 2 * (1200 + x.denominator.bit_length())
    scaled = (x.numerator << shift) // x.denominator
    whole = math.isqrt(scaled)
    exact = whole * whole == scaled and (x.numerator << shift) % x.denominator == 0
    return Fraction(2 * whole + (not exact), 1 << shift // 2 + 1)


EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
    "div": lambda a, b: a / b,
    "rcp": lambda a: 1 / a,
    "sqrt": root,
    "cvt": lambda a: a,
}
SPECIAL = EXACT | {"div": np.divide, "rcp": np.reciprocal, "sqrt": np.sqrt}


@cache
def ieee_scalar(op, kind, mode, *operands):
    operands = list(map(float.fromhex, operands))  # hexadecimal: -0 and 0 are different keys
    negative_root = op == "sqrt" and operands[0] < 0
    by_zero = op == "rcp" and operands[0] == 0 or op == "div" and operands[1] == 0
    if not all(map(math.isfinite, operands)) or negative_root or by_zero:
        # Sizes of finite numbers do not matter here: none may overflow.
        small = [x if x == 0 or not math.isfinite(x) else math.copysign(1, x) for x in operands]
        return float(SPECIAL[op](*map(np.float64, small)))
    exact = EXACT[op](*map(Fraction, operands))
    if exact:
        return rounded(exact, kind, mode)
    sign = [math.copysign(1, x) for x in operands]
    if op in ("add", "sub", "fma"):
        terms = [sign[0] * sign[1], sign[2]] if op == "fma" else [sign[0], sign[1] * (-1 if op == "sub" else 1)]
        return terms[0] * 0.0 if terms[0] == terms[1] else -0.0 if mode == "rm" else 0.0
    return math.prod(sign) * 0.0


def ieee(op, kind, mode, *operands):
    function = np.vectorize(lambda *x: ieee_scalar(op, kind, mode, *(float(v).hex() for v in x)), otypes=[float])
    with np.errstate(all="ignore"):
        return function(*operands)


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def floating(function):
    """Reference of a float instruction: flush what .ftz flushes, apply, then .sat and .relu."""

    def reference(m, *operands):
        ftz = "ftz" in m.words
        if ftz and m.last == "f32":
            operands = [flush(x) for x in operands]
        with np.errstate(all="ignore"):
            result = np.asarray(function(m, *operands))
            if ftz and m.kinds[0] == "f32":
                result = flush(result)
            if "sat" in m.words:
                result = np.where(result > 0, np.minimum(result, 1), 0.0)  # NaN becomes 0
            if "relu" in m.words:
                result = np.where(result <= 0, 0.0, result)
        return result

    return reference


def smaller(a, b):
    """A number wins over NaN, -0 over +0."""
    zero = np.where(np.signbit(a), a, b)
    return np.where((a == 0) & (b == 0), zero, np.fmin(a, b))


def larger(a, b):
    return -smaller(-a, -b)


def or_nan(function):
    return lambda m, a, b: np.where("NaN" in m.words and (np.isnan(a) | np.isnan(b)), np.nan, function(a, b))


# ---- the instructions: their names, the types of d and of the operands, the reference


class Form:
    """One instruction name. kinds: types of d, a, b ...; T is the name's last word, U the one before, W twice as wide.

    text: the statements, where they are more than ``name d, a, b``. ulps: distance allowed, 0 for equality.
    """

    def __init__(self, name, kinds, reference, text=None, ulps=0, label=""):
        self.name, self.reference, self.ulps, self.label = name, reference, ulps, label
        self.words = name.split(".")
        self.opcode, self.last = self.words[0], self.words[-1]
        meaning = {"T": self.last, "U": self.words[-2], "W": WIDE.get(self.last)}
        self.kinds = [meaning.get(kind, kind) for kind in kinds.split()]
        self.text = text or "{name} " + ", ".join(f"%{letter}" for letter in "dabce"[: len(self.kinds)]) + ";"
        self.text = self.text.replace("{name}", name)
        self.mode = next((w for w in self.words if w in ("rn", "rna", "rz", "rm", "rp")), "rn")

    def __repr__(self):
        return f"{self.name}{self.label}"


CASES = []


def case(pattern, kinds, reference, **options):
    CASES.extend(Form(name, kinds, reference, **options) for name in expand(pattern) if name in FORMS)


def integer(pattern, kinds, function, **options):
    """``function`` of Python integers; what does not fit into d is cut off."""
    case(pattern, kinds, lambda m, *operands: np.vectorize(function, otypes=[object])(*operands), **options)


def sized(pattern, kinds, function):
    """Likewise, with the width of the type as the first argument."""
    for name in expand(pattern):
        width = BITS[name.rsplit(".", 1)[1]]
        integer(name, kinds, lambda *operands, width=width: function(width, *operands))


def quotient(a, b):  # division by zero is unspecified in PTX, a GPU gives all ones and the dividend as remainder
    if b == 0:
        return -1
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTS = "{u16,s16,u32,s32,u64,s64}"
integer(f"add.{INTS}", "T T T", lambda a, b: a + b)
integer(f"sub.{INTS}", "T T T", lambda a, b: a - b)
integer(f"mul.lo.{INTS}", "T T T", lambda a, b: a * b)
integer(f"mad.lo.{INTS}", "T T T T", lambda a, b, c: a * b + c)
sized("mul.hi.{u32,s32,u64,s64}", "T T T", lambda width, a, b: a * b >> width)
sized("mad.hi.{u32,s32,u64,s64}", "T T T T", lambda width, a, b, c: (a * b >> width) + c)
integer("mul.wide.{u16,s16,u32,s32}", "W T T", lambda a, b: a * b)
integer("mad.wide.{u16,s16,u32,s32}", "W T T W", lambda a, b, c: a * b + c)
integer(f"div.{INTS}", "T T T", quotient)
integer(f"rem.{INTS}", "T T T", lambda a, b: a - b * quotient(a, b))
integer("abs.{s16,s32,s64}", "T T", abs)
integer("neg.{s16,s32,s64}", "T T", lambda a: -a)
integer(f"min.{INTS}", "T T T", min)
integer(f"max.{INTS}", "T T T", max)
integer("sad.{u32,s32}", "T T T T", lambda a, b, c: c + abs(a - b))
integer("and.{b16,b32,b64,pred}", "T T T", lambda a, b: a & b)
integer("or.{b16,b32,b64,pred}", "T T T", lambda a, b: a | b)
integer("xor.{b16,b32,b64,pred}", "T T T", lambda a, b: a ^ b)
integer("not.{b16,b32,b64}", "T T", lambda a: -1 - a)
integer("not.pred", "T T", lambda a: 1 - a)
integer("cnot.{b16,b32,b64}", "T T", lambda a: int(a == 0))
integer("shl.{b16,b32,b64}", "T T u32", lambda a, n: a << min(n, 64))
integer("shr.{b16,b32,b64,u16,u32,u64,s16,s32,s64}", "T T u32", lambda a, n: a >> min(n, 64))
integer("shf.l.wrap.b32", "T T T u32", lambda a, b, n: (b << 32 | a) << n % 32 >> 32)
integer("shf.r.wrap.b32", "T T T u32", lambda a, b, n: (b << 32 | a) >> n % 32)
integer("shf.l.clamp.b32", "T T T u32", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32)
integer("shf.r.clamp.b32", "T T T u32", lambda a, b, n: (b << 32 | a) >> min(n, 32))
sized("brev.{b32,b64}", "T T", lambda width, a: int(f"{a:0{width}b}"[::-1], 2))
sized("clz.{b32,b64}", "u32 T", lambda width, a: width - a.bit_length())
integer("popc.{b32,b64}", "u32 T", lambda a: f"{a:b}".count("1"))
integer("bfind.{u32,u64}", "u32 T", lambda a: a.bit_length() - 1)
integer("bfind.{s32,s64}", "u32 T", lambda a: (a if a >= 0 else -1 - a).bit_length() - 1)
sized("bfind.shiftamt.{u32,u64}", "u32 T", lambda width, a: width - a.bit_length() if a else -1)
sized(
    "bfind.shiftamt.{s32,s64}",
    "u32 T",
    lambda width, a: -1 if a in (0, -1) else width - (a if a >= 0 else -1 - a).bit_length(),
)


def extracted(width, a, start, length, signed):
    start, length = start % 256, length % 256
    field = (a % (1 << width) >> start) % (1 << length)
    top = min(start + length, width)  # the sign is the field's last bit, or the number's where the field passes it
    if signed and length and a >> top - 1 & 1:
        field |= -1 << max(0, top - start)
    return field


def inserted(width, a, b, start, length):
    mask = ((1 << length % 256) - 1) << start % 256
    return (b & ~mask | a << start % 256 & mask) % (1 << width)


def permuted(a, b, selector):
    source = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> 4 * k & 15 for k in range(4)]
    return int.from_bytes(
        bytes(255 * (source[n - 8] >> 7) if n & 8 else source[n] for n in nibbles),
        "little",
    )


def dot(signed):
    def function(a, b, c):
        a, b = (int(v).to_bytes(4, "little") for v in (a, b))
        return c + sum(
            int(x) * int(y) for x, y in zip(*(np.frombuffer(v, "i1" if signed else "u1") for v in (a, b)), strict=True)
        )

    return function


sized("bfe.{u32,u64}", "T T u32 u32", lambda *operands: extracted(*operands, signed=False))
sized("bfe.{s32,s64}", "T T u32 u32", lambda *operands: extracted(*operands, signed=True))
sized("bfi.{b32,b64}", "T T T u32 u32", inserted)
integer("prmt.b32", "T T T T", permuted)
integer("dp4a.u32.u32", "u32 b32 b32 u32", dot(False))
integer("dp4a.s32.s32", "s32 b32 b32 s32", dot(True))

for table in (*(1 << k for k in range(8)), 0, 255, 0x96, 0xE8, 0xCA, 0x1B):

    def lop3(a, b, c, table=table):
        bits = zip(*(f"{v:032b}" for v in (a, b, c)), strict=True)
        return int("".join(str(table >> int("".join(three), 2) & 1) for three in bits), 2)

    integer("lop3.b32", "T T T T", lop3, text=f"{{name}} %d, %a, %b, %c, {table:#x};", label=f" {table:#x}")


# Moves and selections: bits, whatever the type says.
def moved(pattern, kinds, function, **options):
    for name in expand(pattern):
        bits = {f"{letter}{n}": f"b{n}" for letter in "busf" for n in (16, 32, 64)}
        last = name.split(".")[1]
        integer(name, kinds.replace("B", bits.get(last, last)), function, **options)


moved("mov.{pred,b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}", "B B", lambda a: a)
for kind, part, count in (("b32", "b16", 2), ("b64", "b32", 2), ("b64", "b16", 4)):
    names = ", ".join(f"%part{k}" for k in range(count))
    backwards = ", ".join(f"%part{k}" for k in reversed(range(count)))
    size = BITS[part]
    integer(
        f"mov.{kind}",
        "T T",
        lambda a, size=size, count=count: sum(
            (a >> size * k) % (1 << size) << size * (count - 1 - k) for k in range(count)
        ),
        text=f".reg .{part} %part<{count}>; mov.{kind} {{{names}}}, %a; mov.{kind} %d, {{{backwards}}};",
        label=f" of {count}",
    )
integer(
    "mov.b32",
    "T T",
    lambda a: a >> 16,
    text=".reg .b16 %high; mov.b32 {_, %high}, %a; cvt.u32.u16 %d, %high;",
    label=" upper half",
)
moved("selp.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}", "B B B pred", lambda a, b, p: a if p else b)
moved("slct.{b32,u32,s32,f32,b64}.s32", "B B B s32", lambda a, b, c: a if c >= 0 else b)

# Comparisons: false of NaN, true with the suffix u.
COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
COMPARE |= {new: COMPARE[old] for new, old in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))}
COMPARE |= {
    f"{w}u": lambda a, b, w=w: COMPARE[w](a, b) | COMPARE["nan"](a, b) for w in ("eq", "ne", "lt", "le", "gt", "ge")
}


def compared(m, a, b):
    if "ftz" in m.words:
        a, b = flush(a), flush(b)
    return COMPARE[m.words[1]](a, b).astype(bool)


def predicates(m, a, b, c=None):
    """p + 2 q + 4 r of ``setp p|q, a, b, c`` and ``setp r, a, b, !c``."""
    yes = compared(m, a, b)
    p, q, r = yes, ~yes, yes
    if c is not None:
        c = c.astype(bool)
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[m.words[2]]
        p, q, r = combine(p, c), combine(q, c), combine(r, ~c)
    return p.astype(int) + 2 * q + 4 * r


PREDICATES = """.reg .pred %yes, %no, %only; .reg .b32 %one; .reg .b32 %two;
{name} %yes|%no, %a, %b#; {name} %only, %a, %b#!;
selp.b32 %d, 1, 0, %yes; selp.b32 %one, 2, 0, %no; selp.b32 %two, 4, 0, %only;
or.b32 %d, %d, %one; or.b32 %d, %d, %two;"""
PLAIN = PREDICATES.replace("#!", "").replace("#", "")
JOINED = PREDICATES.replace("#!", ", !%c").replace("#", ", %c")
FLOAT_TESTS = "{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}"
for words, kinds in (
    ("{eq,ne}", "{b16,b32,b64}"),
    ("{eq,ne,lt,le,gt,ge}", INTS),
    (FLOAT_TESTS, "{f32,ftz.f32,f64}"),
):
    case(f"setp.{words}.{kinds}", "b32 T T", predicates, text=PLAIN)
    case(f"setp.{words}.{{and,or,xor}}.{kinds}", "b32 T T pred", predicates, text=JOINED)
case("setp.{lo,ls,hi,hs}.{u16,u32,u64}", "b32 T T", predicates, text=PLAIN)
case(f"setp.{FLOAT_TESTS}.{{f16,bf16}}", "pred T T", lambda *x: compared(*x).astype(int))  # knows no p|q
case(f"set.{FLOAT_TESTS}{{,.ftz}}.{{u32,s32}}.f32", "U T T", lambda *x: -compared(*x).astype(object))
case(f"set.{FLOAT_TESTS}{{,.ftz}}.f32.f32", "U T T", lambda *x: compared(*x).astype(float))
case("set.{eq,ne,lt,le,gt,ge}.{u32,s32}.{u32,s32}", "U T T", lambda *x: -compared(*x).astype(object))


def classified(m, x):
    subnormal = (x != 0) & (np.abs(x) < 2.0 ** (1 - FORMAT[m.last][1]))
    answers = {
        "finite": np.isfinite(x),
        "infinite": np.isinf(x),
        "number": ~np.isnan(x),
        "notanumber": np.isnan(x),
        "normal": np.isfinite(x) & ~subnormal,  # zeros count as normal
        "subnormal": subnormal,
    }
    return answers[m.words[1]].astype(int)


case("testp.{finite,infinite,number,notanumber,normal,subnormal}.{f32,f64}", "pred T", classified)


# Floating point, rounded once.
def once(m, *operands):
    return ieee(m.opcode, scalar(m.kinds[0]), m.mode, *operands)


once = floating(once)
HALVES = "{f16,bf16,f16x2,bf16x2}"
for op in ("add", "sub", "mul"):
    case(f"{op}{{,.rn,.rz,.rm,.rp}}{{,.ftz}}.f32", "T T T", once)
    case(f"{op}{{,.rn,.rz,.rm,.rp}}.f64", "T T T", once)
    case(f"{op}{{,.ftz}}.sat.f32", "T T T", once)
    case(f"{op}{{,.rn}}.{HALVES}", "T T T", once)
for op in ("add", "mul"):
    case(f"{op}.rn{{,.ftz}}.sat.f32", "T T T", once)
    case(f"{op}{{,.rn}}.sat.{{f16,f16x2}}", "T T T", once)
for op, kinds in (("div", "T T T"), ("rcp", "T T"), ("sqrt", "T T")):
    case(f"{op}.{{rn,rz,rm,rp}}{{,.ftz}}.f32", kinds, once)
    case(f"{op}.{{rn,rz,rm,rp}}.f64", kinds, once)
case("fma.{rn,rz,rm,rp}{,.ftz}{,.sat}.f32", "T T T T", once)
case("fma.{rn,rz,rm,rp}.f64", "T T T T", once)
case(f"fma.rn{{,.relu}}.{HALVES}", "T T T T", once)
case("fma.rn.sat.{f16,f16x2}", "T T T T", once)

ABS, NEG = floating(lambda m, a: np.abs(a)), floating(lambda m, a: -a)
case(f"abs.{{f32,ftz.f32,f64,{HALVES[1:]}", "T T", ABS)
case(f"neg.{{f32,ftz.f32,f64,{HALVES[1:]}", "T T", NEG)
case(f"min.{{f32,ftz.f32,NaN.f32,ftz.NaN.f32,f64,{HALVES[1:]}", "T T T", floating(or_nan(smaller)))
case(f"max.{{f32,ftz.f32,NaN.f32,ftz.NaN.f32,f64,{HALVES[1:]}", "T T T", floating(or_nan(larger)))
case("copysign.{f32,f64}", "T T T", lambda m, a, b: np.copysign(b, a))


# Approximations.
def approximate(pattern, function, kinds="T T", ulps=2):
    case(pattern, kinds, floating(lambda m, *operands: function(*operands)), ulps=ulps)


approximate("div.{approx,full}{,.ftz}.f32", np.divide, "T T T")
approximate("rcp.approx{,.ftz}.f32", lambda a: 1 / a)
approximate("rcp.approx.ftz.f64", lambda a: flush64(1 / flush64(a)), ulps=2.0**33)  # 20 digits
approximate("sqrt.approx{,.ftz}.f32", np.sqrt)
approximate("rsqrt.approx{,.ftz}.f32", lambda a: 1 / np.sqrt(a))
approximate("rsqrt.approx.f64", lambda a: 1 / np.sqrt(a))
approximate("ex2.approx{,.ftz}.f32", np.exp2)
approximate("ex2.approx.{f16,f16x2,ftz.bf16,ftz.bf16x2}", np.exp2)
approximate("lg2.approx{,.ftz}.f32", np.log2)
approximate("sin.approx{,.ftz}.f32", np.sin)
approximate("cos.approx{,.ftz}.f32", np.cos)
approximate("tanh.approx.f32", np.tanh)
approximate(f"tanh.approx.{HALVES}", np.tanh)


def flush64(x):
    return np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)


# Conversions. Integers go into a register of 64 bits: the sign is extended into it.
TYPES = [f"{letter}{n}" for n in (8, 16, 32, 64) for letter in "us"]
ALL = "{" + ",".join(TYPES) + "}"


def limits(kind):
    low = -(1 << BITS[kind] - 1) if kind[0] == "s" else 0
    return low, low + (1 << BITS[kind]) - 1


def into_register(m, values):
    kind = m.words[-2]
    low, high = limits(kind)
    return np.vectorize(lambda v: (int(v) - low) % (high - low + 1) + low, otypes=[object])(values)


def cut(m, a):
    return into_register(m, np.clip(a, *limits(m.words[-2])) if "sat" in m.words else a)


def to_integer(m, a):
    kind = m.words[-2]
    a = flush(a) if "ftz" in m.words else a
    whole = to_whole(m, a)
    low, high = limits(kind)
    # NaN: 0, or the bit pattern 100...0 where the source is f64 or the result has 64 bits
    nan = 1 << BITS[kind] - 1 if m.last == "f64" or BITS[kind] == 64 else 0
    clamp = lambda x: nan if x != x else low if x <= low else high if x >= high else int(x)  # noqa: E731
    with np.errstate(invalid="ignore"):
        return into_register(m, np.vectorize(clamp, otypes=[object])(whole))


def from_integer(m, a):
    function = lambda v: rounded(Fraction(v), m.words[-2], m.mode) if v else 0.0  # noqa: E731
    return np.vectorize(function, otypes=[float])(a)


def to_whole(m, a):
    with np.errstate(invalid="ignore"):
        return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[m.words[1]](a)


case(f"cvt.{ALL}.{ALL}", "b64 T", cut)
for to, kind in itertools.product(TYPES, TYPES):
    if limits(kind)[0] < limits(to)[0] or limits(kind)[1] > limits(to)[1]:  # ptxas refuses .sat that can do nothing
        case(f"cvt.sat.{to}.{kind}", "b64 T", cut)
case(f"cvt.{{rni,rzi,rmi,rpi}}{{,.ftz}}.{ALL}.f32", "b64 T", to_integer)
case(f"cvt.{{rni,rzi,rmi,rpi}}.{ALL}.{{f64,f16,bf16}}", "b64 T", to_integer)
case(f"cvt.{{rn,rz,rm,rp}}.{{f32,f64}}.{ALL}", "U T", from_integer)
case(f"cvt.rn.{{f16,bf16}}.{ALL}", "U T", from_integer)
case("cvt.{rni,rzi,rmi,rpi}{,.ftz}{,.sat}.f32.f32", "U T", floating(to_whole))
case("cvt.{rni,rzi,rmi,rpi}.{f64.f64,f16.f16}", "U T", floating(to_whole))
case("cvt{,.ftz}.f64.f32", "U T", once)
case("cvt.{rn,rz,rm,rp}{,.ftz}.f32.f64", "U T", once)
case("cvt{,.ftz}.f32.{f16,bf16}", "U T", once)
case("cvt.f64.{f16,bf16}", "U T", once)
case("cvt.{rn,rz,rn.relu}.{f16,bf16}.f32", "U T", once)
case("cvt.rn.ftz.{f16,bf16}.f32", "U T", once)
case("cvt.rn.{f16,bf16}.f64", "U T", once)
case("cvt{.sat,.ftz,.ftz.sat}.f32.f32", "U T", once)
case("cvt.{rna,rn}.tf32.f32", "U T", once)
pack = floating(lambda m, a, b: np.stack([ieee("cvt", scalar(m.kinds[0]), m.mode, x) for x in (b, a)], -1))
case("cvt.{rn,rz}{,.relu}.{f16x2,bf16x2}.f32", "U T T", pack)  # the first operand is the upper half


# ---- operands

HARD = [2.5, 0.5, 3.5, 126.5, 127.5, 128.0, 254.5, 255.5, 32767.5, 65504.0, 65519.99, 65520.0, 65535.5]
HARD += [2.0**n for n in (31, 32, 63, 64, 127, -14, -24, -25)] + [2.0**31 - 0.5, 2.0**63 - 1024, 0.3, 7.7, 1e30, 1e300]
HARD += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-24]
HARD += [1 + 2.0**-11 + 2.0**-50, 1.5 * 2.0**-25, 1.5 * 2.0**-126, 2.0**-133, 2.0**-134, 2.0**-149, 2.0**-150]
HARD += [2.0**128 - 2.0**103, 2.0**128 - 2.0**119, 2.0**-1030]


@cache
def edges(kind):
    """Bit patterns at the edges of a type, the most important ones first."""
    if kind == "pred":
        return np.array([0, 1], np.uint32)
    if kind.endswith("x2"):
        low = edges(scalar(kind))
        return (
            np.concatenate([low, np.roll(low, 5)]).astype(np.uint32)
            | np.concatenate([np.roll(low, 1), low]).astype(np.uint32) << 16
        )
    if kind in FORMAT:
        digits, top = FORMAT[kind]
        largest, least = (2 - 2.0 ** (1 - digits)) * 2.0**top, math.ldexp(1, 1 - top)
        first = [1 + 2.0 ** (1 - digits), 1.5, 2.0 ** (12 - top), 0.0, -0.0, -1.0, largest, -least]
        first += [math.ldexp(1, 2 - top - digits), math.inf, -math.inf, math.nan, -1.5, 2.0, least]
        first += [least * (1 - 2.0 ** (1 - digits)), -largest, 1 - 2.0**-digits]
        hard = [x if not x else rounded(Fraction(x), kind) for y in HARD for x in (y, -y)]
        return encode(first + hard, kind)
    width = BITS[kind]
    values = [0, 1, -1, 1 << width - 1, (1 << width - 1) - 1, 5, -7, 31, 0x55 * ((1 << width) // 255), 32, 2, 33, 3]
    values += [8, 16, 17, 63, 64, 65, 127, 128, 255, 256, 32767, 32768, 65535, 65536]
    for digits in (8, 11, 24, 53):  # halves, and next to halves, of a format with so many digits
        for place in range(0, max(1, width - digits), 9):
            tie = ((1 << digits) + 1) << place
            values += [tie, tie + 1, tie - 1, -tie, tie + (2 << place)]
    return encode([v for v in values if abs(v) < 1 << width], kind)


@cache
def operands(kinds):
    """Bit patterns for every operand: edges against edges, then random bits and ordinary numbers."""
    rng = np.random.default_rng(len(kinds))
    lists = [edges(kind) for kind in kinds]
    most = {1: 10**6, 2: 24, 3: 11, 4: 6}[len(kinds)]
    rows = list(itertools.product(*(range(min(most, len(one))) for one in lists)))
    columns = []
    for k, (kind, one) in enumerate(zip(kinds, lists, strict=True)):
        bits = rng.integers(0, 1 << 64, 128, np.uint64).astype(one.dtype) if kind != "pred" else rng.choice(one, 128)
        some = rng.choice(one, 128)
        if kind in FORMAT:
            near = [rounded(Fraction(x), kind) for x in rng.normal(size=128)]
            some = np.where(np.arange(128) % 2, some, encode(near, kind))
        columns.append(np.concatenate([one[[row[k] for row in rows]], bits, some]))
    return columns


# ---- running

HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
START = """.reg .b32 %thread, %block, %size; .reg .b64 %index; .reg .b64 %at; .reg .b32 %flag;
mov.u32 %thread, %tid.x; mov.u32 %block, %ctaid.x; mov.u32 %size, %ntid.x;
mad.lo.u32 %thread, %block, %size, %thread; cvt.u64.u32 %index, %thread;"""


def register(kind):
    return "pred" if kind == "pred" else f"b{max(16, BITS[kind])}"


def statements(form):
    yield START
    for letter, kind in zip("dabce", form.kinds, strict=False):
        yield f".reg .{register(kind)} %{letter};"
    for letter, kind in zip("abce", form.kinds[1:], strict=False):
        width = max(16, BITS[kind])  # the upper half of an operand of 8 bits must not matter
        yield f"ld.param.u64 %at, [{letter}]; mad.lo.u64 %at, %index, {width // 8}, %at;"
        if kind == "pred":
            yield f"ld.global.b32 %flag, [%at]; setp.ne.u32 %{letter}, %flag, 0;"
        else:
            yield f"ld.global.b{width} %{letter}, [%at];"
    yield form.text
    width = max(16, BITS[form.kinds[0]])
    yield f"ld.param.u64 %at, [d]; mad.lo.u64 %at, %index, {width // 8}, %at;"
    if form.kinds[0] == "pred":
        yield "selp.b32 %flag, 1, 0, %d; st.global.b32 [%at], %flag;"
    else:
        yield f"st.global.b{width} [%at], %d;"
    yield "ret;"


def module(forms):
    text = HEAD
    for number, form in enumerate(forms):
        params = ", ".join(f".param .u64 {letter}" for letter in "dabce"[: len(form.kinds)])
        text += f".visible .entry k{number}({params})\n{{\n" + "\n".join(statements(form)) + "\n}\n"
    return text


def difference(form, got, expected):
    """Distance from the reference, in units in the last place; 0 for the same number, infinite for another NaN."""
    kind = scalar(form.kinds[0])
    if kind not in FORMAT:
        width = max(16, BITS[kind])
        wrapped = np.asarray(expected, object) % (1 << width)
        return np.where(got == wrapped, 0, np.inf)
    digits, top = FORMAT[kind]
    same = (got == expected) & (np.signbit(got) == np.signbit(expected)) | np.isnan(got) & np.isnan(expected)
    with np.errstate(all="ignore"):
        largest = (2 - 2.0 ** (1 - digits)) * 2.0**top
        near = np.clip(expected, -largest, largest)  # next to infinity lies the largest number
        exponent = np.maximum(np.frexp(near)[1] - 1, 1 - top)
        apart = np.abs(np.clip(got, -largest, largest) - near) * np.exp2(digits - 1.0 - exponent)
    apart = np.where(np.isfinite(apart), apart, np.inf)
    apart = np.where((got == 0) & (expected == 0) | np.isinf(got) & np.isinf(expected), np.inf, apart)  # wrong sign
    return np.where(same, 0, apart)


def failures(emu, forms):
    text = module(forms)
    inputs = {}
    for number, form in enumerate(forms):
        kinds = tuple(form.kinds[1:])
        if kinds not in inputs:
            inputs[kinds] = [emu.array(column) for column in operands(kinds)]
        arrays = inputs[kinds]
        count = len(arrays[0])
        out = emu.zeros(-(-count // 256) * 256, f"u{max(16, BITS[form.kinds[0]]) // 8}", "d")
        kernel = emu.load_ptx(text, f"k{number}")
        whole = count // 256
        kernel((whole,), (256,), (out, *arrays)) if whole else None
        if count % 256:
            kernel((1,), (count % 256,), (out[256 * whole :], *(a[256 * whole :] for a in arrays)))
        out = out[:count]
        values = [decode(a, kind) for a, kind in zip(arrays, kinds, strict=True)]
        got = decode(out, form.kinds[0]) if scalar(form.kinds[0]) in FORMAT else out.astype(object)
        expected = form.reference(form, *values)
        wrong = difference(form, got, expected) > form.ulps
        if form.opcode == "div" and "approx" in form.words:
            wrong &= np.abs(values[1]) <= 2.0**126  # beyond it the result is unspecified
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])[0]
            shown = ", ".join(str(v[at]) for v in values)
            yield f"{form!r} of {shown}: got {got[at]}, expected {expected[at]} ({wrong.sum()} of {wrong.size} wrong)"


GROUPS = {opcode: [form for form in CASES if form.opcode == opcode] for opcode in OPCODES}
GROUPS = {opcode: forms for opcode, forms in GROUPS.items() if forms}


@pytest.mark.parametrize("opcode", GROUPS)
def test_against_the_definition(opcode):
    assert not list(failures(emulator.Emulator(checked=False), GROUPS[opcode]))


@pytest.mark.parametrize("opcode", ["prmt", "fma", "testp"])
def test_with_every_access_checked(opcode):
    assert not list(failures(emulator.Emulator(), GROUPS[opcode]))


def test_every_form_of_these_opcodes_is_tested():
    assert {form.name for form in CASES} >= {name for name in FORMS if name.split(".")[0] in OPCODES}


@pytest.mark.parametrize(
    "name", ["add.foo.u32", "add", "mul.u32", "bfind.shiftamt.u16", "cvt.f16.f32", "wgmma.mma_async.sync.aligned"]
)
def test_an_unknown_name_is_refused(name):
    text = HEAD + f".visible .entry k()\n{{\n.reg .b32 %r<3>;\n{name} %r0, %r1, %r2;\nret;\n}}\n"
    with pytest.raises(Refused, match=f"instruction {name} "):
        translate(text)
