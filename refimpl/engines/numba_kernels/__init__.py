"""Compiled kernels of the ``numba`` engine. Importing a module here imports Numba; nothing compiles before the first call."""
