"""Text files of everyday encodings: read alike, or refused with what they are and what to do."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import ROOT

from gpurnn.cli import main
from gpurnn.data import encodings
from gpurnn.data.encodings import check_encoding, ending, read_lines, text_files, text_pieces, whole_text
from gpurnn.data.vocabulary import read_text
from gpurnn.errors import FileError

TEXT = "caf\u00e9 \u4e2d\u6587 \U0001f600\r\nend\n"
TRAIN = ["--epochs=1", "--hidden=4", "--steps=8", "--batch=4", "--backend=cpu", "--no-progress", "--out=run"]


def gpurnn(*arguments, code=0, **options):
    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn", **options)
    assert done.exit_code == code, done.output
    return done


def zipped(name):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), TEXT)  # of 1980: the names of tests hold these bytes
    return data.getvalue()


# ---- what is read


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "mark, encoding",
    [("", "utf-8"), ("\ufeff", "utf-8"), ("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be"), ("\ufeff", "utf-32-le"),
     ("\ufeff", "utf-32-be")],
)  # fmt: skip
def test_unicode_is_read_by_its_mark(tmp_path, monkeypatch, mark, encoding, compressed, piece):
    monkeypatch.setattr(encodings, "_PIECE", piece)
    data = (mark + TEXT).encode(encoding)
    path = tmp_path / "text.txt"
    path.write_bytes(gzip.compress(data, mtime=0) if compressed else data)
    assert "".join(text_pieces(path)) == whole_text(path) == TEXT
    assert read_lines(path) == TEXT.replace("\r", "").split("\n")[:-1]
    if mark:  # it counts more than what somebody says of all files
        assert whole_text(path, "latin-1") == TEXT


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("latin-1", "caf\u00e9\n"), ("cp1252", "\u20ac\u201d"), ("cp1251", "\u043c\u0438\u0440"),
        ("shift_jis", "\u65e5\u672c"), ("gb18030", "\u4e2d\u6587"), ("utf-16-le", TEXT), ("utf-8-sig", TEXT),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_an_encoding_that_is_named(tmp_path, monkeypatch, encoding, text, piece):
    monkeypatch.setattr(encodings, "_PIECE", piece)
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode(encoding))
    assert whole_text(path, check_encoding("encoding", encoding)) == text


def test_odd_text_is_text(tmp_path):
    for data in (b"\0a\0b", b"\0\0", b"\x1b[31mred", b"B", b"\x1f", b"PK is a name", b"BZh", b"a" * 400_000):
        (tmp_path / "text.txt").write_bytes(data)
        assert whole_text(tmp_path / "text.txt").encode() == data


def test_files_of_folders(tmp_path):
    for name in ("b.txt", "a.TXT", "c.txt.gz", "d.csv", ".hidden.txt", "notes"):
        (tmp_path / name).write_text("x")
    assert [file.name for file in text_files([tmp_path, tmp_path / "d.csv"])] == ["a.TXT", "b.txt", "c.txt.gz", "d.csv"]
    assert [ending(name) for name in ("A.CSV.gz", "x.tar", "y", "z.gz")] == [".csv", ".tar", "", ""]
    (tmp_path / "none").mkdir()
    with pytest.raises(FileError, match="none: holds no .txt files"):
        text_files([tmp_path / "none"])


# ---- what is refused

LATIN1 = r"is not UTF-8 text \(.* at byte 3\)\. Save it as UTF-8, or name its encoding: --encoding latin-1"


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), LATIN1),
        ("a.txt", "caf\u00e9 noir\n".encode("latin-1"), LATIN1),
        ("a.txt", "caf\u00e9 ".encode() + b"\xff\n", r"at byte 6\)\. What comes before is UTF-8: the file is damaged"),
        ("a.txt", "caf\u00e9 \u4e2d".encode()[:-1], r"at byte 6\)\. What comes before is UTF-8.* or cut off"),
        ("a.txt", bytes(range(256)), r"at byte 128\), but a binary file"),
        ("a.txt", "once upon".encode("utf-16-le"), "UTF-16 without a byte-order mark: .* --encoding utf-16-le"),
        ("a.txt", "once upon".encode("utf-16-be"), "--encoding utf-16-be"),
        ("a.docx", zipped("word/document.xml"), "is a Word document, not text: save it as plain text"),
        ("a.zip", zipped("a.txt"), "is a zip archive, not text: unpack it first"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF"),
        ("a.rtf", b"{\\rtf1\\ansi", "is a rich-text document"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a Word or Excel document of the old format"),
        ("a.tar", bytes(257) + b"ustar\0", "is a tar archive"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "is a picture"),
        ("a.wav", b"RIFF\x10\0\0\0WAVEfmt ", "is a sound file"),
        ("a.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "compressed by gzip twice"),
        ("a.gz", gzip.compress(b"text" * 100, mtime=0)[:-9], "cannot be decompressed"),
        ("a.gz", gzip.compress(b"text" * 100, mtime=0)[:20] + b"\xff" * 20, "cannot be decompressed"),
        ("a.gz", b"\x1f\x8b", "cannot be decompressed"),
        ("a.docx.gz", gzip.compress(zipped("word/document.xml"), mtime=0), "is a Word document"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=f"{re.escape(name)}: {message}|{re.escape(name)}: .*{message}"):
        whole_text(tmp_path / name)


def test_an_encoding_that_is_not_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\x81c")
    with pytest.raises(FileError, match=r"is not cp1252 text \(.* at byte 2\)\. Is that its encoding\?"):
        whole_text(path, "cp1252")
    path.write_bytes(b"abcd")
    with pytest.raises(FileError, match="is not UTF-16 text .* utf-16-le"):
        whole_text(path, "utf-16")
    for wrong in ("hex", "utf-9", "", "a\0b"):
        with pytest.raises(ValueError, match="encoding should be an encoding such as utf-8, latin-1 or cp1252, got"):
            check_encoding("encoding", wrong)


def test_gzip_is_read_up_to_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a gate\n" * 300_000, mtime=0))
    monkeypatch.setenv("GPURNN_MAX_MEMORY", "9M")
    assert len(read_text([path])[0]) == 2_100_000
    monkeypatch.setenv("GPURNN_MAX_MEMORY", "2M")
    with pytest.raises(FileError, match="a.txt.gz: decompresses to more than 2.1 MB.*--max-memory 4G"):
        list(text_pieces(path))
    with pytest.raises(FileError, match="a.txt.gz: its lines would take"):
        whole_text(path)


# ---- on the command line


@pytest.mark.long
def test_a_run_keeps_the_encoding_of_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.txt").write_bytes(("caf\u00e9 noir, " * 40).encode("latin-1"))
    Path("new.txt").write_text("caf\u00e9 noir, " * 40, encoding="utf-8")
    assert "--encoding latin-1" in gpurnn("train", "text", "old.txt", *TRAIN, code=2).stderr
    assert "440 characters" in gpurnn("train", "text", "old.txt", *TRAIN, "--encoding=latin-1").output.replace(",", "")
    assert json.loads(Path("run", "config.json").read_text())["settings"]["encoding"] == "latin-1"
    gpurnn("train", "text", "--resume", "--out=run", "--epochs=2", "--no-progress")
    old, new = (json.loads(gpurnn("evaluate", "run", *more, "--json").stdout)
                for more in (["old.txt"], ["new.txt", "--encoding=utf-8"]))  # fmt: skip
    assert old["unknown"] == 0 and old["nats"] == new["nats"]
    assert json.loads(gpurnn("evaluate", "run", "new.txt", "--json").stdout)["unknown"] == 2 * 40
    assert (
        "--label is not for a run of the task text" in gpurnn("evaluate", "run", "old.txt", "--label=a", code=2).stderr
    )
    assert "encoding should be" in gpurnn("train", "text", "old.txt", "--out=other", "--encoding=hex", code=2).stderr


@pytest.mark.long
def test_a_folder_of_texts_and_no_standard_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for name in "ba":
        Path("books", f"{name}.txt").write_text(f"once upon a time {name} " * 10)
    assert "books: 380 characters" in gpurnn("train", "text", "books", *TRAIN).output
    assert json.loads(gpurnn("evaluate", "run", "books", "--json").stdout)["characters"] == 380
    assert "Save what comes from a pipe to a file" in gpurnn("train", "text", "-", *TRAIN, code=2).stderr
    assert "Leave out the quotes" in gpurnn("evaluate", "run", "books/*.txt", code=2).stderr


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs os.wait4")
def test_a_large_text_takes_little_memory(tmp_path):
    """A text of 41 MB is never in memory as a whole, nor are its ids, where only 10 MB may be."""
    (tmp_path / "big.txt").write_bytes(b"a gate keeps the state, a state opens the gate.\n" * 850_000)
    program = (
        "import resource; from gpurnn.data.vocabulary import read_text; import gpurnn.tasks.text\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); ids, _ = read_text(['big.txt']); print(len(ids), peak() - before)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GPURNN_MAX_MEMORY": "10M"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    length, grown = map(int, done.stdout.split())
    assert length == 48 * 850_000 and grown << 10 < 48 * 850_000, done
