"""Faults of recipe files and overrides that would otherwise be tracebacks."""

from __future__ import annotations

import contextlib

import pytest
import yaml

from geo_pretrain.cli.options import data_spec
from geo_pretrain.errors import RecipeError, UnknownName
from geo_pretrain.training.bench.plan import rows
from geo_pretrain.training.distributed import join
from geo_pretrain.training.finetune.registry import load_checked_finetune_recipe
from geo_pretrain.training.finetune_recipe import changes, list_finetune_recipes, load_finetune_recipe
from geo_pretrain.training.pretrain import CHECKS, load_checked_recipe
from geo_pretrain.training.recipe import load_recipe, load_stage1, recipe_path
from geo_pretrain.training.tasks import TASKS
from tests.front_door import geo_pretrain


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


RANGES = [  # override -> what is accepted; of a pre-training recipe
    ("optim.lr=-1", "a number above 0"),
    ("optim.lr=.nan", "a finite number"),
    ("optim.lr=inf", "a finite number"),
    ("optim.momentum=7", "a number from 0 to below 1"),
    ("optim.dampening=2", "a probability"),
    ("optim.weight_decay=-1", "a number from 0 up"),
    ("optim.epochs=-1", "a number above 0"),
    ("optim.gamma=1.5", "a number above 0 and up to 1"),
    ("optim.power=-1", "a number from 0 up"),
    ("data.augment.grayscale_prob=2", "a probability"),
    ("data.augment.jitter=[0.4, 0.4, 0.4, 0.6]", "four numbers from 0 up, the last one up to 0.5"),
    ("data.augment.blur_radius=[2, 1]", "0 <= low <= high"),
    ("data.max_pairs_per_scene=0", "a whole number from 1 up"),
    ("seed=-1", "a whole number from 0 to"),
    ("name=a/b", "letters, digits"),
    ("name=''", "letters, digits"),
    ("save_every=0", "a whole number from 1 up"),
    ("unet3d={bn_momentum: 3}", "a probability"),
    ("unet3d={stem_kernel: 4}", "an odd number"),
]
FINETUNE_RANGES = [
    ("optim.momentum=7", "a number from 0 to below 1"),
    ("optim.warmup=-1", "a whole number from 0 up"),
    ("optim.warmup_factor=-1", "a probability"),
    ("optim.power=-1", "a number from 0 up"),
    ("optim.floor=-1", "a number from 0 up"),
    ("optim.weight_decay=-1", "a number from 0 up"),
    ("optim.backbone_bn_momentum=2", "a probability"),
    ("data.augment.rotate=200", "degrees from 0 to 180"),
    ("data.augment.shorter=[100, 64]", "32 <= low <= high"),
    ("data.fraction_seed=-1", "a whole number from 0 to"),
    ("evaluate.size=[8, 8]", "each from 32 up"),
    ("network.freeze=6", "0 (nothing) to 5"),
    ("seed=-1", "a whole number from 0 to"),
    ("name=a b", "letters, digits"),
]


@pytest.mark.parametrize(
    "load, name, override, accepted",
    [(load_recipe, "pri3d_view_r18", *row) for row in RANGES]
    + [(load_finetune_recipe, "scannet_unet_r50", *row) for row in FINETUNE_RANGES],
)
def test_a_value_out_of_range_is_named_with_what_is_accepted_and_its_override(load, name, override, accepted):
    with pytest.raises(RecipeError) as error:
        load(name, [override])
    message = str(error.value)
    assert f"accepted is {accepted}" in message or accepted in message.partition("accepted is ")[2]
    assert message.endswith(f"Given by --set {override}.")
    assert ".yaml" not in message  # the file is not to blame


def test_only_those_mistakes_that_an_override_made_name_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntask: {name: pri3d_view}\noptim: {steps: 5, lr: -1}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path), ["optim.batch=0", "seed=1"])
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: 2 mistakes:"
    assert sorted(lines) == [
        "  - 'optim.batch' is 0, accepted is a whole number from 1 up. Given by --set optim.batch=0.",
        "  - 'optim.lr' is -1.0, accepted is a number above 0.",
    ]
    with pytest.raises(RecipeError, match=r"mine\.yaml: 'optim\.lr' is -1\.0, accepted is a number above 0\.$"):
        load_recipe(str(path), ["optim.batch=4"])


def test_a_key_under_both_its_names_is_refused_in_overrides_too():
    for overrides in (["model.depth=50", "model.encoder=resnet18"], ["model.encoder=resnet18", "model.depth=50"]):
        with pytest.raises(RecipeError, match=r"'model\.encoder' is given twice") as error:
            load_recipe("pri3d_view_r18", overrides)
        assert all(repr(override) in str(error.value) for override in overrides)
    assert load_recipe("pri3d_view_r18", ["model.depth=18", "model.depth=50"]).model.encoder == "resnet50"


