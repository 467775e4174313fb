"""Measures of point networks on the clouds of frames: matching by overlap and turn, normals, classes; every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import DataError
from geo_pretrain.geometry import centered, overlap_ratio, radius_matches, transform
from geo_pretrain.sparse.functional import point_rows
from geo_pretrain.sparse.tensor import SparseTensor
from geo_pretrain.training.data.samples.augment import random_rotation
from geo_pretrain.training.data.surfaces.fusing import cubic_voxel_size
from geo_pretrain.training.evaluation.awareness.linear import mean_scores, normal_scores
from geo_pretrain.training.evaluation.awareness.networks import LayeredNetwork
from geo_pretrain.training.evaluation.awareness.probing import Maps, Probing, Scores, mean
from geo_pretrain.training.evaluation.awareness.spec import OVERLAPS, TURNS
from geo_pretrain.training.evaluation.awareness.views import TRIES, Views, common_pixels, same_scene
from geo_pretrain.training.evaluation.features import cloud_of
from geo_pretrain.training.evaluation.matching import COUNTERPART, Turn, nearest_row
from geo_pretrain.training.geometry3d.normals import depth_normals
from geo_pretrain.training.tasks.matching import one_match_each

NORMALS_HELD: Turn = "camera"  # how clouds are held: only there it shows which side of a surface the camera is on
CLASSES_HELD: Turn = "upright"
INPUTS = ("xyz", "color", "xyz+color")  # the controls without a network


@dataclass(frozen=True)
class FrameVoxels:
    """The voxels of a frame's cloud as it is held: each lies at its first point, which is a pixel of the frame."""

    coords: Tensor  # int32 [N, 4]
    feats: Tensor  # [N, C], as the network takes them
    world: Tensor  # float64 [N, 3] m
    held: Tensor  # float32 [N, 3] m, in the axes in which the cloud is held
    pixel: Tensor  # int64 [N], flat
    to_network: Tensor  # float64 [4, 4]


class Clouds:
    """The voxels of all frames for one contract, and what is known of them."""

    def __init__(self, views: Views, contract: VoxelContract) -> None:
        """Raises `CheckpointError` for voxels that RGB-D frames cannot give."""
        self.views, self.contract, self.voxel_size = views, contract, cubic_voxel_size(contract)
        self._known: dict[tuple[int, Turn], FrameVoxels] = {}
        self._normals: dict[int, Tensor] = {}
        self._queries: dict[tuple[CloudPair, Turn, int], Tensor] = {}

    def voxels(self, number: int, turn: Turn) -> FrameVoxels:
        """Voxelize a frame's cloud, held as `turn` says; random turns depend on the frame's name alone."""
        if (number, turn) in self._known:
            return self._known[number, turn]
        frame = self.views.frames[number]
        cloud = cloud_of(frame)
        world = torch.from_numpy(cloud.points).double()
        if turn == "camera":
            to_network = torch.linalg.inv(torch.from_numpy(frame.cam_to_world).double())
        else:
            digest = hashlib.sha256(f"{turn}\n{frame.scene}\n{frame.id}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            to_network = random_rotation(generator, turn) @ centered(world)
        held = transform(world, to_network).float()
        voxels = self.contract.transforms()(held, cloud.colors if self.contract.given_channels else None)
        pixel = torch.from_numpy(frame.depth).flatten().nonzero()[:, 0]
        found = FrameVoxels(
            voxels.coords, voxels.feats, world[voxels.index], held[voxels.index], pixel[voxels.index], to_network
        )
        self._known[number, turn] = found
        return found

    def normals(self, number: int) -> Tensor:
        """Normals of the voxels of a frame's cloud as its camera sees it, from its depth: [N, 3], to the camera."""
        if number not in self._normals:
            frame, voxels = self.views.frames[number], self.voxels(number, NORMALS_HELD)
            depth, intrinsics = torch.from_numpy(frame.depth), torch.from_numpy(frame.intrinsics)
            self._normals[number] = depth_normals(depth, intrinsics, voxels.pixel)
        return self._normals[number]

    def queries(self, pair: CloudPair, turn: Turn, seed: int) -> Tensor:
        """Draw voxels of the first cloud that have a counterpart in the second: int64 [Q]; the same for every layer."""
        key = (pair, turn, seed)
        if key not in self._queries:
            one, other = (self.voxels(number, turn).world for number in (pair.first, pair.second))
            matches = radius_matches(one, other, COUNTERPART * self.voxel_size)
            generator = torch.Generator().manual_seed(seed)
            if len(matches):
                matches = one_match_each(matches, self.views.spec.queries, generator)
            self._queries[key] = matches[:, 0]
        return self._queries[key]

    def layers(self, network: LayeredNetwork, index: int) -> list[Tensor]:
        """Features [N, C] of all layers for the voxels of the frame and turn of this index; see `index_of`."""
        number, turn = divmod(index, len(TURNS))
        voxels = self.voxels(number, TURNS[turn])
        device = next(network.parameters()).device
        x = SparseTensor(voxels.coords.to(device), voxels.feats.to(device))
        return [one.feats[point_rows(one, x.coords)].float() for one in network.layers_of(x)]


def index_of(number: int, turn: Turn) -> int:
    """The number under which features of a frame held in one way are remembered."""
    return number * len(TURNS) + TURNS.index(turn)


class InputRows:
    """In place of a network: coordinates (from the middle of the cloud's box, z from its lowest point) and color."""

    def __init__(self, clouds: Clouds) -> None:
        self.clouds, self.layers = clouds, list(INPUTS)

    def read(self, frame: int, layer: int) -> Tensor:
        """The columns of one control."""
        number, turn = divmod(frame, len(TURNS))
        voxels = self.clouds.voxels(number, TURNS[turn])
        low, high = voxels.held.amin(0), voxels.held.amax(0)
        place = voxels.held - torch.stack([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]])
        color = torch.from_numpy(self.clouds.views.frames[number].color).reshape(-1, 3)[voxels.pixel].float() / 255
        return (place, color, torch.cat([place, color], 1))[layer]


