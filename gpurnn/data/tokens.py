"""Words: text cut into tokens from which it can be put together again, and a vocabulary of the frequent ones.

>>> tokenize("L'eau, c'est bon !")
["L'￭", 'eau', '￭,', "c'￭", 'est', 'bon', '!']
>>> detokenize(["L'￭", "eau", "￭,", "c'￭", "est", "bon", "!"])
"L'eau, c'est bon !"

A token is a run of letters and digits, with an apostrophe where letters follow it (so that l'eau and l'homme, don't and
didn't share a token), or a single other character. ``JOINER`` says where no space stood: at the left of a character
that follows its neighbour at once, at the right of one that is followed by a word at once. So spaces need no rules of a
language: where French puts one before a question mark, the model writes "?" instead of "￭?".
"""

import re
import unicodedata
from collections import Counter

import numpy as np

from ..errors import check_size

JOINER = "\N{HALFWIDTH BLACK SQUARE}"
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
PADDING, UNKNOWN, START, END = range(len(SPECIAL))
_STAND_IN = "\N{BLACK SQUARE}"  # for a joiner in the text itself
_TOKEN, _WORD = re.compile(r"\w+['’](?=\w)|\w+|[^\w\s]"), re.compile(r"\w")


def tokenize(text, lowercase=False):
    """The tokens of a text, a list of strings; ``detokenize`` gives the text back, with every run of white space
    (line ends and non-breaking spaces too) as one space, in Unicode's composed form (NFC).

    lowercase: in lower case, which ``detokenize`` does not undo.
    """
    text = unicodedata.normalize("NFC", text.replace(JOINER, _STAND_IN))
    text = " ".join((text.lower() if lowercase else text).split())
    tokens, end = [], -1
    for match in _TOKEN.finditer(text):
        token = match.group()
        if match.start() == end:
            if _WORD.match(token):
                tokens[-1] += JOINER
            else:
                token = JOINER + token
        tokens.append(token)
        end = match.end()
    return tokens


def detokenize(tokens):
    """The text of tokens, as ``tokenize`` cut it."""
    text, glued = "", True
    for token in tokens:
        text += ("" if glued or token.startswith(JOINER) else " ") + token.strip(JOINER)
        glued = token.endswith(JOINER)
    return text


def shown(tokens):
    """Tokens for people: without joiners, which a text of their own would not have."""
    return [token.strip(JOINER) for token in tokens]


class TokenVocabulary:
    """Tokens and their numbers, after the four of ``SPECIAL``.

    tokens: all but the special ones, in the order of their numbers. ``TokenVocabulary(vocabulary.tokens)`` is the same
    again, so this list is what a JSON file needs to hold. ``TokenVocabulary.of`` makes one of texts. Raises ValueError
    for none, for one that is no non-empty string and for one that comes twice.
    """

    def __init__(self, tokens):
        self.tokens = list(tokens)
        if not self.tokens or not all(isinstance(token, str) and token for token in self.tokens):
            raise ValueError("tokens: expected at least one, each a non-empty string")
        self._ids = {token: n for n, token in enumerate(self.tokens, len(SPECIAL))}
        if len(self._ids) != len(self.tokens):
            raise ValueError("tokens: one of them comes twice")

    @classmethod
    def of(cls, texts, min_count=1, max_size=None):
        """The vocabulary of an iterable of token lists: what occurs at least ``min_count`` times, at most ``max_size``
        tokens, the frequent ones first, of equally frequent ones in the order of code points."""
        check_size("min_count", min_count)
        counts = Counter(token for tokens in texts for token in tokens)
        chosen = sorted((token for token in counts if counts[token] >= min_count), key=lambda t: (-counts[t], t))
        if not chosen:
            raise ValueError(f"min_count: no token comes {min_count} times")
        return cls(chosen if max_size is None else chosen[: check_size("max_size", max_size)])

    def __len__(self):
        return len(SPECIAL) + len(self.tokens)

    def __contains__(self, token):
        return token in self._ids

    def encode(self, tokens, lenient=False):
        """Numbers of a list of tokens, int64 (N,); 1 for those that are not in the vocabulary.

        lenient: a token that is not there is replaced by its nearest form that is, if any: in lower case, with other
        spaces around.
        """
        return np.array([self._ids.get(self._nearest(t) if lenient else t, UNKNOWN) for t in tokens], np.int64)

    def unknown(self, tokens):
        """Those tokens that even a lenient ``encode`` does not know, without joiners, each once."""
        return list(dict.fromkeys(t.strip(JOINER) for t in tokens if self._nearest(t) not in self._ids))

    def decode(self, ids):
        """The tokens of some numbers, special ones by their names. Raises IndexError for one outside the vocabulary."""
        both = [*SPECIAL, *self.tokens]
        return [both[n] for n in np.asarray(ids).tolist()]

    def _nearest(self, token):
        if token in self._ids:
            return token
        for bare in (token.strip(JOINER), token.strip(JOINER).lower()):
            for form in (bare, JOINER + bare, bare + JOINER, JOINER + bare + JOINER):
                if form in self._ids:
                    return form
        return token
