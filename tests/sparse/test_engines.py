"""Which engine computes: the choice, where it applies, and what happens without numba."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch

from geo_pretrain.errors import MissingDependency
from geo_pretrain.sparse import engines, functional, use

ROWS = torch.zeros(2, 3)
has_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))
    monkeypatch.setitem(sys.modules, "numba", None)
    engines._has_numba.cache_clear()
    yield
    engines._has_numba.cache_clear()


@has_numba
def test_auto_is_fast_for_float32_on_the_cpu_only():
    with use("auto"):
        assert engines.current(ROWS).__name__ == "geo_pretrain.sparse.fast"
        for rows in (ROWS.double(), ROWS.bfloat16(), ROWS.half(), ROWS.to("meta")):
            assert engines.current(rows) is functional


def test_auto_without_numba_is_plain(no_numba: None):
    with use("auto"):
        assert engines.current(ROWS) is functional
        assert not engines.wants_fast(ROWS)


def test_fast_without_numba_says_what_to_install(no_numba: None):
    with pytest.raises(MissingDependency, match=r"pip install .*geo.pretrain\[fast\]"), use("fast"):
        pass


@has_numba
def test_choices_end_with_their_block_also_after_errors():
    with use("plain"):
        assert engines.current(ROWS) is functional
        with use("fast"):
            assert engines.wants_fast(ROWS)
        assert not engines.wants_fast(ROWS)
        with pytest.raises(RuntimeError, match="inside"), use("fast"):
            raise RuntimeError("inside")
        assert not engines.wants_fast(ROWS)


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="The engine is 'quick'; accepted: auto, plain, fast"), use("quick"):
        pass


def test_the_environment_sets_the_first_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "plain")
    again = importlib.util.module_from_spec(importlib.util.find_spec(engines.__name__))
    again.__spec__.loader.exec_module(again)  # a fresh copy: the one in use keeps its choice
    assert again.current(ROWS) is functional


def test_an_unknown_engine_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GEO_PRETRAIN_SPARSE", "quick")
    again = importlib.util.module_from_spec(importlib.util.find_spec(engines.__name__))
    with pytest.raises(ValueError, match="GEO_PRETRAIN_SPARSE is 'quick'; accepted: auto, plain, fast"):
        again.__spec__.loader.exec_module(again)
