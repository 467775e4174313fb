"""CSC: the loss of a batch against a loop over pairs; partitions are upright whatever way the clouds were turned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.pretrain import load_checked_recipe
from geo_pretrain.training.tasks.matching import one_match_each
from tests.training.losses.test_contrastive import slow_partition_nce
from tests.training.tasks.test_pointcontrast import outputs, seeded, task_and_batch  # noqa: F401 (a fixture)


def world_points(batch, k, pair, rows):
    """Points of view `k` in the frame of the recording."""
    points = batch[f"points{k}"][rows].double()
    to_world = batch[f"to_world{k}"][pair]
    return (torch.cat([points, torch.ones(len(points), 1)], dim=1) @ to_world.T)[:, :3].numpy()


def test_loss_of_a_batch_is_the_mean_over_pairs(task_and_batch):  # noqa: F811
    task, batch = task_and_batch("csc", "task.matches=60", "task.outer=8")
    generator, views = seeded(batch["seed"][0]), outputs(task, batch)
    want = []
    for pair, matches in enumerate(batch["matches"].split(batch["matches_per_pair"])):
        rows = one_match_each(matches, 60, generator).T
        places = [world_points(batch, k, pair, rows[k - 1]) for k in (1, 2)]
        assert np.linalg.norm(places[0] - places[1], axis=1).max() < 0.225  # matched, so the turns are undone
        want.append(slow_partition_nce(views[0][rows[0]], views[1][rows[1]], places[0], 0.4, 0.3, 1.2))
    with torch.no_grad():
        assert task(batch)["partition"].item() == pytest.approx(np.mean(want), rel=1e-5)


def test_features_are_centered_colors_and_turns_keep_z_nearly_up(task_and_batch):  # noqa: F811
    _, batch = task_and_batch("csc")
    for k in (1, 2):
        feats = batch[f"feats{k}"]
        assert feats.min() >= -0.51
        assert feats.max() <= 0.51
        assert feats.std() > 0.05
        assert (batch[f"to_world{k}"][:, 2, 2] > 0.99).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task.temperature=0.01", r"'task.temperature' is 0\.01, accepted is at least 0\.03333: below, exp"),
        ("task.inner=20", r"'task.inner' is 20\.0, accepted is less than 'task.outer' 20"),
    ],
)
def test_settings_under_which_nothing_could_be_learned_are_refused(change, said):
    with pytest.raises(RecipeError, match=said):
        load_checked_recipe("csc_srunet34.rooms", [change])
