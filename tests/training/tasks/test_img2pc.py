"""Image to point cloud: a batch against loops, both stages in a row, the folder's pair, and exact resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from geo_pretrain.catalog import find
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import RecipeError
from geo_pretrain.loading import load_backbone, load_pair, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation.features import random_pair
from geo_pretrain.training.pretrain import needs_stage1, run_recipe
from geo_pretrain.training.recipe import list_recipes, load_recipe, load_stage1
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks import taught as shared
from geo_pretrain.training.tasks.matching import draw, nearest_cells
from tests.training.conftest import recipe_writer
from tests.training.tasks.test_pixel_simclr import slow_nce, tiny
from tests.training.tasks.test_ppkt import nearly_the_same
from tests.training.test_loop import ALONE, Stop, logged, run_here, stop_at

pytestmark = pytest.mark.usefixtures("quick_weights")  # teachers are of real size

TINY = {
    "name": "img2pc_srunet18.tiny",
    "task": {"name": "img2pc", "matches": 100, "temperature": 0.1, "teacher": "stage1"},
    "model": None,
    "unet3d": {"variant": "18A", "width": 8, "out_chans": 16, "voxel_size": 0.15},
    "data": {
        "units": "frames",
        "overlap": None,
        "augment": {"jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0},
    },
    "optim": {"dampening": 0.0, "bn_momentum": "constant", "steps": 16},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, recording):
    """The folder of a first stage of a few steps."""
    folder = tmp_path_factory.mktemp("stage1")
    run_here(tiny(recipe_writer(folder, recording), optim={"steps": 12}), folder / "out")
    return folder / "out"


@pytest.fixture
def taught(tiny_recipe, teacher):
    """The path of a recipe of the second stage alone."""

    def write(**changes):
        tree = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
        tree["task"]["teacher"] = str(teacher)
        for key, value in changes.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        return tiny_recipe(**tree)

    return write


@pytest.fixture
def task_and_batch(taught):
    def make(*overrides):
        recipe = load_recipe(str(taught()), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = task.dataset(source, pairs)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def slow_features(task, batch, teacher):
    """The drawn points' and their pixels' features, one by one, float64 [n, C]; the teacher is loaded on its own."""
    network = load_backbone(teacher, decoder=True).eval()
    with torch.no_grad():
        maps = network(batch["image"]).double().numpy()
        task.train()
        voxels = task.backbone(SparseTensor(batch["coords"], batch["feats"])).feats
        if task.projection is not None:
            voxels = voxels @ task.projection.weight.T + task.projection.bias
    generator = torch.Generator().manual_seed(batch["seed"][0])
    rows = draw(len(batch["pixel"]), task.config.matches, generator, torch.device("cpu"))
    points, pixels = [], []
    for row in rows.tolist():
        points.append(voxels[batch["voxel"][row]].double().numpy())
        element, pixel = int(batch["element"][row]), int(batch["pixel"][row])
        pixels.append(maps[element, :, pixel // 64, pixel % 64])
    return [np.array(found) / np.linalg.norm(found, axis=1, keepdims=True) for found in (points, pixels)]


@pytest.mark.parametrize("negatives, slow", [("pixels", "positives"), ("points", "anchors"), ("union", "both")])
def test_loss_contrasts_points_with_their_pixels_in_every_reading(task_and_batch, teacher, negatives, slow):
    task, batch = task_and_batch(f"task.negatives={negatives}")
    points, pixels = slow_features(task, batch, teacher)
    assert points.shape == (100, 16)
    with torch.no_grad():
        assert task(batch)["nce"].item() == pytest.approx(slow_nce(points, pixels, 0.1, slow), rel=1e-4)


def test_more_outputs_than_the_teachers_pass_a_linear_layer(task_and_batch, teacher):
    task, batch = task_and_batch("unet3d.out_chans=32")
    assert tuple(task.projection.weight.shape) == (16, 32)
    assert not task.backbone.normalize
    points, pixels = slow_features(task, batch, teacher)
    loss = task(batch)["nce"]
    assert loss.item() == pytest.approx(slow_nce(points, pixels, 0.1, "positives"), rel=1e-4)
    loss.backward()
    assert task.projection.weight.grad.abs().sum() > 0


def test_pixel_of_a_point_is_the_one_that_sees_it(task_and_batch):
    _, batch = task_and_batch("task.keep=[1.0, 1.0]", "task.color_jitter=0.0")
    image = batch["image"] * 0.225 + 0.45
    for row in range(0, len(batch["pixel"]), 7):
        element, pixel, voxel = (int(batch[key][row]) for key in ("element", "pixel", "voxel"))
        color = image[element].flatten(1)[:, pixel]
        torch.testing.assert_close(batch["feats"][voxel] + 0.5, color, atol=1e-5, rtol=0)
        point = batch["points"][voxel].double()
        world = batch["to_world"][element] @ torch.cat([point, torch.ones(1, dtype=torch.float64)])
        assert torch.isfinite(world).all()
        assert batch["depth"][element].flatten()[pixel] > 0


def test_what_the_paper_says_is_augmented_is(task_and_batch):
    task, batch = task_and_batch()
    spec = task.cloud_spec
    assert (spec.rotation, spec.keep, spec.color_jitter, spec.color_jitter_prob) == ("upright", (0.5, 1.0), 0.05, 0.95)
    assert (spec.flip_prob, spec.resize, spec.scale, spec.elastic_prob) == (0.0, (1.0, 1.0), (1.0, 1.0), 0.0)
    _, all_points = task_and_batch("task.keep=[1.0, 1.0]")
    assert len(batch["coords"]) < len(all_points["coords"])


@pytest.mark.parametrize("size", [(6, 8), (3, 4), (12, 16)])
def test_nearest_cells_are_those_of_nearest_upsampling(size):
    maps, large = torch.randn(2, 3, *size), (12, 16)
    element, pixel = torch.arange(2).repeat_interleave(192), torch.arange(192).repeat(2)
    want = F.interpolate(maps, size=large, mode="nearest").flatten(2)
    got = nearest_cells(maps, element, pixel, large)
    for n in range(384):
        assert torch.equal(got[n], want[element[n], :, pixel[n]])


def test_teacher_of_another_resolution_can_be_read_bilinear(tiny_recipe, taught, tmp_path):
    run_here(tiny_recipe("pri3d_view", optim={"steps": 1}), tmp_path / "pri3d")
    teacher = f"task.teacher={tmp_path / 'pri3d'}"
    maps = {}
    for kind in ("nearest", "bilinear"):
        recipe = load_recipe(str(taught()), [teacher, f"task.interpolation={kind}", "unet3d.out_chans=32"])
        source = open_source(recipe.data)
        task = build_task(recipe)
        samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
        batch = samples.collate([samples[(0, k)] for k in range(2)])
        features = task.teacher_maps(batch)
        assert features.shape[-2:] == (24, 32)
        corners = {} if kind == "nearest" else {"align_corners": False}
        large = F.normalize(F.interpolate(features, size=(48, 64), mode=kind, **corners), dim=1).flatten(2)
        rows = torch.arange(0, len(batch["pixel"]), 5)
        maps[kind] = task.pixel_features(batch, rows)
        want = large[batch["element"][rows], :, batch["pixel"][rows]]
        torch.testing.assert_close(maps[kind], want, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps["nearest"], maps["bilinear"], atol=1e-3)


def test_teacher_is_frozen(task_and_batch):
    task, batch = task_and_batch()
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    task.train()
    task(batch)["nce"].backward()
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in task.teacher.state_dict().items())
    assert all(parameter.grad is not None for parameter in task.backbone.parameters())


def test_a_step_in_bf16_is_nearly_that_in_fp32(task_and_batch):
    nearly_the_same(*(task_and_batch(f"precision={kind}") for kind in ("fp32", "bf16")))


def test_the_student_computes_in_the_precision_of_the_recipe(task_and_batch, monkeypatch):
    seen = []
    encode = shared.encode
    monkeypatch.setattr(shared, "encode", lambda *a, **options: seen.append(options) or encode(*a, **options))
    for precision in ("fp32", "bf16"):
        task, batch = task_and_batch(f"precision={precision}")
        task(batch)
    assert seen == [{"low_precision": False}, {"low_precision": True}]


def test_the_pair_takes_images_as_the_teacher_was_shown_them(taught, teacher):
    """At the size of this stage's data by nearest pixels, whatever the teacher's own contract says of both."""
    recipe = load_recipe(str(taught()), ["data.size=[56, 96]"])
    source = open_source(recipe.data)
    task = build_task(recipe)
    contract = task.export().pairing.contract
    own = read_checkpoint(teacher).contract
    assert (own.size, own.interpolation) == ((48, 64), "bilinear")
    assert (contract.size, contract.interpolation) == ((56, 96), "nearest")
    samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
    for k in (0, 3):
        color = source.load(samples.pairs[k].scene, samples.pairs[k].frame1).color
        torch.testing.assert_close(contract.transforms()(color), samples[(0, k)]["image"], atol=1e-6, rtol=0)


def test_the_pair_reads_maps_as_they_were_read_in_training(taught):
    pairing = build_task(load_recipe(str(taught()), ["task.interpolation=bilinear"])).export().pairing
    assert pairing.interpolation == "bilinear"


def test_start_depends_on_the_seed(taught):
    def first(*overrides):
        return build_task(load_recipe(str(taught()), ["unet3d.out_chans=32", *overrides])).projection.weight

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first("seed=1"))


def test_wrong_settings_are_named(taught):
    path = str(taught())
    for override, part in (
        ("task.temperature=0", "'task.temperature' is 0"),
        ("task.matches=0", "'task.matches' is 0"),
        ("task.negatives=all", "pixels, points, union"),
        ("task.keep=[0.5, 1.5]", "'task.keep' is"),
        ("task.teacher=stage1", "no first stage was trained"),
        ("unet3d=null", "key 'unet3d' is missing"),
    ):
        with pytest.raises(RecipeError, match=part):
            build_task(load_recipe(path, [override]))


@pytest.mark.parametrize("width", [16, 32])
def test_run_learns_and_its_folder_opens_alone_and_as_a_pair(tmp_path, taught, teacher, width):
    checkpoint = run_here(taught(unet3d={"out_chans": width}), tmp_path / "out")
    losses = [line["nce"] for line in logged(tmp_path / "out")]
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])
    assert verify(tmp_path / "out").passed
    network = load_backbone(tmp_path / "out")
    assert network.load_report.coverage == 1
    assert (network.normalize, network.out_chans) == (width == 16, width)
    assert (network.contract.channels, network.contract.offset) == (("R", "G", "B"), -0.5)
    assert checkpoint.license.base_model.startswith("random weights; teacher: img2pc_stage1_r18.tiny")
    pair = load_pair(tmp_path / "out")
    points, colors = torch.rand(300, 3), torch.randint(0, 256, (300, 3), dtype=torch.uint8)
    with torch.no_grad():
        described, image = pair.encode_points(points, colors), torch.randn(1, 3, 48, 64)
        pixels = pair.encode_image(image)
        want = F.normalize(load_backbone(teacher, decoder=True)(image), dim=1)
    assert (described.shape, pixels.shape) == ((300, 16), (1, 16, 48, 64))
    torch.testing.assert_close(pixels, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(described.norm(dim=1), torch.ones(300))
    if width == 32:  # where the student's features are projected, those weights are drawn too
        random, again = (random_pair(str(tmp_path / "out"), 3).point_projection.weight for _ in range(2))
        assert torch.equal(random, again)
        assert not torch.equal(random, pair.point_projection.weight)


def test_stopped_run_continues_bit_for_bit(tmp_path, taught):
    path = taught(optim={"steps": 5, "batch": 2, "accumulate": 2}, save_every=2)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(3))
    run_here(path, tmp_path / "broken")
    whole, broken = (load_backbone(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")


def test_one_recipe_trains_both_stages(tmp_path, tiny_recipe):
    first = tmp_path / "first.yaml"
    first.write_bytes(tiny(tiny_recipe).read_bytes())
    unnamed = TINY | {"task": TINY["task"] | {"teacher": None}}  # the default
    path = tiny_recipe(**unnamed, stage1={"recipe": str(first), "optim": {"steps": 3}})
    recipe = load_recipe(str(path), ["optim.steps=2", "save_every=1"])
    assert "teacher" not in recipe.task
    assert needs_stage1(recipe)
    outcome = run_recipe(recipe, tmp_path / "out", ALONE, stage1=load_stage1(recipe))
    stage1 = read_checkpoint(tmp_path / "out.stage1")
    assert (stage1.arch.name, stage1.provenance["steps"]) == ("resnet_depth_unet", 3)
    assert outcome.checkpoint.license.base_model.startswith("random weights; teacher: img2pc_stage1_r18.tiny")
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert "folder" not in kept["stage1"]
    pair = load_pair(tmp_path / "out")
    own = load_backbone(tmp_path / "out.stage1", decoder=True).state_dict()
    assert all(torch.equal(own[key], value) for key, value in pair.image_network.state_dict().items())


def test_recipes_are_the_entries(teacher):
    names = [name for name in list_recipes() if name.startswith("img2pc_srunet34")]
    assert names == ["img2pc_srunet34", "img2pc_srunet34.rooms"]
    for name in names:
        recipe, entry = load_recipe(name, [f"task.teacher={teacher}"]), find(name)
        task = build_task(recipe)
        assert entry.recipe == name
        assert (dict(entry.arch.args), entry.contract) == (task.arch_args, task.contract)
        assert needs_stage1(load_recipe(name))
        assert load_stage1(load_recipe(name)).name == name.replace("srunet34", "stage1_r18")
        toy = load_recipe(name, toy=True)
        assert load_stage1(toy, toy=True).data.source == "rooms"
        assert (toy.data.augment.jitter_prob, toy.task["keep"]) == (0.0, [0.5, 1.0])  # not for the overlay to change
