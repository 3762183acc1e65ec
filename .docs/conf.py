"""The site: ``sphinx-build -W -c .docs gpurnn/docs build/site``. The pages know nothing of it: plain CommonMark."""

import inspect
import pydoc
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpurnn  # noqa: E402

project, author = "gpurnn", "the authors of gpurnn"
release = version = gpurnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2  # a link to a section of another page
html_theme = "furo"
html_title = f"gpurnn {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = html_copy_source = html_show_sphinx = False
autodoc_member_order = "bysource"
pygments_style, pygments_dark_style = "friendly", "monokai"


# ---- pages: the site's tree is that of the links in index.md, the reference is made of the names in reference.md


def add_to_page(app, docname, source):
    if docname == "index":
        for heading, links in re.findall(r"^## (.+)\n\n((?:- .+\n)+)", source[0], re.M):
            pages = "\n".join(re.findall(r"\]\((.+?)\.md\)", links))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{pages}\n```\n"
    if docname == "reference":
        source[0] = re.sub(r"^(?:- `gpurnn\.[\w.]+`\n)+", documented, source[0], flags=re.M)


def documented(names):
    """Directives of autodoc in place of a list of names."""
    lines = ["```{eval-rst}"]
    for name in re.findall(r"`(.+?)`", names[0]):
        thing = pydoc.locate(name)
        if inspect.isclass(thing):
            # what a class says of itself and of what it has from a private base, without what every Module has
            bases = "Module,list,Exception" if name != "gpurnn.Module" else "object"
            kind = "autoexception" if issubclass(thing, Exception) else "autoclass"
            lines += [f".. {kind}:: {name}", "   :members:", f"   :inherited-members: {bases}"]
            lines += ["   :special-members: __call__"] * ("__call__" in dir(thing) and kind == "autoclass")
        else:
            lines += [f".. autofunction:: {name}"]
        lines += [""]
    return "\n".join([*lines, "```", ""])


# ---- docstrings are written for help(): paragraphs, "name: text" entries, lists, tables, examples


def to_rst(app, what, name, obj, options, lines):
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = [line for block in blocks for line in [*block_to_rst(block.split("\n")), ""]]


def block_to_rst(lines):
    first = lines[0]
    if first.startswith(">>>"):
        return lines
    if len(lines) > 1 and re.fullmatch(r"-{3,}", lines[1]):
        return [f"**{first}**", "", *block_to_rst(lines[2:])]
    if first.startswith(("    ", "|")):
        return ["::", "", *(f"    {line}" for line in lines)]
    if first.startswith("- "):
        return [escaped(line) for line in lines]
    if any(line.startswith("    ") for line in lines):  # entries, each with its continuation indented
        return [f"  {escaped(line.strip())}" if line.startswith(" ") else entry(line) for line in lines]
    return [escaped(line) for line in lines]


def entry(line):
    """The first line of an entry, as an item of a list: what stands before the colon is bold if it is names."""
    names = re.match(r"(\w+(?:, \w+)*) ?: ", line)
    return f"- **{escaped(names[1])}**: {escaped(line[names.end() :])}" if names else f"- {escaped(line)}"


def escaped(line):
    parts = re.split(r"(``.+?``)", line)
    parts[::2] = [re.sub(r"([*`|\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def setup(app):
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-docstring", to_rst)
