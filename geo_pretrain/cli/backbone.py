"""Commands for checkpoints: list, info, pull, verify, convert, publish, bundle, card, cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from geo_pretrain.cli.completion import backbone_names
from geo_pretrain.cli.options import OUT, checked_target, file_option
from geo_pretrain.cli.shared import app, console, escape, progress
from geo_pretrain.targets import BUNDLES, TEXTS, file_fault, folder_fault

if TYPE_CHECKING:
    from geo_pretrain.cards.facts import Section
    from geo_pretrain.catalog import Entry
    from geo_pretrain.checkpoint import Checkpoint
    from geo_pretrain.hub import Opened

cache_app = typer.Typer(help="List and clear downloaded checkpoints.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

LIST_WIDTH = 400  # more than any row: names and folders are copied from lists, so none is cut
HUB_HELP = "Where to look first: a folder, an http(s) URL or hf:ORGANISATION; default: GEO_PRETRAIN_HUB."
TO_HELP = (
    "Format to write; for images: torchvision, timm, detectron2, mmlab; for points: me05, me04, spconv, torchsparse."
)
NAME_HELP = "A catalog name, a checkpoint folder or hf-hub:OWNER/REPO."


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Names to show, with * and ?.")] = "*",
    method: Annotated[str | None, typer.Option(help="Method, such as pri3d.")] = None,
    modality: Annotated[str | None, typer.Option(help="2d or 3d.")] = None,
    license: Annotated[str | None, typer.Option(help="SPDX identifier, or permissive or non-commercial.")] = None,
    data: Annotated[str | None, typer.Option(help="Pre-training data, such as ScanNet.")] = None,
    status: Annotated[str | None, typer.Option(help="Status, such as regenerable.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Only what loads here without a network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole rows as JSON.")] = False,
) -> None:
    """List the backbones of the catalog.

    Example: `geo-pretrain list "pri3d*" --license permissive`
    """
    from geo_pretrain.catalog import list_backbones
    from geo_pretrain.errors import nearest
    from geo_pretrain.listing import catalog_lines, catalog_rows, ready_names

    names = list_backbones(pattern, method=method, modality=modality, license=license, data=data, status=status)
    names = ready_names(names) if offline else names
    if as_json:
        typer.echo(json.dumps(catalog_rows(names), indent=2))
    elif names:
        typer.echo(catalog_lines(names))
    elif offline:
        typer.echo(
            "None of them loads without a network yet: `geo-pretrain pull NAME` fetches one, and ours come with "
            "`make weights` in a clone."
        )
    else:
        typer.echo(f"No backbone matches. Closest: {', '.join(nearest(pattern, list_backbones()))}.")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help=NAME_HELP, autocompletion=backbone_names)],
    loaded: Annotated[bool, typer.Option("--loaded", help="Load the weights and report every tensor.")] = False,
    hub: Annotated[str | None, typer.Option(help=HUB_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show everything known about a backbone, in labelled tables; with --loaded also the report of every tensor.

    Example: `geo-pretrain info pri3d_view_geo_r50`

    `geo-pretrain info runs/kitchen --loaded`
    """
    from geo_pretrain.advice.ranking import how_to_get
    from geo_pretrain.cards.facts import entry_sections, folder_sections, loaded_section
    from geo_pretrain.catalog import find
    from geo_pretrain.hub.cache import names_here

    entry, report = find(name), None
    facts = _entry_facts(entry) if entry is not None else None
    if facts is None or loaded:
        with progress(not as_json):
            report, checkpoint = _load(name, hub) if loaded else (None, _open(name, hub).fetch())
        facts = facts or _folder_facts(checkpoint)
        if report is not None:
            facts["loaded"] = {"from": str(checkpoint.folder), **asdict(report)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str))
        return
    sections = entry_sections(entry, how_to_get(entry, names_here())) if entry else folder_sections(checkpoint)
    sections += [loaded_section(report, str(checkpoint.folder))] if report is not None else []
    _print_sections(sections)


