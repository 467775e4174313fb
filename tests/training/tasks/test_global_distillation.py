"""Global KD, Gupta et al. and CRD: losses against released code and loops, what is pooled, what the queue holds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from geo_pretrain.backbones.sr_unet import SRUNet, encoder_maps
from geo_pretrain.errors import DataError, RecipeError
from geo_pretrain.loading import load_backbone, verify
from geo_pretrain.sparse import SparseTensor
from geo_pretrain.sparse.functional import global_pool
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.loop import make_optimizer
from geo_pretrain.training.losses.contrastive import queue_nce
from geo_pretrain.training.losses.distillation import kl_distillation, l2_distillation
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.training.tasks import build_task
from tests.training.losses.test_contrastive import close
from tests.training.tasks.test_moco import run_in_two_processes
from tests.training.tasks.test_ppkt import tiny_batch
from tests.training.test_loop import Stop, logged, run_here, stop_at
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.usefixtures("quick_weights")  # teachers are of real size

TASKS = {
    "global_kd": {"targets": "features"},
    "gupta": {},
    "crd": {"queue": 8, "dim": 16},
    "crd_memory": {"queue": 5, "dim": 16, "negatives": "memory", "memory": 6},
}
DECODER = ("convtr", "bntr", "block5.", "block6.", "block7.", "block8.", "final.")


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")


def crd_task(recipe_writer):
    """The golden case of CRD as a task: its memories and embeddings put in place of random ones."""
    task, _ = tiny_batch(recipe_writer, "crd", {"queue": 20, "dim": 16, "negatives": "memory", "memory": 64})
    return task


def test_crd_with_a_memory_is_the_released_code(golden, tiny_recipe):
    task = crd_task(tiny_recipe)
    for side, name in (("student", "s"), ("teacher", "t")):
        getattr(task, f"memory_{side}").copy_(golden[f"crd.memory_{name}"])
    f_s = golden["crd.f_s"].clone().requires_grad_()
    student, teacher = (
        F.normalize(F.linear(f, golden[f"crd.embed_{n}.weight"], golden[f"crd.embed_{n}.bias"]), dim=1)
        for f, n in ((f_s, "s"), (golden["crd.f_t"], "t"))
    )
    loss = task.memory_loss(student, teacher, golden["crd.contrast_idx"])
    loss.backward()
    close(loss.detach(), golden["crd.loss"][0], 1e-5)
    close(f_s.grad, golden["crd.grad_f_s"], 2e-5)
    constants = sorted([task.constant_student.item(), task.constant_teacher.item()])
    assert constants == pytest.approx(sorted([golden["crd.z_s"].item(), golden["crd.z_t"].item()]), rel=1e-5)
    task.remember(golden["crd.idx"], student.detach(), teacher.detach())
    close(task.memory_student, golden["crd.memory_s_after"], 1e-5)
    close(task.memory_teacher, golden["crd.memory_t_after"], 1e-5)
    first = float(task.constant_student)
    task.memory_loss(teacher.detach(), student.detach(), golden["crd.contrast_idx"])
    assert float(task.constant_student) == first  # set once


def test_the_encoder_alone_computes_what_the_whole_network_does():
    torch.manual_seed(0)
    network = SRUNet("18A", width=8).eval()
    coords = torch.cat([torch.tensor([[0, 0, 0, 0], [1, 5, 5, 5]]), torch.randint(-9, 9, (300, 4))]).int()
    coords[:, 0] = coords[:, 0].abs() % 2
    x = SparseTensor(coords, torch.randn(len(coords), 3))
    with torch.no_grad():
        alone, whole = encoder_maps(network, x)[-1], network.pyramid(x)[-1]
        assert torch.equal(alone.sorted_feats, whole.sorted_feats)
        for element in (0, 1):
            mean = whole.feats[whole.coords[:, 0] == element].mean(dim=0)
            torch.testing.assert_close(global_pool(alone)[element], mean)


@pytest.mark.parametrize("name", TASKS)
def test_every_weight_that_is_trained_is_reached_and_the_teacher_is_not(tiny_recipe, name):
    task, batch = tiny_batch(tiny_recipe, name.partition("_m")[0], TASKS[name])
    task.train()
    before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    (loss,) = task(batch).values()
    assert loss.item() > 0
    loss.backward()
    frozen = ("teacher.", *(f"backbone.{part}" for part in DECODER))
    for key, parameter in task.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad) == key.startswith(frozen), key
    assert task.backbone.block4[0].conv1.kernel.grad.abs().sum() > 0
    assert task.backbone.conv0p1s1.kernel.grad.abs().sum() > 0
    groups = make_optimizer(task.recipe.optim, task).param_groups
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in task.parameters() if p.grad is not None}
    assert task.head.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in task.teacher.state_dict().items())


def test_losses_of_a_batch_are_those_of_pooled_features(tiny_recipe):
    for name, settings, loss in (
        ("gupta", {}, l2_distillation),
        ("gupta", {"form": "norm"}, partial(l2_distillation, form="norm")),
        ("global_kd", {}, kl_distillation),
        ("global_kd", {"temperature": 3.0}, partial(kl_distillation, temperature=3.0)),
    ):
        task, batch = tiny_batch(tiny_recipe, name, TASKS[name] | settings)
        task.eval()
        with torch.no_grad():
            image = task.teacher.network(batch["image"])[-1].mean(dim=(2, 3))
            x = SparseTensor(batch["coords"], batch["feats"])
            student = task.head(global_pool(task.backbone.pyramid(x)[-1]))
            (got,) = task(batch).values()
        assert got.item() == pytest.approx(loss(student, image).item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_crd_of_a_batch_contrasts_unit_features_with_the_queue_or_drawn_rows(tiny_recipe, temperature):
    for name in ("crd", "crd_memory"):
        task, batch = tiny_batch(tiny_recipe, "crd", TASKS[name] | {"temperature": temperature, "memory_momentum": 0.9})
        task.eval()
        with torch.no_grad():
            image = task.teacher.network(batch["image"])[-1].mean(dim=(2, 3))
            cloud = global_pool(task.backbone.pyramid(SparseTensor(batch["coords"], batch["feats"]))[-1])
            student, teacher = (F.normalize(f, dim=1) for f in (task.head(cloud), task.key(image)))
            (got,) = task(batch).values()
            if name == "crd":
                want = queue_nce(student, teacher, task.queue, temperature=temperature or 0.07)
            else:
                drawn = [torch.randint(6, (5,), generator=torch.Generator().manual_seed(s)) for s in batch["seed"]]
                rows = torch.stack([torch.tensor([own, *d]) for own, d in zip(batch["index"], drawn, strict=True)])
                want = task.memory_loss(student, teacher, rows)
                assert task.temperature == (temperature or 0.07)
                mixed = 0.9 * task.memory_student[4] + 0.1 * student[1]
                task.remember(torch.tensor([4]), student[1:2], teacher[1:2])
                torch.testing.assert_close(task.memory_student[4], mixed / mixed.norm())
        assert got.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["ppkt", "ppkd", "gupta"])
def test_weights_are_drawn_by_the_recipes_seed(tiny_recipe, name):
    first, again, other = (
        build_task(load_recipe(str(tiny_recipe(name)), [f"seed={seed}"])).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    for key in ("backbone.conv0p1s1.kernel", "teacher.network.conv1.weight"):
        assert not torch.equal(first[key], other[key])


def test_queue_takes_the_newest_keys_in_turn(tiny_recipe):
    task, batch = tiny_batch(tiny_recipe, "crd", {"queue": 8, "dim": 16})
    task.train()
    start = task.queue.clone()
    with torch.no_grad():
        keys = F.normalize(task.key(task.teacher_maps(batch).mean(dim=(2, 3))), dim=1)
        for _ in range(3):
            task(batch)
    assert int(task.pointer) == 9 % 8
    torch.testing.assert_close(task.queue[[0, 1, 2]], torch.stack([keys[2], keys[1], keys[2]]))
    torch.testing.assert_close(task.queue[[3, 4, 5, 6, 7]], keys[[0, 1, 2, 0, 1]])
    assert not torch.equal(task.queue, start)
    task.eval()
    with torch.no_grad():
        task(batch)
    assert int(task.pointer) == 1  # evaluation leaves it


@pytest.mark.parametrize("name", ["global_kd", "crd", "crd_memory"])
def test_stopped_run_continues_bit_for_bit_and_its_folder_opens(tmp_path, tiny_recipe, name):
    path = tiny_recipe(name.partition("_m")[0], task=TASKS[name] | {"resize": [1.0, 1.0]}, optim={"steps": 4})
    run_here(path, tmp_path / "whole", ["optim.accumulate=2"])
    with pytest.raises(Stop):
        run_here(path, tmp_path / "broken", ["optim.accumulate=2", "save_every=2"], on_step=stop_at(3))
    run_here(path, tmp_path / "broken", ["optim.accumulate=2", "save_every=2"])
    for role in ("model", "heads"):
        first, second = (load_file(tmp_path / folder / f"{role}.safetensors") for folder in ("whole", "broken"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    sides = ("head",) if name == "global_kd" else ("head", "key")  # no queue, no memory
    assert set(first) == {f"{side}.{kind}" for side in sides for kind in ("weight", "bias")}
    assert logged(tmp_path / "whole") == logged(tmp_path / "broken")
    assert verify(tmp_path / "whole").passed
    assert load_backbone(tmp_path / "whole").normalize


def test_wrong_settings_are_told(tiny_recipe):
    with pytest.raises(
        RecipeError, match=r"has no classifier; accepted: --set task.teacher=imagenet.*targets=features"
    ):
        tiny_batch(tiny_recipe, "global_kd", {})
    with pytest.raises(RecipeError, match=r"'task.memory' is None, accepted is the number of frames"):
        tiny_batch(tiny_recipe, "crd", {"negatives": "memory"})
    with pytest.raises(RecipeError, match=r"'task.memory_momentum' is 1.0, accepted is a number from 0 to below 1"):
        tiny_batch(tiny_recipe, "crd", {"memory_momentum": 1.0})
    with pytest.raises(RecipeError, match=r"'task.temperature' is 0.0, accepted is a number above 0"):
        tiny_batch(tiny_recipe, "crd", {"temperature": 0.0})
    with pytest.raises(DataError, match=r"'task.memory' is 5, but source 'seven_scenes' has 6 frames.*task.memory=6"):
        tiny_batch(tiny_recipe, "crd", {"negatives": "memory", "memory": 5})


def test_a_classifier_brings_its_classes(tiny_recipe, tmp_path, monkeypatch):
    import torchvision

    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    torch.manual_seed(0)
    network = torchvision.models.resnet18().eval()
    torch.save(network.state_dict(), place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    task, batch = tiny_batch(tiny_recipe, "global_kd", {"teacher": "imagenet", "teacher_encoder": "resnet18"})
    task.eval()
    with torch.no_grad():
        (got,) = task(batch).values()
        student = task.head(global_pool(task.backbone.pyramid(SparseTensor(batch["coords"], batch["feats"]))[-1]))
        want = kl_distillation(student, network(batch["image"]))
    assert student.shape == (3, 1000)
    assert task.heads().keys() == {"head.weight", "head.bias"}  # torchvision's layer is not ours to keep
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["gupta", "crd"])
def test_the_decoder_keeps_its_random_weights_under_weight_decay(tmp_path, tiny_recipe, name):
    path = tiny_recipe(name, task=TASKS[name], optim={"steps": 3, "weight_decay": 0.5, "lr": 0.1})
    drawn = build_task(load_recipe(str(path))).backbone.state_dict()
    run_here(path, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made.keys() == drawn.keys()
    for key, value in made.items():  # running statistics among them, which belong to what is trained
        assert torch.equal(value, drawn[key]) == key.startswith(DECODER), key


def test_processes_share_one_queue_and_one_memory(tmp_path, tiny_recipe):
    """Rows of two processes are those of one with the whole batch, in its order: sample k is process k % 2's."""

    names = ("crd", "crd_memory")
    recipes = {name: load_recipe(str(tiny_recipe("crd", task=TASKS[name]))) for name in names}  # one file, read at once

    def state(recipe, rank, world):
        task, frames = build_task(recipe), list(range(4))
        task.train()
        task.backbone.eval()  # a sample's features then do not depend on the others of its part
        source = open_source(recipe.data)
        samples = task.dataset(source, find_pairs(source, recipe.data, skips=SkippedFrames()))
        with torch.no_grad():
            for _ in range(2):
                task(samples.collate([samples[(0, k)] for k in frames[rank::world]]))
        return {key: value for key, value in task.named_buffers(recurse=False) if not key.startswith("constant")}

    def work(rank):
        torch.save([state(recipes[name], rank, 2) for name in names], tmp_path / f"{rank}.pt")

    in_two_processes(work, tmp_path)
    for number, name in enumerate(names):
        alone = state(recipes[name], 0, 1)
        assert alone.keys() == ({"queue", "pointer"} if name == "crd" else {"memory_student", "memory_teacher"})
        for rank in range(2):
            shared = torch.load(tmp_path / f"{rank}.pt")[number]
            for key, value in alone.items():
                torch.testing.assert_close(shared[key], value, atol=1e-5, rtol=1e-4, msg=f"{name} {rank} {key}")


def test_a_frozen_decoder_is_no_trouble_for_two_processes(tmp_path, tiny_recipe):
    path = tiny_recipe("crd", task=TASKS["crd"], optim={"steps": 2, "weight_decay": 0.5}, save_every=1)
    run_in_two_processes(load_recipe(str(path)), tmp_path)
    drawn = build_task(load_recipe(str(path))).backbone.state_dict()
    made = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(value, drawn[key]) == key.startswith(DECODER) for key, value in made.items())
    assert all(np.isfinite(line["crd"]) for line in logged(tmp_path / "two"))
