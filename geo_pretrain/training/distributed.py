"""One process or many: the few calls that differ, for torchrun with gloo (CPU) or nccl (CUDA)."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process's place among all processes of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over all processes; BatchNorm statistics stay per process."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all leave the loop at the same step."""
        if self.size == 1:
            return flag
        shared = torch.tensor([flag], dtype=torch.float32, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, item: object) -> list[object]:
        """One object of every process, in all of them."""
        if self.size == 1:
            return [item]
        items: list[object] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World(0, 1, torch.device("cpu"))  # a process without others, where the device does not matter


def join(device: str | None = None) -> World:
    """Join the group that torchrun announces in the environment, or be alone.

    `device` None takes CUDA when there is one.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type == "cuda":
        kind = torch.device("cuda", kind.index if size == 1 else int(os.environ.get("LOCAL_RANK", "0")))
        if kind.index is not None:
            torch.cuda.set_device(kind)
    if size > 1:
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
    return World(rank, size, kind)
