"""Training is what it was: the losses of the first steps of every task are the stored ones."""

from __future__ import annotations

import json

import pytest

from geo_pretrain.training.tasks import TASKS
from tests.training.conftest import TINY_TASKS
from tests.training.loss_series import STEPS, STORED, loss_series

TOLERANCE = 1e-3  # relative: other processors sum in another order, and every step lets that grow


def test_every_task_has_a_stored_series():
    assert json.loads(STORED.read_text())["tasks"].keys() == TINY_TASKS.keys() == TASKS.keys()


@pytest.mark.parametrize("tiny", TINY_TASKS)
def test_losses_of_the_first_steps_are_the_stored_ones(tmp_path, tiny_recipe, pickled_loaders, tiny):
    stored = json.loads(STORED.read_text())["tasks"][tiny]
    series = loss_series(tiny_recipe, tmp_path, tiny)
    assert series.keys() == stored.keys()
    for name, values in series.items():
        assert len(values) == STEPS
        assert values == pytest.approx(stored[name], rel=TOLERANCE), name
