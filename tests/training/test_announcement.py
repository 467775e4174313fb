"""What is said before the first step: the time of a trial is the network's own, whatever else the machine does."""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from geo_pretrain.backbones.architectures import ARCHITECTURES
from geo_pretrain.training import announcement
from geo_pretrain.training.announcement import _cost, trial


class Slow(nn.Module):
    """A network that is slow the first time, and waits for others each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Conv2d(3, 4, 1), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        until = time.thread_time() + (0.5 if self.calls == 1 else 0.0)
        while time.thread_time() < until:
            pass
        time.sleep(0.3)
        return self.layer(images)


def test_a_trial_counts_the_fastest_pass_and_the_networks_own_time():
    task = SimpleNamespace(backbone=Slow(), autocast=lambda device: nullcontext())
    own, wall, kept = trial(task, (32, 40))
    assert own < 0.2 < 0.3 <= wall
    assert kept >= 2 * 3 * 32 * 40 * 4  # the images, for the gradient of the weights
    assert task.backbone.calls == 0  # a copy was tried


@pytest.mark.parametrize("wall", [0.6, 4.0])
def test_the_time_of_a_run_is_said_as_of_a_trial(wall: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(announcement, "trial", lambda task, size: (0.5, wall, 1e8))
    arch = next(name for name, row in ARCHITECTURES.items() if row.modality == "2d")
    task = SimpleNamespace(
        module=SimpleNamespace(arch=arch),
        world=SimpleNamespace(device=torch.device("cpu"), size=1),
        budget=SimpleNamespace(accumulate=1, batch=4),
        views=2,
        micro_batch=4,
    )
    recipe = SimpleNamespace(data=SimpleNamespace(size=(32, 32)))
    text = _cost(recipe, task, SimpleNamespace(step=50, steps=250))
    assert text.startswith(" By a trial with 2 images: about 2 s a step, 6.7 min in all, 0.4 GB of memory.")
    busy = " That is alone on this machine: other programs make it 8.0 times as long now."
    assert (busy in text) == (wall == 4.0)
