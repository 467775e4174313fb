"""PPKT and PPKD: what is compared with what, the upsampling at single pixels, and pairs of networks in one space."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn import Linear

from geo_pretrain import hub
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import CheckpointError, DigestMismatch, RecipeError, WeightsMismatch
from geo_pretrain.loading import load_backbone, load_pair, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.training.data.frame import Pair, SkippedFrames, resize_frame
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.evaluation import matching
from geo_pretrain.training.evaluation.features import TaughtExtractor, random_pair
from geo_pretrain.training.evaluation.matching import compare_pixel_to_voxel, evaluate_matching, match_pair
from geo_pretrain.training.recipe import DataSpec, load_recipe
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.matching import sample_map
from geo_pretrain.training.tasks.teachers import load_teacher, torchvision_segmenter
from tests.training.test_loop import Stop, logged, run_here, stop_at
from tests.zoo import unsealed

pytestmark = pytest.mark.usefixtures("quick_weights")  # teachers are of real size


def tiny_batch(tiny_recipe, tiny, settings=None, *overrides):
    """A tiny task with `settings` and a batch of three frames."""
    recipe = load_recipe(str(tiny_recipe(tiny, task=settings or {})), overrides)
    source = open_source(recipe.data)
    frames = find_pairs(source, recipe.data, skips=SkippedFrames())
    task = build_task(recipe)
    samples = task.dataset(source, frames)
    return task, samples.collate([samples[(0, k)] for k in range(3)])


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    "small, large", [((15, 20), (480, 640)), ((2, 3), (48, 70)), ((1, 1), (32, 40)), ((6, 8), (6, 8))]
)
def test_upsampling_at_pixels_is_the_upsampled_map(align_corners, small, large):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, *small, generator=generator)
    element = torch.randint(2, (400,), generator=generator)
    pixel = torch.randint(large[0] * large[1], (400,), generator=generator)
    pixel[:4] = torch.tensor([0, large[1] - 1, (large[0] - 1) * large[1], large[0] * large[1] - 1])
    whole = F.interpolate(maps, size=large, mode="bilinear", align_corners=align_corners).flatten(2)
    got = sample_map(maps, element, pixel, large, align_corners=align_corners)
    assert (got - whole[element, :, pixel]).abs().max() < 1e-5


def full_size_features(task, batch):
    """The layer as the paper draws it: convolution, upsampling to the image, normalization; [B, C, H, W]."""
    with torch.no_grad():
        maps = task.projection(task.teacher.network(batch["image"])[-1])
        size = batch["image"].shape[-2:]
        return F.normalize(F.interpolate(maps, size, mode="bilinear", align_corners=task.config.align_corners), dim=1)


def slow_ppnce(task, batch, groups):
    """Anchor by anchor: a point against the pixels of all anchors of its group."""
    dense = full_size_features(task, batch).flatten(2).double()
    with torch.no_grad():
        voxels = task.backbone(SparseTensor(batch["coords"], batch["feats"])).feats.double()
    means = []
    for rows in groups:
        z3 = [voxels[batch["voxel"][row]] / voxels[batch["voxel"][row]].norm() for row in rows]
        z2 = [dense[batch["element"][row], :, batch["pixel"][row]] for row in rows]
        total = 0.0
        for i, point in enumerate(z3):
            scores = np.array([float(point @ pixel) / task.config.temperature for pixel in z2])
            total += np.log(np.exp(scores).sum()) - scores[i]
        means.append(total / len(rows))
    return np.mean(means)


@pytest.mark.parametrize("settings", [{}, {"align_corners": False, "pixels": "all", "temperature": 0.2}])
def test_ppnce_contrasts_points_of_the_whole_batch(tiny_recipe, settings):
    task, batch = tiny_batch(tiny_recipe, "ppkt", settings | {"matches": 40})
    task.eval()
    order = torch.randperm(len(batch["element"]), generator=torch.Generator().manual_seed(batch["seed"][0]))[:40]
    assert len(set(batch["element"][order].tolist())) == 3
    with torch.no_grad():
        assert task(batch)["ppnce"].item() == pytest.approx(slow_ppnce(task, batch, [order.tolist()]), rel=1e-4)


def test_ppnce_within_images_is_an_option(tiny_recipe):
    task, batch = tiny_batch(tiny_recipe, "ppkt", {"matches": 25, "negatives": "image"})
    task.eval()
    groups = []
    for number, seed in enumerate(batch["seed"]):
        rows = [row for row, element in enumerate(batch["element"].tolist()) if element == number]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:25]
        groups.append([rows[k] for k in order])
    with torch.no_grad():
        assert task(batch)["ppnce"].item() == pytest.approx(slow_ppnce(task, batch, groups), rel=1e-4)


def test_so_many_of_each_image_can_be_each_others_negatives(tiny_recipe):
    task, batch = tiny_batch(tiny_recipe, "ppkt", {"matches": 15, "matches_of": "image"})
    task.eval()
    rows = []
    for number, seed in enumerate(batch["seed"]):
        own = [row for row, element in enumerate(batch["element"].tolist()) if element == number]
        rows += [own[k] for k in torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:15]]
    assert len(rows) == 45
    with torch.no_grad():
        assert task(batch)["ppnce"].item() == pytest.approx(slow_ppnce(task, batch, [rows]), rel=1e-4)


def test_ppkd_is_the_divergence_at_each_point(tiny_recipe):
    task, batch = tiny_batch(tiny_recipe, "ppkd", {"matches": 30, "temperature": 2.0})
    task.eval()
    order = torch.randperm(len(batch["element"]), generator=torch.Generator().manual_seed(batch["seed"][0]))[:30]
    with torch.no_grad():
        maps = task.teacher.network(batch["image"])[-1]
        logits = F.interpolate(maps, batch["image"].shape[-2:], mode="bilinear", align_corners=False).flatten(2)
        voxels = task.backbone(SparseTensor(batch["coords"], batch["feats"])).feats
        got = task(batch)["ppkd"].item()
    assert (voxels.norm(dim=1) - 1).abs().max() > 0.01  # logits, of any length
    total = 0.0
    for row in order.tolist():
        teacher = (logits[batch["element"][row], :, batch["pixel"][row]].double() / 2).softmax(0)
        student = (voxels[batch["voxel"][row]].double() / 2).softmax(0)
        total += sum(float(t * (t / s).log()) for t, s in zip(teacher, student, strict=True))
    assert got == pytest.approx(4 * total / 30, rel=1e-4)


@pytest.mark.parametrize("tiny", ["ppkt", "ppkd"])
def test_the_teacher_is_frozen_and_the_rest_learns(tiny_recipe, tiny):
    task, batch = tiny_batch(tiny_recipe, tiny)
    task.train()
    assert task.backbone.training
    assert not any(module.training for module in task.teacher.modules())
    before = copy.deepcopy(task.teacher.state_dict())
    sum(task(batch).values()).backward()
    for key, parameter in task.named_parameters():
        assert (parameter.grad is None) == key.startswith("teacher."), key
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert task.backbone.final.kernel.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())


@pytest.mark.parametrize("tiny, settings", [("ppkt", {}), ("ppkd", {}), ("gupta", {"form": "mean"})])
def test_a_step_in_bf16_is_nearly_that_in_fp32(tiny_recipe, tiny, settings):
    nearly_the_same(*(tiny_batch(tiny_recipe, tiny, settings, f"precision={kind}") for kind in ("fp32", "bf16")))


def nearly_the_same(exact, low):
    """Of two tasks, each with its batch, the second in bf16: a loss close to the first's, and weights that move."""
    (full,), (half,) = ((loss.item() for loss in task.train()(batch).values()) for task, batch in (exact, low))
    assert half == pytest.approx(full, rel=0.03)
    assert half != full
    task, batch = low
    trained = {key: value.detach().clone() for key, value in task.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD([value for value in task.parameters() if value.requires_grad], lr=0.1)
    sum(task(batch).values()).backward()
    optimizer.step()
    moved = {key for key, value in task.named_parameters() if key in trained and not torch.equal(value, trained[key])}
    assert moved == trained.keys()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in task.parameters())


