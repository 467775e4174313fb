"""BatchNorm over the micro-batches of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geo_pretrain.training.distributed import World


class GlooBatchNorm(_BatchNorm):
    """BatchNorm over all processes on a CPU, where torch's `SyncBatchNorm` does not work.

    A process counts by its number of values, as in torch's, so processes may hold batches of different sizes.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, C, ...] -> the same shape, normalized over N and the axes after C of all processes."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        mean, variance, count = self._statistics(input)
        self._remember(mean, variance * count / (count - 1).clamp(min=1))
        shape = (1, -1, *[1] * (input.dim() - 2))
        scale = torch.rsqrt(variance + self.eps)
        normalized = ((input - mean.view(shape)) * scale.view(shape)).to(input.dtype)
        return normalized * self.weight.view(shape) + self.bias.view(shape) if self.affine else normalized

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes from two up."""

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance [C] over all processes, in float64, and the number of values of a channel."""
        values = input.double().transpose(0, 1).flatten(1)
        count = torch.full((1,), values.shape[1], dtype=torch.float64)
        sums = _Sum.apply(torch.cat([values.sum(1), values.square().sum(1), count]))
        count = sums[-1:].detach()
        mean, squares = sums[: self.num_features] / count, sums[self.num_features : -1] / count
        return mean, (squares - mean.square()).clamp(min=0), count

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def synchronize_batchnorm(
    module: nn.Module, world: World, *, which: Callable[[nn.Module], bool] = lambda layer: True
) -> None:
    """Exchange BatchNorm layers for ones over all processes, in place; frozen ones (subclasses) stay as they are.

    A single process has nothing to synchronize. Statistics are those of one micro-batch of all processes: accumulation
    does not widen them. `which`: of the layers BatchNorm1d and BatchNorm2d.
    """
    if world.size == 1:
        return
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d) and which(layer):
                setattr(parent, name, _synchronized(layer, world.device))


def _synchronized(layer: nn.Module, device: torch.device) -> nn.Module:
    """A layer with the same parameters, statistics and mode."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    made = GlooBatchNorm.__new__(GlooBatchNorm)
    made.__dict__ = dict(layer.__dict__)
    return made
