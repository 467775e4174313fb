"""`precision: auto`: bf16 where all processes compute it faster; a run keeps what it began with and says it."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from geo_pretrain.sparse import backend
from geo_pretrain.training import precision
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.run import finetune
from geo_pretrain.training.finetune_recipe import OVERLAYS, load_finetune_recipe
from geo_pretrain.training.precision import settle_precision
from geo_pretrain.training.pretrain import run_recipe
from geo_pretrain.training.recipe import RECIPES, TOY, changes, list_recipes, load_recipe
from geo_pretrain.training.runs import RunFolder
from geo_pretrain.training.tasks import build_task
from geo_pretrain.yaml_text import read_yaml
from tests.training.finetune.test_segmentation import Squares, recipe_for

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MEASURED = precision.bf16_is_faster  # of this machine; in tests it is False


class Pair(World):
    """Two processes of which the other one computes bf16 faster."""

    def all_gather_object(self, value):
        return [value, True]


@pytest.fixture
def machine(monkeypatch):
    """Sets whether this machine computes bf16 faster."""
    return lambda answer: monkeypatch.setattr(precision, "bf16_is_faster", lambda device, points=False: answer)


class Stop(Exception):
    pass


def stop_at(step):
    def callback(info):
        if info.step == step:
            raise Stop

    return callback


def chosen(folder):
    """What a finished run says: in its recipe, and in the first line of its log alone."""
    first, *others = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert not any("precision" in line for line in others)
    return yaml.safe_load((folder / "recipe.yaml").read_text())["precision"], first.get("precision")


def test_rooms_and_toys_leave_it_to_the_machine():
    rooms = [RECIPES / f"{name}.yaml" for name in list_recipes() if name.partition(".")[2] in ("rooms", "rooms_toy")]
    overlays = [TOY, *OVERLAYS.glob("toy_*.yaml")]
    assert min(len(rooms), len(overlays)) > 5
    assert {read_yaml(path)["precision"] for path in rooms + overlays} == {"auto"}


def test_all_processes_compute_what_all_compute_faster(machine):
    recipe = load_recipe("pri3d_view_r18.rooms")
    machine(True)
    assert settle_precision(recipe, ALONE).precision == settle_precision(recipe, Pair(0, 2, CPU)).precision == "bf16"
    machine(False)
    assert settle_precision(recipe, ALONE).precision == settle_precision(recipe, Pair(0, 2, CPU)).precision == "fp32"
    for said in ("fp32", "bf16"):
        stated = load_recipe("pri3d_view_r18.rooms", [f"precision={said}"])
        assert settle_precision(stated, Pair(0, 2, CPU), "precision: fp32") is stated
        assert settle_precision(recipe, ALONE, f"precision: {said}").precision == said
    for nothing in ("precision: auto", "seed: 1", "precision: [", "precision: {}"):
        assert settle_precision(recipe, ALONE, nothing).precision == "fp32"


def test_a_processor_is_asked_for_products_of_bf16(monkeypatch):
    for amx, avx512, faster in ((False, False, False), (True, False, True), (False, True, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: avx512)
        assert MEASURED(CPU) is faster
    for kernels in (False, True):
        monkeypatch.setattr(backend, "_multiplies_bf16", lambda kernels=kernels: kernels)
        with backend.use("plain"):
            assert not MEASURED(CPU, points=True)
        assert MEASURED(CPU, points=True) is (kernels and backend.is_fast(torch.zeros(1)))
    assert not MEASURED(torch.device("mps"))


def test_recipes_for_points_are_told_from_those_for_images():
    points, images = "pointcontrast_nce_srunet34.rooms", "pri3d_view_geo_r18.rooms"
    assert [precision.is_for_points(load_recipe(name)) for name in (points, images)] == [True, False]
    assert precision.is_for_points(load_finetune_recipe("rooms3d_votenet"))
    assert not precision.is_for_points(load_finetune_recipe("rooms_unet_r18"))


def test_a_pretraining_that_goes_on_elsewhere_keeps_what_it_began_with(tiny_recipe, tmp_path, machine):
    recipe = load_recipe(str(tiny_recipe(optim={"steps": 3}, save_every=1)), ["precision=auto"])
    assert RunFolder(tmp_path / "out").saved_recipe() is None
    machine(False)

    def stop(stage, done, total, detail):
        if (stage, done) == (f"training {recipe.name}", 2):
            raise Stop

    with pytest.raises(Stop):
        run_recipe(recipe, tmp_path / "out", ALONE, report=stop)
    machine(True)
    run_recipe(recipe, tmp_path / "out", ALONE)
    assert chosen(tmp_path / "out") == ("fp32", "fp32")


def test_a_finetuning_that_goes_on_elsewhere_keeps_what_it_began_with(tmp_path, machine):
    sources = Squares("train"), Squares("val", count=3)
    recipe = recipe_for("scannet_unet_r18", "precision=auto", "optim.steps=3", "save_every=1")
    machine(False)
    with pytest.raises(Stop):
        finetune(recipe, "scratch", tmp_path / "out", sources=sources, device="cpu", on_step=stop_at(3))
    machine(True)
    finetune(recipe, "scratch", tmp_path / "out", sources=sources, device="cpu")
    assert chosen(tmp_path / "out") == ("fp32", "fp32")


def test_a_recorded_choice_is_no_change_of_the_recipe():
    auto, bf16, fp32 = (load_recipe("pri3d_view_r18.rooms", [f"precision={said}"]) for said in ("auto", "bf16", "fp32"))
    assert changes(bf16.to_yaml(), auto.to_yaml()) == changes(auto.to_yaml(), fp32.to_yaml()) == []
    assert changes(bf16.to_yaml(), fp32.to_yaml()) == ["precision: bf16 -> fp32"]


class Casts(TorchDispatchMode):
    """Counts casts of float32 to bfloat16 by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_bf16_casts_weights_once_for_both_views_and_finds_the_same_matches(tiny_recipe):
    images = torch.rand(2, 2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for said in ("fp32", "bf16"):
        task = build_task(load_recipe(str(tiny_recipe()), [f"precision={said}"]))
        with Casts() as casts:
            views = task.features_of(*images)
        assert casts.shapes.count(tuple(task.backbone.encoder.conv1.weight.shape)) == (said == "bf16")
        assert all(view.dtype == torch.float32 for view in views)
        sum(view.square().mean() for view in views).backward()
        assert all(p.grad.isfinite().all() for p in task.backbone.parameters())
        found.append([F.normalize(view.detach().flatten(2), dim=1) for view in views])
    full, low = found
    for one, other in zip(full, low, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()
    nearest = [(first.mT @ second).argmax(-1) for first, second in (full, low)]
    score = (full[0].mT @ full[1]).gather(-1, torch.stack(nearest).permute(1, 2, 0))
    assert (score[..., 0] - score[..., 1]).mean() < 0.005  # what bf16 finds is as near as what float32 finds
