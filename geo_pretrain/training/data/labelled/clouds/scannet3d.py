"""ScanNet's scans as clouds: the vertices of sceneXXXX_XX_vh_clean_2.ply, in its order, with classes, objects or boxes.

For segmentation3d and instances3d in the scan's own frame with the benchmark's 20 classes; for detection3d turned by
the scan's axisAlignment, with the 18 classes of objects and boxes along the axes, as VoteNet prepares them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.files import expanded
from geo_pretrain.training.checks import Count, Ranged
from geo_pretrain.training.data.files import files_fingerprint, usable
from geo_pretrain.training.data.labelled.clouds.cloud import Boxes3D, LabelledCloud
from geo_pretrain.training.data.labelled.mapping import LabelMap, label_map
from geo_pretrain.training.data.labelled.scannet import read_scene_list, split_list
from geo_pretrain.training.data.sources import scannet_files as scan_files
from geo_pretrain.training.data.surfaces.ply import read_ply

TABLE = "scannetv2-labels.combined.tsv"
STUFF = ("wall", "floor")
FLATTEST = 0.01  # m; the least edge of an object's box
LAYOUT = (
    "Expected layout: scans/sceneXXXX_XX/ (test: scans_test/) with sceneXXXX_XX_vh_clean_2.ply, .labels.ply, "
    f".0.010000.segs.json, .aggregation.json and .txt; scannetv2_SPLIT.txt and {TABLE} beside scans. They come with "
    "ScanNet's download script (on a signed agreement, github.com/ScanNet/ScanNet); the lists are in its repository."
)
# Ids in .labels.ply that are none of nyu40, known since PointContrast's code: such vertices have no label.
LABEL_BUGS = {"scene0270_00": 50, "scene0270_02": 50, "scene0384_00": 149}


@dataclass(frozen=True)
class ScanNet3DOptions(Ranged):
    """Options of the source."""

    section = "data.options."

    split_file: str | None = None  # list of the split's scans, one a line; None: scannetv2_SPLIT.txt beside the scans
    label_file: str | None = None  # table of categories; None: scannetv2-labels.combined.tsv beside the scans
    # segmentation3d takes the classes from .labels.ply (PointContrast), or as CSC from the objects, like instances3d.
    labels: Literal["vertices", "objects"] = "vertices"
    max_points: Count | None = 50_000  # detection3d: more vertices than these are thinned out, by the scan's name


class ScanNet3D:
    """One split of ScanNet's scans; ids are those of scans, such as "scene0000_00"."""

    name = "scannet3d"

    def __init__(self, root: Path, beside: Path, split: str, task: str, options: ScanNet3DOptions) -> None:
        """`root` holds the folders of scans, `beside` the lists and the table of categories."""
        self.root, self.split, self.task, self.options = root, split, task, options
        self._map: LabelMap = label_map("scannet18" if task == "detection3d" else "scannet20")
        self.classes = self._map.classes
        self.stuff = STUFF  # classes whose points are of no object
        self._labelled = split != "test"
        self._by_objects = task != "segmentation3d" or options.labels == "objects"
        self._categories: dict[str, int] = {}
        if self._labelled and self._by_objects:
            self._categories = scan_files.read_categories(_table_path(root, beside, options.label_file))
        self._ids = _scans_of(root, beside, split, options)

    def ids(self) -> list[str]:
        return list(self._ids)

    def scene_of(self, id: str) -> str:
        """A scan is a scene of its own, as in the official lists."""
        return id

    def load(self, id: str) -> LabelledCloud:
        """Read a scan. Labels 0 are ignored; scans of split "test" have none."""
        folder = self.root / id
        path = scan_files.mesh_path(folder)
        with usable(path):
            points, colors = scan_files.colored_vertices(path)
        aligned = self._aligned(folder, points) if self.task == "detection3d" else points
        if not self._labelled:
            return self._thinned(LabelledCloud(id, aligned, colors, None))
        if not self._by_objects:
            return LabelledCloud(id, points, colors, self._vertex_labels(folder, len(points)))
        labels, numbers = self._object_labels(folder, len(points))
        if self.task == "segmentation3d":
            return LabelledCloud(id, points, colors, labels)
        things = labels > 0 if self.task == "detection3d" else labels > len(STUFF)
        instances = np.where(things, numbers, 0)
        boxes = object_boxes(aligned, labels, instances) if self.task == "detection3d" else None
        return self._thinned(LabelledCloud(id, aligned, colors, labels, instances, boxes))

    def fingerprint(self) -> str:
        """A digest of the options and of names, sizes and times of the scans' files."""
        found = (path for id in self._ids for path in self._files(self.root / id) if path.is_file())
        settings = json.dumps([self.split, self.task, asdict(self.options)], sort_keys=True)
        table = json.dumps(self._categories, sort_keys=True)
        return hashlib.sha256(f"{files_fingerprint(self.root, found)}\0{settings}\0{table}".encode()).hexdigest()

    def _files(self, folder: Path) -> Iterator[Path]:
        yield scan_files.mesh_path(folder)
        if self._labelled and not self._by_objects:
            yield scan_files.labels_path(folder)
        if self._labelled and self._by_objects:
            yield from (scan_files.segments_path(folder), scan_files.objects_path(folder))
        if self.task == "detection3d":
            yield folder / f"{folder.name}.txt"

    def _vertex_labels(self, folder: Path, vertices: int) -> np.ndarray:
        path = scan_files.labels_path(folder)
        with usable(path):
            ids = read_ply(path, ("vertex",))["vertex"].get("label")
        if ids is None or ids.dtype.kind not in "iu" or len(ids) != vertices or not 0 <= ids.min() <= ids.max() < 2**16:
            raise BadFrame(path, f"has no 16-bit label for each of the mesh's {vertices} vertices")
        if folder.name in LABEL_BUGS:
            ids = np.where(ids == LABEL_BUGS[folder.name], 0, ids)
        return self._map.apply(ids, path, "vertices").astype(np.int64)

    def _object_labels(self, folder: Path, vertices: int) -> tuple[np.ndarray, np.ndarray]:
        """The class and the object's number of each vertex: int64 [V] each, 0 = none."""
        path, listed = scan_files.segments_path(folder), scan_files.objects_path(folder)
        with usable(path):
            segments = scan_files.read_segments(path, vertices)
        with usable(listed):
            objects = scan_files.read_objects(listed)
        unknown = sorted({each.category for each in objects} - set(self._categories))
        if unknown:
            raise BadFrame(listed, f"categories that {TABLE} lacks: {some(unknown)}")
        numbers = scan_files.vertex_objects(segments, objects)
        ids = np.zeros(max((each.number for each in objects), default=-1) + 2, np.int64)
        for each in objects:
            ids[each.number + 1] = self._categories[each.category]
        return self._map.apply(ids, listed, "objects").astype(np.int64)[numbers], numbers

    def _aligned(self, folder: Path, points: np.ndarray) -> np.ndarray:
        """Turn points [V, 3] to the axes of the scan; test scans have no alignment and stay as they are."""
        path = folder / f"{folder.name}.txt"
        with usable(path):
            motion = scan_files.read_alignment(path)
        if motion is None and self._labelled:
            raise BadFrame(path, "has no axisAlignment")
        if motion is None:
            return points
        return (points @ motion[:3, :3].T + motion[:3, 3]).astype(np.float32)

    def _thinned(self, cloud: LabelledCloud) -> LabelledCloud:
        """Draw `max_points` vertices for detection3d, always the same ones of a scan; boxes stay those of all."""
        most = self.options.max_points
        if self.task != "detection3d" or most is None or len(cloud) <= most:
            return cloud
        seed = int.from_bytes(hashlib.sha256(cloud.id.encode()).digest()[:8], "big")
        kept = np.sort(np.random.default_rng(seed).permutation(len(cloud))[:most])
        colors, labels, instances = (
            None if column is None else column[kept] for column in (cloud.colors, cloud.labels, cloud.instances)
        )
        return LabelledCloud(cloud.id, cloud.points[kept], colors, labels, instances, cloud.boxes)