def test_a_doubled_key_hides_no_other_mistake(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(
        "name: both\ntask: {name: pri3d_view}\nmodel: {depth: 18, encoder: resnet18}\n"
        "data: {licence: MIT, license: MIT}\noptim: {steps: 5, batch: 0}\ncolor: red\n"
    )
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path), ["precision=fp8", "x"])
    assert len(error.value.problems) == 6
    for part in ("'model.encoder' is given twice", "'data.license' is given twice", "'optim.batch'", "'precision'"):
        assert str(error.value).count(part) == 1


@pytest.mark.parametrize("load", [load_recipe, load_finetune_recipe])
def test_a_key_that_a_file_gives_twice_is_an_error_with_its_line(tmp_path, load):
    path = tmp_path / "twice.yaml"
    path.write_text("name: x\noptim:\n  lr: 1\n  batch: 2\n  lr: 3\n")
    with pytest.raises(RecipeError, match=r"key 'lr' is given twice, first in line 3(.|\n)*line 5"):
        load(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "5",
        "- a",
        "a: &a {b: *a}",
        "a: 2020-13-45",
        "a: !!int x",
        "a: !!timestamp x",
        "? [1]\n: 2",
        "{" * 3000,
    ],
)
@pytest.mark.parametrize("load", [load_recipe, load_finetune_recipe])
def test_a_file_that_is_no_recipe_is_named(tmp_path, load, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"odd\.yaml"):
        load(str(path))


@pytest.mark.parametrize("toy", [False, True])
@pytest.mark.parametrize(
    "value",
    ["null", "5", "[]", "{}", "x", "[1, {a: 2}]", ".nan", "{1: 2}", "{null: 1}", "{name: [1]}", "2020-01-01", "é"],
)
@pytest.mark.parametrize(
    "key", ["name", "task", "model", "model.init", "data", "data.source", "optim", "stage1", "seed"]
)
def test_values_of_any_type_are_refused_or_taken_without_a_traceback(key, value, toy):
    for load, name in ((load_checked_recipe, "gsc_r18.rooms"), (load_checked_finetune_recipe, "rooms_unet_r18")):
        with contextlib.suppress(RecipeError, UnknownName):
            load(name, [f"{key}={value}"], toy=toy)


@pytest.mark.parametrize("value", ["null", "5", "[]", "{}", "x", "[1, {a: 2}]", "{1: 2}"])
@pytest.mark.parametrize("key", ["name", "task", "model", "data", "optim", "stage1", "unet3d"])
def test_a_file_of_odd_sections_is_refused_under_toy_too(tmp_path, key, value):
    path = tmp_path / "odd.yaml"
    for name, load in (("gsc_r18", load_checked_recipe), ("rooms_unet_r18", load_checked_finetune_recipe)):
        tree = yaml.safe_load(recipe_path(name).read_text()) | {key: yaml.safe_load(value)}
        path.write_text(yaml.safe_dump(tree))
        for toy in (False, True):
            with contextlib.suppress(RecipeError, UnknownName):
                recipe = load(str(path), toy=toy)
                if load is load_checked_recipe and recipe.stage1 is not None:
                    load_stage1(recipe, toy=toy)


def test_a_recipe_of_the_other_kind_is_told_with_its_command(tmp_path):
    file, other = tmp_path / "labels.yaml", tmp_path / "pretext.yaml"
    file.write_text(recipe_path("rooms_unet_r18").read_text())
    other.write_text(recipe_path("gsc_r18").read_text())
    for given in ("rooms_unet_r18", str(file)):
        with pytest.raises(
            RecipeError, match=f"{given} is a fine-tuning recipe; run it by `geo-pretrain finetune {given}`"
        ):
            load_recipe(given)
    for given in ("gsc_r18", str(other)):
        with pytest.raises(
            RecipeError, match=f"{given} is a pre-training recipe; run it by `geo-pretrain train {given}`"
        ):
            load_finetune_recipe(given)


@pytest.mark.parametrize("load", [load_recipe, load_finetune_recipe])
def test_a_path_without_a_recipe_is_told(tmp_path, load):
    for path, what in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(UnknownName, match=f"{path}' {what}"):
            load(str(path))


def test_a_section_that_is_left_out_is_no_difference():
    text = load_finetune_recipe("rooms_unet_r18").to_yaml()
    without = text.replace("  unet3d: null\n", "")
    assert without != text
    assert changes(without, text) == changes(text, without) == []
    cloud = load_finetune_recipe("rooms_srunet34", ["network.unet3d={width: 8}"]).to_yaml()
    null = load_finetune_recipe("rooms_srunet34", ["network.unet3d=null"]).to_yaml()
    (changed,) = changes(cloud, null)
    assert changed.startswith("network.unet3d: {'variant': '34C', 'width': 8")
    assert changed.endswith(" -> None")


