"""The license chain of weights: code, weights, every data set, start weights; checked when it is built.

Licenses are part of an entry's type, so weights without a whole chain, or that claim more freedom than the chain
leaves, cannot be published.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from geo_pretrain.errors import UnknownName, nearest

PERMISSIVE = tuple(
    """
    0BSD AFL-3.0 Apache-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC-BY-2.0 CC-BY-3.0 CC-BY-4.0 CC0-1.0
    CDLA-Permissive-1.0 CDLA-Permissive-2.0 ISC MIT MIT-0 NCSA ODC-By-1.0 PDDL-1.0 Unlicense Zlib
    """.split()  # noqa: SIM905
)
# what is made of it must be under the same terms
SHARE_ALIKE = tuple(
    """
    AGPL-3.0-only AGPL-3.0-or-later CC-BY-SA-2.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CDLA-Sharing-1.0 EPL-2.0 EUPL-1.2
    GPL-2.0-only GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only
    LGPL-3.0-or-later MPL-2.0 ODbL-1.0
    """.split()  # noqa: SIM905
)
NO_DERIVATIVES = ("CC-BY-ND-2.0", "CC-BY-ND-3.0", "CC-BY-ND-4.0")
NON_COMMERCIAL = tuple(
    """
    CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-ND-2.0 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0 CC-BY-NC-SA-2.0
    CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 LicenseRef-ADE20K-terms LicenseRef-ImageNet-terms LicenseRef-ScanNet-ToU
    """.split()  # noqa: SIM905
)
LICENSE_GROUPS = {"permissive": PERMISSIVE, "non-commercial": NON_COMMERCIAL}
LICENSES = (*PERMISSIVE, *SHARE_ALIKE, *NO_DERIVATIVES, *NON_COMMERCIAL)
LICENSE_REF = re.compile(r"LicenseRef-[A-Za-z0-9.-]*[A-Za-z0-9]")  # SPDX's form for terms without an identifier
NO_BASE = re.compile(r"none( \([^()]*\))?")  # a base model that brings no terms along
SCRATCH = "none (random weights)"
BRACKETS = re.compile(r"\(([^()]*)\)")


@dataclass(frozen=True)
class License:
    """The license chain, as SPDX identifiers or `LicenseRef-<word>`. Nothing has a default: silence is not a license.

    `base_model` is "none", "none (a remark)", or a text that carries the licenses of those weights in round brackets,
    separated by semicolons: "ResNet-50 (BSD-3-Clause; a remark)". Weights can be permissive only if everything in the
    chain is; a remark beside licenses counts as a restriction, since no program can tell that it is none.
    """

    code: str  # of the code that makes the weights
    weights: str  # of the weights themselves: the strictest term their data and start weights impose
    datasets: tuple[tuple[str, str], ...]  # (data set, its license), one for each that went in
    base_model: str  # what training started or learned from, with its license

    def __post_init__(self) -> None:
        object.__setattr__(self, "datasets", tuple((str(name), str(license)) for name, license in self.datasets))
        given = {"code": self.code, "weights": self.weights, "base_model": self.base_model}
        empty = [key for key, text in given.items() if not text.strip()]
        if not self.datasets or not all(name.strip() and license.strip() for name, license in self.datasets):
            empty.append("datasets")
        if empty:
            raise ValueError(f"license chain is incomplete, nothing given for: {', '.join(empty)}.")
        for identifier in (self.code, self.weights, *(terms for _, terms in self.datasets)):
            check_license(identifier)
        chain = [(terms, f"the data set {name}") for name, terms in self.datasets]
        chain += [(terms, f"the base model {self.base_model!r}") for terms in self.base_terms()]
        for terms, whose in chain:
            if self.weights in PERMISSIVE and terms not in PERMISSIVE:
                raise ValueError(
                    f"the weights' license is {self.weights!r}, but {whose} is under {terms!r}; accepted: the "
                    "strictest term of the chain."
                )

    def base_terms(self) -> tuple[str, ...]:
        """Licenses and remarks in the parentheses of `base_model`; empty for "none".

        Raises ValueError when it is not "none" and no license is among them.
        """
        if NO_BASE.fullmatch(self.base_model):
            return ()
        terms = [part.strip() for group in BRACKETS.findall(self.base_model) for part in group.split(";")]
        if not any(map(is_license, terms)):
            raise ValueError(
                f"base_model is {self.base_model!r}; accepted: 'none', or a text with its license in round brackets, "
                "such as 'ResNet-50 (BSD-3-Clause)'."
            )
        return tuple(filter(None, terms))

    def matches(self, wanted: str) -> bool:
        """Whether the weights' license is `wanted`, an identifier or a group: "permissive", "non-commercial"."""
        return self.weights in LICENSE_GROUPS.get(wanted, (wanted,))


def rooms_license(base_model: str = SCRATCH) -> License:
    """The license chain of weights trained on the procedural rooms."""
    return License(code="MIT", weights="MIT", datasets=(("rooms", "MIT"),), base_model=base_model)


def strictest(*terms: str) -> str:
    """The most restrictive license, the first one on ties. Terms without an SPDX identifier count as restrictive."""
    kinds = (PERMISSIVE, SHARE_ALIKE, NO_DERIVATIVES)
    return max(terms, key=lambda term: next((rank for rank, kind in enumerate(kinds) if term in kind), len(kinds)))


def is_license(text: str) -> bool:
    """Whether `text` is an SPDX identifier known here, or of the form LicenseRef-<word>."""
    return text in LICENSES or LICENSE_REF.fullmatch(text) is not None


def check_license(text: str) -> None:
    """Raise `UnknownName` with the nearest identifiers, whatever their case, unless `is_license(text)`."""
    if not is_license(text):
        by_lower = {identifier.lower(): identifier for identifier in LICENSES}
        closest = ", ".join(repr(by_lower[lower]) for lower in nearest(text.lower(), by_lower))
        raise UnknownName(
            f"Unknown license {text!r}. Closest: {closest}. Terms without an SPDX identifier: LicenseRef-<word>."
        )
