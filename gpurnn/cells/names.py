"""The names that a user gives to a cell, its gates, states and parameters, checked."""

from __future__ import annotations

import keyword
import re

from ..errors import check_choice, check_number
from .record import Parameter

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

# What the functions of a generated struct call, and words of C++ and of the struct itself: no variable and no cell has
# such a name.
RESERVED = frozenset(
    re.findall(
        r"\w+",
        """
    sigmoid tanh relu exp expm1 log log1p sqrt softplus fabs smaller larger where_greater dsigmoid dtanh drelu
    reciprocal gates states parameters draws saved preactivations separate first_product products inner stages
    means locals forward backward forward_inner backward_inner means_of back_means_of back_stages back_means
    back_locals stage in out real d_inner some PointwiseCell ForwardIn ForwardOut BackwardIn BackwardOut DEVICE
    INLINE CELL REAL NULL NAN INFINITY alignas alignof and and_eq asm auto bitand bitor bool break case catch
    char class compl const constexpr const_cast continue decltype default delete do double dynamic_cast else
    enum explicit export extern false float for friend goto if inline int long mutable namespace new noexcept
    not not_eq nullptr operator or or_eq private protected public register reinterpret_cast return short signed
    sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef
    typeid typename union unsigned using virtual void volatile while xor xor_eq std main errno
    """,
    )
)


def is_name(text: object) -> bool:
    """Whether it can be the name of a gate."""
    return isinstance(text, str) and bool(_NAME.fullmatch(text)) and not keyword.iskeyword(text)


def words(what, given):
    """A tuple of different names, from a sequence or from a string that is split at blanks."""
    if not isinstance(given, (str, tuple, list)):
        call = "; put @gpurnn.cell(gates=...) before the function" if callable(given) else ""
        raise TypeError(f"{what}: expected names in a string or a sequence, got {type(given).__name__}{call}")
    found = tuple(given.split() if isinstance(given, str) else given)
    for one in found:
        if not is_name(one):
            raise ValueError(
                f"{what}: expected names of letters (a-z, A-Z), digits and underscores that begin with a letter and "
                f"are no words of Python, got {one!r}"
            )
    if len(set(found)) < len(found):
        raise ValueError(f"{what}: expected different names, got {' '.join(found)}")
    return found


def cell_name(given, function):
    """The name of a cell: ``given``, or that of its function."""
    name = given or getattr(function, "__name__", "cell")
    name = "cell" if name == "<lambda>" else name
    if name in RESERVED or not is_name(name):
        why = (
            "is a word of C++ or of the code that is generated" if name in RESERVED else "generated code could not use"
        )
        raise ValueError(
            f"name: a cell cannot be called {name!r}, which {why}: rename the function, or "
            "give cell(..., name=...) a name of letters, digits and underscores, such as 'my_cell'"
        )
    return name


def parameters(given, states, biases):
    """A tuple of ``Parameter``, from what the decorator ``cell`` takes."""
    if isinstance(given, dict):
        given = [Parameter(name, (), initial) for name, initial in given.items()]
    if not isinstance(given, (str, tuple, list)):
        raise TypeError(f"parameters: expected names, or a dict name -> initial value, got {type(given).__name__}")
    given = given.split() if isinstance(given, str) else given
    found = [one if isinstance(one, Parameter) else Parameter(one, (), "biases") for one in given]
    words("parameters", [one.name for one in found])
    taken = {
        "weight_ih",
        "weight_hh",
        "weight_hr",
        "running_mean",
        "running_var",
        *(f"initial_{state}" for state in states),
    }
    taken |= {"bias_ih", "bias_hh"} if biases else set()
    for one in found:
        if one.name in taken:
            raise ValueError(f"parameters: the layer has a {one.name} already: choose another name")
        if isinstance(one.initial, str):
            check_choice(f"parameters: the initial value of {one.name}", one.initial, ("zeros", "ones", "biases"))
        else:
            check_number(f"parameters: the initial value of {one.name}", one.initial)
    return tuple(one._replace(gates=words("gates", one.gates)) for one in found)
