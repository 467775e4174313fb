"""Laws 1 and 2 of the house: arrows run one way, and importing stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "geo_pretrain"

# Floors of the house, lowest first. A module may import from floors below its own, and from its own without a circle.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__", "errors"),
    ("sparse", "geometry", "rooms"),
    ("backbones", "contract", "convert", "catalog", "checkpoint"),
    ("cards",),
    ("hub",),  # loading turns names into folders with it; it converts authors' files and writes their cards
    ("loading",),
    ("adapters", "publish"),
    ("training",),
    ("cli", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIGHT = (
    "geo_pretrain",
    "geo_pretrain.errors",
    "geo_pretrain.contract",
    "geo_pretrain.catalog",
    "geo_pretrain.checkpoint",
    "geo_pretrain.cards",
    "geo_pretrain.hub",
    "geo_pretrain.hub.bundle",
    "geo_pretrain.hub.cache",
    "geo_pretrain.cli",
    "geo_pretrain.convert",
    "geo_pretrain.convert.out",
    "geo_pretrain.publish",
    "geo_pretrain.convert.kernels",
    "geo_pretrain.convert.keys",
    "geo_pretrain.convert.pri3d",
    "geo_pretrain.convert.sr_unet",
)


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, at_run_time: bool = True) -> set[str]:
    """Modules of this package that a file imports, those inside functions too; not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    names = set()
    nodes = ast.walk(tree) if at_run_time else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in MODULES}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} <= set(FLOOR)
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", list(MODULES))
def test_arrows_run_one_way(module: str):
    for target in imports(MODULES[module]):
        assert FLOOR[room(target)] <= FLOOR[room(module)], f"{module} must not import {target}"


def test_there_are_no_circles_between_modules():
    """Imports at the top of files, where a circle would break; the package's own __init__ imports nothing there."""
    graph = {module: imports(path, at_run_time=False) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for target in graph[module]:
                # `from package import submodule` inside that package is not an arrow to the package's own file
                if not module.startswith(target + "."):
                    visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_optional_libraries_are_imported_where_they_are_used():
    optional = {
        "MinkowskiEngine",
        "timm",
        "segmentation_models_pytorch",
        "pycocotools",
        "scipy",
        "tensorboard",
        "matplotlib",
        "numba",
        "gradio",
    }
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & optional, module


def heavy_modules(code: str) -> set[str]:
    watched = "{'torch', 'torchvision', 'numpy', 'huggingface_hub', 'safetensors'}"
    script = f"import sys\n{code}\nprint(*sorted({watched} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str):
    assert heavy_modules(f"import {module}") == set()


def test_listing_and_info_import_nothing_heavy():
    code = "import geo_pretrain as gp; assert gp.list_backbones(); gp.backbone_info('pri3d_view_r18'); dir(gp)"
    assert heavy_modules(code) == set()


def test_the_public_face_is_complete_and_small():
    import geo_pretrain as gp

    assert sorted(gp.__all__) == ["backbone_info", "list_backbones", "load_backbone", "verify", "voxelize"]
    for name in gp.__all__:
        assert callable(getattr(gp, name))
        assert name in dir(gp)
    with pytest.raises(AttributeError, match="no attribute 'load_backbones'; public names: backbone_info"):
        _ = gp.load_backbones
    assert len(MODULES["geo_pretrain"].read_text().splitlines()) < 40
