"""Many processes: the batch and its gradients stay the same, BatchNorm is synchronized, a run changes their number."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.errors import RecipeError
from geo_pretrain.training import pretrain
from geo_pretrain.training.batchnorm import GlooBatchNorm, synchronize_batchnorm
from geo_pretrain.training.data.frame import SkippedFrames
from geo_pretrain.training.data.mining import find_pairs
from geo_pretrain.training.data.samples.sampler import MicroBatches
from geo_pretrain.training.data.sources.registry import open_source
from geo_pretrain.training.distributed import World
from geo_pretrain.training.loop import Budget, TrainingTask, fit
from geo_pretrain.training.recipe import load_recipe, micro_batches
from geo_pretrain.training.tasks import build_task
from tests.training.test_loop import ALONE, Stop, run_here, stop_at, weights
from tests.two_processes import in_two_processes

STEPS, BATCH, SAMPLES = 5, 8, 24


def plain_data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64), torch.randn(
        SAMPLES, 1, generator=generator, dtype=torch.float64
    )


def plain_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


class Regression(TrainingTask):
    """A mean over samples by a network without BatchNorm, dealt as every recipe deals its batches."""

    def __init__(self, world, accumulate):
        self.module, self.world = plain_network(), world
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.budget = Budget(steps=STEPS, batch=BATCH, accumulate=accumulate)

    def batches(self, start):
        inputs, targets = plain_data()
        dealing = {"batch": BATCH, "accumulate": self.budget.accumulate, "rank": self.world.rank}
        for keys in MicroBatches(SAMPLES, **dealing, world=self.world.size, start=start, steps=STEPS, seed=0):
            rows = [index for _, index in keys]
            yield inputs[rows], targets[rows]

    def losses(self, batch):
        return {"loss": (self.module(batch[0]) - batch[1]).square().mean()}

    def schedule(self, step):
        return 0.1


def twin():
    """Large batches by plain torch."""
    (inputs, targets), network = plain_data(), plain_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for keys in MicroBatches(SAMPLES, batch=BATCH, accumulate=1, rank=0, world=1, start=0, steps=STEPS, seed=0):
        rows = [index for _, index in keys]
        optimizer.zero_grad()
        (network(inputs[rows]) - targets[rows]).square().mean().backward()
        optimizer.step()
    return network.state_dict()


def assert_is_twin(task, world):
    assert fit(task, world).finished
    for name, value in twin().items():
        torch.testing.assert_close(task.module.state_dict()[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_accumulated_micro_batches_are_the_large_batch(accumulate):
    assert_is_twin(Regression(ALONE, accumulate), ALONE)


def test_micro_batches_of_two_processes_are_the_large_batch(tmp_path):
    def work(rank):
        world = World(rank, 2, ALONE.device)
        assert_is_twin(Regression(world, 2), world)

    in_two_processes(work, tmp_path)


def test_fewer_processes_take_more_micro_batches():
    optim = load_recipe("pri3d_view_geo_r50", ["optim.micro_batch=8"]).optim
    assert optim.batch == 64
    assert [micro_batches(optim, count) for count in (8, 4, 2, 1)] == [1, 2, 4, 8]
    with pytest.raises(RecipeError, match=r"'optim.micro_batch' is 8, accepted .* 16 processes is one of 1, 2, 4\."):
        micro_batches(optim, 16)
    with pytest.raises(RecipeError, match=r"3 processes is none: optim\.batch cannot be dealt evenly"):
        micro_batches(optim, 3)
    with pytest.raises(RecipeError, match=r"accumulate / optim.micro_batch' is \(2, 8\), accepted is one of the two"):
        load_recipe("pri3d_view_geo_r50", ["optim.micro_batch=8", "optim.accumulate=2"])


def train_in_two(path, out, overrides=(), on_step=None):
    """The recipe in two processes, which may end by `Stop`."""
    recipe = load_recipe(str(path), overrides)
    source = open_source(recipe.data)
    pairs = find_pairs(source, recipe.data, skips=SkippedFrames())
    meeting = out.with_name("meeting")
    meeting.mkdir()

    def work(rank):
        world = World(rank, 2, ALONE.device)
        with suppress(Stop):
            pretrain.train(recipe, out, source, pairs, world, on_step=on_step)

    in_two_processes(work, meeting)


def assert_close(found, wanted, running=True):
    """Weights by role and name; `running`: also the running statistics of BatchNorm."""
    for role, tensors in wanted.items():
        for name, value in tensors.items():
            if running or ("running" not in name and "tracked" not in name):
                torch.testing.assert_close(found[role][name], value, atol=2e-5, rtol=1e-4)


def test_a_run_goes_on_with_another_number_of_processes_where_micro_batches_stay(tmp_path, tiny_recipe):
    path = tiny_recipe(optim={"steps": 5}, save_every=2)
    train_in_two(path, tmp_path / "moved", on_step=stop_at(3))
    with pytest.raises(RecipeError, match=r"used 2 processes, not 1. A recipe with optim.micro_batch goes on"):
        run_here(path, tmp_path / "moved")
    with pytest.raises(RecipeError, match=r"another recipe.*optim.micro_batch: None -> 1"):
        run_here(path, tmp_path / "moved", ["optim.micro_batch=1"])
    with pytest.warns(UserWarning, match="used 2 processes and goes on with 1: the same batches and micro-batches"):
        run_here(path, tmp_path / "moved", ["optim.micro_batch=2"])  # as many as each of the two had
    run_here(path, tmp_path / "whole", ["optim.accumulate=2"])
    whole, moved = weights(tmp_path / "whole"), weights(tmp_path / "moved")
    assert_close(moved, whole, running=False)
    provenance = read_checkpoint(tmp_path / "moved").provenance
    assert (provenance["processes"], provenance["micro_batch"], provenance["negatives"]) == (1, 2, "sample")


def test_synchronized_batchnorm_of_two_processes_is_that_of_the_whole_batch(tmp_path, tiny_recipe):
    path = tiny_recipe(optim={"steps": 2, "lr": 0.001}, task={"depth_proxy": False})  # which weighs by valid pixels
    run_here(path, tmp_path / "whole")
    train_in_two(path, tmp_path / "two", ["optim.sync_bn=true"])
    whole, two = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "two"))
    assert_close({"encoder": two}, {"encoder": whole})


def test_synchronized_batchnorm_counts_values_where_processes_have_different_numbers(tmp_path):
    """As of voxels; statistics, outputs and gradients are those of all rows."""
    rows = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    parts = rows[:3], rows[3:]

    def layer():
        made = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3))
        nn.init.uniform_(made[0].weight, generator=torch.Generator().manual_seed(2))
        return made

    whole, inputs = layer(), rows.clone().requires_grad_()
    whole(inputs).square().square().sum().backward()

    def work(rank):
        network, part = layer(), parts[rank].clone().requires_grad_()
        synchronize_batchnorm(network, World(rank, 2, ALONE.device))
        assert isinstance(network[0], GlooBatchNorm)
        output = network(part)
        output.square().square().sum().backward()
        close = torch.testing.assert_close
        close(output, whole(rows)[[0, 1, 2]] if rank == 0 else whole(rows)[3:])
        close(part.grad, inputs.grad[:3] if rank == 0 else inputs.grad[3:], atol=1e-5, rtol=1e-4)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            close(getattr(network[0], name), state[f"0.{name}"])
        network.eval()
        whole.eval()
        whole.load_state_dict(state)
        close(network(rows), whole(rows))

    state = {name: value.clone() for name, value in whole.state_dict().items()}
    in_two_processes(work, tmp_path)


@pytest.mark.parametrize(
    "tiny, settings, negatives",
    [
        ("pointcontrast_nce", {}, "micro-batch"),
        ("pointcontrast_nce", {"negatives": "pair"}, "sample"),
        ("csc", {}, "sample"),
        ("gsc", {"denominator": "batch"}, "micro-batch"),
        ("depth_prediction", {}, ""),
    ],
)
def test_a_task_says_where_its_negatives_come_from(tiny_recipe, tiny, settings, negatives):
    assert build_task(load_recipe(str(tiny_recipe(tiny, task=settings)))).negatives == negatives


@pytest.mark.parametrize(
    "tiny, reason",
    [("moco_v2", "it needs statistics of parts of a batch"), ("pointcontrast_nce", "it trains no BatchNorm of images")],
)
def test_synchronized_batchnorm_is_refused_where_it_cannot_be(tmp_path, tiny_recipe, tiny, reason):
    with pytest.raises(RecipeError, match=f"'optim.sync_bn' is True, accepted for task {tiny!r} is False: {reason}"):
        run_here(tiny_recipe(tiny), tmp_path / "out", ["optim.sync_bn=true"])
