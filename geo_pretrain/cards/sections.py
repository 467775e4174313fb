"""The sections of a card: what the network is and takes, where its weights come from, results, limitations, license."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from geo_pretrain.backbones.architectures import Arch
from geo_pretrain.cards.front_matter import license_page
from geo_pretrain.cards.markdown import numbers, table
from geo_pretrain.cards.usage import output_channels
from geo_pretrain.catalog import CATALOG
from geo_pretrain.catalog.entry import AuthorsFile, Entry, File, License, Paper, Result, install_code
from geo_pretrain.catalog.license import PERMISSIVE
from geo_pretrain.catalog.tables import paper_of
from geo_pretrain.checkpoint import StoredFile
from geo_pretrain.contract import COLORS, ImageContract, VoxelContract

ARXIV = re.compile(r"https?://arxiv\.org/abs/([\w.-]+/?\w*)")
FOLDER = "path/to/this/folder"
WEIGHTS_FROM = {  # a status in two words, for the table
    "published-here": "this project",
    "published-by-authors": "the authors",
    "regenerable": "a recipe",
    "planned": "nobody yet",
}


def summary(arch: Arch, data: str, description: str) -> str:
    """The sentence under a card's title."""
    kind = "images" if arch.modality == "2d" else "point clouds"
    what = f": {description}" if description else ""
    return f"{arch.title} for {kind}, pre-trained on {data}{what}."


def method_of(name: str) -> str | None:
    """The method that a checkpoint's name begins with, when the catalog knows it."""
    methods = {entry.method for entry in CATALOG.values()}
    return max((method for method in methods if name.startswith(f"{method}_")), key=len, default=None)


def paper_of_method(name: str) -> Paper | None:
    """Look up the paper of a name: its entry's paper, or the paper of any entry with the same method."""
    method = method_of(name)
    papers = (entry.paper for entry in CATALOG.values() if entry.method == method)
    return CATALOG[name].paper if name in CATALOG else next(papers, None)


def _paper_link(paper: Paper | None) -> str:
    """A Markdown link to a paper with venue and year; "" without one."""
    return "" if paper is None else f"[{paper.title}]({paper.url}) ({paper.venue} {paper.year})"


def facts_table(arch: Arch, data: str, paper: Paper | None, more: Mapping[str, str]) -> str:
    """The table of network, pre-training data, method and `more` facts; empty ones are left out."""
    facts = {"network": f"{arch.title}, `{arch}`", "pre-training data": data, "method": _paper_link(paper), **more}
    return table(("what", "value"), [(key, value) for key, value in facts.items() if value])


def is_authors_own(entry: Entry, provenance: Mapping[str, Any]) -> bool:
    """Whether the folder was converted from a file that the catalog lists: the same address or the same bytes."""
    source = provenance.get("source")
    if not isinstance(source, Mapping) or "converted_by" not in provenance:
        return False
    known = {file.url for file in entry.authors_files} | {file.sha256 for file in entry.authors_files if file.sha256}
    return bool({source.get("url"), source.get("sha256")} & known)


def papers_of(entry: Entry) -> dict[str, Paper]:
    """The paper behind each table of the results: "T1" is one of the entry's own, "Pri3D T1" one of that method's."""
    return {r.table: paper_of(r.table, entry.paper) for r in entry.results}


def measured_section(results: Sequence[Result]) -> list[str]:
    """The section of results measured with this project; empty without any."""
    text = "With this project, on these very weights; no number of a paper is among them."
    shown = [replace(result, table=result.table.partition("#")[0]) for result in results]  # the place in a file is long
    return ["## Measured", text, _results(shown)] if results else []


def reported_section(
    results: Sequence[Result], papers: Mapping[str, Paper], whose: str, scratch: Mapping[Result, float]
) -> list[str]:
    """The section of the authors' results.

    `papers` maps each table to its paper, `whose` names the weights, `scratch` gives the same table's value for random
    weights.
    """
    if not results:
        return []
    cited = {papers[result.table].title: papers[result.table] for result in results}
    sources = " and ".join(_paper_link(paper) for paper in cited.values())
    text = (
        f"Numbers of networks that started from {whose}, as stated by {sources}: T is a table of a paper, README that "
        "of its repository. Not one of them was measured with this project."
    )
    if scratch:
        text += ' "scratch" is what the same table states for random weights.'
    return ["## Reported by the authors", text, _results(results, scratch)]


def _results(results: Iterable[Result], scratch: Mapping[Result, float] | None = None) -> str:
    head, rows = ["task", "data", "metric", "value", "from"], []
    for r in results:
        row = [r.task, r.dataset, r.metric, f"{r.value:g}", f"{r.table}: {r.note}" if r.note else r.table]
        rows.append((*row, f"{scratch[r]:g}" if r in scratch else "-") if scratch else tuple(row))
    return table((*head, "scratch") if scratch else tuple(head), rows)


