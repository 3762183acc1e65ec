"""The gradients of one pass's weights: one product over all of time for each of them."""

from ..cells import GRUStep


def add_weight_gradients(layer, saved, reverse, dh_steps, H, suffix):
    """Add the gradients of one pass's weights to ``layer.grads``.

    Before, ``saved.gates`` begins with the gradients with respect to the cell's pre-activations; afterwards with those
    with respect to ax, from which the gradient with respect to the input follows. dh_steps: with a projection, the
    gradients with respect to every h_t.
    """
    ops, grads, rows = layer.ops, layer.grads, layer.cell.gates * H
    dgates, rest = saved.gates[:, :, :rows], saved.gates[:, :, rows:]
    if layer._trains("weight_hh" + suffix):
        _add_hidden(layer, grads["weight_hh" + suffix], dgates, rest, saved.old_h(reverse))
    if dh_steps is not None and layer._trains("weight_hr" + suffix):
        ops.accumulate_product(grads["weight_hr" + suffix], dh_steps, rest)
    train_hh, train_ih = (layer.bias and layer._trains(name + suffix) for name in ("bias_hh", "bias_ih"))
    if train_hh or train_ih:
        dbias = ops.sum_steps(dgates)
    if train_hh:
        grads["bias_hh" + suffix] += dbias
    if isinstance(layer.cell, GRUStep) and layer.cell.reset_after:
        dgates[:, :, 2 * H :] = rest  # with respect to ax_n instead of q = W_hn h + b_hn
        if train_ih:
            dbias[2 * H :] = ops.sum_steps(rest)
    if train_ih:
        grads["bias_ih" + suffix] += dbias
    if layer._trains("weight_ih" + suffix):
        ops.accumulate_product(grads["weight_ih" + suffix], dgates, saved.x)


def _add_hidden(layer, dweight_hh, dgates, rest, h_old):
    """Add the gradient of W_hh."""
    if isinstance(layer.cell, GRUStep) and not layer.cell.reset_after:  # W_hn multiplies p = r h instead of h
        N = 2 * len(dweight_hh) // 3  # where n begins, after r and z
        layer.ops.accumulate_product(dweight_hh[:N], dgates[:, :, :N], h_old)
        layer.ops.accumulate_product(dweight_hh[N:], dgates[:, :, N:], rest)
    else:
        layer.ops.accumulate_product(dweight_hh, dgates, h_old)
