"""The GSC task: sets at half resolution, the loss of a batch against the loop, its options, its two stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training import initialize
from geo_pretrain.training.data.frame import Pair, SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.pairs import check_labels
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.losses.depth import depth_loss
from geo_pretrain.training.pretrain import load_checked_recipe, needs_stage1, run_recipe
from geo_pretrain.training.recipe import load_recipe, load_stage1
from geo_pretrain.training.tasks import build_task, gsc
from geo_pretrain.training.tasks.gsc import draws_of_cells, half_resolution_sets, limit_sets
from geo_pretrain.training.tasks.matching import half_resolution_cell
from tests.training.conftest import write_recording
from tests.training.losses.test_sets import slow_set_loss
from tests.training.test_loop import ALONE, Stop, logged, run_here, stop_at

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(autouse=True, scope="module")
def cached_sets(tmp_path_factory):
    """Segments of the recording are computed once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def gsc_recipe(tiny_recipe):
    def write(**changes):
        task = {"name": "gsc", "matches": None, "min_size": 2} | changes.pop("task", {})
        optim = {"bn_momentum": "constant"} | changes.pop("optim", {})
        return tiny_recipe(name="gsc_r18.tiny", task=task, optim=optim, **changes)

    return write


@pytest.fixture
def task_and_batch(gsc_recipe):
    def make(*overrides):
        recipe = load_recipe(str(gsc_recipe()), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = task.dataset(source, pairs)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def test_a_cell_has_the_set_of_its_upper_left_pixel():
    ids = torch.arange(2 * 6 * 7).view(2, 6, 7)
    got = half_resolution_sets(ids, torch.Size((2, 5, 3, 3)))
    want = [[[b * 42 + 2 * r * 7 + 2 * c for c in range(3)] for r in range(3)] for b in range(2)]
    assert torch.equal(got, torch.tensor(want).flatten(1))


@pytest.mark.parametrize("size, cells", [((6, 7), (4, 5)), ((5, 8), (2, 6)), ((90, 120), (46, 60))])
def test_a_cell_has_the_set_of_the_pixels_that_pri3d_sends_to_it(size, cells):
    """Maps larger or smaller than half the image; of the pixels that fall on a cell it is the first one's."""
    ids = torch.arange(2 * size[0] * size[1]).view(2, *size)
    pixels = torch.arange(size[0] * size[1])
    cell_of = half_resolution_cell(pixels, size[1], torch.Size((2, 5, *cells)))
    want = torch.full((2, cells[0] * cells[1]), -1)
    for pixel, cell in zip(pixels.flip(0).tolist(), cell_of.flip(0).tolist(), strict=True):
        want[:, cell] = ids.flatten(1)[:, pixel]
    assert torch.equal(half_resolution_sets(ids, torch.Size((2, 5, *cells))), want)


def test_of_more_sets_than_asked_a_uniform_subset_of_the_common_ones_is_kept():
    ids1 = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 8, 8, -1]])
    ids2 = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 9, 9, -1]])
    counts = torch.zeros(10)
    for seed in range(400):
        out1, out2 = limit_sets(ids1, ids2, [seed], 2, min_size=2)
        kept = [n for n in range(5) if (out1 == n).any()]
        assert len(kept) == 2
        for ids, out in ((ids1, out1), (ids2, out2)):
            assert torch.equal(out, torch.where(torch.isin(ids, torch.tensor([*kept, 5, 8, 9])), ids, -1))
        counts[kept] += 1
    assert (counts[:5] - 160).abs().max() < 5 * 100**0.5
    out1, out2 = limit_sets(ids1, ids2, [0], 5, min_size=2)
    assert torch.equal(out1, ids1)
    assert torch.equal(out2, ids2)


def test_draws_of_a_pair_do_not_depend_on_its_batch():
    ids = torch.randint(0, 30, (3, 200))
    other = torch.randint(0, 30, (3, 200))
    together = *limit_sets(ids, other, [7, 8, 9], 4), *draws_of_cells([7, 8, 9], ids, other)
    assert not torch.equal(together[2], together[3])
    assert not torch.equal(together[2][0], together[2][1])
    for k, seed in enumerate([7, 8, 9]):
        own = ids[k : k + 1], other[k : k + 1]
        alone = *limit_sets(*own, [seed], 4), *draws_of_cells([seed], *own)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[k], b[0])


