"""Text as numbers: the vocabulary, reading files wherever pieces end, refusing what is not text."""

import json

import numpy as np
import pytest

from gpurnn.data import encodings
from gpurnn.data import vocabulary as reading
from gpurnn.data.vocabulary import (
    START_OF_TEXT,
    Vocabulary,
    WordVocabulary,
    builtin_text,
    check_vocabulary,
    count_words,
    read_text,
    saved_vocabulary,
    split,
    vocabulary_of,
    words,
)

UNICODE = (
    "e\u0301 caf\u00e9 \U0001f600\r\n\u4e2d\u6587\t\x00 \u200d\ufeff end\n"  # combining, astral, CRLF, NUL, a late BOM
)


@pytest.fixture
def write(tmp_path):
    def write(content, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_vocabulary_round_trip_through_json():
    vocabulary = Vocabulary(UNICODE)
    again = Vocabulary(json.loads(json.dumps(vocabulary.entries)))
    ids = vocabulary.encode(UNICODE)
    assert again.decode(again.encode(UNICODE)) == UNICODE
    np.testing.assert_array_equal(again.encode(UNICODE), ids)
    assert len(vocabulary) == len(set(UNICODE)) + 1 and ids.min() >= 1 and ids.dtype == np.uint8
    assert vocabulary.entries == "".join(sorted(set(UNICODE)))


def test_vocabulary_unknown_characters():
    vocabulary = Vocabulary("banana")
    np.testing.assert_array_equal(vocabulary.encode("nabx\U0001f600A"), [3, 1, 2, 0, 0, 0])
    assert vocabulary.decode([0, 2]) == "\ufffdb"
    assert vocabulary.unknown("xaxA") == "Ax"
    assert vocabulary.encode("\udc80")[0] == 0  # what a shell hands over for a byte that is not UTF-8
    assert vocabulary.encode("").size == 0 and vocabulary.decode([]) == ""
    for wrong in ([4], [-1]):
        with pytest.raises(ValueError, match="from 0 to 3"):
            vocabulary.decode(wrong)
    with pytest.raises(ValueError, match="at least one"):
        Vocabulary("")


@pytest.mark.parametrize("count, dtype", [(255, np.uint8), (256, np.uint16), (65536, np.uint32)])
def test_vocabulary_takes_the_smallest_ids(count, dtype):
    characters = [chr(0x4E00 + n) if n < 20000 else chr(0x20000 + n) for n in range(count)]
    vocabulary = Vocabulary(characters)
    ids = vocabulary.encode("".join(characters))
    assert ids.dtype == dtype and ids.max() == count
    assert vocabulary.decode(ids) == "".join(characters)


@pytest.mark.parametrize("piece", [1, 2, 3, 1 << 20])
def test_reading_keeps_every_character_wherever_pieces_end(write, monkeypatch, piece):
    monkeypatch.setattr(encodings, "_PIECE", piece)
    files = [write(UNICODE, "a"), write("second\r", "b"), write("", "c")]
    ids, vocabulary = read_text(files)
    assert vocabulary.decode(ids) == UNICODE + "second\r"


def test_reading_through_a_file_equals_reading_in_memory(write, tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "_PIECE", 7)
    path = write(UNICODE * 20)
    ids, vocabulary = read_text([path], folder=tmp_path)
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    mapped, mapped_vocabulary = read_text([path], folder=tmp_path)
    assert isinstance(mapped, np.memmap) and not isinstance(ids, np.memmap)
    np.testing.assert_array_equal(mapped, ids)
    assert mapped.dtype == ids.dtype and mapped_vocabulary.entries == vocabulary.entries
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # nothing is left behind


def test_reading_with_a_given_vocabulary(write):
    path = write("abxc")
    ids, vocabulary = read_text([path], Vocabulary("abc"))
    np.testing.assert_array_equal(ids, [1, 2, 0, 3])


def test_byte_order_mark_is_dropped_once(write):
    ids, vocabulary = read_text([write(b"\xef\xbb\xbfab\xef\xbb\xbf")])
    assert vocabulary.decode(ids) == "ab\ufeff"


@pytest.mark.parametrize("content, place", [(b"abc\xff", 3), (b"\xef\xbb\xbfab\xe4\xb8", 5), ("ü".encode("latin1"), 0)])
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_is_not_utf8_is_named_with_its_place(write, monkeypatch, content, place, piece):
    monkeypatch.setattr(encodings, "_PIECE", piece)
    with pytest.raises(ValueError, match=rf"text\.txt: is not UTF-8 text \(.* at byte {place}\)"):
        read_text([write(content)])


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(ValueError, match=r"the text is empty: .*text\.txt"):
        read_text([write("")])
    with pytest.raises(FileNotFoundError, match="missing"):
        read_text([tmp_path / "missing"])
    with pytest.raises(ValueError, match="not a regular file"):
        read_text([tmp_path])


def test_builtin_text_needs_no_file():
    ids, vocabulary = read_text()
    assert len(ids) > 200_000 and vocabulary.decode(ids) == builtin_text()
    assert "statement" in builtin_text()


def test_split():
    train, valid = split(np.arange(100), 0.1)
    np.testing.assert_array_equal(np.concatenate([train, valid]), np.arange(100))
    assert len(valid) == 10
    assert len(split(np.arange(100), 0)[1]) == 0
    for wrong in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="valid"):
            split(np.arange(100), wrong)


