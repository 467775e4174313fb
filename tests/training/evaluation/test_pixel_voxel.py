"""Pixel-to-voxel recall: features whose right answer is known, a loop over voxels, and folders that are not Pri3D's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from geo_pretrain.catalog import CATALOG
from geo_pretrain.checkpoint import read_checkpoint, read_weights
from geo_pretrain.errors import CheckpointError, DataError, WeightsMismatch
from geo_pretrain.hub.authors import convert_file
from geo_pretrain.loading import load_backbone
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.training.data.frame import Pair, SkippedFrames
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.surfaces.fusing import Surfaces
from geo_pretrain.training.evaluation.features import RANDOM, Pri3DExtractor, load_pri3d
from geo_pretrain.training.evaluation.matching import (
    compare_pixel_to_voxel,
    evaluate_matching,
    match_pair,
    spread_frames,
)
from geo_pretrain.training.recipe import load_recipe
from tests.authors_files import write
from tests.training.evaluation.test_cloud_matching import Described, PaintedWithPosition, on_a_torus
from tests.training.tasks.test_pri3d_geo import slow_seen
from tests.training.test_loop import run_here
from tests.zoo import write_tiny_3d

FEW = {"steps": 2}
SIZE = (48, 64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folder(runs, tiny_recipe):
    """Trained for two steps, by the first test that asks."""
    if not (runs / "geo").exists():
        run_here(tiny_recipe("pri3d_geo", optim=FEW), runs / "geo")
    return runs / "geo"


@pytest.fixture
def source(tiny_recipe):
    return open_source(load_recipe(str(tiny_recipe("pri3d_geo"))).data)


class HalfResolution(nn.Module):
    """The upper left of every four pixels of a normalized image, its colors in [-0.5, 0.5], as a descriptor."""

    def __init__(self, contract, describe):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(v).view(3, 1, 1)) for v in (contract.mean, contract.std))
        self.describe = describe

    def forward(self, image):
        colors = (image * self.std + self.mean)[0, :, ::2, ::2] - 0.5
        flat = self.describe(colors.flatten(1).T)
        return flat.T.reshape(1, -1, *colors.shape[1:])


def with_descriptor(task, describe):
    """The task with descriptors of pixels' and voxels' colors instead of its networks."""
    task.backbone = HalfResolution(task.contract, describe)
    task.backbone3d = Described(lambda feats: describe(feats - 0.5))
    task.w2d = task.w3d = nn.Identity()
    return task


class PaintedWalls(PaintedWithPosition):
    """Every frame sees a wall, so that no cell lies across an edge and shows two things."""

    def fingerprint(self):
        return "painted " + self.source.fingerprint()

    def load(self, scene, frame_id):
        frame = super().load(scene, frame_id)
        return self.paint(dataclasses.replace(frame, depth=np.full_like(frame.depth, 2)))


def extractor(task, source):
    return Pri3DExtractor(task, Surfaces(source))


def every_frame(source):
    return spread_frames(source, 100)


def test_descriptor_that_knows_its_place_is_always_right(folder, source):
    task = with_descriptor(load_pri3d(str(folder)), on_a_torus)
    walls = PaintedWalls(source)
    result = evaluate_matching(extractor(task, walls), walls, every_frame(walls), size=SIZE, queries=100)
    assert result.recall == 1.0
    assert result.chance < 0.2
    assert len(result.per_pair) == 6  # frames
    assert result.measure == "recall within 2 voxels"


def test_descriptor_that_knows_nothing_is_right_by_chance(folder, source):
    generator = torch.Generator().manual_seed(0)
    task = with_descriptor(load_pri3d(str(folder)), lambda rows: torch.randn(len(rows), 16, generator=generator))
    result = evaluate_matching(extractor(task, source), source, every_frame(source) * 3, size=SIZE)
    assert result.chance / 2 < result.recall < 2 * result.chance


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
def test_matches_equal_the_loop_over_voxels(folder, source, rounding):
    task = load_pri3d(str(folder))
    task.config = dataclasses.replace(task.config, rounding=rounding)
    frame = every_frame(source)[1]
    samples = task.dataset(source, [frame])
    batch = samples.collate([samples[(0, 0)]])
    matches = match_pair(extractor(task, source), source, frame, size=SIZE, threshold=2.0, queries=50, seed=1)
    depth, intrinsics, pose = (
        batch[f"{name}2"][0].double().numpy() for name in ("depth", "intrinsics", "cam_to_world")
    )
    intrinsics[:2, 2] += 0.5 if rounding == "nearest" else 0  # the nearest pixel is the floor half a pixel on
    centers = (batch["coords2"][:, 1:].double().numpy() + 0.5) * task.voxel_size
    target = [slow_seen(center, depth, intrinsics, pose, 0.05, False) for center in centers]
    with torch.no_grad():
        pixels = task.w2d(task.backbone(batch["image2"])[0].movedim(0, -1))
        voxels = task.w3d(task.backbone3d(SparseTensor(batch["coords2"], batch["feats2"])).feats)
    voxels = nn.functional.normalize(voxels, dim=1).numpy()
    rows = {tuple(coords): number for number, coords in enumerate(batch["coords2"][:, 1:].tolist())}
    cells, near = set(), 0
    for truth, predicted in zip(matches.truth, matches.predicted, strict=True):
        pixel = target[rows[tuple(truth)]]
        assert pixel >= 0  # the voxel is seen
        row, column = pixel // depth.shape[1] // 2, pixel % depth.shape[1] // 2
        cells.add((row, column))
        similarity = voxels @ nn.functional.normalize(pixels[row, column], dim=0).numpy()
        assert similarity.max() - similarity[rows[tuple(predicted)]] < 1e-6
        near += sum(sum((a - b) ** 2 for a, b in zip(truth, other, strict=True)) <= 4 for other in rows)
    assert len(cells) == len(matches.truth) == 50
    assert matches.chance == pytest.approx(near / 50 / len(rows))
    np.testing.assert_allclose(matches.error, np.linalg.norm(matches.truth - matches.predicted, axis=1))


def test_recall_is_that_of_each_frame(folder, source):
    both, frames = extractor(load_pri3d(str(folder)), source), every_frame(source)[2:4]
    options = {"size": SIZE, "threshold": 6.0, "queries": 20}
    alone = [match_pair(both, source, frame, seed=5 + number, **options) for number, frame in enumerate(frames)]
    result = evaluate_matching(both, source, frames, seed=5, **options)
    assert result.per_pair == tuple(float((matches.error <= 6).mean()) for matches in alone)
    assert result.per_pair[0] != result.per_pair[1]


def test_loaded_task_holds_the_folder_and_its_twin_does_not(folder):
    task, twin, other = (load_pri3d(str(folder), pretrained=p, seed=s) for p, s in ((True, 0), (False, 0), (False, 1)))
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [network(image) for network in (task.backbone, load_backbone(folder, decoder=True), twin.backbone)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(twin.w2d.weight, other.w2d.weight)
    stored = read_weights(read_checkpoint(folder), "heads")
    for name in ("w2d.weight", "w3d.bias", "backbone3d.final.kernel", "backbone3d.bn0.bn.running_mean"):
        assert torch.equal(task.state_dict()[name], stored[name]), name
    assert not task.training


def test_images_are_not_augmented(folder, source):
    samples = load_pri3d(str(folder)).dataset(source, every_frame(source))
    assert torch.equal(samples[(0, 1)]["image1"], samples[(7, 1)]["image1"])


def test_every_frame_is_taken_once(source):
    pairs = every_frame(source)
    frames = [(pair.scene, pair.frame1) for pair in pairs]
    assert all(pair.frame1 == pair.frame2 for pair in pairs)
    assert sorted(frames) == sorted((scene, frame) for scene in source.scenes() for frame in source.frame_ids(scene))


def test_frames_that_cannot_be_read_are_counted(folder, source):
    both, skips = extractor(load_pri3d(str(folder)), source), SkippedFrames()
    good = every_frame(source)[:2]
    broken = Pair(good[0].scene, "999999", "999999", 1.0)
    result = evaluate_matching(both, source, [broken, *good], size=SIZE, skips=skips)
    assert len(result.per_pair) == 2
    assert "missing" in skips.summary()
    with pytest.raises(DataError, match=r"(?s)could be evaluated.*missing"):
        evaluate_matching(both, source, [broken], size=SIZE)


def test_a_frame_that_sees_no_voxel_is_named(folder, source, monkeypatch):
    both, skips, frames = extractor(load_pri3d(str(folder)), source), SkippedFrames(), every_frame(source)[:2]
    chunk = both.voxels.chunk

    def elsewhere(frame):
        found = chunk(frame)
        return found if frame.id == frames[0].frame1 else dataclasses.replace(found, points=found.points + 100)

    monkeypatch.setattr(both.voxels, "chunk", elsewhere)
    assert len(evaluate_matching(both, source, frames, size=SIZE, skips=skips).per_pair) == 1
    assert skips.reasons == {f"{frames[1].scene}/{frames[1].frame1}": "frame sees no voxel"}


def test_comparison_measures_both_on_the_same_queries(folder, tiny_recipe):
    spec = load_recipe(str(tiny_recipe("pri3d_geo"))).data
    results = compare_pixel_to_voxel(str(folder), spec, count=4)
    assert list(results) == [RANDOM, str(folder)]
    assert len({(r.queries, r.chance, len(r.per_pair)) for r in results.values()}) == 1
    assert len(results[RANDOM].per_pair) == 4


@pytest.mark.parametrize(
    "tiny, settings, reason",
    [
        ("pri3d_view", {"depth_proxy": False}, "no voxel part"),
        ("pri3d_view", {}, "trained by task 'pri3d_view'"),
        ("pointcontrast_nce", {}, "no voxel part"),
    ],
)
def test_folders_without_voxels_are_refused_and_the_right_ones_named(tmp_path, tiny_recipe, tiny, settings, reason):
    run_here(tiny_recipe(tiny, task=settings, optim=FEW), tmp_path / "out")
    with pytest.raises(CheckpointError, match=reason) as error:
        load_pri3d(str(tmp_path / "out"))
    assert "pri3d_geo or pri3d_view_geo" in str(error.value)


def test_weights_of_another_recipe_do_not_load(tmp_path, folder):
    write_tiny_3d(
        tmp_path / "net",
        weights={"heads": {"w2d.weight": torch.ones(1)}, "model": {"a": torch.ones(1)}},
        recipe_yaml=(folder / "recipe.yaml").read_text(),
    )
    with pytest.raises(WeightsMismatch, match="own recipe"):
        load_pri3d(str(tmp_path / "net"))


def test_a_file_of_the_authors_loads_by_its_catalog_entry(tmp_path):
    entry = CATALOG["pri3d_view_geo_r18"]
    expected = write(entry, tmp_path / "theirs.pth", 5)
    convert_file(tmp_path / "theirs.pth", tmp_path / "ours", like=entry, format="pri3d")
    state = load_pri3d(str(tmp_path / "ours")).state_dict()
    for role, prefix in (("encoder", "backbone.encoder."), ("decoder", "backbone.decoder."), ("heads", "")):
        assert all(state[prefix + key].equal(value) for key, value in expected[role].items())
    convert_file(tmp_path / "theirs.pth", tmp_path / "mine", like=entry, format="pri3d", name="my_own_r18")
    with pytest.raises(CheckpointError, match="no recipe tells how"):
        load_pri3d(str(tmp_path / "mine"))
