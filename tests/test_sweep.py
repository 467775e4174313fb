"""Every checkpoint that its authors publish: each of their files fetched, converted, verified, run, tensor by tensor.

The files are written from the lists of the authors' keys, with random weights, in the formats of their time, and served
by a server that imitates their hosts. One of each kind of storage is as large as the real one; the others have fewer
channels. That our networks have the real shapes is tested in tests/backbones, from the same lists.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import geo_pretrain as gp
from geo_pretrain import catalog
from geo_pretrain.catalog import CATALOG, AuthorsFile, Entry
from geo_pretrain.checkpoint import read_checkpoint
from geo_pretrain.hub.cache import remove
from geo_pretrain.hub.extract import Limits
from tests.authors_files import manifest, write
from tests.catalog_names import NAMES
from tests.hub.hosts import Hosts
from tests.zoo import resolve

PUBLISHED = [entry for entry in CATALOG.values() if entry.status == "published-by-authors"]
CASES = [(entry.name, number) for entry in PUBLISHED for number in range(len(entry.authors_files))]
NARROW = 8  # channels of the stem where it is not REAL; the real ones have 64 in 2D, 32 in 3D
# torch's archive, one pickle, torch's stream of pickles: at their real size
REAL = [("pri3d_view_geo_r18", 0), ("moco_v2_sup_in_sn_r50", 1), ("pointcontrast_nce_srunet34", 0)]


def test_the_sweep_covers_what_the_authors_publish():
    """Counted from the list of published files, not from the catalog."""
    cases = [(name, number) for name, number in CASES if name in NAMES]
    assert len({name for name, _ in cases}) == 17
    assert len(cases) == 21
    assert set(REAL) <= set(cases)
    formats = Counter(CATALOG[name].authors_files[number].format for name, number in cases)
    assert formats == {
        "pri3d": 8, "torchvision": 1, "detectron2": 3, "moco": 1, "pointcontrast": 2, "csc": 4, "slidr": 2
    }  # fmt: skip


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_an_authors_file_becomes_a_network(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CATALOG[name]
    offered = entry.authors_files[number]
    path = tmp_path / "file"
    if (name, number) not in REAL:
        entry = narrow(entry)
    expected = write(entry, path, seed=number, file=number)
    if len(entry.authors_files) > 1:
        entry = only(entry, offered)
    monkeypatch.setattr(catalog, "CATALOG", {**CATALOG, name: entry})
    monkeypatch.setenv("GEO_PRETRAIN_CACHE", str(tmp_path / "cache"))
    with Hosts({offered.url: path}, scan_limit=100 << 20) as hosts:
        monkeypatch.setenv("GEO_PRETRAIN_MIRROR", hosts.url)
        whole = entry.arch.has_decoder and "decoder" in offered.roles
        network: Any = gp.load_backbone(name, decoder=whole)
        assert dict(hosts.bytes_sent) == {offered.url: os.path.getsize(path)}
    path.unlink()
    # from here on there is no server: the cache is enough
    compare(network, expected, whole)
    assert network.load_report.coverage == 1
    assert (network.name, network.contract) == (entry.name, entry.contract)
    run(network, entry)
    if whole or not entry.arch.has_decoder:
        result = gp.verify(name)
        assert result.passed
        assert len(result.errors) == (1 if entry.arch.in_one_piece else 6 if whole else 5)
    found = read_checkpoint(resolve(name))
    assert found.license == entry.license
    assert found.provenance["source"]["url"] == offered.url
    remove([name])


def test_limits_suffice_for_the_largest_file():
    """It has several roles; the limits leave as much again for an optimizer's state."""
    shapes = manifest("pri3d_full_model_r50")["keys"].values()
    assert 2 * sum(4 * math.prod(shape) for shape in shapes) < Limits().output


def narrow(entry: Entry) -> Entry:
    """The entry with a network of the same layers and fewer channels."""
    args = dict(entry.arch.args)
    if entry.arch.name == "resnet_unet":
        args["out_chans"] = args["out_chans"] * NARROW // args["width"]
    return replace(entry, arch=replace(entry.arch, args=args | {"width": NARROW}))


def only(entry: Entry, offered: AuthorsFile) -> Entry:
    """The entry as if this were the only file; one that covers a part of the network keeps its others by name."""
    others = tuple(replace(f, url=f"{f.url}.gone") for f in entry.authors_files if f is not offered)
    return replace(entry, authors_files=(offered, *others))


def compare(network: Any, expected: dict[str, dict[str, torch.Tensor]], whole: bool) -> None:
    parts = {role: network.get_submodule(role) for role in ("encoder", "decoder")} if whole else {}
    parts = parts or {"model" if "model" in expected else "encoder": network}
    for role, part in parts.items():
        state = part.state_dict()
        assert state.keys() == expected[role].keys()
        assert all(state[key].equal(value) for key, value in expected[role].items())


@torch.no_grad()
def run(network: Any, entry: Entry) -> None:
    """On raw input, as a user would."""
    generator = np.random.default_rng(0)
    if entry.modality == "2d":
        image = generator.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        out = network(entry.contract.transforms(resize=False)(image)[None])
        maps = [out] if isinstance(out, torch.Tensor) else out
        assert maps[0].shape[-2:] == (32, 48)
    else:
        points = generator.uniform(-1, 1, (500, 3)).astype(np.float32) * (4, 4, 1)
        names = entry.contract.given_channels
        features = generator.uniform(0, 1, (500, len(names))).astype(np.float32) if names else None
        maps = [network.encode_points(torch.from_numpy(points).float(), features, out="final")]
        assert maps[0].shape == (500, entry.arch.args["out_chans"])
    for value in maps:
        assert value.isfinite().all()
        assert value.std() > 0
