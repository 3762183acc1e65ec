"""The loss of a speech recognizer and its metrics: functions of (outputs, targets, lengths), as ``fit`` calls them."""

from ...ctc import ctc_greedy, ctc_loss
from ...data.vocabulary import UNKNOWN
from ...metrics import edit_distance
from ..classify import right_and_all


def known_ctc_loss(logits, targets, *, lengths):
    """CTC of the targets without their unknown characters; a target that does not fit into its steps counts as 0."""
    return ctc_loss(logits, [target[target != UNKNOWN] for target in targets], lengths=lengths, zero_infinity=True)


def wrong_classes(logits, targets):
    right, count = right_and_all(logits, targets)
    return count - right, count


def wrong_characters(logits, targets, *, lengths):
    found = ctc_greedy(logits, lengths=lengths)
    return sum(map(edit_distance, found, (target.tolist() for target in targets))), sum(map(len, targets))


def wrong_utterances(logits, targets, *, lengths):
    found = ctc_greedy(logits, lengths=lengths)
    return sum(a != b.tolist() for a, b in zip(found, targets, strict=True)), len(targets)


def word_errors(vocabulary):
    """The metric of words, which spaces separate; a character that the vocabulary lacks makes its word wrong."""

    def wrong_words(logits, targets, *, lengths):
        said, meant = (
            [vocabulary.decode(ids).split() for ids in many] for many in (ctc_greedy(logits, lengths=lengths), targets)
        )
        return sum(map(edit_distance, said, meant)), sum(map(len, meant))

    return wrong_words
