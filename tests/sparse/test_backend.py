"""Which backend computes: the choice, where it applies, and what happens without numba."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator

import pytest
import torch

from geo_pretrain import doctor
from geo_pretrain.errors import GeoPretrainError, MissingDependency
from geo_pretrain.sparse import SparseTensor, backend, functional, plain, use
from geo_pretrain.sparse.layers import Conv3d

ROWS = torch.zeros(2, 3)
has_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")


@pytest.fixture(params=["numba", "llvmlite"])
def no_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find, gone = importlib.util.find_spec, request.param
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == gone else find(name, *rest))
    monkeypatch.setitem(sys.modules, gone, None)
    backend._has_numba.cache_clear()
    yield
    backend._has_numba.cache_clear()


@has_numba
def test_auto_is_plain_where_numba_is_told_not_to_compile(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    backend._has_numba.cache_clear()
    with use("auto"):
        assert not backend.is_fast(ROWS)
    backend._has_numba.cache_clear()


@has_numba
def test_auto_is_fast_for_float32_on_the_cpu_only():
    with use("auto"):
        assert functional._kernels(ROWS).__name__ == "geo_pretrain.sparse.fast"
        for rows in (ROWS.double(), ROWS.half(), ROWS.to("meta")):  # bfloat16: where the processor multiplies it
            assert functional._kernels(rows) is plain


def test_auto_without_numba_is_plain(no_numba: None):
    with use("auto"):
        assert functional._kernels(ROWS) is plain
        assert not backend.is_fast(ROWS)


def test_fast_without_numba_says_what_to_install(no_numba: None):
    with pytest.raises(MissingDependency, match=r"'(numba|llvmlite)'.*pip install .*geo.pretrain\[fast\]"), use("fast"):
        pass


@has_numba
def test_choices_end_with_their_block_also_after_errors():
    with use("plain"):
        assert functional._kernels(ROWS) is plain
        with use("fast"):
            assert backend.is_fast(ROWS)
        assert not backend.is_fast(ROWS)
        with pytest.raises(RuntimeError, match="inside"), use("fast"):
            raise RuntimeError("inside")
        assert not backend.is_fast(ROWS)


@has_numba
def test_blocks_of_several_threads_leave_the_choice_as_it_was():
    """The block that ends first may have begun first."""
    with use("auto"):
        first, second = use("plain"), use("fast")
        first.__enter__()
        second.__enter__()
        assert backend.is_fast(ROWS)
        first.__exit__(None, None, None)
        assert backend.is_fast(ROWS)
        second.__exit__(None, None, None)
        assert backend.is_fast(ROWS)
        assert "numba" in backend.describe()


@has_numba
def test_compiled_networks_compute_in_plain_torch():
    """Numba's kernels take addresses, which nobody has while a network is traced."""
    layer = Conv3d(4, 5)
    coords = torch.randint(0, 6, (200, 4), generator=torch.Generator().manual_seed(0)).int()
    coords[:, 0] = 0
    coords = coords.unique(dim=0)
    x = SparseTensor(coords, torch.randn(len(coords), 4))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x).feats, layer(x).feats)


def test_unknown_backends_are_refused():
    with (
        pytest.raises(
            ValueError, match="The sparse backend is 'quick'; accepted: auto, plain, fast, spconv, warpconvnet"
        ),
        use("quick"),
    ):
        pass


def test_the_environment_sets_the_first_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "plain")
    again = importlib.util.module_from_spec(importlib.util.find_spec(backend.__name__))
    again.__spec__.loader.exec_module(again)  # a fresh copy: the one in use keeps its choice
    assert not again.is_fast(ROWS)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("quick", "GEO_PRETRAIN_SPARSE is 'quick'; accepted: auto, plain, fast, spconv, warpconvnet"),
        ("warpconvnet", "warpconvnet.*pip install warpconvnet"),
    ],
)
def test_a_backend_in_the_environment_that_cannot_be_had_is_told(value, said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", value)
    again = importlib.util.module_from_spec(importlib.util.find_spec(backend.__name__))
    with pytest.raises(GeoPretrainError, match=said):
        again.__spec__.loader.exec_module(again)
    monkeypatch.delitem(sys.modules, backend.__name__)
    monkeypatch.delattr("geo_pretrain.sparse.backend")
    found = doctor._sparse_engine()
    assert found.state == "wrong"
    assert re.search(said, found.text)


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "")
    again = importlib.util.module_from_spec(importlib.util.find_spec(backend.__name__))
    again.__spec__.loader.exec_module(again)
    assert again._choice == "auto"
