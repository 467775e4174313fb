"""ShapeNetCore (Chang et al., 2015): about 51,300 meshes of 55 categories, as points drawn from their surfaces.

    {train,val}/02691156/model_000001.obj, test/model_000002.obj   SHREC16's archives (the aligned variant), or
    02691156/MODEL/models/model_normalized.obj                     ShapeNetCore v2 (v1: 02691156/MODEL/model.obj)
    all.csv   id,synsetId,subSynsetId,modelId,split                the official split; its link is reported dead

Classes are the 55 synsets of the published list, in its order; their names are short forms of the list's lemmas, and
only the synsets matter to the data. PointContrast names a "SHREC15 split"; no ShapeNetCore55 track of 2015 was found,
those of 2016 and 2017 share 70 / 10 / 20 % of the objects.
"""

from __future__ import annotations

import csv
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from geo_pretrain.errors import BadFrame, DataError, some
from geo_pretrain.files import expanded
from geo_pretrain.hub.cache import default_cache
from geo_pretrain.training.checks import Count, Ranged, Seed
from geo_pretrain.training.data.cache import cached_arrays
from geo_pretrain.training.data.files import read_listing
from geo_pretrain.training.data.labelled.clouds.cloud import LabelledCloud
from geo_pretrain.training.data.labelled.clouds.listed import Y_UP_TO_Z_UP, ListedCloud, ListedClouds
from geo_pretrain.training.data.labelled.folders import need_folders
from geo_pretrain.training.data.surfaces.obj import read_obj, sample_mesh

LAYOUT = "{train,val}/02691156/model_000001.obj and test/model_000002.obj (SHREC16), or 02691156/MODEL/.../*.obj"
CATEGORIES = {  # synset -> name, in the order of classes
    "02691156": "airplane", "02747177": "trash bin", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "can",
    "02954340": "cap", "02958343": "car", "02992529": "cellphone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display", "03261776": "earphone",
    "03325088": "faucet", "03337140": "file cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike", "03797390": "mug",
    "03928116": "piano", "03938244": "pillow", "03948459": "pistol", "03991062": "flowerpot", "04004475": "printer",
    "04074963": "remote", "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard", "04256520": "sofa",
    "04330267": "stove", "04379243": "table", "04401088": "telephone", "04460130": "tower", "04468005": "train",
    "04530566": "watercraft", "04554684": "washer",
}  # fmt: skip
SYNSETS = list(CATEGORIES)
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of each category, where there is no list
MESHES = ("models/model_normalized.obj", "model.obj")  # of v2 and v1, below the model's folder
KNOWN_EMPTY = ("train/04090263/model_004004.obj", "test/model_039231.obj")  # of SHREC16's archives
COLUMNS = ("id", "synsetId", "modelId", "split")


@dataclass(frozen=True)
class ShapeNetCoreOptions(Ranged):
    """Options of ShapeNetCore."""

    section = "data.options."

    split_file: str | None = None  # file of the official split; None: all.csv in the data set's folder, if it is there
    measure: Literal["test", "val"] = "test"  # the objects that validation runs on
    points: Count = 1024  # drawn from each surface, once
    seed: Seed = 0  # of the drawn points, and of the split where there is no list


@dataclass(frozen=True)
class Model:
    """One mesh: its category (unknown for tests without a list) and split."""

    path: Path
    synset: str
    split: str


class ShapeNetCore(ListedClouds):
    """One split; ids such as "02691156/MODEL", each its own scene, `category` 1..55 in the order of the synsets.

    An object's points are drawn uniformly by area, by the seed and its id, and cached; they are in the file's unit,
    which is none in particular (data.cloud.normalize), and turned: y up becomes z up.
    """

    options: ShapeNetCoreOptions
    note = ""  # how objects were split and what was left out

    def category_of(self, id: str) -> int:
        """The object's category 1..55, or 0 where it is not known."""
        synset = id.partition("/")[0]
        return 1 + SYNSETS.index(synset) if synset in CATEGORIES else 0

    def load(self, id: str) -> LabelledCloud:
        path, options = self.item(id).points, self.options
        try:
            stat = path.stat()
        except OSError as error:
            raise BadFrame(path, f"mesh cannot be read ({error.strerror})") from None
        facts = f"1\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{id}\0{options.seed}\0{options.points}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:24]
        cached = default_cache() / "meshes" / key[:2] / f"shapenetcore-{key}.safetensors"

        def draw() -> dict[str, np.ndarray]:
            try:
                return {"points": surface_points(path, options.points, draw_seed(options.seed, id))}
            except ValueError as error:
                raise BadFrame(path, str(error)) from None

        points = cached_arrays(cached, draw, "points of a mesh")["points"] @ Y_UP_TO_Z_UP.T
        return LabelledCloud(id, points, None, None, category=self.category_of(id) or None)


