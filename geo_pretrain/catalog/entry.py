"""The types of the catalog: what is known about a checkpoint, as data. No I/O and no torch.

Licences are part of the type: an entry without the whole chain (code, weights, every data set, start weights) cannot be
built, so it cannot be published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from geo_pretrain.backbones import ARCHITECTURES
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.errors import unknown

NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+(\.[a-z0-9_]+)?")  # <method>_<variant>_<architecture>[.<tag>]
MODALITIES = ("2d", "3d")
STATUSES = {
    "published-here": "files are on this project's hub",
    "published-by-authors": "the authors offer a file in their own format",
    "regenerable": "no file; a recipe of this project makes it",
    "planned": "no file and no recipe yet",
}
PERMISSIVE = ("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0", "MIT")
NON_COMMERCIAL = (
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-3.0",
    "CC-BY-NC-SA-4.0",
    "LicenseRef-ImageNet-terms",
    "LicenseRef-ScanNet-ToU",
)
LICENCE_GROUPS = {"permissive": PERMISSIVE, "non-commercial": NON_COMMERCIAL}


@dataclass(frozen=True)
class Arch:
    """An architecture's name (a key of `backbones.ARCHITECTURES`) and the arguments of its constructor."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in ARCHITECTURES:
            raise unknown("architecture", self.name, ARCHITECTURES)
        object.__setattr__(self, "args", dict(self.args))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.args.items())})"


@dataclass(frozen=True)
class Licence:
    """The licence chain, as SPDX identifiers or `LicenseRef-...`. Nothing has a default: silence is not a licence."""

    code: str  # of the code that makes the weights
    weights: str  # of the weights themselves: the strictest term their data and start weights impose
    datasets: tuple[tuple[str, str], ...]  # (data set, its licence), one for each that went in
    base_model: str  # what training started from, with its licence

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple((str(name), str(licence)) for name, licence in self.datasets))
        given = {"code": self.code, "weights": self.weights, "base_model": self.base_model}
        empty = [key for key, text in given.items() if not text]
        if not self.datasets or not all(name and licence for name, licence in self.datasets):
            empty.append("datasets")
        if empty:
            raise ValueError(f"licence chain is incomplete, nothing given for: {', '.join(empty)}.")

    def matches(self, wanted: str) -> bool:
        """`wanted` is the weights' exact identifier or a group: "permissive", "non-commercial"."""
        return self.weights in LICENCE_GROUPS.get(wanted, (wanted,))


@dataclass(frozen=True)
class Paper:
    """Where the method was published."""

    title: str
    authors: str
    venue: str
    year: int
    url: str


@dataclass(frozen=True)
class Result:
    """One number somebody reported or measured; `table` says where it stands."""

    task: str
    dataset: str
    metric: str
    value: float
    table: str


@dataclass(frozen=True)
class File:
    """One file of a checkpoint on this project's hub."""

    role: str  # "encoder", "decoder", "model", ...
    name: str
    size: int  # bytes
    sha256: str
    sources: tuple[str, ...]  # in order of trial


@dataclass(frozen=True)
class AuthorsFile:
    """A file its authors offer: where, in which format, what is inside. `convert/` knows the formats."""

    url: str
    format: str
    content: str


@dataclass(frozen=True)
class Entry:
    """Everything known about one checkpoint. A published name never changes meaning."""

    name: str
    method: str
    modality: str
    arch: Arch
    contract: ImageContract | VoxelContract
    licence: Licence
    paper: Paper
    data: str  # what it was pre-trained on
    description: str
    status: str
    recipe: str | None = None
    files: tuple[File, ...] = ()
    authors_files: tuple[AuthorsFile, ...] = ()
    results: tuple[Result, ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not self.name.startswith(f"{self.method}_"):
            raise ValueError(f"name is {self.name!r}; accepted: <method>_<variant>_<architecture>[.<tag>], lower case.")
        for what, value, accepted in (
            ("modality", self.modality, MODALITIES),
            ("status", self.status, tuple(STATUSES)),
        ):
            if value not in accepted:
                raise ValueError(f"{self.name}: {what} is {value!r}; accepted: {', '.join(accepted)}.")
        wanted = ImageContract if self.modality == "2d" else VoxelContract
        if not isinstance(self.contract, wanted):
            raise ValueError(f"{self.name}: a {self.modality} entry needs a contract of type {wanted.__name__}.")
        needs = {"published-here": self.files, "published-by-authors": self.authors_files, "regenerable": self.recipe}
        if not needs.get(self.status, True):
            raise ValueError(f"{self.name}: status {self.status!r} ({STATUSES[self.status]}), but none is given.")

    def result(self, task: str, dataset: str, metric: str) -> float | None:
        """The reported value of a benchmark, or None."""
        wanted = (task, dataset, metric)
        return next((r.value for r in self.results if (r.task, r.dataset, r.metric) == wanted), None)

    def how_to_get(self) -> str:
        """What a user without the files can do, as one clause."""
        ways = []
        if self.recipe is not None:
            data = "" if self.data == "rooms" else f" --data {self.data.lower()}:PATH"
            ways.append(f"make it with `geo-pretrain train {self.recipe}{data} --out DIR` and load DIR")
        if self.authors_files:
            offered = self.authors_files[0]
            ways.append(
                f"the authors offer it in their own format ({offered.format}, {offered.content}): {offered.url}"
            )
        if not ways:
            ways.append("nobody offers it and no recipe makes it yet; pretrained=False builds the network")
        return "; or ".join(ways)