def test_draws_depend_on_the_samples_seeds_alone(tiny_recipe):
    task, batch = tiny_batch(tiny_recipe, "ppkt", {"matches": 20})
    task.eval()
    with torch.no_grad():
        first = task(batch)["ppnce"]
        torch.manual_seed(5)
        assert task(batch)["ppnce"] == first
        batch["seed"][0] += 1
        assert task(batch)["ppnce"] != first


@pytest.fixture(scope="module")
def run(tmp_path_factory, recording):
    """A short run of PPKT, its recipe and folder."""
    from tests.training.conftest import recipe_writer

    folder = tmp_path_factory.mktemp("ppkt")
    path = recipe_writer(folder, recording)(
        "ppkt", optim={"steps": 12, "batch": 6, "lr": 0.2}, task={"elastic_prob": 0.5}
    )
    run_here(path, folder / "out", ["optim.accumulate=2"])
    return path, folder / "out"


def test_run_learns_and_its_folder_opens(run):
    losses = [line["ppnce"] for line in logged(run[1])]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert verify(run[1]).errors.keys() == {"output", "pair.image", "pair.points"}
    found = read_checkpoint(run[1])
    assert set(found.roles) == {"model", "heads", "teacher", "golden", "recipe", "log", "card"}
    assert (found.arch.name, found.arch.args["out_chans"], found.arch.args["normalize"]) == ("sr_unet", 32, True)
    assert (found.pairing.arch.name, found.pairing.role, found.pairing.interpolation) == (
        "resnet",
        "teacher",
        "corners",
    )
    assert found.contract.offset == -0.5
    assert load_backbone(run[1]).load_report.coverage == 1


