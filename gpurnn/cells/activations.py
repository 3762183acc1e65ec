"""Activations of the array code, in place."""


def sigmoid_(xp, z):
    """z <- 1 / (1 + exp(-z)) in place, with an error of at most 4 units in the last place however small the result is.
    Where exp overflows the result is 0; the caller silences NumPy's warning."""
    xp.multiply(z, -1, out=z)  # NumPy 2.4's negative is wrong in place where float32 numbers lie 16 bytes apart
    xp.exp(z, out=z)
    xp.add(z, 1, out=z)
    xp.divide(1, z, out=z)
