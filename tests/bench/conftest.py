"""The engines to benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from refimpl.engines import ENGINES
from refimpl.engines import engine as get_engine
from refimpl.errors import MissingDependencyError


def _marked(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.gpu if ENGINES[name][2] == "gpu" else ())


@pytest.fixture(scope="session", params=[_marked(name) for name in ENGINES])
def engine(request: pytest.FixtureRequest) -> Any:
    """Every engine that this machine has."""
    try:
        return get_engine(request.param)
    except MissingDependencyError as error:
        pytest.skip(str(error))
