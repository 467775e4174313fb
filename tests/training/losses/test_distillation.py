"""Losses of distillation against the values of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from geo_pretrain.training.losses import distillation as losses
from tests.training.losses.test_contrastive import close


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "data" / "losses.safetensors")


@pytest.mark.parametrize("temperature", [1, 4])
def test_kl_is_that_of_the_reference(golden, temperature):
    student = golden["kd.logits_s"].clone().requires_grad_()
    loss = losses.kl_distillation(student, golden["kd.logits_t"], temperature=temperature)
    loss.backward()
    close(loss.detach(), golden[f"kd.loss_T{temperature}"][0], 1e-5)
    close(student.grad, golden[f"kd.grad_T{temperature}"], 2e-5)


@pytest.mark.parametrize("form, name", [("squared", "loss_sq"), ("norm", "loss_l2norm"), ("mean", "loss_mse")])
def test_distances_are_those_of_the_reference(golden, form, name):
    student = golden["gupta.g_s"].clone().requires_grad_()
    loss = losses.l2_distillation(student, golden["gupta.g_t"], form=form)
    loss.backward()
    close(loss.detach(), golden[f"gupta.{name}"][0], 1e-5)
    if form == "squared":
        close(student.grad, golden["gupta.grad_sq"], 2e-5)
