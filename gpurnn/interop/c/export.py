"""``export_c``: a model as a C header."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...cells.names import RESERVED
from ...errors import check_choice
from ...files import write_text_atomic
from ...layers import Embedding, TiedLinear
from ...layers.common import feature_sizes
from ...module import Module, float_model
from .building import Builder, Value, at
from .header import Signature, header_text
from .layers import first_of, shown, write_layer

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_WORDS = RESERVED | {"restrict", "wchar_t", "char16_t", "char32_t", "char8_t", "concept", "requires", "consteval"}


def export_c(
    model: Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    weights: str = "float32",
    activations: str = "float32",
) -> None:
    """Write a model, as it is in evaluation, to a C header that runs it timestep by timestep, for small devices.

    The header is C99, and C++, needs no library but <string.h>, <stddef.h> and <stdint.h>, allocates nothing, and has
    all weights as constants. Arithmetic is in float32. Equal models make equal files.

    Parameters
    ----------
    model : Module
        A recurrent layer of one direction, or a Sequential of Embedding, such layers, Linear, LayerNorm, BatchNorm,
        Dropout and Pooling ("last", "mean" and "max", of the timesteps so far); or the model of a task that is one.
    path : path
        The file to write.
    name : str, optional
        What all names in the header begin with: ``name_state``, ``name_init``, ``name_reset``, ``name_step``. By
        default the name of the file without its end.
    weights : {"float32", "int8"}
        How matrices are stored. "int8" has a scale for each row (``gpurnn.quantization.quantize_rows``).
    activations : {"float32", "int16"}
        "int16", with weights in int8, quantizes the vectors that matrices multiply in each timestep, so that products
        are sums of integers.

    Notes
    -----
    A matrix in which a quarter of the blocks of 8 rows and 4 columns, or more, are zero is stored without them: see
    ``gpurnn.pruning``.

    Raises
    ------
    ValueError
        A layer cannot run timestep by timestep, the name is no identifier, or weights are not finite in float32; the
        message names it.
    TypeError
        The model is no Module.

    Examples
    --------
    >>> from gpurnn.interop.c import export_c
    >>> model = gpurnn.Sequential(gpurnn.GRU(8, 16), gpurnn.Linear(16, 2))
    >>> export_c(model, "model.h", weights="int8")
    >>> import pathlib
    >>> "void model_step(model_state *state, const float *x, float *y);" in pathlib.Path("model.h").read_text()
    True
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a gpurnn layer or model, got {type(model).__name__}")
    path = Path(path)
    check_choice("weights", weights, ("float32", "int8"))
    check_choice("activations", activations, ("float32", "int16"))
    if activations == "int16" and weights == "float32":
        raise ValueError("activations: 'int16' multiplies whole numbers: it needs weights='int8'")
    write_text_atomic(path, header(float_model(model), checked_name(name, path), weights, activations))


def checked_name(name: str | None, path: Path) -> str:
    """``name``, or that of the file. Raises ValueError where it can begin no names in C."""
    found = path.name.split(".")[0] if name is None else name
    if not isinstance(found, str) or not _NAME.fullmatch(found) or found in _WORDS:
        what = "the name of the file begins" if name is None else "got"
        raise ValueError(
            f"name: expected letters (a-z, A-Z), digits and underscores that begin with a letter and are no word of C, "
            f"{what} {found!r}: give name='model', or such"
        )
    return found


def header(model: Module, name: str, weights: str, activations: str) -> str:
    """The text of the header."""
    tied = {id(one.embedding) for _, one in model.modules() if isinstance(one, TiedLinear)}
    b, first = Builder(name, weights, activations, tied), first_of(model)
    ids = first.num_embeddings if isinstance(first, Embedding) else None
    inputs = next((size for _, layer in model.modules() if (size := feature_sizes(layer, None)[0])), None)
    y = write_layer(b, model, Value("id" if ids else "x", inputs or 0), "")
    if inputs is None and ids is None:
        raise ValueError("model: no layer in it says how many numbers it reads")
    with b.each(y.size):
        b.line(f"y[k] = {at(y.text)};")
    return header_text(b, Signature(shown(model), inputs, ids, y.size))