def test_stopped_run_continues_bit_for_bit(run, tmp_path):
    path, whole = run
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", ["optim.accumulate=2", "save_every=5"], on_step=stop_at(8))
    run_here(path, tmp_path / "broken", ["optim.accumulate=2", "save_every=5"])
    for role in ("model", "heads", "teacher"):
        first, second = (load_file(folder / f"{role}.safetensors") for folder in (whole, tmp_path / "broken"))
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert logged(whole) == logged(tmp_path / "broken")


def test_a_pair_has_both_networks_in_one_space(run):
    network = load_backbone(run[1])
    with pytest.warns(FutureWarning, match="load_pair"):
        pair = network.pair()
    assert pair.point_network is network
    image = torch.rand(2, 3, 48, 64)
    points, colors = torch.rand(300, 3) * 3, torch.randint(0, 256, (300, 3), dtype=torch.uint8)
    heads, teacher = (load_file(run[1] / f"{role}.safetensors") for role in ("heads", "teacher"))
    alone = load_teacher("scratch", "resnet18").network
    alone.load_state_dict(teacher)
    with torch.no_grad():
        pixels, found = pair.encode_image(image), pair.encode_points(points, colors)
        maps = F.conv2d(alone.eval()(image)[-1], heads["projection.weight"], heads["projection.bias"])
        want = F.normalize(F.interpolate(maps, (48, 64), mode="bilinear", align_corners=True), dim=1)
        torch.testing.assert_close(pixels, want)
        torch.testing.assert_close(found, network.encode_points(points, colors, out="final"))
    with torch.no_grad(), pytest.warns(FutureWarning, match="'colours' is now 'colors'"):
        assert torch.equal(pair.encode_points(points, colours=colors), found)
    assert (pair.dim, pixels.shape, found.shape) == (32, (2, 32, 48, 64), (300, 32))
    torch.testing.assert_close(pixels.norm(dim=1), torch.ones(2, 48, 64))
    shot = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    assert pair.image_transforms(shot).shape == (3, 48, 64)
    assert pair.image_contract.interpolation == "nearest"


