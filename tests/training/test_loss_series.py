"""Training is what it was: the losses of the first steps of every task are the stored ones."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import TASKS, task_config
from tests.training.conftest import TINY_TASKS
from tests.training.loss_series import STEPS, STORED, loss_series, recipe_of

TOLERANCE = 1e-3  # relative: other processors sum in another order, and every step lets that grow


def test_every_task_has_a_stored_series():
    assert json.loads(STORED.read_text())["tasks"].keys() == TINY_TASKS.keys() == TASKS.keys()


# Settings that some tasks do not use, at values that no tiny recipe has.
OTHERWISE: dict[str, Any] = {
    "candidates": 32,
    "dedup": True,
    "dim": 16,
    "distance": "euclidean",
    "features": "ones",
    "form": "norm",
    "frustum": True,
    "geo_tolerance": 0.3,
    "images": "nowhere",
    "match_released_code": True,
    "matches": 9,
    "memory": 3,
    "memory_momentum": 0.1,
    "negative_margin": 2.5,
    "negatives": "pair",
    "positive_margin": 0.7,
    "positives": 11,
    "queue": 33,
    "rounding": "nearest",
    "squared": False,
    "symmetric": False,
    "targets": "features",
    "teacher_encoder": "resnet18",
    "temperature": 0.77,
    "tolerance": 0.6,
}
NO_MATTER: dict[str, dict[str, Any]] = {  # of global distillation: `negatives` has other values
    "global_kd": {"negatives": "memory"},
    "gupta": {"negatives": "memory"},
}


def test_every_setting_that_a_task_may_not_use_is_tried(tiny_recipe):
    unused = [task_config(load_recipe(str(tiny_recipe(tiny)))).unused() for tiny in TINY_TASKS]
    assert OTHERWISE.keys() == {name for names in unused for name in names}


def sets(settings: dict[str, Any]) -> list[str]:
    """Options of the command for settings of the task."""
    return [f"--set=task.{name}={json.dumps(value)}" for name, value in settings.items()]


@pytest.mark.parametrize("tiny", TINY_TASKS)
def test_losses_of_the_first_steps_are_the_stored_ones(tmp_path, tiny_recipe, pickled_loaders, tiny):
    """They are so although what the task does not use is set otherwise, of which the command warns."""
    stored = json.loads(STORED.read_text())["tasks"][tiny]
    unused = task_config(load_recipe(str(recipe_of(tiny_recipe, tmp_path, tiny)))).unused()
    others = {name: value for name, value in (OTHERWISE | NO_MATTER.get(tiny, {})).items() if name in unused}
    with warnings.catch_warnings(record=True) as caught:
        series = loss_series(tiny_recipe, tmp_path, tiny, *sets(others))
    told = [str(warning.message) for warning in caught if "changes nothing here" in str(warning.message)]
    assert [name for name in others if not any(f"'task.{name}' is" in text for text in told)] == []
    assert len(told) == len(others)
    assert series.keys() == stored.keys()
    for name, values in series.items():
        assert len(values) == STEPS
        assert values == pytest.approx(stored[name], rel=TOLERANCE), name
