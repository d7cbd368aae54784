"""Golden cases: recordings of real kernels, read, staged and replayed."""
