"""Sweeps: which runs are made and which are not made again, what may not change, and the paper's numbers beside."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

from geo_pretrain.catalog import CATALOG
from geo_pretrain.errors import CheckpointError, DataError, GeoPretrainError, HubError, RecipeError, UnknownName
from geo_pretrain.files import read_sealed
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune import sweep
from geo_pretrain.training.finetune.published import PaperRow, paper_rows
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune.sweep import differences, read_plan, read_sweep, run_sweep
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.training.finetune.sweeps import Squares, Written, tiny_recipe
from tests.zoo import as_tiny, role_weights, write_tiny


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("sweep") / "net").folder)


@pytest.fixture
def written(monkeypatch):
    fake = Written(
        lambda backbone, fraction, seed: 0.3 + 0.2 * fraction + 0.01 * seed**2 + 0.1 * (backbone != "scratch")
    )
    monkeypatch.setattr(sweep, "finetune", fake)
    return fake


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_a_real_sweep_trains_what_finetune_trains_and_is_not_trained_twice(tmp_path, net, recipe, monkeypatch):
    sources = Squares("train", 8), Squares("val", 3)
    out, seen = tmp_path / "sweep", []
    result = run_sweep(
        recipe,
        ["scratch", net],
        [0.5, 1.0],
        [3],
        out,
        device="cpu",
        sources=sources,
        on_run=lambda *at: seen.append((at[0], at[1], str(at[2]))),
    )
    assert seen == [
        (0, 4, "scratch, 50 % of the data, seed 3"),
        (1, 4, "tiny_net_r18, 50 % of the data, seed 3"),
        (2, 4, "scratch, 100 % of the data, seed 3"),
        (3, 4, "tiny_net_r18, 100 % of the data, seed 3"),
    ]
    assert [(p.backbone, p.fraction) for p in result.points] == [
        ("scratch", 0.5),
        ("scratch", 1.0),
        ("tiny_net_r18", 0.5),
        ("tiny_net_r18", 1.0),
    ]
    assert result.images == {0.5: 4, 1.0: 8}
    assert (result.metric, result.which, result.missing) == ("miou", "last", ())
    alone = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, fraction=0.5), seed=3)
    same = finetune(alone, net, tmp_path / "alone", device="cpu", sources=sources)
    assert result.points[2].values == {3: same.score}
    assert result.to_dict()["measured"][2]["std"] is None
    weights = {run.relative_to(out / "runs"): run.read_bytes() for run in (out / "runs").rglob("model.safetensors")}
    assert weights[Path("tiny_net_r18/50/seed3/model.safetensors")] == (same.folder / "model.safetensors").read_bytes()
    assert len(set(weights.values())) == 4
    fake = Written()
    monkeypatch.setattr(sweep, "finetune", fake)
    assert run_sweep(recipe, ["scratch", net], [0.5, 1.0], [3], out, sources=sources) == result
    assert fake.calls == []


def test_seeds_outermost_then_shares_then_starts(tmp_path, net, recipe, written):
    options = {"device": "cpu", "init_kwargs": {"hub": []}, "sources": (Squares("train"), Squares("val"))}
    options |= {"on_step": print, "on_data": repr, "on_labels": print}
    run_sweep(recipe, [net, "scratch"], [1, 0.2], [5, 0], tmp_path / "s", **options)
    starts = [(net, 1.0), ("scratch", 1.0), (net, 0.2), ("scratch", 0.2)]
    assert written.calls == [(*start, seed) for seed in (5, 0) for start in starts]
    assert written.options.pop("world") == World(0, 1, torch.device(options.pop("device")))
    assert written.options == options | {"on_labels": None}  # told in the first run alone


def test_mean_and_sample_deviation_over_seeds(tmp_path, recipe, written):
    result = run_sweep(recipe, ["scratch"], [0.5], [3, 0, 2], tmp_path / "s")
    (point,) = result.points
    assert list(point.values) == [0, 2, 3]
    assert point.values == pytest.approx({0: 0.4, 2: 0.44, 3: 0.49})
    assert point.spread.mean == pytest.approx(statistics.mean([0.4, 0.44, 0.49]))
    assert point.spread.std == pytest.approx(statistics.stdev([0.4, 0.44, 0.49]))
    tree = json.loads(json.dumps(result.to_dict()))
    (measured,) = tree["measured"]
    assert measured == {
        "backbone": "scratch",
        "fraction": 0.5,
        "images": 200,
        "mean": point.spread.mean,
        "std": point.spread.std,
        "seeds": {str(seed): value for seed, value in point.values.items()},
    }
    assert tree["reported_by_papers"] == []
    assert tree["recipe"]["optim"]["steps"] == 2
    assert (tree["metric"], tree["state"], tree["missing"]) == ("miou", "last", [])


def test_a_stopped_sweep_goes_on_and_grows(tmp_path, net, recipe, written):
    out = tmp_path / "s"
    written.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        run_sweep(recipe, ["scratch", net], [0.2, 1.0], [0], out)
    partial = read_sweep(out)
    assert len(partial.points) == 3
    assert partial.missing == ("tiny_net_r18, 100 % of the data, seed 0",)
    written.fail_at = None
    assert run_sweep(recipe, ["scratch", net], [0.2, 1.0], [0], out).missing == ()
    assert len(written.calls) == 4
    run_sweep(recipe, ["scratch"], [0.4], [0, 1], out)
    assert written.calls[4:] == [("scratch", 0.4, 0), ("scratch", 0.4, 1)]
    grown = read_sweep(out)
    assert [(p.backbone, p.fraction, list(p.values)) for p in grown.points] == [
        ("scratch", 0.2, [0]),
        ("scratch", 0.4, [0, 1]),
        ("scratch", 1.0, [0]),
        ("tiny_net_r18", 0.2, [0]),
        ("tiny_net_r18", 1.0, [0]),
    ]
    assert grown.images == {0.2: 80, 0.4: 160, 1.0: 400}


def test_a_run_that_was_killed_while_it_ended_is_gone_on_with(tmp_path, recipe, monkeypatch):
    """finetune's working folder is the last thing to go: while it is there the run is not over."""
    done = Written()
    monkeypatch.setattr(sweep, "finetune", done)
    run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s")
    folder = tmp_path / "s" / "runs" / "scratch" / "100" / "seed0"
    assert (folder / "results.json").exists()
    folder.with_name("seed0.run").mkdir()
    calls = []
    monkeypatch.setattr(sweep, "finetune", lambda recipe, backbone, out, **options: calls.append(out))
    run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s")
    assert calls == [folder]


