"""The fused SGD: torch's plain one to rounding, only where memory is laid out for it, and resumed as a state says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from geo_pretrain.training.loop import check_layouts, make_sgd
from geo_pretrain.training.recipe import OptimSpec

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SPEC = OptimSpec(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=1e-3, steps=1)


def network():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def take(net, optimizer, steps, change=lambda grad: grad):
    for _ in range(steps):
        optimizer.zero_grad()
        net(IMAGES).square().mean().backward()
        for parameter in net.parameters():
            parameter.grad = change(parameter.grad)
        check_layouts(optimizer)
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def trained(*, fused, steps, **options):
    net = network()
    optimizer = make_sgd(SPEC, net.parameters())
    assert optimizer.param_groups[0]["fused"]
    optimizer.param_groups[0]["fused"] = fused
    return take(net, optimizer, steps, **options), net, optimizer


@pytest.mark.parametrize("grads", ["as torch makes them", "laid out otherwise"])
def test_steps_are_those_of_the_plain_loop(grads):
    """Torch's fused SGD walks through memory: gradients in another order would reach other weights."""
    change = (lambda grad: grad) if grads == "as torch makes them" else (lambda grad: grad.contiguous())
    plain, *_ = trained(fused=False, steps=4, change=change)
    ours, _, optimizer = trained(fused=True, steps=4, change=change)
    assert optimizer.param_groups[0]["fused"] == (grads == "as torch makes them")
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("before", [True, False])
def test_a_run_that_goes_on_computes_as_it_did(before):
    """Also one that an older version began, whose state has no fused SGD."""
    _, net, optimizer = trained(fused=before, steps=2)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    straight = take(net, optimizer, 2)
    again = network()
    again.load_state_dict(weights)
    resumed = make_sgd(SPEC, again.parameters())
    resumed.load_state_dict(state)
    assert all(map(torch.equal, take(again, resumed, 2), straight))


def test_parameters_of_other_devices_have_the_plain_loop():
    somewhere = nn.Parameter(torch.zeros(2, device="meta"))
    assert not make_sgd(SPEC, [somewhere]).param_groups[0]["fused"]
    assert not make_sgd(SPEC, [{"params": [somewhere], "lr": 1.0}]).param_groups[0]["fused"]
