"""What holds for every name of the catalog, whatever is added to it; and that the filters do what they say."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
import json
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geo_pretrain import catalog, list_backbones
from geo_pretrain.backbones.architectures import ARCHITECTURES
from geo_pretrain.catalog import CATALOG, STATUSES, Arch, AuthorsFile, Entry, File, License, Paper, Result
from geo_pretrain.catalog.license import LICENSES, NON_COMMERCIAL, PERMISSIVE
from geo_pretrain.contract import contract_from_dict
from geo_pretrain.convert import FORMATS
from geo_pretrain.errors import UnknownName

NAMES = sorted(CATALOG)
every_name = pytest.mark.parametrize("name", NAMES)


def test_the_sweep_visits_every_entry():
    assert len(NAMES) == len(list_backbones()) == len(CATALOG)
    own = {
        name for name, row in ARCHITECTURES.items() if "timm" not in row.tags
    }  # those of timm have no checkpoint yet
    assert Counter(entry.arch.name for entry in CATALOG.values()).keys() == own


@every_name
def test_a_name_is_method_variant_architecture_and_tag(name: str):
    entry = CATALOG[name]
    method, architecture, tag = re.fullmatch(
        rf"({entry.method})_(?:[a-z0-9_]+_)?([a-z0-9]+)(?:\.([a-z0-9_]+))?", name
    ).groups()
    assert method == entry.method
    args = entry.arch.args
    depth = f"r{args['depth']}" if entry.modality == "2d" else f"srunet{args['variant'][:-1]}"
    assert architecture == depth
    # the tag says the data where it is not ScanNet
    data = entry.data.lower()
    assert ("scannet" in data) == (data not in (tag or "").split("_"))


def test_no_name_stands_in_two_modules():
    modules = pkgutil.iter_modules(catalog.__path__, "geo_pretrain.catalog.")
    entries = [e for m in modules for e in getattr(importlib.import_module(m.name), "ENTRIES", ())]
    assert Counter(entry.name for entry in entries) == Counter(NAMES)  # each once, and no module was forgotten


@every_name
def test_the_description_is_one_clause(name: str):
    entry = CATALOG[name]
    assert entry.name == name
    assert not re.search(r"\.(?!\d)|\n|  ", entry.description)
    assert entry.description == entry.description.strip() != ""


@every_name
def test_the_license_chain_is_consistent(name: str):
    license = CATALOG[name].license
    names = [dataset for dataset, _ in license.datasets]
    assert len(names) == len(set(names))
    rest = {*(terms for _, terms in license.datasets), *license.base_terms()}
    if license.weights in PERMISSIVE:
        assert rest <= set(PERMISSIVE)
    if rest & set(NON_COMMERCIAL) or any("non-commercial" in terms for terms in rest):
        assert license.weights in NON_COMMERCIAL or license.weights == "LicenseRef-unstated"
    # what made the start weights or the teacher went in too
    for dataset in ("ImageNet", "ADE20K"):
        if dataset in license.base_model:
            assert dataset in names
    for start in re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)+(?:\.[a-z0-9_]+)?", license.base_model):
        if start in CATALOG:
            assert set(CATALOG[start].license.datasets) <= set(license.datasets)
            assert f"{start} ({CATALOG[start].license.weights})" in license.base_model


@every_name
def test_the_paper_can_be_found(name: str):
    paper = CATALOG[name].paper
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", paper.url)
    # an arXiv number begins with year and month; a conference may follow in the next year, or a paper's last revision
    assert int(paper.url.split("/")[-1][:2]) in (paper.year % 100, paper.year % 100 - 1)
    for text in (paper.title, paper.authors, paper.venue):
        assert text == text.strip() != ""
        assert text.isascii()


def test_one_paper_is_one_paper():
    papers = {entry.paper for entry in CATALOG.values()}
    assert len({paper.url for paper in papers}) == len({paper.title for paper in papers}) == len(papers)


@every_name
def test_the_status_can_be_acted_on(name: str):
    entry = CATALOG[name]
    text = entry.how_to_get()
    if entry.status == "published-by-authors":
        first = entry.authors_files[0]
        assert first.url in text
        assert f"geo-pretrain convert FILE --from {first.format} --name {name} --out DIR" in text
        held = {role for file in entry.authors_files for role in file.roles}
        assert held >= set(entry.arch.roles)
        assert all(set(file.roles) <= set(FORMATS[file.format].roles) for file in entry.authors_files)
    assert (f"geo-pretrain train {name}" in text) == (entry.recipe is not None)
    assert ("nobody offers it" in text) == (entry.status == "planned")
    assert "  " not in text
    assert not text.endswith(".")


@every_name
def test_torch_hub_has_an_entry_point(name: str):
    function = getattr(HUBCONF, name)
    assert callable(function)
    assert str(CATALOG[name].arch) in function.__doc__


def _hubconf():
    path = Path(__file__).resolve().parents[1] / "hubconf.py"
    spec = importlib.util.spec_from_file_location("hubconf", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HUBCONF = _hubconf()


def rebuild(data: dict) -> Entry:
    """An entry from what JSON made of it, written without the catalog's help."""
    data = dict(data)
    data["arch"] = Arch(**data["arch"])
    kind = "image" if data["modality"] == "2d" else "voxel"
    data["contract"] = contract_from_dict({"kind": kind, **data["contract"]})
    datasets = tuple(tuple(pair) for pair in data["license"].pop("datasets"))
    data["license"] = License(**data["license"], datasets=datasets)
    data["paper"] = Paper(**data["paper"])
    for key, kind_of in (("files", File), ("authors_files", AuthorsFile), ("results", Result), ("measured", Result)):
        data[key] = tuple(kind_of(**item) for item in data[key])
    return Entry(**data)


