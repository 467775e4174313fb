"""Cards and tables, rendered from the catalog and a checkpoint's provenance; nothing is written here by hand.

`python -m geo_pretrain.cards` in a checkout rewrites model_cards/ and the README's table; a test fails when they are
stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.catalog import CATALOG, backbone_info, list_backbones
from geo_pretrain.catalog.entry import STATUSES, Arch, Entry, Licence, Result
from geo_pretrain.contract import COLOURS, ImageContract, VoxelContract
from geo_pretrain.errors import GeoPretrainError

BEGIN, END = "<!-- catalog -->", "<!-- /catalog -->"
TABLE_HEAD = ("name", "architecture", "pre-training data", "weights' licence", "status", "ScanNet mIoU (reported)")
SEGMENTATION = {"2d": "semantic segmentation", "3d": "3D semantic segmentation"}


def render_card(
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    licence: Licence,
    provenance: Mapping[str, Any],
    *,
    recipe: str | None = None,
    finished: bool = True,
    results: Sequence[Result] = (),
) -> str:
    """The README.md of a checkpoint folder: what it is, how to load it, licence chain, provenance, measured results."""
    entry = CATALOG.get(name)
    parts = [f"# {name}", entry.description[0].upper() + entry.description[1:] + "." if entry else ""]
    if not finished:
        parts.append("**Unfinished**: written on the way; training goes on or was stopped.")
    parts += [_facts(arch, contract, recipe), _usage("path/to/this/folder", contract), _licence(licence)]
    parts += ["## Provenance", _tree(provenance)]
    if results:
        parts += ["## Measured", _results(results)]
    if entry is not None:
        parts.append(_paper(entry))
    return "\n\n".join(part for part in parts if part) + "\n"


def render_entry(entry: Entry) -> str:
    """The card of a catalog entry, for model_cards/."""
    parts = [f"# {entry.name}", entry.description[0].upper() + entry.description[1:] + "."]
    parts.append(_facts(entry.arch, entry.contract, entry.recipe, data=entry.data, status=entry.status))
    parts.append(_usage(entry.name, entry.contract))
    if entry.status != "published-here":
        parts.append(f"No file is on this project's hub yet: {entry.how_to_get()}.")
    parts.append(_licence(entry.licence))
    if entry.authors_files:
        lines = [f"- [{file.format} format]({file.url}): {file.content}" for file in entry.authors_files]
        parts += ["## Files of the authors", "\n".join(lines)]
    if entry.results:
        parts += ["## Reported by the authors", _results(entry.results)]
    parts.append(_paper(entry))
    return "\n\n".join(parts) + "\n"


def catalog_table(names: Iterable[str] | None = None) -> str:
    """The catalog as a Markdown table, one row a checkpoint."""
    rows = []
    for name in list_backbones() if names is None else names:
        entry = backbone_info(name)
        miou = entry.result(SEGMENTATION[entry.modality], "ScanNet", "mIoU")
        licence, status = entry.licence.weights, STATUSES[entry.status]
        rows.append(
            (f"`{name}`", network_title(entry.arch), entry.data, licence, status, "" if miou is None else f"{miou:g}")
        )
    return _table(TABLE_HEAD, rows)


def update_readme(path: Path) -> bool:
    """Put the table between the markers of a Markdown file; returns whether the file changed.

    Raises `GeoPretrainError` when the two markers are not there once each, in order.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise GeoPretrainError(f"{path}: needs one line {BEGIN!r} and, after it, one line {END!r}.")
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n{catalog_table()}\n{END}{rest.split(END)[1]}"
    if updated != text:
        path.write_text(updated, encoding="utf-8")
    return updated != text


def write_cards(folder: Path) -> list[Path]:
    """Render a card for every entry into `folder`; cards of names that are gone are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for entry in CATALOG.values():
        path = folder / f"{entry.name}.md"
        path.write_text(render_entry(entry), encoding="utf-8")
        written.append(path)
    for path in set(folder.glob("*.md")) - set(written):
        path.unlink()
    return sorted(written)


def _facts(
    arch: Arch,
    contract: ImageContract | VoxelContract,
    recipe: str | None,
    *,
    data: str | None = None,
    status: str | None = None,
) -> str:
    lines = [f"- Network: {network_title(arch)}, `{arch}`", f"- Input: {contract}"]
    if data is not None:
        lines.append(f"- Pre-training data: {data}")
    if status is not None:
        lines.append(f"- Status: {status} ({STATUSES[status]})")
    if recipe is not None:
        lines.append(f"- Recipe: `geo-pretrain train {recipe}`")
    return "\n".join(lines)


def _usage(where: str, contract: ImageContract | VoxelContract) -> str:
    if isinstance(contract, ImageContract):
        lines = [
            f'encoder = gp.load_backbone("{where}")',
            "maps = encoder(encoder.transforms(image)[None])  # PIL image or uint8 [H, W, 3]; maps at strides 2 to 32",
            f'unet = gp.load_backbone("{where}", decoder=True)  # dense features at half the resolution',
        ]
    else:
        names = contract.given_channels
        colours = set(names) <= COLOURS
        given = "" if not names else ", colours" if colours else f", {'_'.join(names)}"
        kinds = "" if not names else f", {'uint8' if colours else 'float'} [N, {len(names)}]"
        lines = [
            f'network = gp.load_backbone("{where}")',
            f"features = network.encode_points(points{given})  # float [N, 3] in metres{kinds}; all maps, per point",
            f'output = network.encode_points(points{given}, out="final")  # what the loss of the pre-training saw',
            "maps = network.pyramid(x)  # x: geo_pretrain.sparse.SparseTensor; maps at strides 1 to 16 in voxels",
        ]
    return "\n".join(["## Use", "", "```python", "import geo_pretrain as gp", "", *lines, "```"])


def _licence(licence: Licence) -> str:
    data = "; ".join(f"{name}: {terms}" for name, terms in licence.datasets)
    rows = [("weights", licence.weights), ("code", licence.code), ("data", data), ("started from", licence.base_model)]
    return "## Licence\n\n" + _table(("of", "licence"), rows)


def _paper(entry: Entry) -> str:
    paper = entry.paper
    return f"## Paper\n\n{paper.authors}: *{paper.title}*. {paper.venue} {paper.year}. <{paper.url}>"


def _results(results: Iterable[Result]) -> str:
    rows = [(r.task, r.dataset, r.metric, f"{r.value:g}", r.table) for r in results]
    return _table(("task", "data", "metric", "value", "from"), rows)


def network_title(arch: Arch) -> str:
    """A short name for people, such as "ResNet-18 U-Net" or "SR-UNet34C"."""
    if arch.name == "resnet_unet":
        return f"ResNet-{arch.args['depth']} U-Net"
    return f"SR-UNet{arch.args.get('variant', '34C')}" if arch.name == "sr_unet" else arch.name


def _tree(data: Mapping[str, Any], indent: str = "") -> str:
    """Nested mappings as a Markdown list."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}- {key}:", _tree(value, indent + "  ")]
        elif value not in (None, "", {}, []):
            lines.append(f"{indent}- {key}: {value}")
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def main(root: Path = Path(__file__).resolve().parent.parent) -> None:
    """Rewrite model_cards/ and the README's table of the checkout this package runs from."""
    write_cards(root / "model_cards")
    update_readme(root / "README.md")


if __name__ == "__main__":
    main()
