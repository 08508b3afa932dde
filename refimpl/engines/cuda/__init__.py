"""The CuPy engine in parts: CUDA sources, how they are launched, and one file per family of ops."""
