"""The wheel project of a package with weights: pyproject.toml, README with provenance and digests, license, hook.

    weights/<package>/pyproject.toml, README.md, LICENSE, SHA256SUMS, hatch_build.py
    weights/<package>/<package>/__init__.py
    weights/<package>/<package>/<name>/    checkpoint folders, and loss.png beside their files

All texts follow from the checkpoint folders, so writing them again changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from geo_pretrain.cards.markdown import join, table
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import OUR_PACKAGES, install_code
from geo_pretrain.checkpoint import CONFIG, Checkpoint, read_checkpoint
from geo_pretrain.errors import CheckpointError
from geo_pretrain.files import write_text
from geo_pretrain.hub.packages import GROUP

MB = 1_000_000
LARGEST_FILE, LARGEST_WHEEL = 80 * MB, 100 * MB  # bytes; package indexes take 100 MB
LARGEST_FOLDER = 120 * MB  # of all projects in one folder: what a repository is asked to carry
CURVE = "loss.png"  # beside the files of a checkpoint
LICENSE = "MIT"  # of every wheel
HOOK = Path(__file__).with_name("hatch_build.txt")
PYPROJECT = """\
# written by `geo-pretrain weights`
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{package}"
version = "1.{count}.0"
description = "Weights for geo_pretrain: {names}"
readme = "README.md"
license = "{license}"
license-files = ["LICENSE"]
requires-python = ">=3.11"
authors = [{{ name = "The geo_pretrain authors" }}]

