"""Tables as people have them: each is read right, or refused with the line and the cure; none is silently wrong."""

import gzip
import random
import re
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import hostile
import numpy as np
import pytest
from optional import given, optional

from gpurnn.data.dates import DateForm, UnreadDates, check_date_format, read_dates
from gpurnn.data.encodings import whole_text
from gpurnn.data.moments import continue_moments, uneven_steps
from gpurnn.data.numerals import Marks, Undecided, find_marks
from gpurnn.data.tables import read_rows
from gpurnn.errors import FileError
from gpurnn.files import set_max_memory
from gpurnn.tasks.series import SeriesSettings, choose_columns, read_table

st = optional("hypothesis.strategies")
ROWS = 40

# ---- 60 generated tables

DATES = (  # how dates are written, and how far apart rows are
    ("%Y-%m-%d", "day"), ("%d.%m.%Y", "day"), ("%m/%d/%Y", "day"), ("%d/%m/%Y", "day"), ("%Y-%m", "month"),
    ("%b %Y", "month"), ("%YQ%q", "quarter"), ("%Y", "year"), ("%Y-%m-%dT%H:%M:%SZ", "hour"),
    ("%Y-%m-%d %H:%M:%S+02:00", "hour"), ("%Y-%m-%d %H:%M:%S.000", "hour"), ("%d.%m.%Y %H:%M", "hour"),
    ("epoch", "hour"), ("epoch ms", "hour"), ("%d-%b-%Y", "day"), ("%Y%m%d", "day"), ("%m/%d/%Y %I:%M %p", "hour"),
)  # fmt: skip
MARKS = ((".", ""), (",", ""), (",", "."), (".", ","), (",", " "), (".", "'"), (",", "\u202f"))
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "gzip")
# what is done to a table, and what its refusal says after the line; None: it is read
PLANTS = {
    "nothing": None, "newest first": None, "comments": None, "blank lines": None, "empty row of Excel": None,
    "text column last": None, "header in a comment": None, "shuffled": "--sort", "sorted": None,
    "doubled": "--date none", "total": "delete the line", "sum without a name": "delete the line",
    "word for a date": "delete the line",
    "missing": "--fill", "filled": None, "leading gap": None, "word for a number": "expected a number",
    "remark below": "Delete it",
}  # fmt: skip


@dataclass
class Made:
    """A table: its bytes, what it holds, how it is to be read, and the line and words of the refusal it deserves."""

    data: bytes
    moments: list
    values: list
    options: dict
    line: int | None
    words: str | None
    about: str


def write_number(value, decimal, thousands):
    text = f"{value:,.2f}".replace(",", "_").replace(".", decimal)
    return text.replace("_", thousands)