def test_a_second_process_on_one_sweep_is_refused(tmp_path, recipe, monkeypatch):
    out, written, refused = tmp_path / "s", Written(), []

    def second(*arguments, **options):
        with pytest.raises(CheckpointError, match=r"at work on the sweep in '.*s'.*another --out") as error:
            run_sweep(recipe, ["scratch"], [1.0], [0, 1], out)
        refused.append(error)
        written(*arguments, **options)

    monkeypatch.setattr(sweep, "finetune", second)
    assert len(run_sweep(recipe, ["scratch"], [1.0], [0], out).points[0].values) == 1
    assert len(refused) == 1
    assert [label for label, _, _ in json.loads((out / "sweep.json").read_text())["runs"]] == ["scratch"]
    monkeypatch.setattr(sweep, "finetune", written)
    assert len(run_sweep(recipe, ["scratch"], [1.0], [1], out).points[0].values) == 2  # nothing is held for ever


def test_another_recipe_in_the_same_folder_is_refused_by_key(tmp_path, recipe, written):
    run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s")
    other = tiny_recipe(tmp_path, "optim.lr=0.1", "data.augment.flip=0.5")
    with pytest.raises(
        RecipeError, match=r"data.augment.flip: 0.0 -> 0.5; optim.lr: 0.05 -> 0.1\. .*choose another --out"
    ):
        run_sweep(other, ["scratch"], [1.0], [1], tmp_path / "s")
    assert len(written.calls) == 1
    free = tiny_recipe(tmp_path, "workers=2", "save_every=7", "seed=9", "data.fraction=0.3", "data.path=elsewhere")
    run_sweep(free, ["scratch"], [1.0], [0, 1], tmp_path / "s")
    assert len(written.calls) == 2