# ---- words


def test_words_marks_and_line_ends():
    text = "It\u2019s <unk>'s \u201cgate\u201d:\tIl n'est\u00a0pas 3.5%\n\n(caf\u00e9\u4e2d\u6587) a-b \U0001f600!?"
    first = "It\u2019s|<unk>|'|s|\u201c|gate|\u201d|:|Il|n'est|pas|3|.|5|%|\n|\n"
    assert "|".join(words(text)) == first + "|(|caf\u00e9\u4e2d\u6587|)|a|-|b|\U0001f600|!|?"
    assert words(" \t") == []


def test_word_vocabulary():
    vocabulary = WordVocabulary(["the", "end", ".", "\n"])
    again = vocabulary_of(json.loads(json.dumps(vocabulary.entries)))
    np.testing.assert_array_equal(again.encode("the  end of it.\n"), [1, 2, 0, 0, 3, 4])
    assert len(again) == 5 and again.dtype == np.uint8 and again.encode("").size == 0
    assert again.unknown("the bitter End <unk>") == "End bitter"
    assert isinstance(vocabulary_of("abc"), Vocabulary)
    with pytest.raises(ValueError, match="at least one word"):
        WordVocabulary([])


def test_words_are_joined_readably():
    text = 'He said: "No (or yes), 5%."\nThen it\'s <unk>, "so" she... '
    vocabulary = WordVocabulary(count_words([text]))
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text.rstrip()
    for n in range(len(ids)):  # what is there stays as it is when more comes
        assert vocabulary.decode(ids).startswith(vocabulary.decode(ids[:n]))


def test_count_words_keeps_the_commonest():
    assert count_words(["b a <unk> a", "c a b\n"]) == ["a", "b", "\n", "c"]
    assert count_words(["b a a", "c a b"], 2) == ["a", "b"]


@pytest.mark.parametrize("piece", [1, 3, 7, 1 << 20])
def test_reading_words_wherever_pieces_end(write, monkeypatch, piece):
    text = "the gate, the caf\u00e9's gate\nkeeps \u4e2d\u6587 " * 20 + "longest-without-any-space"
    path = write(text)
    monkeypatch.setattr(encodings, "_PIECE", piece)
    ids, vocabulary = read_text([path], level="words", size=5)
    assert vocabulary.entries == ["gate", "the", "\n", ",", "caf\u00e9's"]
    np.testing.assert_array_equal(ids, vocabulary.encode(text))
    monkeypatch.setattr(reading, "IN_MEMORY", 10)
    mapped, _ = read_text([path], vocabulary, level="words")
    np.testing.assert_array_equal(mapped, ids)
    with pytest.raises(ValueError, match="empty"):
        read_text([write("  ", "blank.txt")], level="words")


