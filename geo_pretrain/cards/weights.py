"""Where a checkpoint's weights come from, for its card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from geo_pretrain.cards.markdown import table
from geo_pretrain.catalog.entry import AuthorsFile, Entry, File
from geo_pretrain.checkpoint import StoredFile

FOLDER = "path/to/this/folder"
WEIGHTS_FROM = {  # a status in two words, for the table
    "published-here": "this project",
    "published-by-authors": "the authors",
    "regenerable": "a recipe",
    "planned": "nobody yet",
}


def weights_section(entry: Entry) -> list[str]:
    """Where the weights of an entry come from, for its card."""
    name = entry.name
    if entry.status == "published-here":
        return [
            f'`load_backbone("{name}")` fetches the files below and compares each with its digest.',
            _hub_files(entry.files),
        ]
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


def found_by_name(name: str, source: str) -> str:
    """How libraries that accept only names find a folder that has its catalog name; "" if it has another."""
    owner, _, repo = source.removeprefix("hf-hub:").partition("@")[0].rpartition("/")
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
