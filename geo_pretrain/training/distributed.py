"""One process or many: the few calls that differ, for torchrun with gloo (CPU) or nccl (CUDA).

Also Shuffle-BN (He et al., "Momentum Contrast", CVPR 2020, section 3.3), which mixes samples between processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from geo_pretrain.devices import device_fault
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.heartbeat import Heartbeat, dead_after


@dataclass(frozen=True)
class World:
    """The rank of this process, the number of processes, and their collective operations."""

    rank: int
    size: int
    device: torch.device
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)

    @classmethod
    def current(cls, device: torch.device) -> World:
        """The group that this process has joined; a group of one where it has joined none."""
        return cls(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else cls(0, 1, device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Average a module's gradients over all processes; BatchNorm statistics stay per process."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all of them can act at the same step."""
        if self.size == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.float32, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def mean(self, values: Tensor) -> Tensor:
        """Average a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def all_gather_object(self, item: object) -> list[object]:
        """Collect one object from every process, in every process."""
        if self.size == 1:
            return [item]
        items: list[object] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def all_gather(self, rows: Tensor) -> Tensor:
        """Collect the rows [B, ...] of all processes: [size * B, ...].

        They are interleaved as the loader deals samples: row i comes from process i % size.
        """
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    def own_rows(self, rows: Tensor) -> Tensor:
        """This process's rows among all rows, in the order of `all_gather`."""
        return rows[self.rank :: self.size]

    def broadcast(self, number: int) -> int:
        """The main process's number, in every process."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.broadcast(value, src=0)
        return int(value)

    def forward_shuffled(
        self, network: Callable[[Tensor], Tensor], samples: Tensor, groups: int, *, seed: int
    ) -> Tensor:
        """Shuffle-BN: run the samples of all processes, redistributed at random, through BatchNorm groups.

        `samples` are this process's [B, P, 3, H, W]; all size * B * P images are permuted one by one, by the main
        process's `seed`. `groups`: number of BatchNorm groups per process. Returns the outputs for all processes'
        samples, in the order of `all_gather`: [size * B, P, dim].
        """
        samples = self.all_gather(samples)
        shape = samples.shape[:2]
        images = samples.flatten(0, 1)
        generator = torch.Generator().manual_seed(self.broadcast(seed))
        order = torch.randperm(len(images), generator=generator).to(images.device)
        share = self.own_rows(images[order][:, None])
        outputs = self.all_gather(forward_in_groups(network, share, groups))[:, 0]
        return outputs[order.argsort()].unflatten(0, shape)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def forward_in_groups(network: Callable[[Tensor], Tensor], samples: Tensor, groups: int) -> Tensor:
    """Run samples [B, P, 3, H, W] through a network in groups that BatchNorm normalizes apart: [B, P, dim], in order.

    Sample i is in group i % groups; `groups` divides B. Running statistics come from the first group, as they come
    from the main process where groups are processes.
    """
    images = samples.shape[1]
    outputs = []
    for group in range(groups):
        with frozen_bn_stats(network) if group else nullcontext():
            outputs.append(network(samples[group::groups].flatten(0, 1)).unflatten(0, (-1, images)))
    return torch.stack(outputs, dim=1).flatten(0, 1)


@contextmanager
def frozen_bn_stats(network: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Normalize by batch statistics, but do not update the running statistics of BatchNorm."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    layers = [layer for layer in modules if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


ALONE = World(0, 1, torch.device("cpu"))  # a process without others, where the device does not matter


def checked_device(device: str | torch.device) -> torch.device:
    """The device of this name. Raises `RecipeError` where torch does not know it, or there is no such GPU."""
    if (fault := device_fault(device)) is not None:
        raise RecipeError(fault)
    return torch.device(device)


def join(device: str | None = None) -> World:
    """Join the group that torchrun announces in the environment; without one this process is alone.

    `device` None takes CUDA when there is one. A process of the group that is gone ends this one within a minute, see
    `heartbeat`. Raises `RecipeError` for a device that torch does not know.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", chosen.index if size == 1 else int(os.environ.get("LOCAL_RANK", "0")))
        if chosen.index is not None:
            torch.cuda.set_device(chosen)
    if size == 1:
        return World(rank, size, chosen)
    dead_after()  # a setting that is wrong ends the command before it waits for others
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(rank, size, chosen, Heartbeat.of_environment(rank, size))
