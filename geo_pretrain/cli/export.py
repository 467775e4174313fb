"""The command `export`: networks as files that run without this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from geo_pretrain.cli.completion import backbone_names
from geo_pretrain.cli.options import file_option
from geo_pretrain.cli.shared import app, console
from geo_pretrain.targets import ONNX

if TYPE_CHECKING:
    from geo_pretrain.adapters.onnx import OnnxReport

CLOUDS = (
    "ONNX has no sparse convolutions. For MinkowskiEngine or spconv: geo-pretrain convert {0} --to me05|spconv --out "
    "FILE; without them the package runs on any CPU: gp.{1}({0!r})."
)
LOADER = "load_backbone"
SOURCE_HELP = "The folder of a fine-tuning run; or a catalog name, a checkpoint folder, hf-hub:OWNER/REPO."


@app.command()
def export(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP, autocompletion=backbone_names)],
    onnx: Annotated[Path, file_option("The ONNX file to write.", ONNX, "--onnx")],
    backbone: Annotated[bool, typer.Option("--backbone", help="Of a run: its backbone, without classes.")] = False,
    decoder: Annotated[bool, typer.Option("--decoder", help="Of a U-Net: its dense features, not its maps.")] = False,
    hub: Annotated[str | None, typer.Option(help="Where to look for a name first.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write an image network as ONNX: any batch and size, normalization inside, compared with torch by onnxruntime.

    Example: `geo-pretrain export runs/mine --onnx mine.onnx`

    A backbone's maps: `geo-pretrain export pri3d_view_geo_r50 --onnx r50.onnx`

    Input: images [B, 3, H, W], RGB from 0 to 1. Output of a segmentation run: logits [B, C, H, W] and labels 1..C.
    """
    from geo_pretrain.errors import CheckpointError
    from geo_pretrain.training.finetune.load import is_finetuned

    if onnx.exists() and not overwrite:
        raise CheckpointError(f"{str(onnx)!r} exists. Choose another --onnx, or pass --overwrite.")
    whole = is_finetuned(source) and not (backbone or decoder)
    report = _finetuned(source, onnx) if whole else _backbone(source, onnx, decoder, hub)
    sizes = ", ".join(f"{b} of {h}x{w}" for b, h, w in report.sizes)
    sides = "any height and width" if report.multiple == 1 else f"height and width multiples of {report.multiple}"
    console.print(f"Wrote {report.path}   ({report.path.stat().st_size / 1e6:.1f} MB; {sides})", soft_wrap=True)
    names = ", ".join(report.outputs)
    console.print(
        f"Outputs: {names}. onnxruntime differs from torch by at most {report.worst:.1e} (relative; images: {sizes}).",
        soft_wrap=True,
        highlight=False,
    )


def _finetuned(source: str, path: Path) -> OnnxReport:
    """A fine-tuned network with its classes."""
    from geo_pretrain.adapters.onnx import export_onnx
    from geo_pretrain.contract import ImageContract
    from geo_pretrain.errors import CheckpointError
    from geo_pretrain.training.finetune.load import load_finetuned
    from geo_pretrain.training.finetune_recipe import POINT_KINDS

    network = load_finetuned(source)
    if network.recipe.task != "segmentation" or not isinstance(network.contract, ImageContract):
        in_3d = network.recipe.network.kind in POINT_KINDS
        hint = (
            CLOUDS.format(source, "load_finetuned")
            if in_3d
            else "Boxes are chosen in loops, which ONNX has not. --backbone gives the encoder."
        )
        raise CheckpointError(
            f"{source!r} is {network.recipe.task}; accepted: segmentation of images, or a backbone for images. {hint}"
        )
    return export_onnx(
        network,
        network.contract,
        path,
        names=("logits", "labels"),
        classes=network.classes,
        multiple=int(cast(Any, network.module).multiple),
        facts={"name": network.name, "license": network.license},
    )


def map_names(feature_info: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each map: "stride8", and with a number from 0 where several have that stride.

    >>> map_names([{"reduction": 8}, {"reduction": 16}, {"reduction": 16}])
    ['stride8', 'stride16_0', 'stride16_1']
    """
    strides = [info["reduction"] for info in feature_info]
    number = [strides[:k].count(stride) for k, stride in enumerate(strides)]
    return [f"stride{s}" + (f"_{n}" if strides.count(s) > 1 else "") for s, n in zip(strides, number, strict=True)]


def _backbone(source: str, path: Path, decoder: bool, hub: str | None) -> OnnxReport:
    """A backbone: its maps, or its dense features."""
    from geo_pretrain.adapters.onnx import export_onnx
    from geo_pretrain.catalog import find
    from geo_pretrain.contract import ImageContract
    from geo_pretrain.errors import CheckpointError
    from geo_pretrain.loading import load_backbone

    refused = CheckpointError(f"{source!r} is a network for clouds; accepted: images. {CLOUDS.format(source, LOADER)}")
    entry = find(source)  # of a name, the catalog says it before anything is fetched
    if entry is not None and not isinstance(entry.contract, ImageContract):
        raise refused
    try:
        network = load_backbone(source, decoder=decoder, hub=hub)
    except ValueError as error:
        if not decoder or "drop decoder=True" not in str(error):
            raise
        raise CheckpointError(f"{source!r} holds an encoder alone; drop --decoder for its maps.") from error
    if not isinstance(network.contract, ImageContract):
        raise refused
    names = ["features"] if decoder else map_names(network.feature_info)
    return export_onnx(network, network.contract, path, names=names, facts={"name": str(network.name)})
