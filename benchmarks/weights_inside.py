"""What `benchmarks.weights_offline` runs inside the clean environment: load, verify, compare, damage. Prints JSON.

It knows nothing but the installed packages: run with `python -I`, without this repository on the path.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import geo_pretrain as gp
from geo_pretrain import hub
from geo_pretrain.catalog import CATALOG
from geo_pretrain.checkpoint import CONFIG, read_checkpoint
from geo_pretrain.errors import GeoPretrainError
from geo_pretrain.hub.packages import package_folders


def use(name: str) -> dict[str, Any]:
    """Load, verify and run one checkpoint by its name."""
    opened = hub.open(name)
    folder = opened.fetch(*opened.network_roles()).folder
    two_d = opened.arch.modality == "2d"
    network: Any = gp.load_backbone(name, decoder=opened.arch.has_decoder)
    if two_d:
        output = network(network.transforms(torch.rand(1, 3, 120, 160)))
    else:
        cloud = torch.rand(2000, 3)
        wanted = network.contract.given_channels
        output = network.encode_points(cloud, torch.rand(2000, len(wanted)) if wanted else None)
    stored = load_file(folder / f"{opened.network_roles()[0]}.safetensors")
    matrices = [value for value in stored.values() if value.ndim > 1]
    assert all(value.dtype is torch.float16 for value in matrices)
    assert bool(torch.isfinite(output).all())
    provenance = read_checkpoint(folder).provenance
    return {
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "load report": str(network.load_report),
        "output": list(output.shape),
        "golden": max(gp.verify(name).errors.values()),
        "moved by float16": max(provenance["float16"]["moved"].values()),
        "doors": {door.place: door.is_open for door in hub.doors(name)},
    }


def put(path: Path, data: bytes) -> None:
    """Write a new file in place of one that an installer's cache may share."""
    path.unlink()
    path.write_bytes(data)


def cut(path: Path) -> None:
    put(path, path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    put(path, bytes(data))


def rename(path: Path) -> None:
    path.rename(path.with_name(f"x{path.name}"))


def wrong_digest(path: Path) -> None:
    """Let config.json promise another digest of the file, as a whole and sealed description would."""
    config = path.with_name(CONFIG)
    facts = json.loads(config.read_text())
    facts["files"][path.name]["sha256"] = "0" * 64
    facts["files"][path.name].pop("xxh3", None)
    facts.pop("sha256", None)  # the seal
    put(config, json.dumps(facts).encode())


FAULTS: dict[str, Callable[[Path], Any]] = {
    "cut off": cut,
    "flipped byte": flip,
    "missing": Path.unlink,
    "renamed": rename,
    "wrong digest": wrong_digest,
}


def damage(name: str, package: str) -> list[dict[str, str]]:
    """Spoil each file in each way, and keep what the first failing of load and verify said."""
    folder = package_folders()[package] / name
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        keep = Path(temporary) / "keep"
        shutil.copytree(folder, keep)
        for file in sorted({*read_checkpoint(folder).files, CONFIG}):
            for fault, spoil in FAULTS.items():
                if file == CONFIG and fault == "wrong digest":
                    continue
                spoil(folder / file)
                rows.append({"file": file, "fault": fault, **said(name, package, folder, file)})
                shutil.rmtree(folder)
                shutil.copytree(keep, folder)
    return rows


def said(name: str, package: str, folder: Path, file: str) -> dict[str, str]:
    """Who refused, with which words; raises where nobody did, or where the words help nobody."""
    for step, call in (("load", lambda: gp.load_backbone(name)), ("verify", lambda: gp.verify(name))):
        try:
            call()
        except GeoPretrainError as error:
            text = str(error)
            lines = [line for line in text.splitlines() if file in line or CONFIG in line]
            assert lines, f"{file}: not named in: {text}"
            assert f"--no-deps ./weights/{package}`" in text or "not installed" in text, (
                f"{file}: no line that mends it: {text}"
            )
            return {"told by": step, "words": lines[0].replace(str(folder), f"{package}/{name}")}
    raise AssertionError(f"{name}/{file}: nobody noticed")


def is_offline() -> bool:
    """Whether no address of the public network can be reached."""
    try:
        socket.create_connection(("192.0.2.1", 443), timeout=0.5).close()  # an address for documentation
    except TimeoutError:
        return False  # there is a way out, on which nobody answers
    except OSError:
        return True
    return False


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = {"torch": torch.__version__, "network": "none" if is_offline() else "reachable"}
    found["package"] = str(Path(gp.__file__).parent)
    packages = {name: CATALOG[name].packages[0] for name in sys.argv[1:]}
    found["used"] = {name: use(name) for name in packages}
    found["damage"] = {name: damage(name, package) for name, package in packages.items()}
    assert all(gp.verify(name).passed for name in packages)  # put back as it was
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
