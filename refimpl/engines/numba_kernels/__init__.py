"""Compiled kernels of the ``numba`` engine; importing a module here imports Numba and compiles nothing."""