def test_read_lines(write):
    assert encodings.read_lines(write("a\r\n\nb\u0085c\x0bd \n")) == ["a", "", "b\u0085c\x0bd "]
    assert encodings.read_lines(write("\ufeffa\nb")) == ["a", "b"]
    assert encodings.read_lines(write("")) == []
    with pytest.raises(ValueError, match="not UTF-8"):
        encodings.read_lines(write(b"a\n\xff\n"))


# ---- documents


@pytest.mark.parametrize("entries", ["ab\n", ["a", "b", "\n"]])
def test_a_vocabulary_with_documents_round_trips_through_json(entries):
    plain, vocabulary = type(vocabulary_of(entries))(entries), type(vocabulary_of(entries))(entries, "\n")
    assert plain.begins is None and saved_vocabulary(plain) == plain.entries
    assert vocabulary.begins == vocabulary.encode("\n")[0]
    again = vocabulary_of(json.loads(json.dumps(saved_vocabulary(vocabulary))))
    assert type(again) is type(vocabulary)
    assert (again.entries, again.begins) == (vocabulary.entries, vocabulary.begins)
    for wrong in ("x", "", "ab"):
        with pytest.raises(ValueError, match="begins: expected an entry of the vocabulary"):
            type(vocabulary)(entries, wrong)


@pytest.mark.parametrize(
    "level, saved, begins, error",
    [
        ("words", "ab", None, TypeError),
        ("characters", {"entries": ["a"], "begins": "a"}, "a", TypeError),
        ("characters", {"entries": "ab", "begins": "a"}, None, ValueError),
        ("characters", "ab", "a", ValueError),
        ("characters", {"entries": "bc", "begins": "a"}, "a", ValueError),
        ("characters", {"entries": "bc"}, "b", LookupError),
    ],
)
def test_damaged_vocabularies_are_refused(level, saved, begins, error):
    with pytest.raises(error):
        check_vocabulary(level, saved, begins)
    check_vocabulary("characters", "ab")
    check_vocabulary("characters", {"entries": "ab", "begins": "a"}, "a")


@pytest.mark.parametrize("piece", [1, 3, 1 << 20])
def test_every_document_has_what_begins_it(write, monkeypatch, piece):
    """Once before each file, unless the file before ends with it; not for empty files again and again."""
    monkeypatch.setattr(encodings, "_PIECE", piece)
    files = [write("one\n", "a"), write("", "b"), write("two", "c"), write("", "d"), write("\nthree\n", "e")]
    ids, vocabulary = read_text(files, begins="\n")
    assert vocabulary.decode(ids) == "\none\ntwo\n\nthree\n"
    ids, vocabulary = read_text(files, begins=START_OF_TEXT)
    assert vocabulary.decode(ids) == "\x02one\n\x02two\x02\nthree\n"
    again, same = read_text(files, vocabulary)  # which knows what begins a document
    assert same is vocabulary and again.tolist() == ids.tolist()
    ids, _ = read_text(files, Vocabulary("onetwhr\n\x02"), begins="\n")
    assert vocabulary.decode(ids) == "one\ntwo\nthree\n"
    assert vocabulary.begins == 1  # it comes before the line end


def test_words_have_what_begins_a_document(write):
    """It is known however rare it is, and separates the last word of a file from the first of the next."""
    files = [write("the state the gate the state gate", "a"), write("the gate state", "b")]
    ids, vocabulary = read_text(files, level="words", size=3, begins=START_OF_TEXT)
    assert vocabulary.entries == ["the", "gate", START_OF_TEXT] and vocabulary.begins == 3
    assert ids.tolist() == [3, 1, 0, 1, 2, 1, 0, 2, 3, 1, 2, 0]
    assert vocabulary.decode(ids[6:]) == "<unk> gate\x02the gate <unk>"
    ids, vocabulary = read_text(files, level="words", size=9, begins=START_OF_TEXT)
    assert sorted(vocabulary.entries) == [START_OF_TEXT, "gate", "state", "the"]