[project.entry-points."{group}"]
{package} = "{package}"

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.hatch.build.targets.wheel.hooks.custom]
path = "hatch_build.py"
"""


def projects(weights: Path) -> list[Path]:
    """The wheel projects in a folder."""
    return sorted(path.parent for path in weights.glob("*/pyproject.toml"))


def checkpoints(project: Path) -> list[Checkpoint]:
    """The checkpoints of a project, by name. Raises `CheckpointError` for a folder that is none."""
    return [read_checkpoint(path.parent) for path in sorted((project / project.name).glob(f"*/{CONFIG}"))]


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def check_sizes(project: Path, beside: Iterable[Path] = ()) -> None:
    """Raise `CheckpointError` for a file, a project or a folder of projects that is too big.

    `beside`: checkpoint folders that are to go into the project.
    """
    beside = list(beside)
    for path in (path for folder in (project / project.name, *beside) for path in folder.rglob("*")):
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise CheckpointError(
                f"{path}: has {path.stat().st_size / MB:.1f} MB; at most {LARGEST_FILE // MB} MB a file are accepted."
            )
    more = sum(map(size_of, beside))
    size = size_of(project) + more
    if size > LARGEST_WHEEL:
        raise CheckpointError(
            f"{project.name} would hold {size / MB:.1f} MB; a wheel may have {LARGEST_WHEEL // MB} MB. Put it into "
            "another wheel (--package NAME), or leave the networks out that only pairs need (--without teacher)."
        )
    if (total := size_of(project.parent) + more) > LARGEST_FOLDER:
        raise CheckpointError(
            f"{project.parent} would hold {total / MB:.1f} MB; a repository may carry {LARGEST_FOLDER // MB} MB. Make "
            "this wheel in a folder outside of it (--to FOLDER --package NAME): it is published, not committed."
        )


def write_project(project: Path) -> None:
    """Write the texts of a project anew from its checkpoints."""
    for name, text in texts(project).items():
        if not (project / name).is_file() or (project / name).read_text(encoding="utf-8") != text:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(project / name, text)


def texts(project: Path) -> dict[str, str]:
    """The texts of a project by their paths."""
    package, held = project.name, checkpoints(project)
    names = ", ".join(checkpoint.name for checkpoint in held)
    hook = HOOK.read_text(encoding="utf-8").replace("@PACKAGE@", package)
    for limit in ("LARGEST_FILE", "LARGEST_WHEEL"):
        hook = hook.replace(f"@{limit}@", f"{globals()[limit]:_}")
    sums = [f"{file.sha256}  {package}/{c.name}/{name}\n" for c in held for name, file in c.files.items()]
    return {
        "pyproject.toml": PYPROJECT.format(package=package, count=len(held), names=names, license=LICENSE, group=GROUP),
        "README.md": _readme(package, held),
        "LICENSE": license_text(),
        "SHA256SUMS": "".join(sums),
        "hatch_build.py": hook,
        f"{package}/__init__.py": f'"""Weights for geo_pretrain, which reads them by their metadata: {names}."""\n',
    }


def license_text() -> str:
    """The MIT license."""
    return (Path(__file__).with_name("license.txt")).read_text(encoding="utf-8")


def _readme(package: str, held: list[Checkpoint]) -> str:
    example = held[0].name if held else "NAME"
    use = f'import geo_pretrain as gp\n\nnetwork = gp.load_backbone("{example}")  # no network is needed'
    parts = [
        f"# {package}",
        "Weights for geo_pretrain, in float16. They were trained on procedural rooms from random weights, so code and "
        "weights are under the MIT license.",
        f"```bash\n{install_code(package)}\ngeo-pretrain verify {example}\n```",
        f"```python\n{use}\n```",
        "## What is in it",
        provenance_table(held),
    ]
    for checkpoint in held:
        rows = [
            (f"`{name}`", file.role, f"{file.size:,}", f"`{file.sha256}`") for name, file in checkpoint.files.items()
        ]
        parts += [
            f"## {checkpoint.name}",
            f"`{package}/{checkpoint.name}` holds the recipe, the log, the loss curve and the card.",
            f"![Losses of {checkpoint.name}]({package}/{checkpoint.name}/{CURVE})",
            table(("file", "role", "bytes", "sha256"), rows),
        ]
    return join(*parts)


def provenance_table(held: list[Checkpoint]) -> str:
    """One row a checkpoint: network, data, training, how far float16 moved its outputs, bytes, license."""
    rows = []
    for checkpoint in held:
        moved = checkpoint.provenance.get("float16", {}).get("moved", {})
        rows.append(
            (
                f"`{checkpoint.name}`",
                checkpoint.arch.title,
                ", ".join(name for name, _ in checkpoint.license.datasets),
                made(checkpoint),
                checkpoint.license.base_model,
                f"{max(moved.values()):.2%}" if moved else "-",
                f"{size_of(checkpoint.folder) / MB:.1f}",
                checkpoint.license.weights,
            )
        )
    head = ("name", "network", "data", "trained", "started from", "moved by float16", "MB", "license")
    return table(head, rows)


def made(checkpoint: Checkpoint) -> str:
    """How long a checkpoint was trained, and where: "20,000 steps in 31.2 h on cpu"."""
    facts = checkpoint.provenance
    steps, seconds = facts.get("steps", 0), facts.get("seconds", 0.0)
    processes = f", {facts['processes']} processes" if facts.get("processes", 1) != 1 else ""
    return f"{steps:,} steps in {seconds / 3600:.1f} h on {facts.get('device', 'cpu')}{processes}"


def write_overview(weights: Path) -> None:
    """Write weights/README.md: the wheels and what they hold."""
    write_text(weights / "README.md", overview(weights))
    write_text(weights / "LICENSE", license_text())


def overview(weights: Path) -> str:
    """The text of weights/README.md."""
    found = projects(weights)
    parts = [
        "# Weights that travel as Python packages",
        "Written by `geo-pretrain weights`; see [docs/publish.md](../docs/publish.md#weights-offline). `make weights` "
        "builds and installs the wheels. Archives of the repository leave this folder out.",
    ]
    for project in found:
        parts += [f"## {project.name}", provenance_table(checkpoints(project))]
    return join(*parts, "" if found else "None yet: the first ones are being trained.")


def planned_package(name: str) -> str:
    """The package of this project that takes a checkpoint of the catalog, unless somebody says otherwise."""
    return OUR_PACKAGES[0] if CATALOG[name].modality == "2d" else OUR_PACKAGES[1]
