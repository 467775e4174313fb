"""torch.hub's door, entered as a stranger enters it."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from geo_pretrain.backbones.resnet_unet import ResNetEncoder, ResNetUNet
from geo_pretrain.backbones.sr_unet import SRUNet
from geo_pretrain.catalog import CATALOG
from tests.test_architecture import OPTIONAL
from tests.zoo import as_tiny, write_tiny

REPO = Path(__file__).resolve().parents[1]


def load_hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", REPO / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_entry_points_are_exactly_the_names_of_the_catalog():
    module = load_hubconf()
    # the rule torch.hub.list applies
    entry_points = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert entry_points == set(CATALOG)
    assert "ResNet" not in entry_points
    assert all(entry.arch.name in getattr(module, name).__doc__ for name, entry in CATALOG.items())
    for package in module.dependencies:
        assert importlib.util.find_spec(package) is not None


@pytest.mark.parametrize(
    ("name", "network_class"),
    [
        ("pri3d_view_r18", ResNetEncoder),
        ("pri3d_view_r18.rooms_toy", ResNetEncoder),
        ("csc_100k_srunet34", SRUNet),
        ("slidr_srunet34.nuscenes", SRUNet),
    ],
)
def test_torch_hub_loads_by_name(name: str, network_class: type):
    with torch.device("meta"):
        network = torch.hub.load(str(REPO), name, source="local", trust_repo=True, pretrained=False)
    assert isinstance(network, network_class)
    assert network.name == name


def test_torch_hub_passes_every_argument_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = "pri3d_view_r18.rooms_toy"
    monkeypatch.setattr("geo_pretrain.catalog.CATALOG", CATALOG | {name: as_tiny(name)})
    write_tiny(tmp_path / name, name=name)
    network = torch.hub.load(str(REPO), name, source="local", trust_repo=True, hub=str(tmp_path), decoder=True)
    assert isinstance(network, ResNetUNet)
    assert network.load_report.coverage == 1.0


def libraries_behind(*modules: str) -> set[str]:
    """Third-party libraries that these modules of ours may import, in functions too; optional ones are not imported."""
    seen: set[str] = set()
    libraries: set[str] = set()
    todo = list(modules)
    while todo:
        module = todo.pop()
        path = REPO / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                top, _, rest = name.partition(".")
                if top == "geo_pretrain":
                    todo += [name, name.rpartition(".")[0]] if rest else [name]
                elif top not in sys.stdlib_module_names:
                    libraries.add(top)
    return libraries


def test_dependencies_are_what_is_imported_and_what_pip_installs():
    from_pypi = {"pyyaml": "yaml", "pillow": "PIL"}
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    installed = {re.match(r"[\w-]+", text)[0].lower() for text in project["dependencies"]}
    imported = libraries_behind("hubconf", "geo_pretrain.loading") - OPTIONAL | {"PIL"}  # images, by torchvision
    assert set(load_hubconf().dependencies) == imported
    assert imported <= {from_pypi.get(name, name) for name in installed}
