"""Training and fine-tuning give what they gave: losses, scores, files, weights."""

from __future__ import annotations

import json

import pytest

from tests.pins import finetuning_runs, in_memory, training_runs
from tests.pins.compare import assert_same
from tests.pins.training_runs import DATA, TASKS
from tests.training.conftest import recording  # noqa: F401 (a fixture)


def stored(name):
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def trained(tmp_path_factory, recording):  # noqa: F811
    """The checkpoint folder of each task, described."""
    folder = tmp_path_factory.mktemp("pins")
    return {task: training_runs.describe(training_runs.train(task, recording, folder / task)) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part", ["files", "config.json", "README.md", "log.jsonl"])
def test_checkpoint_folder_is_the_stored_one(trained, task, part):
    assert_same(trained[task][part], stored(f"folders/{task}")[part], more=part == "config.json")


@pytest.mark.parametrize("task", TASKS)
def test_recipe_says_all_that_it_said(trained, task):
    assert_same(trained[task]["recipe.yaml"], stored(f"folders/{task}")["recipe.yaml"], more=True)


@pytest.mark.parametrize("task", TASKS)
def test_weights_are_the_stored_ones(trained, task):
    files = stored(f"folders/{task}")["tensors"]
    assert trained[task]["tensors"].keys() == files.keys()
    for file, tensors in files.items():
        found = trained[task]["tensors"][file]
        assert found.keys() == tensors.keys(), file
        for name, (dtype, shape, mean, size) in tensors.items():
            assert found[name][:2] == [dtype, shape], (file, name)
            near = 1e-3 * size + 1e-5  # what began as 0 is two gradients' worth, in which rounding shows
            assert found[name][2:] == pytest.approx([mean, size], rel=0, abs=near), (file, name)


@pytest.mark.parametrize("kind", finetuning_runs.KINDS)
def test_finetuning_gives_what_it_gave(tmp_path, kind):
    found = finetuning_runs.describe(finetuning_runs.finetune(kind, tmp_path / kind))
    expected = stored(f"finetuning/{kind}")
    assert set(expected["files"]) <= set(found["files"])  # those of its checkpoint came later
    # anchors and proposals are chosen by what is nearly equal; other losses differ by less between processors
    assert_same(found["log"], expected["log"], relative=2e-3 if kind == "mask_rcnn" else 2e-4)
    for part in ("evaluations", "results"):  # a pixel that changes its class is a step
        assert_same(found[part], expected[part], relative=0.02, absolute=1e-3, more=True)


def test_finetuning_on_points_gives_what_it_gave():
    found, expected = in_memory.points(), stored("points")
    assert_same(found["losses"], expected["losses"])
    assert found["miou"] == pytest.approx(expected["miou"], abs=0.01)
    for row, line in zip(found["confusion"], expected["confusion"], strict=True):
        assert row == pytest.approx(line, abs=4)


def test_finetuning_of_the_demo_gives_what_it_gave():
    found, expected = in_memory.segmentation(), stored("segmentation")
    assert_same(found["losses"], expected["losses"])
    assert found["miou"] == pytest.approx(expected["miou"], abs=0.01)
