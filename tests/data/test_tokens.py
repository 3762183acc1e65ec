"""Tokens from which the text comes back, and the vocabulary of words."""

import unicodedata
from collections import Counter

import numpy as np
import pytest
from optional import given, optional

from gpurnn.data.tokens import JOINER, TokenVocabulary, detokenize, shown, tokenize

st = optional("hypothesis.strategies")

CASES = {
    "L'eau, c'est bon !": "L'￭ eau ￭, c'￭ est bon !",
    "Voyages-tu seule ?": "Voyages ￭-￭ tu seule ?",
    "I don't know... (really?)": "I don'￭ t know ￭. ￭. ￭. (￭ really ￭? ￭)",
    "«Oui», dit-il.": "«￭ Oui ￭» ￭, dit ￭-￭ il ￭.",
    "$3,500.50 at 5 o'clock": "$￭ 3 ￭,￭ 500 ￭.￭ 50 at 5 o'￭ clock",
    "rock'n'roll’s 'quoted'": "rock'￭ n'￭ roll’￭ s '￭ quoted ￭'",
    "": "",
    "a_b été Привет 日本語": "a_b été Привет 日本語",
}


@pytest.mark.parametrize("text", CASES)
def test_tokens_of_known_sentences(text):
    assert tokenize(text) == CASES[text].split()
    assert detokenize(CASES[text].split()) == text


@given(lambda: st.text(st.sampled_from("aB é'’-,.!?\u00a0\u202f \n\t_3(«»日e\u0301\u200d" + JOINER), max_size=20))
def test_every_text_comes_back(text):
    normal = " ".join(unicodedata.normalize("NFC", text.replace(JOINER, "■")).split())
    tokens = tokenize(text)
    assert detokenize(tokens) == normal
    assert all(token.strip(JOINER) and " " not in token for token in tokens)
    assert tokenize(text, lowercase=True) == tokenize(text.lower())


def test_tokens_for_people_have_no_joiners():
    assert shown(tokenize("L'eau, c'est ■ bon!")) == ["L'", "eau", ",", "c'", "est", "■", "bon", "!"]


def test_spaces_and_composed_letters():
    assert tokenize("e\u0301te\u0301\u00a0!\u202f\n") == ["été", "!"]


def test_vocabulary():
    texts = [["b", "a", "a"], ["a", "c", "b"], ["d"]]
    vocabulary = TokenVocabulary.of(texts)
    assert vocabulary.tokens == ["a", "b", "c", "d"] and len(vocabulary) == 8
    assert TokenVocabulary.of(texts, min_count=2).tokens == ["a", "b"]
    assert TokenVocabulary.of(texts, max_size=3).tokens == ["a", "b", "c"]
    np.testing.assert_array_equal(vocabulary.encode(["d", "x", "a"]), [7, 1, 4])
    assert vocabulary.encode([]).dtype == np.int64
    assert vocabulary.decode([0, 1, 2, 3, 4]) == ["<pad>", "<unk>", "<s>", "</s>", "a"]
    assert "a" in vocabulary and "x" not in vocabulary
    assert TokenVocabulary(vocabulary.tokens).tokens == vocabulary.tokens
    with pytest.raises(IndexError):
        vocabulary.decode([8])


def test_a_token_named_like_a_special_one_is_a_word():
    assert TokenVocabulary(["<unk>"]).encode(["<unk>"]).tolist() == [4]


def test_lenient_forms():
    vocabulary = TokenVocabulary(["hello", "￭.", "?", "(￭", "Tom"])
    tokens = ["Hello", ".", "￭?", "(", "tom", "￭-￭"]
    assert vocabulary.encode(tokens).tolist() == [1] * 6
    assert vocabulary.decode(vocabulary.encode(tokens, lenient=True)) == ["hello", "￭.", "?", "(￭", "<unk>", "<unk>"]
    assert vocabulary.unknown(tokens) == ["tom", "-"]


def test_frequent_first_whatever_the_order():
    counts = Counter({"z": 3, "y": 3, "x": 5})
    assert TokenVocabulary.of([list(counts.elements())]).tokens == ["x", "y", "z"]


@pytest.mark.parametrize("tokens", [[], [""], ["a", "a"], ["a", 3]])
def test_wrong_vocabularies_are_refused(tokens):
    with pytest.raises(ValueError, match="tokens: "):
        TokenVocabulary(tokens)


def test_nothing_frequent_enough():
    with pytest.raises(ValueError, match="no token comes 3 times"):
        TokenVocabulary.of([["a", "a"]], min_count=3)
