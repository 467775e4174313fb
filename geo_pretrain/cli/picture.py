"""The commands `visualize matches`, `visualize features` and `visualize points`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geo_pretrain.cli.completion import backbone_names
from geo_pretrain.cli.options import (
    DATA_HELP,
    FRAMES_HELP,
    OUT,
    SET_HELP,
    TURN_HELP,
    Turn,
    data_spec,
    device_option,
    file_option,
    print_skips,
    size_of,
    warn_of_other_options,
)
from geo_pretrain.cli.shared import app, console, escape, progress
from geo_pretrain.targets import CLOUDS, GRIDS, MATCHES, RERUN

visualize_app = typer.Typer(help="Draw matches and features of backbones.", no_args_is_help=True)
app.add_typer(visualize_app, name="visualize")

BACKBONE_HELP = "A catalog name or a checkpoint folder, 2D or 3D."
SCENE_HELP = "A scene of the source; default: the first."
SIZE_HELP = "HEIGHTxWIDTH of the frames; default: that of pre-training."
MAP_HELP = "Draw feature map 0 to 4 (strides 2 to 32; sparse U-Net: 1 to 16) instead of the output."
ALONE_HELP = "Leave out the random-initialization baseline."
SEED_HELP = "Seed of random weights and random choices."
DEVICE_HELP = "cpu or cuda."
RERUN_HELP = "Also write points, frames and cameras as this .rrd file for the Rerun viewer (extra rerun)."


@visualize_app.command("matches")
def visualize_matches(
    backbone: Annotated[str, typer.Argument(help=BACKBONE_HELP, autocompletion=backbone_names)],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    out: Annotated[Path, file_option("The .png or .html to write.", MATCHES, *OUT)] = Path("matches.png"),
    against: Annotated[str, typer.Option(help="Backbone to compare with, or scratch (random weights).")] = "scratch",
    alone: Annotated[bool, typer.Option("--alone", help="Leave out the comparison.")] = False,
    scene: Annotated[str | None, typer.Option(help="A scene of the source; default: one for each pair.")] = None,
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to show.")] = 3,
    overlap: Annotated[str, typer.Option(help="Range of overlap of the pairs.")] = "0.3:1",
    threshold: Annotated[
        float | None, typer.Option(help="Largest error of a correct match; default: 4 px, 2 voxels.")
    ] = None,
    turn: Annotated[Turn, typer.Option(help=TURN_HELP)] = Turn.CAMERA,
    size: Annotated[str | None, typer.Option(help=SIZE_HELP)] = None,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str, device_option(DEVICE_HELP)] = "cpu",
) -> None:
    """Draw matches between two views: lines to the nearest feature, green where it is right, red where it is not.

    As .html an interactive page: point at a pixel and see its heat map in the other view. 2D backbones match the
    pixels of two images, 3D ones the voxels of two frames' clouds, drawn from behind.

    Example: `geo-pretrain visualize matches runs/kitchen --data seven_scenes:PATH -o matches.png`
    """
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.visualize import matches

    skips, drawn = SkippedFrames(), list[str]()
    spec = data_spec(data, frames, set_, overlap)
    warn_of_other_options(backbone, spec)
    with progress() as report:
        columns = matches.visualize_matches(
            backbone,
            spec,
            out,
            against=None if alone else against,
            scene=scene,
            count=pairs,
            size=size_of(size),
            threshold=threshold,
            turn=turn.value,
            seed=seed,
            device=device,
            skips=skips,
            progress=report.stage("matching"),
            on_pair=drawn.append,
        )
    for line in drawn:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for title, shares in columns:
        console.print(f"{escape(title)}: {sum(shares) / len(shares):.0%} right", highlight=False, soft_wrap=True)
    console.print(f"Wrote {out}", highlight=False, soft_wrap=True, markup=False)
    print_skips(skips)


@visualize_app.command("features")
def visualize_features(
    backbones: Annotated[
        list[str], typer.Argument(help=BACKBONE_HELP + " One column per backbone.", autocompletion=backbone_names)
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    out: Annotated[Path, file_option("The PNG to write.", GRIDS, *OUT)] = Path("features.png"),
    scene: Annotated[str | None, typer.Option(help=SCENE_HELP)] = None,
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    count: Annotated[int, typer.Option(min=1, help="Frames to show.")] = 4,
    map_: Annotated[int | None, typer.Option("--map", min=0, max=4, help=MAP_HELP)] = None,
    size: Annotated[str | None, typer.Option(help=SIZE_HELP)] = None,
    alone: Annotated[bool, typer.Option("--alone", help=ALONE_HELP)] = False,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str, device_option(DEVICE_HELP)] = "cpu",
) -> None:
    """Draw features of frames as colors: three principal components, the same in all views of a scene.

    3D backbones describe each frame's cloud. A checkpoint of pri3d_geo or pri3d_view_geo has two columns, pixels and
    voxels, in one color space.

    Example: `geo-pretrain visualize features runs/kitchen --data seven_scenes:PATH -o features.png`
    """
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.visualize.frames import draw_features

    skips = SkippedFrames()
    with progress() as report:
        draw_features(
            backbones,
            data_spec(data, frames, set_),
            out,
            scene=scene,
            count=count,
            size=size_of(size),
            level=map_,
            baseline=not alone,
            seed=seed,
            device=device,
            skips=skips,
            progress=report.stage("describing"),
        )
    console.print(f"Wrote {out}", highlight=False, soft_wrap=True, markup=False)
    print_skips(skips)


@visualize_app.command("points")
def visualize_points(
    backbone: Annotated[str, typer.Argument(help=BACKBONE_HELP, autocompletion=backbone_names)],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    out: Annotated[Path, file_option("The .ply, .html or .png to write.", CLOUDS, *OUT)] = Path("points.html"),
    scene: Annotated[str | None, typer.Option(help=SCENE_HELP)] = None,
    frame: Annotated[str | None, typer.Option(help="Draw this frame's cloud instead of the scene's surface.")] = None,
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    points: Annotated[int, typer.Option(min=1, help="Maximum number of points to draw, chosen at random.")] = 200_000,
    map_: Annotated[int | None, typer.Option("--map", min=0, max=4, help=MAP_HELP)] = None,
    size: Annotated[str | None, typer.Option(help=SIZE_HELP)] = None,
    alone: Annotated[bool, typer.Option("--alone", help=ALONE_HELP)] = False,
    seed: Annotated[int, typer.Option(help=SEED_HELP)] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    device: Annotated[str, device_option(DEVICE_HELP)] = "cpu",
    rerun: Annotated[Path | None, file_option(RERUN_HELP, RERUN)] = None,
) -> None:
    """Draw features on the points of a scene: a PLY file, an interactive HTML page, or four views as PNG.

    Of a 2D backbone each point has the mean of the pixels that see it. Clouds of your own are a file or a folder.

    Example: `geo-pretrain visualize points runs/clouds --data scannet:PATH --scene scene0011_00 -o points.html`

    Clouds of your own: `geo-pretrain visualize points runs/clouds --data clouds:scan.ply -o features.ply`
    """
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.visualize import points as drawing
    from geo_pretrain.training.visualize.rerun_file import check_rerun

    if rerun is not None:
        check_rerun(rerun)
    skips = SkippedFrames()
    with progress() as report:
        cloud = drawing.visualize_points(
            backbone,
            data_spec(data, frames, set_),
            out,
            scene=scene,
            frame=frame,
            limit=points,
            size=size_of(size),
            level=map_,
            baseline=not alone,
            seed=seed,
            device=device,
            skips=skips,
            progress=report.stage("describing"),
        )
    console.print(f"Wrote {escape(str(out))}: {escape(cloud.note)}", highlight=False, soft_wrap=True)
    if rerun is not None:
        drawing.write_recording(cloud, rerun)
        console.print(f"Wrote {escape(str(rerun))}", highlight=False, soft_wrap=True)
    print_skips(skips)
