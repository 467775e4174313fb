"""The papers' tables as work: commands of the rows, and our numbers beside the paper's after the runs."""

from __future__ import annotations

import json
import shlex

import pytest

from geo_pretrain.catalog import CATALOG
from geo_pretrain.errors import DataError, RecipeError, UnknownName
from geo_pretrain.training.bench import tables
from geo_pretrain.training.bench.tables import cells, list_tables, plan_table
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from tests.front_door import geo_pretrain

SEG = "3D semantic segmentation"


def commands(plan, label, network="SR-UNet34C"):
    (row,) = (one for one in plan.rows if one.row.label == label and one.row.network == network)
    return row.commands


def test_every_row_of_ppkt_t1_has_its_command(tmp_path):
    plan = plan_table("ppkt t1", tmp_path, ["s3dis:/data/s3dis"], seeds=[0, 1])
    out = tmp_path.as_posix()
    assert commands(plan, "scratch") == (
        f"geo-pretrain finetune s3dis_srunet34 --sweep -b scratch --data s3dis:/data/s3dis --fraction 1 --seed 0 "
        f"--seed 1 -o {out}/s3dis_srunet34",
    )
    make, use = commands(plan, "ppkt_srunet34")
    assert make == f"geo-pretrain train ppkt_srunet34 --data scannet:PATH --out {out}/weights/ppkt_srunet34"
    assert f" -b {out}/weights/ppkt_srunet34 " in use
    assert len(commands(plan, "pointcontrast_nce_srunet34")) == 1  # the authors offer it
    assert len(plan.rows) == 6
    assert not plan.without


def test_networks_shares_points_steps_and_levels_are_those_of_the_columns(tmp_path):
    small = commands(plan_table("PPKT T4", tmp_path), "scratch", "SR-UNet18A")
    assert "--set network.unet3d.variant=18A" in small[0]
    csc = " ".join(commands(plan_table("CSC README", tmp_path), "csc_60k_srunet34"))
    assert "scannet3d_scenes_srunet34 --sweep" in csc
    assert "--fraction 0.01 --fraction 0.05 --fraction 0.1 --fraction 0.2" in csc
    for points in (20, 50, 100, 200):
        assert f"--set data.cloud.labelled_points={points} " in csc
    assert "--set optim.steps=20000" in commands(plan_table("PointContrast text", tmp_path), "scratch")[0]
    assert "--set evaluate.level=points" in commands(plan_table("PPKT T3", tmp_path), "scratch")[0]
    (slidr,) = commands(plan_table("SLidR README", tmp_path), "slidr_srunet34.nuscenes")
    assert "finetune semantickitti_slidr_srunet34 " in slidr
    assert "--fraction 1 " in slidr  # every 100th scan is the reader's work
    assert "scannet_unet_r50" in commands(plan_table("Pri3D T1", tmp_path), "imagenet", "resnet50")[0]


def test_every_command_names_a_recipe_with_these_keys(tmp_path):
    """Each table is planned; each command's recipe takes its changes, for rows that can be run."""
    seen, checked = 0, set()
    for name in list_tables():
        plan = plan_table(name, tmp_path)
        for one in plan.rows:
            assert bool(one.row.start) or (not one.commands and one.row.note), (name, one.row.label)
            for command in one.commands:
                words = shlex.split(command)
                changes = tuple(words[k + 1] for k, word in enumerate(words) if word == "--set")
                if changes and (words[2], changes) not in checked:
                    load_finetune_recipe(words[2], changes)
                    checked.add((words[2], changes))
                seen += 1
    assert len(checked) > 5
    assert seen > len(CATALOG)


def test_our_numbers_stand_beside_the_papers_after_the_runs(tmp_path, monkeypatch):
    folder = tmp_path / "s3dis_srunet34"
    runs = []
    for backbone, label, values in (
        ("scratch", "scratch", (0.5, 0.6)),
        (f"{tmp_path.as_posix()}/weights/ppkt_srunet34", "ppkt_srunet34.rooms_toy", (0.7,)),
    ):
        for seed, value in enumerate(values):
            run = tables_run(folder, backbone, label, seed)
            run.folder.mkdir(parents=True)
            evaluation = {"scores": {"miou": value, "macc": value + 0.1}, "step": 1}
            result = {"recipe": "r", "task": "segmentation3d", "metric": "miou", "seed": seed, "score": value}
            result |= {"uses": "last", "steps": 1, "last": evaluation, "best": evaluation}
            result |= {"backbone": {"name": backbone}, "data": {"fraction": 1.0}}
            (run.folder / "results.json").write_text(json.dumps(result))
            runs.append(run)
    (folder / "sweep.json").write_text("{}")
    monkeypatch.setattr(tables, "read_plan", lambda out: (None, None, runs))
    plan = plan_table("PPKT T1", tmp_path)
    found = {(benchmark, start): ours for benchmark, start, _, ours in cells(plan)}
    assert found["S3DIS mIoU, semantic segmentation", "scratch (SR-UNet34C)"] == "55.0 ± 7.1"
    assert found["S3DIS mAcc, semantic segmentation", "ppkt_srunet34 (SR-UNet34C)"] == "80.0"
    assert found["S3DIS mIoU, semantic segmentation", "crd_srunet34 (SR-UNet34C)"] == "-"
    numbers = plan.to_dict()["rows"][0]["numbers"]
    (miou,) = (one for one in numbers if one["metric"] == "mIoU")
    assert (miou["paper"], miou["seeds"]) == (65.16, 2)
    assert miou["ours"] == pytest.approx(55)


def tables_run(sweep, backbone, label, seed):
    from geo_pretrain.training.finetune.sweep import Run

    return Run(backbone, label, 1.0, seed, sweep)


def test_tables_are_listed_and_printed_by_the_command(tmp_path):
    listed = json.loads(geo_pretrain("bench", "table", "--json").output)
    assert {key: one[key] for one in listed if one["table"] == "Janda T1" for key in ("table", "rows")} == {
        "table": "Janda T1",
        "rows": 5,
    }
    shown = geo_pretrain("bench", "table", "Janda T1", "--toy", "-o", tmp_path).output
    assert "not to be compared" in shown
    assert "neither its weights nor its pretext task are here" in " ".join(shown.split())
    assert "--toy" in shown


def test_wrong_names_are_answered(tmp_path):
    with pytest.raises(UnknownName, match=r"Unknown table 'PPKT T9'\. Closest: 'PPKT T"):
        plan_table("PPKT T9", tmp_path)
    with pytest.raises(RecipeError, match=r"--data coco: PPKT T1 is not measured on it; accepted: s3dis"):
        plan_table("PPKT T1", tmp_path, ["coco:PATH"])
    with pytest.raises(UnknownName, match="labelled data set 's3dsi'"):
        plan_table("PPKT T1", tmp_path, ["s3dsi:PATH"])
    (tmp_path / "s3dis_srunet34").mkdir()
    with pytest.raises(DataError, match=r"holds no sweep: sweep\.json is missing"):
        plan_table("PPKT T1", tmp_path)
