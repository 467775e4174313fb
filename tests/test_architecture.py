"""Laws 1 and 2 of the house: arrows run down, without circles; importing stays light. Files and functions are short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.zoo import write_tiny_3d

HOUSE = Path(__file__).resolve().parents[1]
ROOT = HOUSE / "geo_pretrain"

# Floors of the house, lowest first. A module imports from floors below its own, and from its own without a circle.
# A row may name a package, or one module of it that stands on another floor; the longest matching name counts.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "redact",
        "remaining",
        "progress",
        "errors",
        "files",
        "staging",
        "digests",
        "devices",
        "yaml_text",
        "geometry",
        "inputs",
        "online",
        "seeding",
        "targets",
        "heap",
        "threads",
        "sparse.backend",
    ),
    ("sparse", "rooms"),  # rooms: the procedural data set, which yields arrays and knows nothing of networks
    ("contract",),
    ("backbones", "convert"),
    ("catalog",),
    ("tensors",),
    ("checkpoint",),
    ("convert.out", "cards"),  # convert.out writes a checkpoint folder in other people's formats
    ("hub",),  # opens names as folders: converts authors' files and writes their cards
    ("loading", "fitting", "halving", "listing"),
    ("adapters", "publish", "doctor"),
    (
        "training.batchnorm",
        "training.cluster",
        "training.depthwise",
        "training.distributed",
        "training.heartbeat",
        "training.states",
        "training.stops",
        "training.runs",
        "training.geometry3d",
        "training.losses",
        "training",
    ),
    ("training.checks",),
    ("training.config",),
    ("training.recipe", "training.cloud_recipe", "training.finetune_recipe", "training.precision", "training.schedule"),
    ("training.data", "advice"),  # advice: which checkpoint, by catalog and recipes
    ("training.initialize", "training.networks", "training.networks3d", "training.licenses"),
    ("training.tasks",),
    ("training.loop",),
    ("training.announcement",),
    ("training.evaluation",),
    ("training.visualize",),  # pictures, of what fine-tuning predicts, too
    ("training.finetune",),
    ("__init__",),  # the public face hands out names of loading and of fine-tuning, each imported when it is asked for
    ("training.pretrain",),
    ("training.bench", "training.demo", "distribution"),
    ("cli", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 500, 60
DATA_TABLES: set[str] = set()  # files of rows only, which may be as long as there is data
OPTIONAL = {
    "MinkowskiEngine",
    "llvmlite",
    "matplotlib",
    "numba",
    "pycocotools",
    "rerun",
    "scenezoo",
    "scipy",
    "segmentation_models_pytorch",
    "spconv",
    "submitit",
    "tensorboard",
    "timm",
    "warpconvnet",
}
# put together torchvision's own networks; all others import it where a 2D network is built or an image is changed
OF_TORCHVISION = {"geo_pretrain.adapters.torchvision", "geo_pretrain.training.finetune.detector"}
LIGHT = (
    "geo_pretrain",
    "geo_pretrain.errors",
    "geo_pretrain.contract",
    "geo_pretrain.catalog",
    "geo_pretrain.checkpoint",
    "geo_pretrain.cards",
    "geo_pretrain.listing",
    "geo_pretrain.advice",
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


def module_files() -> dict[str, Path]:
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = module_files()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def at_run_time(tree: ast.AST) -> list[ast.AST]:
    """Import statements and strings of a file, also inside functions; not those under TYPE_CHECKING, nor docstrings."""
    found: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Constant):
            found.append(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            waiting += ast.iter_child_nodes(node)
    return found


def named(node: ast.AST, module: str) -> set[str]:
    """Modules that an import statement names, or a string such as "geo_pretrain.loading:load" for import_module.

    A string counts wherever it stands (a row of a registry, a table of a lazy package): sooner or later it is imported.
    "geo_pretrain.adapters." with a name appended later may become any module of that package.
    """
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import"
        members = {f"{node.module}.{alias.name}" for alias in node.names}
        if members <= MODULES.keys() or members == {"geo_pretrain.__version__"}:
            return members  # submodules only: nothing is asked of the package's own file
        return members | {str(node.module)}
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("geo_pretrain."):
        name = node.value.partition(":")[0]
        return {module for module in MODULES if module.startswith(name)} if name.endswith(".") else {name}
    return set()


def imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of this package that one needs at run time: imported anywhere in its file, or named by a string."""
    targets = set()
    for node in at_run_time(tree):
        targets |= named(node, module) & MODULES.keys()
    for target in list(targets):  # importing a.b.c runs the files of a and a.b, too, unless we are inside of them
        parents = [target.rsplit(".", up)[0] for up in range(1, target.count("."))]
        targets |= {parent for parent in parents if not module.startswith(parent + ".")}
    return targets - {module}