def _print_sections(sections: Iterable[Section]) -> None:
    """Print titled tables; a sentence under each title says how to read it."""
    for number, section in enumerate(sections):
        console.print(f"{'' if number == 0 else chr(10)}[bold]{escape(section.title)}[/]", highlight=False)
        if section.note:
            console.print(f"[dim]{escape(section.note)}", highlight=False)
        console.print(escape("\n".join(section.lines(console.width))), highlight=False, soft_wrap=True)


def _entry_facts(entry: Entry) -> dict[str, Any]:
    from geo_pretrain.hub.cache import folders_here

    facts = {key: value for key, value in asdict(entry).items() if value not in (None, (), "")}
    here = folders_here().get(entry.name)
    facts["offline"] = f"ready: {here}" if here is not None else f"not on this machine: {entry.how}"
    return facts | {"arch": str(entry.arch), "contract": str(entry.contract)}


def _folder_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "folder": str(checkpoint.folder),
        "arch": str(checkpoint.arch),
        "contract": str(checkpoint.contract),
        "finished": checkpoint.finished,
        "license": asdict(checkpoint.license),
        "files": [f"{name}: {file.role}, {file.size} bytes" for name, file in checkpoint.files.items()],
        "provenance": dict(checkpoint.provenance),
    }


def _load(name: str, hub: str | None) -> tuple[Any, Checkpoint]:
    """Load the whole network; return its load report and its checkpoint."""
    from geo_pretrain.loading import load_backbone

    opened = _open(name, hub)
    checkpoint = opened.fetch(*opened.network_roles())
    network: Any = load_backbone(checkpoint.folder, decoder=checkpoint.arch.has_decoder)
    return network.load_report, checkpoint


def _open(name: str, hub: str | None) -> Opened:
    from geo_pretrain.hub import open as open_checkpoint

    return open_checkpoint(name, hub=hub)


@app.command()
def pull(
    names: Annotated[list[str] | None, typer.Argument(help=NAME_HELP, autocompletion=backbone_names)] = None,
    encoder: Annotated[bool, typer.Option("--encoder", help="For image networks fetch only the encoder.")] = False,
    hub: Annotated[str | None, typer.Option(help=HUB_HELP)] = None,
    from_bundle: Annotated[Path | None, typer.Option(help="Install checkpoints from a file made by `bundle`.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only ask every place of them, by default of all names.")
    ] = False,
) -> None:
    """Fetch checkpoints into the cache, so that loading them needs no network.

    Example: `geo-pretrain pull pri3d_view_geo_r50 pointcontrast_nce_srunet34`

    On a machine without network: `geo-pretrain pull --from-bundle zoo.tar`

    Which places answer today, without a download: `geo-pretrain pull --check`
    """
    if check:
        if from_bundle is not None:
            raise typer.BadParameter("--check asks places and unpacks nothing: give it without --from-bundle.")
        _check_doors(names, hub)
        return
    from geo_pretrain.hub.bundle import install_bundle

    if not names and from_bundle is None:
        raise typer.BadParameter("give NAMES or --from-bundle FILE.")
    with progress() as report:
        folders = install_bundle(from_bundle, progress=report.stage("unpacking")) if from_bundle else ()
    for folder in folders:
        console.print(escape(f"{folder.name}: {folder}"), soft_wrap=True, highlight=False)
    for name in names or ():
        with progress():
            opened = _open(name, hub)
            checkpoint = opened.fetch(*opened.network_roles(decoder=not encoder), *(() if encoder else ("golden",)))
        console.print(escape(f"{name}: {checkpoint.folder}"), soft_wrap=True, highlight=False)


