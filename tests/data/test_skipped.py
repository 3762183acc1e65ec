"""Bad files among many: counted, said once with the first reasons, refused where strict or where nothing is left."""

from pathlib import Path

import pytest

from gpurnn.data.skipped import Skipped
from gpurnn.errors import FileError


def read(bad, good=1, **options):
    """``Skipped`` after ``bad`` and ``good`` lines."""
    skipped = Skipped("lines", "a.txt", **options)
    for n in range(bad):
        with skipped.catching(f"line {n}"):
            raise ValueError("no number")
    for _ in range(good):
        with skipped.catching():
            pass
    return skipped


@pytest.mark.parametrize("bad, more", [(1, []), (3, []), (4, ["  and 1 more"]), (2003, ["  and 2,000 more"])])
def test_the_first_reasons_are_said_once(caplog, bad, more):
    read(bad).done()
    (said,) = [record.getMessage().splitlines() for record in caplog.records]
    assert said[0] == f"a.txt: {bad:,} of {bad + 1:,} lines skipped:"
    assert said[1:] == [f"  line {n}: no number" for n in range(min(bad, 3))] + more


def test_nothing_is_said_where_all_are_good(caplog):
    read(0).done()
    Skipped("lines").done()
    assert not caplog.records


@pytest.mark.parametrize("bad, others", [(1, ""), (2, r" \(none of the 2 lines can be used\)")])
def test_nothing_is_left(bad, others):
    with pytest.raises(FileError, match=f"^a.txt: line 0: no number{others}$"):
        read(bad, good=0).done()


def test_strict_raises_the_first():
    with pytest.raises(FileError, match="^a.txt: line 0: no number$"):
        read(1, strict=True)
    for whole, place, said in (("a.txt", None, "a.txt: no"), (None, "line 1", "line 1: no")):
        with pytest.raises(FileError, match=f"^{said}$"), Skipped("lines", whole, strict=True).catching(place):
            raise ValueError("no")
    with pytest.raises(FileNotFoundError), Skipped("files", strict=True).catching():  # that names its file itself
        Path("none").read_bytes()
    skipped = Skipped("files")
    with skipped.catching():
        Path("none").read_bytes()
    assert skipped.reasons == ["none: No such file or directory"]


@pytest.mark.parametrize("error", [ImportError, MemoryError, KeyboardInterrupt, AttributeError])
def test_what_is_no_fault_of_a_file_is_raised(error):
    skipped = Skipped("files")
    with pytest.raises(error), skipped.catching():
        raise error
    assert skipped.count == 0


def test_a_terminal_only_shows_what_a_file_says(caplog):
    """The name of a file comes from a table that anyone may have written."""
    skipped = Skipped("lines", "a\x1b[2J.txt")
    with skipped.catching("line 1"):
        Path("no \x7f\x1b[2J").read_bytes()
    with skipped.catching():
        pass
    skipped.done()
    assert caplog.messages == [
        "a\\x1b[2J.txt: 1 of 2 lines skipped:\n  line 1: no \\x7f\\x1b[2J: No such file or directory"
    ]
