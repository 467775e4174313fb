"""Cards and tables, rendered from the catalog and a checkpoint's provenance; nothing is written here by hand.

`python -m geo_pretrain.cards` in a checkout rewrites model_cards/ and the README's table; a test fails when they are
stale. Numbers that somebody else reported and numbers measured with this project never stand in one table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geo_pretrain.cards import sections
from geo_pretrain.cards.finetuned import render_finetuned
from geo_pretrain.cards.front_matter import front_matter
from geo_pretrain.cards.markdown import bullets, join, tree
from geo_pretrain.cards.sections import FOLDER, bibtex
from geo_pretrain.cards.table import BEGIN, END, FEATURED, catalog_table, headline, update_table
from geo_pretrain.cards.usage import snippets
from geo_pretrain.catalog import CATALOG, backbone_info
from geo_pretrain.catalog.entry import Arch, Entry, License, Result
from geo_pretrain.catalog.tables import scratch_values
from geo_pretrain.checkpoint import FINETUNED, TEXT_ROLES, StoredFile, means_folder, read_checkpoint
from geo_pretrain.contract import ImageContract, VoxelContract

__all__ = [
    "BEGIN",
    "END",
    "FEATURED",
    "bibtex",
    "card_of",
    "catalog_table",
    "headline",
    "render_card",
    "render_entry",
    "update_table",
    "write_cards",
]


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
    """Render the README.md of a checkpoint folder: summary, loading, license chain, provenance, measured results.

    `results` were measured with these very weights. Numbers of the catalog are added, as the authors', only when
    `provenance` says that the folder was converted from a file the authors publish under this name. `source` is what
    load_backbone takes to find the folder (hf-hub:owner/repo once it is there), `files` the folder's inventory and
    `roles` those of its weights (default: the inventory's, or all that the network has).
    """
    entry = CATALOG.get(name)
    theirs = entry is not None and sections.is_authors_own(entry, provenance)
    paper = sections.paper_of_method(name)
    reported = entry.results if entry is not None and theirs else ()
    papers = sections.papers_of(entry) if entry is not None else {}
    inventory = arch.roles if files is None else {stored.role for stored in files.values()}
    held = set(inventory if roles is None else roles)
    data = entry.data if entry is not None else license.datasets[0][0]
    command = "" if recipe is None else f"`geo-pretrain train {recipe}`"
    head = front_matter(
        name,
        arch,
        license,
        method=sections.method_of(name),
        results=results or reported,
        papers=None if results else papers,
    )
    by_name = sections.found_by_name(name, source) if entry is not None else ""
    shown = snippets(source, arch, contract, name=name if by_name else None, decoder="decoder" in held)
    return join(
        head,
        f"# {name}",
        sections.summary(arch, data, entry.description if entry is not None else ""),
        "" if finished else "**Unfinished**: written on the way; training goes on or was stopped.",
        sections.facts_table(arch, data, paper, {"recipe": command}),
        "## Use",
        by_name,
        *map(str, shown),
        sections.expects(arch, contract),
        *sections.measured_section(results),
        *sections.reported_section(reported, papers, "these weights", scratch_values(entry)),
        "## Limitations",
        bullets(sections.folder_limits(contract, license, data, theirs, bool(results), bool(reported))),
        sections.license_section(license),
        "## Provenance",
        tree(provenance),
        sections.stored_files(files),
        sections.citation_section(paper),
    )


def render_entry(entry: Entry) -> str:
    """The card of a catalog entry, for model_cards/."""
    theirs = entry.status == "published-by-authors"
    papers = sections.papers_of(entry)
    head = front_matter(
        entry.name,
        entry.arch,
        entry.license,
        method=entry.method,
        results=entry.results if theirs else entry.measured,
        papers=papers if theirs else None,
    )
    shown = snippets(entry.name, entry.arch, entry.contract, name=entry.name, pretrained=entry.status != "planned")
    whose = "these weights" if theirs else "the authors' own weights, which are not public"
    return join(
        head,
        f"# {entry.name}",
        sections.summary(entry.arch, entry.data, entry.description),
        sections.facts_table(
            entry.arch, entry.data, entry.paper, {"weights from": sections.WEIGHTS_FROM[entry.status]}
        ),
        "## Weights",
        *sections.weights_section(entry),
        "## Use",
        *map(str, shown),
        sections.expects(entry.arch, entry.contract),
        *sections.measured_section(entry.measured),
        *sections.reported_section(entry.results, papers, whose, scratch_values(entry)),
        "## Limitations",
        bullets(sections.entry_limits(entry)),
        sections.license_section(entry.license),
        sections.citation_section(entry.paper),
    )


def card_of(name_or_folder: str | os.PathLike[str]) -> str:
    """Render the card of a catalog entry, or of a checkpoint folder from its config.json.

    A folder wins over a name, as in load_backbone. Raises `UnknownName` or `CheckpointError`.
    """
    if not means_folder(name_or_folder):
        return render_entry(backbone_info(os.fspath(name_or_folder)))
    checkpoint = read_checkpoint(Path(name_or_folder).expanduser())
    if FINETUNED in checkpoint.provenance:
        own = checkpoint.name, checkpoint.arch, checkpoint.contract, checkpoint.license, checkpoint.provenance
        return render_finetuned(*own, files=checkpoint.files)
    return render_card(
        checkpoint.name,
        checkpoint.arch,
        checkpoint.contract,
        checkpoint.license,
        checkpoint.provenance,
        recipe=f"{FOLDER}/{TEXT_ROLES['recipe']}" if "recipe" in checkpoint.roles else None,
        finished=checkpoint.finished,
        files=checkpoint.files,
    )


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
