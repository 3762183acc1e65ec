"""Labelled texts: tables of texts and labels, a file for each class, or a folder for each class."""

import collections
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FileError
from .encodings import ending, lines_of, text_files, whole_text
from .rows import first_lines, fitted, misfit, named_width, read_rows, skip_or_refuse

EXPECTED = (
    "expected a table of texts and labels (CSV, tab-separated or JSON lines), a file for each class with a text in "
    "each line, or a folder with a folder of texts for each class"
)
_ENDINGS = (".txt", ".tsv", ".csv", ".jsonl", ".ndjson")
_TEXT_NAMES = {
    "text", "texts", "sentence", "review", "review_text", "reviewtext", "comment", "comment_text", "message", "content",
    "body", "tweet", "document", "question", "headline", "phrase", "utterance", "post", "sms", "abstract",
    "description",
}  # fmt: skip
_LABEL_NAMES = {
    "label", "labels", "class", "category", "sentiment", "target", "rating", "topic", "genre", "polarity", "tag",
    "stars", "score", "intent", "emotion", "language", "label_text", "labeltext", "class_name", "y",
}  # fmt: skip
_FEW = 100  # a column with more different values is not taken for the labels
_ROWS_FOR_A_HEADER = 6  # with fewer rows nothing shows that the first one is a header


@dataclass(frozen=True)
class ReadOptions:
    """How files of labelled texts are read.

    encoding: as of ``text_pieces``. text, label: the columns of a table, by name or by number from 1; None finds them.
    strict: whether a row without a text or a label refuses its file; else it is skipped and counted.
    """

    encoding: str | None = None
    text: str | None = None
    label: str | None = None
    strict: bool = False


@dataclass
class Examples:
    """What files of labelled texts hold: (text, label) pairs in order, how many rows were skipped, and what a user
    should know about how they were read, a sentence each."""

    pairs: list = field(default_factory=list)
    skipped: int = 0
    notes: list = field(default_factory=list)


def read_labelled(files, how=None, classes=None, *, labels=True):
    """The ``Examples`` of some files and folders.

    A table has a text and a label in each row: CSV, tab-separated values, JSON lines. Its columns are found by ``how``,
    by their names, or by their values: the one of few values is the label. Any other file is the texts of one class,
    one in each line; the class is the file's name without its ending, or the ending alone where the names are equal
    (reviews.pos, reviews.neg). A folder stands for the files in it, or, where it has folders only, for a class each,
    with a text in each file.

    classes: the labels that are allowed, None for any. labels: whether texts must have one; else text and label may be
    "", there is a pair for each row or line of a file, and a row that cannot be read refuses its file.
    Raises FileError that names the file, and the line, for what is not text, has no label, or has a label that is not
    allowed.
    """
    reading = _Reader(how or ReadOptions(), classes, labels)
    places = [(file, path) for path in map(Path, files) for file in _files_of(path)]
    names = [Path(file.stem if file.suffix.lower() == ".gz" else file.name) for file, _ in places]
    equal = len({name.stem for name in names}) < len(names)
    for (file, path), name in zip(places, names, strict=True):
        if file.is_dir():
            reading.folder(file)
        else:
            reading.file(file, [name.suffix[1:]] if equal else [name.stem, name.suffix[1:]], skips=file != path)
    if not reading.found:
        first = f". {reading.wrong[0]}" if reading.wrong else ""
        raise FileError(f"{', '.join(map(str, files[:3]))}: no texts: {EXPECTED}{first}")
    if labels and classes is not None:
        _refuse_unknown(reading.found, classes)
    return reading.examples()


def one_class(files, how, label):
    """The FileError for files whose texts are all of one class: how the first of them begins, and what was expected."""
    file = _files_of(Path(files[0]))[0]
    begins = "" if file.is_dir() else f" {file.name} begins with {first_lines(file, how.encoding)}."
    if begins.partition(" begins with ")[2].startswith(("'[", '"[')):
        begins += " Is it a list in JSON? Write one object in each line, as jq -c '.[]' does."
    shown = ", ".join(map(str, files[:3]))
    return FileError(f"{shown}: there is only one class, {label!r}.{begins} {EXPECTED[0].upper()}{EXPECTED[1:]}")


def describe_classes(pairs, most=10):
    """Sentences about the classes of (text, label) pairs: how many texts each has, and which differ only in case."""
    counts = collections.Counter(label for _, label in pairs)
    shown = [f"{label} {count:,}" for label, count in counts.most_common(most)]
    if len(counts) > most:
        shown.append(f"and {len(counts) - most} more")
    alike = collections.defaultdict(list)
    for label in sorted(counts):
        alike[label.casefold()].append(label)
    same = [" and ".join(labels) for labels in alike.values() if len(labels) > 1]
    notes = [f"Classes: {', '.join(shown)}"]
    if same:
        more = f" (and {len(same) - 3} more)" if len(same) > 3 else ""
        notes.append(f"Classes that differ only in case are different ones: {'; '.join(same[:3])}{more}")
    return notes


# ---- files and folders