def open_scannet3d(path: Path, split: str, task: str, options: ScanNet3DOptions) -> ScanNet3D:
    """Open the scans in a split's list; those of "test" are, without a list, all in scans_test."""
    if not path.is_dir():
        raise DataError(f"No folder {str(path)!r}. {LAYOUT}")
    root = path / ("scans_test" if split == "test" else "scans")
    root = root if root.is_dir() else path
    beside = path.parent if path.name in ("scans", "scans_test") else path
    return ScanNet3D(root, beside, split, task, options)


def object_boxes(points: np.ndarray, labels: np.ndarray, instances: np.ndarray) -> Boxes3D:
    """The box along the axes around each object's points, by number: `points` [N, 3], `labels`, `instances` [N].

    What is flat gets a centimeter: boxes without a volume overlap nothing, and sizes are learned as ratios.
    """
    numbers, first = np.unique(instances, return_index=True)
    first, numbers = first[numbers > 0], numbers[numbers > 0]
    low = np.array([points[instances == number].min(0) for number in numbers]).reshape(-1, 3)
    high = np.array([points[instances == number].max(0) for number in numbers]).reshape(-1, 3)
    centers, sizes = ((low + high) / 2).astype(np.float32), (high - low).clip(min=FLATTEST).astype(np.float32)
    return Boxes3D(centers, sizes, np.zeros(len(numbers), np.float32), labels[first].astype(np.int64))


def _scans_of(root: Path, beside: Path, split: str, options: ScanNet3DOptions) -> list[str]:
    listed = split_list((beside, root), split, options.split_file, required=split != "test")
    if listed is None:
        scans = sorted(folder.name for folder in root.glob("scene*") if folder.is_dir())
        if not scans:
            raise DataError(f"No scans in {str(root)!r}. {LAYOUT}")
        return scans
    scans = read_scene_list(listed)
    missing = [scan for scan in scans if not (root / scan).is_dir()]
    if missing:
        raise DataError(
            f"{str(root)!r} lacks {len(missing)} of the {len(scans)} scans of {str(listed)!r}: {some(missing, 5)}. "
            f"{LAYOUT}"
        )
    return scans


def _table_path(root: Path, beside: Path, given: str | None) -> Path:
    if given is not None:
        return expanded(given)
    for folder in (beside, root):
        if (folder / TABLE).is_file():
            return folder / TABLE
    raise DataError(
        f"No table {TABLE!r} in {str(beside)!r}. It comes with ScanNet's download script: put it there, or name it "
        "with the option label_file."
    )