def room(module: str) -> str:
    """The row of FLOORS a module belongs to."""
    name = module.partition(".")[2] or "__init__"
    while name not in FLOOR:
        name = name.rpartition(".")[0]
        assert name not in ("", "training"), f"{module} has no floor: add it to FLOORS"
    return name


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of two and more)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in order:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            groups.extend([sorted(group)] if len(group) > 1 else [])

    for node in graph:
        if node not in order:
            visit(node)
    return groups


def functions(tree: ast.AST, trail: str = "") -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function and method, signature included."""
    for node in ast.iter_child_nodes(tree):
        name = f"{trail}.{node.name}".lstrip(".") if hasattr(node, "name") else trail
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, (node.end_lineno or 0) - node.lineno + 1
        yield from functions(node, name)


@cache
def faults() -> dict[str, str]:
    """Each fault as one line, with what to know about it."""
    found: dict[str, str] = {}
    level: dict[str, set[str]] = {}  # arrows that stay on their floor: only these can close a circle
    between: dict[str, set[str]] = {room(module): set() for module in MODULES}  # the same for rooms
    for module, path in MODULES.items():
        floor = FLOOR[room(module)]
        targets = imports(module, parse(path))
        for target in sorted(targets):
            if FLOOR[room(target)] > floor and not any(other.startswith(target + ".") for other in targets):
                found[f"arrow {module} -> {target}"] = f"{room(target)} is above {room(module)}"
        level[module] = {target for target in targets if FLOOR[room(target)] == floor}
        between[room(module)] |= {room(target) for target in level[module]} - {room(module)}
    for kind, arrows in (("circle", level), ("circle of rooms", between)):
        for group in circles(arrows):
            within = [f"{member} -> {target}" for member in group for target in sorted(arrows[member] & set(group))]
            found |= {f"{kind} {member}": ", ".join(within) for member in group}
    return found | long_files() | long_functions() | optional_libraries() | early_torchvision()


def long_files() -> dict[str, str]:
    lengths = {
        path.relative_to(HOUSE).as_posix(): path.read_bytes().count(b"\n")
        for folder in ("geo_pretrain", "tests", "benchmarks")
        for path in sorted((HOUSE / folder).rglob("*.py"))
    }
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE and name not in DATA_TABLES}
    return {f"long file {name}": f"{lines} lines, at most {LONGEST_FILE}" for name, lines in too_long.items()}


def long_functions() -> dict[str, str]:
    return {
        f"long function {module}:{name}": f"{lines} lines, at most {LONGEST_FUNCTION}"
        for module, path in MODULES.items()
        for name, lines in functions(parse(path))
        if lines > LONGEST_FUNCTION
    }


def optional_libraries() -> dict[str, str]:
    return {
        f"optional library {module}: {name}": 'import it with errors.require("name", "extra")'
        for module, path in MODULES.items()
        for node in at_run_time(parse(path))
        if not isinstance(node, ast.Constant)
        for name in sorted(named(node, module))
        if name.partition(".")[0] in OPTIONAL or name.startswith("torch.utils.tensorboard")
    }


def early_torchvision() -> dict[str, str]:
    return {
        f"early torchvision {module}": "import it inside the function: point networks do without it"
        for module, path in MODULES.items()
        if module not in OF_TORCHVISION
        for node in parse(path).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        if any(name.partition(".")[0] == "torchvision" for name in named(node, module))
    }


def test_every_room_has_its_floor():
    assert {room(module) for module in MODULES} == set(FLOOR), "a row of FLOORS that names nothing"
    assert len(MODULES) > 20


@pytest.mark.parametrize(
    "kind",
    ["arrow", "circle", "circle of rooms", "long file", "long function", "optional library", "early torchvision"],
)
def test_there_is_no_fault(kind: str):
    new = {fault: why for fault, why in faults().items() if fault.startswith(kind + " ")}
    assert not new, "".join(f"\n  {fault}: {why}" for fault, why in new.items())


def test_the_guard_sees_each_kind_of_import(monkeypatch: pytest.MonkeyPatch):
    sources = {
        "geo_pretrain.low": 'import geo_pretrain.high\nROWS = {"a": "geo_pretrain.named:Class"}',
        "geo_pretrain.high": "def inside():\n    from geo_pretrain import low\n    from geo_pretrain.room import part",
        "geo_pretrain.named": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import geo_pretrain.low",
        "geo_pretrain.room": 'def member(name):\n    """geo_pretrain.low"""\n    return f"geo_pretrain.room.{name}"',
        "geo_pretrain.room.part": "from geo_pretrain.room import member",
        "geo_pretrain": "",
    }
    monkeypatch.setitem(globals(), "MODULES", dict.fromkeys(sources, ROOT))
    graph = {module: imports(module, ast.parse(source)) for module, source in sources.items()}
    assert graph["geo_pretrain.low"] == {"geo_pretrain.high", "geo_pretrain.named"}
    assert graph["geo_pretrain.high"] == {"geo_pretrain.low", "geo_pretrain.room", "geo_pretrain.room.part"}
    assert graph["geo_pretrain.named"] == graph["geo_pretrain"] == set()
    assert graph["geo_pretrain.room"] == {"geo_pretrain.room.part"}
    assert graph["geo_pretrain.room.part"] == {"geo_pretrain.room"}
    assert circles(graph) == [
        ["geo_pretrain.room", "geo_pretrain.room.part"],
        ["geo_pretrain.high", "geo_pretrain.low"],
    ]


def heavy_modules(code: str) -> set[str]:
    watched = "{'torch', 'torchvision', 'torch._dynamo', 'numpy', 'huggingface_hub', 'safetensors'}"
    script = f"import sys\n{code}\nprint(*sorted({watched} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str):
    assert heavy_modules(f"import {module}") == set()


def test_listing_and_info_import_nothing_heavy():
    code = "import geo_pretrain as gp; assert gp.list_backbones(); gp.backbone_info('pri3d_view_r18'); dir(gp)"
    assert heavy_modules(code) == set()


def test_point_networks_are_loaded_without_torchvision(tmp_path: Path):
    """torchvision imports torch._dynamo: together they take longer than torch itself."""
    folder = write_tiny_3d(tmp_path / "points").folder
    code = f"from geo_pretrain import load_backbone; load_backbone({str(folder)!r})"
    assert not heavy_modules(code) & {"torchvision", "torch._dynamo"}


def test_training_in_3d_is_prepared_without_torchvision():
    modules = "pretrain, tasks.pointcontrast, tasks.csc, tasks.ppkt, finetune.run, finetune.segmentation3d"
    code = "\n".join(f"import geo_pretrain.training.{module}" for module in modules.split(", "))
    assert not heavy_modules(code) & {"torchvision", "torch._dynamo"}


def test_the_public_face_is_complete_and_small():
    import geo_pretrain as gp

    names = "backbone_info list_backbones load_backbone load_finetuned load_image_encoder load_image_unet load_pair "
    names += "load_point_unet recommend verify voxelize"
    assert sorted(gp.__all__) == names.split()
    for name in gp.__all__:
        assert callable(getattr(gp, name))
        assert name in dir(gp)
    with pytest.raises(AttributeError, match="no attribute 'load_backbones'; public names: backbone_info"):
        _ = gp.load_backbones
    assert len(MODULES["geo_pretrain"].read_text().splitlines()) < 60
