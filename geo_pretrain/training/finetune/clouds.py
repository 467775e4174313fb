"""What tasks on point clouds share: their input, samples, batches, skipped scans, and evaluation within memory."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import BadFrame, BadLabels, DataError, some
from geo_pretrain.sparse.spacing import spacing_doubt
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.cloud_recipe import CloudSpec
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.folder import CloudFolder
from geo_pretrain.training.data.labelled.clouds.limited import LabelledPoints
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.whole_clouds import (
    CloudSample,
    collate_voxels,
    evaluation_sample,
    training_sample,
)
from geo_pretrain.training.distributed import World
from geo_pretrain.training.finetune.task import FinetuneTask, share_of
from geo_pretrain.training.finetune_recipe import FinetuneRecipe
from geo_pretrain.training.networks3d import CloudInput, PretrainedInit3D, cloud_input, srunet_shape
from geo_pretrain.training.visualize.clouds import draw_clouds

T = TypeVar("T")
LOOKED_AT = 3  # clouds of one's own, before training


class CloudTask(FinetuneTask):
    """A task on labelled clouds. A task of its own has `build`, `losses`, `predict` and `evaluate`, and its `metric`.

    Clouds are loaded by `load`, in training sampled by `data.cloud` and joined by `collate_voxels`; in evaluation
    `measured` measures those of a process, `evaluation_sample` voxelizes one and `forward` runs a sparse network.
    """

    unit = "clouds"
    scaled_by = "--set data.options.scale={}"  # what brings clouds into meters, with {} for the factor
    skips_broken = True
    classes: tuple[str, ...]
    cloud: CloudSpec
    inputs: CloudInput
    contract: VoxelContract  # what the network is fed, which data.cloud may choose differently from the backbone's

    def __init__(
        self, recipe: FinetuneRecipe, start: PretrainedInit3D, classes: Sequence[str], contract: VoxelContract
    ) -> None:
        self.recipe, self.classes, self.cloud = recipe, tuple(classes), recipe.clouds()
        self.inputs = cloud_input(self.cloud, contract, start.backbone)
        self.contract = self.inputs.contract
        if self.inputs.differs:
            warnings.warn(
                f"Input: {self.inputs.choice}. Its first layer has not seen such features and has to learn them from "
                "your labels; --set data.cloud.features=contract keeps those of the pre-training.",
                stacklevel=2,
            )
        limited = self.cloud.labelled_points
        self.labelled = None if limited is None else LabelledPoints.of(limited, recipe.data.fraction_seed)
        self.training_cloud = self.cloud
        if limited is not None and self.cloud.labels == "agree" and not recipe.match_released_code:
            self.training_cloud = replace(self.cloud, labels="agree_known")
        self.skipped: dict[str, str] = {}  # path -> reason, of clouds left out of the latest evaluation
        self._stated = False  # whether the unit was stated of clouds that all seem not to be in meters
        self._doubts: set[str] = set()  # what was said of clouds that seem not to be in meters
        network, transfer = start.unet(recipe.seed, self.inputs.in_chans)
        self._start_shape = srunet_shape(network)
        self.module = self.build(network, transfer)

    @abstractmethod
    def build(self, start: SRUNet, transfer: bool) -> nn.Module:
        """The task's network around `start`, whose weights are taken with `transfer` and drawn by the seed without."""

    def load(self, source: LabelledData, id: str) -> LabelledCloud:
        """Load a cloud. Raises `BadFrame` if it is unusable or empty."""
        cloud = cast(LabelledCloud, source.load(id))
        if not len(cloud):
            raise BadFrame(id, "the cloud has no point")
        return cloud

    def sample(self, item: LabelledCloud, generator: torch.Generator) -> Any:
        """Draw, augment and voxelize a cloud, whose labels may be limited to a few points."""
        cloud = item if self.labelled is None else self.labelled.keep(item)
        return training_sample(cloud, self.training_cloud, self.contract, generator)

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Join samples to a batch within the limit of voxels."""
        return collate_voxels(samples, self.cloud.limit)

    def evaluation_sample(self, cloud: LabelledCloud) -> CloudSample:
        """Voxelize a cloud without augmentation; warn of each one, once, that seems not to be in meters."""
        sample = evaluation_sample(cloud, self.cloud, self.contract)
        doubt = None if self._stated else self._doubt(sample)
        if doubt is not None and f"{cloud.id}: {doubt}" not in self._doubts:
            self._doubts.add(f"{cloud.id}: {doubt}")
            warnings.warn(f"Cloud {cloud.id!r}: {doubt}", stacklevel=2)
        return sample

    def _doubt(self, sample: CloudSample) -> str | None:
        """Why a cloud seems not to be in meters; None if it does, or is not measured in them."""
        size = self.contract.voxel_size
        if not isinstance(size, int | float) or self.cloud.normalize != "none":
            return None
        points = len(sample.chosen.unique())  # of few points some are drawn several times
        return spacing_doubt(sample.coords, points, size, self.scaled_by)

    def look_at(self, source: LabelledData, measured: LabelledData) -> None:
        """Voxelize some clouds of one's own, whose units nobody else knows; warn of those that seem not to be meters.

        Raises `DataError` where all seem so, unless the option `scale` says what their unit is, and where none of those
        to measure on can be used: training, which crops clouds, might take them for hours.
        """
        own = getattr(source, "source", source)
        if not isinstance(own, CloudFolder):
            return
        looked, bad = self._looked_at(measured)
        if bad and not looked:
            what = f"None of the {len(bad)} validation clouds looked at can be used"
            raise DataError(f"{what}: {bad[0].path}: {bad[0].reason}.")
        looked, _ = self._looked_at(source)
        doubts = {id: doubt for id, doubt in looked.items() if doubt is not None}
        every = len(looked) == len(doubts) > 0
        self._stated = every and ("scale" in self.recipe.data.options or own.options.scale != 1)
        if every and not self._stated:
            first = next(iter(doubts))
            raise DataError(
                f"The clouds seem not to be in meters (all {len(looked)} looked at), and voxels that touch no other "
                f"teach nothing. Cloud {first!r}: {doubts[first]} If it is right all the same: "
                f"{self.scaled_by.format(1)}."
            )
        for id in list(doubts)[: 1 if self._stated else None]:
            warnings.warn(f"Cloud {id!r}: {doubts[id]}", stacklevel=2)

    def _looked_at(self, source: LabelledData) -> tuple[dict[str, str | None], list[BadFrame]]:
        """Why some clouds seem not to be in meters (None: they do), and those, not broken, that cannot be voxelized."""
        looked, bad = dict[str, str | None](), list[BadFrame]()
        for id in source.ids()[:: max(1, len(source.ids()) // LOOKED_AT)][:LOOKED_AT]:
            with suppress(BadFrame):  # broken files are left out, and counted
                cloud = self.load(source, id)
                try:
                    looked[id] = self._doubt(evaluation_sample(cloud, self.cloud, self.contract))
                except BadFrame as fault:
                    bad.append(fault)
        return looked, bad

    def measured(
        self, source: LabelledData, ids: Sequence[str], world: World, measure: Callable[[LabelledCloud], T]
    ) -> list[tuple[str, T]]:
        """Measure this process's share of the clouds: their ids with what `measure` gives.

        Clouds that cannot be read, or made into voxels, are noted in `skipped`. Raises `BadLabels`.
        """
        self.skipped, found = {}, []
        for batch in share_of(ids, self.recipe.evaluate.batch, world):
            for id in batch:
                try:
                    found.append((id, measure(self.load(source, id))))
                except BadLabels:
                    raise
                except BadFrame as bad:
                    self.skipped[bad.path] = bad.reason
        return found

    def draw(self, source: LabelledData, ids: Sequence[str], path: Path) -> None:
        """Draw a row per cloud: its points, the truth and what is predicted; but broken ones, noted in evaluation."""
        rows = []
        for id in ids:
            with suppress(BadFrame):
                cloud = self.load(source, id)
                rows.append((cloud, self.predict([cloud])[0]))
        if rows:
            draw_clouds(rows, self.classes, path)

    def all_skipped(self, source: LabelledData, ids: Sequence[str], world: World) -> list[dict[str, str]]:
        """The broken clouds that all processes skipped, sorted, for an evaluation's details.

        Raises `DataError` when none of the clouds could be read.
        """
        gathered = cast(list[dict[str, str]], world.all_gather_object(self.skipped))
        skipped = {path: reason for part in gathered for path, reason in part.items()}
        if ids and len(skipped) >= len(ids):
            listed = some((f"{path}: {reason}" for path, reason in sorted(skipped.items())), 3)
            raise DataError(
                f"None of {len(ids)} clouds of {source.name!r}, split {source.split!r}, can be read: {listed}."
            )
        return [{"path": path, "reason": reason} for path, reason in sorted(skipped.items())]

    def forward(self, coords: Tensor, feats: Tensor) -> Tensor:
        """Run `module`, a sparse network, over voxels on its device: float32 [N, C], row by row of `coords`."""
        device = next(self.module.parameters()).device
        output: SparseTensor = self.module(SparseTensor(coords.to(device), feats.to(device)))
        return output.feats.float()

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """All layers of the sparse network but the last."""
        return (p for name, p in self.backbone().named_parameters() if not name.startswith("final."))

    def backbone(self) -> nn.Module:
        return self.module

    def start_shape(self) -> dict[str, Any]:
        return dict(self._start_shape)

    def facts(self) -> dict[str, Any]:
        """The input that was chosen and the limit of labels, in words."""
        facts = {"input": self.inputs.choice}
        return facts if self.labelled is None else facts | {"labelled_points": self.limits(self.labelled)}

    def limits(self, labelled: LabelledPoints) -> str:
        """Say which points of training clouds keep their labels, and what becomes of the voxels they are in.

        As released, unlabelled points are one more class where labels of a voxel must agree, so that a labelled point
        counts only where it is alone with its like; here they have no say unless `match_released_code` is set.
        """
        rule = self.training_cloud.labels
        say = {"agree": "unlabelled points of its voxel take the label back (as released)"}
        return f"{labelled}; {say.get(rule, 'unlabelled points of its voxel have no say')} ({rule})"
