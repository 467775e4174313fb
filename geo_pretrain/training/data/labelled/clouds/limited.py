"""Limited annotation: the few points of a training cloud that keep their labels, drawn by a seed or from a list.

The protocol of ScanNet's data-efficient benchmark (Hou et al., CVPR 2021): 20, 50, 100 or 200 labelled points a scan.
Its lists may not be passed on; its download script fetches them with the option --data_efficient.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from geo_pretrain.errors import BadFrame, CheckpointError, DataError
from geo_pretrain.files import expanded, parse_json
from geo_pretrain.hub.extract import extract
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud


@dataclass(frozen=True)
class LabelledPoints:
    """Which points of a cloud keep their labels: `count` drawn by `seed` and the cloud's id, or those of a list."""

    count: int = 0
    seed: int = 0
    listed: Mapping[str, np.ndarray] | None = None  # scan -> row numbers
    path: str = ""

    @classmethod
    def of(cls, given: int | str, seed: int) -> LabelledPoints:
        """Those of `data.cloud.labelled_points`: a number of points, or the path of a list (`read_point_list`)."""
        if isinstance(given, int):
            return cls(given, seed)
        return cls(listed=read_point_list(expanded(given)), path=given)

    def __str__(self) -> str:
        if self.listed is not None:
            return f"labelled points of the list {self.path!r}"
        return f"{self.count} labelled points of each training cloud, drawn by seed {self.seed}"

    def keep(self, cloud: LabelledCloud) -> LabelledCloud:
        """The cloud with labels (and instances) of these points only; all others become 0.

        Raises `BadFrame` for a cloud that the list lacks, or whose rows it does not have.
        """
        rows = self.rows(cloud)
        kept = np.zeros(len(cloud), bool)
        kept[rows] = True
        labels = None if cloud.labels is None else np.where(kept, cloud.labels, 0)
        instances = None if cloud.instances is None else np.where(kept, cloud.instances, 0)
        return replace(cloud, labels=labels, instances=instances)

    def rows(self, cloud: LabelledCloud) -> np.ndarray:
        """The rows of the points that keep their labels: int64 [k].

        Drawn ones are taken among the points that have a label; fewer are part of more, whatever else is drawn.
        """
        if self.listed is None:
            labelled = np.arange(len(cloud)) if cloud.labels is None else np.flatnonzero(cloud.labels)
            digest = hashlib.sha256(f"{self.seed}\n{cloud.id}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            return generator.permutation(labelled)[: self.count]
        rows = self.listed.get(cloud.id)
        if rows is None:
            raise BadFrame(cloud.id, f"the list of labelled points {self.path!r} does not have this scan")
        if len(rows) and int(rows.max()) >= len(cloud):
            raise BadFrame(cloud.id, f"the list {self.path!r} names point {int(rows.max())} of {len(cloud)}")
        return rows


def read_point_list(path: Path) -> dict[str, np.ndarray]:
    """Read the labelled points of each scan: name of the scan -> rows of its points, int64 [k].

    `path` is the benchmark's torch file (points/points20, points50, ...: a dict of arrays), which is read without
    executing anything in it, or JSON with {"scan": [row, ...]}. Raises `DataError` for a file that is neither.
    """
    try:
        if path.suffix == ".json":
            found = {scan: np.asarray(rows) for scan, rows in parse_json(path.read_text(encoding="utf-8-sig")).items()}
        else:
            with tempfile.TemporaryDirectory() as folder:
                extract(path, Path(folder) / "points.safetensors")
                found = load_file(Path(folder) / "points.safetensors")
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        raise DataError(
            f"{str(path)!r}: no list of labelled points ({error}). Accepted: a file points/points20 and the like of "
            'ScanNet\'s data-efficient benchmark, or JSON with {"scan": [row, ...]}.'
        ) from None
    wrong = [
        scan
        for scan, rows in found.items()  # an empty list, of which numpy makes numbers with a point, is a list
        if rows.ndim != 1 or (len(rows) and (rows.dtype.kind not in "iu" or (rows < 0).any()))
    ]
    if wrong:
        raise DataError(f"{str(path)!r}: scan {wrong[0]!r} has no list of row numbers from 0 up.")
    return {scan: rows.astype(np.int64) for scan, rows in found.items()}
