"""Refuse to build a wheel of files that are too big, missing or other ones than their config.json promises."""

import hashlib
import json
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LARGEST_FILE, LARGEST_WHEEL = 80_000_000, 100_000_000  # bytes; package indexes take 100 MB


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        folders = sorted(path.parent for path in Path(self.root, "geo_pretrain_weights_3d").glob("*/config.json"))
        if not folders:
            self.app.abort("geo_pretrain_weights_3d: holds no checkpoint; `geo-pretrain weights add RUN` puts one in.")
        for folder in folders:
            files = json.loads((folder / "config.json").read_bytes())["files"]
            for name, promised in files.items():
                path = folder / name
                if not path.is_file():
                    self.app.abort(f"{path}: is missing; config.json lists it. Check the folder out again.")
                size = path.stat().st_size
                if size > LARGEST_FILE:
                    self.app.abort(f"{path}: has {size} bytes; at most {LARGEST_FILE} are accepted.")
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if (size, digest) != (promised["size"], promised["sha256"]):
                    self.app.abort(
                        f"{path}: sha256 is {digest} ({size} bytes), expected {promised['sha256']} "
                        f"({promised['size']} bytes). Check the folder out again."
                    )

    def finalize(self, version, build_data, artifact_path):
        size = Path(artifact_path).stat().st_size
        if size > LARGEST_WHEEL:
            Path(artifact_path).unlink()
            self.app.abort(f"{artifact_path}: would have {size} bytes; at most {LARGEST_WHEEL} are accepted.")