def test_differences_name_each_key_once(tmp_path, recipe):
    assert differences(recipe, recipe) == []
    other = tiny_recipe(tmp_path, "data.options={labelled: 3}", "data.size=[32, 96]", "optim.steps=", "optim.epochs=2")
    assert differences(recipe, other) == [
        "data.size: [64, 96] -> [32, 96]",
        "data.options.labelled: (none) -> 3",
        "optim.steps: 2 -> None",
        "optim.epochs: None -> 2.0",
    ]
    assert "data.options.labelled: 3 -> (none)" in differences(other, recipe)


def test_a_folder_whose_weights_changed_is_refused(tmp_path, recipe, written):
    folder = str(write_tiny(tmp_path / "net").folder)
    run_sweep(recipe, [folder], [1.0], [0], tmp_path / "s")
    moved = str(write_tiny(tmp_path / "moved").folder)
    run_sweep(recipe, [moved], [1.0], [1], tmp_path / "s")  # the same weights elsewhere are the same start
    assert read_plan(tmp_path / "s")[1]["tiny_net_r18"][0] == moved
    weights = {role: role_weights(role) for role in ("encoder", "decoder")}
    write_tiny(tmp_path / "moved", weights=weights | {"heads": {"weight": torch.zeros(1)}})  # no part of the network
    run_sweep(recipe, [moved], [1.0], [2], tmp_path / "s")
    weights["encoder"]["conv1.weight"] += 1
    write_tiny(tmp_path / "net", weights=weights)
    with pytest.raises(RecipeError, match=r"'tiny_net_r18' \(.*net\) has other weights than in the sweep"):
        run_sweep(recipe, [folder], [1.0], [0], tmp_path / "s")


def test_two_checkpoints_of_one_name_keep_apart(tmp_path, net, recipe, written):
    other = str(write_tiny(tmp_path / "other").folder)
    result = run_sweep(recipe, [net, other], [1.0], [0], tmp_path / "s")
    assert [p.backbone for p in result.points] == [net, other]
    assert len(list((tmp_path / "s" / "runs").iterdir())) == 2


def test_every_run_has_a_folder_of_its_own(tmp_path):
    """Shares that round to the same percent, and labels that differ in what a folder's name cannot hold."""
    long = "x" * 60
    labels = ["a_b", "a/b", "a:b", "a_b_", f"{long}/1", f"{long}y/1"]
    runs = [sweep.Run("b", label, share, 0, tmp_path) for label in labels for share in (0.28, 0.285, 0.29, 0.57, 1.0)]
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.folder.parent.name for run in runs} == {"28", "28.5", "29", "57", "100"}
    assert all(run.folder.parents[2] == tmp_path / "runs" for run in runs)


