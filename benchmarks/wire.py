"""Bytes on the wire for an encoder, a whole U-Net and a second call: from a hub of this project, and from the authors.

Run from a checkout: python -m benchmarks.wire

Real sizes (ResNet-50 U-Net), random weights, a server on the loopback interface that counts what it sends.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_results
from tests.authors_files import write
from tests.hub.hosts import Hosts

NAME = "pri3d_view_geo_r50"


def main() -> None:
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        os.environ["GEO_PRETRAIN_CACHE"] = str(root / "cache")
        from geo_pretrain import load_backbone
        from geo_pretrain.catalog import CATALOG
        from geo_pretrain.hub.authors import convert_file

        entry = CATALOG[NAME]
        files: dict[str, Path | bytes] = {}
        for number, offered in enumerate(entry.authors_files):
            write(entry, root / str(number), file=number)
            files[offered.url] = root / str(number)
        found = convert_file(root / "0", root / "made", like=entry, format="pri3d")
        for name in (*found.files, "config.json"):
            files[f"/hub/{NAME}/{name}"] = found.folder / name

        rows: dict[str, Any] = {}
        with Hosts(files) as hosts:
            os.environ["GEO_PRETRAIN_MIRROR"] = hosts.url

            def measure(what: str, **options: Any) -> None:
                before, start = sum(hosts.bytes_sent.values()), time.perf_counter()
                load_backbone(NAME, **options)
                sent = sum(hosts.bytes_sent.values()) - before
                rows[what] = {"megabytes": round(sent / 1e6, 1), "seconds": round(time.perf_counter() - start, 1)}

            hub = f"{hosts.url}/hub"
            measure("hub: encoder", hub=hub)
            measure("hub: encoder again", hub=hub)
            measure("hub: then the decoder", hub=hub, decoder=True)
            measure("authors: encoder", hub="")
            measure("authors: encoder again", hub="")
            measure("authors: then the decoder", hub="", decoder=True)
        sizes = {name: round(stored.size / 1e6, 1) for name, stored in found.files.items()}
    results = {"machine": machine(), "network": NAME, "files of the checkpoint, MB": sizes, "loads": rows}
    write_results("wire", "python -m benchmarks.wire", results, timed=False)


if __name__ == "__main__":
    main()
