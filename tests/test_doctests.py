"""Examples in docstrings of the public functions run and say what they print."""

from __future__ import annotations

import doctest
import importlib

import pytest

EXAMPLES = {
    "geo_pretrain.catalog": 1,
    "geo_pretrain.hub.transfer": 2,
    "geo_pretrain.adapters.timm": 2,
    "geo_pretrain.loading": 2,
    "geo_pretrain.sparse.coordinates": 1,
    "geo_pretrain.adapters.torchvision": 1,
}


@pytest.mark.parametrize("module", list(EXAMPLES))
def test_examples(module: str):
    result = doctest.testmod(importlib.import_module(module))
    assert (result.failed, result.attempted) == (0, EXAMPLES[module])
