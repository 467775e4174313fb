"""Which backend computes: the choice, where it applies, and what happens without numba."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch

from geo_pretrain.errors import MissingDependency
from geo_pretrain.sparse import backend, functional, plain, use

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


def test_an_unknown_backend_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "quick")
    again = importlib.util.module_from_spec(importlib.util.find_spec(backend.__name__))
    with pytest.raises(
        ValueError, match="GEO_PRETRAIN_SPARSE is 'quick'; accepted: auto, plain, fast, spconv, warpconvnet"
    ):
        again.__spec__.loader.exec_module(again)
