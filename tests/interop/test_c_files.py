"""Headers as files: their names, what is refused, other compilers and languages, ``gpurnn export RUN model.h``."""

import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from c_models import COMPILER, WARNINGS, Compiled, assert_as_float64, inputs, needs_compiler, outputs_of
from c_zoo import FORMS, build
from click.testing import CliRunner
from hostile import good_files

import gpurnn
from gpurnn.cli import main
from gpurnn.interop.c import export_c
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load


def text_of(model, path, **options):
    export_c(model, path, **options)
    return path.read_text(encoding="utf-8")


def gru(**options):
    return gpurnn.GRU(3, 4, **{"backend": "numpy", "seed": 1} | options)


# ---- bytes and names


def test_equal_models_make_equal_files(tmp_path):
    texts = {text_of(gru(backend=backend), tmp_path / "model.h") for backend in ("numpy", "cpu")}
    assert len(texts) == 1 and text_of(gru(seed=2), tmp_path / "model.h") not in texts
    assert str(tmp_path) not in texts.pop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.h"]


def test_weights_are_exact(tmp_path):
    """Each number in the file is the weight, to the bit; the smallest and the largest ones, too."""
    layer = gpurnn.Linear(4, 8, bias=False, backend="numpy")
    layer.params["weight"][0] = 1e-45, 3.4028235e38, -0.0, 1.17549435e-38
    text = text_of(layer, tmp_path / "model.h")
    start = text.index("{", text.index("static const float model_weight"))
    numbers = text[start + 1 : text.index("}", start)].replace("f", "").split(",")
    found = np.array([float(one) for one in numbers]).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), layer.params["weight"].T.ravel().view(np.uint32))


@pytest.mark.parametrize("file, name", [("my_net2.h", None), ("net.v2.h", None), ("größe.h", "size"), ("a b.h", "a_b")])
def test_names_begin_with_that_of_the_file(file, name, tmp_path):
    text = text_of(gru(), tmp_path / file, name=name)
    wanted = name or file.split(".")[0]
    assert f"void {wanted}_step({wanted}_state *state, const float *x, float *y);" in text
    assert f"#define {wanted.upper()}_INPUTS 3 " in text and text.isascii()


@pytest.mark.parametrize(
    "name", ["", "2x", "a-b", "int", "class", "größe", "_x", 'x"; system("ls', "a\nb", "restrict", 3]
)
def test_what_is_no_name(name, tmp_path):
    with pytest.raises(ValueError, match="name: expected letters"):
        export_c(gru(), tmp_path / "model.h", name=name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["int.h", "größe.h", "a b.h", "-.h", ".h", "2.h"])
