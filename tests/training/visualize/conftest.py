"""Backbones and a recording that pictures are drawn of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.recipe import DataSpec
from tests.training.test_loop import run_here
from tests.zoo import CONTRACT_3D, write_tiny, write_tiny_3d

SIZE = (48, 64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def image_folder(runs):
    return str(write_tiny(runs / "image").folder)


@pytest.fixture(scope="module")
def cloud_folder(runs):
    contract = dataclasses.replace(CONTRACT_3D, voxel_size=0.1)
    return str(write_tiny_3d(runs / "cloud", contract=contract, recipe_yaml=None).folder)


@pytest.fixture
def geo(runs, tiny_recipe):
    if not (runs / "geo").exists():
        run_here(tiny_recipe("pri3d_geo", optim={"steps": 1}), runs / "geo")
    return str(runs / "geo")


@pytest.fixture(scope="module")
def source(recording):
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def spec(recording):
    return DataSpec(source="seven_scenes", path=str(recording), size=SIZE, overlap=(0.3, 1.0))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
