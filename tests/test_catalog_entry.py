"""Entries of the catalog that contradict themselves cannot be built, nor parts of them."""

from __future__ import annotations

import dataclasses
import re

import pytest

from geo_pretrain import checkpoint
from geo_pretrain.catalog import CATALOG, Arch, AuthorsFile, File, Result
from geo_pretrain.catalog.entry import FILE_ROLES, PERCENTAGES, WEIGHT_ROLES, Baseline
from geo_pretrain.contract import VoxelContract
from geo_pretrain.errors import UnknownName

ENTRY = CATALOG["pri3d_geo_r18.rooms"]
BASE = f"https://host/hub/{ENTRY.name}"
ENCODER = File("encoder", "encoder.safetensors", 3, "0" * 64, (f"{BASE}/encoder.safetensors",))
DECODER = File("decoder", "decoder.safetensors", 3, "1" * 64, (f"{BASE}/decoder.safetensors",))
AUTHORS = AuthorsFile("https://host/file.pth", "pri3d", "all", ("encoder", "decoder"))
LONE_ENCODER = AuthorsFile("https://host/r18.pth", "torchvision", "encoder", ("encoder",))
RESULT = Result("semantic segmentation", "ScanNet", "mIoU", 50.0, "T1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Pri3D View"}, "<method>_<variant>_<architecture>"),
        ({"name": "gsc_r18"}, "<method>_<variant>_<architecture>"),
        ({"name": "pri3d_view_r18.a.b"}, "<method>_<variant>_<architecture>"),
        ({"modality": "2D"}, "modality is '2D'; accepted: 2d, 3d"),
        ({"status": "done"}, "status is 'done'; accepted: published-here"),
        ({"status": "published-here"}, "but none is given"),
        ({"status": "published-by-authors"}, "but none is given"),
        ({"recipe": None}, "but none is given"),
        ({"data": " "}, "data is empty"),
        ({"description": ""}, "description is empty"),
        # a network that is not the contract's
        ({"contract": None}, "a 2d entry needs a contract of type ImageContract"),
        ({"contract": VoxelContract(0.02)}, "a 2d entry needs a contract of type ImageContract"),
        ({"modality": "3d"}, "a 3d entry needs a contract of type VoxelContract"),
        ({"modality": "3d", "contract": VoxelContract(0.02)}, "resnet_unet is not a 3d architecture"),
        ({"arch": Arch("sr_unet")}, "sr_unet is not a 2d architecture"),
        ({"arch": Arch("resnet", {"in_chans": 4})}, "the network takes 4 channels, its contract names 3"),
        # a status that is too modest
        ({"status": "planned"}, "status is 'planned'; with what is given it is 'regenerable'"),
        ({"authors_files": (AUTHORS,)}, "status is 'regenerable'; with what is given it is 'published-by-authors'"),
        (
            {"status": "regenerable", "authors_files": (AUTHORS,), "files": (ENCODER, DECODER)},
            "status is 'regenerable'; with what is given it is 'published-by-authors'",
        ),
        # files here
        ({"files": (ENCODER,), "status": "published-here"}, "no file holds the decoder of resnet_unet"),
        ({"files": (DECODER,), "status": "published-here"}, "no file holds the encoder of resnet_unet"),
        (
            {"files": (ENCODER, dataclasses.replace(DECODER, name=ENCODER.name)), "status": "published-here"},
            "more than one file is called 'encoder.safetensors'",
        ),
        # authors' files
        (
            {"authors_files": (LONE_ENCODER,), "status": "published-by-authors"},
            "no authors' file yields the decoder of resnet_unet",
        ),
        (
            {
                "authors_files": (AUTHORS, dataclasses.replace(AUTHORS, url="http://host/b", roles=("decoder",))),
                "status": "published-by-authors",
            },
            "http://host/b yields decoder; resnet_unet needs its encoder",
        ),
        (
            {"authors_files": (AUTHORS, AUTHORS), "status": "published-by-authors"},
            "https://host/file.pth is given more than once",
        ),
        # results
        (
            {"results": (RESULT, dataclasses.replace(RESULT, value=1.0))},
            "more than one result for semantic segmentation / ScanNet / mIoU / T1",
        ),
    ],
)
def test_wrong_entries_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(ENTRY, **changes)


