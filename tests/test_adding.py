"""What CONTRIBUTING promises: a checkpoint, a data source and a pretext task are added by adding, tried in a copy.

The copy is the repository as a contributor would have it; each test writes the new files and rows there and runs the
package, or its tests, in processes of their own.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.forked import Forked, import_anew

ROOT = Path(__file__).resolve().parents[1]
# bytecode is copied too, and spares the compiler; not what other tests are writing just now, nor numba's
NOT_COPIED = ("*.pyc.*", "*.nbi", "*.nbc", "*.tmp*")
COPIED = ("geo_pretrain", "tests", "model_cards", "docs", "README.md", "LICENSE", "hubconf.py", "pyproject.toml")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository in a folder of its own."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*NOT_COPIED))
        else:
            shutil.copy(ROOT / name, root / name)
    return root


def run(copy: Path, *arguments: str) -> str:
    """Run Python in the copy, which is imported in place of this checkout; returns what it printed.

    A fork, which has torch already, forgets this checkout and begins with `-m MODULE` or `-c CODE` as Python would.
    """

    def work() -> None:
        import_anew("geo_pretrain", "tests", "hubconf")
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            del os.environ[name]
        os.chdir(copy)
        sys.path[:] = [str(copy), *(place for place in sys.path if place and Path(place).resolve() != ROOT)]
        kind, what, *sys.argv[1:] = arguments
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})

    process = Forked(work, {"PYTHONPATH": str(copy), "COLUMNS": "120"})
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-8000:]
    return printed


def insert(path: Path, before: str, text: str) -> None:
    """Write `text` in front of the only line of a file that begins with `before`."""
    content = path.read_text(encoding="utf-8")
    assert content.count(f"\n{before}") == 1, (path, before)
    path.write_text(content.replace(f"\n{before}", f"\n{text}{before}"), encoding="utf-8")


def append_row(path: Path, table: str, row: str) -> None:
    """Add a row at the end of the table that is called `table` and ends with a brace or bracket at column 0."""
    content = path.read_text(encoding="utf-8")
    start = content.index(f"\n{table}")
    end = min(place for place in (content.find(f"\n{closing}", start) for closing in "})") if place > 0)
    path.write_text(f"{content[:end]}\n{row}{content[end:]}", encoding="utf-8")


# --- a checkpoint: one entry, one recipe

NAME = "pri3d_view_r50.rooms"
ENTRY = f"""ADDED = _entry("{NAME}", RESNET_UNET["r50"], ROOMS, "rooms", PRIORS["view"])
"""

TESTS_OF_A_NAME = """
import sys
import pytest
from geo_pretrain.catalog import CATALOG

name, *arguments = sys.argv[1:]

class Selection:
    def pytest_collection_modifyitems(self, items):
        others = set(CATALOG) - {name}
        items[:] = [item for item in items if others.isdisjoint(item.name.rstrip("]").replace("[", "-").split("-"))]

sys.exit(pytest.main(arguments, plugins=[Selection()]))
"""


def test_a_checkpoint_is_one_entry_and_one_recipe(copy: Path):
    """All tests of catalog and cards pass, none of them edited; those that are about other names alone are left out."""
    path = copy / "geo_pretrain" / "catalog" / "pri3d.py"
    insert(path, "ENTRIES: ", ENTRY)
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace("ENTRIES: tuple[Entry, ...] = (", "ENTRIES: tuple[Entry, ...] = (ADDED, "))
    recipes = copy / "geo_pretrain" / "training" / "recipes"
    like = (recipes / "pri3d_view_r18.rooms.yaml").read_text(encoding="utf-8")
    recipe = (
        like.replace("pri3d_view_r18.rooms", NAME).replace("resnet18", "resnet50").replace("[120, 160]", "[240, 320]")
    )
    (recipes / f"{NAME}.yaml").write_text(recipe, encoding="utf-8")
    run(copy, "-m", "geo_pretrain.cards")  # what `make cards` does
    assert NAME in (copy / "docs/checkpoints.md").read_text(encoding="utf-8")
    assert (copy / "model_cards" / f"{NAME}.md").exists()
    tests = sorted(
        str(path.relative_to(copy)) for path in (copy / "tests").rglob("test_ca*.py") if "cache" not in path.name
    )
    assert {"catalog", "cards"} <= {Path(test).stem.split("_")[1] for test in tests}
    tests += ["tests/test_hubconf.py", "tests/training/test_recipe.py"]
    printed = run(
        copy, "-c", TESTS_OF_A_NAME, NAME, "-n", "0", "-p", "no:cacheprovider", "-k", "not the_code_of_a", *tests
    )
    assert " passed" in printed
    listed = run(copy, "-m", "geo_pretrain", "list", "pri3d_view_r50.rooms*")
    assert NAME in listed


# --- a data source: one file, one row

SOURCE = '''"""A wall, seen from two sides of a room: a data source of one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geo_pretrain.training.data.frame import Frame


@dataclass(frozen=True)
class WallConfig:
    """Options of the source."""

    frames: int = 3


