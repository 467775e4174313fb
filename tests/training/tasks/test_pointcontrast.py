"""PointContrast: what is drawn, the losses of a batch against loops, and what a run leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geo_pretrain.errors import RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.networks3d import encode
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from geo_pretrain.training.tasks.matching import draw, one_match_each
from tests.training.losses.test_contrastive import slow_hardest
from tests.training.test_loop import Stop, logged, run_here, stop_at

MATCHES = torch.tensor([[4, 0], [4, 1], [4, 2], [7, 1], [9, 5], [9, 6]])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_every_row_of_view_1_gets_one_of_its_matches_uniformly():
    counts = {tuple(match): 0 for match in MATCHES.tolist()}
    for seed in range(900):
        drawn = one_match_each(MATCHES, 10, seeded(seed)).tolist()
        assert sorted(row for row, _ in drawn) == [4, 7, 9]
        for match in drawn:
            counts[tuple(match)] += 1
    assert counts[7, 1] == 900
    assert all(abs(counts[4, j] - 300) < 5 * 300**0.5 for j in (0, 1, 2))
    assert all(abs(counts[9, j] - 450) < 5 * 450**0.5 for j in (5, 6))


def test_of_more_anchors_than_asked_a_uniform_subset_is_kept():
    counts = {4: 0, 7: 0, 9: 0}
    for seed in range(900):
        drawn = one_match_each(MATCHES, 2, seeded(seed))
        assert len(set(drawn[:, 0].tolist())) == 2
        for row in drawn[:, 0].tolist():
            counts[row] += 1
    assert all(abs(count - 600) < 5 * 600**0.5 for count in counts.values())


def test_draw_is_without_replacement_and_takes_all_where_there_are_few():
    assert sorted(draw(5, 9, seeded(0), torch.device("cpu")).tolist()) == [0, 1, 2, 3, 4]
    assert len(draw(50, 9, seeded(0), torch.device("cpu")).unique()) == 9


@pytest.fixture
def task_and_batch(tiny_recipe):
    def make(tiny, *overrides):
        recipe = load_recipe(str(tiny_recipe(tiny)), overrides)
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        task = build_task(recipe)
        samples = task.dataset(source, pairs)
        return task, samples.collate([samples[(0, k)] for k in range(3)])

    return make


def outputs(task, batch):
    """Features of both views as float64 arrays, their rows of length 1."""
    views = []
    for k in (1, 2):
        rows = task.backbone(SparseTensor(batch[f"coords{k}"], batch[f"feats{k}"])).feats
        views.append(rows.detach().double().numpy())
        np.testing.assert_allclose(np.linalg.norm(views[-1], axis=1), 1, rtol=1e-5)
    return views


def slow_nce(features1, features2, matches):
    """Anchor by anchor: its match against the matches of all anchors."""
    total = 0.0
    for i, j in matches.tolist():
        scores = [features1[i] @ features2[k] / 0.1 for _, k in matches.tolist()]
        total += np.log(np.exp(scores).sum()) - features1[i] @ features2[j] / 0.1
    return total / len(matches)


def test_nce_contrasts_the_anchors_of_the_whole_batch(task_and_batch):
    task, batch = task_and_batch("pointcontrast_nce", "task.matches=50")
    with torch.no_grad():
        drawn = one_match_each(batch["matches"], 50, seeded(batch["seed"][0]))
        assert len(drawn) == 50
        assert task(batch)["nce"].item() == pytest.approx(slow_nce(*outputs(task, batch), drawn), rel=1e-5)


def test_nce_of_each_pair_alone_is_an_option(task_and_batch):
    task, batch = task_and_batch("pointcontrast_nce", "task.matches=50", "task.negatives=pair")
    generator, views = seeded(batch["seed"][0]), outputs(task, batch)
    groups = batch["matches"].split(batch["matches_per_pair"])
    want = np.mean([slow_nce(*views, one_match_each(group, 50, generator)) for group in groups])
    with torch.no_grad():
        assert task(batch)["nce"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("squared", [True, False])
def test_hardest_draws_matches_and_candidates_from_the_whole_batch(task_and_batch, squared):
    task, batch = task_and_batch("pointcontrast_hardest", f"task.squared={str(squared).lower()}")
    generator, views, cpu = seeded(batch["seed"][0]), outputs(task, batch), torch.device("cpu")
    positives = draw(len(batch["matches"]), 3 * 128, generator, cpu)
    candidates = [draw(len(view), 3 * 64, generator, cpu) for view in views]
    assert {len(positives), *map(len, candidates)} == {384, 192}
    want = slow_hardest(*views, batch["matches"].numpy(), positives.numpy(), *(c.numpy() for c in candidates), squared)
    with torch.no_grad():
        losses = task(batch)
    assert [losses["positive"].item(), losses["negative"].item()] == pytest.approx(want, rel=1e-4)


def test_draws_depend_on_the_samples_seeds_alone(task_and_batch):
    task, batch = task_and_batch("pointcontrast_nce", "task.matches=20")
    with torch.no_grad():
        first = task(batch)["nce"]
        torch.manual_seed(5)
        assert task(batch)["nce"] == first
        batch["seed"][0] += 1
        assert task(batch)["nce"] != first


@pytest.mark.parametrize("tiny", ["pointcontrast_nce", "pointcontrast_hardest", "csc"])
def test_pair_or_batch_without_matches_trains_on(task_and_batch, tiny):
    task, batch = task_and_batch(tiny)
    rest = batch["matches_per_pair"][0]
    batch["matches"], batch["matches_per_pair"][0] = batch["matches"][rest:], 0
    assert sum(task(batch).values()).item() > 0
    batch["matches"], batch["matches_per_pair"] = batch["matches"][:0], [0, 0, 0]
    loss = sum(task(batch).values())
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in task.parameters())


def test_elements_without_voxels_leave_the_others_as_they_are(task_and_batch):
    task, batch = task_and_batch("pointcontrast_nce")
    coords, feats = batch["coords1"], batch["feats1"]
    shifted = coords.clone()
    shifted[:, 0] = torch.tensor([0, 2, 5])[coords[:, 0].long()]
    with torch.no_grad():
        assert torch.equal(*(encode(task.backbone, c, feats, low_precision=False) for c in (coords, shifted)))


def test_bf16_changes_the_network_and_not_the_precision_of_the_loss(task_and_batch):
    task, batch = task_and_batch("pointcontrast_nce")
    low, _ = task_and_batch("pointcontrast_nce", "precision=bf16")
    with torch.no_grad():
        full, half = task(batch)["nce"], low(batch)["nce"]
    assert half.dtype == torch.float32
    assert half != full
    assert half.item() == pytest.approx(full.item(), rel=0.02)


def test_wrong_settings_are_named(tiny_recipe):
    for tiny, override, part in (
        ("pointcontrast_nce", "task.temprature=1", "'task.temperature'"),
        ("pointcontrast_nce", "task.loss=hardest", "'task.loss' is not free"),
        ("pointcontrast_hardest", "task.candidates=0", "'task.candidates' is 0, accepted is a whole number from 1 up"),
        ("pointcontrast_nce", "task.rotation=half", "full, upright, none"),
        ("pointcontrast_nce", "unet3d=null", "key 'unet3d' is missing"),
        ("csc", "task.inner=0", "'task.inner' is 0.0"),
    ):
        with pytest.raises(RecipeError, match=part):
            build_task(load_recipe(str(tiny_recipe(tiny)), [override]))


def test_start_depends_on_the_seed_alone(tiny_recipe):
    def first(seed, noise):
        torch.manual_seed(noise)
        task = build_task(load_recipe(str(tiny_recipe("pointcontrast_nce")), [f"seed={seed}"]))
        return task.backbone.conv0p1s1.kernel

    assert torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


@pytest.mark.parametrize("tiny", ["pointcontrast_nce", "pointcontrast_hardest", "csc"])
def test_run_learns_and_its_folder_opens(tmp_path, tiny_recipe, tiny):
    steps = 30 if tiny == "csc" else 20  # whose loss falls slowest
    checkpoint = run_here(tiny_recipe(tiny, optim={"steps": steps}), tmp_path / "out")
    totals = [sum(v for k, v in line.items() if k not in ("step", "lr")) for line in logged(tmp_path / "out")]
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])
    assert verify(tmp_path / "out").passed
    network = load_backbone(tmp_path / "out")
    assert network.load_report.coverage == 1
    assert (network.contract.voxel_size, network.normalize) == (0.15, True)
    ones = tiny != "csc"
    assert network.contract.channels == (("one",) * 3 if ones else ("R", "G", "B"))
    assert network.contract.offset == (0.0 if ones else -0.5)
    assert checkpoint.provenance["init"] == "scratch"
    assert checkpoint.license.base_model == "none (random weights)"
    points = torch.rand(500, 3)
    colors = None if ones else torch.randint(0, 256, (500, 3), dtype=torch.uint8)
    assert network.encode_points(points, colors, out="final").shape == (500, 32)


def test_stopped_run_continues_bit_for_bit(tmp_path, tiny_recipe):
    path = tiny_recipe("pointcontrast_nce", optim={"steps": 5}, save_every=2)
    run_here(path, tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", on_step=stop_at(3))
    run_here(path, tmp_path / "broken")
    whole, broken = (load_backbone(tmp_path / name).state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