def test_named_starts_are_looked_for_where_the_caller_says(tmp_path, recipe, written, monkeypatch):
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {"pri3d_view_r18": as_tiny("pri3d_view_r18")})
    write_tiny(tmp_path / "hub" / "pri3d_view_r18", "pri3d_view_r18")
    with pytest.raises(GeoPretrainError):
        run_sweep(recipe, ["pri3d_view_r18"], [1.0], [0], tmp_path / "s", init_kwargs={"local_files_only": True})
    where = {"hub": str(tmp_path / "hub")}
    result = run_sweep(recipe, ["pri3d_view_r18"], [1.0], [0], tmp_path / "s", init_kwargs=where)
    assert [point.backbone for point in result.points] == ["pri3d_view_r18"]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"backbones": []}, r"backbones are \[\]"),
        ({"backbones": ["scratch", "scratch"]}, "each once"),
        ({"fractions": []}, r"fractions are \[\]"),
        ({"fractions": [0.5, 0.5]}, "each once"),
        ({"fractions": [0.0]}, "above 0 and up to 1"),
        ({"fractions": [20]}, "above 0 and up to 1"),
        ({"seeds": []}, r"seeds are \[\]"),
    ],
    ids=str,
)
def test_impossible_axes_are_refused(tmp_path, recipe, written, change, match):
    axes = {"backbones": ["scratch"], "fractions": [1.0], "seeds": [0]} | change
    with pytest.raises(RecipeError, match=match):
        run_sweep(recipe, **axes, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_one_list_of_scenes_is_no_list_for_every_share(tmp_path, written):
    (tmp_path / "list.txt").write_text("0\n")
    listed = tiny_recipe(tmp_path, f"data.scenes={tmp_path / 'list.txt'}")
    with pytest.raises(RecipeError, match=r"one list for every share; accepted for 2 fractions is the folder"):
        run_sweep(listed, ["scratch"], [0.2, 1.0], [0], tmp_path / "s")
    run_sweep(listed, ["scratch"], [0.2], [0], tmp_path / "s")


def test_starts_that_cannot_be_had_stop_the_sweep_before_it_trains(tmp_path, net, recipe, written, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    wide = tiny_recipe(tmp_path, "network.width=64")
    with pytest.raises(UnknownName, match="pri3d_view_geo_r18"):
        run_sweep(recipe, ["scratch", "pri3d_view_geo_r1"], [1.0], [0], tmp_path / "s")
    with pytest.raises(HubError):
        run_sweep(wide, ["scratch", "pri3d_view_geo_r18"], [1.0], [0], tmp_path / "s", init_kwargs={"hub": ["/none"]})
    with pytest.raises(RecipeError, match="encoder 'resnet18', the recipe is for 'resnet50'"):
        run_sweep(tiny_recipe(tmp_path, "network.encoder=resnet50"), ["scratch", net], [1.0], [0], tmp_path / "s")
    with pytest.raises(GeoPretrainError, match="Backbone 'imagenet'"):
        run_sweep(wide, ["scratch", "imagenet"], [1.0], [0], tmp_path / "s")
    assert written.calls == []
    assert not (tmp_path / "s").exists()


def test_folders_that_are_no_sweep_are_refused(tmp_path, recipe, written):
    with pytest.raises(DataError, match=r"holds no sweep: sweep\.json is missing"):
        read_sweep(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="exists and holds no sweep"):
        run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "full")
    run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s")
    plan = tmp_path / "s" / "sweep.json"
    kept = read_sealed(plan)
    for broken, match in (
        ("{", "not the plan of a sweep"),
        (json.dumps({"format": 1}), "not the plan of a sweep"),
        (json.dumps(kept | {"format": 2}), "format 2; this version reads 1"),
        (json.dumps(kept | {"runs": [["other", 1.0, 0]]}), "not the plan of a sweep"),
    ):
        plan.write_text(broken)
        with pytest.raises(DataError, match=match):
            read_sweep(tmp_path / "s")
    plan.write_text(json.dumps(kept | {"runs": [["scratch", 0.5, 0]]}))
    with pytest.raises(DataError, match="none of the 1 runs of this sweep is finished"):
        read_sweep(tmp_path / "s")


@pytest.mark.parametrize("change", [{"val": "w"}, {"train": "u"}, {"uses": "best"}], ids=str)
def test_runs_on_other_data_do_not_go_into_one_table(tmp_path, net, recipe, monkeypatch, change):
    monkeypatch.setattr(sweep, "finetune", Written())
    run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s")
    monkeypatch.setattr(sweep, "finetune", Written(**change))
    what = {"val": "validation images", "train": "training images", "uses": "metric"}[next(iter(change))]
    with pytest.raises(RecipeError, match=rf"seed1 has other {what} than .*seed0; remove one of the two"):
        run_sweep(recipe, ["scratch"], [1.0], [0, 1], tmp_path / "s")


def test_a_run_put_in_by_hand_must_be_of_the_recipe(tmp_path, recipe, written):
    run_sweep(recipe, ["scratch"], [1.0], [0, 1], tmp_path / "s")
    kept = tmp_path / "s" / "runs" / "scratch" / "100" / "seed0" / "recipe.yaml"
    text = kept.read_text()
    kept.write_text(text.replace("lr: 0.05", "lr: 0.2"))
    with pytest.raises(RecipeError, match=r"seed0: this run has another recipe: optim.lr: 0.05 -> 0.2"):
        read_sweep(tmp_path / "s")
    kept.write_text(text.replace("\nseed: 0", "\nseed: 4"))
    with pytest.raises(RecipeError, match="seed 0 -> 4"):
        read_sweep(tmp_path / "s")


# --- the papers' numbers ----------------------------------------------------------------------------------------

TABLES = {  # typed from the papers' tables, in percent; share 100 unless said
    "scannet_unet_r50": {
        "scratch": 39.1,
        "imagenet": 55.7,
        "pri3d_view_r50": 61.3,
        "pri3d_geo_r50": 61.1,
        "pri3d_view_geo_r50": {20: 51.5, 40: 56.2, 60: 58.9, 80: 60.3, 100: 61.7},
        "pri3d_view_r50.nodepth": 60.2,
        "pri3d_view_r50.continued": 61.4,
        "pri3d_geo_r50.continued": 61.6,
        "pri3d_view_geo_r50.continued": 61.5,
        "pri3d_unsup_view_r50": 60.5,
        "pri3d_unsup_geo_r50": 60.8,
        "pri3d_unsup_view_geo_r50": 60.8,
        "trivial_correspondence_r50": 56.4,
        "depth_prediction_r50": 58.4,
        "moco_v2_sup_in_sn_r50": 56.6,
        "moco_v2_in_sn_combine_r50": 54.9,
        "moco_v2_in_sn_mixing_r50": 54.5,
        "moco_v2_unsup_in_sn_r50": 55.4,
        "gsc_r50": {20: 54.1, 40: 58.3, 60: 60.4, 80: 61.5, 100: 63.1},
    },
    "scannet_unet_r18": {
        "scratch": 37.5,
        "imagenet": 51.0,
        "pri3d_view_r18": 54.4,
        "pri3d_geo_r18": 55.3,
        "pri3d_view_geo_r18": 55.7,
        "gsc_r18": 57.2,
    },
    "nyuv2_unet_r50": {
        "scratch": 24.8,
        "imagenet": 50.0,
        "pri3d_view_r50": 54.2,
        "pri3d_geo_r50": 54.8,
        "pri3d_view_geo_r50": 54.7,
        "moco_v2_sup_in_sn_r50": 47.6,
        "gsc_r50": 55.4,
    },
    "nyuv2_unet_r18": {
        "scratch": 22.5,
        "imagenet": 44.7,
        "pri3d_view_r18": 48.2,
        "pri3d_geo_r18": 48.6,
        "pri3d_view_geo_r18": 48.1,
    },
    "cityscapes_unet_r50": {"imagenet": 54.1, "pri3d_view_r50.megadepth": 55.2, "pri3d_view_r50.kitti_180": 56.3},
    "kitti_unet_r50": {"imagenet": 28.5, "pri3d_view_r50.kitti": 33.2},
    "scannet_deeplabv3_r50": {"imagenet": 57.0, "pri3d_view_geo_r50": 61.3, "gsc_r50": 62.2},
    "scannet_deeplabv3plus_r50": {"imagenet": 57.8, "pri3d_view_geo_r50": 61.6, "gsc_r50": 62.7},
    "scannet_pspnet_r50": {"imagenet": 59.7, "pri3d_view_geo_r50": 62.8, "gsc_r50": 63.7},
}


@pytest.mark.parametrize("name", TABLES)
def test_segmentation_is_lined_up_with_the_papers_tables(name):
    rows = {(row.backbone, row.fraction): row.value for row in paper_rows(load_finetune_recipe(name))}
    expected = {}
    for backbone, values in TABLES[name].items():
        for share, value in (values if isinstance(values, dict) else {100: values}).items():
            expected[backbone, share / 100] = value / 100
    assert rows == pytest.approx(expected)
    assert {row.metric for row in paper_rows(load_finetune_recipe(name))} == {"miou"}


def test_rows_cite_the_table_with_its_paper():
    rows = {(row.backbone, row.fraction): row for row in paper_rows(load_finetune_recipe("scannet_unet_r50"))}
    assert rows["scratch", 1.0] == PaperRow("scratch", 1.0, "miou", 0.391, "Pri3D T1")
    assert rows["pri3d_view_geo_r50", 0.2].table == "Pri3D README"
    assert rows["moco_v2_unsup_in_sn_r50", 1.0].table == "Pri3D T9"
    assert rows["trivial_correspondence_r50", 1.0].table == "Pri3D T1"
    assert rows["gsc_r50", 0.4].table == "GSC T2"
    order = [row.fraction for row in paper_rows(load_finetune_recipe("scannet_unet_r50")) if row.backbone == "gsc_r50"]
    assert order == [0.2, 0.4, 0.6, 0.8, 1.0]


def rcnn(source, task, kind="mask_rcnn"):
    recipe = load_finetune_recipe("scannet_unet_r50", ["network={kind: " + kind + "}", f"task={task}"])
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=source))


