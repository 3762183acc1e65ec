"""The backend ``"cuda"``: hand-written kernels, cuBLAS, and the choice of a schedule."""
