"""tests/mutate.py: every kind of error is found and planted where it says; every file has tests that belong to it."""

import ast

import mutate
import pytest

SOURCE = """
def f(a, b):
    if a < b and not a == 3:
        total = a + b
        total += 1
        print(total)
    return [x for x in (a, b) if x is not None] or (True if b else 2)
"""


def test_python_errors():
    found = mutate.python_mutations("f.py", SOURCE)
    told = [mutation.told for mutation in found]
    for wanted in (
        "a < b  ->  a <= b", "a < b and (not a == 3)  ->  a < b or not a == 3", "not a == 3  ->  a == 3",
        "a == 3  ->  a != 3", "3  ->  4", "a + b  ->  a - b", "total += 1  ->  pass", "print(total)  ->  pass",
        "x is not None  ->  x is None", "True  ->  False", "True if b else 2  ->  2 if b else True",
    ):  # fmt: skip
        assert wanted in told, wanted
    for mutation in found:
        assert mutation.planted(SOURCE) != SOURCE
        ast.parse(mutation.planted(SOURCE))  # still a program
    one = next(m for m in found if m.told == "a < b  ->  a <= b")
    assert one.planted(SOURCE) == SOURCE.replace("a < b", "(a <= b)") and one.line == 3


def test_cpp_errors():
    source = "#include <x>\n// a < b\nint f(int a, int b) {\n    for (int k = 0; k < b; k++) a += k * 1;  // a + b\n}\n"
    found = mutate.cpp_mutations("f.h", source)
    assert {m.line for m in found} == {4}
    planted = [mutation.planted(source) for mutation in found]
    assert any("k <= b" in text for text in planted) and any("a -= k * 1;  // a + b" in text for text in planted)


@pytest.mark.slow
def test_the_same_seed_plants_the_same_errors(capsys):
    for _ in range(2):
        mutate.main(["--seed", "7", "--count", "5", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == lines[6:] and lines[0].startswith("5 of ")


@pytest.mark.long
def test_every_file_has_tests():
    files = {mutation.file for mutation in mutate.all_mutations()}
    assert len(files) > 40
    assert not [file for file in files if not mutate.tests_of(file)]


@pytest.mark.slow
def test_a_planted_error_is_noticed_and_an_equal_program_is_not():
    file = "gpurnn/metrics.py"
    text = (mutate.ROOT / file).read_text(encoding="utf-8")
    same = mutate.Mutation(file, 1, "a comment", 0, 0, "# the same\n")
    wrong = [m for m in mutate.python_mutations(file, text) if "!=  ->" not in m.told and " / " in m.told]
    copies = mutate.Copies(1)
    try:
        assert not copies.run(same, 300)[0]
        assert copies.run(wrong[0], 300)[0], wrong[0]
        assert (copies.free[0] / file).read_text(encoding="utf-8") == text
    finally:
        copies.close()
