"""The CuPy engine twice: on a GPU where there is one, and its kernels on the CPU."""

from __future__ import annotations

import sys

import pytest
from cuda_emulation import HostCupy, missing

from refimpl.engines.cupy_engine import CupyEngine
from refimpl.errors import MissingDependencyError


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    cupy = HostCupy(tmp_path_factory.mktemp("kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", cupy)
        return CupyEngine()


@pytest.fixture(scope="session")
def gpu():
    """The one place that decides whether there is a GPU."""
    try:
        return CupyEngine()
    except MissingDependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine(request):
    engine = request.getfixturevalue(request.param)
    if request.param == "emulated":
        engine.xp.guarded.clear()
        engine.xp.allocated.clear()
    return engine
