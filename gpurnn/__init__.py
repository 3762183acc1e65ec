"""gpurnn: recurrent networks on NumPy and on CUDA kernels of their own."""
