"""MoCo v2: the loss, groups and shuffling of keys, the queue, exact resume, two processes, ImageNet beside frames."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.contract import ImageContract
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.training import pretrain
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import World, forward_in_groups
from geo_pretrain.training.loop import make_optimizer
from geo_pretrain.training.losses.contrastive import queue_nce
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task, moco
from geo_pretrain.training.tasks.moco import groups_of
from tests.training.data.samples.test_single_images import image_folder
from tests.training.test_loop import Stop, logged, run_here, stop_at
from tests.two_processes import in_two_processes

TASK = {"name": "moco_v2", "matches": None, "queue": 10, "dim": 8, "momentum": 0.9, "resize": [60, 80]}
OPTIM = {"dampening": 0.0, "bn_momentum": "constant", "steps": 5}


@pytest.fixture
def tiny_moco(tiny_recipe):
    """Writes a tiny recipe of the task: six frames, crops of 32x40, batches of four."""

    def write(task=(), optim=(), **changes):
        return tiny_recipe(
            name="moco_v2_r18.tiny",
            task=TASK | dict(task),
            optim=OPTIM | dict(optim),
            **{"data": {"size": [32, 40], "units": "frames", "overlap": None}, "save_every": 2, **changes},
        )

    return write


@pytest.fixture
def task_and_batch(tiny_moco):
    def make(count=4, **changes):
        recipe = load_recipe(str(tiny_moco(**changes)))
        source = open_source(recipe.data)
        task = build_task(recipe)
        samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
        return task, samples.collate([samples[(0, k)] for k in range(count)])

    return make


def test_loss_is_cross_entropy_over_the_own_key_and_the_queue():
    generator = torch.Generator().manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 6, generator=generator).double(), dim=1) for n in (5, 5, 9))
    total = 0.0
    for q, k in zip(query, key, strict=True):
        negatives = sum(math.exp(float(q @ n) / 0.2) for n in queue)
        total -= math.log(math.exp(float(q @ k) / 0.2) / (math.exp(float(q @ k) / 0.2) + negatives))
    assert queue_nce(query, key, queue, temperature=0.2).item() == pytest.approx(total / 5, rel=1e-12)


def norm_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)).train()


def test_groups_are_normalized_apart_and_the_first_is_recorded():
    network, images = norm_network(), torch.randn(6, 2, 3, 8, 8)
    alone = copy.deepcopy(network)
    got = forward_in_groups(network, images, 3)
    for group in range(3):
        twin = copy.deepcopy(alone)
        rows = torch.cat([images[k] for k in (group, group + 3)])  # every third sample, both its images
        torch.testing.assert_close(got[[group, group + 3]].flatten(0, 1), twin(rows))
        if group == 0:
            for key, value in twin.state_dict().items():
                torch.testing.assert_close(network.state_dict()[key], value)
    assert network[1].num_batches_tracked == 1
    assert network[1].track_running_stats


@pytest.mark.parametrize(
    "samples, groups", [(1, 1), (2, 2), (4, 2), (8, 4), (9, 3), (10, 5), (12, 6), (32, 8), (35, 7), (256, 8)]
)
def test_one_process_cuts_its_samples_into_up_to_eight_groups(samples, groups):
    assert groups_of(samples) == groups


def test_samples_that_cannot_be_cut_are_told():
    with pytest.warns(UserWarning, match=r"11 samples cannot be cut .* groups of two or more(.|\n)*optim.batch"):
        assert groups_of(11) == 1


def test_groups_are_processes_where_several_train(task_and_batch):
    task, _ = task_and_batch()
    stated, _ = task_and_batch(task={"bn_groups": 1})
    alone, together = (World(0, size, torch.device("cpu")) for size in (1, 2))
    assert (task.bn_groups(4, alone), stated.bn_groups(4, alone)) == (2, 1)
    assert (task.bn_groups(4, together), stated.bn_groups(4, together)) == (1, 1)


def test_groups_of_different_sizes_are_refused(task_and_batch):
    task, batch = task_and_batch(task={"bn_groups": 3})
    with pytest.raises(RecipeError, match="bn_groups' is 3, accepted here is a number that divides the 4 samples"):
        task(batch)


@pytest.mark.parametrize("groups", [1, 2, None])
@pytest.mark.parametrize("per", [1, 2])
def test_a_step_written_out(task_and_batch, tmp_path, groups, per):
    """Keys: moved, permuted by the first sample's seed, dealt to groups, put back; queue and pointer after it.

    With two images a sample the queries of a group are those of its samples; keys are permuted image by image.
    """
    mixed = {} if per == 1 else {"mix": "batch", "images": str(image_folder(tmp_path / "in", 9))}
    task, batch = task_and_batch(task={"bn_groups": groups, **mixed})
    groups = groups or 2
    with torch.no_grad():
        for parameter in task.key.parameters():
            parameter.add_(0.01)
    before = copy.deepcopy(task)
    loss = task(batch)["moco"]

    images1, images2 = ([image for sample in batch[f"image{k}"] for image in sample] for k in (1, 2))
    twin, count = before.key, 4 * per
    assert len(images1) == count
    with torch.no_grad():
        for own, other in zip(twin.parameters(), before.query.parameters(), strict=True):
            own.copy_(0.9 * own + 0.1 * other)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(batch["seed"][0])).tolist()
    query, key = torch.zeros(count, 8), torch.zeros(count, 8)
    for group in range(groups):
        rows = [per * sample + image for sample in range(group, 4, groups) for image in range(per)]
        query[rows] = before.query(torch.stack([images1[k] for k in rows])).detach()
        shuffled = [order[k] for k in range(group, count, groups)]
        key[shuffled] = twin(torch.stack([images2[k] for k in shuffled])).detach()
    want = queue_nce(query, key, before.queue, temperature=0.2)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)  # single images a group round much
    torch.testing.assert_close(task.queue[:count], key, atol=2e-5, rtol=1e-3)
    assert torch.equal(task.queue[count:], before.queue[count:])
    assert task.queue_end == count
    for own, want in zip(task.key.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, want)
    loss.backward()
    assert all(parameter.grad is None for parameter in task.key.parameters())
    assert all(parameter.grad is not None for parameter in task.query.parameters())


def test_key_network_starts_as_the_query_network_and_is_not_optimized(task_and_batch):
    task, _ = task_and_batch()
    for key, value in task.query.state_dict().items():
        assert torch.equal(task.key.state_dict()[key], value)
    trained = make_optimizer(task.recipe.optim, task).param_groups[0]["params"]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in task.query.parameters()}
    torch.testing.assert_close(task.queue.norm(dim=1), torch.ones(10))


def test_an_image_is_the_mean_of_its_map_through_two_layers_at_length_one():
    torch.manual_seed(0)
    network = moco.Projector("resnet18", 8, 5).eval()
    images = torch.randn(3, 3, 64, 96)
    first, second = network.head[0], network.head[2]
    with torch.no_grad():
        (maps,) = network.encoder(images)
        for cells, got in zip(maps, network(images), strict=True):
            mean = torch.stack([channel.sum() / 6 for channel in cells])
            hidden = (first.weight @ mean + first.bias).clamp(min=0)
            want = second.weight @ hidden + second.bias
            torch.testing.assert_close(got, want / want.square().sum().sqrt())


def test_start_depends_on_the_seed_and_the_keys_start_from_the_start_weights_too(tiny_moco, tmp_path):
    path = tiny_moco()

    def built(*overrides):
        return build_task(load_recipe(str(path), overrides))

    one, again, other = built(), built(), built("seed=1")
    assert torch.equal(one.query.head[0].weight, again.query.head[0].weight)
    assert not torch.equal(one.query.head[0].weight, other.query.head[0].weight)
    assert not torch.equal(one.queue, other.queue)
    run_here(path, tmp_path / "start", ["optim.steps=1", "seed=7"])
    started = built(f"model.init={tmp_path / 'start'}")
    want = load_file(tmp_path / "start" / "encoder.safetensors")["conv1.weight"]
    assert torch.equal(started.query.encoder.conv1.weight, want)
    assert torch.equal(started.key.encoder.conv1.weight, want)


def test_the_query_network_is_what_is_exported(task_and_batch):
    task, _ = task_and_batch()
    with torch.no_grad():
        for tensor in task.key.state_dict().values():
            tensor.add_(1)
    weights = task.export().weights
    assert all(torch.equal(weights["encoder"][key], v) for key, v in task.query.encoder.state_dict().items())
    assert all(torch.equal(weights["heads"][f"head.{key}"], v) for key, v in task.query.head.state_dict().items())


def test_settings_reach_the_crops_and_the_loss(task_and_batch, tiny_moco):
    recipe = load_recipe(str(tiny_moco(task={"scale": [0.5, 0.6], "flip_prob": 0.25}, seed=11)))
    task = build_task(recipe)
    samples = task.dataset(None, [])
    assert (samples.scale, samples.flip_prob, samples.resize, samples.seed) == ((0.5, 0.6), 0.25, (60, 80), 11)
    losses = []
    for temperature in (0.2, 1.0):
        task, batch = task_and_batch(task={"temperature": temperature, "bn_groups": 1})
        loss = task(batch)["moco"]
        keys, fresh = task.queue[:4], build_task(task.recipe)
        with torch.no_grad():
            query = fresh.query(batch["image1"].flatten(0, 1))
        want = queue_nce(query, keys, fresh.queue, temperature=temperature)
        assert loss.item() == pytest.approx(want.item(), rel=1e-4)
        losses.append(loss.item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_bf16_changes_the_networks_and_not_the_precision_of_the_loss(task_and_batch):
    # Of few cells the norms would blow rounding up.
    whole = {"task": {"bn_groups": 1}, "data": {"size": [96, 128], "units": "frames", "overlap": None}}
    (task, batch), (low, _) = task_and_batch(**whole), task_and_batch(**whole, precision="bf16")
    with torch.no_grad():
        full, half = task(batch)["moco"], low(batch)["moco"]
    assert half.dtype == low.queue.dtype == torch.float32
    torch.testing.assert_close(low.queue.norm(dim=1), torch.ones(10))  # normalized in full precision
    assert half != full
    assert half.item() == pytest.approx(full.item(), rel=0.05)


def test_queue_goes_round(task_and_batch):
    task, _ = task_and_batch()
    rows = torch.arange(24.0)[:, None].expand(-1, 8)
    for begin in range(0, 24, 4):
        task.enqueue(rows[begin : begin + 4])
    assert task.queue[:, 0].tolist() == [20, 21, 22, 23, 14, 15, 16, 17, 18, 19]
    assert task.queue_end == 4
    task.enqueue(rows[:13])  # more than it holds: the last ten stay
    assert sorted(task.queue[:, 0].tolist()) == list(range(3, 13))


def test_micro_batches_of_a_step_see_one_queue_and_one_key_network(task_and_batch):
    task, batch = task_and_batch(optim={"accumulate": 2})
    queue, keys = task.queue.clone(), [p.clone() for p in task.key.parameters()]
    with torch.no_grad():
        for parameter in task.query.parameters():
            parameter.add_(0.01)
    task(batch)
    assert torch.equal(task.queue, queue)
    moved = [p.clone() for p in task.key.parameters()]
    assert not torch.equal(moved[0], keys[0])
    task(batch)
    assert task.queue_end == 8
    assert all(torch.equal(p, q) for p, q in zip(task.key.parameters(), moved, strict=True))
    assert task.pending == []


def tensors(folder):
    return {
        f"{role}.{key}": value
        for role in ("encoder", "heads")
        for key, value in load_file(folder / f"{role}.safetensors").items()
    }


def test_resumed_run_is_the_same_and_its_folder_opens(tmp_path, tiny_moco):
    run_here(tiny_moco(), tmp_path / "whole")
    with pytest.raises(Stop):
        run_here(tiny_moco(), tmp_path / "broken", on_step=stop_at(3))
    run_here(tiny_moco(), tmp_path / "broken")
    whole, broken = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    found = read_checkpoint(tmp_path / "whole")
    assert (found.arch.name, found.arch.args) == ("resnet", {"depth": 18, "width": 8})
    assert found.contract == ImageContract(size=(32, 40), interpolation="bilinear")
    assert verify(tmp_path / "whole").passed
    encoder = load_backbone(tmp_path / "whole")
    assert encoder.load_report.coverage == 1
    assert torch.equal(encoder.state_dict()["conv1.weight"], whole["encoder.conv1.weight"])
    assert set(whole) - {f"encoder.{key}" for key in encoder.state_dict()} == {
        f"heads.head.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }


def run_in_two_processes(recipe, folder):
    """Train into `folder`/two."""

    def work(rank):
        source = open_source(recipe.data)
        pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
        pretrain.train(recipe, folder / "two", source, pairs, World(rank, 2, torch.device("cpu")))

    in_two_processes(work, folder)


@pytest.mark.parametrize("mix", ["none", "batch"])
def test_two_processes_equal_one_with_two_groups(tmp_path, tiny_moco, mix):
    """Losses, weights and running statistics: shuffling across processes is shuffling across groups.

    With one image a sample, and with two.
    """
    task = {} if mix == "none" else {"mix": mix, "images": str(image_folder(tmp_path / "in", 9))}
    run_in_two_processes(load_recipe(str(tiny_moco(task=task))), tmp_path)
    run_here(tiny_moco(task={"bn_groups": 2, **task}), tmp_path / "groups")
    run_here(tiny_moco(task={"bn_groups": 1, **task}), tmp_path / "whole")
    two, groups, whole = (tensors(tmp_path / name) for name in ("two", "groups", "whole"))
    for key, value in groups.items():
        torch.testing.assert_close(value, two[key], atol=2e-5, rtol=1e-4, msg=key)
    first, second = ([line["moco"] for line in logged(tmp_path / name)] for name in ("two", "groups"))
    assert first == pytest.approx(second, rel=1e-4)
    assert not torch.allclose(groups["encoder.conv1.weight"], whole["encoder.conv1.weight"], atol=1e-3)


@pytest.mark.parametrize("mix, images", [("combine", 13), ("batch", 9)])
def test_imagenet_beside_frames(tmp_path, tiny_moco, mix, images):
    """Epochs count what the mixture has, ImageNet's terms reach the license, a step holds what the recipe says."""
    folder = image_folder(tmp_path / "in", 13 - 6 if mix == "combine" else 9)
    seen = []
    path = tiny_moco(
        task={"mix": mix, "images": str(folder)},
        optim={"steps": None, "epochs": 2, "schedule": "cosine_epoch"},
    )
    checkpoint = run_here(path, tmp_path / "out", on_step=seen.append)
    assert len(seen) == math.ceil(2 * images / 4)
    assert ("ImageNet", "LicenseRef-ImageNet-terms") in checkpoint.license.datasets
    assert len(checkpoint.license.datasets) == 2
    assert checkpoint.license.base_model == "none (random weights)"
    assert checkpoint.provenance["data"]["pairs"] == 6
    assert checkpoint.provenance["data"]["images"] == images - (6 if mix == "combine" else 0)


