"""Examples in docstrings of the public functions run and say what they print."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

from geo_pretrain.training import losses

EXAMPLES = {
    "geo_pretrain.backbones.architectures": 1,
    "geo_pretrain.backbones.build": 1,
    "geo_pretrain.advice.answer": 2,
    "geo_pretrain.catalog": 1,
    "geo_pretrain.hub.authors": 1,
    "geo_pretrain.hub.links": 2,
    "geo_pretrain.adapters.timm": 2,
    "geo_pretrain.loading": 2,
    "geo_pretrain.sparse.coordinates": 1,
    "geo_pretrain.adapters.torchvision": 1,
    "geo_pretrain.yaml_text": 2,
}


@pytest.mark.parametrize("module", list(EXAMPLES))
def test_examples(module: str):
    result = doctest.testmod(importlib.import_module(module))
    assert (result.failed, result.attempted) == (0, EXAMPLES[module])


def public_losses() -> dict[str, object]:
    modules = [
        importlib.import_module(f"{losses.__name__}.{found.name}") for found in pkgutil.iter_modules(losses.__path__)
    ]
    functions = [item for module in modules for item in vars(module).values() if inspect.isfunction(item)]
    return {f.__name__: f for f in functions if f.__module__.startswith(losses.__name__) and f.__name__[0] != "_"}


@pytest.mark.parametrize("name", public_losses())
def test_every_loss_is_exported_and_has_an_example(name: str):
    assert name in losses.__all__
    loss = public_losses()[name]
    (example,) = doctest.DocTestFinder().find(loss, name, globs=vars(importlib.import_module(loss.__module__)).copy())
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    assert result.attempted >= 2