def test_a_pair_is_asked_for_its_files_and_no_other_call_is(run, tmp_path):
    folder = shutil.copytree(run[1], tmp_path / "copy")
    (folder / "teacher.safetensors").rename(folder / "elsewhere")
    load_backbone(folder)
    with pytest.raises(Exception, match=r"teacher"):
        load_pair(folder)
    (folder / "elsewhere").rename(folder / "teacher.safetensors")
    broken = bytearray((folder / "teacher.safetensors").read_bytes())
    broken[-1] ^= 1
    (folder / "teacher.safetensors").write_bytes(broken)
    with pytest.raises(DigestMismatch):
        load_pair(folder)


def test_what_has_no_partner_says_so(run, tmp_path):
    folder = shutil.copytree(run[1], tmp_path / "copy")
    config = unsealed(folder)
    pairing = config.pop("pair")
    (folder / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(folder).pairing is None  # a folder of an earlier version
    with pytest.raises(CheckpointError, match=r"holds one network alone; accepted: .*ppkt_\*"):
        load_pair(folder)
    with pytest.warns(FutureWarning), pytest.raises(RuntimeError, match="built by hand"):
        type(load_backbone(folder))("18A", width=8).pair()
    for key, value, part in (
        ("interpolation", "cubic", "'pair.interpolation' is 'cubic'"),
        ("role", 3, r"key 'pair.role' is 3; str is accepted"),
        ("image_projection", 1, "'pair.image_projection' is 1"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"pair": pairing | {key: value}}))
        with pytest.raises(CheckpointError, match=part):
            read_checkpoint(folder)
    wrong = pairing | {"arch": {"name": "resnet", "args": {"depth": 50}}}
    (folder / "config.json").write_text(json.dumps(config | {"pair": wrong}))
    with pytest.raises(WeightsMismatch, match="do not fit"):
        load_pair(folder)
    (folder / "config.json").write_text(json.dumps(config | {"pair": pairing}))
    with pytest.warns(FutureWarning), pytest.raises(CheckpointError, match="other input channels"):
        load_backbone(folder, in_chans=4).pair()


