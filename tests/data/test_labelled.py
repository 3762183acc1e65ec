"""Labelled texts as people have them: read right, or refused with the line and what to do."""

import csv
import gzip
import io
import json
import re
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from optional import given, optional

from gpurnn.cli import main
from gpurnn.data.labelled import Examples, ReadOptions, describe_classes, read_labelled
from gpurnn.errors import FileError

st = optional("hypothesis.strategies")

PAIRS = [(f'a "good", long; film {n}', ["pos", "neg"][n % 3 == 0]) for n in range(12)]
PLAIN = [(f"film {n} is good", ["pos", "neg"][n % 3 == 0]) for n in range(12)]


def table(rows, names=None, **how):
    text = io.StringIO(newline="")
    csv.writer(text, **how).writerows([*([names] if names else []), *rows])
    return text.getvalue()


def lines(pairs, between="\t"):
    return "".join(f"{text}{between}{label}\n" for text, label in pairs)


def objects(pairs, text="text", label="label", **more):
    return "".join(json.dumps({**more, text: one, label: other}) + "\n" for one, other in pairs)


@pytest.fixture
def read(tmp_path):
    """Reads one file of this name and content."""

    def read(name, content, how=None, classes=None, **more):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_labelled([path], how, classes, **more)

    return read


# ---- tables

