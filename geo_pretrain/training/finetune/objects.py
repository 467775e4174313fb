"""What tasks on single objects share: objects have a category, and are evaluated in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from geo_pretrain.errors import BadFrame
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.dataset import LabelledData
from geo_pretrain.training.data.samples.whole_clouds import CloudSample, collate_voxels
from geo_pretrain.training.distributed import ALONE, World
from geo_pretrain.training.finetune.clouds import CloudTask
from geo_pretrain.training.finetune.task import share_of
from geo_pretrain.training.visualize.clouds import draw_clouds

T = TypeVar("T")
Objects = list[tuple[str, LabelledCloud]]  # with their ids


class ObjectTask(CloudTask):
    """A task on clouds of one object each. Broken ones, and those without a category, are skipped and counted."""

    def load(self, source: LabelledData, id: str) -> LabelledCloud:
        """Load an object. Raises `BadFrame` if it is unusable, empty or of no category."""
        cloud = super().load(source, id)
        if cloud.category is None:
            raise BadFrame(id, "the object has no category")
        return cloud

    def shared_batches(self, source: LabelledData, ids: Sequence[str], world: World = ALONE) -> Iterator[Objects]:
        """Yield this process's batches of objects; broken ones are noted in `skipped`.

        A batch holds the same objects whatever the number of processes.
        """
        self.skipped = {}
        for batch in share_of(ids, self.recipe.evaluate.batch, world):
            objects = []
            for id in batch:
                try:
                    objects.append((id, self.load(source, id)))
                except BadFrame as bad:
                    self.skipped[bad.path] = bad.reason
            if objects:
                yield objects

    def voxelized(self, clouds: Sequence[LabelledCloud]) -> tuple[list[CloudSample], dict[str, Any]]:
        """Voxelize objects without augmentation: the samples, and all of them as one batch."""
        samples = [self.evaluation_sample(cloud) for cloud in clouds]
        return samples, collate_voxels(samples)

    def in_batches(self, items: Sequence[T]) -> Iterator[list[T]]:
        """Cut items into the batches of an evaluation."""
        yield from share_of(items, self.recipe.evaluate.batch, ALONE)

    def draw(self, source: LabelledData, ids: Sequence[str], path: Path) -> None:
        """Draw a row for each object that can be read."""
        clouds = [cloud for batch in self.shared_batches(source, ids) for _, cloud in batch]
        if clouds:
            draw_clouds(list(zip(clouds, self.predict(clouds), strict=True)), self.classes, path)
