"""Fine-tuning in several processes: what one process computes, in shares; batches of the papers; SyncBN."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from geo_pretrain.adapters.common import freeze_stages
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.batchnorm import synchronize_batchnorm
from geo_pretrain.training.data.samples.sampler import MicroBatches
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.folder import read_result
from geo_pretrain.training.finetune.task import share_of
from geo_pretrain.training.finetune_recipe import KINDS, load_finetune_recipe
from geo_pretrain.training.loop import check_batch
from geo_pretrain.training.runs import STATE
from geo_pretrain.training.schedule import set_bn_momentum
from tests.training.finetune.sweeps import Squares
from tests.training.finetune.test_detection import Shapes, task_of
from tests.training.finetune.test_run import SOURCES, Stop, assert_same_run, run, stop_at, weights
from tests.training.finetune.test_segmentation import recipe_for, task_for
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.usefixtures("quick_weights")
CPU = torch.device("cpu")
BATCH = ("optim.batch=4", "optim.lr=0.02", "data.augment.flip=0.5", "workers=0")


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("scannet_unet_r18", ("data.augment.blur=0.5",)),
        (
            "rooms_pspnet_r18",
            ("data.size=[32, 32]", "optim.steps=3", "save_every=3", "evaluate.every_steps=3", "network.aux=0.4"),
        ),  # has dropout
    ],
)
def test_two_processes_equal_two_accumulation_steps(tmp_path, name, overrides):
    """Both see the same micro-batches and draw the same dropout, so all parameters agree but for rounding."""
    run(tmp_path / "accumulated", *BATCH, *overrides, "optim.accumulate=2", name=name)
    small = name == "scannet_unet_r18"  # a third run, for what accumulation changes, is had of the small network alone
    if small:
        run(tmp_path / "whole", *BATCH, *overrides, name=name)

    def work(rank):
        result = run(tmp_path / "two", *BATCH, *overrides, name=name, world=World(rank, 2, CPU))
        assert result.data == read_result(tmp_path / "two").data

    in_two_processes(work, tmp_path)
    accumulated, two = (weights(tmp_path / name) for name in ("accumulated", "two"))
    whole = weights(tmp_path / "whole") if small else {}
    differ = []
    for key, value in accumulated.items():
        if "running" not in key and "tracked" not in key:  # the BatchNorm statistics are those of one process
            torch.testing.assert_close(value, two[key], atol=2e-5, rtol=1e-4, msg=key)
            differ.append(small and not torch.allclose(value, whole[key], atol=1e-4))
    assert any(differ) == small
    logs = [
        [line for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) if "lr" in line]
        for name in ("accumulated", "two")
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, len(logs[1]) + 1))
    for one, other in zip(*logs, strict=True):
        assert one.pop("precision", None) == other.pop("precision", None)
        assert one == pytest.approx(other, rel=1e-3)


def test_a_run_of_two_processes_continues_exactly_and_only_with_two(tmp_path):
    overrides = (*BATCH, "optim.steps=6", "evaluate.every_steps=3", "save_every=2")

    def work(rank):
        world = World(rank, 2, CPU)
        run(tmp_path / "whole", *overrides, world=world)
        with pytest.raises(Stop):
            run(tmp_path / "broken", *overrides, world=world, on_step=stop_at(5))
        run(tmp_path / "broken", *overrides, world=world)

    in_two_processes(work, tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(Stop):
        run(tmp_path / "one", *overrides, on_step=stop_at(5))
    state = torch.load(tmp_path / "one.run" / STATE, weights_only=True)
    state["identity"]["world"] = 2
    torch.save(state, tmp_path / "one.run" / STATE)
    with pytest.raises(RecipeError, match="used 2 processes, not 1"):
        run(tmp_path / "one", *overrides)


@pytest.mark.parametrize("released", [False, True])
def test_two_processes_measure_what_one_does(tmp_path, released):
    squares = Squares("val", count=7)
    for name, task, source in (
        ("squares", task_for(recipe_for("scannet_unet_r18", "evaluate.batch=2")), squares),
        ("shapes", task_of(match_released_code=released), Shapes("val", 7)),
    ):
        alone = copy.deepcopy(task).evaluate(source, source.ids()).to_dict()

        def work(rank, name=name, task=task, source=source):
            found = task.evaluate(source, source.ids(), World(rank, 2, CPU)).to_dict()
            (tmp_path / f"{name}{rank}.json").write_text(json.dumps(found))

        folder = tmp_path / name
        folder.mkdir()
        in_two_processes(work, folder)
        for rank in (0, 1):
            assert json.loads((tmp_path / f"{name}{rank}.json").read_text()) == json.loads(json.dumps(alone)), name


def test_batches_to_be_measured_do_not_depend_on_the_number_of_processes():
    dealt = [share_of(list("abcdefg"), 2, World(rank, 3, CPU)) for rank in range(3)]
    assert dealt == [[["a", "b"], ["g"]], [["c", "d"]], [["e", "f"]]]


@pytest.mark.parametrize(
    "name, processes, accumulate, own",
    [
        ("scannet_unet_r50", 8, 1, 8),
        ("scannet_unet_r50", 1, 8, 8),
        ("coco_mask_rcnn_r50", 8, 1, 2),
        ("coco_mask_rcnn_r50", 4, 2, 2),
    ],
)
def test_batches_of_the_papers_are_dealt_to_processes_and_accumulation_steps(name, processes, accumulate, own):
    recipe = load_finetune_recipe(name, [f"optim.accumulate={accumulate}", "optim.sync_bn=true"])
    assert recipe.optim.batch == {"scannet_unet_r50": 64, "coco_mask_rcnn_r50": 16}[name]
    assert recipe.optim.sync_bn
    keys = []
    for rank in range(processes):
        check_batch(recipe.optim.batch, recipe.optim.accumulate, World(rank, processes, CPU))
        dealt = list(
            MicroBatches(
                640,
                batch=recipe.optim.batch,
                accumulate=accumulate,
                rank=rank,
                world=processes,
                start=0,
                steps=1,
                seed=0,
            )
        )
        assert [len(micro_batch) for micro_batch in dealt] == [own] * accumulate
        keys += [key for micro_batch in dealt for key in micro_batch]
    assert len(set(keys)) == recipe.optim.batch


def test_batch_that_cannot_be_dealt_evenly_is_refused():
    with pytest.raises(RecipeError, match="multiple of accumulate"):
        recipe_for("scannet_unet_r18", "optim.batch=4", "optim.accumulate=3")
    with pytest.raises(RecipeError, match=r"'optim\.batch' is 4, accepted is a multiple of processes x accumulate = 6"):
        check_batch(4, 2, World(0, 3, torch.device("cpu")))
    with pytest.raises(RecipeError, match=r"optim\.accumulate.*from 1 up"):
        recipe_for("scannet_unet_r18", "optim.accumulate=0")


@pytest.mark.parametrize("kind", [*KINDS["segmentation"], "mask_rcnn"])
def test_every_trained_parameter_is_reached_by_the_losses(kind):
    """Processes that train together wait for the gradients of all of them."""
    if kind == "mask_rcnn":
        task, source = task_of(), Shapes()
        ids = ["train3", "train3"]  # images without an object
    else:
        options = ["data.size=[64, 64]", f"network.kind={kind}", "network.width=64"]
        options += ["network.output_stride=16"] if "deeplab" in kind else []
        task, source = task_for(recipe_for("rooms_unet_r18", *options, toy=False)), SOURCES[0]
        ids = source.ids()[:2]
    task.module.train()
    generator = torch.Generator().manual_seed(0)
    losses = task.losses(task.collate([task.sample(source.load(id), generator) for id in ids]))
    torch.stack(list(losses.values())).sum().backward()
    missed = [key for key, p in task.module.named_parameters() if p.requires_grad and p.grad is None]
    assert not missed


def test_sync_bn_exchanges_what_is_trained_and_keeps_the_keys():
    network = task_for(recipe_for("scannet_unet_r18")).module
    freeze_stages(network.network, 2)
    keys, frozen = list(network.state_dict()), dict(network.named_modules())["network.encoder.layer1.0.bn1"]
    weight = network.network.encoder.layer3[0].bn1.weight
    synchronize_batchnorm(network, World(0, 1, CPU))
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in network.modules())
    synchronize_batchnorm(network, World(0, 2, torch.device("cuda", 0)))
    layers = dict(network.named_modules())
    assert isinstance(layers["network.encoder.layer3.0.bn1"], nn.SyncBatchNorm)
    assert layers["network.encoder.layer3.0.bn1"].weight is weight
    assert layers["network.encoder.layer1.0.bn1"] is frozen
    assert not isinstance(frozen, nn.SyncBatchNorm)
    assert list(network.state_dict()) == keys
    set_bn_momentum(network, 0.3)
    assert layers["network.encoder.layer3.0.bn1"].momentum == 0.3
    network.eval()
    assert network(torch.zeros(1, 3, 48, 64))[0].shape[0] == 1
