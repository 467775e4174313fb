"""The card of a fine-tuned network's folder: what it tells apart, how it is used, measured, licensed and made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geo_pretrain.cards import sections
from geo_pretrain.cards.front_matter import front_matter
from geo_pretrain.cards.markdown import bullets, join, plain, table, tree
from geo_pretrain.catalog.entry import Arch, License
from geo_pretrain.checkpoint import FINETUNED, StoredFile
from geo_pretrain.contract import ImageContract, VoxelContract

WORDS = {  # task of a recipe -> what the network does
    "segmentation": "gives each pixel one of {count} classes",
    "detection": "finds objects of {count} classes",
    "instances": "finds and outlines objects of {count} classes",
    "segmentation3d": "gives each point one of {count} classes",
    "parts3d": "gives each point of an object one of {count} parts",
    "instances3d": "finds objects of {count} classes in clouds",
    "detection3d": "finds boxes of objects of {count} classes in clouds",
    "classification3d": "gives an object one of {count} categories",
}
USE_2D = """\
import geo_pretrain as gp
from PIL import Image

network = gp.load_finetuned("{where}")
found = network.predict(Image.open("image.jpg"))
backbone = gp.load_backbone("{where}")  # to start from"""
USE_3D = """\
import geo_pretrain as gp

network = gp.load_finetuned("{where}")
found = network.predict("cloud.ply")
backbone = gp.load_backbone("{where}")  # to start from"""


def render_finetuned(
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    license: License,
    provenance: Mapping[str, Any],
    *,
    source: str = sections.FOLDER,
    files: Mapping[str, StoredFile] | None = None,
) -> str:
    """Render the README.md of a fine-tuned network's folder; `provenance` is that of its config.json."""
    facts = provenance[FINETUNED]
    data, classes = facts["data"], list(facts["data"]["classes"])
    does = WORDS.get(facts["task"], "has {count} classes").format(count=len(classes))
    start = "random weights" if facts["backbone"]["name"] == "scratch" else facts["backbone"]["name"]
    images = isinstance(contract, ImageContract)
    files_of = "image.jpg" if images else "cloud.ply"
    rows = [
        ("task", f"{facts['task']}, `{facts['network']}` around {arch.title}"),
        ("started from", f"`{start}`"),
        ("data", f"{data['source']}: {data['train_images']} to train, {data['val_images']} to measure"),
        ("recipe", "`recipe.yaml`, by `geo-pretrain finetune`"),
    ]
    return join(
        front_matter(name, arch, license, method=None),
        f"# {name}",
        f"A network for {'images' if images else 'point clouds'} that {does}: {', '.join(map(plain, classes))}.",
        table(("what", "value"), rows),
        "## Use",
        f"```bash\ngeo-pretrain predict {source} {files_of} -o answers\n```",
        "```python\n" + (USE_2D if images else USE_3D).format(where=source) + "\n```",
        sections.expects(arch, contract),
        *_measured(facts),
        "## Limitations",
        bullets(
            [
                "It names what it was taught, and nothing else: what is none of its classes becomes one of them.",
                "The numbers above are of the data set's own validation part; elsewhere they may be lower.",
            ]
        ),
        sections.license_section(license),
        "## Provenance",
        tree({key: value for key, value in provenance.items() if key != FINETUNED} | {"steps": facts["steps"]}),
        sections.stored_files(files),
    )


def _measured(facts: Mapping[str, Any]) -> list[str]:
    """The section of scores: those of the last evaluation, and of each class."""
    last = facts.get("last")
    if not last:
        return ["## Measured", f"{facts['metric']}: {100 * facts['score']:.1f} %, on validation data."]
    scores = [(name, f"{100 * value:.1f} %") for name, value in last["scores"].items()]
    parts = ["## Measured", "On validation data, at the end of the run.", table(("score", "value"), scores)]
    if last["per_class"]:
        what, values = next(iter(last["per_class"].items()))
        rows = [(plain(name), "absent" if v is None else f"{100 * v:.1f} %") for name, v in values.items()]
        parts.append(table(("class", what), rows))
    return parts