def _files_of(path):
    """The file itself, or the files in a folder; the folders in it if it holds no files, as each is then a class.

    Raises FileError for a folder that holds texts and folders of texts, which may both be classes.
    """
    if not path.is_dir():
        return [path]
    inside = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    folders = [entry for entry in inside if entry.is_dir()]
    texts = [entry.name for entry in inside if ending(entry) in _ENDINGS and not entry.is_dir()]
    full = [folder.name for folder in folders if any(ending(entry) in _ENDINGS for entry in folder.iterdir())]
    if texts and full:
        raise FileError(
            f"{path}: holds files ({_few(texts)}) and folders of files ({_few(full)}): expected either a file or a "
            "folder for each class. Move the others elsewhere, or give the files by name"
        )
    return text_files([path], _ENDINGS) if texts else folders or text_files([path], _ENDINGS)


class _Reader:
    """What has been read so far, and how."""

    def __init__(self, how, classes, labels):
        self.how, self.classes, self.labels = how, classes, labels
        self.found, self.notes = [], []  # (text, label, file, line); sentences
        self.wrong, self.skipped_rows = [], 0  # what is wrong with each skipped file

    def examples(self):
        notes = list(self.notes)
        if self.wrong:
            notes.append(f"{_count(len(self.wrong), 'file')} skipped. The first: {self.wrong[0]}")
        pairs = [(text, label) for text, label, *_ in self.found]
        return Examples(pairs, len(self.wrong) + self.skipped_rows, notes)

    def folder(self, folder):
        """The texts of one class, one in each file."""
        for file in sorted(entry for entry in folder.iterdir() if entry.name[0] != "." and not entry.is_dir()):
            text = self._text(file, skips=True)
            if text is not None:
                self.found.append((text.strip(), folder.name, file, 1))

    def file(self, file, could_be, skips):
        """A table, or the texts of one class, which is one of the names in ``could_be``."""
        text = self._text(file, skips)
        if text is None:
            return
        table = read_rows(file, text, _is_header)
        if table is not None:
            self._table(table)
            return
        known = [label for label in could_be if label in (self.classes or could_be)]
        label = (known or could_be)[0]
        lines = [(line.strip(), label, file, n) for n, line in enumerate(lines_of(text), 1)]
        self.found += [line for line in lines if line[0] or not self.labels]

    def _text(self, file, skips):
        """The text of a file; None for a bad one of a folder, which is skipped unless ``how`` is strict."""
        try:
            text = whole_text(file, self.how.encoding)
            if not text.strip():
                raise FileError(f"{file}: is empty")
        except FileError as error:
            if self.how.strict or not skips:
                raise
            self.wrong.append(str(error))
            return None
        return text

    def _table(self, table):
        path, wrong, count = table.path, [(*bad, "") for bad in table.bad], 0
        if not table.rows:
            raise FileError(f"{path}: line {wrong[0][0]} {wrong[0][1]}" if wrong else f"{path}: is empty")
        text, label, header = _columns(table, self)
        width = named_width(table.rows[0][1]) if header else table.width
        joins = table.delimiter == "\t" and not header and (text, label, width) == (0, 1, 2)  # a text may have tabs
        for line, cells in table.rows[header:]:
            if joins and len(cells) > width:
                cells = ["\t".join(cells[:-1]), cells[-1]]
            row = fitted(cells, width)
            pair = [row[n].strip() if row and n is not None else "" for n in (text, label)]
            if row is not None and (all(pair) or not self.labels):
                self.found.append((*pair, path, line))
                count += 1
            else:
                expected = _expected(table) if self.labels else f"{_count(width, 'cell')}, as other rows have"
                more = misfit(cells, width, table.delimiter)
                wrong.append((line, f"should be {expected}, got {_shown(cells, table)}", more))
        note = skip_or_refuse(path, wrong, count, self.how.strict or not self.labels, "a text and a label")
        if table.blank and not self.labels:
            shown = _few([f"{line:,}" for line in table.blank], 20)
            self.notes.append(f"{path.name}: rows without a value are left out, in these lines: {shown}")
        self.skipped_rows += len(wrong)
        self.notes += [note] if note else []


# ---- the columns of a table


def _expected(table):
    between = {"\t": "a tab", ",": "a comma", ";": "a semicolon", "|": "a vertical bar", None: "fields for a text"}
    return f"a text, {between[table.delimiter]} and a label" if table.delimiter else "an object with a text and a label"


def _shown(cells, table):
    return repr((table.delimiter or ", ").join(cells)[:60])