def test_files_on_the_way_do_not_make_an_entry_published():
    """Only what is called published here must be whole."""
    entry = dataclasses.replace(ENTRY, files=(ENCODER,))
    assert entry.status == "regenerable"
    assert dataclasses.replace(entry, files=(ENCODER, DECODER), status="published-here").files == (ENCODER, DECODER)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        (f"{BASE}/encoder.safetensors", True),
        (f"http://127.0.0.1:8000/{ENTRY.name}/encoder.safetensors", True),
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT}", True),
        (f"hf-hub:lab/{ENTRY.name}@main", False),  # a branch moves
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT[:-1]}", False),
        (f"hf-hub:lab/{ENTRY.name}@{COMMIT.upper()}", False),
        (f"hf-hub:lab/{ENTRY.name}", False),
        (f"hf-hub:{ENTRY.name}@{COMMIT}", False),
        (f"{BASE}/decoder.safetensors", False),
        ("https://host/hub/pri3d_view_r18/encoder.safetensors", False),
        (f"https://host/hub/not_{ENTRY.name}/encoder.safetensors", False),
        (f"ftp://host/{ENTRY.name}/encoder.safetensors", False),
        (f"/data/{ENTRY.name}/encoder.safetensors", False),
        (f"{BASE}/encoder.safetensors?x=1", False),
    ],
)
def test_sources_are_pinned(source: str, accepted: bool):
    files = (dataclasses.replace(ENCODER, sources=(source,)), DECODER)
    if accepted:
        entry = dataclasses.replace(ENTRY, files=files, status="published-here")
        assert source in entry.how_to_get()
    else:
        with pytest.raises(ValueError, match=re.escape(f"source of encoder.safetensors is {source!r}; accepted:")):
            dataclasses.replace(ENTRY, files=files, status="published-here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "encodr"}, "Unknown file role 'encodr'. Closest: 'encoder'"),
        ({"size": 0}, "size is 0"),
        ({"sha256": "0" * 63}, "accepted: 64 lower-case hex digits"),
        ({"sha256": "A" * 64}, "accepted: 64 lower-case hex digits"),
        ({"sources": ()}, "no source is given"),
        ({"name": "../encoder.safetensors"}, "accepted: a plain name that ends in .safetensors"),
        ({"name": "encoder.pth"}, "accepted: a plain name that ends in .safetensors"),
        ({"role": "golden", "name": "golden.bin"}, "accepted: a plain name that ends in .safetensors"),
        ({"role": "card"}, "accepted: a plain name of a file without tensors"),
    ],
)
def test_wrong_files_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises((ValueError, UnknownName), match=re.escape(message)):
        dataclasses.replace(ENCODER, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "file.pth"}, "url is 'file.pth'; accepted: an http(s) URL"),
        ({"url": "ftp://host/file.pth"}, "accepted: an http(s) URL"),
        ({"url": "https://host/a file.pth"}, "accepted: an http(s) URL"),
        ({"url": "https://host"}, "accepted: an http(s) URL"),
        ({"format": "pri3"}, "Unknown checkpoint format 'pri3'. Closest: 'pri3d'"),
        ({"roles": ()}, "accepted: one or more, each once"),
        ({"roles": ("encoder", "encoder")}, "accepted: one or more, each once"),
        ({"roles": ("encoder", "golden")}, "Unknown file role 'golden'"),
        ({"format": "torchvision"}, "roles are encoder, decoder; a torchvision file yields encoder."),
        ({"size": -1}, "size is -1"),
        ({"sha256": "x" * 64}, "accepted: 64 lower-case hex digits"),
    ],
)
def test_wrong_authors_files_cannot_be_built(changes: dict[str, object], message: str):
    with pytest.raises((ValueError, UnknownName), match=re.escape(message)):
        dataclasses.replace(AUTHORS, **changes)


def test_sizes_and_digests_of_authors_files_may_be_known():
    file = dataclasses.replace(AUTHORS, size=290, sha256="ab" * 32)
    assert (file.size, file.sha256, file.roles) == (290, "ab" * 32, ("encoder", "decoder"))


@pytest.mark.parametrize(
    ("metric", "value", "accepted"),
    [
        ("mIoU", 0.0, True),
        ("mIoU", 100.0, True),
        ("mIoU", 100.1, False),
        ("AP50", -0.1, False),
        ("mAP@0.25", 101.0, False),
        ("accuracy", float("nan"), False),
        ("steps", float("inf"), False),
        ("steps", 60000.0, True),  # not a percentage
    ],
)
def test_results_are_possible_numbers(metric: str, value: float, accepted: bool):
    if accepted:
        assert Result("task", "data", metric, value, "T1").value == value
    else:
        with pytest.raises(ValueError, match=rf"{metric} on data is {value}; accepted: a (finite number|percentage)"):
            Result("task", "data", metric, value, "T1")


def test_a_benchmark_may_hold_the_numbers_of_several_papers():
    other = dataclasses.replace(RESULT, value=1.0, table="PPKT T1", note="which run is not said")
    entry = dataclasses.replace(ENTRY, results=(RESULT, other))
    assert entry.result(RESULT.task, RESULT.dataset, RESULT.metric) == RESULT.value


def test_a_row_of_a_table_has_a_start_or_a_reason():
    with pytest.raises(ValueError, match="accepted: either a start or why there is none"):
        Baseline("SO-Net", "", (RESULT,))


def test_all_metrics_of_the_catalog_are_known_percentages():
    assert {result.metric for entry in CATALOG.values() for result in entry.results} == set(PERCENTAGES)


def test_roles_are_those_of_the_checkpoint_folder():
    """They are stated twice, since the folder's format may know the catalog but not the reverse."""
    assert set(FILE_ROLES) == set(checkpoint.ROLES)
    assert set(WEIGHT_ROLES) == set(checkpoint.WEIGHT_ROLES)


def test_unknown_architectures_are_refused():
    with pytest.raises(UnknownName, match=r"Unknown architecture 'resnet_unit'\. Closest: 'resnet_unet'"):
        Arch("resnet_unit")


def test_entries_are_values():
    assert dataclasses.replace(ENTRY) == ENTRY
    with pytest.raises(dataclasses.FrozenInstanceError):
        ENTRY.name = "x"  # type: ignore[misc]
