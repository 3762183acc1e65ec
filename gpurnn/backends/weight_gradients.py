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
    _settle(ops, cell, saved, done)
    for chunk in ops.time_chunks(*dgates.shape[:2], saved.reverse):
        dh = None if done.dh_steps is None else flat(done.dh_steps[chunk])
        rows = _Rows(flat(dgates[chunk]), flat(saved.h_old[chunk]), flat(grads.read(layer.x[chunk])), dh)
        _add_chunk(ops, cell, rows, grads)
    return dgates[:, :, : len(cell.gates) * (dgates.shape[2] // cell.saved_blocks)]


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


def _settle(ops, cell, saved, done):
    """Make what products with W_hh read what each timestep has read, where there are resets and masks."""
    H, reads = done.dgates.shape[2] // cell.saved_blocks, {product.reads for product in cell.products} - {"h"}
    settle_reads(ops.xp, saved, [done.dgates[:, :, cell.columns((name,), H)] for name in reads])


def _add_hidden(ops, cell, h_old, dweight_hh, dgates):
    """Add the gradient of W_hh: for each of its products that of the rows, times what they read."""
    for rows, d, read in _hidden_products(cell, h_old, dgates):
        ops.accumulate_product(dweight_hh[rows], d, read)


def _hidden_products(cell, h_old, dgates):
    """For each product with W_hh its rows, the gradients of what these make, and what they read: (..., F) arrays."""
    H, start = dgates.shape[-1] // cell.saved_blocks, 0
    for product in cell.products:
        stop = start + len(product.rows) * H
        read = h_old if product.reads == "h" else dgates[..., cell.columns((product.reads,), H)]
        yield slice(start, stop), dgates[..., cell.columns(product.rows, H)], read
        start = stop


def weight_terms(ops, layer, saved, grads, done):
    """What ``add_weight_gradients`` sums over time and sequences, with the same arguments: views of what it would read.

    Returns dax (T, B, G*H), and for each parameter, or some of its rows: its name, d (T, B, M), x (T, B, N) or None,
    and the first row. The gradient is the sum of all d x^T, or of d.
    """
    _settle(ops, layer.cell, saved, done)
    cell, dgates = layer.cell, done.dgates
    H = dgates.shape[2] // cell.saved_blocks
    dax = hidden = dgates[:, :, : len(cell.gates) * H]
    if cell.apart:
        dax = ops.xp.concatenate([dgates[:, :, cell.columns((name,), H)] for name in cell.inputs], axis=2)
    found = []
    if grads.hh is not None:
        for rows, d, read in _hidden_products(cell, saved.h_old, dgates):
            found.append(("weight_hh", d, read, rows.start))
    if grads.hr is not None:
        found.append(("weight_hr", done.dh_steps, dgates[:, :, cell.columns((cell.projects,), H)], 0))
    sums = [("bias_hh", grads.bias_hh, hidden), ("bias_ih", grads.bias_ih, dax)]
    for parameter, gradient in zip(cell.parameters, grads.own, strict=True):
        sums.append((parameter.name, gradient, dgates[:, :, cell.columns(parameter.blocks, H)]))
    found += [(name, d, None, 0) for name, gradient, d in sums if gradient is not None]
    if grads.ih is not None:
        found.append(("weight_ih", dax, grads.read(layer.x), 0))
    return dax, found
