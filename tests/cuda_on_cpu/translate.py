"""PTX to C++: every instruction becomes a line of C++ over the helpers of ``runtime.h``.

``FORMS`` is the whitelist: the full names, all modifiers included, of the instructions that are understood. Any other
name raises ``Refused``: an instruction that is nearly right would be worse than one that is missing.
"""

import functools
import itertools
import re
from dataclasses import dataclass, field


class Refused(Exception):
    """The PTX holds something that the translator does not know."""


@dataclass
class Kernel:
    name: str
    params: list  # (offset, bytes) of every parameter
    cluster: tuple = (1, 1, 1)
    max_threads: int = 1024
    shared: int = 0  # bytes of its static shared variables, without the gaps of the emulator
    window: int = 0  # bytes of the block's window, gaps included, up to where dynamic shared memory begins
    asynchronous: bool = False  # whether it may have asynchronous stores


@dataclass
class Module:
    code: str
    kernels: dict  # name -> Kernel
    files: dict  # number -> file name, for line tables
    variables: list = field(default_factory=list)  # (C++ name, PTX name, bytes, initial bytes)
    gaps: list = field(default_factory=list)  # from, to, from, to ...: what lies between the window's variables


C_TYPE = {f"{k}{n}": f"{'u' if k in 'ub' else ''}int{n}_t" for k in "usb" for n in (8, 16, 32, 64)}
C_TYPE |= {"f32": "float", "f64": "double", "f16": "half", "bf16": "bfloat", "f16x2": "half2", "bf16x2": "bfloat2"}
C_TYPE |= {"pred": "bool", "tf32": "uint32_t", "u16x2": "uint32_t", "s16x2": "uint32_t"}
BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4}
BYTES |= {"f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1}
FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
GAP = 64  # bytes between two shared variables, so that an overrun hits no neighbour

USED = set()  # names that this process has translated: the unit tests ask whether any was left out
FORMS = {}  # full name -> function(translator, name, operands) -> C++ statements


def expand(pattern):
    """All strings of a pattern with alternatives: ``a{,.b}`` gives ``a`` and ``a.b``."""
    parts = [part.split(",") if k % 2 else [part] for k, part in enumerate(re.split(r"\{([^{}]*)\}", pattern))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def form(*patterns):
    def register(function):
        for name in itertools.chain.from_iterable(map(expand, patterns)):
            if ".v4." in name and name.endswith("64"):
                continue  # accesses of 32 bytes are for sm_100 and later alone
            if name in FORMS:
                raise ValueError(f"{name} stands twice in the table")
            FORMS[name] = function
        return function

    return register


def _substituted(expression, reads):
    """An expression over a, b, c with these in their places. Those of a lambda stay its own."""
    head, body, rest = re.match(r"(.*?)(?:(\[\].*\})(.*))?$", expression).groups()

    def put(text):
        return re.sub(r"\b[abc]\b", lambda match: reads[match[0]], text)

    return put(head) if body is None else put(head) + body + put(rest)


# ---- instructions that compute one value from values: the pattern, the expression, the types of d, a, b, c


def value(pattern, expression, *types):
    """Register ``d = expression`` over ``a``, ``b``, ``c``; types left out are the name's last modifier."""

    def emit(t, name, operands):
        last = name.rsplit(".", 1)[1]
        kinds = [*types, *[last] * (4 - len(types))]
        kinds = [last if kind == "T" else kind for kind in kinds]
        ftz = ".ftz" in name
        reads = {}
        for variable, kind, operand in zip("abc", kinds[1:], operands[1:], strict=False):
            read = t.read(operand, kind)
            reads[variable] = f"ftz({read})" if ftz and kind == "f32" else read
        result = f"({C_TYPE[kinds[0]]})({_substituted(expression, reads)})"
        if ".sat." in name and kinds[0] in FLOATS:
            result = f"saturate({result})"
        if ftz and kinds[0] == "f32":
            result = f"ftz({result})"
        return t.write(operands[0], result, kinds[0])

    emit.expression, emit.types = expression, types
    form(pattern)(emit)


INTS = "{u16,s16,u32,s32,u64,s64}"
value(f"add.{INTS}", "a + b")
value(f"sub.{INTS}", "a - b")
value(f"mul.lo.{INTS}", "a * b")
value(f"mad.lo.{INTS}", "a * b + c")
value("mul.hi.{u32,s32,u64,s64}", "mul_hi(a, b)")
value("mad.hi.{u32,s32,u64,s64}", "mul_hi(a, b) + c")
for narrow, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
    value(f"mul.wide.{narrow}", f"({C_TYPE[wide]})a * b", wide, narrow, narrow)
    value(f"mad.wide.{narrow}", f"({C_TYPE[wide]})a * b + c", wide, narrow, narrow, wide)
value(f"div.{INTS}", "b == 0 ? ~decltype(a)(0) : divide(a, b)")  # a GPU gives all ones
value(f"rem.{INTS}", "b == 0 ? a : remainder(a, b)")
value("abs.{s16,s32,s64}", "a < 0 ? -a : a")
value("neg.{s16,s32,s64}", "-a")
value(f"min.{INTS}", "a < b ? a : b")
value(f"max.{INTS}", "a > b ? a : b")
value("sad.{u32,s32}", "c + (a < b ? b - a : a - b)")
value("and.{b16,b32,b64}", "a & b")
value("or.{b16,b32,b64}", "a | b")
value("xor.{b16,b32,b64}", "a ^ b")
value("not.{b16,b32,b64}", "~a")
value("and.pred", "a & b")
value("or.pred", "a | b")
value("xor.pred", "a ^ b")
value("not.pred", "!a")
value("cnot.{b16,b32,b64}", "a == 0")
value("shl.{b16,b32,b64}", "b >= 8 * sizeof(a) ? 0 : a << b", "T", "T", "u32")
value("shr.{b16,b32,b64,u16,u32,u64}", "b >= 8 * sizeof(a) ? 0 : a >> b", "T", "T", "u32")
value("shr.{s16,s32,s64}", "a >> (b >= 8 * sizeof(a) ? 8 * sizeof(a) - 1 : b)", "T", "T", "u32")
value("shf.l.wrap.b32", "funnel_left(a, b, c & 31)")
value("shf.r.wrap.b32", "funnel_right(a, b, c & 31)")
value("shf.l.clamp.b32", "funnel_left(a, b, c < 32 ? c : 32)")
value("shf.r.clamp.b32", "funnel_right(a, b, c < 32 ? c : 32)")
value("brev.{b32,b64}", "reverse_bits(a)")
value("clz.b32", "a ? __builtin_clz(a) : 32", "u32")
value("clz.b64", "a ? __builtin_clzll(a) : 64", "u32")
value("popc.b32", "__builtin_popcount(a)", "u32")
value("popc.b64", "__builtin_popcountll(a)", "u32")
value("bfind.{u32,s32,u64,s64}", "find_leading(a)", "u32")
value("bfind.shiftamt.{u32,s32,u64,s64}", "shift_leading(a)", "u32")
value("bfe.{u32,s32,u64,s64}", "extract(a, b & 255, c & 255)", "T", "T", "u32", "u32")
value("prmt.b32", "permute(a, b, c)")

F32, F64 = "{,.ftz}.f32", ".f64"
for rounding in ("rn", "rz", "rm", "rp"):  # nearest, towards zero, down, up
    for op, sign in (("add", "a + b"), ("sub", "a - b"), ("mul", "a * b"), ("div", "a / b")):
        expression = sign if rounding == "rn" else f"rounded<{rounding}>([](auto a, auto b) {{ return {sign}; }}, a, b)"
        value(f"{op}.{rounding}{F32}", expression)
        value(f"{op}.{rounding}{F64}", expression)
    fma = "std::fma(a, b, c)"
    if rounding != "rn":
        fma = f"rounded<{rounding}>([](auto a, auto b, auto c) {{ return std::fma(a, b, c); }}, a, b, c)"
    value(f"fma.{rounding}{{,.ftz}}.f32", fma)
    value(f"fma.{rounding}.f64", fma)
    root, inverse = "std::sqrt(a)", "1 / a"
    if rounding != "rn":
        root = f"rounded<{rounding}>([](auto a) {{ return std::sqrt(a); }}, a)"
        inverse = f"rounded<{rounding}>([](auto a) {{ return 1 / a; }}, a)"
    value(f"sqrt.{rounding}{{.f32,.ftz.f32,.f64}}", root)
    value(f"rcp.{rounding}{{.f32,.ftz.f32,.f64}}", inverse)
value("add{,.ftz}{,.sat}.f32", "a + b")
value("sub{,.ftz}{,.sat}.f32", "a - b")
value("mul{,.ftz}{,.sat}.f32", "a * b")
value("add.f64", "a + b")
value("sub.f64", "a - b")
value("mul.f64", "a * b")
value("div.{approx,full}{,.ftz}.f32", "a / b")
value("abs{.f32,.ftz.f32,.f64}", "std::fabs(a)")
value("neg{.f32,.ftz.f32,.f64}", "-a")
value("min{.f32,.ftz.f32,.f64}", "smaller(a, b)")
value("max{.f32,.ftz.f32,.f64}", "larger(a, b)")
value("copysign.{f32,f64}", "std::copysign(b, a)")  # the sign comes first
# Approximations: the exact function rounded once; a GPU differs in the last places, so tests compare with tolerances.
value("rcp.approx{,.ftz}.f32", "1 / a")
value("rcp.approx.ftz.f64", "ftz(1 / ftz(a))")
value("sqrt.approx{,.ftz}.f32", "std::sqrt(a)")
value("rsqrt.approx{.f32,.ftz.f32,.f64}", "1 / std::sqrt((double)a)")
value("ex2.approx{,.ftz}.f32", "std::exp2((double)a)")
value("lg2.approx{,.ftz}.f32", "std::log2((double)a)")
value("sin.approx{,.ftz}.f32", "std::sin((double)a)")
value("cos.approx{,.ftz}.f32", "std::cos((double)a)")
value("tanh.approx.f32", "std::tanh((double)a)")

HALVES = "{f16,bf16,f16x2,bf16x2}"
value(f"add{{,.rn}}.{HALVES}", "a + b")
value(f"sub{{,.rn}}.{HALVES}", "a - b")
value(f"mul{{,.rn}}.{HALVES}", "a * b")
value(f"fma.rn.{HALVES}", "fma(a, b, c)")
value(f"fma.rn.relu.{HALVES}", "relu(fma(a, b, c))")
value(f"neg.{HALVES}", "-a")
value(f"abs.{HALVES}", "fabs(a)")
value(f"min.{HALVES}", "smaller(a, b)")
value(f"max.{HALVES}", "larger(a, b)")


@form("testp.{finite,infinite,number,notanumber,normal,subnormal}.{f32,f64}")
def _(t, name, operands):
    _, test, kind = name.split(".")
    call = {
        "finite": "std::isfinite(a)",
        "infinite": "std::isinf(a)",
        "number": "!std::isnan(a)",
        "notanumber": "std::isnan(a)",
        "normal": "std::isnormal(a) || a == 0",  # PTX counts zeros as normal
        "subnormal": "std::fpclassify(a) == FP_SUBNORMAL",
    }[test]
    return f"{{ auto a = {t.read(operands[1], kind)}; {t.write(operands[0], f'(bool)({call})', 'pred')} }}"


@form("bfi.{b32,b64}")
def _(t, name, operands):
    kind = name[-3:]
    a, b = t.read(operands[1], kind), t.read(operands[2], kind)
    where, length = t.read(operands[3], "u32"), t.read(operands[4], "u32")
    return t.write(operands[0], f"insert({a}, {b}, {where} & 255, {length} & 255)", kind)


@form("lop3.b32")
def _(t, name, operands):
    a, b, c = (t.read(operand, "b32") for operand in operands[1:4])
    return t.write(operands[0], f"lop3({a}, {b}, {c}, {int(operands[4], 0)})", "b32")


@form("mov.{pred,b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}")
def _(t, name, operands):
    kind = name.split(".")[1]
    target, source = operands
    if target.startswith("{"):  # mov.b32 {lo, hi}, r
        parts = t.elements(target)
        part = f"b{8 * BYTES[kind] // len(parts)}"
        lines = [f"auto v = {t.read(source, kind)};"]
        for k, p in enumerate(parts):
            lines += [t.write(p, f"({C_TYPE[part]})(v >> {8 * BYTES[part] * k})", part)] if p != "_" else []
        return f"{{ {' '.join(lines)} }}"
    if source.startswith("{"):
        parts = t.elements(source)
        part = f"b{8 * BYTES[kind] // len(parts)}"
        joined = " | ".join(
            f"(({C_TYPE[kind]}){t.read(p, part)} << {8 * BYTES[part] * k})" for k, p in enumerate(parts)
        )
        return t.write(target, f"({C_TYPE[kind]})({joined})", kind)
    return t.write(target, t.read(source, kind), kind)


@form("selp.{b16,b32,b64,u16,u32,u64,s16,s32,s64,f32,f64}")
def _(t, name, operands):
    kind = name.split(".")[1]
    a, b = t.read(operands[1], kind), t.read(operands[2], kind)
    return t.write(operands[0], f"({t.read(operands[3], 'pred')} ? {a} : {b})", kind)


COMPARE = {"eq": "a == b", "ne": "a != b", "lt": "a < b", "le": "a <= b", "gt": "a > b", "ge": "a >= b"}
COMPARE |= {"lo": "a < b", "ls": "a <= b", "hi": "a > b", "hs": "a >= b"}
NAN = "(a != a || b != b)"
COMPARE_FLOAT = {"eq": "a == b", "ne": f"(a != b && !{NAN})", "lt": "a < b", "le": "a <= b", "gt": "a > b"}
COMPARE_FLOAT |= {"ge": "a >= b", "num": f"!{NAN}", "nan": NAN}
COMPARE_FLOAT |= {c + "u": f"({COMPARE_FLOAT[c]} || {NAN})" for c in ("eq", "ne", "lt", "le", "gt", "ge")}


def _comparison(name):
    """Kind of the operands, expression and whether operands are flushed, of a setp."""
    parts = name.split(".")
    kind = parts[-1]
    table = COMPARE_FLOAT if kind.lstrip("b").startswith("f") else COMPARE
    return kind, table[parts[1]], "ftz" in parts


@form(
    "setp.{eq,ne}{,.and,.or,.xor}.{b16,b32,b64}",
    "setp.{eq,ne,lt,le,gt,ge}{,.and,.or,.xor}.{u16,s16,u32,s32,u64,s64}",
    "setp.{lo,ls,hi,hs}.{u16,u32,u64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}{,.and,.or,.xor}{.f32,.ftz.f32,.f64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}{.f16,.bf16}",
)
def _(t, name, operands):
    kind, expression, ftz = _comparison(name)
    a, b = (f"ftz({t.read(x, kind)})" if ftz else t.read(x, kind) for x in operands[1:3])
    targets = operands[0].split("|")
    results = [expression, f"!({expression})"]
    combine = next((word for word in ("and", "or", "xor") if f".{word}." in name), None)
    if combine:
        symbol = {"and": "&", "or": "|", "xor": "^"}[combine]
        third = t.read(operands[3], "pred")
    results = [_substituted(result, {"a": a, "b": b}) for result in results]
    if combine:
        results = [f"({result}) {symbol} {third}" for result in results]
    if len(targets) == 1:
        return t.write(targets[0], results[0], "pred")
    # Both results before the first write: a target may be the predicate that is combined.
    lines = [f"bool yes = {results[0]}; bool no = {results[1]};"]
    both = zip(targets, ("yes", "no"), strict=True)
    lines += [t.write(target, word, "pred") for target, word in both if target != "_"]
    return f"{{ {' '.join(lines)} }}"


# ---- conversions

_INT = "u8,s8,u16,s16,u32,s32,u64,s64"


def _limits(kind):
    bits, signed = 8 * BYTES[kind], kind[0] == "s"
    return -(signed << bits - 1), (1 << bits - signed) - 1


# .sat where the type holds every source value is no PTX: ptxas refuses it.
_SAT = [
    f"cvt.sat.{to}.{kind}"
    for to, kind in itertools.product(_INT.split(","), repeat=2)
    if _limits(kind)[0] < _limits(to)[0] or _limits(kind)[1] > _limits(to)[1]
]


@form(f"cvt.{{{_INT}}}.{{{_INT}}}", *_SAT)
def _(t, name, operands):
    *_, to, kind = name.split(".")
    call = f"clamp<{C_TYPE[to]}>" if ".sat." in name else f"({C_TYPE[to]})"
    return t.write(operands[0], f"{call}({t.read(operands[1], kind)})", to)


@form(
    "cvt.{rni,rzi,rmi,rpi}{,.ftz}.{u8,s8,u16,s16,u32,s32,u64,s64}.f32",
    "cvt.{rni,rzi,rmi,rpi}.{u8,s8,u16,s16,u32,s32,u64,s64}.{f64,f16}",
)
def _(t, name, operands):
    parts = name.split(".")
    to, kind = parts[-2:]
    read = t.read(operands[1], kind)
    read = f"ftz({read})" if "ftz" in parts else read
    nan = f"({C_TYPE[to]})(1ull << {8 * BYTES[to] - 1})" if kind == "f64" or BYTES[to] == 8 else "0"
    return t.write(operands[0], f"to_integer<{C_TYPE[to]}>({parts[1]}((double){read}), {nan})", to)


@form("cvt.{rn,rz,rm,rp}.{f32,f64}.{u8,s8,u16,s16,u32,s32,u64,s64}")
def _(t, name, operands):
    _, rounding, to, kind = name.split(".")
    read = t.read(operands[1], kind)
    if rounding == "rn":
        return t.write(operands[0], f"({C_TYPE[to]}){read}", to)
    return t.write(operands[0], f"rounded<{rounding}>([](auto a) {{ return ({C_TYPE[to]})a; }}, {read})", to)


@form("cvt.rn.f16.{u8,s8,u16,s16,u32,s32,u64,s64}")
def _(t, name, operands):
    _, _, to, kind = name.split(".")
    return t.write(operands[0], f"{C_TYPE[to]}((double){t.read(operands[1], kind)})", to)


@form("cvt.{rni,rzi,rmi,rpi}{,.ftz}.f32.f32", "cvt.{rni,rzi,rmi,rpi}.{f64.f64,f16.f16}")
def _(t, name, operands):
    parts = name.split(".")
    read, kind = t.read(operands[1], parts[-1]), parts[-1]
    read = f"ftz({read})" if "ftz" in parts else read
    return t.write(operands[0], f"({C_TYPE[kind]}){parts[1]}((double){read})", kind)


@form(
    "cvt{,.ftz}.f64.f32",
    "cvt.{rn,rz,rm,rp}{,.ftz}.f32.f64",
    "cvt{,.ftz}.f32.{f16,bf16}",
    "cvt.f64.{f16,bf16}",
    "cvt.{rn,rz}.{f16,bf16}.f32",
    "cvt.rn.f16.f64",
    "cvt{,.ftz}.sat.f32.f32",
)
def _(t, name, operands):
    parts = name.split(".")
    to, kind = parts[-2:]
    rounding = parts[1] if parts[1] in ("rn", "rz", "rm", "rp") else "rn"
    read = t.read(operands[1], kind)
    if "ftz" in parts and kind == "f32":
        read = f"ftz({read})"
    if rounding == "rn":
        result = f"({C_TYPE[to]}){read}"
    elif to in ("f16", "bf16"):
        result = f"{C_TYPE[to]}::towards_zero({read})"
    else:
        result = f"rounded<{rounding}>([](auto a) {{ return ({C_TYPE[to]})a; }}, {read})"
    if "relu" in parts:
        result = f"relu({result})"
    if "sat" in parts:
        result = f"saturate({result})"
    if "ftz" in parts and to == "f32":
        result = f"ftz({result})"
    return t.write(operands[0], result, to)


@form("cvt.{rn,rz}.{f16x2,bf16x2}.f32")
def _(t, name, operands):
    parts = name.split(".")
    kind = C_TYPE[parts[-2]][:-1]
    make = f"{kind}::towards_zero" if parts[1] == "rz" else kind
    high, low = (f"{make}({t.read(operand, 'f32')})" for operand in operands[1:3])
    result = f"{kind}2{{{low}, {high}}}"  # the first operand becomes the upper half
    return t.write(operands[0], f"relu({result})" if "relu" in parts else result, parts[-2])


@form("cvt.{rna,rn}.tf32.f32")
def _(t, name, operands):
    call = "tf32_away" if ".rna." in name else "tf32_even"
    return t.write(operands[0], f"{call}({t.read(operands[1], 'f32')})", "b32")


# ---- memory

_TYPES = "{b8,u8,s8,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64}"
_SPACES = "{,.global,.shared,.local}"
_SEMANTICS = "{.relaxed,.acquire}{.cta,.cluster,.gpu,.sys}"
_CLUSTER = ".shared::cluster,.shared::cta"
_CACHE = "{,.ca,.cg,.cs,.lu,.cv,.L1::no_allocate,.L1::evict_last,.L1::evict_first,.L2::128B,.L2::256B}"
_VOLATILE = "{,.global,.shared,.shared::cluster,.shared::cta}"


def _access(name):
    """(space, vector, kind, semantics, scope) of a load, store or atomic, from its modifiers."""
    parts = name.split(".")
    space = next((p for p in parts if p in ("global", "local", "const") or p.startswith("shared")), "generic")
    vector = next((int(p[1]) for p in parts if p in ("v2", "v4", "v8")), 1)
    semantics = next((p for p in parts if p in ("relaxed", "acquire", "release", "acq_rel", "volatile")), None)
    scope = next((p for p in parts if p in ("cta", "cluster", "gpu", "sys")), "gpu")
    if semantics == "volatile":
        semantics, scope = "relaxed", "sys"
    return "shared" if space.startswith("shared") else space, vector, parts[-1], semantics, scope


@form("ld.param{,.v2,.v4}." + _TYPES)
def _(t, name, operands):
    vector, kind = _access(name)[1:3]
    targets = t.elements(operands[0]) if vector > 1 else [operands[0]]
    base = t.param_address(operands[1])
    lines = [t.load(target, f"{base} + {k * BYTES[kind]}", kind) for k, target in enumerate(targets) if target != "_"]
    return " ".join(lines)


@form("st.param{,.v2,.v4}." + _TYPES)
def _(t, name, operands):
    vector, kind = _access(name)[1:3]
    sources = t.elements(operands[1]) if vector > 1 else [operands[1]]
    base = t.param_address(operands[0])
    return " ".join(t.store(f"{base} + {k * BYTES[kind]}", source, kind) for k, source in enumerate(sources))


@form(
    f"ld{{,.weak}}{_SPACES}{{,.v2,.v4}}.{_TYPES}",
    f"ld{{.shared::cluster,.shared::cta,.const}}{{,.v2,.v4}}.{_TYPES}",
    f"ld.global.nc{_CACHE}{{,.v2,.v4}}.{_TYPES}",
    f"ld.global{{.ca,.cg,.cs,.lu,.cv,.L1::no_allocate}}{{,.v2,.v4}}.{_TYPES}",
    f"ld.volatile{_VOLATILE}{{,.v2,.v4}}.{_TYPES}",
    f"ld{_SEMANTICS}{_VOLATILE}{{,.v2,.v4}}.{_TYPES}",
)
def _(t, name, operands):
    space, vector, kind, semantics, scope = _access(name)
    targets = t.elements(operands[0]) if vector > 1 else [operands[0]]
    size = vector * BYTES[kind]
    address = t.address(operands[1], space)
    if semantics is None or space == "local":
        lines = [f"auto p = read_{space}({address}, {size}, {t.line});"]
    else:
        lines = [f"auto p = atomic_load({space}_space, {address}, {size}, {semantics}, {scope}, {t.line});"]
    for k, target in enumerate(targets):
        if target != "_":
            lines.append(t.load(target, f"p + {k * BYTES[kind]}", kind))
    return f"{{ {' '.join(lines)} }}"


@form(
    f"st{{,.weak}}{_SPACES}{{,.v2,.v4}}.{_TYPES}",
    f"st{{.shared::cluster,.shared::cta}}{{,.v2,.v4}}.{_TYPES}",
    f"st.global{{.wb,.cg,.cs,.wt,.L1::no_allocate}}{{,.v2,.v4}}.{_TYPES}",
    f"st.volatile{_VOLATILE}{{,.v2,.v4}}.{_TYPES}",
    f"st{{.relaxed,.release}}{{.cta,.cluster,.gpu,.sys}}{_VOLATILE}{{,.v2,.v4}}.{_TYPES}",
)
def _(t, name, operands):
    space, vector, kind, semantics, scope = _access(name)
    sources = t.elements(operands[1]) if vector > 1 else [operands[1]]
    size = vector * BYTES[kind]
    address = t.address(operands[0], space)
    if semantics is None or space == "local":
        lines = [f"auto p = write_{space}({address}, {size}, {t.line});"]
    else:
        lines = [f"auto p = atomic_store({space}_space, {address}, {size}, {semantics}, {scope}, {t.line});"]
    for k, source in enumerate(sources):
        lines.append(t.store(f"p + {k * BYTES[kind]}", source, kind))
    return f"{{ {' '.join(lines)} }}"


_ORDER = "{,.relaxed,.acquire,.release,.acq_rel}{,.cta,.cluster,.gpu,.sys}"
_ATOMIC = {
    "add": "old + b",
    "min": "b < old ? b : old",
    "max": "b > old ? b : old",
    "and": "old & b",
    "or": "old | b",
    "xor": "old ^ b",
    "exch": "b",
    "inc": "old >= b ? 0 : old + 1",
    "dec": "old == 0 || old > b ? b : old - 1",
    "cas": "old == b ? c : old",
}
_ATOMIC_SPACES = "{,.global,.shared,.shared::cta,.shared::cluster}"
_ATOMIC_TYPES = (
    "add.{u32,s32,u64,f32,f64}",
    "add.noftz.{f16,f16x2,bf16,bf16x2}",
    "{min,max}.{u32,s32,u64,s64}",
    "{and,or,xor}.{b32,b64}",
    "{inc,dec}.u32",
)


@form(
    *(f"atom{_ORDER}{_ATOMIC_SPACES}.{op}" for op in (*_ATOMIC_TYPES, "{exch,cas}.{b32,b64}", "cas.b16")),
    *(f"red{{,.relaxed,.release}}{{,.cta,.cluster,.gpu,.sys}}{_ATOMIC_SPACES}.{op}" for op in _ATOMIC_TYPES),
)
def _(t, name, operands):
    space, _, kind, semantics, scope = _access(name)
    op = next(p for p in name.split(".")[1:] if p in _ATOMIC)
    if name.startswith("red"):
        operands = ["_", *operands]
    c_type = C_TYPE[kind]
    lines = [f"auto b = {t.read(operands[2], kind)};"]
    if op == "cas":
        lines.append(f"auto c = {t.read(operands[3], kind)};")
    address = t.address(operands[1], space)
    lines.append(
        f"auto p = atomic_begin({space}_space, {address}, {BYTES[kind]}, {semantics or 'relaxed'}, {scope}, {t.line});"
    )
    lines.append(f"auto old = get<{c_type}>(p); auto now = ({c_type})({_ATOMIC[op]}); set(p, now);")
    changed = "old == b" if op == "cas" else "true"
    lines.append(f"atomic_end(p, {semantics or 'relaxed'}, {scope}, {changed});")
    if operands[0] != "_":
        lines.append(t.write(operands[0], "old", kind))
    return f"{{ {' '.join(lines)} }}"


@form("fence.{acq_rel,sc}.{cta,cluster,gpu,sys}", "membar.{cta,gl,sys}")
def _(t, name, operands):
    scope = name.rsplit(".", 1)[1]
    return f"fence({'gpu' if scope == 'gl' else scope});"


@form("griddepcontrol.{wait,launch_dependents}")
def _(t, name, operands):
    return "wait_for_launch_before();" if name.endswith("wait") else "let_next_launch_begin();"


# ---- mbarriers and asynchronous stores

_BARRIER = "shared{,::cta}.b64"


@form(f"mbarrier.init.{_BARRIER}", f"mbarrier.inval.{_BARRIER}")
def _(t, name, operands):
    address = t.address(operands[0], "shared")
    if ".inval" in name:
        return f"mbarrier_invalidate({address}, {t.line});"
    return f"mbarrier_init({address}, {t.read(operands[1], 'u32')}, {t.line});"


@form(
    f"mbarrier.arrive{{,.expect_tx}}{{,.release.cta,.release.cluster,.relaxed.cta,.relaxed.cluster}}.{_BARRIER}",
    "mbarrier.arrive{,.expect_tx}.{release,relaxed}.cluster.shared::cluster.b64",
)
def _(t, name, operands):
    if operands[0] != "_":
        raise Refused(f"{name} with a state ({t.where()}): wait for a parity")
    _, _, _, semantics, scope = _access(name)
    last = t.read(operands[2], "u32") if len(operands) > 2 else None
    count, expected = ("1", last) if ".expect_tx" in name else (last or "1", "0")
    releases = "false" if semantics == "relaxed" else "true"
    scope = scope if semantics else "cta"
    return f"mbarrier_arrive({t.address(operands[1], 'shared')}, {count}, {expected}, {releases}, {scope}, {t.line});"


@form("mbarrier.{expect_tx,complete_tx}.relaxed.{cta,cluster}.shared::{cta,cluster}.b64")
def _(t, name, operands):
    sign = "" if ".expect_tx" in name else "-"
    return f"mbarrier_bytes({t.address(operands[0], 'shared')}, {sign}(int64_t){t.read(operands[1], 'u32')}, {t.line});"


@form(
    f"mbarrier.{{test_wait,try_wait}}.parity{{,.acquire.cta,.acquire.cluster,.relaxed.cta,.relaxed.cluster}}.{_BARRIER}"
)
def _(t, name, operands):
    _, _, _, semantics, scope = _access(name)
    acquires, scope = "false" if semantics == "relaxed" else "true", scope if semantics else "cta"
    address, parity = t.address(operands[1], "shared"), t.read(operands[2], "u32")
    return t.write(operands[0], f"mbarrier_wait({address}, {parity}, {acquires}, {scope}, {t.line})", "pred")


@form("st.async{,.weak}.shared::cluster.mbarrier::complete_tx::bytes{,.v2,.v4}.{b32,u32,s32,f32,b64,u64,s64,f64}")
def _(t, name, operands):
    _, vector, kind, _, _ = _access(name)
    sources = t.elements(operands[1]) if vector > 1 else [operands[1]]
    lines = ["alignas(16) uint8_t data[16];"]
    lines += [t.store(f"data + {k * BYTES[kind]}", source, kind) for k, source in enumerate(sources)]
    to, barrier = t.address(operands[0], "shared"), t.address(operands[2], "shared")
    return f"{{ {' '.join(lines)} store_async({to}, {vector * BYTES[kind]}, data, {barrier}, {t.line}); }}"


@form("fence.mbarrier_init.release.cluster", "fence.acquire.sync_restrict::shared::cluster.cluster")
def _(t, name, operands):
    return (
        "fence_shared();" if ".acquire" in name else ";"
    )  # a release by a barrier of the cluster is asked for besides


@form("cvta{,.to}.{global,local,const}.u64")
def _(t, name, operands):
    return t.write(operands[0], t.read(operands[1], "u64"), "u64")


@form("cvta.shared.u64", "cvta.shared::cta.u64", "cvta.shared::cluster.u64")
def _(t, name, operands):
    return t.write(operands[0], f"shared_to_generic({t.read(operands[1], 'u64')}, {t.line})", "u64")


@form("cvta.to.shared.u64", "cvta.to.shared::cta.u64", "cvta.to.shared::cluster.u64")
def _(t, name, operands):
    return t.write(operands[0], f"generic_to_shared({t.read(operands[1], 'u64')}, {t.line})", "u64")


@form("mapa.shared::cluster.{u32,u64}", "mapa.{u64}")
def _(t, name, operands):
    kind = name.rsplit(".", 1)[1]
    call = "map_shared" if "shared" in name else "map_generic"
    arguments = f"{t.read(operands[1], kind)}, {t.read(operands[2], 'u32')}, {t.line}"
    return t.write(operands[0], f"({C_TYPE[kind]}){call}({arguments})", kind)


@form("isspacep.{global,shared,local}", "isspacep.shared::cta")
def _(t, name, operands):
    space = name.split(".")[1].split(":")[0]
    return t.write(operands[0], f"is_{space}({t.read(operands[1], 'u64')})", "pred")


@form("prefetch{.global,}.{L1,L2}", "prefetchu.L1", "discard.global.L2", "nanosleep.u32")
def _(t, name, operands):
    return f"spin_yield({t.line});" if name.startswith("nanosleep") else ";"


@form(*(f"cp.async.{cache}.shared{{,::cta}}.global{{,.L2::64B,.L2::128B,.L2::256B}}" for cache in ("ca", "cg")))
def _(t, name, operands):
    size = int(operands[2], 0)
    if ".cg." in name and size != 16 or size not in (4, 8, 16):
        raise Refused(f"{name} of {size} bytes")
    used = t.read(operands[3], "u32") if len(operands) > 3 else str(size)
    to, source = t.address(operands[0], "shared"), t.address(operands[1], "global")
    return f"copy_async({to}, {source}, {size}, {used}, {t.line});"


@form("cp.async.commit_group", "cp.async.wait_all", "cp.async.wait_group")
def _(t, name, operands):
    if name.endswith("commit_group"):
        return "copy_commit();"
    return f"copy_wait({'-1' if name.endswith('all') else int(operands[0], 0)}, {t.line});"


# ---- control


@form("bra", "bra.uni")
def _(t, name, operands):
    return t.jump(operands[0])


@form("ret", "ret.uni", "exit")
def _(t, name, operands):
    return "leave();" if name == "exit" and not t.kernel else "return;"


@form("trap")
def _(t, name, operands):
    return f'fail("trap", {t.line});'


@form("bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.arrive", "barrier.arrive", "barrier.arrive.aligned")
def _(t, name, operands):
    number = t.read(operands[0], "u32")
    count = t.read(operands[1], "u32") if len(operands) > 1 else "0"
    return f"block_barrier({number}, {count}, {'true' if 'arrive' in name else 'false'}, 0, false, {t.line});"


@form("{bar,barrier}.red.popc.u32", "{bar,barrier}.red.{and,or}.pred")
def _(t, name, operands):
    how = {"popc": 1, "and": 2, "or": 3}[next(p for p in name.split(".") if p in ("popc", "and", "or"))]
    number = t.read(operands[1], "u32")
    count = t.read(operands[2], "u32") if len(operands) > 3 else "0"
    vote = t.read(operands[-1], "pred")
    call = f"block_barrier({number}, {count}, false, {how}, {vote}, {t.line})"
    return t.write(operands[0], call if how == 1 else f"(bool){call}", "u32" if how == 1 else "pred")


@form("barrier.cluster.arrive{,.release,.relaxed}{,.aligned}")
def _(t, name, operands):
    return f"cluster_arrive({'false' if '.relaxed' in name else 'true'}, {t.line});"


@form("barrier.cluster.wait{,.acquire}{,.aligned}")
def _(t, name, operands):
    return f"cluster_wait({t.line});"


# ---- warps


def _collective(t, name, compute, mask, inputs, outputs):
    lines = [f"current->in[{k}] = {value};" for k, value in enumerate(inputs)]
    lines.append(f'warp_collective({compute}, "{name}", {mask}, {t.line});')
    lines += [t.write(target, f"current->out[{k}]", "u64") for k, target in enumerate(outputs) if target.strip() != "_"]
    return f"{{ {' '.join(lines)} }}"


@form("bar.warp.sync")
def _(t, name, operands):
    return _collective(t, name, "warp_sync", t.read(operands[0], "u32"), [], [])


@form("shfl.sync.{idx,up,down,bfly}.b32")
def _(t, name, operands):
    targets = operands[0].split("|")
    inputs = [t.read(operand, "u32") for operand in operands[1:4]]
    return _collective(t, name, f"shuffle_{name.split('.')[2]}", t.read(operands[4], "u32"), inputs, targets)


@form("vote.sync.{all,any,uni}.pred", "vote.sync.ballot.b32")
def _(t, name, operands):
    vote = operands[1]
    inputs = [t.read(vote, "pred")]
    return _collective(t, name, f"vote_{name.split('.')[2]}", t.read(operands[2], "u32"), inputs, [operands[0]])


@form("match.{any,all}.sync.{b32,b64}")
def _(t, name, operands):
    inputs = [t.read(operands[1], name[-3:])]
    targets = operands[0].split("|")
    return _collective(t, name, f"match_{name.split('.')[1]}", t.read(operands[2], "u32"), inputs, targets)


@form("redux.sync.{add,min,max}.{u32,s32}", "redux.sync.{and,or,xor}.b32")
def _(t, name, operands):
    _, _, op, kind = name.split(".")
    compute = f"reduce_{op}" + (f"_{kind}" if op in ("min", "max") else "")
    return _collective(t, name, compute, t.read(operands[2], "u32"), [t.read(operands[1], "b32")], [operands[0]])


@form("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared{,::cta}.b16")
def _(t, name, operands):
    count = int(re.search(r"\.x(\d)", name)[1])
    compute = f"load_matrix<{count}, {'true' if '.trans' in name else 'false'}>"
    inputs = [t.address(operands[1], "shared"), str(t.line)]
    return _collective(t, name, compute, "~0u", inputs, t.elements(operands[0]))


@form(
    "mma.sync.aligned.m16n8k16.row.col.f32.{bf16.bf16,f16.f16}.f32",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
    "mma.sync.aligned.m16n8k8.row.col.f32.{bf16.bf16,f16.f16,tf32.tf32}.f32",
    "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16",
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32",
)
def _(t, name, operands):
    parts = name.split(".")
    k = int(parts[3].split("k")[1])
    result, kind = parts[6], parts[7]
    compute = f"multiply_matrices<{C_TYPE[kind] if kind != 'tf32' else 'tf32'}, {C_TYPE[result]}, {k}>"
    inputs = [t.read(r, "b32") for operand in operands[1:] for r in t.elements(operand)]
    return _collective(t, name, compute, "~0u", inputs, t.elements(operands[0]))


# ---- the translator

SPECIAL = {f"%{a}.{x}": f"current->{b}[{k}]" for a, b in (("tid", "tid"),) for k, x in enumerate("xyz")}
SPECIAL |= {f"%ctaid.{x}": f"current->block->index[{k}]" for k, x in enumerate("xyz")}
SPECIAL |= {f"%ntid.{x}": f"launch.block[{k}]" for k, x in enumerate("xyz")}
SPECIAL |= {f"%nctaid.{x}": f"launch.grid[{k}]" for k, x in enumerate("xyz")}
SPECIAL |= {f"%cluster_ctaid.{x}": f"(current->block->index[{k}] % launch.cluster[{k}])" for k, x in enumerate("xyz")}
SPECIAL |= {f"%cluster_nctaid.{x}": f"launch.cluster[{k}]" for k, x in enumerate("xyz")}
SPECIAL |= {f"%clusterid.{x}": f"(current->block->index[{k}] / launch.cluster[{k}])" for k, x in enumerate("xyz")}
SPECIAL |= {f"%nclusterid.{x}": f"(launch.grid[{k}] / launch.cluster[{k}])" for k, x in enumerate("xyz")}
SPECIAL |= {
    "%laneid": "current->lane",
    "%warpid": "current->number / 32",
    "%cluster_ctarank": "current->block->rank",
    "%cluster_nctarank": "launch.cluster[0] * launch.cluster[1] * launch.cluster[2]",
    "%lanemask_eq": "(1u << current->lane)",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_le": "(~0u >> (31 - current->lane))",
    "%lanemask_ge": "(~0u << current->lane)",
    "%lanemask_gt": "(~1u << current->lane)",
    "%dynamic_smem_size": "launch.dynamic_shared",
    "%total_smem_size": "launch.shared",
    "WARP_SZ": "32",
}


@functools.cache
def cpp_name(name):
    return re.sub(r"\W", lambda match: {"%": "r_", "$": "l_", ".": "_dot_"}.get(match[0], "_"), name)


class Translator:
    """One PTX text; ``module()`` gives the C++."""

    def __init__(self, ptx):
        ptx = re.sub(r"/\*.*?\*/", " ", ptx, flags=re.S)
        ptx = re.sub(r"//[^\n]*", "", ptx)
        self.text = re.sub(r"\.section\s+\.\w+\s*\{.*?\}", "", ptx, flags=re.S)
        self.files, self.shared, self.globals = {}, {}, {}
        self.functions, self.kernels, self.variables = {}, {}, []
        self.dynamic = set()
        self.line = 0
        self.kernel = None
        self.bodies = []

    def module(self):
        for item in self._items():
            self._item(item)
        code = ['#include "runtime.h"']
        code += [f'extern "C" {{ uint8_t* {name}; }}' for name, *_ in self.variables]
        code += [f"static void {cpp_name('f_' + name)}({signature});" for name, signature in self.functions.items()]
        window = self._shared_offsets()
        for head, name, params, body, kernel in self.bodies:
            code.append(self._function(head, name, params, body, kernel, window))
        return Module("\n".join(code) + "\n", self.kernels, self.files, self.variables, self.gaps)

    # ---- top level

    def _items(self):
        text, at = self.text, 0
        while True:
            match = re.compile(r"\s*").match(text, at)
            at = match.end()
            if at >= len(text):
                return
            line = re.compile(r"\.(version|target|address_size|file)\b[^\n]*").match(text, at)
            if line:
                yield line[0]
                at = line.end()
                continue
            end = re.compile(r"[;{]").search(text, at)
            if not end:
                raise Refused(f"module item: {text[at : at + 60]!r}")
            stop = end.start()
            head = text[at:stop]
            if end[0] == "{" and (".entry" in head or ".func" in head):
                stop = _closing(text, stop)
                yield text[at : stop + 1]
                at = stop + 1
            else:  # a variable, whose initialiser may hold braces
                stop = text.index(";", at)
                yield text[at:stop]
                at = stop + 1

    def _item(self, item):
        if item.startswith((".version", ".target", ".address_size")):
            return
        if item.startswith(".file"):
            number, name = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', item).groups()
            self.files[int(number)] = name
            return
        function = re.match(r"((?:\.(?:visible|weak|extern|common)\s+)*)\.(entry|func)\s*", item)
        if function:
            self._declare_function(item, function)
        else:
            self._declare_variable(item)

    def _declare_function(self, item, match):
        rest = item[match.end() :]
        returned = []
        if rest.startswith("("):
            stop = _closing(rest, 0)
            returned, rest = self._parameters(rest[1:stop]), rest[stop + 1 :].lstrip()
        name = re.match(r"[\w$%]+", rest)[0]
        rest = rest[len(name) :].lstrip()
        params = []
        if rest.startswith("("):
            stop = _closing(rest, 0)
            params, rest = self._parameters(rest[1:stop]), rest[stop + 1 :]
        head, brace, body = rest.partition("{")
        if match[2] == "func":
            names = [f"uint8_t* {cpp_name(p[0])}" for p in returned + params]
            if ".extern" in match[1]:
                if name not in ("vprintf", "__assertfail"):
                    raise Refused(f"external function {name}")
                return
            self.functions[name] = ", ".join(names)
            if brace:
                self.bodies.append((head, name, returned + params, body[:-1], None))
            return
        offsets, offset = [], 0
        for _, size, align in params:
            offset = -(-offset // align) * align
            offsets.append((offset, size))
            offset += size
        kernel = Kernel(name, offsets, asynchronous="st.async" in self.text)
        found = re.search(r"\.reqnctapercluster\s+([\d,\s]+)", head)
        if found:
            sizes = [int(n) for n in found[1].split(",")]
            kernel.cluster = tuple(sizes + [1] * (3 - len(sizes)))
        found = re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", head)
        if found:
            kernel.max_threads = 1
            for n in found[1].split(","):
                kernel.max_threads *= int(n)
        self.kernels[name] = kernel
        self.bodies.append((head, name, params, body[:-1], kernel))

    @staticmethod
    def _parameters(text):
        """(name, bytes, alignment) of each parameter."""
        found = []
        for part in filter(None, (p.strip() for p in text.split(","))):
            part = re.sub(r"\.ptr\s+(\.(?!align)\w+\s+)?(\.align\s+\d+\s+)?", "", part)  # a hint about a pointer
            match = re.match(r"\.(?:param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?", part)
            if not match:
                raise Refused(f"parameter {part!r}")
            align, kind, name, count = match.groups()
            size = BYTES[kind] * int(count or 1)
            found.append((name, size, int(align or BYTES[kind])))
        return found

    def _declare_variable(self, item):
        match = re.match(
            r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared)\s+(?:\.align\s+(\d+)\s+)?"
            r"(?:\.attribute\([^)]*\)\s+)?\.(\w+)\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
            item.strip(),
            re.S,
        )
        if not match:
            raise Refused(f"variable {item.strip()[:80]!r}")
        space, align, kind, name, dims, initial = match.groups()
        count = 1
        for n in re.findall(r"\[(\d*)\]", dims):
            count *= int(n or 0)
        size = BYTES[kind] * count
        if space == "shared":
            if size == 0:
                self.dynamic.add(name)
            self.shared[name] = (size, max(int(align or 1), BYTES[kind]))
            return
        data = None if initial is None else _initial_bytes(initial, kind, size)
        if data is None and space == "const":
            data = bytes(size)
        self.globals[name] = "v_" + cpp_name(name)
        self.variables.append(("v_" + cpp_name(name), name, size, data if data is not None else bytes(size)))

    def _shared_offsets(self):
        """Offset of every shared variable in the block's window; the dynamic array comes last, at the window's end."""
        for _, _, _, body, _ in self.bodies:  # shared variables may be declared in a body
            for found in re.findall(r"(\.shared\s+[^;]*);", body):
                if re.match(r"\.shared\s+(\.align|\.b|\.f|\.u|\.s)", found):
                    self._declare_variable(found)
        end, offsets, self.gaps = 0, {}, []
        for name, (size, align) in self.shared.items():
            if name not in self.dynamic:
                offset = -(-(end + GAP * bool(end)) // align) * align
                offsets[name] = (offset, size)
                self.gaps += [end, offset] if end else []
                end = offset + size
        offset = -(-(end + GAP * bool(end)) // 128) * 128
        self.gaps += [end, offset] if end else []
        for name in self.dynamic:
            offsets[name] = (offset, 0)
        self.offsets = offsets
        return offset

    # ---- bodies

    def _function(self, head, name, params, body, kernel, window):
        self.kernel = kernel
        self.params = {}
        self.line = 0
        self.labels_seen = set()
        if kernel:
            kernel.window = window
            kernel.shared = sum(
                size
                for variable, (_, size) in self.offsets.items()
                if re.search(rf"(?<![\w$]){re.escape(variable)}\b", body)
            )
            for (param, _, _), (offset, _) in zip(params, kernel.params, strict=True):
                self.params[param] = f"(params + {offset})"
            lines = [f'extern "C" void {cpp_name("k_" + name)}(uint8_t* params) {{']
        else:
            for param, _, _ in params:
                self.params[param] = cpp_name(param)
            lines = [f"static void {cpp_name('f_' + name)}({self.functions[name]}) {{"]
        self.locals, self.widths = set(), {}
        for piece in _statements(body):
            lines.append(self._piece(piece))
        lines.append("}")
        return "\n".join(lines)

    def _piece(self, piece):
        if piece in "{}":
            return piece
        if piece.startswith((".loc ", ".loc\t")):
            _, file, line = piece.split(None, 3)[:3]
            if int(line):
                self.line = int(file) << 20 | int(line)
            return ""
        if piece.endswith(":"):
            self.labels_seen.add(piece[:-1])
            return f"{cpp_name(piece[:-1])}:;"
        if piece.startswith(".reg"):
            return self._registers(piece)
        if piece.startswith(".local"):
            align, kind, name, count = re.match(
                r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)(?:\[(\d+)\])?", piece
            ).groups()
            self.locals.add(name)
            return f"alignas({align or BYTES[kind]}) uint8_t {cpp_name(name)}[{BYTES[kind] * int(count or 1)}];"
        if piece.startswith(".param"):
            ((name, size, align),) = self._parameters(piece)
            self.params[name] = cpp_name(name)
            return f"alignas({align}) uint8_t {cpp_name(name)}[{size}];"
        if piece.startswith((".pragma", ".shared")):
            return ""
        return self._instruction(piece)

    def _registers(self, piece):
        kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", piece, re.S).groups()
        if kind not in BYTES:
            raise Refused(f"registers of type .{kind}")
        c_type = "bool" if kind == "pred" else f"uint{max(16, 8 * BYTES[kind])}_t"
        declared = []
        for name in (n.strip() for n in names.split(",")):
            many = re.match(r"(.*)<(\d+)>$", name)
            if many:
                declared += [cpp_name(f"{many[1]}{k}") for k in range(int(many[2]))]
            else:
                declared.append(cpp_name(name))
        self.widths.update(dict.fromkeys(declared, 1 if kind == "pred" else max(2, BYTES[kind])))
        return f"{c_type} {', '.join(declared)};"

    def _instruction(self, text):
        guard = re.match(r"@(!?)([\w$%]+)\s+", text)
        if guard:
            text = text[guard.end() :]
        name, _, rest = text.strip().partition(" ") if " " in text.strip() else (text.strip(), "", "")
        if "\t" in name:
            name, _, more = name.partition("\t")
            rest = more + " " + rest
        if name in ("call", "call.uni"):
            code = self._call(rest)
        else:
            if name not in FORMS:
                raise Refused(f"instruction {name} ({self.where()}: {text.strip()})")
            USED.add(name)
            code = FORMS[name](self, name, _operands(rest))
        return f"if ({guard[1]}{cpp_name(guard[2])}) {{ {code} }}" if guard else code

    def _call(self, rest):
        parts = _operands(rest)
        returned = parts.pop(0) if parts[0].startswith("(") else "()"
        name, arguments = parts[0], parts[1] if len(parts) > 1 else "()"
        names = [p.strip() for p in (returned[1:-1] + "," + arguments[1:-1]).split(",") if p.strip()]
        values = [self.params[n] for n in names]
        if name == "vprintf":
            return f"print({', '.join(values)});"
        if name == "__assertfail":
            return f"assert_fail({', '.join(values)}, {self.line});"
        if name not in self.functions:
            raise Refused(f"call of {name} ({self.where()})")
        return f"{cpp_name('f_' + name)}({', '.join(values)});"

    def where(self):
        return f"{self.files.get(self.line >> 20, '?')}:{self.line & 0xFFFFF}"

    def jump(self, label):
        label = label.strip()
        goto = f"goto {cpp_name(label)};"
        return f"loop_step({self.line}); {goto}" if label in self.labels_seen else goto  # backwards: may never end

    # ---- operands

    def read(self, operand, kind):
        """C++ expression of ``operand`` as type ``kind``."""
        operand, c_type = operand.strip(), C_TYPE[kind]
        if operand.startswith("!"):
            return f"(!{self.read(operand[1:], kind)})"
        if operand in SPECIAL:
            return f"({c_type})({SPECIAL[operand]})"
        if re.match(r"0[fF][0-9a-fA-F]{8}$", operand):
            return f"BITS({c_type}, 0x{operand[2:]}u)"
        if re.match(r"0[dD][0-9a-fA-F]{16}$", operand):
            return f"BITS({c_type}, 0x{operand[2:]}ull)"
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", operand):
            number = int(operand.rstrip("U"), 0) & 0xFFFFFFFFFFFFFFFF
            if c_type in ("float", "double", "half", "bfloat", "half2", "bfloat2"):
                return f"as<{c_type}>((uint{8 * BYTES[kind]}_t){number}ull)"
            return f"({c_type}){number}ull"
        symbol = re.match(r"([\w$%.]+)\s*(?:\+\s*(-?\d+))?$", operand)
        if symbol and self._symbol(symbol[1]):
            return f"({c_type})({self._symbol(symbol[1])} + {symbol[2] or 0})"
        if operand.startswith("%") and operand not in SPECIAL and ("." in operand or operand in ("%clock", "%clock64")):
            raise Refused(f"special register {operand} ({self.where()})")
        register = cpp_name(operand)
        self._wide_enough(register, kind)
        if kind in ("f32", "f64"):
            return f"BITS({c_type}, (uint{8 * BYTES[kind]}_t){register})"
        return f"as<{c_type}>({register})" if kind in FLOATS else f"({c_type}){register}"

    def _symbol(self, name):
        if name in self.offsets:
            return str(self.offsets[name][0])
        if name in self.globals:
            return f"(uint64_t){self.globals[name]}"
        if name in self.locals:
            return f"(uint64_t){cpp_name(name)}"
        if name in self.params:  # the address of a parameter: an array passed by value
            return f"(uint64_t){self.params[name]}"
        return None

    def write(self, operand, value, kind):
        """C++ statement: the register becomes ``value``, which is of type ``kind``; signed ones extend their sign."""
        register = cpp_name(operand.strip())
        if kind in ("f32", "f64"):
            self._wide_enough(register, kind)
            return f"{register} = BITS(uint{8 * BYTES[kind]}_t, {value});"
        return f"put({register}, {value});" if kind in FLOATS else f"{register} = {value};"

    @staticmethod
    def load(operand, place, kind):
        """C++ statement: the register becomes what is in memory at ``place``."""
        return f"{cpp_name(operand)} = *({_stored(kind)}*)({place});"

    def store(self, place, operand, kind):
        return f"*({_stored(kind)}*)({place}) = {self.read(operand, _bits(kind))};"

    def _wide_enough(self, register, kind):
        if self.widths.get(register, 8) < BYTES.get(kind, 0):
            raise Refused(f"a register of {self.widths[register]} bytes for .{kind} ({self.where()})")

    @staticmethod
    def elements(operand):
        return [part.strip() for part in operand.strip("{} ").split(",")]

    def address(self, operand, space):
        """Address expression of ``[a+b]``: 64 bits, an offset in the window for shared memory."""
        inner = operand.strip()[1:-1].strip()
        base, _, offset = inner.partition("+")
        base, offset = base.strip(), int(offset or "0", 0)
        value = base if re.match(r"\d", base) else f"(uint64_t){self._symbol(base) or cpp_name(base)}"
        return f"({value} + ({offset}))" if offset else f"({value})"

    def param_address(self, operand):
        inner = operand.strip()[1:-1]
        base, _, offset = inner.partition("+")
        base = base.strip()
        if base not in self.params:
            return self.address(operand, "param").join(("(uint8_t*)", ""))
        return f"{self.params[base]} + {int(offset or '0')}"


def _bits(kind):
    """The type that moves the same bytes as integers."""
    return f"b{8 * BYTES[kind]}" if kind in FLOATS else kind


def _stored(kind):
    return f"stored_{C_TYPE[_bits(kind)]}"


def _closing(text, start):
    """Index of the bracket that closes the one at ``start``."""
    pair, depth = {"(": "[()]", "{": "[{}]"}[text[start]], 0
    for bracket in re.compile(pair).finditer(text, start):
        depth += 1 if bracket[0] == text[start] else -1
        if depth == 0:
            return bracket.start()
    raise Refused("unbalanced brackets")


_STATEMENT = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<loc>\.loc\s[^\n]*)|(?P<label>[\w$%]+:)|(?P<code>[^;]+);|;)", re.S)


def _statements(body):
    """Braces, ``.loc`` lines, labels and instructions, one after another."""
    at, end = 0, len(body.rstrip())
    while at < end:
        match = _STATEMENT.match(body, at)
        if not match:
            raise Refused(f"statement {body[at : at + 60]!r}")
        at = match.end()
        text = next((group for group in match.groups() if group), None)
        if text:
            yield text.strip()


_SEPARATOR = re.compile(r"[,\[\](){}]")


def _operands(text):
    """Split at commas outside brackets and braces."""
    parts, depth, begin, text = [], 0, 0, text.strip()
    for found in _SEPARATOR.finditer(text):
        letter = found[0]
        if letter != ",":
            depth += 1 if letter in "[{(" else -1
        elif depth == 0:
            parts.append(text[begin : found.start()].strip())
            begin = found.end()
    last = text[begin:].strip()
    return [*parts, last] if last else parts


def _initial_bytes(text, kind, size):
    data = b""
    for word in re.findall(r"[^\s,{}]+", text):
        if re.match(r"0[fFdD][0-9a-fA-F]+$", word):
            number = int(word[2:], 16)
        elif re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", word):
            number = int(word.rstrip("U"), 0)
        else:
            raise Refused(f"initial value {word!r}")
        data += (number & (1 << 8 * BYTES[kind]) - 1).to_bytes(BYTES[kind], "little")
    return data.ljust(size, b"\0")


@functools.cache
def translate(ptx):
    """C++ of a PTX text, with what a launch must know. Raises Refused, naming what is unknown."""
    return Translator(ptx).module()
