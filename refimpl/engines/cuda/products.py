"""Matrix products by cuBLAS, called through its own interface.

``cupy.matmul`` would copy transposed and strided stacks first, and cannot scale. Products of float16 are summed in
float32; TF32 is used by the engine that is asked for it alone.
"""

from __future__ import annotations

import numpy as np

from refimpl.engines.cuda.launch import Launcher, dtype_of
from refimpl.engines.cuda.shapes import WIDE, batch_strides, element_strides, leading_dimension, product_calls
from refimpl.engines.protocol import Array
from refimpl.errors import ShapeError


class Products(Launcher):
    """Stacks of products of any strides."""

    tf32 = False  # whether the factors of float32 products are rounded to TF32

    def _multiply(
        self, a: Array, b: Array, out: Array, *, transposed: bool = False, alpha: float = 1.0, beta: float = 0.0
    ) -> None:
        """``out = alpha a b + beta out``, or ``a bᵀ`` where `transposed`, by cuBLAS.

        a (*batch, M, K), b (*batch, K, N) or (*batch, N, K), out (*batch, M, N); batch axes of length 1 broadcast. Any
        strides of out, as long as its rows are contiguous. Rows of C are columns to cuBLAS: it is asked for ``bᵀ aᵀ``.
        """
        (rows, inner), columns = a.shape[-2:], out.shape[-1]
        other = (columns, inner) if transposed else (inner, columns)
        if b.shape[-2:] != other or out.shape[-2] != rows or a.dtype != b.dtype:
            raise ShapeError(f"no product of {a.shape} {a.dtype} and {b.shape} {b.dtype} into {out.shape}")
        if out.size == 0:
            return
        if inner == 0:
            if beta == 0.0:
                out[...] = 0
            return
        a, b = self._unit_columns(a), self._unit_columns(b)
        runtime, cublas = self.xp.cuda.runtime, self.xp.cuda.cublas
        kinds = {"float16": runtime.CUDA_R_16F, "float32": runtime.CUDA_R_32F, "float64": runtime.CUDA_R_64F}
        kind, out_kind = kinds[dtype_of(a)], kinds[out.dtype.name]
        compute = cublas.CUBLAS_COMPUTE_64F if a.dtype == np.float64 else cublas.CUBLAS_COMPUTE_32F
        if self.tf32 and a.dtype == np.float32:
            compute = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        factors = np.asarray([alpha, beta], WIDE[a.dtype.name])
        one, zero = factors.ctypes.data, factors.ctypes.data + factors.itemsize
        turn = cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N
        shape, strides = out.shape[:-2], [batch_strides(x, out.ndim - 2) for x in (a, b, out)]
        leads = [leading_dimension(x.shape, element_strides(x)) for x in (a, b, out)]
        handle = self.xp.cuda.device.get_cublas_handle()
        for count, steps, offsets in product_calls(shape, strides):
            at = [x.data.ptr + offset * x.dtype.itemsize for x, offset in zip((a, b, out), offsets, strict=True)]
            cublas.gemmStridedBatchedEx(
                handle, turn, cublas.CUBLAS_OP_N, columns, rows, inner,
                one, at[1], kind, leads[1], steps[1], at[0], kind, leads[0], steps[0],
                zero, at[2], out_kind, leads[2], steps[2], count, compute, cublas.CUBLAS_GEMM_DEFAULT,
            )  # fmt: skip
