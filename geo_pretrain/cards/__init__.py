"""Cards and tables, rendered from the catalog and a checkpoint's provenance; nothing is written here by hand.

`python -m geo_pretrain.cards` in a checkout rewrites model_cards/ and the README's table; a test fails when they are
stale. Numbers that somebody else reported and numbers measured with this project never stand in one table.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.cards.front_matter import detail_of, front_matter, license_page, task_of
from geo_pretrain.cards.usage import output_channels, snippets
from geo_pretrain.catalog import CATALOG, backbone_info, find, list_backbones
from geo_pretrain.catalog.entry import Arch, AuthorsFile, Entry, File, License, Paper, Result
from geo_pretrain.catalog.license import PERMISSIVE
from geo_pretrain.checkpoint import CONFIG, TEXT_ROLES, StoredFile, read_checkpoint
from geo_pretrain.contract import COLORS, ImageContract, VoxelContract
from geo_pretrain.errors import GeoPretrainError

BEGIN, END = "<!-- catalog -->", "<!-- /catalog -->"
FOLDER = "path/to/this/folder"
TABLE_HEAD = ("name", "network", "data", "weights' license", "weights from", "reported")
CAPTIONS = {"2d": "For images", "3d": "For point clouds"}
WEIGHTS_FROM = {  # a status in two words, for the table
    "published-here": "this project",
    "published-by-authors": "the authors",
    "regenerable": "a recipe",
    "planned": "nobody yet",
}
HEADLINE_TASKS = {"2d": "semantic segmentation", "3d": "3D semantic segmentation"}
SHORT_TASKS = {"detection": "detection", "instance segmentation": "instances", "classification": "classification"}
ARXIV = re.compile(r"https?://arxiv\.org/abs/([\w.-]+/?\w*)")


def render_card(
    name: str,
    arch: Arch,
    contract: ImageContract | VoxelContract,
    license: License,
    provenance: Mapping[str, Any],
    *,
    recipe: str | None = None,
    finished: bool = True,
    results: Sequence[Result] = (),
    source: str = FOLDER,
    files: Mapping[str, StoredFile] | None = None,
    roles: Iterable[str] | None = None,
) -> str:
    """The README.md of a checkpoint folder: what it is, how to load it, license chain, provenance, measured results.

    `results` were measured with these very weights. Numbers of the catalog are added, as the authors', only when
    `provenance` says that the folder was converted from a file the authors publish under this name. `source` is what
    load_backbone takes to find the folder (hf-hub:owner/repo once it is there), `files` the folder's inventory and
    `roles` those of its weights (default: the inventory's, or all that the network has).
    """
    entry = CATALOG.get(name)
    theirs = entry is not None and _is_authors_own(entry, provenance)
    paper = _paper_of_method(name)
    reported = entry.results if entry is not None and theirs else ()
    papers = _papers(entry) if entry is not None else {}
    held = set(arch.roles if roles is None else roles)
    if files is not None and roles is None:
        held = {stored.role for stored in files.values()}
    data = entry.data if entry is not None else license.datasets[0][0]
    facts = {"network": _network(arch), "pre-training data": data, "method": _method_text(paper)}
    if recipe is not None:
        facts["recipe"] = f"`geo-pretrain train {recipe}`"
    head = front_matter(
        name,
        arch,
        license,
        modality=arch.modality,
        method=_method(name),
        results=results or reported,
        papers=None if results else papers,
    )
    by_name = _found_by_name(name, source) if entry is not None else ""
    shown = snippets(source, arch, contract, name=name if by_name else None, decoder="decoder" in held)
    return _join(
        head,
        f"# {name}",
        _summary(arch, data, entry.description if entry is not None else ""),
        "" if finished else "**Unfinished**: written on the way; training goes on or was stopped.",
        _facts_table(facts),
        "## Use",
        by_name,
        *map(str, shown),
        _expects(arch, contract),
        *_measured(results),
        *_reported(reported, papers, "these weights"),
        "## Limitations",
        _bullets(_folder_limits(contract, license, data, theirs, bool(results), bool(reported))),
        _license(license),
        "## Provenance",
        _tree(provenance),
        _stored_files(files),
        _citation(paper),
    )


def render_entry(entry: Entry) -> str:
    """The card of a catalog entry, for model_cards/."""
    theirs = entry.status == "published-by-authors"
    papers = _papers(entry)
    facts = {
        "network": _network(entry.arch),
        "pre-training data": entry.data,
        "method": _method_text(entry.paper),
        "weights from": WEIGHTS_FROM[entry.status],
    }
    head = front_matter(
        entry.name,
        entry.arch,
        entry.license,
        modality=entry.modality,
        method=entry.method,
        results=entry.results if theirs else (),
        papers=papers,
    )
    shown = snippets(entry.name, entry.arch, entry.contract, name=entry.name, pretrained=entry.status != "planned")
    whose = "these weights" if theirs else "the authors' own weights, which are not public"
    return _join(
        head,
        f"# {entry.name}",
        _summary(entry.arch, entry.data, entry.description),
        _facts_table(facts),
        "## Weights",
        *_weights(entry),
        "## Use",
        *map(str, shown),
        _expects(entry.arch, entry.contract),
        *_reported(entry.results, papers, whose),
        "## Limitations",
        _bullets(_entry_limits(entry)),
        _license(entry.license),
        _citation(entry.paper),
    )


def card_of(name_or_folder: str | os.PathLike[str]) -> str:
    """The card of a catalog name, or that of a checkpoint folder rendered anew from its config.json.

    A folder wins over a name, as in load_backbone. Raises `UnknownName` or `CheckpointError`.
    """
    text = os.fspath(name_or_folder)
    folder = Path(text).expanduser()
    looks_like_path = not isinstance(name_or_folder, str) or os.sep in text or text.startswith((".", "~"))
    if not looks_like_path and not (folder / CONFIG).is_file() and (find(text) is not None or not folder.is_dir()):
        return render_entry(backbone_info(text))
    found = read_checkpoint(folder)
    held = {stored.role for stored in found.files.values()}
    return render_card(
        found.name,
        found.arch,
        found.contract,
        found.license,
        found.provenance,
        recipe=f"{FOLDER}/{TEXT_ROLES['recipe']}" if "recipe" in held else None,
        finished=found.finished,
        files=found.files,
    )


def catalog_table(names: Iterable[str] | None = None) -> str:
    """The catalog as Markdown tables, one row a checkpoint: those for images, then those for point clouds.

    Each name links to its card in model_cards/.
    """
    entries = [backbone_info(name) for name in (list_backbones() if names is None else names)]
    tables = []
    for modality, caption in CAPTIONS.items():
        rows = [_catalog_row(entry) for entry in entries if entry.modality == modality]
        if rows:
            tables.append(f"**{caption}**\n\n{_table(TABLE_HEAD, rows)}")
    return "\n\n".join(tables)


def _catalog_row(entry: Entry) -> tuple[str, ...]:
    return (
        f"[`{entry.name}`](model_cards/{entry.name}.md)",
        entry.arch.title,
        entry.data,
        entry.license.weights.removeprefix("LicenseRef-"),
        WEIGHTS_FROM[entry.status],
        headline(entry) or "-",
    )


def headline(entry: Entry) -> str | None:
    """One reported number with its benchmark, such as "61.7 mIoU, ScanNet"; None when there is none.

    In order of preference: semantic segmentation of ScanNet, any mean IoU, any number, each on all of the benchmark's
    training data; else the first number of all.
    """
    whole = [result for result in entry.results if not detail_of(result)]
    miou = [result for result in whole if result.metric == "mIoU"]
    best = [r for r in miou if (r.task, r.dataset) == (HEADLINE_TASKS[entry.modality], "ScanNet")]
    chosen = next(iter((*best, *miou, *whole, *entry.results)), None)
    if chosen is None:
        return None
    short = next((short for text, short in SHORT_TASKS.items() if text in task_of(chosen)), "")
    where = " ".join(filter(None, (chosen.dataset, short)))
    return ", ".join(filter(None, (f"{chosen.value:g} {chosen.metric}", where, detail_of(chosen))))


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


# ---- what it is ----


def _summary(arch: Arch, data: str, description: str) -> str:
    kind = "images" if arch.modality == "2d" else "point clouds"
    what = f": {description}" if description else ""
    return f"{arch.title} for {kind}, pre-trained on {data}{what}."


def _network(arch: Arch) -> str:
    return f"{arch.title}, `{arch}`"


def _method(name: str) -> str | None:
    """The method that a checkpoint's name begins with, when the catalog knows it."""
    methods = {entry.method for entry in CATALOG.values()}
    return max((method for method in methods if name.startswith(f"{method}_")), key=len, default=None)


def _paper_of_method(name: str) -> Paper | None:
    """The paper of a name: its entry's, or that of any entry with its method."""
    method = _method(name)
    papers = (entry.paper for entry in CATALOG.values() if entry.method == method)
    return CATALOG[name].paper if name in CATALOG else next(papers, None)


def _method_text(paper: Paper | None) -> str:
    return "" if paper is None else f"[{paper.title}]({paper.url}) ({paper.venue} {paper.year})"


def _facts_table(facts: Mapping[str, str]) -> str:
    return _table(("what", "value"), [(key, value) for key, value in facts.items() if value])


def _expects(arch: Arch, contract: ImageContract | VoxelContract) -> str:
    rows = _image_rows(contract) if isinstance(contract, ImageContract) else _voxel_rows(arch, contract)
    return "## What goes in\n\n" + _table(("what", "value"), rows)


def _image_rows(contract: ImageContract) -> list[tuple[str, str]]:
    low, high = contract.value_range
    height, width = contract.size
    return [
        ("channels", f"{', '.join(contract.channels)}, in this order"),
        ("values", f"[{low:g}, {high:g}] before normalization; 8-bit images are divided by 255"),
        ("mean", _numbers(contract.mean)),
        ("standard deviation", _numbers(contract.std)),
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
        ("output", f"{output_channels(arch)} channels a voxel" + (", of length 1" if _normalized(arch) else "")),
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
    scale = f" * {contract.scale:g}" if contract.scale != 1 else ""
    offset = f" {'-' if contract.offset < 0 else '+'} {abs(contract.offset):g}" if contract.offset else ""
    return f"{raw}{scale}{offset}"


def _normalized(arch: Arch) -> bool:
    return bool(arch.args.get("normalize", False))


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# ---- how to get it ----


def _weights(entry: Entry) -> list[str]:
    """Where the weights of an entry come from, for its card."""
    name = entry.name
    if entry.status == "published-here":
        return [
            f'`load_backbone("{name}")` fetches the files below and compares each with its digest.',
            _hub_files(entry.files),
        ]
    if entry.status == "published-by-authors":
        first = entry.authors_files[0]
        by_hand = f"geo-pretrain convert FILE --from {first.format} --name {name} --out DIR"
        parts = [
            f'The authors publish them. `load_backbone("{name}")` downloads their file, reads it without executing '
            "anything in it, converts it, and keeps the checkpoint folder in the cache: later calls need no network. "
            f"A file fetched by hand becomes a folder to load with `{by_hand}`.",
            _authors_files(entry.authors_files),
        ]
        if entry.recipe is not None:
            parts.append(f"To make your own: `{_train_command(entry, 'DIR')}`.")
        return parts
    if entry.status == "regenerable":
        folder = f"runs/{name}"
        return [
            "Nobody publishes them; a recipe of this project makes them. Names below are then found in `runs`:",
            f"```bash\n{_train_command(entry, folder)}\nexport GEO_PRETRAIN_HUB=runs\n```",
        ]
    return [
        "Nobody publishes them and no recipe of this project makes them yet. `pretrained=False` builds the network "
        "with a random start."
    ]


def _found_by_name(name: str, source: str) -> str:
    """How libraries that take names alone find a folder of the catalog's name; "" when it is kept under another."""
    owner, _, repo = source.removeprefix("hf-hub:").partition("@")[0].rpartition("/")
    if source == FOLDER:
        hub, where = "PARENT", f", the folder that holds this one as `{name}`"
    elif source.startswith("hf-hub:") and repo == name:
        hub, where = f"hf:{owner}", ""
    else:
        return ""
    return f"Libraries that take names alone find it after `export GEO_PRETRAIN_HUB={hub}`{where}."


def _train_command(entry: Entry, out: str) -> str:
    data = "" if entry.data == "rooms" else f" --data {entry.data.lower().rpartition('+')[2]}:PATH"
    return f"geo-pretrain train {entry.recipe}{data} --out {out}"


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
    return _table(("file of the authors", "format", "gives", "bytes", "sha256"), rows)


def _hub_files(files: Iterable[File]) -> str:
    rows = [(f"`{f.name}`", f.role, f"{f.size:,}", f"`{f.sha256}`", " ".join(f.sources)) for f in files]
    return _table(("file", "role", "bytes", "sha256", "from"), rows)


def _stored_files(files: Mapping[str, StoredFile] | None) -> str:
    """The inventory but for the card, which cannot state its own digest."""
    if files is None:
        return ""
    rows = [(f"`{n}`", f.role, f"{f.size:,}", f"`{f.sha256}`") for n, f in files.items() if f.role != "card"]
    return "## Files\n\n" + _table(("file", "role", "bytes", "sha256"), rows)


# ---- what is known about it ----


def _is_authors_own(entry: Entry, provenance: Mapping[str, Any]) -> bool:
    """Whether the folder was converted from a file that the catalog lists: the same address or the same bytes."""
    source = provenance.get("source")
    if not isinstance(source, Mapping) or "converted_by" not in provenance:
        return False
    known = {file.url for file in entry.authors_files} | {file.sha256 for file in entry.authors_files if file.sha256}
    return bool({source.get("url"), source.get("sha256")} & known)


def _papers(entry: Entry) -> dict[str, Paper]:
    """The paper behind each table of the results: "T1" is one of the entry's own, "Pri3D T1" one of that method's."""
    by_method = {other.method: other.paper for other in CATALOG.values()}
    return {r.table: by_method.get(r.table.split()[0].lower(), entry.paper) for r in entry.results}


def _measured(results: Sequence[Result]) -> list[str]:
    return ["## Measured", "With this project, on these weights.", _results(results)] if results else []


def _reported(results: Sequence[Result], papers: Mapping[str, Paper], whose: str) -> list[str]:
    if not results:
        return []
    cited = {papers[result.table].title: papers[result.table] for result in results}
    sources = " and ".join(_method_text(paper) for paper in cited.values())
    text = (
        f"Numbers of networks that started from {whose}, as stated by {sources}: T is a table of a paper, README that "
        "of its repository. Not one of them was measured with this project."
    )
    return ["## Reported by the authors", text, _results(results)]


def _results(results: Iterable[Result]) -> str:
    rows = [(r.task, r.dataset, r.metric, f"{r.value:g}", r.table) for r in results]
    return _table(("task", "data", "metric", "value", "from"), rows)


def _entry_limits(entry: Entry) -> list[str]:
    reached = "whether weights made with this project reach the numbers above was not measured"
    first = {
        "published-here": "See the folder's own card for what was measured." if not entry.results else "",
        "published-by-authors": "What the converted weights reach was not measured with this project"
        + ("." if entry.results else ", and the authors report no number for them."),
        "regenerable": f"The recipe's full length is not part of any test; {reached}."
        if entry.results
        else "No number is stated for them; `geo-pretrain eval matching DIR` measures those you make.",
        "planned": "Nothing was measured with this project.",
    }[entry.status]
    return [*filter(None, [first]), *_common_limits(entry.contract, entry.license, entry.data)]


def _folder_limits(
    contract: ImageContract | VoxelContract, license: License, data: str, theirs: bool, measured: bool, reported: bool
) -> list[str]:
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


def _license(license: License) -> str:
    rows = [("the weights", _terms(license.weights)), ("the code that made them", _terms(license.code))]
    rows += [(f"data: {name}", _terms(terms)) for name, terms in license.datasets]
    return "## License\n\n" + _table(("of", "license"), [*rows, ("started from", license.base_model)])


def _terms(identifier: str) -> str:
    page = license_page(identifier)
    return identifier if page is None else f"[{identifier}]({page})"


def _citation(paper: Paper | None) -> str:
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


# ---- Markdown ----


def _join(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _tree(data: Mapping[str, Any], indent: str = "") -> str:
    """Nested mappings as a Markdown list; what is empty is left out."""
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            inner = _tree(value, indent + "  ")
            lines += [f"{indent}- {_plain(key)}:", inner] if inner else []
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        text = ", ".join(_plain(item) for item in items if item is not None and item != "")
        lines += [f"{indent}- {_plain(key)}: {text}"] if text else []
    return "\n".join(lines)


def _plain(value: object) -> str:
    """On one line and without Markdown: some texts come out of other people's files."""
    return re.sub(r"([\\`*<\[\]])", r"\\\1", " ".join(str(value).split()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
