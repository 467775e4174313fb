"""What a caller has set for torch (default dtype and device, inference mode) changes no number of the fast kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from geo_pretrain.sparse import SparseTensor, backend
from geo_pretrain.sparse.layers import Conv3d
from tests.sparse.twins import random_cloud

COORDS, FEATS = random_cloud(8, (300, 150), reach=6, channels=16)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_new_thread(run: Callable[[], Any]) -> Any:
    """What `run` gives in a thread whose kernels have no memory yet."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


def layer(dtype: torch.dtype) -> Conv3d:
    torch.manual_seed(0)
    return Conv3d(16, 32, kernel_size=3).to(dtype)


def features_and_gradients(conv: Conv3d, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    feats = FEATS.to(dtype).requires_grad_()
    out = conv(SparseTensor(COORDS, feats)).feats
    conv.zero_grad()
    out.float().square().sum().backward()
    return out.detach(), feats.grad, conv.kernel.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_default_dtype_is_not_that_of_the_kernels_memory(default: torch.dtype, dtype: torch.dtype):
    conv = layer(dtype)
    expected = in_new_thread(lambda: features_and_gradients(conv, dtype))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with default_dtype(default):
            return features_and_gradients(conv, dtype)

    for found, wanted in zip(in_new_thread(run), expected, strict=True):
        assert torch.equal(found, wanted)
    with backend.use("plain"):
        plain = features_and_gradients(conv, dtype)[0].float()
    assert (expected[0].float() - plain).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_goes_on_after_inference_mode(dtype: torch.dtype):
    conv = layer(dtype)
    expected = in_new_thread(lambda: features_and_gradients(conv, dtype))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode():
            conv(SparseTensor(COORDS, FEATS.to(dtype)))
        with torch.no_grad():
            conv(SparseTensor(COORDS, FEATS.to(dtype)))
        return features_and_gradients(conv, dtype)

    for found, wanted in zip(in_new_thread(run), expected, strict=True):
        assert torch.equal(found, wanted)


def test_another_default_device_is_not_that_of_the_kernels_memory():
    """The meta device stands for a GPU, whose addresses no compiled code of the CPU may be given."""
    conv = layer(torch.float32)
    x = SparseTensor(COORDS, FEATS.float())

    def run(device: str) -> Tensor:
        with torch.no_grad(), torch.device(device), torch.autocast("cpu", torch.bfloat16):
            return conv(x).feats

    assert torch.equal(in_new_thread(lambda: run("meta")), in_new_thread(lambda: run("cpu")))