def test_fine_tuning_names_wrong_options_of_data_and_network_with_the_rest():
    cases = {
        "rooms_deeplabv3_r18": ["network.options.decoder_chanels=8", "data.options.scnes=3", "optim.lr=-1"],
        "scannet_mask_rcnn_r50": ["network.options.width=0", "data.options.min_pxels=3", "network.aux=1", "seed=-1"],
        "rooms_unet_r18": ["data.source=roms", "optim.lr=-1"],
        "cityscapes_unet_r50": ["data.options.x=1", "optim.lr=-1"],
    }
    parts = {
        "rooms_deeplabv3_r18": [
            "'network.options' is {",
            "Unknown option of smp.DeepLabV3 'decoder_chanels'",
            "unknown key 'data.options.scnes'",
        ],
        "scannet_mask_rcnn_r50": ["'network.options.width' is 0", "'data.options.min_pxels'", "'network.aux' is 1.0"],
        "rooms_unet_r18": ["Unknown labelled data set 'roms'. Closest: 'rooms'"],
        "cityscapes_unet_r50": ["unknown key 'data.options.x'. There are none here."],
    }
    for name, wrong in cases.items():
        with pytest.raises(RecipeError) as error:
            load_checked_finetune_recipe(name, wrong)
        assert len(error.value.problems) == len(wrong), str(error.value)
        assert all(part in str(error.value) for part in parts[name]), str(error.value)


@pytest.mark.parametrize("name", list_finetune_recipes())
def test_every_fine_tuning_recipe_has_options_that_its_data_and_network_take(name):
    assert load_checked_finetune_recipe(name) == load_finetune_recipe(name)


def test_start_weights_that_there_are_not_are_named_with_the_recipe(tmp_path):
    for start in ("nope", str(tmp_path)):
        with pytest.raises(RecipeError) as error:
            load_checked_recipe("pri3d_view_r18.rooms", [f"model.init={start}", "optim.lr=-1"])
        assert len(error.value.problems) == 2
        assert f"'model.init' is '{start}', accepted is one of scratch, imagenet" in str(error.value)
    recipe = load_checked_recipe("gsc_r18.rooms", ["stage1.model.init=nope", "stage1.task.x=1"])
    with pytest.raises(RecipeError, match=r"changed by stage1 of recipe gsc_r18\.rooms: 2 mistakes"):
        load_stage1(recipe, also=CHECKS)


def test_options_of_a_source_go_when_an_override_names_another_source():
    rooms = load_checked_recipe("pri3d_view_r18.rooms")
    assert load_checked_recipe("pri3d_view_r18.rooms", ["data.source=rooms"]).data.options == rooms.data.options != {}
    scannet = load_checked_recipe("pri3d_view_r18.rooms", ["data.source=scannet", "data.options.labels=x"])
    assert scannet.data.options == {"labels": "x"}
    labelled = load_checked_finetune_recipe("rooms_unet_r18", ["data.source=scannet", "data.path=/scans"])
    assert labelled.data.options == {}


def test_options_given_before_their_source_are_not_lost_silently():
    with pytest.raises(RecipeError, match=r"'data.options.labels=x' would be lost: 'data.source=scannet' drops"):
        load_checked_recipe("pri3d_view_r18.rooms", ["data.options.labels=x", "data.source=scannet"])


def test_a_recipe_that_names_no_source_has_the_options_of_rooms(tmp_path):
    text = load_checked_recipe("pri3d_view_r18.rooms").to_yaml()
    path = tmp_path / "mine.yaml"
    path.write_text("".join(line for line in text.splitlines(True) if line.strip() != "source: rooms"))
    assert load_checked_recipe(str(path), ["data.source=rooms"]).data.options != {}
    assert load_checked_recipe(str(path), ["data.source=scannet", "data.path=/scans"]).data.options == {}


def test_a_command_without_a_recipe_takes_the_options_it_is_given():
    assert data_spec("rooms", None, ["data.options.scenes=3"], "0.3:1").options == {"scenes": 3}


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["matching", "x", "--pairs", "0"], "--pairs"),
        (["matching", "x", "--size", "3x3"], "each from 32 up"),
        (["pixel-to-voxel", "x", "--pairs", "0"], "--pairs"),
        (["probe", "x", "--fraction", "0"], "--fraction"),
        (["probe", "x", "--pixels", "0"], "--pixels"),
    ],
)
def test_numbers_of_eval_are_checked_before_any_work(arguments, part):
    assert part in geo_pretrain("eval", *arguments, expected=2).errors


def test_probes_are_checked_before_the_backbone_is_opened():
    assert (
        "Unknown probe 'zz'" in geo_pretrain("eval", "probe", "no_such_backbone", "--probes", "zz", expected=1).errors
    )


def test_recipes_are_shown_by_path_and_copied_to_where_there_is_a_folder(tmp_path):
    path = recipe_path("gsc_r18")
    assert geo_pretrain("recipes", "show", path).output == path.read_text()
    assert f"such as {tmp_path}/gsc_r18.yaml" in geo_pretrain("recipes", "copy", "gsc_r18", tmp_path, expected=1).errors
    missing = geo_pretrain("recipes", "copy", "gsc_r18", tmp_path / "no" / "mine.yaml", expected=1)
    assert f"the folder '{tmp_path}/no' does not exist; make it first" in missing.errors
    for name, what in (("nothere.yaml", "does not exist"), (tmp_path, "is a folder")):
        assert what in geo_pretrain("recipes", "show", name, expected=1).errors