def test_files_whose_names_are_none(file, tmp_path):
    with pytest.raises(ValueError, match="name: .* the name of the file begins .*: give name='model'"):
        export_c(gru(), tmp_path / file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hostile", ["*/ int x; /*", "\\", "a\nb", "??/", "größe", "-", "9", "__", "out0", "scratch"])
@needs_compiler
def test_names_of_layers_do_no_harm(hostile, tmp_path):
    model = gpurnn.Sequential({hostile: gru(learn_state=True), "x": gpurnn.Linear(4, 2, backend="numpy", seed=0)})
    x = inputs(model, 3)
    got = Compiled(tmp_path, {"net": (model.eval(), {})}).run("net", x, 2)
    double = gpurnn.Sequential(
        gru(learn_state=True, dtype="float64"), gpurnn.Linear(4, 2, backend="numpy", dtype="float64")
    )
    double.load_state_dict(dict(zip(double.state_dict(), model.state_dict().values(), strict=True)))
    assert_as_float64(got, outputs_of(model, x), outputs_of(double, x), hostile)


# ---- what is refused


class Own(gpurnn.Module):
    def __call__(self, x):
        return x


class Louder(gpurnn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


KW = {"backend": "numpy"}
REFUSED = {
    "0: a C file runs timestep by timestep, and a layer that runs backwards": lambda: gpurnn.Sequential(
        gpurnn.LSTM(3, 4, bidirectional=True, **KW)
    ),
    "model: a C file runs timestep by timestep": lambda: gru(reverse=True),
    r"1: Pooling\('attention'\) needs all timesteps": lambda: gpurnn.Sequential(
        gru(), gpurnn.Pooling(4, "attention", **KW)
    ),
    "model: Pooling of two directions needs all": lambda: gpurnn.Pooling(4, "last", directions=2, **KW),
    "model: Attention cannot be exported to C: expected one of BatchNorm": lambda: gpurnn.Attention(3, 4, **KW),
    "model: LSTMCell cannot be exported": lambda: gpurnn.LSTMCell(3, 4, **KW),
    "1: Own cannot be exported": lambda: gpurnn.Sequential(gru(), Own(**KW)),
    "model: Louder cannot be exported": lambda: Louder(3, 4, **KW),
    "1: an Embedding reads class numbers": lambda: gpurnn.Sequential(gru(), gpurnn.Embedding(4, 2, **KW)),
    "model: no layer in it says how many numbers it reads": lambda: gpurnn.Dropout(0.5, **KW),
}


@pytest.mark.parametrize("words", REFUSED)
def test_models_that_cannot_run_step_by_step(words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_c(REFUSED[words](), tmp_path / "model.h")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_weights_that_are_not_finite_are_named(name, bad, weights, tmp_path):
    layer = gru(dtype="float64")
    layer.params[name].flat[0] = bad
    with pytest.raises(ValueError, match=f"^{name}: its numbers are not all finite in float32"):
        export_c(layer, tmp_path / "model.h", weights=weights)
    assert not list(tmp_path.iterdir())


def test_arguments(tmp_path):
    with pytest.raises(TypeError, match="model: expected a gpurnn layer or model, got int"):
        export_c(3, tmp_path / "model.h")
    with pytest.raises(ValueError, match="weights should be one of 'float32', 'int8', got 'int4'"):
        export_c(gru(), tmp_path / "model.h", weights="int4")
    with pytest.raises(ValueError, match="activations should be one of"):
        export_c(gru(), tmp_path / "model.h", weights="int8", activations="int8")
    with pytest.raises(ValueError, match="activations: 'int16' multiplies whole numbers: it needs weights='int8'"):
        export_c(gru(), tmp_path / "model.h", activations="int16")


def test_constants_that_float32_does_not_have(tmp_path):
    huge = gpurnn.cell(gates="z", name="huge")(lambda ax, ah, s: 1e300 * (ax.z + ah.z))
    with pytest.raises(ValueError, match="a cell's equations have the number 1e.300, which is beyond float32"):
        export_c(gpurnn.Recurrent(huge, 2, 2, **KW), tmp_path / "model.h")


# ---- other compilers, languages, options

ARM = "arm-linux-gnueabihf-gcc"
SOME = ["words", "own_everything", "tied", "heads_normed", "cell_slstm", "lstm"]
DRIVER = """#include <stdio.h>
int main(void) {{
    {name}_state state;
    {kind} x{dims};
    float y[{outputs}];
    {name}_init(&state);
    while (fread({x}, sizeof(x), 1, stdin) == 1) {{
        {name}_step(&state, x, y);
        fwrite(y, sizeof(y), 1, stdout);
    }}
    {name}_reset(&state);
    return 0;
}}
"""


def run_program(folder, name, options, command, emulator=()):
    """The outputs of a program that runs a model over its standard input."""
    model, source, program = build(name), folder / "main.c", folder / "main"
    export_c(model, folder / "net.h", **options)
    x = inputs(model, 9)
    F, ids = outputs_of(model, x).shape[1], x.dtype.kind != "f"
    given = {"kind": "int32_t" if ids else "float", "dims": "" if ids else f"[{x.shape[1]}]", "x": "&x" if ids else "x"}
    code = DRIVER.format(name="net", outputs=F, **given)
    source.write_text(f'#define NET_IMPLEMENTATION\n#include "net.h"\n{code}')
    subprocess.run([*command, *WARNINGS, "-o", program, source], check=True, cwd=folder, capture_output=True)
    done = subprocess.run(
        [*emulator, program], input=x.astype(np.int32 if ids else np.float32).tobytes(), capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b""), done.stderr[:2000]
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), F)


LANGUAGES = {
    "C++98": ["-x", "c++", "-std=c++98"],
    "C++17": ["-x", "c++", "-std=c++17"],
    "C with GNU's words": ["-std=gnu17"],
    "C without GNU's attributes": ["-std=c99", "-U__GNUC__"],
}


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_takes_it(language, tmp_path):
    for name in ("words", "own_everything"):
        for weights in ("float32", "int8"):
            export_c(build(name), tmp_path / f"{name}.h", weights=weights)
            source = f'#define {name.upper()}_IMPLEMENTATION\n#include "{name}.h"\n#include "{name}.h"\n'
            (tmp_path / "code.c").write_text(source)
            command = [COMPILER, *LANGUAGES[language], *WARNINGS, "-fsyntax-only", "code.c"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]


@needs_compiler
def test_other_files_only_include_it(tmp_path):
    """Two files with the header, one with its functions: no name twice."""
    export_c(gru(), tmp_path / "net.h")
    (tmp_path / "other.c").write_text(
        '#include "net.h"\nint main(void) { static net_state s; float v[4] = {0};\n'
        "net_init(&s); net_step(&s, v, v); return 0; }\n"
    )
    (tmp_path / "code.c").write_text('#define NET_IMPLEMENTATION\n#include "net.h"\n')
    command = [COMPILER, "-std=c99", *WARNINGS, "-nodefaultlibs", "code.c", "other.c", "-lc", "-o", "main"]  # no libm
    subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "main"], check=True)


@needs_compiler
@pytest.mark.parametrize("name", ["linear", "only_embedding"])
def test_the_program_that_a_header_shows_runs(name, tmp_path):
    """The lines of code in its first comment, in a program with the x, the id and the y that they name."""
    export_c(build(name), tmp_path / "net.h")
    shown = re.findall(r"^//     (.*)$", (tmp_path / "net.h").read_text(), re.M)
    given = f"{'float x[NET_INPUTS] = {0}' if name == 'linear' else 'int32_t id = 0'}; float y[NET_OUTPUTS];"
    lines = [shown[0], '#include "net.h"', "int main(void) {", given, *shown[1:], "return y[0] != y[0]; }"]
    (tmp_path / "main.c").write_text("\n".join(lines) + "\n")
    subprocess.run([COMPILER, "-std=c99", *WARNINGS, "main.c", "-o", "main"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "main"], check=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_sanitizers_find_nothing(compiler, tmp_path):
    """Addresses, undefined behavior, conversions; and results have the same bits whatever the compiler optimizes."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    checks = "-fsanitize=address,undefined,float-cast-overflow,float-divide-by-zero"
    for name, options in zip(SOME, itertools.cycle(FORMS.values())):
        command = [compiler, "-std=c99", "-O1", "-g", checks, "-fno-sanitize-recover=all"]
        got = run_program(tmp_path, name, options, command)
        plain = run_program(tmp_path, name, options, [compiler, "-std=c99", "-O0"])
        np.testing.assert_array_equal(got, plain)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which("qemu-arm")), reason=f"needs {ARM} and qemu-arm")
def test_another_processor_gives_the_same_bits(tmp_path):
    """A 32-bit ARM, emulated: nothing here depends on the size of a word, on libm, or on the compiler."""
    for name, options in zip(SOME, itertools.cycle(FORMS.values())):
        got = run_program(tmp_path, name, options, [ARM, "-std=c99", "-O2", "-static"], ["qemu-arm"])
        here = run_program(tmp_path, name, options, [COMPILER, "-std=c99", "-O2"])
        np.testing.assert_array_equal(got, here, err_msg=name)


# ---- runs

SHARED = {"hidden": 6, "epochs": 1, "seed": 1, "backend": "numpy", "batch": 4}
RUNS = {
    "text": ("text", ["book.txt"], {"steps": 8, "tied": True}),
    "series": ("series", ["series.csv"], {"window": 6, "horizon": 2}),
    "classify": ("classify", ["labelled.tsv"], {"pooling": "mean", "valid": 0.2, "bidirectional": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    good_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        for name, (task, files, settings) in RUNS.items():
            with prepare(task, [folder / file for file in files], folder / name, **SHARED | settings) as run:
                run.train(progress=False)
    return folder


def call(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("name", RUNS)
def test_the_header_of_a_run_gives_what_the_run_gives(name, folder, tmp_path):
    printed = call("export", folder / name, tmp_path / "net.h").output
    assert printed == f"Wrote {tmp_path / 'net.h'}, {(tmp_path / 'net.h').stat().st_size:,} bytes.\n"
    text = (tmp_path / "net.h").read_text()
    models = [load(folder / name, "numpy").model for _ in range(2)]
    x = inputs(models[0], 7)
    double = as_float64(folder / name)
    plain, expected = outputs_of(models[0], x), outputs_of(double, x)
    again = Compiled(tmp_path, {"net": (models[1], {})})
    assert (tmp_path / "net.h").read_text() == text
    assert_as_float64(again.run("net", x, expected.shape[1]), plain, expected, name)


def as_float64(run):
    """The model of a run, computing in float64."""
    trained = load(run, "numpy")
    settings = type(trained.settings)(**vars(trained.settings) | {"dtype": "float64"})
    double = trained.task.build(settings, trained.facts, "numpy")
    double.load_state_dict(trained.model.state_dict())
    return double.eval()


def test_options_of_export(folder, tmp_path):
    sizes = []
    for given in ([], ["--weights", "int8"], ["--weights", "int8", "--activations", "int16", "--overwrite"]):
        call("export", folder / "text", tmp_path / f"net{len(given)}.h", *given)
        sizes.append((tmp_path / f"net{len(given)}.h").stat().st_size)
    assert sizes[1] < sizes[0] and "net4_quantize(" not in (tmp_path / "net2.h").read_text()
    assert "each" in (tmp_path / "net5.h").read_text()
    call("export", folder / "text", tmp_path / "2.h", "--name", "two")
    assert "two_step(" in (tmp_path / "2.h").read_text()


@pytest.mark.parametrize(
    "given, words",
    [
        (["--weights", "float16"], "--weights: a .h has those of the run in float32, or int8; float16 is for an .onnx"),
        (["--no-states"], "--states: a .h has no such option: leave it out"),
        (["--part", "decoder"], "--part: a .h has no such option"),
        (["--activations", "int16"], "--activations: 'int16' multiplies whole numbers: it needs --weights int8"),
        (["--name", "int"], "--name: expected letters"),
    ],
)
def test_options_that_a_header_does_not_have(given, words, folder, tmp_path):
    error = call("export", folder / "text", tmp_path / "net.h", *given, code=2).stderr
    assert words in error and not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_not_replaced(folder, tmp_path):
    (tmp_path / "net.h").write_text("mine")
    assert "is there already" in call("export", folder / "text", tmp_path / "net.h", code=2).stderr
    assert (tmp_path / "net.h").read_text() == "mine"
    call("export", folder / "text", tmp_path / "net.h", "--overwrite")
    assert "net_step" in (tmp_path / "net.h").read_text()