def _check_doors(names: list[str] | None, hub: str | None) -> None:
    """Print each place of the names and whether it answers; exit with 1 where a name has no open door."""
    from geo_pretrain.catalog import CATALOG
    from geo_pretrain.checkpoint import means_folder
    from geo_pretrain.hub import doors

    closed = []
    for name in names or CATALOG:
        if names and Path(name).expanduser().is_dir() and means_folder(name):
            console.print(f"{escape(name)}  is a folder here, nothing to fetch", soft_wrap=True, highlight=False)
            continue
        found = doors(name, hub=hub)
        for door in found:
            size = "" if door.size is None else f" ({door.size / 1e6:.1f} MB)"
            state = f"[green]open[/]{size}" if door.is_open else f"[red]closed[/]: {escape(door.reason)}"
            console.print(f"{escape(name)}  {escape(door.place)}  {state}", soft_wrap=True, highlight=False)
        if not any(door.is_open for door in found):
            closed.append(name)
            if not found and names:
                console.print(f"{escape(name)}  nobody offers it", soft_wrap=True, highlight=False)
    if names and closed:
        raise typer.Exit(1)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help=NAME_HELP, autocompletion=backbone_names)],
    hub: Annotated[str | None, typer.Option(help=HUB_HELP)] = None,
    tolerance: Annotated[float, typer.Option(help="Tolerance relative to each output's largest magnitude.")] = 1e-4,
) -> None:
    """Compare every file with its digest, load the network and recompute its golden outputs.

    Example: `geo-pretrain verify pri3d_view_geo_r50`
    """
    from geo_pretrain.loading import verify as check

    with progress():
        result = check(name, hub=hub, tolerance=tolerance)
    table = Table("output", "difference", "", box=None)
    for output, error in result.errors.items():
        table.add_row(escape(output), f"{error:.1e}", "ok" if error <= result.tolerance else "[red]differs")
    console.print(table)
    console.print(f"{result.name}: {len(result.errors)} golden outputs reproduced within {tolerance:g}.")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="An authors' file (with --from), or a name or folder (with --to).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder (--from) or file (--to) to write.")],
    from_: Annotated[str | None, typer.Option("--from", help="Format of the authors' file, such as pri3d.")] = None,
    to: Annotated[str | None, typer.Option("--to", help=TO_HELP)] = None,
    name: Annotated[str | None, typer.Option(help="With --from: name of the new checkpoint.")] = None,
    like: Annotated[str | None, typer.Option(help="With --from: the catalog entry to imitate; default: NAME.")] = None,
    hub: Annotated[str | None, typer.Option(help=HUB_HELP)] = None,
    prefix: Annotated[str | None, typer.Option(help="With --from: what stands before the network's keys.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="With --from: keys to leave out, with * and ?.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or checkpoint.")] = False,
) -> None:
    """Turn an authors' file into a checkpoint folder, or a checkpoint into another library's format.

    Example: `geo-pretrain convert FILE.pth --from pri3d --name pri3d_view_geo_r50 --out pri3d_view_geo_r50`

    A wrapped one: `geo-pretrain convert last.ckpt --from torchvision --like pri3d_view_r18 --name mine --out mine
    --prefix model.backbone. --ignore "*.head.*"`; without --prefix the one that fits is looked for.

    Out: `geo-pretrain convert pri3d_view_geo_r50 --to detectron2 --out r50.pkl`
    """
    if (from_ is None) == (to is None):
        from geo_pretrain.convert import FORMATS
        from geo_pretrain.convert.out import OUT_FORMATS

        formats = f"In: {', '.join(FORMATS)}. Out: {', '.join(OUT_FORMATS)}."
        raise typer.BadParameter(f"give --from FORMAT or --to FORMAT, one of them. {formats}")
    if from_ is not None:
        from geo_pretrain.catalog import backbone_info, find
        from geo_pretrain.files import locked
        from geo_pretrain.hub.authors import convert_file

        if name is None or (like is None and find(name) is None):
            raise typer.BadParameter(f"--from needs --name of the catalog, or your own and --like; --name is {name!r}.")
        made = checked_target(out, folder_fault(out))
        busy = f"Another process is at work on {out}. Wait until it ends, or choose another --out."
        with locked(out.resolve(), busy=busy):
            found = convert_file(
                *(Path(source), out),
                like=backbone_info(like or name),
                format=from_,
                name=name,
                overwrite=overwrite,
                prefix=prefix,
                ignore=ignore or (),
                note=lambda text: console.print(escape(text), soft_wrap=True, highlight=False),
            )
        console.print(f"Checkpoint: {found.folder}", soft_wrap=True, highlight=False, markup=False)
        made()
        return
    from geo_pretrain.convert.out import format_of, write_export

    if prefix is not None or ignore:
        raise typer.BadParameter("--prefix and --ignore are about a file that is read: they go with --from.")
    made = checked_target(out, file_fault(out, format_of(str(to)).suffixes))
    opened = _open(source, hub)
    checkpoint = opened.fetch(*opened.network_roles(decoder=False))
    for path in write_export(str(to), checkpoint, out, overwrite=overwrite):
        console.print(f"Wrote {path}", soft_wrap=True, highlight=False, markup=False)
    made()


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="A finished checkpoint folder.")],
    to: Annotated[str, typer.Option("--to", help="hf-hub:OWNER/REPO, or a folder of checkpoint folders.")],
    tag: Annotated[str | None, typer.Option(help="Name of this version; default: see docs/publish.md.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list files, publish nothing.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Matrices as float16: half the size, read as float32.")] = False,
) -> None:
    """Publish a checkpoint, then load it from there and compare digests and golden outputs.

    Example: `geo-pretrain publish runs/kitchen --to hf-hub:me/pri3d_view_r18.kitchen --dry-run`
    """
    from geo_pretrain.publish import publish as send

    result = send(folder, to, tag=tag, private=private, dry_run=dry_run, half=half)
    console.print(escape(str(result)), soft_wrap=True, highlight=False)


