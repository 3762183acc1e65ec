"""Second derivatives of a configured layer, for the libraries that ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import tangents
from .._typing import Array
from .configuration import arguments_of, build, find, flat_state, nested_state


def second_derivatives(
    text: str, seed: int, arrays: Sequence[Array], vectors: Sequence[Array | None], given: Mapping[str, Any]
) -> list[Array]:
    """The gradients of the product of ``vectors`` with the results of a backward pass, by array code in float64.

    That product is <v, J'u>, with J the derivative of the forward pass and u = doutputs. With respect to u its gradient
    is Jv, the tangent of the forward pass along v. With respect to everything else it is the tangent of the backward
    pass along v, because second derivatives are symmetric. So one pass in forward mode over both gives all of it.

    Parameters
    ----------
    text : str
        Of a configuration.
    seed : int
        Of its random draws.
    arrays : sequence of Array
        float64: x, the parameters, the parts of the initial state if one was given, the gradients with respect to the
        output and to the parts of the final state.
    vectors : sequence of Array or None
        What the gradients with respect to x, parameters and initial state are multiplied with; None for zeros.
    given : mapping
        The other arguments of the layer's call.

    Returns
    -------
    list of Array
        The gradients with respect to those of output and final state, to x, to the parameters, to the initial state.
    """
    found = find(text)
    model = build(*arguments_of(text), seed, dtype="float64", precision="float32")
    model.training, model.schedule = found.layer.training, "auto"
    count = len(found.names)
    x, params, rest = arrays[0], arrays[1 : 1 + count], arrays[1 + count :]
    state = len(vectors) - 1 - count  # parts of the initial state
    model.load_state_dict(dict(zip(found.names, params, strict=True)))

    def both(copied, x, *rest):
        initial = nested_state(found.state, rest[:state]) if state else None
        output, final, backward = copied.forward(x, initial, **given)
        dx, dinitial = backward(rest[state], nested_state(found.state, rest[state + 1 :]))
        return output, final, dx, dict(copied.grads), dinitial

    moved = {name: v for name, v in zip(found.names, vectors[1 : 1 + count], strict=True) if v is not None}
    directions = [vectors[0], *vectors[1 + count :], *[None] * (len(rest) - state)]
    output, final, dx, dparams, dinitial = tangents.jvp(model, both, moved, [x, *rest], directions)[1]
    made = [output, *flat_state(found.state, final), dx, *(dparams[name] for name in found.names)]
    return made + (flat_state(found.state, dinitial) if state else [])