NEWLINES = [(text.replace(", ", ",\n"), label) for text, label in PAIRS]
THREE = [(n, text, label) for n, (text, label) in enumerate(PLAIN)]
TABLES = {
    "comma, names": ("a.csv", table(PAIRS, ("text", "label")), PAIRS),
    "comma, names of others": ("a.csv", table(PAIRS, ("Review", "Sentiment")), PAIRS),
    "comma, no names": ("a.csv", table(PAIRS), PAIRS),
    "a text like a name": ("a.csv", table([("comment", "pos"), *PAIRS]), [("comment", "pos"), *PAIRS]),
    "comma, unknown names": ("a.csv", table(PAIRS, ("Satz", "Klasse")), PAIRS),
    "all quoted": ("a.csv", table(PAIRS, ("text", "label"), quoting=csv.QUOTE_ALL), PAIRS),
    "semicolon": ("a.csv", table(PAIRS, ("text", "label"), delimiter=";"), PAIRS),
    "semicolon, commas inside": ("a.csv", "text;label\n" + lines([("a, b, c", "x"), ("d, e", "y")], ";"),
                                 [("a, b, c", "x"), ("d, e", "y")]),
    "bar": ("a.csv", table(PAIRS, delimiter="|"), PAIRS),
    "tab in a .csv": ("a.csv", table(PAIRS, ("text", "label"), delimiter="\t"), PAIRS),
    "Excel's mark": ("a.csv", "\ufeff" + table(PAIRS, ("text", "label")), PAIRS),
    "UTF-16": ("a.csv", table(PAIRS, ("text", "label")).encode("utf-16"), PAIRS),
    "gzip": ("a.csv.gz", gzip.compress(table(PAIRS, ("text", "label")).encode(), mtime=0), PAIRS),
    "line ends of old": ("a.csv", table(PLAIN, ("text", "label"), lineterminator="\r"), PLAIN),
    "newlines inside": ("a.csv", table(NEWLINES, ("text", "label")), NEWLINES),
    "backslashes": ("a.csv", 'text,label\n"so \\"good\\", yes",a\nbad,b\n', [('so "good", yes', "a"), ("bad", "b")]),
    "quotes inside": ("a.csv", 'text,label\n5" pipe,a\nbad,b\n', [('5" pipe', "a"), ("bad", "b")]),
    "blank lines": ("a.csv", "text,label\n\ngood,a\n , \nbad,b\n\n", [("good", "a"), ("bad", "b")]),
    "header in a .txt": ("a.txt", table(PAIRS, ("text", "label")), PAIRS),
    "label first": ("a.csv", table([(b, a) for a, b in PAIRS]), PAIRS),
    "label first, names": ("a.csv", table([(b, a) for a, b in PAIRS], ("label", "text")), PAIRS),
    "tabs": ("a.tsv", lines(PAIRS), PAIRS),
    "tabs, names": ("a.tsv", "review\tsentiment\n" + lines(PAIRS), PAIRS),
    "tabs, label first": ("a.tsv", lines([(b, a) for a, b in PLAIN]), PLAIN),
    "tabs, all quoted": ("a.tsv", table(PAIRS, delimiter="\t", quoting=csv.QUOTE_ALL), PAIRS),
    "tabs, newlines inside": ("a.tsv", table(NEWLINES, delimiter="\t", quoting=csv.QUOTE_ALL), NEWLINES),
    "tabs, some newlines": ("a.tsv", table([*PLAIN, ("b\nc", "pos")], delimiter="\t"), [*PLAIN, ("b\nc", "pos")]),
    "tabs, quotes are text": ("a.tsv", lines([('"good" it', "a"), ('"bad', "b")]), [('"good" it', "a"), ('"bad', "b")]),
    "tabs, no table": ("a.txt", "one\ntwo\tthree\nx\ty\n", [("one", "a"), ("two\tthree", "a"), ("x\ty", "a")]),
    "tabs inside": ("a.tsv", "a \t b\t1\none\t0\n", [("a \t b", "1"), ("one", "0")]),
    "three columns": ("a.tsv", table(THREE, delimiter="\t"), PLAIN),
    "three columns, names": ("a.csv", table(THREE, ("id", "text", "label")), PLAIN),
    "three columns, unknown names": ("a.csv", table(THREE, ("nr", "satz", "klasse")), PLAIN),
    "numbers": ("a.csv", table([(a, 5) for a, _ in PLAIN[:6]] + [(a, 1) for a, _ in PLAIN[6:]]),
                [(a, "5") for a, _ in PLAIN[:6]] + [(a, "1") for a, _ in PLAIN[6:]]),
    "sorted": ("a.tsv", lines(sorted(PLAIN, key=lambda pair: pair[1])), sorted(PLAIN, key=lambda pair: pair[1])),
    "JSON lines": ("a.jsonl", objects(PAIRS), PAIRS),
    "JSON lines, other names": ("a.json", objects(PAIRS, "sentence", "category", id=7), PAIRS),
    "JSON lines, numbers": ("a.ndjson", objects([("good", 1), ("bad", 0.5)]), [("good", "1"), ("bad", "0.5")]),
    "JSON lines, truth": ("a.jsonl", objects([("good", True), ("bad", False)]), [("good", "true"), ("bad", "false")]),
    "JSON lines, gzip": ("a.jsonl.gz", gzip.compress(objects(PAIRS).encode(), mtime=0), PAIRS),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_right(read, name):
    file, content, pairs = TABLES[name]
    found = read(file, content)
    assert found.pairs == pairs and found.skipped == 0
    assert read(file, content, ReadOptions(strict=True), {label for _, label in pairs}).pairs == pairs


def test_columns_by_name_and_number(read):
    content = table([(b, a, "x") for a, b in PAIRS], ("Note", "Film text", "source"))
    for how in (
        ReadOptions(text="Film text", label="note"),
        ReadOptions(text="2", label="1"),
        ReadOptions(text="film_text", label="1"),
    ):
        assert read("a.csv", content, how).pairs[-len(PAIRS) :] == PAIRS
    assert read("a.jsonl", objects(PAIRS, "a", "b"), ReadOptions(text="a", label="b")).pairs == PAIRS
    assert read("a.tsv", lines([(b, a) for a, b in PAIRS]), ReadOptions(text="2")).pairs == PAIRS
    for how, option in ((ReadOptions(text="body"), "--text"), (ReadOptions(label="4"), "--label")):
        with pytest.raises(FileError, match=f"a.csv: has no column .* for {option}: its columns are Note, Film text"):
            read("a.csv", content, how)


def test_what_was_chosen_is_said(read):
    assert read("a.csv", table(PAIRS, ("text", "label"))).notes == []
    assert read("a.csv", table([(b, a) for a, b in PAIRS])).notes == [
        "a.csv: the texts are column 2, the labels column 1"
    ]
    notes = read("a.csv", table(THREE, ("nr", "satz", "klasse"))).notes
    assert notes == [
        "a.csv: line 1 is taken as a header: nr, satz, klasse",
        "a.csv: the texts are satz, the labels klasse",
    ]
    pairs = [*[("a", "pos")] * 3, ("b", "POS"), ("c", "1"), *[(str(n), f"c{n}") for n in range(10)]]
    assert describe_classes(pairs) == [
        "Classes: pos 3, POS 1, 1 1, c0 1, c1 1, c2 1, c3 1, c4 1, c5 1, c6 1, and 3 more",
        "Classes that differ only in case are different ones: POS and pos",
    ]


def test_known_labels_choose_their_column(read):
    content = lines([("pos", "one"), ("neg", "two")])
    assert read("a.tsv", content).pairs == [("pos", "one"), ("neg", "two")]
    assert read("a.tsv", content, None, ["pos", "neg"]).pairs == [("one", "pos"), ("two", "neg")]
    header = "satz\tklasse\n" + lines([("one", "pos"), ("two", "neg")])
    assert read("a.tsv", header, None, ["pos", "neg"]).pairs == [("one", "pos"), ("two", "neg")]
    with pytest.raises(
        FileError, match="a.tsv: line 3 has a label that the model never saw, 'great': it knows pos, neg"
    ):
        read("a.tsv", header.replace("neg", "great") + "three\tpos\n", None, ["pos", "neg"])


@pytest.mark.parametrize(
    "name, good, bad, message",
    [
        ("a.tsv", lines(PLAIN), "no label\t\n", "line 13 should be a text, a tab and a label, got 'no label"),
        ("a.tsv", lines(PLAIN), "no tab\n", "line 13 should be a text, a tab and a label, got 'no tab'"),
        ("a.csv", table(PLAIN), ",pos\n", "line 13 should be a text, a comma and a label, got ',pos'"),
        ("a.csv", table(PLAIN, delimiter=";"), "good\n", "line 13 should be a text, a semicolon and a label"),
        ("a.csv", table(NEWLINES), "good\n", "line 25 should be a text, a comma and a label, got 'good'"),
        ("a.jsonl", objects(PLAIN), '{"text": "good"}\n', "line 13 should be an object with a text and a label"),
        ("a.jsonl", objects(PLAIN), '{"text": null, "label": 1}\n', "line 13 should be an object with a text"),
        ("a.jsonl", objects(PLAIN), '{"text": ["a"], "label": 1}\n', "line 13 should be an object with a text"),
        ("a.jsonl", objects(PLAIN), '{"text": "go\n', "line 13 is not JSON"),
        ("a.jsonl", objects(PLAIN), "[1]\n", "line 13 is not a JSON object, but"),
        ("a.jsonl", objects(PLAIN), "[" * 9000 + "\n", "line 13 is not JSON: it is nested too deeply"),
    ],
)  # fmt: skip
def test_bad_rows_are_skipped_or_refused(read, name, good, bad, message):
    found = read(name, good + bad)
    assert len(found.pairs) == 12 and found.skipped == 1
    line = message.split()[1]
    assert found.notes == [f"{name}: 1 row without a text and a label skipped, the first in line {line}"]
    with pytest.raises(FileError, match=f"{name}: {message}"):
        read(name, good + bad, ReadOptions(strict=True))
    with pytest.raises(FileError, match=r"13 of 25 rows are like that"):
        read(name, good + 13 * bad)


@pytest.mark.parametrize(
    "name, header, good, bad, cells",
    [
        ("a.csv", "text,label", "the {0} {1},{1}", "cat ran 1, well then,pos", "3, expected 2: a comma inside"),
        ("a.csv", "label,text", "{1},the {0} {1}", "pos,cat ran 1, well then", "3, expected 2: a comma inside"),
        ("a.csv", "text,label,by", "the {0} {1},{1},me", "cat ran 1, well then,pos,me", "4, expected 3: a comma"),
        ("a.csv", "text,label,by", "the {0} {1},{1},me", "cat ran 1,pos", "2, expected 3)"),
        ("a.csv", "text;label", "the {0} {1};{1}", "cat ran 1; well then;pos", "3, expected 2: a semicolon inside"),
        ("a.tsv", "text\tlabel", "the {0} {1}\t{1}", "cat ran 1\twell\tpos", "3, expected 2: a tab inside"),
        ("a.csv", "text|label|", "the {0} {1}|{1}|", "cat ran 1|well then|pos", "3, expected 2: a vertical bar"),
        ("a.csv", "by,text,label", "{0},the {0} {1},{1}", "7,cat ran 1, well then,pos", "4, expected 3: a comma"),
        ("a.csv", None, "the {0} {1},{1}", "cat ran 1, well then,pos", "3, expected 2: a comma inside"),
    ],
)  # fmt: skip
def test_a_row_has_as_many_cells_as_the_header(read, name, header, good, bad, cells):
    rows = [good.format(n, ["pos", "neg"][n % 2]) for n in range(12)]
    start = [header] if header else []
    content, line = "\n".join([*start, *rows, bad]), len(start) + 13
    found = read(name, content)
    assert found.pairs == [(f"the {n} {label}", label) for n in range(12) for label in [["pos", "neg"][n % 2]]]
    assert found.skipped == 1 and any(
        note.startswith(f"{name}: 1 row skipped, the first in line {line} (its cells: {cells}") for note in found.notes
    )
    with pytest.raises(FileError, match=f"line {line} should be .*" + re.escape(f"(its cells: {cells}")):
        read(name, content, ReadOptions(strict=True))
    if header:
        delimiter = next(d for d in ",;|\t" if d in good)
        blank = "\n".join([*start, *(f"{row}{delimiter} " for row in rows)])  # no value past the end: no other cell
        assert read(name, blank, ReadOptions(strict=True)).pairs == found.pairs
        with pytest.raises(FileError, match="5 of 7 rows are like that"):
            read(name, "\n".join([header, *rows[:2], *[bad] * 5]))


def test_columns_that_the_first_row_lacks(read):
    content = "a heading\n" + lines([(b, a) for a, b in PLAIN])
    assert read("a.tsv", content).notes[0] == "a.tsv: the texts are column 2, the labels column 1"


def test_the_first_row_may_be_bad(read):
    found = read("a.tsv", "a heading\n" + lines(PLAIN))
    assert found.pairs == PLAIN and found.notes[0].endswith("skipped, the first in line 1")
    found = read("a.csv", ",\n,pos\n" + table(PLAIN))
    assert found.pairs == PLAIN and found.notes[0].endswith("skipped, the first in line 2")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", 'text,label\n"good,pos\nbad,neg\n', "a.csv: line 2: a cell begins with a quote that is not closed"),
        ("a.csv", 'text,label\ngood,pos\n"so" bad,neg\n', "a.csv: line 3: a cell begins with a quote"),
        ("a.csv", "good\nbad\n", "a.csv: cannot tell which of its columns has the labels .* begins with 'good', 'bad'"),
        ("a.csv", table([(n % 2, n % 3, f"text {n}") for n in range(12)]), "cannot tell which .* --text 1 --label 2"),
        ("a.csv", " \n", "a.csv: is empty"),
        ("a.csv", ",,\n", "a.csv: is empty"),
        ("a.jsonl", "not JSON\n", "a.jsonl: line 1 is not JSON"),
        ("a.jsonl", objects(PLAIN, "a", "b")[:-2] + ', "c": 1}', "cannot tell which of its columns has the labels"),
        ("a.jsonl", json.dumps({str(n): 1 for n in range(1001)}), "line 1: its objects have more than 1000 different"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused(read, name, content, message):
    with pytest.raises(FileError, match=message):
        read(name, content)


def test_a_cell_may_be_long(read):
    limit = csv.field_size_limit()
    pairs = [("word " * 40_000 + "end", "a"), ("short", "b")]
    assert read("a.csv", table(pairs, ("text", "label"))).pairs == pairs
    assert csv.field_size_limit() == limit


# ---- folders and files of one class


def test_a_folder_for_each_class(tmp_path):
    for label, texts in (("pos", ["good\nfilm\n", "fine"]), ("neg", ["bad"])):
        (tmp_path / "tree" / label).mkdir(parents=True)
        for n, text in enumerate(texts):
            (tmp_path / "tree" / label / f"{n}.txt").write_text(text)
    (tmp_path / "tree" / ".git").mkdir()
    (tmp_path / "tree" / "README").write_text("about")
    assert read_labelled([tmp_path / "tree"]).pairs == [("bad", "neg"), ("good\nfilm", "pos"), ("fine", "pos")]
    (tmp_path / "tree" / "neg" / "broken.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "tree" / "neg" / "empty.txt").write_bytes(b"")
    found = read_labelled([tmp_path / "tree"])
    assert len(found.pairs) == 3 and found.skipped == 2
    assert found.notes[0].startswith("2 files skipped. The first: ") and "broken.txt: is not UTF-16" in found.notes[0]
    with pytest.raises(FileError, match="broken.txt: is not UTF-16 text"):
        read_labelled([tmp_path / "tree"], ReadOptions(strict=True))
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(FileError, match="bare: no texts: expected a table of texts and labels"):
        read_labelled([tmp_path / "bare"])
    (tmp_path / "bare" / "a" / "broken.pdf").write_bytes(b"%PDF-1.7\n")
    with pytest.raises(FileError, match="bare: no texts: .*broken.pdf: is a PDF"):
        read_labelled([tmp_path / "bare"])


def test_files_and_folders_together_are_refused(tmp_path):
    """Which of them are the classes? In aclImdb/train the files are lists of addresses."""
    for label in ("pos", "neg"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0_1.txt").write_text("a film")
        (tmp_path / f"urls_{label}.txt").write_text("http://a.b\n")
    message = r"holds files \(urls_neg.txt, urls_pos.txt\) and folders of files \(neg, pos\): expected either"
    for labels in (True, False):
        with pytest.raises(FileError, match=message):
            read_labelled([tmp_path], labels=labels)
    given = sorted(tmp_path.glob("*.txt"))
    assert {label for _, label in read_labelled(given).pairs} == {"urls_neg", "urls_pos"}
    for file in given:
        file.rename(file.with_suffix(".feat"))
    assert read_labelled([tmp_path]).pairs == [("a film", "neg"), ("a film", "pos")]
    (tmp_path / "pos" / "0_1.txt").rename(tmp_path / "pos.txt")
    (tmp_path / "neg" / "0_1.txt").rename(tmp_path / "neg.txt")  # empty folders, and those of other files
    (tmp_path / "neg" / "picture.png").write_bytes(b"")
    assert read_labelled([tmp_path]).pairs == [("a film", "neg"), ("a film", "pos")]


def test_files_of_a_folder_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.csv").write_text(table(PLAIN, ("text", "label")))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three", mtime=0))
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    found = read_labelled([tmp_path])
    assert found.pairs == [*PLAIN, ("one", "b"), ("two", "b"), ("three", "c")]
    assert found.skipped == 1 and "d.txt: is not UTF-8" in found.notes[0]
    assert read_labelled([tmp_path], ReadOptions("latin-1", strict=True)).pairs[-1] == ("caf\u00e9", "d")
    with pytest.raises(FileError, match="d.txt"):
        read_labelled([tmp_path / "d.txt"])  # not one of a folder


def test_without_labels(read):
    """Texts to be classified, in the same formats."""
    texts = [text for text, _ in PAIRS]
    for name, content in (
        ("a.csv", table(PAIRS, ("text", "label"))),
        ("a.csv", table([[text] for text in texts], ["text"])),
        ("a.csv", table([[text] for text in texts])),
        ("a.tsv", lines(PAIRS)),
        ("a.jsonl", "".join(json.dumps({"text": text, "id": 3}) + "\n" for text in texts)),
        ("a.txt", "\n".join(texts)),
        ("a.csv", table([(text, "") for text in texts], ("text", "label"))),
    ):
        found = read(name, content, None, ["pos", "neg"], labels=False)
        assert [text for text, _ in found.pairs] == texts, content


@pytest.mark.parametrize(
    "name, content, texts, notes",
    [
        ("a.csv", "id,text,label\n1,the cat,pos\n2,,neg\n3,the dog,x\n", ["the cat", "", "the dog"],
         ["a.csv: the texts are text"]),
        ("a.csv", "id,text\n1,the cat\n2,the dog\n", ["the cat", "the dog"],
         ["a.csv: line 1 is taken as a header: id, text", "a.csv: the texts are text"]),
        ("a.csv", "id,Satz\n1,the cat\n2,the dog\n", ["the cat", "the dog"],
         ["a.csv: line 1 is taken as a header: id, Satz", "a.csv: the texts are Satz"]),
        ("a.csv", "1,the cat\n2,the dog\n", ["the cat", "the dog"], ["a.csv: the texts are column 2"]),
        ("a.tsv", "id\ttext\n1\tthe cat\n2\t\n", ["the cat", ""],
         ["a.tsv: line 1 is taken as a header: id, text", "a.tsv: the texts are text"]),
        ("a.jsonl", '{"text": "the cat"}\n{"text": null}\n{"id": 1}\n{"text": "the dog"}\n',
         ["the cat", "", "", "the dog"], ["a.jsonl: the texts are text"]),
        ("a.txt", "the cat\n\nthe dog\n", ["the cat", "", "the dog"], []),
        ("a.csv", 'text\nthe cat\n""\n\nthe dog\n', ["the cat", "the dog"],
         ["a.csv: line 1 is taken as a header: text", "a.csv: rows without a value are left out, in these lines: 3"]),
        ("a.csv", "text,label\nthe cat,\n,\nthe dog,\n \n,\n", ["the cat", "the dog"],
         ["a.csv: rows without a value are left out, in these lines: 3, 6"]),
        ("a.tsv", "text\tlabel\nthe cat\t\n\t\nthe dog\t\n\n", ["the cat", "the dog"],
         ["a.tsv: rows without a value are left out, in these lines: 3"]),
    ],
)  # fmt: skip
def test_a_text_for_each_row(read, name, content, texts, notes):
    found = read(name, content, None, ["pos", "neg"], labels=False)
    assert [text for text, _ in found.pairs] == texts and found.skipped == 0
    assert found.notes == notes


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text,label\nthe cat,pos\ncat ran 1, well then,pos\nthe dog,neg\n",
         "a.csv: line 3 should be 2 cells, as other rows have, got .* expected 2: a comma inside a cell needs quotes"),
        ("a.csv", "text\nthe cat\nwell, then\nthe dog\n", "a.csv: line 3 should be 1 cell, as other"),
        ("a.csv", "id,text\n1,the cat\n2\n3,the dog\n", "a.csv: line 3 should be 2 cells, .*, got '2'"),
        ("a.jsonl", '{"text": "the cat"}\n{"text": \n{"text": "the dog"}\n', "a.jsonl: line 2 is not JSON"),
    ],
)  # fmt: skip
def test_a_row_without_a_text_to_classify_is_refused(read, name, content, message):
    """Else the answers would not be those of the rows in their order."""
    with pytest.raises(FileError, match=message):
        read(name, content, None, ["pos", "neg"], labels=False)