@pytest.mark.parametrize(
    "source, backbone, boxes, masks",
    [
        ("scannet", "scratch", (32.7, 17.7, 16.9), (25.8, 13.1, 12.2)),
        ("scannet", "imagenet", (41.7, 25.9, 25.1), (32.6, 17.8, 17.6)),
        ("scannet", "moco_v2_sup_in_sn_r50", (43.5, 26.8, 25.8), (33.9, 18.1, 18.3)),
        ("scannet", "pri3d_view_geo_r50", (44.5, 27.4, 26.6), (35.8, 19.3, 18.7)),
        ("scannet", "gsc_r50", (45.1, 27.6, 26.9), (36.0, 19.3, 19.5)),
        ("nyuv2", "scratch", (21.3, 10.3, 9.0), (17.2, 9.2, 8.8)),
        ("nyuv2", "imagenet", (29.9, 17.3, 16.8), (25.1, 13.9, 13.4)),
        ("nyuv2", "gsc_r50", (34.6, 20.5, 19.7), (29.7, 16.3, 16.5)),
        ("coco", "imagenet", (59.5,), (56.6,)),
        ("coco", "pri3d_view_r50.lr001", (60.6,), (57.5,)),
    ],
)
def test_detection_is_lined_up_with_the_papers_tables(source, backbone, boxes, masks):
    names = ("ap50", "ap75", "ap")
    expected = {f"box_{name}": value / 100 for name, value in zip(names, boxes, strict=False)}
    found = {row.metric: row.value for row in paper_rows(rcnn(source, "detection")) if row.backbone == backbone}
    assert found == pytest.approx(expected)
    expected |= {f"mask_{name}": value / 100 for name, value in zip(names, masks, strict=False)}
    found = {row.metric: row.value for row in paper_rows(rcnn(source, "instances")) if row.backbone == backbone}
    assert found == pytest.approx(expected)
    assert paper_rows(rcnn(source, "detection", "faster_rcnn")) == ()


