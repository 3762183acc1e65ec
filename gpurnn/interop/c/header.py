"""The text of a header around what a ``Builder`` holds."""

from __future__ import annotations

from typing import NamedTuple

from ... import __version__
from .building import Builder
from .sources import functions


class Signature(NamedTuple):
    """model: the name of its class. inputs: the numbers that a step reads. ids: class numbers are 0 to ids - 1, for a
    model that reads those; else None. outputs: the numbers that a step gives."""

    model: str
    inputs: int | None
    ids: int | None
    outputs: int


def header_text(b: Builder, signature: Signature) -> str:
    """The whole file."""
    name, upper = b.name, b.name.upper()
    step, sizes = _step(b, signature)
    return "\n".join(
        [
            *_explanation(b, signature),
            f"#ifndef {upper}_H",
            f"#define {upper}_H",
            "",
            "#include <stddef.h>",
            "#include <stdint.h>",
            "#include <string.h>",
            "",
            *sizes,
            "",
            "typedef struct {",
            *(f"    {one}" for one in b.members),
            "    // what a step needs while it runs",
            *(f"    {one}" for one in b.memory() or ["float unused[1];"]),
            f"}} {name}_state;",
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            "",
            "// Prepares a state, whatever is in it. Call it once.",
            f"void {name}_init({name}_state *state);",
            "",
            "// Begins another sequence.",
            f"void {name}_reset({name}_state *state);",
            "",
            *_promise(signature),
            f"{step};",
            "",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            f"#endif  // {upper}_H",
            "",
            *_implementation(b, signature, step),
        ]
    )


def _explanation(b, signature):
    name, upper = b.name, b.name.upper()
    how = "float32" if b.weights == "float32" else f"int8, activations {b.activations}"
    y = f"{'x' if signature.ids is None else 'id'}, y"
    yield f"// {name}: a {signature.model} as C99, timestep by timestep, without any library."
    yield f"// Made by gpurnn {__version__}. Weights in {how}: {b.bytes} bytes of constants."
    yield "//"
    yield "// One C or C++ file has the functions and the constants:"
    yield "//"
    yield f"//     #define {upper}_IMPLEMENTATION"
    yield "//"
    yield "// before it includes this header; all others only include it. Then"
    yield "//"
    yield f"//     {name}_state state;"
    yield f"//     {name}_init(&state);"
    yield f"//     {name}_step(&state, {y});"
    yield "//"
    yield "// A program may have any number of states, and may copy, read and change them between two steps."


def _promise(signature):
    if signature.ids is None:
        return ["// One timestep. y may be x."]
    return [
        "// One timestep. Returns 0; or -1, with nothing changed, where id is not from 0 to the number of classes - 1.",
    ]


def _step(b, signature):
    """The declaration of the step, and the constants that give its sizes."""
    name, upper = b.name, b.name.upper()
    outputs = f"#define {upper}_OUTPUTS {signature.outputs}  // numbers in y"
    if signature.ids is None:
        sizes = [f"#define {upper}_INPUTS {signature.inputs}  // numbers in x", outputs]
        return f"void {name}_step({name}_state *state, const float *x, float *y)", sizes
    sizes = [f"#define {upper}_IDS {signature.ids}  // classes of the input", outputs]
    return f"int {name}_step({name}_state *state, int32_t id, float *y)", sizes


def _implementation(b, signature, step):
    name, upper = b.name, b.name.upper()
    yield f"#if defined({upper}_IMPLEMENTATION) && !defined({upper}_IMPLEMENTED)"
    yield f"#define {upper}_IMPLEMENTED"
    yield ""
    yield "#if defined(__GNUC__)"
    yield f"#define {upper}_ALIGNED __attribute__((aligned(64)))"
    yield "#else"
    yield f"#define {upper}_ALIGNED"
    yield "#endif"
    yield "#if defined(__GNUC__) && __GNUC__ >= 8 && !defined(__clang__)"
    yield f'#define {upper}_LOOP _Pragma("GCC unroll 1")'
    yield "#else"
    yield f"#define {upper}_LOOP"
    yield "#endif"
    yield ""
    yield functions(b.functions, name)
    yield ""
    for text in b.arrays:
        yield text
        yield ""
    yield f"void {name}_reset({name}_state *state) {{"
    yield from (f"    {line}" for line in b.resets or ["(void)state;"])
    yield "}"
    yield ""
    yield f"void {name}_init({name}_state *state) {{"
    yield "    memset(state, 0, sizeof *state);"
    yield f"    {name}_reset(state);"
    yield "}"
    yield ""
    yield f"{step} {{"
    if not any("state->" in line for line in b.lines):
        yield "    (void)state;"
    if signature.ids is not None:
        yield f"    if (id < 0 || id >= {signature.ids}) return -1;"
    yield from b.lines
    if signature.ids is not None:
        yield "    return 0;"
    yield "}"
    yield f"#endif  // {upper}_IMPLEMENTATION"
    yield ""
