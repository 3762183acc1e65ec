"""Messages of the library in the language of the command line: its options instead of Python's arguments."""

import re
import shlex

import click

# Python arguments whose option has another name, or that a message may name in commands without that option
_ALWAYS = {"backend": "--backend", "resume": "--resume", "overwrite": "--overwrite", "start": "--from"}
_OF_FIT = {"clip_norm": "clip", "validation": "valid", "checkpoint_every": "checkpoint_every"}
_VALUE = r"True\b|False\b|None\b|'[^']*'|\"[^\"]*\"|[^\s,;:)'\"]+"
_VERBS = "should|needs?|belongs|counts|watches"


def as_options(text, command=None):
    """``text``, a message that may name arguments of Python, with the options of ``command`` instead.

    ``backend='cpu'`` becomes ``--backend cpu``, ``resume=True`` becomes ``--resume``; "lr should be ..." and "top_k:
    ..." begin with the option. Other words stay as they are.

    >>> as_options("no GPU was found: use backend='cpu'")
    'no GPU was found: use --backend cpu'
    """
    text = re.sub(r" \(in Python [^)]*\)", "", text)
    negative, positive = {}, dict(_ALWAYS)
    for param in getattr(command, "params", ()):
        if isinstance(param, click.Option) and param.name:
            positive[param.name] = max(param.opts, key=len)
            negative[param.name] = max(param.secondary_opts or [f"no {positive[param.name]}"], key=len)
    positive |= {name: positive[option] for name, option in _OF_FIT.items() if option in positive}

    def with_value(found):
        name, value = found["name"], found["value"]
        if value in (None, "True"):
            return positive[name]
        if value in ("False", "None"):
            return negative.get(name, f"no {positive[name]}")
        return f"{positive[name]} {shlex.quote(value.strip(chr(39) + chr(34)))}"

    def alone(found):
        return positive[found["name"]]

    names = "|".join(sorted(map(re.escape, positive), key=len, reverse=True))
    text = re.sub(rf"(?<![\w.'\"-])(?P<name>{names})=(?P<value>{_VALUE})?", with_value, text)
    text = re.sub(rf"(?:^|(?<=[;:.] ))(?P<name>{names})(?= (?:{_VERBS})\b)", alone, text)
    text = re.sub(rf"^(?P<name>{names})(?=: )", alone, text)
    if re.match(rf"(?:{names}) [\d.]+ ", text):  # "valid 0.9 and test 0.5 leave nothing"
        text = re.sub(rf"(?<![\w.'\"/-])(?P<name>{names})(?= [\d.]+\b)", alone, text)
    python = "|".join(name for name in positive if "_" in name)
    return re.sub(rf"(?<![\w.'\"/\\-])(?P<name>{python})(?![\w./\\'\"-])", alone, text) if python else text
