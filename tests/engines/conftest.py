"""The CuPy engine twice: on a GPU where there is one, and its kernels on the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from cuda_emulation import HostCupy

from refimpl.engines.cupy_engine import CupyEngine
from refimpl.errors import MissingDependencyError


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to run the kernels on the CPU")
    probe = ["g++", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input="_Float16 x;", capture_output=True, text=True, check=False).returncode:
        pytest.skip("this g++ has no _Float16, which stands for half here: version 13 has, on x86-64 also 12")
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