def test_what_no_paper_measured_has_no_rows():
    assert paper_rows(load_finetune_recipe("rooms_unet_r18")) == ()
    assert paper_rows(load_finetune_recipe("scannet_unet_r50", toy=True)) == ()
    recipe = load_finetune_recipe("scannet_pspnet_r50", ["network.kind=fpn", "network.options={}"])
    assert paper_rows(recipe) == ()


def test_only_the_papers_numbers_of_the_measured_metric_stand_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "finetune", Written(metric="mask_ap50"))
    recipe = rcnn("coco", "instances")
    assert {row.metric for row in paper_rows(recipe)} == {"box_ap50", "mask_ap50"}
    result = run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s", sources=(Squares("train"), Squares("val")))
    assert result.metric == "mask_ap50"
    assert {(row.backbone, row.value) for row in result.paper} == {("imagenet", 0.566), ("pri3d_view_r50.lr001", 0.575)}


def test_a_recipe_that_is_not_the_shipped_one_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "finetune", Written())
    recipe = load_finetune_recipe("scannet_unet_r18", ["optim.batch=8", "data.path=/data/scannet", "workers=0"])
    result = run_sweep(recipe, ["scratch"], [1.0], [0], tmp_path / "s", sources=(Squares("train"), Squares("val")))
    assert result.changed == ("optim.batch: 64 -> 8",)
    assert {row.backbone for row in result.paper} == set(TABLES["scannet_unet_r18"])
    assert [row["value"] for row in result.to_dict()["reported_by_papers"] if row["backbone"] == "scratch"] == [0.375]