def test_a_run_is_not_continued_with_other_images(tmp_path, tiny_moco):
    folder = image_folder(tmp_path / "in", 9)
    path = tiny_moco(task={"mix": "batch", "images": str(folder)})
    with pytest.raises(Stop):
        run_here(path, tmp_path / "out", on_step=stop_at(3))
    image = min(folder.rglob("*.*"))
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(RecipeError, match="data have changed"):
        run_here(path, tmp_path / "out")
    image.write_bytes(content[:-1] + b"  ")  # one of that name again, and another file
    with pytest.raises(RecipeError, match="data have changed"):
        run_here(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["moco_v2_in_sn_combine_r50", "moco_v2_in_sn_mixing_r50"])
def test_toy_runs_need_no_imagenet(name):
    small = ["model.width=8", "optim.batch=2", "data.options={scenes: 1, frames: 3, width: 96, height: 72}"]
    recipe = load_recipe(name, small, toy=True)
    source = open_source(recipe.data)
    task = build_task(recipe)
    samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
    assert samples.own_data() == {}
    assert torch.isfinite(task(samples.collate([samples[(0, k)] for k in range(2)]))["moco"])


def test_a_mixed_batch_alternates_frames_and_images(task_and_batch, tmp_path):
    folder = image_folder(tmp_path / "in", 9)
    task, batch = task_and_batch(task={"mix": "batch", "images": str(folder), "bn_groups": 2})
    assert batch["image1"].shape == (4, 2, 3, 32, 40)
    assert task.views == 2
    task(batch)
    assert task.queue_end == 8  # frames and images: every one is a key


