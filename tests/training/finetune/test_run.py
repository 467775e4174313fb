"""The fine-tuning loop: learns, continues bit for bit after SIGKILL, measures when it should, says what it did."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geo_pretrain.errors import CheckpointError, DataError, GeoPretrainError, RecipeError
from geo_pretrain.training.finetune.folder import read_result
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune.training import evaluation_steps
from geo_pretrain.training.finetune_recipe import load_finetune_recipe
from geo_pretrain.training.runs import Interrupted
from tests.forked import Forked
from tests.training.finetune.test_segmentation import Squares, recipe_for, task_for
from tests.zoo import write_tiny

SOURCES = (Squares("train"), Squares("val", count=3))


def run(out, *overrides, backbone="scratch", sources=SOURCES, name="scannet_unet_r18", **options):
    recipe = recipe_for(name, *overrides)
    return finetune(recipe, backbone, out, sources=sources, device="cpu", **options)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    results = [
        json.loads((folder / "results.json").read_text()) | {"seconds": 0, "sha256": ""} for folder in (one, other)
    ]
    assert results[0] == results[1]
    assert (one / "predictions.png").read_bytes() == (other / "predictions.png").read_bytes()


class Stop(Exception):
    pass


def stop_at(step):
    def callback(info):
        if info.step == step:
            raise Stop

    return callback


# resume

LONG = ("optim.steps=36", "evaluate.every_steps=7", "save_every=5", "data.augment.flip=0.5", "data.augment.blur=0.5")


def start(out, workers):
    """The run in a process of its own."""
    return Forked(lambda: run(out, *LONG, "match_released_code=true", f"workers={workers}"))


def wait_for_line(process, out, lines, seconds=600):
    """Whether the log has the lines; False when the run has ended before this was seen."""
    log = Path(f"{out}.run") / "log.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            return True
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0]
            return False
        time.sleep(0.005)
    raise AssertionError(f"line {lines} was not reached")


def test_killed_run_continues_bit_for_bit(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    run(tmp_path / "whole", *LONG, "match_released_code=true", "workers=0")
    for line in (8 + os.getpid() % 17, 8, 7, 6):  # on a busy machine a run may end before it is killed
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        broken = start(tmp_path / "broken", 0)
        if wait_for_line(broken, tmp_path / "broken", line):
            broken.kill()
        broken.communicate()
        if not (tmp_path / "broken").exists():
            break
    assert not (tmp_path / "broken").exists(), "every run ended before it could be killed"
    torch.rand(3)  # whatever the caller draws is of no concern
    run(tmp_path / "broken", *LONG, "match_released_code=true", "workers=0")
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    lines = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 37))
    assert [line["step"] for line in lines if "evaluation" in line] == [7, 14, 21, 28, 35]
    assert not (tmp_path / "broken.run").exists()


def test_dropout_continues_where_it_was(tmp_path):
    options = {"name": "rooms_pspnet_r18"}
    overrides = ("data.size=[32, 32]", "optim.steps=3", "evaluate.every_steps=3", "network.aux=0.4")
    run(tmp_path / "whole", *overrides, **options)
    torch.manual_seed(77)
    with pytest.raises(Stop):
        run(tmp_path / "broken", *overrides, on_step=stop_at(2), **options)
    torch.manual_seed(78)
    run(tmp_path / "broken", *overrides, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_kill_while_the_folder_is_written_is_survived(tmp_path, monkeypatch):
    from geo_pretrain.training.finetune import folder as module

    run(tmp_path / "whole")

    def fail(*arguments):
        raise Stop

    monkeypatch.setattr(module, "summary", fail)
    with pytest.raises(Stop):
        run(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="has not ended"):
        read_result(tmp_path / "out")
    monkeypatch.undo()
    run(tmp_path / "out")
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    def interrupt(info):
        if info.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run(tmp_path / "whole", "save_every=100")
    with pytest.raises(Interrupted, match=r"after step 3 of 4.*Give the same command again"):
        run(tmp_path / "out", "save_every=100", on_step=interrupt)
    seen = []
    run(tmp_path / "out", "save_every=100", on_step=lambda info: seen.append(info.step))
    assert seen == [4]
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        run(tmp_path / str(workers), f"workers={workers}", "data.augment.flip=0.5")
    assert (tmp_path / "0" / "log.jsonl").read_text() == (tmp_path / "2" / "log.jsonl").read_text()


def test_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    run(tmp_path / "out")
    assert torch.equal(torch.rand(2), expected)


def test_run_is_not_continued_with_anything_else(tmp_path):
    write_tiny(tmp_path / "tiny_net_r18")
    with pytest.raises(Stop):
        run(tmp_path / "out", on_step=stop_at(3))
    with pytest.raises(RecipeError, match=r"another recipe; it differs in: optim.lr: .* -> 0\.5"):
        run(tmp_path / "out", "optim.lr=0.5")
    with pytest.raises(RecipeError, match="another recipe; it differs in: seed: 0 -> 3"):
        run(tmp_path / "out", "seed=3")
    with pytest.raises(RecipeError, match="from another backbone"):
        run(tmp_path / "out", backbone=tmp_path / "tiny_net_r18")
    with pytest.raises(RecipeError, match="on other data"):
        run(tmp_path / "out", sources=(Squares("train", count=5), SOURCES[1]))
    with pytest.raises(RecipeError, match="on other data"):
        run(tmp_path / "out", sources=(SOURCES[0], Squares("val", count=4)))
    run(tmp_path / "out")


# what it does


def test_it_learns_and_depends_on_its_seed_alone(tmp_path):
    found = []
    overrides = ("optim.steps=60", "optim.lr=0.05", "optim.batch=4", "evaluate.every_steps=60", "save_every=100")
    result = run(tmp_path / "a", *overrides, "seed=1", sources=(Squares("train", count=8), SOURCES[1]))
    untrained = task_for(recipe_for(), contract=contract_of_scratch()).evaluate(SOURCES[1], SOURCES[1].ids())
    assert untrained.scores["miou"] < 0.3
    assert result.score > 0.6
    assert result.seed == 1
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        run(tmp_path / f"s{number}", f"seed={seed}")
        found.append((tmp_path / f"s{number}" / "log.jsonl").read_text())
    assert found[0] == found[1] != found[2]


def first_step(tmp_path, name, *overrides):
    """What one step adds to each tensor."""
    before = task_for(recipe_for("scannet_unet_r18", *overrides)).module.state_dict()
    run(tmp_path / name, "optim.steps=1", "evaluate.every_steps=1", *overrides)
    after = weights(tmp_path / name)
    return {key: (after[key] - value).double() for key, value in before.items()}


def test_factors_floor_and_clipping_scale_the_first_step(tmp_path):
    encoder, decoder = "network.encoder.layer2.0.conv1.weight", "network.decoder.conv0.weight"
    plain = first_step(tmp_path, "plain")
    heads = first_step(tmp_path, "heads", "optim.head_factor=10", "optim.backbone_factor=0.5")
    floor = first_step(tmp_path, "floor", "optim.backbone_factor=0.001", "optim.floor=0.02")
    assert plain[decoder].abs().max() > 0
    torch.testing.assert_close(heads[decoder], 10 * plain[decoder], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(heads[encoder], 0.5 * plain[encoder], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(floor[encoder], 2 * plain[encoder], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(floor[decoder], 2 * plain[decoder], rtol=1e-3, atol=1e-7)
    clipped = first_step(tmp_path, "clipped", "optim.clip_norm=0.5")
    trained = [key for key, _ in task_for(recipe_for()).module.named_parameters()]
    norm = math.sqrt(sum(float((clipped[key] / 0.01).square().sum()) for key in trained))
    assert norm == pytest.approx(0.5, rel=1e-3)


def test_batchnorm_momentum_of_the_schedule_and_of_the_backbone(tmp_path):
    key, head = "network.encoder.bn1.running_mean", "network.decoder.up4.bn1.running_mean"
    pri3d = first_step(tmp_path, "pri3d", "optim.bn_momentum=pri3d")  # starts at 0.5
    constant = first_step(tmp_path, "constant")  # a toy's, torch's 0.1
    slow = first_step(tmp_path, "slow", "optim.backbone_bn_momentum=0.01", "network.transfer=encoder")
    torch.testing.assert_close(pri3d[key], 5 * constant[key], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(slow[key], constant[key] / 10, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(slow[head], constant[head], rtol=1e-4, atol=1e-8)


def test_steps_follow_the_schedule_and_dampening_by_hand(tmp_path):
    run(tmp_path / "out", "optim.steps=4", "optim.lr=0.02")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([0.02 * (1 - step / 5) ** 0.9 for step in range(4)])


def test_frozen_stages_stay_as_they_were(tmp_path):
    moved = first_step(tmp_path, "frozen", "network.freeze=2")
    for key, value in moved.items():
        frozen = key.startswith(("network.encoder.conv1", "network.encoder.bn1", "network.encoder.layer1"))
        if key.endswith((".weight", "running_mean")):
            assert bool(value.any()) != frozen, key


def test_bf16_trains_and_differs_from_fp32(tmp_path):
    for precision in ("fp32", "bf16"):
        run(tmp_path / precision, f"precision={precision}")
    states = [weights(tmp_path / precision) for precision in ("fp32", "bf16")]
    assert {value.dtype for value in states[1].values()} == {torch.float32, torch.int64}
    assert not torch.equal(states[0]["network.encoder.conv1.weight"], states[1]["network.encoder.conv1.weight"])


# measuring


def test_evaluations_fall_where_the_released_loops_have_them():
    def steps(name, images, *overrides):
        recipe = load_finetune_recipe(name, overrides)
        total = recipe.optim.steps or math.ceil(recipe.optim.epochs * images / recipe.optim.batch)
        return evaluation_steps(recipe, images, total)

    # 80 epochs of 10 steps, measured after epochs 0, 5, ..., 75, and here at the end
    published = [10 * (epoch + 1) for epoch in range(0, 80, 5)]
    assert steps("scannet_unet_r50", 640, "match_released_code=true") == published
    assert steps("scannet_unet_r50", 640) == [*published, 800]
    assert published[-1] == 760
    # every epoch: the last one is there anyway
    assert steps("scannet_pspnet_r50", 160) == [10 * (epoch + 1) for epoch in range(50)]
    # every 3000 of 50000
    deeplab = list(range(3000, 50_000, 3000))
    assert steps("scannet_deeplabv3_r50", 160, "match_released_code=true") == deeplab
    assert steps("scannet_deeplabv3_r50", 160) == [*deeplab, 50_000]
    # epochs that are no whole number of steps, and a run too short to be measured on the way
    assert steps("scannet_unet_r50", 100, "optim.epochs=6", "match_released_code=true") == [2, 10]
    short = ("evaluate.every_epochs=null", "match_released_code=true", "optim.epochs=2")
    assert steps("scannet_unet_r50", 640, *short) == [20]


def test_last_is_reported_by_default_and_best_under_match_released_code(tmp_path, monkeypatch):
    from geo_pretrain.training.finetune.segmentation import Segmentation

    scores = iter([0.3, 0.7, 0.7, 0.4] * 2)
    original = Segmentation.evaluate

    def scripted(self, source, ids, world):
        found = original(self, source, ids)
        score = next(scores)
        self.seen = [*getattr(self, "seen", []), (score, {k: v.clone() for k, v in self.module.state_dict().items()})]
        scripted.task = self
        return dataclasses.replace(found, scores={"miou": score})

    monkeypatch.setattr(Segmentation, "evaluate", scripted)
    steps = ("optim.steps=8", "evaluate.every_steps=2")
    mended = run(tmp_path / "mended", *steps)
    assert (mended.uses, mended.score, mended.last, mended.best, mended.best_step) == ("last", 0.4, 0.4, 0.7, 4)
    assert torch.equal(
        weights(tmp_path / "mended")["network.decoder.conv0.weight"],
        scripted.task.seen[3][1]["network.decoder.conv0.weight"],
    )
    assert mended.data["quirks"]["number reported"] == "the last (mended)"
    assert mended.data["quirks"]["end of the run"] == "is measured"

    exact = run(tmp_path / "exact", *steps, "match_released_code=true", "optim.steps=9")
    assert (exact.uses, exact.score, exact.last, exact.best, exact.best_step) == ("best", 0.7, None, 0.7, 4)
    kept = weights(tmp_path / "exact")
    for key, value in scripted.task.seen[1][1].items():
        assert torch.equal(kept[key], value), key
    assert exact.data["quirks"]["number reported"] == "the best on the validation images (as published)"
    assert exact.data["quirks"]["end of the run"] == "is not measured (as published)"
    assert [found["step"] for found in exact.data["evaluations"]] == [2, 4, 6, 8]


def test_saved_weights_give_the_reported_number(tmp_path):
    for flags in ([], ["match_released_code=true"]):
        out = tmp_path / str(len(flags))
        result = run(out, "optim.steps=6", "optim.lr=0.05", *flags)
        task = task_for(recipe_for("scannet_unet_r18", *flags), contract=contract_of_scratch())
        task.module.load_state_dict(weights(out))
        found = task.evaluate(SOURCES[1], SOURCES[1].ids())
        assert found.scores["miou"] == result.score
        assert found.per_class["iou"] == result.per_class()
        assert set(result.per_class()) == {"ground", "red", "green"}


def contract_of_scratch():
    from geo_pretrain.contract import ImageContract

    return ImageContract()


def test_only_some_validation_images(tmp_path):
    result = run(tmp_path / "out", "evaluate.images=2", sources=(SOURCES[0], Squares("val", count=7)))
    assert result.data["data"]["val_images"] == 2
    assert result.data["last"]["details"]["images"] == 2


# data


def test_part_of_the_scenes(tmp_path):
    result = run(tmp_path / "out", "data.fraction=0.34")
    assert result.fraction == pytest.approx(2 / 6)
    assert result.data["data"]["train_images"] == 2
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "scannetv2_train_20.txt").write_text("train0\ntrain2\n")
    listed = run(tmp_path / "listed", "data.fraction=0.2", f"data.scenes={tmp_path / 'lists'}")
    assert listed.fraction == pytest.approx(4 / 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_label_of_a_training_image_names_file_and_value(tmp_path, workers):
    def wrong(found):
        return dataclasses.replace(found, semantic=found.semantic + 40)

    sources = (Squares("train", broken={"train1/2": wrong}), SOURCES[1])
    with pytest.raises(
        DataError, match=r"A training image cannot be used: train1/2: label 43, accepted are 0"
    ) as caught:
        run(tmp_path / "out", f"workers={workers}", sources=sources)
    assert "Traceback" not in str(caught.value)


def test_bad_validation_image_names_file_and_value(tmp_path):
    sources = (SOURCES[0], Squares("val", broken={"val0/0": lambda found: dataclasses.replace(found, semantic=None)}))
    with pytest.raises(DataError, match="val0/0: image has no labels"):
        run(tmp_path / "out", sources=sources)


def test_sources_that_do_not_go_together(tmp_path):
    other = Squares("val")
    other.classes = ("ground", "red", "blue")
    with pytest.raises(DataError, match="blue"):
        run(tmp_path / "out", sources=(SOURCES[0], other))
    with pytest.raises(DataError, match="0 training and 3 validation"):
        run(tmp_path / "out", sources=(Squares("train", count=0), SOURCES[1]))


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(GeoPretrainError, match=r"not finite at step .*lower optim\.lr"):
        run(tmp_path / "out", "optim.lr=1e30", "optim.steps=10")


def test_rooms_through_the_whole_way(tmp_path):
    options = "data.options={scenes: 1, val_scenes: 1, frames: 2, labelled: 2, width: 96, height: 72}"
    recipe = load_finetune_recipe("rooms_unet_r18", [options, "optim.steps=2", "network.width=8"])
    seen = []
    result = finetune(recipe, "scratch", tmp_path / "out", device="cpu", on_data=lambda *done: seen.append(done))
    assert result.data["data"]["source"] == "rooms"
    assert (result.data["data"]["train_images"], result.data["data"]["val_images"]) == (2, 2)
    assert seen[-1] == (1, 1)
