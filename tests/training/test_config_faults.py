"""Faults of recipe files and overrides that would otherwise be tracebacks."""

from __future__ import annotations

import pytest

from geo_pretrain.errors import RecipeError
from geo_pretrain.training.bench.plan import rows
from geo_pretrain.training.distributed import join
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import TASKS


@pytest.mark.parametrize("load", [load_recipe, load_finetune_recipe])
def test_a_file_that_is_no_text_is_named(tmp_path, load):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name: x")
    with pytest.raises(RecipeError, match=r"binary\.yaml: not valid YAML"):
        load(str(path))


def test_a_value_that_is_no_yaml_is_named():
    with pytest.raises(RecipeError, match=r"Override 'optim\.lr=\[1': '\[1' is not valid YAML"):
        load_recipe("pri3d_view_r18", ["optim.lr=[1"])


def test_a_device_that_there_is_not_is_named():
    with pytest.raises(RecipeError, match=r"Device 'tpu' .* accepted: cpu, cuda"):
        join("tpu")


def test_micro_batches_must_fit_the_batch_before_data_are_opened():
    with pytest.raises(RecipeError, match=r"'optim\.batch' is 4, accepted is a multiple of accumulate"):
        load_finetune_recipe("rooms_unet_r18", ["optim.batch=4", "optim.accumulate=3"])


def test_the_benchmark_has_a_recipe_for_every_task():
    listed = {row.task: row.recipe for row in rows([])}
    assert listed.keys() == TASKS.keys()
    assert None not in listed.values()
