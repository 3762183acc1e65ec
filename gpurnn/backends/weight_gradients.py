"""The gradients of one pass's weights: a product over all of time for each product that the cell declares."""

from typing import Any, NamedTuple

from .marks import settle_reads
from .records import flat


def add_weight_gradients(ops, layer, saved, grads, done):
    """Add the gradients of one pass's weights, chunk by chunk in the order of the backward pass.

    layer: the ``SavedLayer``. saved: its ``SavedPass``. grads: the ``Weights`` to add to. done: the ``PassGradients``.

    Returns dax (T, B, G*H), the gradients with respect to W_ih x + b_ih, in the memory of ``done.dgates``.
    """
    cell, dgates = layer.cell, done.dgates
    H = dgates.shape[2] // cell.saved_blocks
    reads = {product.reads for product in cell.products} - {"h"}
    settle_reads(ops.xp, saved, [dgates[:, :, cell.columns((name,), H)] for name in reads])
    for chunk in ops.time_chunks(*dgates.shape[:2], saved.reverse):
        dh = None if done.dh_steps is None else flat(done.dh_steps[chunk])
        rows = _Rows(flat(dgates[chunk]), flat(saved.h_old[chunk]), flat(layer.x[chunk]), dh)
        _add_chunk(ops, cell, rows, grads)
    return dgates[:, :, : len(cell.gates) * H]


class _Rows(NamedTuple):
    """The rows of a chunk: dgates, the h and x that its timesteps read, and with a projection dh."""

    dgates: Any
    h_old: Any
    x: Any
    dh: Any


def _add_chunk(ops, cell, rows, grads):
    """Add what one chunk gives; makes dax of its gradients with respect to W_ih x + W_hh h."""
    dgates, dbias = rows.dgates, None
    H = dgates.shape[1] // cell.saved_blocks
    if grads.hh is not None:
        _add_hidden(ops, cell, rows.h_old, grads.hh, dgates)
    if grads.hr is not None:
        ops.accumulate_product(grads.hr, rows.dh, dgates[:, cell.columns((cell.projects,), H)])
    hidden = dgates[:, : len(cell.gates) * H]
    if grads.bias_hh is not None or grads.bias_ih is not None:
        dbias = ops.sum_steps(hidden)
    if grads.bias_hh is not None:
        grads.bias_hh += dbias
    dax = hidden  # the same, but for the gates whose two products meet only after an equation
    for place in cell.apart:
        to, of_input = slice(place * H, (place + 1) * H), dgates[:, cell.columns((cell.inputs[place],), H)]
        dax[:, to] = of_input
        if grads.bias_ih is not None:
            dbias[to] = ops.sum_steps(of_input)
    if grads.bias_ih is not None:
        grads.bias_ih += dbias
    for parameter, grad in zip(cell.parameters, grads.own, strict=True):
        if grad is not None:
            grad += ops.sum_steps(dgates[:, cell.columns(parameter.blocks, H)])
    if grads.ih is not None:
        ops.accumulate_product(grads.ih, dax, rows.x)


def _add_hidden(ops, cell, h_old, dweight_hh, dgates):
    """Add the gradient of W_hh: for each of its products that of the rows, times what they read."""
    H, start = dgates.shape[1] // cell.saved_blocks, 0
    for product in cell.products:
        stop = start + len(product.rows) * H
        read = h_old if product.reads == "h" else dgates[:, cell.columns((product.reads,), H)]
        ops.accumulate_product(dweight_hh[start:stop], dgates[:, cell.columns(product.rows, H)], read)
        start = stop
