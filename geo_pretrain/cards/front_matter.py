"""The YAML metadata of a card, as the Hugging Face Hub reads it: license, tags, data, base model, results.

Identifiers are the Hub's own where it has one. What it has none for (a data set that is not hosted there, start weights
that are not) goes into the tags or is left out: a made-up identifier would link to somebody else's page.
Specification: github.com/huggingface/hub-docs, modelcard.md, and for licenses docs/hub/repositories-licenses.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from geo_pretrain.catalog.entry import Arch, License, Paper, Result

LIBRARY = "geo_pretrain"
# The Hub's list, without families that have no version ("cc", "gpl"), which say too little, and single models' terms.
HUB_LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 ecl-2.0 epl-1.0 epl-2.0 eupl-1.1 gpl-2.0 gpl-3.0 isc lgpl-2.1 lgpl-3.0 mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 osl-3.0 pddl postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905
)
UNVERSIONED = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}  # SPDX's name -> the Hub's
# Terms without an SPDX identifier: the page where their owner states them.
TERMS = {
    "LicenseRef-ADE20K-terms": "https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/",
    "LicenseRef-ImageNet-terms": "https://www.image-net.org/download.php",
    "LicenseRef-MegaDepth-terms": "https://www.cs.cornell.edu/projects/megadepth/",
    "LicenseRef-ScanNet-ToU": "https://kaldir.vc.in.tum.de/scannet/ScanNet_TOS.pdf",
}
UNSTATED = "LicenseRef-unstated"
HUB_DATASETS = {"ImageNet": "ILSVRC/imagenet-1k"}  # the owner's own repository; the others are on nobody's
SENSORS = {"ScanNet": "rgb-d", "rooms": "rgb-d", "KITTI": "lidar", "nuScenes": "lidar"}
START = re.compile(r"torchvision ResNet-(\d+) IMAGENET1K_V1\b")  # what a base model's text begins with
METRICS = {"mIoU": "mean_iou", "accuracy": "accuracy"}  # those that the Hub has; the others keep their own name


def front_matter(
    name: str,
    arch: Arch,
    license: License,
    *,
    method: str | None,
    results: Sequence[Result] = (),
    papers: Mapping[str, Paper] | None = None,
) -> str:
    """Render the YAML block between its two lines of dashes. `results` become the model-index.

    `papers` maps the table of each result to the paper it stands in; without it the results are our own measurements.
    """
    import yaml  # not at the top: the table and the command line's list need no YAML

    datasets = [HUB_DATASETS[data] for data, _ in license.datasets if data in HUB_DATASETS]
    started = START.match(license.base_model)
    data: dict[str, Any] = {**license_fields(license.weights), "library_name": LIBRARY}
    if arch.modality == "2d":  # the Hub has no task for features of points, and its "feature-extraction" means text
        data["pipeline_tag"] = "image-feature-extraction"
    data["tags"] = tags(arch, license, method)
    if datasets:
        data["datasets"] = datasets
    if started:  # the same weights have a repository there
        data["base_model"] = f"timm/resnet{started[1]}.tv_in1k"
    index = model_index(name, results, papers)
    if index[0]["results"]:
        data["model-index"] = index
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1 << 20)}---"


def license_fields(identifier: str) -> dict[str, str]:
    """The Hub's metadata fields for an SPDX identifier or a LicenseRef: one of its own licenses, or name and page."""
    if identifier == UNSTATED:
        return {"license": "unknown"}
    key = identifier.lower().removesuffix("-only").removesuffix("-or-later")
    key = UNVERSIONED.get(key, key)
    if key in HUB_LICENSES:
        return {"license": key}
    fields = {"license": "other", "license_name": key.removeprefix("licenseref-")}
    page = license_page(identifier)
    return fields | ({"license_link": page} if page else {})


def license_page(identifier: str) -> str | None:
    """URL of the license text: the owner's page, or SPDX's; None if unknown."""
    if identifier.startswith("LicenseRef-"):
        return TERMS.get(identifier)
    return f"https://spdx.org/licenses/{identifier}.html"


def tags(arch: Arch, license: License, method: str | None) -> list[str]:
    """Tags of a card: method, modality, architecture, data, sensor, training and file format."""
    data = [name for name, _ in license.datasets if name != "none"]
    sensors = [SENSORS.get(name, "rgb-d" if name.startswith("RGB-D") else None) for name in data]
    candidates = [
        None if method is None else slug(method),
        "image" if arch.modality == "2d" else "point-cloud",
        *arch.architecture.tags,
        *(slug(name) for name in data),
        *sensors,
        "self-supervised",
        "safetensors",
    ]
    return list(dict.fromkeys(tag for tag in candidates if tag))


def model_index(name: str, results: Iterable[Result], papers: Mapping[str, Paper] | None) -> list[dict[str, Any]]:
    """Group results by task and data, as huggingface_hub does, so that its client round-trips them.

    A benchmark that several papers measured has the numbers of the first one alone, since a group has one source.
    A paper's numbers with a note are left out: it is open whether they are of these weights.

    A task's text is split at its first comma: "semantic segmentation, PSPNet" is the Hub's task semantic-segmentation,
    and the rest goes into the metric's name.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in (r for r in results if papers is None or not r.note):
        group = groups.setdefault((slug(task_of(result)), slug(result.dataset)), [])
        same_paper = papers is None or not group or papers[group[0].table] == papers[result.table]
        if same_paper and all((r.task, r.metric) != (result.task, result.metric) for r in group):
            group.append(result)
    index: list[dict[str, Any]] = []
    for (task, dataset), members in groups.items():
        facts: dict[str, Any] = {
            "task": {"type": task, "name": sentence(task_of(members[0]))},
            "dataset": {"name": members[0].dataset, "type": dataset},
            "metrics": [
                {
                    "type": METRICS.get(result.metric, slug(result.metric)),
                    "value": float(result.value),
                    "name": ", ".join(filter(None, (result.metric, detail_of(result)))),
                }
                for result in members
            ],
        }
        if papers is not None:
            tables = list(dict.fromkeys(result.table for result in members))
            paper = papers[tables[0]]
            where = f"{paper.title} ({paper.venue} {paper.year}), {', '.join(tables)}"
            facts["source"] = {"url": paper.url, "name": where}
        index.append(facts)
    return [{"name": name, "results": index}]


def task_of(result: Result) -> str:
    """The task without its detail: "semantic segmentation" of "semantic segmentation, PSPNet"."""
    return result.task.partition(",")[0].strip()


def detail_of(result: Result) -> str:
    """Extract the text of a task after its first comma, such as "PSPNet" or "20 % of the training scenes"."""
    return result.task.partition(",")[2].strip()


def slug(text: str) -> str:
    """Lower case, with dashes for everything but letters, digits, dots and underscores: "SUN RGB-D" -> "sun-rgb-d"."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")


def sentence(text: str) -> str:
    """Capitalize the first letter only."""
    return text[:1].upper() + text[1:]