def open_shapenetcore(path: Path, split: str, task: str, options: ShapeNetCoreOptions) -> ShapeNetCore:
    """Open the objects of a split ("test" may lack categories); empty files are left out and counted.

    Without a list, SHREC16's folders are the split (and the categories of `test` are unknown); other folders are split
    70 / 10 / 20 % per category by the seed, which a warning and `note` say.
    """
    need_folders(path, [], LAYOUT)
    listed = path / "all.csv" if options.split_file is None else expanded(options.split_file)
    shrec = (path / "train").is_dir()
    if listed.is_file():
        models, how = listed_models(path, listed, shrec), f"split of {listed.name}"
    elif options.split_file is not None:
        raise DataError(f"No list {str(listed)!r}: a table with columns {', '.join(COLUMNS)}.")
    elif shrec:
        models, how = shrec_models(path), "split of the folders"
    else:
        models = split_models(folder_models(path), options.seed)
        how = f"no all.csv: own split of 70 / 10 / 20 % per category by seed {options.seed}, not the official one"
    named = options.measure if split == "val" else split
    chosen = {id: model for id, model in models.items() if model.split == named}
    if split != "test" and chosen and all(not model.synset for model in chosen.values()):
        raise DataError(f"Categories of split {named!r} stand in all.csv only; give it, or data.options.measure=val.")
    present = {id: model.path for id, model in chosen.items() if model.path.is_file()}
    empty = {id for id, file in present.items() if not file.stat().st_size or _known_empty(path, file)}
    if not set(present) - empty:
        raise DataError(f"No mesh of split {named!r} in {str(path)!r}. Expected layout: {LAYOUT}")
    if not (shrec or listed.is_file()):
        warnings.warn(f"shapenetcore: {how}.", stacklevel=2)
    items = {id: ListedCloud(id, file) for id, file in present.items() if id not in empty}
    source = ShapeNetCore("shapenetcore", split, path, list(CATEGORIES.values()), items, options)
    source.options = options
    source.note = f"{how}; left out: {len(empty)} empty meshes, {len(chosen) - len(present)} that are not there"
    return source


def listed_models(root: Path, path: Path, shrec: bool) -> dict[str, Model]:
    """Models of the official table; its synsets may have lost their leading 0."""
    table = csv.DictReader(read_listing(path, "table of models"))
    try:
        columns, rows = table.fieldnames or (), list(table)
    except csv.Error as error:
        raise DataError(f"{path}: line {table.line_num} cannot be read ({error}).") from None
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {some(columns, 9)}.")
    models = {}
    for line, row in enumerate(rows, 2):
        synset, number, model = (row["synsetId"] or "").zfill(8), (row["id"] or "").zfill(6), row["modelId"]
        if synset not in CATEGORIES or row["split"] not in SHARES:
            raise DataError(
                f"{path}: line {line} has synset {synset!r}, split {row['split']!r}; accepted: the 55 "
                f"synsets of ShapeNetCore, {', '.join(SHARES)}."
            )
        if shrec:
            folder = root / "test" if row["split"] == "test" else root / row["split"] / synset
            file_path, name = folder / f"model_{number}.obj", f"model_{number}"
        else:
            file_path, name = _mesh_of(root / synset / str(model)), str(model)
        models[f"{synset}/{name}"] = Model(file_path, synset, row["split"])
    return models


def shrec_models(root: Path) -> dict[str, Model]:
    """Models of SHREC16's folders."""
    models = {}
    for split in ("train", "val"):
        for path in sorted((root / split).glob("*/model_*.obj")):
            synset = path.parent.name
            models[f"{synset}/{path.stem}"] = Model(path, _known(synset, path), split)
    for path in sorted((root / "test").glob("model_*.obj")):
        models[f"test/{path.stem}"] = Model(path, "", "test")
    return models


def folder_models(root: Path) -> dict[str, Model]:
    """Models of ShapeNetCore's own folders, in no split yet."""
    models = {}
    for synset in SYNSETS:
        for folder in sorted((root / synset).glob("*")):
            path = _mesh_of(folder)
            if path.is_file():
                models[f"{synset}/{folder.name}"] = Model(path, synset, "")
    return models


def split_models(models: dict[str, Model], seed: int) -> dict[str, Model]:
    """Deal the models of each category into 70 / 10 / 20 %: the seed and the ids decide their order."""
    dealt = dict(models)
    for synset in {model.synset for model in models.values()}:
        members = sorted((id for id, m in models.items() if m.synset == synset), key=lambda id: draw_seed(seed, id))
        ends = np.round(np.cumsum(list(SHARES.values())) * len(members)).astype(int)
        for place, id in enumerate(members):
            split = list(SHARES)[int(np.searchsorted(ends, place, side="right"))]
            dealt[id] = Model(models[id].path, synset, split)
    return dealt


def surface_points(path: Path, count: int, seed: int) -> np.ndarray:
    """Draw points from the mesh in an OBJ file: float32 [count, 3]. Raises `BadFrame`, ValueError without area."""
    vertices, triangles = read_obj(path)
    return sample_mesh(vertices, triangles, count, np.random.default_rng(seed)).astype(np.float32)


def draw_seed(seed: int, id: str) -> int:
    """A number that depends on a seed and an id only."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{id}".encode()).digest()[:8], "little")


def _mesh_of(folder: Path) -> Path:
    """The mesh below a model's folder, v2's or v1's; v2's where there is none."""
    return next((folder / name for name in MESHES if (folder / name).is_file()), folder / MESHES[0])


def _known(synset: str, path: Path) -> str:
    if synset not in CATEGORIES:
        raise DataError(f"{str(path)!r}: {synset!r} is none of the 55 synsets of ShapeNetCore.")
    return synset


def _known_empty(root: Path, path: Path) -> bool:
    return path.relative_to(root).as_posix() in KNOWN_EMPTY