def _columns(table, reading):
    """(column of the texts, column of the labels or None, whether the first row is a header)."""
    how, first = reading.how, table.names or table.rows[0][1]
    chosen = [_named(table, first, name, option) for name, option in ((how.text, "text"), (how.label, "label"))]
    given = tuple(chosen)
    named = any(name is not None and not name.isdigit() for name in (how.text, how.label))
    by_name = bool(table.names or named or _is_header(first))
    if not by_name and not reading.labels and _heads_texts(table):
        by_name = True
        reading.notes.append(f"{table.path.name}: line 1 is taken as a header: {', '.join(first)[:80]}")
    for n, known in enumerate((_TEXT_NAMES, _LABEL_NAMES)):
        names = [column for column, cell in enumerate(first) if _plain(cell) in known and column not in chosen]
        if by_name and chosen[n] is None and names:
            chosen[n] = names[0]
    header = by_name and not table.names
    width = named_width(first) if header else table.width
    rows = [row for _, cells in table.rows[header:] if (row := fitted(cells, width)) is not None]
    text, label = _by_values(rows, chosen, reading)
    if text is None or (reading.labels and label is None):
        missing = "texts" if text is None else "labels"
        raise FileError(
            f"{table.path}: cannot tell which of its columns has the {missing} ({', '.join(first)[:80]}): choose by "
            f"name, or by number: --text 1{' --label 2' * reading.labels}. It begins with "
            f"{first_lines(table.path, how.encoding)}"
        )
    if not by_name and label is not None and _stands_out([cells[label].strip() for cells in rows], reading.classes):
        header = True
        reading.notes.append(f"{table.path.name}: line 1 is taken as a header: {', '.join(first)[:80]}")
    if None in given[: 1 + reading.labels] and ((text, label) != (0, 1) or width > 2) and width > 1:
        names = first if header or table.names else [f"column {n + 1}" for n in range(width)]
        labels = f", the labels {names[label]}" if reading.labels else ""
        reading.notes.append(f"{table.path.name}: the texts are {names[text]}{labels}")
    return text, label, header


def _named(table, first, name, option):
    """The column that ``--text`` or ``--label`` names; None if the option is not given."""
    if name is None:
        return None
    if name in first:
        return first.index(name)
    plain = [_plain(cell) for cell in first]
    if _plain(name) in plain:
        return plain.index(_plain(name))
    if name.isdigit() and 1 <= int(name) <= len(first):
        return int(name) - 1
    raise FileError(
        f"{table.path}: has no column {name!r} for --{option}: its columns are {', '.join(first)[:200]}: "
        f"give one of these, or its number"
    )


def _by_values(rows, chosen, reading):
    """Both columns; one that was not chosen is found by its values, and is None if they do not decide it."""
    (text, label), classes, labels = chosen, reading.classes, reading.labels
    width = len(rows[0]) if rows else 0
    free = [n for n in range(width) if n not in chosen]
    values = {n: [cells[n].strip() for cells in rows] for n in free}
    different = {n: len(set(values[n])) for n in free}
    if label is None and classes is not None:
        known = [n for n in free if sum(value in classes for value in values[n]) * 2 > len(rows)]
        label = known[0] if len(known) == 1 else None
    if label is None and labels and width == 2 and free:
        first_is_label = len(free) == 2 and different[0] * 2 <= min(different[1], len(rows))
        label = 0 if first_is_label else free[-1]
    if label is None and width > 2:
        few = [n for n in free if 2 <= different[n] <= min(_FEW, len(rows) // 2)]
        label = few[0] if len(few) == 1 else None
    free = [n for n in free if n != label]
    if text is None and len(free) > 1:
        *_, next_longest, longest = sorted(free, key=lambda n: sum(map(len, values[n])))
        text = longest if sum(map(len, values[longest])) > 2 * sum(map(len, values[next_longest])) else None
    elif text is None and free:
        text = free[0]
    return text, label


def _stands_out(labels, classes):
    """Whether the first cell of a column of labels is not a label but the column's name."""
    counts = collections.Counter(labels)
    if classes is not None:
        known = sum(counts[label] for label in classes)
        return labels[0] not in classes and counts[labels[0]] == 1 and known * 2 > len(labels) - 1
    return (
        len(labels) >= _ROWS_FOR_A_HEADER
        and counts.pop(labels[0]) == 1
        and len(counts) > 1
        and min(counts.values()) > 1
        and not labels[0].lstrip("+-").isdigit()
    )


def _is_header(cells):
    """Whether these are names of columns, one of texts and one of labels."""
    names = {_plain(cell) for cell in cells}
    return bool(names & _TEXT_NAMES) and bool(names & _LABEL_NAMES)


def _heads_texts(table):
    """Whether the first row of a table without labels has names: one of texts, or one above numbers alone."""
    (_, first), *rows = table.rows
    if {_plain(cell) for cell in first} & _TEXT_NAMES:
        return True
    rows = [row for _, cells in rows if (row := fitted(cells, named_width(first))) is not None]
    columns = list(zip(*rows, strict=True))
    return any(
        not name.strip().isdigit() and all(cell.strip().isdigit() for cell in column)
        for name, column in zip(first, columns, strict=False)
    )


def _plain(name):
    return name.strip().strip('"').strip().casefold().replace(" ", "_")


def _refuse_unknown(found, classes):
    for _, label, file, line in found:
        if label not in classes:
            raise FileError(
                f"{file}: line {line} has a label that the model never saw, {label!r}: it knows {', '.join(classes)}"
            )


def _few(names, most=3):
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


def _count(number, what):
    return f"{number:,} {what}{'s' * (number != 1)}"
