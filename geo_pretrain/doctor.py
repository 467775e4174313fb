"""What this machine offers geo_pretrain, and whether the installation works: `geo-pretrain doctor`.

Every finding is a line with a state: "ok", "note" (nothing is wrong, something is missing that some commands want) or
"wrong" (what should work does not), with what to do.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlsplit

from geo_pretrain.catalog import CATALOG
from geo_pretrain.errors import GeoPretrainError, first_line
from geo_pretrain.hub.cache import default_cache, names_here
from geo_pretrain.hub.sources import OFFLINE_VARIABLE
from geo_pretrain.hub.transfer import CACHE_VARIABLE, probe

NEEDED = ("torch", "torchvision", "numpy", "safetensors", "huggingface_hub", "xxhash", "pillow", "pyyaml")
EXTRAS = {  # what some commands want, and the extra that brings it
    "numba": "fast",
    "timm": "adapters",
    "segmentation-models-pytorch": "adapters",
    "scipy": "training",
    "pycocotools": "training",
    "matplotlib": "training",
    "tensorboard": "training",
    "laspy": "las",
    "submitit": "cluster",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "scenezoo": "datasets",
    "h5py": "datasets",
    "pyliblzfse": "datasets",
    "OpenEXR": "datasets",
    "rerun-sdk": "rerun",
}
ROOM = 2 << 30  # bytes that the largest checkpoints need in the cache
SHARED = 1 << 30  # bytes of shared memory that batches of several workers fit into; docker gives 64 MB


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    state: str  # "ok", "note" or "wrong"
    text: str


def examine(*, network: bool = True) -> Iterator[Finding]:
    """Look at versions, processor, engines, cache and hosts, and run a small test; findings come as they are made.

    `network=False`, or HF_HUB_OFFLINE=1, leaves the hosts alone.
    """
    yield from _versions()
    yield from _machine()
    yield from _cache()
    offline = os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE")
    if network and not offline:
        yield from _hosts()
    else:
        yield Finding("hosts", "note", f"not asked ({f'{OFFLINE_VARIABLE} is set' if offline else '--no-network'})")
    for test in (_image_network, _point_network, _checkpoint):
        yield _tried(test)


def _versions() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.platform()}")
    found = {name: _version(name) for name in NEEDED}
    missing = [name for name, number in found.items() if number is None]
    listed = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    yield Finding("libraries", "ok", f"geo_pretrain {_version('geo_pretrain') or 'from its folder'}, {listed}")
    if missing:
        yield Finding("libraries", "wrong", f"missing: {', '.join(missing)}; install geo_pretrain again with pip")
    for extra in dict.fromkeys(EXTRAS.values()):
        have = {name: _version(name) for name, of in EXTRAS.items() if of == extra}
        absent = [name for name, number in have.items() if number is None]
        if absent:
            text = f"without {', '.join(absent)}: pip install 'geo_pretrain[{extra}]'"
            yield Finding(f"extra {extra}", "note", text)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{name} {number}" for name, number in have.items()))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    threads = torch.get_num_threads()
    words = f"{threads} thread{'s' * (threads != 1)}"
    yield Finding("processor", "ok", f"{os.cpu_count()} cores, {capability}, {words}{load}")
    set_by_user = [f"{key}={os.environ[key]}" for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ]
    if set_by_user:
        yield Finding("threads", "ok", ", ".join(set_by_user))
    yield from _workers()
    yield _sparse_engine()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("GPU", "ok", f"{', '.join(names)}, CUDA {torch.version.cuda}")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        yield Finding("GPU", "note", f"none is found ({built}): everything runs on the CPU")


def _sparse_engine() -> Finding:
    import torch

    try:
        from geo_pretrain.sparse import backend
    except GeoPretrainError as error:  # the environment asks for an engine that is none, or is not installed
        return Finding("sparse engine", "wrong", str(error))
    return Finding("sparse engine", "ok", f"{backend.describe()}; {backend.describe(torch.bfloat16)}")


def _workers() -> Iterator[Finding]:
    """How loaders start their processes, and where these hand on batches: shared memory may be small in a container."""
    import multiprocessing

    method, shared = multiprocessing.get_start_method(), Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("loader's workers", "ok", f"start by {method}")
        return
    size = shutil.disk_usage(shared).total
    text = f"start by {method}, {size / 1e9:.1f} GB of shared memory"
    if size < SHARED:
        yield Finding(
            "loader's workers", "note", f"{text}: give the container more (docker --shm-size 8g) or workers=0"
        )
    else:
        yield Finding("loader's workers", "ok", text)


def _cache() -> Iterator[Finding]:
    folder = default_cache()
    above = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(above).free
    text = f"{folder}, {free / 1e9:.1f} GB free"
    if not above.is_dir():
        yield Finding("cache", "wrong", f"{above} is a file: set {CACHE_VARIABLE} to a folder")
    elif not os.access(above, os.W_OK):
        yield Finding("cache", "wrong", f"{text}, not writable: set {CACHE_VARIABLE} to another folder")
    elif free < ROOM:
        yield Finding("cache", "note", f"{text}: the largest checkpoints need {ROOM / 1e9:.0f} GB")
    else:
        yield Finding("cache", "ok", text)
    here = sorted(names_here().intersection(CATALOG))
    yield Finding("ready offline", "ok" if here else "note", ", ".join(here) or "no name of the catalog yet")


def _hosts() -> Iterator[Finding]:
    """Ask for one file of each host where weights lie."""
    files: dict[str, str] = {}
    for entry in CATALOG.values():
        for file in entry.authors_files:
            files.setdefault(urlsplit(file.url).hostname or "", file.url)

    def ask(host: str) -> Finding:
        try:
            probe(files[host])
        except GeoPretrainError as error:
            return Finding("host", "note", f"{host}: {first_line(error)}")
        return Finding("host", "ok", f"{host}: offers its file")

    with ThreadPoolExecutor(len(files)) as pool:
        yield from pool.map(ask, files)


def _tried(test: Callable[[], str]) -> Finding:
    topic = "test"
    begin = time.perf_counter()
    try:
        text = test()
    except Exception as error:  # whatever is broken is what is looked for
        return Finding(topic, "wrong", f"{test.__name__.strip('_').replace('_', ' ')}: {first_line(error)}")
    return Finding(topic, "ok", f"{text} ({time.perf_counter() - begin:.1f} s)")


def _image_network() -> str:
    import torch

    from geo_pretrain.backbones.resnet_unet import ResNetEncoder

    with torch.no_grad():
        maps = ResNetEncoder(18, width=8).eval()(torch.zeros(1, 3, 64, 64))
    return f"a ResNet gives {len(maps)} maps"


def _point_network() -> str:
    import torch

    from geo_pretrain.sparse import SparseTensor
    from geo_pretrain.sparse.backend import use
    from geo_pretrain.sparse.layers import Conv3d

    torch.manual_seed(0)
    coords = torch.cat([torch.zeros(500, 1, dtype=torch.int32), torch.randint(0, 12, (500, 3)).int()], 1).unique(dim=0)
    x, layer = SparseTensor(coords, torch.randn(len(coords), 8)), Conv3d(8, 16)
    with torch.no_grad():
        found = layer(x).feats
        with use("plain"):
            plain = layer(SparseTensor(x.coords, x.feats)).feats
    error = float((found - plain).abs().max())
    if not error < 1e-4:
        raise GeoPretrainError(f"a sparse convolution differs by {error:.1e} between the engines")
    return "a sparse convolution, equal by the chosen engine and by plain PyTorch"


def _checkpoint() -> str:
    import torch

    from geo_pretrain.backbones.build import build, golden_values
    from geo_pretrain.catalog.entry import Arch, License
    from geo_pretrain.checkpoint import write_checkpoint
    from geo_pretrain.contract import ImageContract
    from geo_pretrain.loading import verify

    torch.manual_seed(0)
    arch = Arch("resnet", {"depth": 18, "width": 8})
    network = build(arch).eval()
    entry = next(entry for entry in CATALOG.values() if isinstance(entry.contract, ImageContract))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(
            Path(folder, "test"),
            name="doctor_test",
            arch=arch,
            contract=entry.contract,
            weights={"encoder": network.state_dict()},
            golden=golden_values(network),
            license=License(weights="MIT", code="MIT", datasets=(("none", "MIT"),), base_model="none"),
            provenance={},
            recipe_yaml=None,
            log=None,
            card="# doctor_test\n",
        )
        verify(Path(folder, "test"))
    return "a checkpoint is written, read, checked and reproduces its outputs"