def slow_loss(task, batch):
    """The mean over pairs of the loop over sets, from features at the cells of pixels (2 row, 2 column)."""
    options = task.config
    rows, ids = [], []
    for k in (1, 2):
        features = task.backbone(batch[f"image{k}"]).detach().double()
        if options.projection is not None:
            features = torch.einsum("pc,bchw->bphw", task.w2d.weight.detach().double(), features)
            features += task.w2d.bias.detach().double()[:, None, None]
        h, w = features.shape[-2:]
        cells = [(r, c) for r in range(h) for c in range(w)]
        rows.append(np.stack([[f[:, r, c].numpy() for r, c in cells] for f in features]))
        size = batch["sets1"].shape[1:]
        inside = [2 * r < size[0] and 2 * c < size[1] for r, c in cells]
        ids.append(
            np.array(
                [
                    [s[2 * r, 2 * c].item() if there else -1 for (r, c), there in zip(cells, inside, strict=True)]
                    for s in batch[f"sets{k}"]
                ]
            )
        )
    if options.max_sets is not None:
        limited = limit_sets(*map(torch.from_numpy, ids), batch["seed"], options.max_sets, min_size=options.min_size)
        ids = [part.numpy() for part in limited]
    draws = [part.numpy() for part in draws_of_cells(batch["seed"], *map(torch.from_numpy, ids))]
    if not options.asymmetric:
        draws = [[None] * len(ids[0])] * 2
    views = list(zip(*rows, *ids, *draws, strict=True))
    return np.mean(
        slow_set_loss(
            views,
            options.temperature,
            options.denominator,
            options.symmetric,
            options.renormalize,
            options.min_size,
            options.unmatched,
        )
    )


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("task.min_size=12",),
        ("task.temperature=0.1", "task.denominator=ntxent", "task.unmatched=true", "task.symmetric=false"),
        ("task.denominator=batch", "task.renormalize=false", "task.projection=16"),
        ("task.asymmetric=true", "task.max_sets=6", "task.denominator=all"),
        ("data.size=[90, 120]",),  # whose map has 46 rows
    ],
)
def test_loss_of_a_batch_equals_the_loop(task_and_batch, overrides):
    task, batch = task_and_batch(*overrides)
    batch["sets1"][1] = -1  # a pair without a common set
    with torch.no_grad():
        losses = task(batch)
    want = slow_loss(task, batch)
    assert set(losses) == {"set"}
    assert want > 0.5
    assert losses["set"].item() == pytest.approx(want, rel=1e-5)