def test_imagenet_that_is_not_there_is_told_before_training(tmp_path, tiny_moco):
    with pytest.raises(RecipeError, match=r"'task\.images' is missing"):
        run_here(tiny_moco(task={"mix": "combine"}), tmp_path / "out")
    with pytest.raises(DataError, match="no such folder"):
        run_here(tiny_moco(task={"mix": "batch", "images": str(tmp_path / "none")}), tmp_path / "out")


@pytest.mark.parametrize(
    "override, part",
    [
        ("task.queue=0", "'task.queue' is 0"),
        ("task.bn_groups=0", "'task.bn_groups' is 0"),
        ("task.momentum=1", "'task.momentum' is 1.0"),
        ("task.scale=[0.5, 1.5]", "'task.scale'"),
        ("task.resize=[0, 5]", "'task.resize'"),
        ("task.mix=half", "'task.mix' is 'half'"),
    ],
)
def test_wrong_settings_are_named(tiny_moco, override, part):
    with pytest.raises(RecipeError, match=part):
        build_task(load_recipe(str(tiny_moco()), [override]))


def test_released_settings():
    """methods.md 3.7 and 5.1."""
    names = ("sup_in_sn", "unsup_in_sn", "in_sn_combine", "in_sn_mixing")
    for name, init, mix in zip(
        names, ("imagenet", "moco_v2", "scratch", "scratch"), ("none", "none", "combine", "batch"), strict=True
    ):
        recipe = load_recipe(f"moco_v2_{name}_r50")
        with torch.device("meta"):
            task = build_task(load_recipe(f"moco_v2_{name}_r50", ["model.init=scratch"]))
        config, optim = task.config, recipe.optim
        images = optim.batch * task.views
        assert (images, optim.lr, optim.momentum, optim.weight_decay, optim.epochs) == (256, 0.03, 0.9, 1e-4, 100)
        assert (optim.schedule, optim.bn_momentum, optim.dampening) == ("cosine_epoch", "constant", 0)
        assert (config.dim, config.queue, config.momentum, config.temperature) == (128, 65536, 0.999, 0.2)
        assert (config.mix, recipe.model.init, recipe.data.size) == (mix, init, (224, 224))
        assert (config.scale, config.flip_prob, config.resize) == ((0.2, 1.0), 0.5, (240, 320))
        shapes = [tuple(p.shape) for key, p in task.query.head.named_parameters() if "weight" in key]
        assert shapes == [(2048, 2048), (128, 2048)]
        augment = recipe.data.augment
        assert (augment.jitter, augment.jitter_prob, augment.grayscale_prob) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
        assert (augment.blur_prob, augment.blur_radius) == (0.5, (0.1, 2.0))
