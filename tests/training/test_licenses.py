"""The license chain of a run: the strictest terms win, and nothing is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from geo_pretrain.catalog import backbone_info
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.licenses import run_license
from geo_pretrain.training.recipe import list_recipes, load_recipe
from geo_pretrain.training.tasks import task_settings


def license_of(recipe):
    return run_license(recipe, task_settings(recipe))


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_yields_the_license_its_catalog_entry_states(name):
    stated = backbone_info(name).license
    assert license_of(load_recipe(name)) == replace(stated, code="MIT")  # whoever trained the published one


@pytest.mark.parametrize(
    "overrides, weights, datasets",
    [
        (["data.source=rooms", "model.init=scratch"], "MIT", {"rooms"}),
        (["data.source=rooms", "model.init=imagenet"], "LicenseRef-ImageNet-terms", {"rooms", "ImageNet"}),
        (["data.source=seven_scenes", "model.init=scratch"], "LicenseRef-data-owner", None),
        (["data.source=seven_scenes", "model.init=scratch", "data.license=CC0-1.0"], "CC0-1.0", None),
        (["data.source=rooms", "data.license=CC-BY-SA-4.0", "model.init=scratch"], "CC-BY-SA-4.0", {"rooms"}),
        (
            ["data.source=rooms", "data.license=CC-BY-SA-4.0", "model.init=imagenet"],
            "LicenseRef-ImageNet-terms",
            {"rooms", "ImageNet"},
        ),
        (
            ["data.source=rooms", "model.init=pri3d_view_r18"],
            "LicenseRef-ScanNet-ToU",
            {"rooms", "ScanNet", "ImageNet"},
        ),
        (["data.source=rooms", "model.init=pri3d_view_r18.rooms"], "MIT", {"rooms"}),
    ],
)
def test_strictest_terms_win(overrides, weights, datasets):
    license = license_of(load_recipe("pri3d_view_r18", overrides))
    assert license.weights == weights
    if datasets is not None:
        assert {name for name, _ in license.datasets} == datasets


def test_a_license_that_is_none_is_refused_before_training():
    with pytest.raises(RecipeError, match=r"data\.license: Unknown license 'MTI'. Closest: 'MIT'"):
        load_recipe("pri3d_view_r18", ["data.license=MTI"])
