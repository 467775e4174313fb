"""The command `data preview`, which draws frames of a data source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from geo_pretrain.cli.options import DATA_HELP, SET_HELP, data_spec
from geo_pretrain.cli.shared import app, console, progress

data_app = typer.Typer(help="Preview data sources.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("preview")
def data_preview(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("preview.png"),
    scenes: Annotated[int, typer.Option(help="Scenes to show.")] = 4,
    frames: Annotated[int, typer.Option(help="Frames of each.")] = 3,
    sets: Annotated[bool, typer.Option("--sets", help="Draw geometric sets, on the frames and the surface.")] = False,
    kind: Annotated[str, typer.Option(help="Of sets: segments of the surface, semantic or instance.")] = "segments",
    k_thresh: Annotated[float, typer.Option(help="Of segments: how much a surface may turn inside of one.")] = 0.01,
    min_vertices: Annotated[int, typer.Option(help="Of segments: smaller ones are joined to a neighbor.")] = 20,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
) -> None:
    """Draw frames of a data source: color, depth and labels; or the geometric sets of its scenes.

    Example: `geo-pretrain data preview rooms -o rooms.png`

    Sets: `geo-pretrain data preview scannet:PATH --sets --scenes 1 -o sets.png`
    """
    from geo_pretrain.training.data.sources.registry import open_source
    from geo_pretrain.training.visualize.preview import contact_sheet, sets_sheet

    small = data == "rooms" and not any(s.startswith("data.options") for s in set_)  # instead of the full set
    options = [f"data.options={{scenes: {scenes}, frames: 12}}"] if small else []
    spec = data_spec(data, None, [*options, *set_])
    with progress() as report:
        source = open_source(spec, progress=lambda d, t: report("rendering rooms", d, t, ""))
    if sets:
        chosen: dict[str, Any] = {"kind": kind, "k_thresh": k_thresh, "min_vertices": min_vertices}
        sets_sheet(source, out, scenes=scenes, frames=frames, **chosen)
    else:
        contact_sheet(source, out, scenes=scenes, frames=frames)
    console.print(f"Wrote {out}", soft_wrap=True)
