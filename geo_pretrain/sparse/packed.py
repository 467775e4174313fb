"""Kernels as the products of bfloat16 read them: rounded, their rows in pairs, kept until the weights change."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from geo_pretrain.sparse.compiled import run
from geo_pretrain.sparse.processor import LANES

SAMPLES = 61  # weights by which a change past the version counter, as through `.data`, is noticed


class _Kept(NamedTuple):
    """A packed kernel and what its weights were when it was packed."""

    place: tuple[int, int, torch.dtype]  # version counter, address, dtype
    sample: Tensor
    packed: Tensor


_of: dict[bool, WeakTensorKeyDictionary] = {turned: WeakTensorKeyDictionary() for turned in (False, True)}


def _forget(optimizer: Optimizer, *_: Any) -> None:
    """Drop what is kept of the weights of a fused step, which on a CPU changes them past the version counter."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for weights in group["params"]:
                for kept in _of.values():
                    kept.pop(weights, None)


register_optimizer_step_post_hook(_forget)


def packed(kernel: Tensor) -> Tensor:
    """The kernel [K, Cin, Cout], perhaps a transposed view, as int32 [K, ceil(Cin / 2), Cout up to whole vectors].

    Each number holds two bfloat16: of rows 2 i (low half) and 2 i + 1. What is packed of a parameter is kept as long as
    the parameter lives and does not change: a step packs it once for its products and once for its gradients.
    """
    turned = not kernel.is_contiguous()
    weights = _weights(kernel, turned)
    if weights is None:
        return _pack(kernel)
    every = max(weights.numel() // SAMPLES, 1)
    place, sample = (weights._version, weights.data_ptr(), weights.dtype), weights.detach().reshape(-1)[::every]
    kept: _Kept | None = _of[turned].get(weights)
    if kept is None or kept.place != place or not torch.equal(kept.sample, sample):
        kept = _of[turned][weights] = _Kept(place, sample.clone(), _pack(kernel))
    return kept.packed


def _weights(kernel: Tensor, turned: bool) -> nn.Parameter | None:
    """The parameter that a kernel is or, `turned`, is the transposed view of; None for others, which may pass."""
    base = kernel._base if turned else kernel
    if not isinstance(base, nn.Parameter) or base.is_inference():  # tensors of inference mode count no versions
        return None
    same = base.mT if turned else base
    return base if (kernel.shape, kernel.stride()) == (same.shape, same.stride()) else None


def _pack(kernel: Tensor) -> Tensor:
    low = kernel.detach().to(torch.bfloat16)
    offsets, width, columns = kernel.shape
    if width % (2 * LANES) == columns % LANES == 0 and low.mT.is_contiguous():
        # Of a transposed view pairs of rows lie beside each other: they are transposed as numbers of 32 bits.
        target = torch.empty(offsets, width // 2, columns, dtype=torch.int32, device="cpu")
        run("transpose", low.data_ptr(), target.data_ptr(), offsets, columns, width // 2)
        return target
    low = torch.nn.functional.pad(low, (0, -columns % LANES, 0, width % 2)).contiguous()
    target = torch.empty(offsets, low.shape[1] // 2, low.shape[2], dtype=torch.int32, device="cpu")
    run("pair_rows", low.data_ptr(), target.data_ptr(), offsets * target.shape[1], target.shape[2])
    return target
