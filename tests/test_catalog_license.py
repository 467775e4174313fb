"""License chains: complete, of known licenses, and no freer than their least free link."""

from __future__ import annotations

import dataclasses

import pytest
from packaging.licenses import canonicalize_license_expression

from geo_pretrain.catalog import CATALOG, License
from geo_pretrain.catalog.license import LICENSES, NON_COMMERCIAL, PERMISSIVE, is_license
from geo_pretrain.errors import UnknownName

ENTRY = CATALOG["pri3d_geo_r18.rooms"]


@pytest.mark.parametrize("hole", ["code", "weights", "datasets", "base_model"])
def test_an_incomplete_license_chain_cannot_be_built(hole: str):
    for nothing in ((), (("rooms", " "),)) if hole == "datasets" else ("", " "):
        with pytest.raises(ValueError, match=f"nothing given for: {hole}"):
            dataclasses.replace(ENTRY.license, **{hole: nothing})
    with pytest.raises(TypeError):
        License(code="MIT")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("given", "closest"),
    [
        ("mit", "MIT"),
        ("Apache 2.0", "Apache-2.0"),
        ("GPL-3.0", "GPL-3.0-only"),
        ("cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("LicenseRef-scannet tou", "LicenseRef-ScanNet-ToU"),
        ("ScanNet-ToU", "LicenseRef-ScanNet-ToU"),
    ],
)
def test_unknown_licenses_are_refused_with_the_nearest(given: str, closest: str):
    for change in ({"code": given}, {"weights": given}, {"datasets": (("rooms", "MIT"), ("x", given))}):
        with pytest.raises(UnknownName) as caught:
            dataclasses.replace(ENTRY.license, **change)
        assert str(caught.value).startswith(f"Unknown license {given!r}. Closest: {closest!r}, ")
        assert "LicenseRef-<word>" in str(caught.value)


def test_identifiers_are_those_of_spdx():
    for identifier in LICENSES:  # a list kept by others: raises for what is unknown, and corrects the case
        assert canonicalize_license_expression(identifier) == identifier
    own = {identifier for identifier in LICENSES if identifier.startswith("LicenseRef-")}
    assert len(LICENSES) == len(set(LICENSES)) == 53
    assert not set(PERMISSIVE) & set(NON_COMMERCIAL)
    assert all("NC" in identifier.split("-") for identifier in set(NON_COMMERCIAL) - own)
    assert not any({"NC", "ND", "SA", "GPL"} & set(identifier.split("-")) for identifier in PERMISSIVE)
    assert is_license("LicenseRef-data-owner")  # what a folder of unknown frames gets
    for wrong in ("LicenseRef-", "LicenseRef-my terms", "licenseref-x", "LicenseRef-x-", "xLicenseRef-x", ""):
        assert not is_license(wrong)


@pytest.mark.parametrize(
    ("data", "base_model", "accepted"),
    [
        ("MIT", "none", True),
        ("MIT", "none (random weights)", True),
        ("CC0-1.0", "pri3d_view_r18.rooms (MIT)", True),
        ("CC-BY-4.0", "one (MIT), another (Apache-2.0; BSD-3-Clause)", True),
        ("LicenseRef-data-owner", "none", False),  # terms that no program can judge
        ("CC-BY-SA-4.0", "none", False),
        ("CC-BY-NC-4.0", "none", False),
        ("MIT", "MoCo (CC-BY-NC-4.0)", False),
        ("MIT", "one (MIT), another (LicenseRef-ImageNet-terms)", False),
        ("MIT", "torchvision ResNet-18 (BSD-3-Clause; ImageNet terms: non-commercial research)", False),
    ],
)
def test_weights_are_as_free_as_the_least_free_link(data: str, base_model: str, accepted: bool):
    def build(weights: str) -> License:
        return License(code="GPL-3.0-only", weights=weights, datasets=(("x", data),), base_model=base_model)

    assert build("LicenseRef-ImageNet-terms").weights == "LicenseRef-ImageNet-terms"
    for weights in ("MIT", "CC-BY-4.0"):
        if accepted:
            assert build(weights).matches("permissive")
        else:
            with pytest.raises(ValueError, match=r"is under .*; accepted: the strictest term of the chain"):
                build(weights)


def test_the_link_that_binds_is_named():
    with pytest.raises(ValueError) as caught:
        License("MIT", "MIT", (("rooms", "MIT"), ("ScanNet", "LicenseRef-ScanNet-ToU")), "none")
    assert str(caught.value) == (
        "the weights' license is 'MIT', but the data set ScanNet is under 'LicenseRef-ScanNet-ToU'; accepted: the "
        "strictest term of the chain."
    )
    with pytest.raises(ValueError, match=r"but the base model 'x \(MIT; CC-BY-NC-4.0\)' is under 'CC-BY-NC-4.0'"):
        License("MIT", "MIT", (("rooms", "MIT"),), "x (MIT; CC-BY-NC-4.0)")


@pytest.mark.parametrize("base_model", ["ResNet-50", "ResNet-50 (from somewhere)", "nonesuch", "none at all ()", "MIT"])
def test_a_base_model_without_license_is_refused(base_model: str):
    with pytest.raises(ValueError, match=r"accepted: 'none', or a text with its license in round brackets"):
        License("MIT", "LicenseRef-x", (("rooms", "MIT"),), base_model)


def test_base_terms_are_what_stands_in_brackets():
    license = License("MIT", "LicenseRef-x", (("rooms", "MIT"),), "a (MIT; a remark), b (CC-BY-NC-4.0)")
    assert license.base_terms() == ("MIT", "a remark", "CC-BY-NC-4.0")
    assert ENTRY.license.base_terms() == ()
