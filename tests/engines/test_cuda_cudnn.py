"""cuDNN's attention: what is asked of its frontend, against a stand-in that answers with NumPy.

The stand-in takes the calls of the real frontend and nothing else. Where the frontend itself is installed, it validates
the same graph; only a GPU can plan and run it.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from refimpl.engines.cuda import cudnn as ours
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import MissingDependencyError, UnsupportedError


class Described:
    def __init__(self, name, dim, stride, data_type):
        self.name, self.dim, self.stride, self.data_type = name, dim, stride, data_type

    def set_output(self, value):
        assert value is True
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


class Graph:
    steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")

    def __init__(self, *, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert (handle, io_data_type, intermediate_data_type, compute_data_type) == ("handle", "half", "float", "float")
        self.done = []

    def tensor(self, *, name, dim, stride, data_type):
        return Described(name, dim, stride, data_type)

    def sdpa(self, *, name, q, k, v, attn_scale, generate_stats, use_causal_mask_bottom_right=False):
        assert generate_stats is False
        self.inputs, self.scale, self.causal = (q, k, v), attn_scale, use_causal_mask_bottom_right
        self.out = Described(name, None, None, None)
        return self.out, None

    def __getattr__(self, step):
        assert step in self.steps

        def call(*arguments):
            assert self.steps[len(self.done)] == step, "out of order"
            self.done.append(step)
            if step == "check_support" and self.inputs[0].dim[-1] % 8:
                raise RefusedError("head_dim should be\na multiple of 8")

        return call

    def get_workspace_size(self):
        return 16

    def execute(self, tensors, workspace, *, handle):
        assert handle == "handle"
        assert workspace.nbytes == 16
        for described, array in tensors.items():
            assert described.dim == array.shape
            assert tuple(s * array.itemsize for s in described.stride) == array.strides
        q, k, v = (tensors[described].astype(np.float32) for described in self.inputs)
        tensors[self.out][...] = NumpyEngine().attention(q, k, v, self.scale, self.causal)


class RefusedError(Exception):
    pass


@pytest.fixture
def frontend(monkeypatch):
    streams = []
    module = types.SimpleNamespace(
        data_type=types.SimpleNamespace(HALF="half", FLOAT="float"),
        heur_mode=types.SimpleNamespace(A=0, FALLBACK=1),
        cudnnGraphNotSupportedError=RefusedError,
        pygraph=Graph,
        create_handle=lambda: "handle",
        set_stream=lambda *, handle, stream: streams.append(stream),
        streams=streams,
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    return module


@pytest.fixture
def attention(frontend):
    stream = types.SimpleNamespace(ptr=7)
    cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    return ours.CudnnAttention(types.SimpleNamespace(cuda=cuda, empty=np.empty, uint8=np.uint8))


def heads(q_len=5, k_len=9, width=16, dtype=np.float16):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, q_len, 4, width)).astype(dtype).transpose(0, 2, 1, 3)  # heads of (B, T, H, D)
    k, v = (rng.standard_normal((2, 2, k_len, width)).astype(dtype) for _ in range(2))
    return q, k, v, np.full((2, q_len, 4, width), np.nan, dtype).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("causal", [False, True])
def test_one_plan_serves_all_calls_of_its_shape(attention, frontend, causal):
    q, k, v, out = heads()
    attention(q, k, v, out, 0.3, causal)
    truth = NumpyEngine().attention(*(x.astype(np.float64) for x in (q, k, v)), 0.3, causal)
    np.testing.assert_allclose(out, truth, atol=2e-3)
    attention(q + 1, k, v, out, 0.3, causal)
    assert len(attention._plans) == 1
    assert frontend.streams == [7, 7]
    for other in (heads(q_len=4), heads(k_len=8)):
        attention(*other, 0.3, causal)
    attention(q, k, v, out, 0.4, causal)
    assert len(attention._plans) == 4


def test_what_cudnn_refuses_is_one_line(attention):
    with pytest.raises(UnsupportedError, match=r"head_dim should be a multiple of 8$"):
        attention(*heads(width=12), 0.3, False)
    with pytest.raises(UnsupportedError, match="float32"):
        attention(*heads(dtype=np.float32), 0.3, False)
    with pytest.raises(UnsupportedError, match="9 on 5"):
        attention(*heads(q_len=9, k_len=5), 0.3, True)


def test_a_missing_frontend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(MissingDependencyError, match="pip install nvidia-cudnn-frontend"):
        ours.require_cudnn()


def test_the_real_frontend_validates_the_graph():
    cudnn = pytest.importorskip("cudnn", reason="cuDNN's frontend is not installed")
    described = []

    class Graphs(cudnn.pygraph):
        def build_operation_graph(self):
            described.append(self)
            raise RuntimeError("far enough without a device")

    attention = object.__new__(ours.CudnnAttention)
    attention.cudnn = types.SimpleNamespace(**{**vars(cudnn), "pygraph": Graphs})
    attention._handle = None
    shapes = ((2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16), (2, 4, 5, 16))
    strides = tuple(tuple(s // 2 for s in np.empty(shape, np.float16).strides) for shape in shapes)
    with pytest.raises(UnsupportedError, match="far enough"):
        attention._plan(ours.Key(shapes, strides, 0.25, True))
    assert len(described) == 1