@app.command()
def bundle(
    names: Annotated[list[str], typer.Argument(help=NAME_HELP, autocompletion=backbone_names)],
    out: Annotated[Path, file_option("The .tar file to write.", BUNDLES, *OUT)],
    hub: Annotated[str | None, typer.Option(help=HUB_HELP)] = None,
) -> None:
    """Pack checkpoints into one file for a machine without network; `pull --from-bundle` installs them there.

    Example: `geo-pretrain bundle pri3d_view_geo_r50 csc_100k_srunet34 -o zoo.tar`
    """
    from geo_pretrain.hub.bundle import write_bundle

    with progress() as report:
        opened = [_open(name, hub) for name in names]
        folders = [each.fetch(*each.network_roles(), "golden").folder for each in opened]
        written = write_bundle(folders, out, progress=report.stage("packing"))
    console.print(f"Wrote {written}", soft_wrap=True, highlight=False, markup=False)


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A catalog name or a checkpoint folder.", autocompletion=backbone_names)],
    out: Annotated[Path | None, file_option("The file to write; default: print it.", TEXTS, *OUT)] = None,
) -> None:
    """Render the card of a catalog entry or of a checkpoint folder.

    Example: `geo-pretrain card pri3d_view_geo_r50`
    """
    from geo_pretrain.cards import card_of
    from geo_pretrain.files import write_text
    from geo_pretrain.redact import printable

    text = card_of(name)
    if out is None:
        typer.echo(printable(text), nl=False)
    else:
        write_text(out, text)


@cache_app.command("ls")
def cache_list(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the checkpoints in the cache. `hf cache ls` lists files from Hugging Face.

    Example: `geo-pretrain cache ls`
    """
    from geo_pretrain.hub.cache import cached, default_cache

    found = cached()
    if as_json:
        typer.echo(json.dumps([asdict(item) for item in found], default=str))
        return
    table = Table("name", "from", "MB", "folder", box=None)
    for item in found:
        state = f"{item.folder}{' (broken: fetched again when needed)' if item.broken else ''}"
        table.add_row(escape(item.name), item.kind, f"{item.size / 1e6:.1f}", escape(state))
    wide = Console(width=max(console.width, LIST_WIDTH), soft_wrap=True)
    wide.print(table if found else escape(f"Nothing is cached in {default_cache()}."))


@cache_app.command("rm")
def cache_remove(
    names: Annotated[list[str] | None, typer.Argument(help="Names as `cache ls` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all checkpoints.")] = False,
) -> None:
    """Remove checkpoints from the cache; they are fetched again when next needed.

    Example: `geo-pretrain cache rm pri3d_view_geo_r50`
    """
    from geo_pretrain.hub.cache import remove

    if bool(names) == everything:
        raise typer.BadParameter("give NAMES or --all.")
    removed = remove(None if everything else names)
    console.print(f"Removed {len(removed)} checkpoints, {sum(item.size for item in removed) / 1e6:.1f} MB.")