def license_section(license: License) -> str:
    """The section that states the license chain."""
    rows = [("the weights", _terms(license.weights)), ("the code that made them", _terms(license.code))]
    rows += [(f"data: {name}", _terms(terms)) for name, terms in license.datasets]
    return "## License\n\n" + table(("of", "license"), [*rows, ("started from", license.base_model)])


def _terms(identifier: str) -> str:
    page = license_page(identifier)
    return identifier if page is None else f"[{identifier}]({page})"


def citation_section(paper: Paper | None) -> str:
    """The section that cites a paper; "" without one."""
    if paper is None:
        return ""
    names = f"{paper.authors}: *{paper.title}*. {paper.venue} {paper.year}. <{paper.url}>"
    return f"## Citation\n\n{names}\n\n```bibtex\n{bibtex(paper)}\n```"


def bibtex(paper: Paper) -> str:
    """A BibTeX entry; its key is surname, year and first word of the title."""
    first = paper.authors.split(",")[0].split()[-1]
    key = _ascii_word(first) + str(paper.year) + _ascii_word(re.split(r"[\s:,-]", paper.title, maxsplit=1)[0])
    number = ARXIV.match(paper.url)
    fields = {
        "title": f"{{{paper.title}}}",
        "author": " and ".join(name.strip() for name in paper.authors.split(",")),
        "year": str(paper.year),
        "url": paper.url,
    }
    if paper.venue.lower().startswith("arxiv"):
        kind = "misc"
        fields |= {"eprint": number[1], "archiveprefix": "arXiv"} if number else {"howpublished": paper.venue}
    else:
        kind = "inproceedings"
        fields["booktitle"] = paper.venue
    lines = [f"  {field} = {{{text.replace('&', chr(92) + '&')}}}," for field, text in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def _ascii_word(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", folded)


def expects(arch: Arch, contract: ImageContract | VoxelContract) -> str:
    """The section that states the network's input."""
    return "## What goes in\n\n" + table(("what", "value"), input_rows(arch, contract))


def input_rows(arch: Arch, contract: ImageContract | VoxelContract) -> list[tuple[str, str]]:
    """What a contract says, as (label, text) with units."""
    return _image_rows(contract) if isinstance(contract, ImageContract) else _voxel_rows(arch, contract)


def _image_rows(contract: ImageContract) -> list[tuple[str, str]]:
    low, high = contract.value_range
    height, width = contract.size
    return [
        ("channels", f"{', '.join(contract.channels)}, in this order"),
        ("values", f"[{low:g}, {high:g}] before normalization; 8-bit images are divided by 255"),
        ("mean", numbers(contract.mean)),
        ("standard deviation", numbers(contract.std)),
        (
            "size",
            f"{height}x{width} (height x width) in pre-training; `.transforms` resizes ({contract.interpolation})",
        ),
        ("tensor", f"float [B, {len(contract.channels)}, H, W], normalized"),
    ]


def _voxel_rows(arch: Arch, contract: VoxelContract) -> list[tuple[str, str]]:
    if isinstance(contract.voxel_size, tuple):
        size = "{:g} m x {:g} degree x {:g} m".format(*contract.voxel_size)
        axes = "cylindrical: radius, azimuth and height of x, y, z in meters, with the sensor at the origin"
    else:
        size, axes = f"{contract.voxel_size * 100:g} cm", "cartesian: x, y, z in meters"
    first = contract.reduce == "first"
    return [
        ("voxel edge", size),
        ("coordinates", axes),
        ("channels", _voxel_channels(contract)),
        ("values", _voxel_values(contract)),
        ("points of one voxel", "the first gives the features" if first else "the features are their mean"),
        (
            "output",
            f"{output_channels(arch)} channels a voxel" + (", of length 1" if arch.args.get("normalize") else ""),
        ),
    ]


def _voxel_channels(contract: VoxelContract) -> str:
    names = contract.given_channels
    ones = len(contract.channels) - len(names)
    given = ", ".join(names) + (", in this order" if len(names) > 1 else "")
    return "; ".join(filter(None, (given, f"{ones} x constant 1" if ones else "")))


def _voxel_values(contract: VoxelContract) -> str:
    names = contract.given_channels
    if not names:
        return "1 everywhere; colors are not taken"
    raw = "colors in [0, 1] (8-bit ones are divided by 255)" if set(names) <= COLORS else ", ".join(names)
    return raw + contract.scaling


def weights_section(entry: Entry) -> list[str]:
    """Where the weights of an entry come from, for its card."""
    name = entry.name
    if entry.status == "published-here":
        return [*_how_it_comes(entry), _hub_files(entry.files)]
    if entry.status == "published-by-authors":
        parts = [
            f'The authors publish them. `load_backbone("{name}")` downloads their file, reads it without executing '
            "anything in it, converts it, and keeps the checkpoint folder in the cache: later calls need no network. "
            f"A file fetched by hand becomes a folder to load with `{entry.convert_command()}`.",
            _authors_files(entry.authors_files),
        ]
        if entry.recipe is not None:
            parts.append(f"To make your own: `{entry.train_command()}`.")
        return parts
    if entry.status == "regenerable":
        folder = f"runs/{name}"
        return [
            "Nobody publishes them; a recipe of this project makes them. Names below are then found in `runs`:",
            f"```bash\n{entry.train_command(folder)}\nexport GEO_PRETRAIN_HUB=runs\n```",
        ]
    return [
        "Nobody publishes them and no recipe of this project makes them yet. `pretrained=False` builds the network "
        "with a random start."
    ]


def _how_it_comes(entry: Entry) -> list[str]:
    """The paragraphs on how the files of this project reach a machine, and how they were made."""
    made = [f"Made with this project: {entry.made}."] if entry.made else []
    if entry.recipe is not None and made:
        made[0] += " The recipe, the log and the loss curve lie beside them; to make your own: "
        made[0] += f"`{entry.train_command()}`."
    if not entry.packages:
        return [f'`load_backbone("{entry.name}")` fetches the files below and compares each with its digest.', *made]
    text = f"They come in the Python package {' and '.join(f'`{package}`' for package in entry.packages)}, in float16: "
    text += "once it is installed, no network is needed. Each file is compared with its digest."
    return [text, f"```bash\n{install_code(entry.packages[0])}\n```", *made]


def found_by_name(name: str, source: str) -> str:
    """How libraries that accept only names find a folder that has its catalog name; "" if it has another."""
    owner, _, repo = source.removeprefix("hf-hub:").partition("@")[0].rpartition("/")
    if source == name:  # in an installed package
        return "Libraries that take names alone find it as well."
    if source == FOLDER:
        hub, where = "PARENT", f", the folder that holds this one as `{name}`"
    elif source.startswith("hf-hub:") and repo == name:
        hub, where = f"hf:{owner}", ""
    else:
        return ""
    return f"Libraries that take names alone find it after `export GEO_PRETRAIN_HUB={hub}`{where}."


def _authors_files(files: Iterable[AuthorsFile]) -> str:
    rows = [
        (
            f"[{file.content}]({file.url})",
            file.format,
            ", ".join(file.roles),
            "not stated" if file.size is None else f"{file.size:,}",
            "recorded on first use" if file.sha256 is None else f"`{file.sha256}`",
        )
        for file in files
    ]
    return table(("file of the authors", "format", "gives", "bytes", "sha256"), rows)


def _hub_files(files: Iterable[File]) -> str:
    rows = [(f"`{f.name}`", f.role, f"{f.size:,}", f"`{f.sha256}`", " ".join(f.sources)) for f in files]
    return table(("file", "role", "bytes", "sha256", "from"), rows)


def stored_files(files: Mapping[str, StoredFile] | None) -> str:
    """The table of files without the card, which cannot state its own digest."""
    if files is None:
        return ""
    rows = [(f"`{n}`", f.role, f"{f.size:,}", f"`{f.sha256}`") for n, f in files.items() if f.role != "card"]
    return "## Files\n\n" + table(("file", "role", "bytes", "sha256"), rows)


def entry_limits(entry: Entry) -> list[str]:
    """The limitations of a catalog entry, one sentence each."""
    reached = "whether weights made with this project reach the numbers above was not measured"
    first = {
        "published-here": "What these weights bring to a task was not measured." if not entry.measured else "",
        "published-by-authors": "What the converted weights reach was not measured with this project"
        + ("." if entry.results else ", and the authors report no number for them."),
        "regenerable": f"The recipe's full length is not part of any test; {reached}."
        if entry.results
        else "No number is stated for them; `geo-pretrain eval matching DIR` measures those you make.",
        "planned": "Nothing was measured with this project.",
    }[entry.status]
    return [*filter(None, [first]), *_common_limits(entry.contract, entry.license, entry.data)]


def folder_limits(
    contract: ImageContract | VoxelContract, license: License, data: str, theirs: bool, measured: bool, reported: bool
) -> list[str]:
    """The limitations of a checkpoint folder, one sentence each.

    `theirs`: its weights are the authors'; `measured`, `reported`: this project, or the authors, state results.
    """
    limits = []
    if not measured:
        what = "What the converted weights reach" if theirs else "What these weights bring to a task"
        limits.append(f"{what} was not measured" + (" with this project." if theirs else "."))
    if theirs and not reported:
        limits.append("The authors report no number for them.")
    return limits + _common_limits(contract, license, data)


def _common_limits(contract: ImageContract | VoxelContract, license: License, data: str) -> list[str]:
    limits = ["Pre-trained features to fine-tune from: by themselves they name no class and no object."]
    if data == "rooms":
        limits.append("Rooms are procedural: their shapes, textures and noise are simpler than those of real scans.")
    if isinstance(contract, ImageContract):
        size = "x".join(map(str, contract.size))
        limits.append(f"Pre-training saw {data} at {size} pixels; other sizes run, but were no part of it.")
    elif not contract.given_channels:
        limits.append("Colors are not used: the network was shown geometry alone, at one voxel size.")
    else:
        limits.append("The features hold for this voxel size and these channels; others were not shown to the network.")
    if license.weights not in PERMISSIVE:
        limits.append("The weights' license limits what they may be used for; see below.")
    return limits
