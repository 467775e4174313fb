"""3D awareness: closed forms, features that know the answer, and the plain way, which computes everything anew."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.awareness import PlainWay
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import (
    CheckpointError,
    DataError,
    GeoPretrainError,
    InputError,
    RecipeError,
    UnknownName,
    WeightsMismatch,
)
from geo_pretrain.geometry import backproject, transform
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.sources.seven_scenes import SevenScenes
from geo_pretrain.training.evaluation.awareness import memory
from geo_pretrain.training.evaluation.awareness import run as running
from geo_pretrain.training.evaluation.awareness.images import ImageMeasures, InputMaps
from geo_pretrain.training.evaluation.awareness.linear import (
    depth_scores,
    fit_linear,
    gram,
    normal_scores,
    solve,
    squared_errors,
)
from geo_pretrain.training.evaluation.awareness.memory import INDEX, remember
from geo_pretrain.training.evaluation.awareness.networks import LayeredNetwork, find_subject, with_random
from geo_pretrain.training.evaluation.awareness.reading import PlaceReader
from geo_pretrain.training.evaluation.awareness.report import best_tables, page, verdicts
from geo_pretrain.training.evaluation.awareness.run import INPUT_2D, Awareness, measure_awareness
from geo_pretrain.training.evaluation.awareness.spec import PENALTIES, AwarenessSpec
from geo_pretrain.training.evaluation.awareness.views import Views, bin_of, draw_pairs, read_views, view_angles
from geo_pretrain.training.evaluation.probe_data import read_at
from tests.front_door import geo_pretrain
from tests.test_cli import run
from tests.training.conftest import recording  # noqa: F401 (fixture)
from tests.zoo import write_tiny

SPEC = AwarenessSpec(size=(48, 64), frames=6, pairs=2, queries=60, places=100, blocks=3, seeds=2)


@pytest.fixture(scope="module")
def source(recording):  # noqa: F811
    return SevenScenes(recording)


@pytest.fixture(scope="module")
def views(source):
    return read_views(source, SPEC, SkippedFrames())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("awareness") / "net").folder


class Known:
    """Maps that are made of the frames themselves."""

    def __init__(self, views, made):
        self.views, self.made, self.layers = views, made, ["known /1"]

    def read(self, frame, layer):
        return self.made(self.views.frames[frame])[None]


def world_directions(frame):
    """The place in the world as a direction in 4D, so that the nearest place has the largest cosine."""
    points = backproject(torch.from_numpy(frame.depth).double(), torch.from_numpy(frame.intrinsics))
    points = transform(points, torch.from_numpy(frame.cam_to_world).double()) / 40
    points = torch.cat([points, (1 - points.square().sum(1, keepdim=True)).clamp_min(0).sqrt()], 1)
    return points.T.reshape(4, *frame.depth.shape).float()


def test_features_that_know_the_place_match_within_the_grid_of_places(views):
    scores = ImageMeasures(Known(views, world_directions), views).matching(0, draw_pairs(views, 0))
    assert scores["4 px"] > 0.9
    assert scores["recall"] > 0.9
    assert scores["2 px"] < scores["4 px"] <= scores["8 px"] <= scores["32 px"]
    assert all(value > 0.85 for name, value in scores.items() if name.endswith("deg"))


def test_features_that_say_nothing_match_by_chance(views):
    scores = ImageMeasures(Known(views, lambda f: torch.ones(2, *f.depth.shape)), views).matching(
        0, draw_pairs(views, 0)
    )
    assert scores["4 px"] < 0.1


def test_probe_of_features_that_hold_the_depth_and_normals_is_right(views):
    by_id = {frame.id: number for number, frame in enumerate(views.frames)}

    def made(frame):
        depth = torch.from_numpy(frame.depth)
        answers = torch.zeros(4, *depth.shape)
        answers[0] = depth.clamp_min(0.1).log()
        rows, columns = views.places.T
        answers[1:, rows, columns] = views.normals[by_id[frame.id]].T
        return answers

    for seed in range(3):
        depth, normals = ImageMeasures(Known(views, made), views).depth_and_normals(0, seed)
        assert depth["d1"] == pytest.approx(1)
        assert depth["rmse"] < 0.05
        assert normals["11.25 deg"] == pytest.approx(1)
        assert normals["rmse"] < 0.5


def test_probe_of_constant_features_gives_the_mean_of_the_frames_it_was_fitted_to(views):
    measures = ImageMeasures(Known(views, lambda f: torch.full((1, *f.depth.shape), 3.0)), views)
    split, shares = views.split(0), []
    numbers = [number for group in split.fitted.values() for number in group]
    drawn = [views.depth[n][measures.drawn(n, (views.depth[n] > 0) & views.normals[n].any(1), 100, 0)] for n in numbers]
    mean = torch.cat(drawn).log().mean().exp()
    for number in split.judged:
        truth = views.depth[number][views.depth[number] > 0]
        shares.append(depth_scores(mean.expand_as(truth), truth)["d1"])
    assert measures.depth_and_normals(0, 0)[0]["d1"] == pytest.approx(np.mean(shares), abs=1e-3)


def test_scores_equal_those_of_the_plain_way(views, folder, source, tmp_path):
    subject = find_subject(str(folder))
    spec = ("matching", "depth", "normals")
    network, pairs = subject.load(), draw_pairs(views, 1)
    plain = PlainWay(network, views)
    memory = remember(tmp_path / "m", network.names, plain.maps, len(views), {})
    quick = list(ImageMeasures(memory, views).measure(spec, pairs, 1))
    slow = {(measure, layer): scores for measure, layer, scores in plain.measure(pairs, 1)}
    assert len(quick) == len(slow) == 3 * 6
    for measure, layer, scores in quick:
        assert scores.keys() == slow[measure, layer].keys()
        for name, value in scores.items():
            tolerance = 0.2 if name == "rmse" and measure == "normals" else 0.02  # float16; ties
            assert value == pytest.approx(slow[measure, layer][name], abs=tolerance), (measure, layer, name)


def test_regression_from_sums_equals_least_squares_with_the_penalty_as_rows():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator) * 3 + 1, torch.randn(50, 2, generator=generator)
    found = solve(gram(x, y), 2, 0.3)
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    system = torch.cat([standard, math.sqrt(0.3 * 50) * torch.eye(4).double()])
    right = torch.cat([(y - y.mean(0)).double(), torch.zeros(4, 2).double()])
    weight = torch.linalg.lstsq(system, right).solution
    assert torch.allclose(found[1:], weight / x.std(0, correction=0)[:, None].double(), atol=1e-5)
    predicted = x.double() @ found[1:] + found[0]
    assert torch.allclose(squared_errors(gram(x, y), found), (predicted - y).square().sum(0), rtol=1e-4)


def test_penalty_is_the_best_for_groups_left_out():
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(3, 30, 20, generator=generator), torch.randn(20, 4, generator=generator)
    y = x @ w + torch.randn(3, 30, 4, generator=generator) * torch.tensor([0.1, 9, 9, 9])
    fit = fit_linear([gram(a, b) for a, b in zip(x, y, strict=True)], (1, 3))
    errors = torch.zeros(len(PENALTIES), 4)
    for out in range(3):
        rest = [k for k in range(3) if k != out]
        for row, penalty in enumerate(PENALTIES):
            solution = solve(gram(x[rest].reshape(60, 20), y[rest].reshape(60, 4)), 4, penalty).float()
            errors[row] += (x[out] @ solution[1:] + solution[0] - y[out]).square().sum(0)
    best = (PENALTIES[int(errors[:, 0].argmin())], PENALTIES[int(errors[:, 1:].sum(1).argmin())])
    assert fit.penalties == best
    assert best[0] < best[1]


def test_constant_channels_get_no_weight():
    x = torch.cat([torch.randn(40, 1, generator=torch.Generator().manual_seed(0)), torch.full((40, 1), 5.0)], 1)
    fit = fit_linear([gram(x, 2 * x[:, :1])], (1,))
    assert fit.weight[1].abs() < 1e-6
    assert fit.weight[0] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("cells", [(3, 4), (12, 16), (48, 64), (1, 1)])
def test_places_read_as_pixels_do_and_cosines_are_those_of_what_is_read(cells):
    size = (48, 64)
    reader = PlaceReader(torch.arange(2, 48, 4), torch.arange(2, 64, 4), size)
    one = torch.randn(1, 5, *cells, generator=torch.Generator().manual_seed(0))
    places = torch.stack(torch.meshgrid(reader.rows, reader.columns, indexing="ij"), -1).reshape(-1, 2)
    read = read_at([one], places.float(), size)
    assert torch.allclose(reader.spread(one[0]).T, read, atol=1e-5)
    assert torch.allclose(reader.at(one, places[:, 0] * 64 + places[:, 1]), read, atol=1e-5)
    query = F.normalize(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    assert torch.allclose(reader.cosines(query, one), query @ F.normalize(read, dim=1).T, atol=1e-4)


def test_depth_metrics_count_ratios_in_both_directions():
    truth = torch.tensor([1.0, 2.0, 2.0, 4.0])
    scores = depth_scores(torch.tensor([1.2, 2.0 / 1.3, 2.0 * 1.6, 4.0]), truth)
    assert [scores[k] for k in ("d1", "d2", "d3")] == [0.5, 0.75, 1.0]
    assert depth_scores(truth + 0.5, truth)["rmse"] == pytest.approx(0.5)


def test_normal_metrics_are_of_angles_whatever_the_length():
    angles = torch.deg2rad(torch.tensor([0.0, 11.0, 20.0, 29.0, 90.0]))
    predicted = 3 * torch.stack([angles.sin(), torch.zeros(5), -angles.cos()], 1)
    scores = normal_scores(predicted, torch.tensor([[0.0, 0.0, -1.0]]).expand(5, 3))
    assert [scores[k] for k in ("11.25 deg", "22.5 deg", "30 deg")] == pytest.approx([0.4, 0.6, 0.8])
    assert scores["rmse"] == pytest.approx(math.sqrt((11**2 + 20**2 + 29**2 + 90**2) / 5), abs=1e-3)


def test_view_angles_are_those_of_the_rotation_between_cameras():
    def turned(degrees):
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return torch.tensor([[c, 0, s, 1], [0, 1, 0, degrees], [-s, 0, c, 0], [0, 0, 0, 1]], dtype=torch.float64)

    angles = view_angles(torch.stack([turned(a) for a in (0, 0.001, 15, 75, 180)]))
    assert torch.allclose(angles[0], torch.tensor([0, 0.001, 15, 75, 180]).double(), atol=1e-5)
    assert angles[2, 3] == pytest.approx(60)
    assert [bin_of(a) for a in (0, 14.9, 15, 60, 180)] == [0, 0, 1, 3, 3]


def test_pairs_lie_in_their_bins_and_depend_on_the_seed_alone(views):
    pairs = draw_pairs(views, 0)
    assert all(bin_of(pair.angle) == pair.bin for pair in pairs)
    assert len({p.bin for p in pairs}) > 1
    again, other = draw_pairs(views, 0), draw_pairs(views, 1)
    assert all(torch.equal(a.pixel1, b.pixel1) for a, b in zip(pairs, again, strict=True))
    assert any(not torch.equal(a.pixel1, b.pixel1) for a, b in zip(pairs, other, strict=False))


def test_held_out_frames_are_never_fitted_to_and_each_group_is_held_out_by_some_seed(views):
    assert sorted(group for seed in range(3) for group in views.held_out(seed)) == [0, 1, 2]
    for seed in range(3):
        split = views.split(seed)
        fitted = {number for numbers in split.fitted.values() for number in numbers}
        assert fitted
        assert split.judged
        assert not fitted & set(split.judged)


def test_scenes_are_held_out_whole(views):
    frames = [replace(frame, scene=f"s{number // 2}") for number, frame in enumerate(views.frames)]
    by_scene = Views(frames, SPEC)
    assert by_scene.groups == [0, 0, 1, 1, 2, 2]
    assert by_scene.rule.startswith("1 of 3 scenes")
    with pytest.raises(DataError, match="blocks"):
        Views(views.frames[:4], AwarenessSpec(blocks=1))
    more_blocks_than_frames = Views(views.frames, AwarenessSpec(size=SPEC.size, blocks=10))
    assert more_blocks_than_frames.groups == [0, 1, 2, 3, 4, 5]


def test_memory_is_made_once_for_the_same_facts_and_anew_for_others_or_damage(tmp_path):
    maps = [torch.tensor([[1e-3, 70000.0]]), torch.zeros(1, 3)]
    calls = []
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("stays")

    def made(frame):
        calls.append(frame)
        return maps

    memory = remember(tmp_path / "m", ["a", "b"], made, 2, {"network": "x"})
    assert torch.allclose(memory.read(1, 0), maps[0], rtol=1e-3, atol=70000 * 2**-24)
    assert not memory.read(0, 1).any()
    remember(tmp_path / "m", ["a", "b"], made, 2, {"network": "x"})
    assert calls == [0, 1]
    (tmp_path / "m" / INDEX).write_text((tmp_path / "m" / INDEX).read_text().replace("70000", "7"))
    remember(tmp_path / "m", ["a", "b"], made, 2, {"network": "x"})
    remember(tmp_path / "m", ["a", "b"], made, 2, {"network": "y"})
    assert calls == [0, 1] * 3
    assert (tmp_path / "m" / "mine.txt").read_text() == "stays"


def test_what_is_kept_is_read_without_a_lock_which_not_everybody_may_write(tmp_path, monkeypatch):
    maps = [torch.ones(1, 2)]
    remember(tmp_path / "m", ["a"], lambda _: maps, 2, {"network": "x"})
    monkeypatch.setattr(memory, "locked", lambda *_, **__: pytest.fail("a lock was written"))
    assert remember(tmp_path / "m", ["a"], lambda _: pytest.fail("made anew"), 2, {"network": "x"}).read(1, 0).all()


def test_two_that_remember_in_one_folder_read_what_is_theirs(tmp_path):
    found = {}

    def made(value):  # two numbers: one alone would be told by its scale, which the index holds
        maps = lambda frame: [torch.tensor([value + frame, 1.0])]  # noqa: E731
        found[value] = remember(tmp_path / "m", ["a"], maps, 4, {"of": value})

    other = threading.Thread(target=made, args=(100.0,))

    def while_another_comes(frame):
        if frame == 1:
            other.start()
            time.sleep(0.2)
        return [torch.tensor([1.0 + frame, 1.0])]

    mine = remember(tmp_path / "m", ["a"], while_another_comes, 4, {"of": 1.0})
    other.join()
    for memory_of, value in ((mine, 1.0), (found[100.0], 100.0)):
        for frame in range(4):
            assert torch.allclose(memory_of.read(frame, 0), torch.tensor([value + frame, 1.0]), rtol=1e-2)
    assert len(list((tmp_path / "m").glob("*.f16"))) == 1
    made(1.0)
    assert float(found[1.0].read(3, 0)[0]) == 4


def test_names_of_networks(folder, tmp_path):
    scratch = find_subject("resnet18=scratch")
    assert scratch.random
    assert with_random([scratch]) == [scratch]
    one, other, again = (scratch.load(seed).network.conv1.weight for seed in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.save(scratch.load(3).network.state_dict(), tmp_path / "w.pth")
    own = find_subject(f"file:{tmp_path}/w.pth", "resnet18")
    assert torch.equal(own.load().network.conv1.weight, scratch.load(3).network.conv1.weight)
    assert [subject.random for subject in with_random([own])] == [True, False]
    assert with_random([own, scratch]) == [own, scratch]
    assert find_subject("timm/resnet18").start == "imagenet"
    assert find_subject(str(folder)).load().names[0] == "relu /2"
    with pytest.raises(RecipeError, match=r"resnet50=file:w\.pth"):
        find_subject("file:w.pth")
    with pytest.raises(UnknownName, match="timm/resnet18"):
        find_subject("timm/resnet_18=scratch")
    with pytest.raises(UnknownName, match=r"Encoders with ImageNet weights: .*resnet18.*timm/resnet18"):
        find_subject("resnet_18")
    with pytest.raises(UnknownName, match="timm/convnext_tiny"):
        find_subject("convnext_tiny")
    with pytest.raises(RecipeError, match="'start' is 'scrtch'"):
        find_subject("resnet18=scrtch")
    with pytest.raises(RecipeError, match="'start' is 'stage1'"):  # no recipe, no first stage
        find_subject("resnet18=stage1")


def test_what_cannot_be_loaded_is_told_before_anything_is_read(source, tmp_path, monkeypatch):
    spec = AwarenessSpec(size=(70, 94), frames=6, seeds=1)
    monkeypatch.setattr(running, "read_views", lambda *_: pytest.fail("frames were read"))
    scratch = find_subject("resnet18=scratch")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsMismatch):
        measure_awareness([scratch, find_subject(f"resnet18=file:{tmp_path}/w.pth")], source, spec)
    (tmp_path / "w.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="holds no weights that torch reads without executing") as caught:
        measure_awareness([scratch, find_subject(f"resnet18=file:{tmp_path}/w.pth")], source, spec)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(InputError, match="multiples of 32"):
        measure_awareness([scratch, find_subject("timm/swin_s3_tiny_224=scratch")], source, spec)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(GeoPretrainError, match="timm/test_vit=scratch") as caught:
        measure_awareness([find_subject("timm/test_vit")], source, spec)
    assert "--set" not in str(caught.value)


def test_settings_that_the_command_has_not_are_refused():
    ended = geo_pretrain("eval", "awareness", "resnet18=scratch", "--set", "model.init=nonsense", expected=2)
    assert "this command has data, no recipe; accepted: data.KEY=VALUE" in " ".join(ended.errors.split())


def test_command_writes_tables_and_curves_of_every_layer(recording, folder, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    options = ["--size", "48x64", "--views", "6", "--pairs", "2", "--seeds", "2", "--measures", "matching,depth"]
    result = run("eval", "awareness", folder, "--data", f"seven_scenes:{recording}", *options, "--out", out)
    assert "held out" in result.output
    assert INPUT_2D in result.output
    tree = json.loads((out / "awareness.json").read_text())
    network = tree["networks"][str(folder)]
    assert len(network["depth"]["layers"]) == 6
    assert network["depth"]["best"] in network["depth"]["layers"]
    assert len(network["matching"]["layers"]["decoder"]["recall"]["values"]) == 2
    assert (out / "awareness.md").read_text().count("| decoder") >= 4
    assert (out / "awareness.png").read_bytes().startswith(b"\x89PNG")


def test_best_layer_has_the_highest_mean_and_tables_mark_it():
    results = Awareness(SPEC, {"modality": "2d", "frames": 6, "scenes": 1, "source": "s", "split": "x", "pairs": {}})
    for layer, values in {"a /2": (0.1, 0.3), "b /4": (0.3, 0.5)}.items():
        for value in values:
            results.add("net", "depth", layer, {"d1": value, "rmse": 1 - value})
    assert results.best("net", "depth") == "b /4"
    assert best_tables(results)[0][2] == [["net", "b /4", "40.0 ± 14.1", "0.60 ± 0.14"]]
    assert "| net | b /4* |" in page(results)
    assert "| net | a /2 |" in page(results)


def test_the_best_backbone_is_told_beside_the_same_network_with_random_weights():
    results = Awareness(SPEC, {}, random={"best": "its own", "other": "another"})
    for name, values in {"best": (0.5, 0.7), "its own": (0.2, 0.4), "other": (0.4, 0.4), "another": (0.5, 0.5)}.items():
        for value in values:
            results.add(name, "depth", "a /2", {"d1": value})
    (line,) = verdicts(results)
    assert line.startswith("Depth, linear probe: best is better than its own by 30.0 points, beyond chance")
    assert verdicts(replace(results, random={})) == []
    assert results.to_dict()["random weights"] == {"best": "its own", "other": "another"}


def test_input_alone_and_labels_are_probed_too(source, folder, views):
    labels = [(frame.color[..., 0] > 120).astype(np.int16) + 1 for frame in views.frames]
    frames = [replace(frame, semantic=one) for frame, one in zip(views.frames, labels, strict=True)]
    labelled = Views(frames, SPEC)
    found = {m: s for m, _, s in ImageMeasures(InputMaps(labelled), labelled).measure(("semantic",), [], 0)}
    assert found["semantic"]["miou"] > 0.9  # the class is a threshold of the color
    one_group = [one * (group == 0) for one, group in zip(labels, labelled.groups, strict=True)]
    frames = [replace(frame, semantic=one) for frame, one in zip(views.frames, one_group, strict=True)]
    partly = Views(frames, SPEC)
    seed = next(seed for seed in range(partly.count) if partly.held_out(seed) != [0])
    ((_, _, scores),) = ImageMeasures(InputMaps(partly), partly).measure(("semantic",), [], seed)
    assert not scores  # nothing that is held out has a label
    with pytest.raises(DataError, match="no labels"):
        measure_awareness(
            [find_subject("resnet18=scratch")],
            source,
            AwarenessSpec(size=(48, 64), frames=6, seeds=1, measures=("semantic",)),
        )


class OneSize(nn.Module):
    """A network that takes images of 32x32 pixels alone."""

    feature_info = ({"module": "conv", "reduction": 1, "num_chs": 3},)
    fixed_size = (32, 32)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, kernel_size=1)

    def forward_intermediates(self, x):
        assert x.shape[2:] == (32, 32)
        return x, [x]


def test_networks_of_one_size_see_the_image_resized(views):
    (one,) = LayeredNetwork(OneSize(), ImageContract()).maps(views.frames[0].color)
    assert one.shape == (1, 3, 32, 32)
