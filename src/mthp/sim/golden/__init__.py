"""Golden cases: what real kernels were recorded doing, read, staged and replayed."""
