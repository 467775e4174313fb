"""The plan against ImageNet: its recipes are accepted, and its parts run on tiny data."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from benchmarks import imagenet_rival
from benchmarks.imagenet_rival import BY_PRI3D, CAMVID, IMAGENET, PARTS, RANDOM, Plan, awareness_table, checkpoint_of
from benchmarks.jobs import Job
from benchmarks.starts import scores_of
from geo_pretrain.checkpoint import sha256
from geo_pretrain.errors import DataError
from geo_pretrain.files import read_sealed, write_sealed
from geo_pretrain.training.data.labelled.registry import open_labelled
from geo_pretrain.training.finetune.folder import read_result
from geo_pretrain.training.initialize import weights_file
from tests.training.conftest import write_recording


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Its layout: images and ids of classes, 11 is of none."""
    root = tmp_path_factory.mktemp("camvid")
    draw = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for number in range(count):
            ids = np.kron(draw.choice([0, 1, 3, 11], (3, 4)), np.ones((20, 20))).astype(np.uint8)
            image = np.stack([ids * 20] * 3, -1) + draw.integers(0, 9, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(image).save(root / split / f"{split}{number}.jpg")
            Image.fromarray(ids).save(root / f"{split}annot" / f"{split}{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Stands in for the package: a file of timm's keys."""
    path = tmp_path_factory.mktemp("weights") / "efficientnet_lite0.safetensors"
    save_file(timm.create_model("efficientnet_lite0").state_dict(), path)
    return f"file:{path}"


@pytest.fixture
def plan(camvid, weights, tmp_path):
    made = Plan(tmp_path / "out", tmp_path, camvid, pretraining=7, steps=2, seeds=1, imagenet=weights)
    made.write_files()
    made.write_files()  # once more, as each process does
    return made


def test_pri3d_comes_first_and_every_start_is_in_every_part(plan):
    names = [job.name for job in plan.jobs(PARTS)]
    assert names[:3] == ["Pri3D on rooms", "Pri3D on kitchen", "awareness"]
    for start in plan.starts:
        assert f"probe: {start.label}, seed 0" in names
        for study in ("camvid", "rooms"):
            assert sum(name.startswith(f"{study}: {start.label}, lr") for name in names) == 3
    assert len(names) == 2 + 1 + 4 + 2 * 4 * 3
    assert (plan.streets.shares, plan.rooms.shares) == ((0.1, 1.0), (0.05, 1.0))
    few = [job.name for job in plan.jobs(["probe"])]
    assert len(few) == 2 + 4
    (awareness,) = plan.jobs(["awareness"])[2:]
    assert [path.stem for path in awareness.needs] == [f"pri3d_{name}" for name in BY_PRI3D.values()]
    assert not awareness.is_ready()


def test_fine_tuning_from_scratch_leaves_the_place_of_a_pri3d_run_free(plan):
    """It needs no checkpoint, so a third process does it while the others train."""
    places = [job.place for job in plan.jobs(PARTS) if job.is_ready()]
    for name in BY_PRI3D.values():
        assert not any(checkpoint_of(plan.out, name) in place.parents for place in places)


def test_the_recipes_are_accepted(plan):
    for name, frames in (("rooms", (0.0, 1.0)), ("kitchen", (0.0, 0.75))):
        recipe = plan.pri3d(name)
        assert (recipe.optim.steps, recipe.model.encoder) == (7, "timm/efficientnet_lite0")
        assert (recipe.data.frames, recipe.data.size, recipe.name) == (frames, (120, 160), f"pri3d_view_lite0.{name}")
    unseen = plan.kitchen_data((0.75, 1.0))
    assert unseen.options == plan.pri3d("kitchen").data.options
    streets = plan.streets.recipe_at(plan.starts[1], 0.01)
    assert (streets.optim.steps, streets.optim.epochs, streets.network.transfer) == (2, None, "encoder")


def test_rates_are_chosen_on_val_and_the_test_images_are_reported(plan):
    recipe = plan.streets.recipe_at(plan.starts[0], 0.01)
    val = open_labelled("folder", plan.camvid, "val", task="segmentation", options=recipe.data.options)
    reported = imagenet_rival.reported_images(plan.streets, recipe)
    assert (val.ids(), reported.ids()) == (["val0"], ["test0", "test1"])
    assert reported.classes == CAMVID
    truth = np.asarray(Image.open(plan.camvid / "testannot" / "test1.png"))
    assert np.array_equal(reported.load("test1").semantic, np.where(truth == 11, 0, truth + 1))


def test_probes_of_frozen_encoders_and_what_they_gain(plan):
    for job in plan.jobs(["probe"]):
        if job.is_ready() and job.name.startswith("probe"):
            job.run()
            assert job.is_done()
    found = plan.probes()
    assert set(found["seeds"]) == {RANDOM, IMAGENET}
    assert found["seeds"][RANDOM] != found["seeds"][IMAGENET]
    assert [gain["verdict"].partition(" is ")[0] for gain in found["gains"]] == [IMAGENET]
    assert found["table"][2].startswith(f"| {RANDOM} | ")


def test_a_part_that_is_done_is_stored_by_itself(plan, monkeypatch):
    stored = {}
    monkeypatch.setattr(imagenet_rival, "write_results", lambda name, *given, timed: stored.update({name: given}))
    imagenet_rival.report(plan, "command")
    assert stored == {}
    monkeypatch.setattr(Plan, "_training_job", lambda *_: Job("trained", plan.out, lambda: True, lambda: None))
    for seed, (number, start) in itertools.product(plan.seeds, enumerate(plan.starts)):
        plan.probe_file(start, seed).parent.mkdir(exist_ok=True)
        write_sealed(plan.probe_file(start, seed), {"miou": number / 10})
    imagenet_rival.report(plan, "command")
    ((name, (command, results)),) = stored.items()
    assert (name, command) == ("imagenet_rival_probe", "command --only probe")
    assert results["seeds"][IMAGENET] == {0: 0.1}
    by_kitchen = [gain for gain in results["gains"] if gain["start"] == "ImageNet, Pri3D on the kitchen"]
    assert {gain["over"]: round(gain["by seed"][0], 6) for gain in by_kitchen} == {RANDOM: 0.3, IMAGENET: 0.2}
    assert results["weights"] == {IMAGENET: sha256(weights_file(plan.imagenet))}
    assert "## camvid" in (plan.out / "imagenet_rival.md").read_text()


def test_fine_tuning_from_a_file_is_chosen_by_val_and_judged_on_test(plan):
    job = next(job for job in plan.jobs(["camvid"]) if job.name == f"camvid: {IMAGENET}, lr 0.01, seed 0")
    job.run()
    assert job.is_done()
    few, all_labels = scores_of(plan.streets, plan.out)
    assert (few.start, few.share, few.images) == (IMAGENET, 0.1, 1)
    assert (all_labels.share, all_labels.images) == (1.0, 3)
    (folder,) = (plan.out / "camvid").rglob("100/seed0")
    judged, result = read_sealed(folder / "judged.json"), read_result(folder)
    assert (judged["images"], result.data["data"]["val_images"]) == (2, 1)
    assert judged["scores"]["miou"] == all_labels.reported


def test_pri3d_trains_on_a_recording_and_all_starts_are_measured_on_it(plan, monkeypatch):
    """The same few frames for both, of which a part would be too few."""
    monkeypatch.setattr(imagenet_rival, "SEEN", (0.0, 1.0))
    monkeypatch.setattr(imagenet_rival, "UNSEEN", (0.0, 1.0))
    plan.kitchen, plan.pretraining = write_recording(plan.out / "recording"), 1
    camera = np.loadtxt(plan.kitchen / "camera-intrinsics.txt").tolist()
    one_camera = {"color_intrinsics": camera, "depth_to_color": np.eye(4).tolist()}
    (plan.out / "registration.json").write_text(json.dumps(one_camera))
    rooms, kitchen, awareness = plan.jobs(["awareness"])
    kitchen.run()
    assert kitchen.is_done()
    assert not rooms.is_done()
    assert not awareness.is_ready()
    shutil.copytree(checkpoint_of(plan.out, "kitchen"), checkpoint_of(plan.out, "rooms"))  # 256 rooms take too long
    assert not awareness.is_ready()  # a run that was stopped has a folder with weights, too
    rooms.run()
    assert rooms.is_done()
    assert awareness.is_ready()
    awareness.run()
    assert awareness.is_done()
    networks = plan.awareness()["networks"]
    assert set(networks) == {"position+color", RANDOM, IMAGENET, *BY_PRI3D}
    assert networks[IMAGENET] != networks["ImageNet, Pri3D on the kitchen"]
    assert networks["ImageNet, Pri3D on the kitchen"] == networks["ImageNet, Pri3D on rooms"]
    assert len(awareness_table(networks)) == 2 + len(networks)
    for measure in ("matching, recall", "depth, d1", "normals, 11.25 deg"):
        pairs = [(gain["start"], gain["over"]) for gain in plan.awareness()["gains"][measure]]
        assert pairs == [(IMAGENET, RANDOM), *itertools.product(BY_PRI3D, (RANDOM, IMAGENET))]


def test_the_table_of_awareness_has_a_row_a_start():
    def of(*values):
        return {"values": list(values)}

    networks = {
        "position+color": {"depth": {"layer": "input", "d1": of(0.4), "rmse": of(1.0)}},
        IMAGENET: {
            "matching": {"layer": "x", "recall": of(0.3), "0-15 deg": of(0.5, 0.7), "4 px": of(0.2)},
            "depth": {"layer": "y", "d1": of(0.8)},
        },
    }
    assert awareness_table(networks) == [
        "| start | depth, d1 | matching, recall | matching, 0-15 deg |",
        "| --- | --- | --- | --- |",
        "| position+color | 40.0 |  |  |",
        f"| {IMAGENET} | 80.0 | 30.0 | 60.0 ± 14.1 |",
    ]


def test_another_layout_is_told(tmp_path):
    with pytest.raises(DataError, match="No folder 'train'"):
        Plan(tmp_path, tmp_path, tmp_path, pretraining=1, steps=1, seeds=1).write_files()
