"""Fused attention by cuDNN, beside our own kernel: its Python frontend takes CuPy arrays as they lie (DLPack).

One graph of a single node, `sdpa`, is planned per shape and kept. cuDNN decides what it supports; what it refuses is
refused here, too, and nothing falls back.

Source: cuDNN frontend, `pygraph.sdpa` (NVIDIA, Apache-2.0), https://github.com/NVIDIA/cudnn-frontend
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refimpl.engines.cuda.failures import one_line
from refimpl.engines.cuda.shapes import Strides, element_strides
from refimpl.engines.protocol import Array
from refimpl.errors import MissingDependencyError, UnsupportedError


@dataclass(frozen=True)
class Key:
    """What a plan is for: shapes and strides of q, k, v and the result, the scale, the mask."""

    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[Strides, ...]
    scale: float
    causal: bool


@dataclass(frozen=True)
class Plan:
    """A planned graph, its tensors for q, k, v and the result, and the memory that it works in."""

    graph: Any
    tensors: tuple[Any, ...]
    workspace: Array


class CudnnAttention:
    """``softmax(scale q kᵀ) v`` in float16; float32 accumulators."""

    def __init__(self, xp: Any) -> None:
        self.xp, self.cudnn = xp, require_cudnn()
        self._handle = self.cudnn.create_handle()
        self._plans: dict[Key, Plan] = {}

    def __call__(self, q: Array, k: Array, v: Array, out: Array, scale: float, causal: bool) -> None:
        """Write the contexts of q (B, H, Tq, D) over k, v (B, Hkv, Tk, D) into out (B, H, Tq, D), all of any strides.

        Raises
        ------
        UnsupportedError
            For what cuDNN does not do on this device, other dtypes than float16, and causal queries that see no key.
        """
        refuse_unfit(q, k, causal)
        arrays = (q, k, v, out)
        key = Key(tuple(x.shape for x in arrays), tuple(element_strides(x) for x in arrays), float(scale), causal)
        if key not in self._plans:
            self._plans[key] = self._plan(key)
        plan = self._plans[key]
        self.cudnn.set_stream(handle=self._handle, stream=self.xp.cuda.get_current_stream().ptr)
        plan.graph.execute(dict(zip(plan.tensors, arrays, strict=True)), plan.workspace, handle=self._handle)

    def _plan(self, key: Key) -> Plan:
        kinds = self.cudnn.data_type
        graph = self.cudnn.pygraph(
            handle=self._handle, io_data_type=kinds.HALF, intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
        )  # fmt: skip
        described = zip("qkv", key.shapes, key.strides, strict=False)
        q, k, v = (graph.tensor(name=n, dim=d, stride=s, data_type=kinds.HALF) for n, d, s in described)
        aligned = {"use_causal_mask_bottom_right": True} if key.causal else {}  # the last query sees the last key
        out, _ = graph.sdpa(name="attention", q=q, k=k, v=v, attn_scale=key.scale, generate_stats=False, **aligned)
        out.set_output(True).set_dim(key.shapes[3]).set_stride(key.strides[3])
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except (self.cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
            raise UnsupportedError(f"cuDNN does not take attention of {key.shapes[:3]}: {one_line(error)}") from error
        return Plan(graph, (q, k, v, out), self.xp.empty(graph.get_workspace_size(), self.xp.uint8))


def refuse_unfit(q: Array, k: Array, causal: bool) -> None:
    """Raise UnsupportedError for what this form never takes."""
    if q.dtype.name != "float16":
        raise UnsupportedError(f"cuDNN's attention takes float16, not {q.dtype.name}: leave the option away")
    if causal and q.shape[2] > k.shape[2]:
        raise UnsupportedError(f"cuDNN's attention takes no query without a key: {q.shape[2]} on {k.shape[2]}, causal")


def require_cudnn() -> Any:
    """cuDNN's frontend; MissingDependencyError, one line, where it is not."""
    try:
        import cudnn
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"cuDNN's frontend is missing: pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 ({one_line(error)})"
        ) from error
    return cudnn