# ---- on the command line


@pytest.mark.long
def test_train_classify_and_evaluate_take_them(tmp_path, monkeypatch):
    def gpurnn(*arguments, code=0, **options):
        done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn", **options)
        assert done.exit_code == code, done.output
        return done

    monkeypatch.chdir(tmp_path)
    pairs = [(f"a {word} film {n}", label) for n in range(12) for word, label in (("fine", "pos"), ("dull", "neg"))]
    (tmp_path / "films.csv").write_text(
        table([(1, *pair) for pair in pairs] + [(1, "lost", "")], ("id", "Satz", "Note"))
    )
    train = ["train", "classify", "films.csv", "--text=Satz", "--label=Note", "--epochs=1", "--hidden=4",
             "--backend=cpu", "--no-progress", "--out=run"]  # fmt: skip
    assert "line 26 should be a text, a comma and a label" in gpurnn(*train, "--strict", code=2).stderr
    said = " ".join(gpurnn(*train).stdout.split())
    assert "Classes: pos 12, neg 12" in said and "films.csv: 1 row without a text and a label skipped" in said
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["text"], settings["label"], settings["strict"]) == ("Satz", "Note", False)
    assert json.loads(gpurnn("evaluate", "run", "films.csv", "--json").stdout)["texts"] == 24
    (tmp_path / "more.jsonl").write_text(objects(pairs[:6], "a", "b"))
    assert "has no column 'Satz' for --text" in gpurnn("evaluate", "run", "more.jsonl", code=2).stderr
    numbers = json.loads(gpurnn("evaluate", "run", "more.jsonl", "--text=a", "--label=b", "--json").stdout)
    assert (numbers["texts"], numbers["skipped"]) == (6, 0)
    shown = json.loads(gpurnn("classify", "run", "--file=films.csv", "--json").stdout)
    assert [entry["text"] for entry in shown] == [text for text, _ in pairs] + ["lost"]
    assert len(gpurnn("classify", "run", "--file", "more.jsonl", "--text=a").stdout.splitlines()) == 6
    (tmp_path / "lines.csv").write_text(table([("a fine\nfilm", "pos"), ("dull", "neg")], ("text", "label")))
    assert [
        line.split("  ")[-1]
        for line in gpurnn("classify", "run", "--file", "lines.csv", "--text=text").stdout.splitlines()
    ] == [
        "a fine film",
        "dull",
    ]
    unknown = gpurnn("classify", "run", "\u5c71\u7530", "a fine film")
    assert "The model knows nothing of 1 of 2 texts: '\u5c71\u7530'. It only guesses." in unknown.stderr
    latin1 = gpurnn("classify", "run", input=b"caf\xe9\n", code=2)
    assert "standard input, line 1: is not UTF-8 text" in latin1.stderr and "--encoding latin-1" in latin1.stderr
    assert "caf\u00e9" in gpurnn("classify", "run", "--encoding=latin-1", input=b"caf\xe9\n").stdout
    many = gpurnn("classify", "run", "--max-memory=10K", input="fine\n" * 100, code=2)
    assert "standard input: it would take" in many.stderr
    both = gpurnn("classify", "run", "a text", "--file", "more.jsonl", code=2)
    assert "give TEXTs or --file, not both" in both.stderr
    (tmp_path / "gap.csv").write_text("id,text\n1,a fine film\n2,\n3,dull\n")
    gap = gpurnn("classify", "run", "--file=gap.csv", "--text=text", "--json")
    assert [entry["text"] for entry in json.loads(gap.stdout)] == ["a fine film", "", "dull"]
    assert "Note" not in gap.stdout and gap.stderr == ""
    gap = gpurnn("classify", "run", "--file=gap.csv", "--text=2", "--json")
    assert len(json.loads(gap.stdout)) == 3 and "gap.csv: line 1 is taken as a header: id, text" in gap.stderr


@pytest.mark.long
@given(lambda: st.binary(max_size=60), lambda: st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.txt"]))
def test_any_bytes_are_read_or_refused(data, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        try:
            found = read_labelled([path])
        except FileError as error:
            assert str(path) in str(error)
        else:
            assert isinstance(found, Examples) and found.pairs and all(text and label for text, label in found.pairs)


@pytest.mark.long
@given(
    lambda: st.lists(st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.sampled_from("ab")), min_size=1),
    lambda: st.sampled_from(",;|\t"),
)
def test_any_text_comes_through_a_csv_file(pairs, delimiter):
    expected = [(text.strip(), label) for text, label in pairs if text.strip()]
    if 2 * len(expected) < len(pairs):
        return  # most rows are without a text: refused
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(table(pairs, ("text", "label"), delimiter=delimiter, quoting=csv.QUOTE_ALL).encode())
        assert read_labelled([path]).pairs == expected
