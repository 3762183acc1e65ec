"""Groups of parameters: which of a model's parameters are updated with settings of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from ..errors import check_flag, check_number
from ..module import Module


class Setting(NamedTuple):
    """Learning rate and hyperparameters of one update of some parameters."""

    lr: float
    hyper: Mapping[str, Any]


class ReadOnly(dict):
    """A group as of now. A change would not reach the optimizer, so it is refused."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "groups: read-only, a change would have no effect. To scale all rates, set the optimizer's lr; for other "
            "settings build a new optimizer with groups=[...]"
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (dict(self),)


@dataclass
class Group:
    """One of an optimizer's groups.

    given: what it was built from, JSON-ready. names: its parameters. lr: its rate at the optimizer's first rate, or
    None for that. hyper: the hyperparameters that it sets.
    """

    given: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    lr: float | None = None
    hyper: dict[str, Any] = field(default_factory=dict)


def make_groups(model: Module, groups: Any, hyper: Mapping[str, Any], check: Any) -> list[Group]:
    """The groups that ``groups`` describes; a parameter belongs to the first that matches it.

    hyper: the optimizer's hyperparameters. check: a function of a whole set of them, which returns them checked.
    Raises as ``Optimizer`` says. Nothing changes but that parameters of groups with ``freeze`` are frozen at last.
    """
    if groups is None:
        return []
    if not isinstance(groups, (list, tuple)):
        raise TypeError(f"groups: expected a list such as [{{'match': '*.bias*', 'lr': 1e-4}}], got {groups!r}")
    made, free, frozen = [], dict.fromkeys(model.params), []
    for number, group in enumerate(groups):
        where = f"groups[{number}]"
        patterns = _check_keys(where, group, hyper)
        matched = model._matching(where, patterns)
        names = [name for name in matched if name in free]
        if not names:
            why = "its parameters are all in groups before it" if matched else "it matches no parameter"
            raise ValueError(f"{where}: {why}, match={patterns}")
        for name in names:
            del free[name]
        made.append(_checked(where, group, patterns, names, hyper, check))
        if "freeze" in group and check_flag(f"{where}: freeze", group["freeze"]):
            frozen += names
    if frozen:
        model.freeze(*frozen)
    return made


def _check_keys(where: str, group: Any, hyper: Mapping[str, Any]) -> list[str]:
    """The patterns of a group whose keys are right."""
    if not isinstance(group, Mapping) or "match" not in group:
        raise TypeError(f"{where}: expected a dict with 'match' and settings, got {group!r}")
    known = ("match", "lr", "freeze", *hyper)
    for key in group:
        if key not in known:
            raise TypeError(f"{where}: unknown setting {key!r}. It takes {', '.join(known)}")
    if group.get("freeze") is True and len(group) > 2:
        raise ValueError(f"{where}: freeze leaves nothing to set, got {', '.join(key for key in group)}")
    patterns = [group["match"]] if isinstance(group["match"], str) else group["match"]
    if not isinstance(patterns, (list, tuple)) or not patterns:
        raise TypeError(f"{where}: match should be a name or a list of names, got {group['match']!r}")
    return list(patterns)


def _checked(where, group, patterns, names, hyper, check):
    """A ``Group`` whose settings are checked."""
    own = {key: value for key, value in group.items() if key in hyper}
    try:
        whole = check(**{**hyper, **own})
        lr = None if "lr" not in group else check_number("lr", group["lr"], 0.0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    own = {key: whole[key] for key in own}
    given = {"match": patterns, **({} if lr is None else {"lr": lr}), **own}
    return Group(given | ({"freeze": bool(group["freeze"])} if "freeze" in group else {}), names, lr, own)