def test_batch_without_any_set_trains_on(task_and_batch):
    task, batch = task_and_batch("task.projection=16", "task.depth_proxy=true")
    for k in (1, 2):
        batch[f"sets{k}"][:] = -1
    losses = task(batch)
    sum(losses.values()).backward()
    assert losses["set"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


def test_depth_proxy_is_pri3ds(task_and_batch):
    task, batch = task_and_batch("task.depth_proxy=true")
    with torch.no_grad():
        got = task(batch)["depth"].item()
        maps = [task.headnet(task.backbone(batch[f"image{k}"])) for k in (1, 2)]
        maps = [F.interpolate(m, size=(48, 64), mode="bilinear", align_corners=True) for m in maps]
        want = sum(depth_loss(m, batch[f"depth{k}"]).item() for k, m in enumerate(maps, 1)) / 2
    assert got == pytest.approx(want, rel=1e-5)


def test_settings_reach_the_sets(task_and_batch):
    def sets(*overrides):
        batch = task_and_batch(*overrides)[1]
        return [len(batch["sets1"][k].unique()) for k in range(3)]

    assert sum(sets("task.k_thresh=1")) < sum(sets())
    assert sum(sets("task.min_vertices=1")) > sum(sets())


def test_seed_and_kind_reach_the_sets(gsc_recipe, monkeypatch):
    monkeypatch.setattr(gsc, "check_labels", lambda *_: None)  # the recording has none
    monkeypatch.setattr(gsc, "SetPairSamples", lambda *arguments: arguments)
    for kind in ("segments", "semantic", "instance"):
        recipe = load_recipe(str(gsc_recipe()), ["seed=9", f"task.sets={kind}"])
        *_, seed, _, sets = build_task(recipe).dataset(None, [])
        assert (seed, sets.kind) == (9, kind)


def test_labels_that_the_frames_lack_are_missed_before_training(gsc_recipe, tmp_path):
    path = gsc_recipe(task={"sets": "semantic"})
    source = "'task.sets' is 'semantic', but source 'seven_scenes' has no semantic labels"
    with pytest.raises(DataError, match=rf"{source}(.|\n)*such as rooms(.|\n)*labels: label-filt"):
        run_here(path, tmp_path / "out")
    assert not (tmp_path / "out.run").exists()
    folder = write_recording(tmp_path / "broken")
    for depth in folder.glob("*.depth.png"):
        depth.write_bytes(b"broken")  # a frame that cannot be read says nothing about labels
    broken = SevenScenes(folder)
    check_labels(broken, [Pair("broken", "000000", "000010", 1.0)] * 99, "semantic")
    shown = replace(SevenScenes(write_recording(tmp_path / "other")).load("other", "000000"))
    labelled = replace(shown, instance=np.ones(shown.depth.shape, np.int32))
    broken.load = lambda scene, frame: labelled
    check_labels(broken, [Pair("broken", "000000", "000010", 1.0)], "instance")
    with pytest.raises(DataError, match="no semantic labels"):
        check_labels(broken, [Pair("broken", "000000", "000010", 1.0)], "semantic")


def test_starts_without_heads_leave_the_depth_head_random(tiny_recipe, gsc_recipe, tmp_path, monkeypatch):
    """MoCo's encoder after 800 epochs is a name that neither catalog nor disk knows as a checkpoint."""
    task = {"name": "moco_v2", "matches": None, "queue": 8, "dim": 8, "resize": None}
    path = tiny_recipe(name="moco_v2_r18.tiny", task=task, optim={"steps": 1, "bn_momentum": "constant"})
    run_here(path, tmp_path / "moco")
    monkeypatch.setattr(initialize, "moco_v2_folder", lambda *_: tmp_path / "moco")
    encoder = load_file(tmp_path / "moco" / "encoder.safetensors")
    path = gsc_recipe(task={"depth_proxy": True})
    fresh = build_task(load_recipe(str(path)))
    for start in ("moco_v2_800ep", "moco_v2", str(tmp_path / "moco")):  # the folder has heads, none for depth
        task = build_task(load_recipe(str(path), [f"model.init={start}"]))
        assert torch.equal(task.backbone.encoder.conv1.weight, encoder["conv1.weight"])
        assert torch.equal(task.headnet.weight, fresh.headnet.weight)


def test_bf16_changes_the_network_and_not_the_precision_of_the_loss(task_and_batch):
    task, batch = task_and_batch()
    low, _ = task_and_batch("precision=bf16")
    with torch.no_grad():
        full, half = task(batch)["set"], low(batch)["set"]
    assert half.dtype == torch.float32
    assert half != full
    assert half.item() == pytest.approx(full.item(), rel=0.02)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(
    "extra, keep", [((), ()), (("task.depth_proxy=true", "task.projection=64"), ("headnet", "w2d"))]
)
def test_state_keys_and_shapes_are_those_of_pri3ds_released_module(depth, extra, keep):
    keys = json.loads((DATA / f"pri3d_full_model_r{depth}.json").read_text())["keys"]
    with torch.device("meta"):
        task = build_task(load_recipe(f"gsc_r{depth}", ["model.init=scratch", *extra]))
    own = {key: list(value.shape) for key, value in task.state_dict().items()}
    assert own == {key: shape for key, shape in keys.items() if key.partition(".")[0] in ("backbone", *keep)}


@pytest.mark.parametrize("name", ["gsc_r18", "gsc_r50", "gsc_r18.rooms"])
def test_recipes_are_those_of_the_paper(name):
    recipe = load_recipe(name)
    first = load_stage1(recipe)
    assert first.name == name.replace("gsc", "pri3d_view_geo")
    assert first.model.encoder == recipe.model.encoder
    assert first.data == recipe.data
    assert (recipe.model.init, needs_stage1(recipe)) == ("stage1", True)
    assert (recipe.optim.batch, recipe.optim.lr, recipe.optim.schedule) == (64, 0.1, "poly")
    assert recipe.optim.bn_momentum == "floor"
    length = "steps" if recipe.data.source == "rooms" else "epochs"
    assert getattr(recipe.optim, length) / getattr(first.optim, length) == 2 / 5


@pytest.fixture
def staged(tiny_recipe, gsc_recipe, tmp_path):
    """A recipe of both stages, its first of 3 steps, its second of none to speak of."""
    first = tmp_path / "first.yaml"
    first.write_bytes(tiny_recipe(name="pri3d_view_r18.first", optim={"steps": 3}).read_bytes())
    model = {"encoder": "resnet18", "init": "stage1", "width": 8}
    still = {"steps": 1, "lr": 1e-12, "bn_momentum": "floor"}
    return gsc_recipe(model=model, stage1={"recipe": str(first)}, optim=still, task={"depth_proxy": True})


def test_second_stage_starts_from_all_that_the_first_left(staged, tmp_path):
    recipe = load_recipe(str(staged))
    run_recipe(recipe, tmp_path / "out", ALONE, stage1=load_stage1(recipe))
    assert read_checkpoint(tmp_path / "out.stage1").name == "pri3d_view_r18.first"
    for role in ("encoder", "decoder", "heads"):
        before, after = (load_file(tmp_path / folder / f"{role}.safetensors") for folder in ("out.stage1", "out"))
        for key in before:
            if "num_batches" not in key:
                # Statistics of two batches, one a view, are mixed in by a thousandth.
                atol = 0.01 if "running" in key else 1e-8
                torch.testing.assert_close(after[key], before[key], rtol=0.01 if "running" in key else 0, atol=atol)
    plain = replace(recipe, task=recipe.task | {"depth_proxy": False})
    run_recipe(plain, tmp_path / "plain", ALONE, stage1=load_stage1(plain))
    assert "heads" not in read_checkpoint(tmp_path / "plain").roles


def test_run_learns_and_its_folder_opens(tmp_path, gsc_recipe):
    checkpoint = run_here(gsc_recipe(task={"temperature": 0.1}, optim={"steps": 30}), tmp_path / "out")
    losses = [line["set"] for line in logged(tmp_path / "out")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert verify(tmp_path / "out").passed
    assert load_backbone(tmp_path / "out").load_report.coverage == 1
    assert checkpoint.arch.name == "resnet_unet"
    assert {"encoder", "decoder", "golden", "recipe"} <= set(checkpoint.roles)


def test_stopped_run_continues_bit_for_bit(tmp_path, gsc_recipe):
    path = gsc_recipe(task={"asymmetric": True, "max_sets": 8}, optim={"steps": 6, "accumulate": 2}, save_every=2)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(3))
    run_here(path, tmp_path / "broken")
    for role in ("encoder", "decoder"):
        whole, broken = (load_file(tmp_path / name / f"{role}.safetensors") for name in ("whole", "broken"))
        assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")


def test_start_depends_on_the_seed_alone(gsc_recipe):
    def first(seed, noise):
        torch.manual_seed(noise)
        task = build_task(load_recipe(str(gsc_recipe()), [f"seed={seed}"]))
        return task.backbone.encoder.conv1.weight

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_wrong_settings_are_named(gsc_recipe):
    for override, part in (
        ("task.temprature=1", "'task.temperature'"),
        ("task.temperature=0", "'task.temperature' is 0.0, accepted is a number above 0"),
        ("task.max_sets=0", "'task.max_sets' is 0"),
        ("task.min_size=0", "'task.min_size' is 0"),
        ("task.projection=-1", "'task.projection' is -1"),
        ("task.k_thresh=0", "'task.k_thresh' is 0.0"),
        ("task.sets=labels", "segments, semantic, instance"),
        ("task.denominator=both", "other, ntxent, all, batch"),
        ("model=null", "key 'model' is missing; task 'gsc' trains it"),
        ("model.init=stage1", "no first stage was trained"),
    ):
        with pytest.raises(RecipeError, match=part):
            build_task(load_recipe(str(gsc_recipe()), [override]))


def test_settings_of_segments_are_told_to_change_nothing_of_labelled_sets():
    given = ["task.sets=semantic", "task.k_thresh=0.02"]
    with pytest.warns(UserWarning, match=r"'task\.k_thresh' is 0\.02 and changes nothing here: it belongs to sets"):
        load_checked_recipe("gsc_r18.rooms", given)