@dataclass(frozen=True)
class CloudPair:
    """Two frames that overlap."""

    first: int
    second: int
    bin: int  # of OVERLAPS


class CloudProbe(Probing):
    """Probes of one point network, or of coordinates and color alone, on clouds held in one way; places are voxels."""

    kinds: ClassVar[tuple[int, ...]] = (3,)

    def __init__(self, maps: Maps, clouds: Clouds, turn: Turn) -> None:
        super().__init__(maps, clouds.views)
        self.clouds, self.turn = clouds, turn

    def read(self, number: int, layer: int, places: Tensor) -> Tensor:
        """Features of voxels."""
        return self.maps.read(index_of(number, self.turn), layer)[places]

    def apply(self, weight: Tensor, bias: Tensor, number: int, layer: int) -> Tensor:
        """A linear layer on the features of all voxels."""
        return self.maps.read(index_of(number, self.turn), layer) @ weight + bias

    def targets(self, number: int) -> tuple[Tensor, Tensor]:
        """The normals, in the camera's axes."""
        normals = self.clouds.normals(number)
        return normals, normals.any(1)

    def labels(self, number: int) -> Tensor:
        """The class of each voxel's first point."""
        semantic = torch.from_numpy(self.views.frames[number].semantic.astype("int64"))  # type: ignore[union-attr]
        return semantic.flatten()[self.clouds.voxels(number, self.turn).pixel]


class CloudMeasures:
    """Everything that is measured of one point network, or of coordinates and color alone."""

    def __init__(self, maps: Maps, clouds: Clouds) -> None:
        self.maps, self.clouds, self.views = maps, clouds, clouds.views
        self.normal_probe = CloudProbe(maps, clouds, NORMALS_HELD)
        self.class_probe = CloudProbe(maps, clouds, CLASSES_HELD)

    def matching(self, layer: int, pairs: Sequence[CloudPair], seed: int) -> Scores:
        """Recall among all voxels of the other cloud, by turn and overlap; each pair counts equally.

        Queries are voxels with a counterpart within 1.5 voxels in the world; right is what lies within the threshold.
        """
        found: dict[tuple[Turn, int], list[float]] = {}
        size, spec = self.clouds.voxel_size, self.views.spec
        for pair, turn in product(pairs, TURNS):
            one, other = (self.clouds.voxels(number, turn).world for number in (pair.first, pair.second))
            rows = self.clouds.queries(pair, turn, seed)
            if not len(rows):
                continue
            first, second = (self.maps.read(index_of(n, turn), layer) for n in (pair.first, pair.second))
            error = (other[nearest_row(first[rows], second)] - one[rows]).norm(dim=1) / size
            found.setdefault((turn, pair.bin), []).append(float((error <= spec.within("voxels")).double().mean()))
        if not found:
            return {}
        scores = {}
        for turn, (bin, (low, high)) in product(TURNS, enumerate(OVERLAPS)):
            if values := found.get((turn, bin)):
                scores[f"{turn} {low:g}-{high:g}"] = mean(values)
        return scores | {"recall": mean([value for values in found.values() for value in values])}

    def normals(self, layer: int, seed: int) -> Scores:
        """Scores of a linear regression of normals on the held-out frames, means over frames."""
        probe = self.normal_probe
        fit, scores = probe.fit(layer, seed), []
        for number in self.views.split(seed).judged:
            truth, known = probe.targets(number)
            if known.any():
                scores.append(normal_scores(probe.predict(fit, number, layer)[known], truth[known]))
        return mean_scores(scores)

    def measure(
        self, wanted: Sequence[str], pairs: Sequence[CloudPair], seed: int
    ) -> Iterator[tuple[str, str, Scores]]:
        """Yield (measure, layer, scores) of one seed for all layers; of the input alone nothing is matched."""
        for layer, name in enumerate(self.maps.layers):
            if "matching" in wanted and not isinstance(self.maps, InputRows):
                yield "matching", name, self.matching(layer, pairs, seed)
            if "normals" in wanted:
                yield "normals", name, self.normals(layer, seed)
            if "semantic" in wanted and self.views.labels is not None:
                yield "semantic", name, self.class_probe.semantic(layer, seed)


def draw_cloud_pairs(views: Views, seed: int) -> list[CloudPair]:
    """Draw `spec.pairs` pairs of frames of a scene for each bin of overlap, measured by projection.

    In random order, at most 20 candidates are looked at for each pair wanted. Raises `DataError` when there is none.
    """
    first, second = same_scene(views)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    order = order[: TRIES * views.spec.pairs * len(OVERLAPS)]
    left, found = [views.spec.pairs] * len(OVERLAPS), []
    for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if not any(left):
            break
        depth1, depth2 = (torch.from_numpy(views.frames[n].depth)[None] for n in (i, j))
        there, back = common_pixels(views, i, j), common_pixels(views, j, i)
        overlap = float(overlap_ratio(there, back, depth1, depth2))
        bin = next((k for k, (low, high) in enumerate(OVERLAPS) if low <= overlap < high or overlap == high == 1), None)
        if bin is not None and left[bin]:
            found.append(CloudPair(i, j, bin))
            left[bin] -= 1
    if not found:
        raise DataError(f"No two frames of a scene overlap by {OVERLAPS[0][0]:.0%}; matching needs frames that do.")
    return sorted(found, key=lambda pair: pair.bin)
