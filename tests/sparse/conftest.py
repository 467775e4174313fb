"""Fixtures of the sparse engine's tests."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from torch import Tensor

from geo_pretrain.sparse import use
from tests.sparse.twins import golden_file


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return golden_file()


@pytest.fixture(scope="module")
def plain() -> Iterator[None]:
    """Only torch; the numba engine has tests of its own."""
    with use("plain"):
        yield


@pytest.fixture(scope="module", params=["plain", "fast"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "fast" and find_spec("numba") is None:
        pytest.skip("needs numba (pip install 'geo_pretrain[fast]')")
    with use(request.param):
        yield request.param