@every_name
def test_an_entry_survives_json(name: str):
    entry = CATALOG[name]
    text = json.dumps(dataclasses.asdict(entry), allow_nan=False)
    assert rebuild(json.loads(text)) == entry
    assert text.isascii()


FILTERS = {
    "method": {entry.method for entry in CATALOG.values()},
    "modality": {"2d", "3d"},
    "status": set(STATUSES),
    "data": {entry.data for entry in CATALOG.values()},
    "license": {entry.license.weights for entry in CATALOG.values()},
}


@pytest.mark.parametrize("key", list(FILTERS))
def test_a_filter_splits_the_catalog_without_rest(key: str):
    parts = [list_backbones(**{key: value}) for value in sorted(FILTERS[key])]
    assert sorted(itertools.chain(*parts)) == NAMES


def slowly(key: str, value: str, entry: Entry) -> bool:
    """The filters, spelled out."""
    if key == "license":
        groups = {"permissive": PERMISSIVE, "non-commercial": NON_COMMERCIAL}
        return entry.license.weights == value or entry.license.weights in groups.get(value, ())
    return getattr(entry, key).lower() == value.lower()


VALUES = {key: [None, *sorted(values)] for key, values in FILTERS.items()}
VALUES["license"] += ["permissive", "non-commercial"]
VALUES["data"] += ["scannet", "ROOMS"]


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({key: st.sampled_from(values) for key, values in VALUES.items()}))
def test_filters_together_are_their_intersection(filters: dict[str, str | None]):
    wanted = {key: value for key, value in filters.items() if value is not None}
    found = list_backbones(**filters)
    assert set(found) == {n for n, e in CATALOG.items() if all(slowly(key, value, e) for key, value in wanted.items())}
    assert found == [name for name in list_backbones() if name in found]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcdr1580_.*?[]", max_size=12))
def test_a_pattern_finds_what_a_regular_expression_finds(pattern: str):
    from fnmatch import translate

    assert set(list_backbones(pattern)) == {name for name in NAMES if re.match(translate(pattern), name)}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 40), st.sampled_from("xq7"))
def test_a_misspelled_name_is_told_the_right_one(name: str, place: int, letter: str):
    """One letter more anywhere: the name meant is among the three nearest."""
    from geo_pretrain import backbone_info

    wrong = name[:place] + letter + name[place:]
    if wrong in CATALOG:
        return
    with pytest.raises(UnknownName) as caught:
        backbone_info(wrong)
    assert f"'{name}'" in str(caught.value)


def natural(name: str) -> tuple:
    """Text before a number, the number, and so on: by hand, without splitting by regular expression."""
    parts: list = []
    for digit, group in itertools.groupby(name, str.isdigit):
        text = "".join(group)
        parts.append((0, int(text), "") if digit else (1, 0, text))
    return tuple(parts)


def test_names_come_in_natural_order():
    assert list_backbones() == sorted(NAMES, key=natural)
    assert list_backbones().index("csc_60k_srunet34") < list_backbones().index("csc_100k_srunet34")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(LICENSES),
    st.lists(st.sampled_from(LICENSES), min_size=1, max_size=3),
    st.lists(st.sampled_from([*LICENSES, "some remark"]), max_size=2),
)
def test_a_license_chain_is_built_exactly_when_it_may(weights: str, data: list[str], base: list[str]):
    base_model = f"something ({'; '.join(base)})" if base else "none"
    may = weights not in PERMISSIVE or set(data + base) <= set(PERMISSIVE)
    may = may and (not base or set(base) != {"some remark"})
    datasets = tuple((f"set {number}", terms) for number, terms in enumerate(data))
    try:
        License("MIT", weights, datasets, base_model)
    except ValueError:
        assert not may
    else:
        assert may
