"""README.md and gpurnn/docs: the Python in them runs, their links lead somewhere, and the reference names everything.

Lines with ``>>>`` are pytest's own business (pyproject.toml); here are the blocks of Python without prompts.
"""

import re

import pytest
from examples import prepare_example
from helpers import ROOT

import gpurnn

DOCS = ROOT / "gpurnn" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(text_of(page))], ids=name_of)
def test_the_python_of_a_page_runs(page, monkeypatch, tmp_path, capsys):
    """Block after block, as a reader would paste them into one session; a comment after a print is what it prints."""
    prepare_example(monkeypatch, tmp_path)
    text, names = text_of(page), {"__name__": "page"}
    for block in BLOCK.finditer(text):
        lines = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback has the page's line numbers
        exec(compile(lines + block[1], str(page), "exec"), names)
        prints = re.findall(r"^print\(.*?\)(?: +# (.*))?$", block[1], re.M)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == len(prints)
        assert [line for line, comment in zip(printed, prints, strict=True) if comment] == [*filter(None, prints)]


def test_the_ten_lines_of_the_readme_learn(monkeypatch, tmp_path, capsys):
    prepare_example(monkeypatch, tmp_path)
    exec(BLOCK.search(text_of(ROOT / "README.md"))[1], {})
    assert float(capsys.readouterr().out) < 0.05


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        assert target.startswith("https://") or (page.parent / target).is_file(), target


def test_every_page_is_in_the_contents():
    listed = {DOCS / target for target in re.findall(r"\]\(([^)]+\.md)\)", text_of(DOCS / "index.md"))}
    assert listed == set(PAGES[1:]) - {DOCS / "index.md"}


def test_the_reference_names_everything_public():
    public = {
        name
        for name, value in vars(gpurnn).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("gpurnn.")
    }
    assert set(re.findall(r"^- `gpurnn\.(\w+)`", text_of(DOCS / "reference.md"), re.M)) >= public


def test_the_map_names_every_module():
    listed = set(re.findall(r"^\| `(gpurnn/[\w/]+\.py)` \|", text_of(DOCS / "map.md"), re.M))
    assert listed == {name_of(path) for path in (ROOT / "gpurnn").rglob("*.py")}