class Wall:
    """A flat wall in front of a camera that moves sideways."""

    name = "wall"

    def __init__(self, root: Path, config: WallConfig) -> None:
        self.root, self.config = root, config

    def scenes(self) -> list[str]:
        """One scene."""
        return ["wall"]

    def frame_ids(self, scene: str) -> list[str]:
        """Frames in order."""
        return [str(number) for number in range(self.config.frames)]

    def load(self, scene: str, frame_id: str) -> Frame:
        """Read one frame."""
        rows, columns = np.mgrid[0:48, 0:64]
        color = np.stack([rows * 5, columns * 3, rows + columns + int(frame_id)], axis=-1).astype(np.uint8)
        depth = np.full((48, 64), 2.0, np.float32)
        pose = np.eye(4)
        pose[0, 3] = int(frame_id) / 16
        intrinsics = np.array([[64.0, 0, 31.5], [0, 64.0, 23.5], [0, 0, 1]])
        return Frame(scene, frame_id, color, depth, intrinsics, pose)

    def fingerprint(self) -> str:
        """The number of frames tells all."""
        return f"{self.config.frames:064x}"
'''


def add_wall(copy: Path) -> None:
    sources = copy / "geo_pretrain" / "training" / "data" / "sources"
    (sources / "wall.py").write_text(SOURCE, encoding="utf-8")
    registry = sources / "registry.py"
    insert(registry, "Progress = ", "from geo_pretrain.training.data.sources.wall import Wall, WallConfig\n\n")
    append_row(registry, "SOURCES", '    "wall": SourceRow(WallConfig, _folder(Wall), "wall", "MIT"),')


def test_a_data_source_is_one_file_and_one_row(copy: Path, tmp_path: Path):
    add_wall(copy)
    picture = tmp_path / "wall.png"
    run(copy, "-m", "geo_pretrain", "data", "preview", f"wall:{tmp_path}", "-o", str(picture))
    with Image.open(picture) as image:
        assert min(image.size) >= 48  # three frames of 64 x 48, each with its depth


# --- a pretext task: one file, its loss, one row

LOSS = '''"""Agreement of two views."""

from __future__ import annotations

from torch import Tensor


def disagreement(features1: Tensor, features2: Tensor) -> Tensor:
    """The mean squared difference of features [B, C, H, W]; real methods also keep them from collapsing.

    >>> import torch
    >>> float(disagreement(torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)))
    1.0
    """
    return (features1 - features2).square().mean()
'''
TASK = '''"""Two color augmentations of one frame get the same features: a pretext task of one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geo_pretrain.training.checks import Positive
from geo_pretrain.training.data.frame import Pair, Source
from geo_pretrain.training.data.samples.single_images import TwoColorViews
from geo_pretrain.training.losses.agreement import disagreement
from geo_pretrain.training.recipe import Recipe
from geo_pretrain.training.tasks.base import TaskConfig
from geo_pretrain.training.tasks.images import ImageUNetTask


@dataclass(frozen=True)
class Config(TaskConfig):
    """Settings of the task."""

    weight: Positive = 1.0


class Agreement(ImageUNetTask):
    """The 2D U-Net of Pri3D, trained to agree on two views."""

    config_type = Config
    config: Config

    def __init__(self, recipe: Recipe, config: Config) -> None:
        super().__init__(recipe, config, depth_proxy=False)

    def dataset(self, source: Source, pairs: list[Pair]) -> TwoColorViews:
        """Single frames, each augmented twice."""
        return TwoColorViews(*self.arguments(source, pairs), blur_taps=None)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The loss of a batch."""
        loss = disagreement(self.features(batch["image1"]), self.features(batch["image2"]))
        return {"agreement": self.config.weight * loss}
'''
TASK_RECIPE = """
name: agreement_r18.wall
task: {name: agreement, weight: 2.0}
model: {encoder: resnet18, init: scratch, width: 8}
data: {source: wall, size: [48, 64], units: frames, options: {frames: 4}}
optim: {batch: 2, lr: 0.01, steps: 2}
workers: 0
"""
USE = """
import sys
import geo_pretrain as gp, torch
from geo_pretrain.cli import app

recipe, data, out = sys.argv[1:]
app(["train", recipe, "--data", data, "--out", out], standalone_mode=False)
app(["verify", out], standalone_mode=False)
network = gp.load_backbone(out, decoder=True)
print("shape", tuple(network(torch.zeros(1, 3, 48, 64)).shape))
"""


def test_a_pretext_task_is_one_file_its_loss_and_one_row(copy: Path, tmp_path: Path):
    """It trains two steps on the source above, and what it writes is a checkpoint like any other."""
    add_wall(copy)
    training = copy / "geo_pretrain" / "training"
    (training / "losses" / "agreement.py").write_text(LOSS, encoding="utf-8")
    (training / "tasks" / "agreement.py").write_text(TASK, encoding="utf-8")
    row = '    "agreement": ("geo_pretrain.training.tasks.agreement:Agreement", {}),'
    append_row(training / "tasks" / "__init__.py", "TASKS", row)
    recipe, out = tmp_path / "agreement.yaml", tmp_path / "agreement"
    recipe.write_text(TASK_RECIPE, encoding="utf-8")
    assert "shape (1, 4, 24, 32)" in run(copy, "-c", USE, str(recipe), f"wall:{tmp_path}", str(out))
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(json.loads(line)["agreement"] > 0 for line in lines)
    run(copy, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "tests/test_architecture.py", "-k", "fault")