def test_a_pair_of_pri3d_is_its_two_networks(tmp_path, tiny_recipe):
    run_here(tiny_recipe("pri3d_geo"), tmp_path / "out", ["optim.steps=2"])
    assert {"pair.image", "pair.points", "decoder"} <= verify(tmp_path / "out").errors.keys()
    pair = load_pair(tmp_path / "out")
    image = torch.rand(1, 3, 48, 64)
    heads = load_file(tmp_path / "out" / "heads.safetensors")
    w2d = Linear(heads["w2d.weight"].shape[1], 64)
    w2d.load_state_dict({key: heads[f"w2d.{key}"] for key in ("weight", "bias")})
    with torch.no_grad():
        dense = load_backbone(tmp_path / "out", decoder=True)(image)
        got = pair.encode_image(image)
        for row, column in ((0, 0), (47, 63), (13, 22)):
            want = F.normalize(w2d(dense[0, :, row // 2, column // 2]), dim=0)
            torch.testing.assert_close(got[0, :, row, column], want)
    assert pair.encode_points(torch.rand(50, 3), torch.rand(50, 3)).shape == (50, 64)
    assert pair.point_contract.offset == 0  # colors from 0 to 1


def test_matching_of_a_frame_with_its_own_voxels(run):
    source = open_source(load_recipe(str(run[0])).data)
    frame = find_pairs(source, load_recipe(str(run[0])).data, skips=SkippedFrames())[2]
    pair = load_pair(run[1])
    matches = match_pair(TaughtExtractor(pair), source, frame, size=(48, 64), queries=50)
    assert len(matches.error) == 50
    slow_own_voxels(pair, source, frame, matches)
    pair.image_projection.weight.data.zero_()  # one feature everywhere: one voxel for all
    pair.image_projection.bias.data.fill_(1)
    matches = match_pair(TaughtExtractor(pair), source, frame, size=(48, 64), queries=50)
    assert len(np.unique(matches.predicted, axis=0)) == 1
    random, again = random_pair(str(run[1]), 3), random_pair(str(run[1]), 3)
    trained = load_pair(run[1])
    options = {"size": (48, 64), "queries": 20, "threshold": 4.0}  # of one frame twice, each time with its own queries
    alone = [match_pair(TaughtExtractor(trained), source, frame, seed=seed, **options) for seed in (3, 4)]
    twice = evaluate_matching(TaughtExtractor(trained), source, [frame, frame], seed=3, **options)
    assert twice.per_pair == tuple(float((each.error <= 4).mean()) for each in alone)
    assert twice.chance == pytest.approx((alone[0].chance + alone[1].chance) / 2)
    assert alone[0].chance != alone[1].chance
    for part in ("point_network", "image_projection"):
        first, second, other = (p.get_submodule(part).state_dict() for p in (random, again, trained))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first)
    theirs, ours = random.image_network.state_dict(), trained.image_network.state_dict()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def slow_own_voxels(pair, source, place, matches, edge=0.15):
    """Every match: the pixel of a voxel is its first, and no voxel's feature is nearer than the one chosen."""
    frame = resize_frame(source.load(place.scene, place.frame1), (48, 64))
    first = {}
    for v, u in np.argwhere(frame.depth > 0):
        point = np.linalg.inv(frame.intrinsics) @ [u, v, 1.0] * frame.depth[v, u]
        point = frame.cam_to_world[:3, :3] @ point + frame.cam_to_world[:3, 3]
        first.setdefault(tuple(np.floor(point.astype(np.float32) / np.float32(edge)).astype(int)), (v, u))
    coords = torch.tensor([(0, *cell) for cell in first], dtype=torch.int32)
    feats = torch.tensor(np.array([frame.color[at] for at in first.values()]) / 255 - 0.5, dtype=torch.float32)
    image = pair.image_contract.transforms(resize=False)(frame.color)[None]
    with torch.no_grad():
        pixels, voxels = pair.encode_image(image)[0], pair.encode_voxels(SparseTensor(coords, feats))
    rows, near = {cell: row for row, cell in enumerate(first)}, 0
    for truth, predicted in zip(matches.truth, matches.predicted, strict=True):
        similarity = voxels @ pixels[(slice(None), *first[tuple(truth)])]
        assert similarity.max() - similarity[rows[tuple(predicted)]] < 1e-5
        near += sum(sum((a - b) ** 2 for a, b in zip(truth, cell, strict=True)) <= 4 for cell in first)
    assert matches.chance == pytest.approx(near / len(matches.truth) / len(first))
    assert len(np.unique(matches.truth, axis=0)) == len(matches.truth)


def test_pairs_are_compared_on_frames_of_their_recipes_size(run, recording, monkeypatch):
    splits = []

    def opened(spec, *, split):
        splits.append(split)
        return open_source(spec, split=split)

    monkeypatch.setattr(matching, "open_on_disk", opened)
    spec, done = DataSpec(source="seven_scenes", path=str(recording), size=(60, 80)), []
    found = compare_pixel_to_voxel(
        str(run[1]), spec, count=2, threshold=4.0, seed=3, progress=lambda *at: done.append(at)
    )
    assert list(found) == ["random", str(run[1])]
    assert done == [(k, 4) for k in (0, 1, 2, 2, 3, 4)]
    assert splits == ["val"]
    source = open_source(spec)
    scene, ids = source.scenes()[0], source.frame_ids(source.scenes()[0])
    for name, pair in (("random", random_pair(str(run[1]), 3)), (str(run[1]), load_pair(run[1]))):
        alone = [
            match_pair(
                TaughtExtractor(pair), source, Pair(scene, id, id, 1.0), size=(48, 64), threshold=4.0, seed=3 + number
            )
            for number, id in enumerate((ids[0], ids[-1]))
        ]
        assert found[name].per_pair == tuple(float((matches.error <= 4).mean()) for matches in alone)
        assert found[name].chance == pytest.approx(np.mean([matches.chance for matches in alone]))


def test_teachers_by_name_and_folder(tmp_path, tiny_recipe):
    run_here(tiny_recipe("pri3d_view"), tmp_path / "view", ["optim.steps=2"])
    images = torch.rand(1, 3, 48, 64)
    last, dense = (load_teacher(str(tmp_path / "view"), dense=d) for d in (False, True))
    encoder = load_backbone(tmp_path / "view")
    with torch.no_grad():
        assert torch.equal(last(images), encoder(images)[-1])
        assert torch.equal(dense(images), load_backbone(tmp_path / "view", decoder=True)(images))
    assert (last.arch.name, dense.arch.name, last.out_chans, dense.out_chans) == ("resnet", "resnet_unet", 64, 4)
    assert not dense(images.requires_grad_()).requires_grad
    assert not last.train().training
    with pytest.raises(RecipeError, match="is an encoder alone"):
        load_teacher("scratch", "resnet18", dense=True)
    run_here(tiny_recipe("csc"), tmp_path / "csc", ["optim.steps=1"])
    with pytest.raises(RecipeError, match="accepted: a network for images"):
        load_teacher(str(tmp_path / "csc"))


@pytest.mark.parametrize("kind", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_a_segmentation_network_of_torchvision_teaches_its_classes(tmp_path, tiny_recipe, kind):
    from torchvision.models import segmentation

    torch.manual_seed(0)
    network = getattr(segmentation, kind)(weights=None, weights_backbone=None, num_classes=7, aux_loss=True).eval()
    torch.save(network.state_dict(), tmp_path / "seg.pth")
    teacher = torchvision_segmenter(tmp_path / "seg.pth")
    images = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        logits = teacher(images)
        large = F.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(large, network(images)["out"])
    assert teacher.out_chans == 7
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    save_file(network.state_dict(), tmp_path / "seg.safetensors")
    again = torchvision_segmenter(tmp_path / "seg.safetensors")
    assert torch.equal(again(images), logits)
    settings = {"teacher": "ade20k", "teacher_file": str(tmp_path / "seg.pth")}
    with pytest.raises(RecipeError, match=r"'unet3d.out_chans' is 512, accepted is 7: the classes of teacher 'ade20k'"):
        tiny_batch(tiny_recipe, "ppkd", settings)
    if kind.startswith("fcn"):
        task, batch = tiny_batch(tiny_recipe, "ppkd", settings, "unet3d.out_chans=7")
        assert task(batch)["ppkd"].item() > 0
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(WeightsMismatch, match="accepted is a state dict of torchvision's fcn_resnet50"):
            torchvision_segmenter(tmp_path / "other.pth")


def test_wrong_settings_are_told(tiny_recipe):
    for settings, overrides, part in (
        ({"teacher": "ade20k"}, (), r"'ade20k' has no file that could be fetched. Accepted: --set task.teacher_file"),
        ({"teacher_file": "x.pth"}, (), r"'task.teacher' is 'scratch': accepted is ade20k"),
        ({"temperature": 0}, (), r"'task.temperature' is 0"),
        (
            {},
            ("task.teacher_depth=101",),
            r"'task.teacher_encoder' is 'resnet101', accepted is one of resnet18, resnet50",
        ),
        ({"resize": [1.2, 0.8]}, (), r"'task.resize' is \[1.2, 0.8\]"),
        ({"flip_prob": 1.5}, (), r"'task.flip_prob' is 1.5, accepted is a probability"),
        ({"teacher": "stage1"}, (), r"no first stage was trained"),
        ({}, ("data.units=pairs", "data.overlap=[0.2,1.0]"), r"'data.units' is 'pairs', accepted for task 'ppkt'"),
    ):
        with pytest.raises(RecipeError, match=part):
            tiny_batch(tiny_recipe, "ppkt", settings, *overrides)


def test_resolving_a_pair_wants_its_roles(run):
    found = hub.open(run[1])
    assert found.pairing.roles() == ("teacher", "heads")