def write_date(moment, pattern):
    if pattern == "epoch":
        return str(int(moment.replace(tzinfo=timezone.utc).timestamp()))
    if pattern == "epoch ms":
        return str(1000 * int(moment.replace(tzinfo=timezone.utc).timestamp()))
    return moment.strftime(pattern.replace("%q", str((moment.month + 2) // 3)))


def dates_of(step, count):
    start = datetime(2019, 3, 20) if step in ("day", "hour") else datetime(2019, 1, 1)
    months = {"month": 1, "quarter": 3, "year": 12}.get(step)
    if months:
        places = [start.month - 1 + months * n for n in range(count)]
        return [start.replace(year=start.year + place // 12, month=place % 12 + 1) for place in places]
    return [start + timedelta(**{f"{step}s": n}) for n in range(count)]


def make_table(number):
    """Table ``number`` of an endless list; its parts are chosen so that all pairs come up sooner or later."""
    draw = random.Random(number)
    plant = list(PLANTS)[number % len(PLANTS)]
    pattern, step = DATES[number % len(DATES)]
    decimal, thousands = draw.choice(MARKS)
    encoding = draw.choice(ENCODINGS)
    delimiter = draw.choice([";", "\t", "|"] if decimal == "," else [",", ";", "\t", "|"])
    quote = draw.choice(["never", "all"]) if delimiter not in thousands else "all"
    if encoding == "cp1252":
        thousands = thousands.replace("\u202f", "\u00a0")
    moments = dates_of(step, ROWS)
    values = [round(draw.uniform(-50, 3000), 2) for _ in range(ROWS)]
    name = "umsatz \u00e4" if encoding == "cp1252" else "sales"
    options, line, words = {}, None, PLANTS[plant]

    rows = [[write_date(m, pattern), write_number(v, decimal, thousands)] for m, v in zip(moments, values, strict=True)]
    header, at = ["date", name], draw.randrange(5, ROWS - 5)
    if plant == "newest first":
        rows.reverse()
    elif plant in ("shuffled", "sorted"):
        rows[at], rows[at + 2] = rows[at + 2], rows[at]
        options, line = ({"sort": True}, None) if plant == "sorted" else ({}, at + 3)
    elif plant == "doubled":
        rows.insert(at + 1, list(rows[at]))
        line = at + 3
    elif plant == "total":
        rows.append(["Total", rows[0][1]])
        line = ROWS + 2
    elif plant == "sum without a name":
        rows.append(["", rows[0][1]])
        line = ROWS + 2
    elif plant == "word for a date":
        rows[at][0] = "soon"
        line = at + 2
    elif plant in ("missing", "filled", "leading gap"):
        row = 0 if plant == "leading gap" else at
        rows[row][1] = draw.choice(["", "NA", "NaN", "null", "-"])
        if plant == "missing":
            line = at + 2
        else:
            options = {"fill": draw.choice(["previous", "drop"])}
        if plant == "filled" and options["fill"] == "previous":
            values[at] = values[at - 1]
        elif plant != "missing":
            del values[row], moments[row]
    elif plant == "word for a number":
        rows[at][1] = "closed"
        line = at + 2
    elif plant == "text column last":
        header, rows = [*header, "remark"], [[*row, draw.choice(["", "fine", "rain"])] for row in rows]
        rows[3][2] = "fine"
    if encoding == "cp1252":
        options["encoding"] = "cp1252"

    def join(cells):
        return delimiter.join(f'"{cell}"' if quote == "all" else cell for cell in cells)

    lines = [join(header), *map(join, rows)]
    if plant == "comments":
        lines[at:at] = ["# a remark", "#"]
        lines.insert(0, "# exported, by somebody; yesterday")
    elif plant == "blank lines":
        lines[at:at] = ["", ""]
    elif plant == "empty row of Excel":
        lines += [delimiter, delimiter]
    elif plant == "header in a comment":
        lines[0] = "# " + delimiter.join(header)
    elif plant == "remark below":
        lines.append("Source: the office of numbers")
        line = ROWS + 2
    end = draw.choice(["\n", "\r\n"])
    text = end.join(lines) + draw.choice(["", end])
    data = gzip.compress(text.encode(), mtime=0) if encoding == "gzip" else text.encode(encoding)
    zone = {"%Y-%m-%dT%H:%M:%SZ": timezone.utc, "%Y-%m-%d %H:%M:%S+02:00": timezone(timedelta(hours=2))}.get(pattern)
    moments = [moment.replace(tzinfo=zone) for moment in moments]
    about = f"{plant}, {pattern}, {decimal!r} {thousands!r} {delimiter!r}, {encoding}, quotes {quote}"
    return Made(data, moments, values, options, line, words, about)


@pytest.mark.parametrize("number", range(60))
def test_a_table_is_read_right_or_refused(tmp_path, number):
    made, path = make_table(number), tmp_path / "table.csv"
    path.write_bytes(made.data)
    settings = SeriesSettings(seed=0, **made.options)
    if made.words:
        with pytest.raises(ValueError, match=re.escape(made.words)) as refused:
            read_table(path, choose_columns(path, settings), settings)
        assert f"{path}: line {made.line}" in str(refused.value), made.about
        return
    facts = choose_columns(path, settings)
    table = read_table(path, facts, settings)
    assert table.values[:, 0].tolist() == made.values, made.about
    assert table.moments == made.moments, made.about
    if "newest first" in made.about:
        assert table.notes[-1] == "the rows were newest first: reversed"
    coming = continue_moments(table.moments, 2)  # what is forecast is written as the file writes it
    read = read_rows(path, encoding=settings.encoding).column(facts["date"])
    assert {table.form.write(moment) for moment in table.moments} <= set(read), made.about
    if coming:
        assert [table.form.parse(table.form.write(moment)) for moment in coming] == coming


def test_the_tables_have_everything():
    """Each plant, date form, decimal mark and encoding comes up among the 60."""
    abouts = [make_table(number).about for number in range(60)]
    for what in (*PLANTS, *(pattern for pattern, _ in DATES), *ENCODINGS, *(f"{d!r} {t!r}" for d, t in MARKS)):
        assert any(what in about for about in abouts), what


# ---- what is doubtful


def save(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text, value, options",
    [
        ("a;b\nx;1,5\nx;2.007\n", 2007, {}),  # a decimal comma elsewhere
        ("a;b\nx;1,5\nx;2.007\n", 2007, {"decimal": ","}),
        ("a;b\nx;1.234\nx;2.007\n", None, {}),
        ("a;b\nx;1.234\nx;2.007\n", 2.007, {"decimal": "."}),
        ("a;b\nx;1.234\nx;2.007\n", 2007, {"decimal": ","}),
        ("a;b\nx;1.234\nx;2.007\n", 2007, {"thousands": "."}),
        ("a\tb\nx\t1.234\nx\t2.007\n", None, {}),
        ("a,b\nx,1.234\nx,2.007\n", 2.007, {}),
        ("a,b\nx,987\nx,2.007\n", 2.007, {"thousands": "none"}),
        ('a,b\nx,"1,234"\nx,"2,007"\n', None, {}),
        ('a,b\nx,"1,234"\nx,"2,007"\n', 2007, {"thousands": ","}),
        ('a,b\nx,"1,234"\nx,"2,007"\n', 2.007, {"decimal": ","}),
        ('a,b\nx,"1,234.5"\nx,"2,007"\n', 2007, {}),
        ("a;b\nx;1,5\nx;2.5\n", None, {}),
        ("a;b\nx;1.5\nx;2,5\n", None, {}),
        ("a;b\nx;1.500\nx;2,500\n", None, {}),
        ("a;b\nx;0,125\nx;2,007\n", 2.007, {}),  # no thousands begin with 0
        ("a;b\nx;1234,125\nx;2,007\n", 2.007, {}),
        ("a;b\nx;1.234.567\nx;2.007\n", 2007, {}),
        ("a;b\nx;1\nx;2 007\n", 2007, {}),
        ("a;b\nx;1\nx;2\u2019007\n", 2007, {}),
        ("a;b\nx;1\nx;1_000\n", None, {}),  # Python would read it
        ("a;b\nx;1\nx;1,5E+03\n", 1500, {}),
        ("a,b\nx,1\nx,12 %\n", None, {}),
        ("a,b\nx,1\nx,1.2.3\n", None, {}),
        ("a,b\nx,1\nx,1e999\n", None, {}),
        ("a,b\nx,1\nx,12 34\n", None, {}),
        ("a;b\nx;1\nx;2 007 or so\n", None, {}),
    ],
)
def test_marks_of_numbers(tmp_path, text, value, options):
    path, settings = save(tmp_path / "a.csv", text), SeriesSettings(seed=0, **options)
    if value is None:
        with pytest.raises(ValueError, match=r"line [23]"):
            read_table(path, choose_columns(path, settings), settings)
        return
    assert read_table(path, choose_columns(path, settings), settings).values[1, 0] == value


def test_doubtful_marks_are_explained(tmp_path):
    assert find_marks([["1.234"]]) == (Marks(), "1.234")
    path = save(tmp_path / "a.csv", "a;b\nx;5\nx;2.007\n")
    with pytest.raises(ValueError, match="line 3: '2.007' may be 2.007 or 2007: --decimal . or --thousands . says"):
        choose_columns(path, SeriesSettings())
    path = save(tmp_path / "a.csv", "a;b\nx;1.5\nx;\nx;2,5\n")
    with pytest.raises(ValueError, match="line 4: '2,5' has another decimal mark than '1.5' in line 2: --decimal"):
        choose_columns(path, SeriesSettings())


def test_thousands_are_said(tmp_path):
    path = save(tmp_path / "a.csv", "a;b\nx;1,5\nx;2.007\n")
    assert read_table(path, choose_columns(path, SeriesSettings())).notes == [
        "thousands are separated by '.': '2.007' is read as 2007"
    ]


def test_a_newer_file_is_read_as_the_older_one(tmp_path):
    """What decides nothing by itself is read as in the file of the training: marks of numbers, day and month."""
    old = save(tmp_path / "a.csv", "date;b\n31/12/2020;1,5\n01/01/2021;2,5\n")
    new = save(tmp_path / "b.csv", "date;b\n02/01/2021;1.234\n03/01/2021;2.345\n")
    facts = choose_columns(old, SeriesSettings())
    assert (facts["decimal"], facts["date_format"]) == (",", "%d/%m/%Y")
    table = read_table(new, facts)
    assert table.values[:, 0].tolist() == [1234, 2345] and table.moments[1] == datetime(2021, 1, 3)
    with pytest.raises(ValueError, match="line 2"):
        choose_columns(new, SeriesSettings())


@pytest.mark.parametrize(
    "text, names",
    [
        ("date,sales, net\n2020-01-01,1,2\n", ["date", "sales", "net"]),
        ('date;"sales, net"\n2020-01-01;1\n', ["date", "sales, net"]),
        ("date;sales, net\n2020-01-01;1,5\n2020-01-02;2\n", ["date", "sales, net"]),
        ("date|sales,net\n2020-01-01|1\n2020-01-02|2\n", ["date", "sales,net"]),
        ("sales\n1\n2\n", ["sales"]),
        ("date,sales,\n2020-01-01,1,\n2020-01-02,2,\n", ["date", "sales"]),
        (",date,sales\n0,2020-01-01,1\n1,2020-01-02,2\n", ["", "date", "sales"]),
        ('date,"sales ""net"""\n2020-01-01,1\n', ["date", 'sales "net"']),
        ("date,sales\r2020-01-01,1\r2020-01-02,2\r", ["date", "sales"]),
    ],
)
def test_delimiters_and_headers(tmp_path, text, names):
    path = save(tmp_path / "a.csv", text)
    assert read_rows(path).header == names
    if "date" in names:
        assert choose_columns(path, SeriesSettings())["date"] == "date"


def test_a_number_sign_within_quotes_is_no_comment(tmp_path):
    rows = read_rows(save(tmp_path / "a.csv", 'a,b\n"x\n# y",1\nz,2\n#z,3\nw,4\n'))
    assert rows.columns == [["x # y", "z", "w"], ["1", "2", "4"]] and list(rows.lines) == [3, 4, 6]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"PK\x03\x04rest", "zip archive, not text"),
        ("a,b\n1,2\n".encode("utf-16-le"), "UTF-16 without a byte-order mark.* --encoding utf-16-le"),
        (b"a,b\n1,2\n1,\xe9\n", "is not UTF-8 text .* in line 3, at byte 10.* --encoding latin-1 .or cp1252"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "cannot be decompressed: Compressed file ended"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:12] + b"xxxxxxxxxxxx", "cannot be decompressed"),
        (b"\xff\xfea\x00,", "is not UTF-16"),
        (b"2020-01-01,1\n2020-01-02,2\n", "the first line should name the columns"),
        (b"2020-01-01;1,5\n2020-01-02;2,5\n", "the first line should name the columns"),
        (b"a,a\n1,2\n", "two columns have the same name"),
    ],
)
def test_files_that_are_no_tables(tmp_path, data, words):
    path = save(tmp_path / "a.csv", data)
    with pytest.raises(ValueError, match=words) as refused:
        read_rows(path)
    assert str(path) in str(refused.value)


def test_a_compressed_file_is_bounded(tmp_path):
    path = save(tmp_path / "a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 500_000, mtime=0))
    set_max_memory("4M")
    try:
        with pytest.raises(FileError, match="--max-memory"):
            read_rows(path)
    finally:
        set_max_memory(None)
    assert (
        whole_text(save(tmp_path / "b.gz", gzip.compress(b"one ", mtime=0) + gzip.compress(b"two", mtime=0)))
        == "one two"
    )


# ---- which columns


def test_the_last_column_with_numbers_is_forecast(tmp_path):
    path = save(tmp_path / "a.csv", "date,sales,remark\n2020-01-01,1,fine\n2020-01-02,2,\n")
    rows = read_rows(path)
    facts = choose_columns(path, SeriesSettings(), rows)
    assert facts["target"] == "sales" and rows.notes == ["the last column with numbers is forecast, 'sales'"]
    path = save(tmp_path / "a.csv", "a,b,c\n1,7,north\n2,NA,5\n3,,south\n4,-,\n")  # gaps are neither numbers nor text
    assert choose_columns(path, SeriesSettings())["target"] == "b"
    path = save(tmp_path / "a.csv", "sales,year\n5,1990\n7,1991\n")
    assert choose_columns(path, SeriesSettings())["target"] == "sales"


@pytest.mark.parametrize(
    "text, date, note",
    [
        ("store,sales\n1001,5\n1002,6\n1001,7\n", None, "are in no order: not read as dates"),
        ("day,sales\n5. J\u00e4nner 1990,1\n6. J\u00e4nner 1990,2\n", None, "was not read as dates"),
        ("x,sales\n5;1;1990,1\n6;1;1990,2\n", None, "was not read as dates"),
        ("n,sales\n1,5\n2,6\n", None, None),
        ("place,sales\nnorth,5\nsouth,6\n", None, None),
        ("n,when,sales\n1,2020-01-01,3\n2,2020-01-02,4\n", "when", None),
    ],
)
def test_what_looks_like_dates_is_said(tmp_path, text, date, note):
    path = save(tmp_path / "a.csv", text)
    rows = read_rows(path)
    assert choose_columns(path, SeriesSettings(delimiter=","), rows)["date"] == date
    assert len(rows.notes) == (note is not None) and (note is None or note in rows.notes[0])


def test_uneven_steps_are_said_once(tmp_path):
    days = [1, 2, 3, 5, 6, 9]
    path = save(tmp_path / "a.csv", "date,b\n" + "".join(f"2020-01-0{day},{day}\n" for day in days))
    notes = read_table(path, choose_columns(path, SeriesSettings())).notes
    assert notes == ["the steps between dates differ: mostly 1 day, 2 others, the first at line 5"]


# ---- dates


@pytest.mark.parametrize("pattern, step", DATES)
def test_dates_go_there_and_back(pattern, step):
    moments = dates_of(step, 20)
    cells = [write_date(moment, pattern) for moment in moments]
    read, form, others = read_dates(cells)
    assert [moment.replace(tzinfo=None) for moment in read] == moments and not others
    assert [form.write(moment) for moment in read] == cells and uneven_steps(read) is None
    assert [form.write(moment) for moment in continue_moments(read[:15], 5)] == cells[15:]


def test_day_and_month_are_told_apart_or_asked_for():
    months = [f"{month:02}/01/2020" for month in range(1, 13)]
    assert read_dates([*months, "01/01/2021"])[1:] == (DateForm("%m/%d/%Y"), ["%d/%m/%Y"])
    assert str(read_dates(["11/01/2020", "12/01/2020", "01/01/2021"])[1]) == "%m/%d/%Y"
    for cells in (months[:9], ["12/01/2020", "01/01/2021"]):
        with pytest.raises(UnreadDates, match="may be %d/%m/%Y or %m/%d/%Y"):
            read_dates(cells)
    assert read_dates(months[:9], "%m/%d/%Y")[0][1] == datetime(2020, 2, 1)
    with pytest.raises(UnreadDates, match="may be"):
        read_dates(["20/01/02", "20/01/03", "20/01/04"])
    with pytest.raises(UnreadDates, match="got '2020-02-30'") as refused:
        read_dates(["2020-02-28", "2020-02-29", "2020-02-30"])
    assert refused.value.row == 2


def test_dates_of_working_days_and_of_ends_of_months_go_on():
    def after(*cells):
        moments, form, _ = read_dates(list(cells))
        assert uneven_steps(moments) is None
        return [form.write(moment) for moment in continue_moments(moments, 3)]

    assert after("2020-01-02", "2020-01-03", "2020-01-06", "2020-01-07", "2020-01-08", "2020-01-09") == [
        "2020-01-10", "2020-01-13", "2020-01-14"
    ]  # fmt: skip
    assert after("31.12.2019", "31.01.2020", "29.02.2020") == ["31.03.2020", "30.04.2020", "31.05.2020"]
    assert after("2019-09-30", "2019-10-31") == ["2019-11-30", "2019-12-31", "2020-01-31"]
    assert after("1.2.2020", "2.2.2020") == ["3.2.2020", "4.2.2020", "5.2.2020"]
    assert after("January 1990", "February 1990") == ["March 1990", "April 1990", "May 1990"]


@pytest.mark.parametrize("pattern", ["day", "%Y-%Q", "%Y %Y", "%"])
def test_bad_date_formats_are_refused(pattern):
    with pytest.raises(ValueError, match="date_format should be like"):
        check_date_format(pattern)
    with pytest.raises(ValueError, match="date_format"):
        SeriesSettings(date_format=pattern)
    check_date_format("%A %d. %B %Y")  # what strptime knows besides


# ---- what was once misread


def read(path, text, **options):
    """The ``Table`` of a text, by its own facts."""
    settings = SeriesSettings(seed=0, **options)
    return read_table(path, choose_columns(save(path, text), settings), settings)


@pytest.mark.parametrize(
    "text, line, value, cure",
    [
        ("date,y\n2020-01-01,1.234\n2020-01-02,987\n", 2, "1.234", "--decimal . or --thousands ."),
        ("date,y\n2020-01-01,987\n2020-01-02,1.234\n", 3, "1.234", "--decimal . or --thousands ."),
        ("date,n,y\n2020-01-01,1.234,1.5\n2020-01-02,987,2.5\n", None, "1.234", None),  # y decides
        ("date;y\n2020-01-01;1,234\n2020-01-02;987\n", 2, "1,234", "--decimal , or --thousands ,"),
        ("date\ty\n2020-01-01\t1,234\n2020-01-02\t987\n", 2, "1,234", "--decimal , or --thousands ,"),
        ("date;y\n2020-01-01;1.234\n2020-01-02;987\n", 2, "1.234", "--decimal . or --thousands ."),
    ],
)
def test_three_digits_beside_whole_numbers_are_not_guessed(tmp_path, text, line, value, cure):
    path = tmp_path / "a.csv"
    if line is None:
        assert read(path, text, inputs="n").values[0].tolist() == [1.5, 1.234]
        return
    with pytest.raises(ValueError, match=re.escape(f"line {line}: {value!r} may be")) as refused:
        read(path, text)
    assert cure in str(refused.value)
    mark = value[1]
    assert 1.234 in read(path, text, decimal=mark).values and 1234 in read(path, text, thousands=mark).values


def test_three_decimals_throughout_are_decimals_and_said(tmp_path):
    text = "date,n,y\n2020-01-01,5,1.234\n2020-01-02,7,\n2020-01-03,8,2.007\n"
    path = save(tmp_path / "a.csv", text)
    values = read(path, text, inputs="n", fill="drop").values
    assert values.tolist() == [[1.234, 5], [2.007, 8]]  # whole numbers of another column say nothing
    for options, count in (({}, 1), ({"decimal": "."}, 0), ({"thousands": "."}, 0), ({"thousands": "none"}, 0)):
        rows = read_rows(path)
        choose_columns(path, SeriesSettings(inputs="n", **options), rows)
        said = ["'1.234' is read as a decimal number: if it is 1234, --thousands . says so"]
        assert rows.notes == said * count


@pytest.mark.parametrize(
    "cells, coming",
    [
        (["2020-01-31 9:00", "2020-01-31 16:00", "2020-01-31 23:00"], ["2020-02-01 6:00", "2020-02-01 13:00"]),
        (["2020-1-30 09:00", "2020-1-31 09:00"], ["2020-2-1 09:00", "2020-2-2 09:00"]),
        (["1/30/2020 22:00", "1/31/2020 10:00", "1/31/2020 22:00"], ["2/1/2020 10:00", "2/1/2020 22:00"]),
        (["10/30/2020 9:00", "10/31/2020 0:00", "10/31/2020 15:00"], ["11/1/2020 6:00", "11/1/2020 21:00"]),
        (["12/30/2019", "12/31/2019", "1/1/2020"], ["1/2/2020", "1/3/2020"]),
        (["01/9/2020", "01/11/2020", "01/13/2020"], ["01/15/2020", "01/17/2020"]),
        (["2020-01-31 23:59:59.0", "2020-01-31 23:59:59.5"], ["2020-02-01 00:00:00.0", "2020-02-01 00:00:00.5"]),
        (["2020-01-01 00:00:01.25", "2020-01-01 00:00:01.5"], ["2020-01-01 00:00:01.75", "2020-01-01 00:00:02.0"]),
        (["2020-01-01 00:00:00.000000000", "2020-01-01 00:00:01.000000000"],
         ["2020-01-01 00:00:02.000000000", "2020-01-01 00:00:03.000000000"]),
        (["1/31/2020 9:30 PM", "1/31/2020 10:30 PM"], ["1/31/2020 11:30 PM", "2/1/2020 12:30 AM"]),
        (["1577836800.0", "1577836800.5"], ["1577836801.0", "1577836801.5"]),
        (["1577836800", "1577836800.5"], ["1577836801", "1577836801.5"]),
        (["1577836800", "1577836801"], ["1577836802", "1577836803"]),
        (["1577836800000.0", "1577836801000.0"], ["1577836802000.0", "1577836803000.0"]),
        (["May 1, 2020", "May 2, 2020"], ["May 3, 2020", "May 4, 2020"]),
    ],
)  # fmt: skip
def test_each_part_of_a_date_is_written_as_in_the_file(cells, coming):
    moments, form, _ = read_dates(cells)
    assert [form.write(moment) for moment in moments] == cells
    assert [form.write(moment) for moment in continue_moments(moments, 2)] == coming


def months_and(word, years, every=12):
    names = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
    rows = [f"{name},{n}\n" for n, name in enumerate(names)]
    return "month,y\n" + ("".join(rows) + f"{word},66\n") * years


@pytest.mark.parametrize(
    "text, line, words",
    [
        (months_and("Total", 3), 14, "'Total' is no row"),
        (months_and("Total 2020", 1), 14, "'Total 2020' is no row"),
        (months_and("", 3), 14, "no name in column 'month'"),
        (months_and("Total", 1) + "Average,5\nMin,0\nMax,11\nCount,12\n", 14, "'Total' is no row"),
        ("n,place,y\n1,north,5\n2,Sum:,6\n" + "3,south,7\n" * 9, 3, "'Sum:' is no row"),
    ],
)
def test_totals_are_refused_wherever_they_stand(tmp_path, text, line, words):
    with pytest.raises(ValueError, match=f"line {line}: .*{re.escape(words)}.*: delete the line, or put # before it"):
        read_rows(save(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    "cells, values, sign",
    [
        (["$1,234.50", "-$2.25", "$ 3"], [1234.5, -2.25, 3], "$"),
        (["1.234,50 €", "2,25€", "-3,00 €"], [1234.5, 2.25, -3], "€"),
        (["£1.5", "n/a", "£3.5"], [1.5, np.nan, 3.5], "£"),
    ],
)
def test_one_currency_sign_in_a_whole_column_is_left_out(tmp_path, cells, values, sign):
    path = save(tmp_path / "a.csv", "n;price\n" + "".join(f"{n};{cell}\n" for n, cell in enumerate(cells * 4)))
    settings = SeriesSettings(seed=0, fill="previous")
    rows = read_rows(path)
    assert rows.notes == [f"the sign {sign!r} is left out of the numbers in price"]
    table = read_table(path, choose_columns(path, settings), settings)
    whole = np.array(values)
    whole[np.isnan(whole)] = whole[0]
    assert table.values[:, 0].tolist() == np.tile(whole, 4).tolist()


@pytest.mark.parametrize("last", ["€3", "3", "$3$", "$x", "($3)"])
def test_other_currency_signs_stay(tmp_path, last):
    path = save(tmp_path / "a.csv", f"n,price\n1,$1\n2,$2\n3,{last}\n")
    rows = read_rows(path)
    assert rows.column("price") == ["$1", "$2", last] and not rows.notes


@pytest.mark.parametrize("total, refused", [("320.5", True), ("320.4", False), ("28.5", False)])
def test_a_total_without_a_name_is_refused_where_there_are_no_dates(tmp_path, total, refused):
    path = save(tmp_path / "a.csv", "y\n" + "".join(f"{n}.5\n" for n in range(5, 25)) + "20.5\n" + f"{total}\n")
    facts = choose_columns(path, SeriesSettings(seed=0))
    if not refused:
        assert len(read_table(path, facts)) == 22
        return
    with pytest.raises(
        ValueError, match=r"line 23, column 'y': 320.5 is the sum of the rows above .*: delete the line"
    ):
        read_table(path, facts)


def test_rows_of_zeros_are_no_totals(tmp_path):
    path = save(tmp_path / "a.csv", "y\n" + "0\n" * 9)
    assert len(read_table(path, choose_columns(path, SeriesSettings(seed=0)))) == 9


@pytest.mark.parametrize(
    "text",
    [
        "kind,y\n" + "mean,5\n" * 9,  # each row is one
        "kind,y\n" + "min,5\nmax,6\n" * 9,
        "remark,y\n,5\n,6\nrain,7\n,8\n",  # a column of remarks
        "place,date,y\nnorth,2020-01-01,5\nnorth,2020-01-02,6\n,2020-01-03,7\nnorth,2020-01-04,6\nnorth,2020-01-05,6\n",
        "n,place,y\n1,north,5\n2,,6\n3,north,7\n4,north,5\n5,north,5\n",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_total_is_read(tmp_path, text):
    assert len(read_rows(save(tmp_path / "a.csv", text))) == text.count("\n") - 1


@pytest.mark.parametrize(
    "text, date, values",
    [
        ("created,date,y\n2021-05-03,2020-01-01,1\n2021-05-02,2020-01-02,2\n2021-05-01,2020-01-03,3\n", "date", "123"),
        ("created,Month,y\n2021-05-03,2020-03,1\n2021-05-02,2020-02,2\n2021-05-01,2020-01,3\n", "Month", "321"),
        ("created,when,y\n2021-05-03,2020-01-01,1\n2021-05-02,2020-01-02,2\n2021-05-01,2020-01-03,3\n", "when", "123"),
        ("seen,when,y\n2021-05-03,2020-01-01,1\n2021-05-09,2020-01-02,2\n2021-05-11,2020-01-03,3\n", "when", "123"),
        ("seen,when,y\n2021-05-03,2020-01-01,1\n2021-05-09,2020-01-03,2\n2021-05-09,2020-01-09,3\n", "when", "123"),
        ("day,time,y\n2020-01-01,2020-01-01 0:00,1\n2020-01-01,2020-01-01 2:00,2\n", "time", "12"),
        ("created,year,y\n2021-05-03,2001,1\n2021-05-02,2002,2\n2021-05-01,2003,3\n", "year", "123"),
    ],
)  # fmt: skip
def test_one_of_several_columns_of_dates_is_taken_and_said(tmp_path, text, date, values):
    path, other = save(tmp_path / "a.csv", text), text.split(",")[0]
    rows = read_rows(path)
    assert choose_columns(path, SeriesSettings(), rows)["date"] == date
    assert rows.notes == [f"several columns hold dates: {date!r} is taken, not {other!r}; --date NAME takes another"]
    assert read(path, text).values[:, 0].tolist() == list(map(int, values))
    assert choose_columns(path, SeriesSettings(date=other))["date"] == other


def test_a_year_beside_the_dates_is_no_second_column_of_them(tmp_path):
    rows = read_rows(save(tmp_path / "a.csv", "date,year,y\n2020-01-01,2020,1\n2020-01-02,2020,2\n"))
    assert choose_columns(rows.path, SeriesSettings(), rows)["date"] == "date" and rows.notes == []


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", '"sep=;"\n', "sep=;\r"])
def test_the_separator_line_of_excel_is_understood(tmp_path, first):
    end = first[len(first.rstrip()) :]
    path = save(tmp_path / "a.csv", first + end.join(["a;b,c", "x;1", "y;2", ""]))
    rows = read_rows(path)
    assert (rows.header, rows.delimiter, list(rows.lines)) == (["a", "b,c"], ";", [3, 4])
    save(path, first + "a|b" + end + "x|1" + end)
    assert read_rows(path, "|").header == ["a", "b"]  # what the user says counts


def test_mixed_line_ends_are_read(tmp_path):
    rows = read_rows(save(tmp_path / "a.csv", 'a,b\r\nx,1\ry,2\n"z\rw",3\r\r\nv,4'))
    assert rows.columns == [["x", "y", "z w", "v"], ["1", "2", "3", "4"]] and list(rows.lines) == [2, 3, 5, 7]


def test_a_quote_that_is_not_closed_is_said(tmp_path):
    text = 'a,b\nx,1\n"y,2\n' + "z,3\n" * 50_000
    with pytest.raises(FileError, match="line 3: a cell begins here that is too long: is a quote not closed"):
        read_rows(save(tmp_path / "a.csv", text))


@pytest.mark.parametrize("text, words", [("id,y\n#1,5\n#2,6\n", "a header but no rows"), ("#1,5\n#2,6\n", "is empty")])
def test_lines_taken_as_comments_are_said(tmp_path, text, words):
    path = save(tmp_path / "a.csv", text)
    with pytest.raises(ValueError, match=f"{words}: 2 lines begin with # and are comments: quote") as refused:
        read_rows(path)
    assert str(path) in str(refused.value)
    quoted = text.replace("#1", '"#1"').replace("#2", '"#2"')
    assert read_rows(save(path, "id,y\n" * ("id" not in text) + quoted)).column("id") == ["#1", "#2"]


# ---- whatever comes


def test_marks_without_cells():
    assert find_marks([[]]) == (Marks(), None) and find_marks([["", "5"]])[0] == Marks()
    with pytest.raises(Undecided):
        find_marks([["1.5", "1,5"]])


def refuses_or_reads(data, **options):
    with tempfile.TemporaryDirectory() as folder:
        _refuses_or_reads(save(Path(folder, "a.csv"), data), SeriesSettings(seed=0, inputs="all", **options))


def _refuses_or_reads(path, settings):
    try:
        table = read_table(path, choose_columns(path, settings), settings)
    except ValueError as error:
        assert str(path) in str(error) or "inputs" in str(error)
        return
    assert np.isfinite(table.values).all() and len(table) > 0
    assert table.moments is None or all(a < b for a, b in zip(table.moments, table.moments[1:], strict=False))


@pytest.mark.long
def test_damaged_tables_raise_nothing_else():
    for number in range(300):
        made = make_table(number)
        refuses_or_reads(hostile.mutated(made.data, "table.csv", random.Random(number)), **made.options)


@pytest.mark.long
@given(lambda: st.binary(max_size=200), max_examples=300)
def test_no_bytes_raise_anything_else(data):
    refuses_or_reads(data)


@pytest.mark.long
@given(
    lambda: st.lists(
        st.lists(
            st.one_of(
                st.sampled_from(
                    ["date", "a", "b", "Total", "", "NA", "2020-01-01", "2020-01-02", "1/2/2020", "1.2.20", "Jan 1990",
                     "1990Q1", "1990", "1577836800", "9999-12-31T23:59:59+14:00", "0001-01-01 00:00-14:00", "1,5",
                     "1.234", "1e999", "-", "#", "'", "\u0661\u0662", "1990-00", "00/00/00", "inf"]
                ),
                st.text(max_size=6),
            ),
            min_size=1, max_size=4,
        ),
        max_size=8,
    ),
    lambda: st.sampled_from([",", ";", "\t", '","', "|"]),
    max_examples=600,
)  # fmt: skip
def test_no_cells_raise_anything_else(rows, delimiter):
    text = "\n".join(delimiter.join(cells) for cells in rows)
    refuses_or_reads(text.encode("utf-8", "replace"))
