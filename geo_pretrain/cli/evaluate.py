"""Commands that measure a backbone: eval matching, pixel-to-voxel, probe; and eval folds, which adds up runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geo_pretrain.cli.completion import backbone_names
from geo_pretrain.cli.options import (
    DATA_HELP,
    FRAMES_HELP,
    LABELLED_HELP,
    OPTION_HELP,
    SET_HELP,
    TURN_HELP,
    Turn,
    data_spec,
    options_of,
    print_skips,
    size_of,
    warn_of_other_options,
)
from geo_pretrain.cli.shared import app, console, escape, print_table, progress
from geo_pretrain.errors import unknown

if TYPE_CHECKING:
    from geo_pretrain.progress import Display
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.evaluation.matching import MatchingResult
    from geo_pretrain.training.evaluation.metrics import Interval
    from geo_pretrain.training.evaluation.probes import ProbeResult

FEATURES_HELP = "Whole clouds: contract (what the backbone knows), ones, rgb; of laser scans gray, mean, intensity."
eval_app = typer.Typer(help="Measure a backbone.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")


@eval_app.command("matching")
def eval_matching(
    backbone: Annotated[
        str, typer.Argument(help="A catalog name or a checkpoint folder.", autocompletion=backbone_names)
    ],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; default: that of pre-training.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to measure, spread over the scenes.")] = 100,
    overlap: Annotated[str, typer.Option(help="Range of overlap of the pairs.")] = "0.3:1",
    threshold: Annotated[
        float | None, typer.Option(min=0, help="Within which a match is right; default: 4 px, 2 voxels.")
    ] = None,
    turn: Annotated[Turn, typer.Option(help=TURN_HELP)] = Turn.CAMERA,
    seed: Annotated[int, typer.Option(min=0, help="Of queries, turns and random weights.")] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how often a feature's nearest neighbor in another view is within 4 px (3D: 2 voxels) of its match.

    2D backbones match the pixels of two images (an encoder without decoder by its maps side by side), 3D ones the
    voxels of two frames' clouds. A network with random weights is measured beside it; ± is the standard deviation over
    pairs.

    Example: `geo-pretrain eval matching runs/kitchen --data seven_scenes:PATH --frames 0.75:1`

    In 3D: `geo-pretrain eval matching runs/pointcontrast --data scannet:PATH --turn full`
    """
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.evaluation.matching import compare_matching

    spec = data_spec(data, frames, set_, overlap)
    warn_of_other_options(backbone, spec)
    skips = SkippedFrames()
    with progress() as report:
        results = compare_matching(
            backbone,
            spec,
            size=size_of(size),
            count=pairs,
            threshold=threshold,
            turn=turn.value,
            seed=seed,
            skips=skips,
            progress=report.stage("matching"),
        )
    _show_recall(results, skips, as_json)


@eval_app.command("pixel-to-voxel")
def eval_pixel_to_voxel(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder of pri3d_geo, pri3d_view_geo, ppkt or img2pc.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "rooms",
    frames: Annotated[str | None, typer.Option(help=FRAMES_HELP)] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Frames, each with its chunk, spread over the scenes.")] = 100,
    threshold: Annotated[float, typer.Option(min=0, help="Largest error of a correct match, in voxels.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of queries and random weights.")] = 0,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how often the voxel nearest to a pixel's feature lies within 2 voxels of the pixel's surface point.

    Candidates are all voxels of the chunk of surface around the frame, seen or not (Pri3D); of the frame's own cloud
    (networks that a frozen one has taught). The same networks with random weights are measured beside it (the frozen
    one keeps its own); ± is the standard deviation over frames.

    Example: `geo-pretrain eval pixel-to-voxel runs/geo --data scannet:PATH --frames 0.75:1`
    """
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.evaluation.matching import compare_pixel_to_voxel

    spec = data_spec(data, frames, set_)
    warn_of_other_options(folder, spec)
    skips = SkippedFrames()
    with progress() as report:
        results = compare_pixel_to_voxel(
            folder,
            spec,
            count=pairs,
            threshold=threshold,
            seed=seed,
            skips=skips,
            progress=report.stage("matching"),
        )
    _show_recall(results, skips, as_json)


@eval_app.command("probe")
def eval_probe(
    backbone: Annotated[
        str, typer.Argument(help="A catalog name or a checkpoint folder.", autocompletion=backbone_names)
    ],
    data: Annotated[str, typer.Option(help=LABELLED_HELP)] = "rooms",
    probes: Annotated[str, typer.Option(help="linear, knn or both, separated by a comma.")] = "linear,knn",
    fraction: Annotated[float, typer.Option(min=1e-9, max=1, help="Share of the training images, whole scenes.")] = 1.0,
    pixels: Annotated[int, typer.Option(min=1, help="Labelled pixels (3D: voxels) of the training images.")] = 20_000,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH; default: pre-training's; 3D: the images' own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of pixels and random weights.")] = 0,
    features: Annotated[str, typer.Option(help=FEATURES_HELP)] = "contract",
    option: Annotated[list[str], typer.Option("--option", help=OPTION_HELP)] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare frozen features with random initialization by a linear probe and k-NN prediction.

    The same architecture with random weights is measured beside it, in 3D also the same probe on coordinates and color
    alone. 2D backbones are judged by the pixels of labelled images, 3D ones by the points of labelled clouds, or by the
    voxels of the labelled frames of rooms.

    Example: `geo-pretrain eval probe pri3d_view_geo_r50 --data scannet:PATH --fraction 0.1`

    In 3D: `geo-pretrain eval probe csc_100k_srunet34 --data s3dis:PATH`

    On frames: `geo-pretrain eval probe runs/pointcontrast`
    """
    from geo_pretrain import hub
    from geo_pretrain.training.config import parse
    from geo_pretrain.training.data.labelled.clouds.sets import CLOUD_SETS
    from geo_pretrain.training.data.labelled.registry import subset
    from geo_pretrain.training.evaluation.probes import PROBES, ProbeSpec, compare_probes

    settings: dict[str, Any] = {"pixels": pixels, "seed": seed, "features": features}
    settings |= {} if size is None else {"size": list(size_of(size) or ())}
    spec, names = parse(ProbeSpec, settings, where="probe"), [part.strip() for part in probes.split(",")]
    for name in names:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    in_3d = hub.open(backbone).arch.modality == "3d"  # fails before rooms are rendered
    unit = "pixel" if not in_3d else "point" if data.partition(":")[0] in CLOUD_SETS else "voxel"
    skipped: dict[str, str] = {}
    with progress(not as_json) as report:
        train, val = _labelled_splits(data, options_of(option) or {}, report)
        results = compare_probes(
            backbone,
            subset(train, fraction, seed) if fraction < 1 else train,
            val,
            spec,
            probes=names,
            progress=report.stage("probing"),
            skipped=skipped,
        )
    _show_probes(results, unit, skipped, as_json)


def _labelled_splits(data: str, options: dict[str, Any], report: Display) -> list[Any]:
    """The splits train and val of a data set with labels of pixels or, of whole clouds, of points."""
    from geo_pretrain.training.data.labelled.clouds.sets import CLOUD_SETS
    from geo_pretrain.training.data.labelled.registry import open_labelled

    source, _, path = data.partition(":")
    return [
        open_labelled(
            source,
            Path(path) if path else None,
            split,
            task="segmentation3d" if source in CLOUD_SETS else "segmentation",
            options=options,
            progress=report.stage("rendering rooms"),
        )
        for split in ("train", "val")
    ]


def _show_probes(
    results: Mapping[str, Mapping[str, ProbeResult]], unit: str, skipped: Mapping[str, str], as_json: bool
) -> None:
    if as_json:
        typer.echo(json.dumps({w: {p: r.to_dict() for p, r in found.items()} for w, found in results.items()}))
        for path, reason in skipped.items():  # the JSON stays what it is
            typer.echo(f"skipped: {path}: {reason}", err=True)
        return
    rows = [
        (weights, probe, f"{result.miou:.1%}", f"{result.accuracy:.1%}")
        for weights, found in results.items()
        for probe, result in found.items()
    ]
    print_table(("weights", "probe", "mIoU", f"{unit} accuracy"), rows)
    for line in _probe_verdicts(results):
        console.print(escape(line), highlight=False, soft_wrap=True)
    for broken, reason in skipped.items():
        console.print(f"[yellow]Skipped {escape(broken)}: {escape(reason)}", highlight=False, soft_wrap=True)


def _probe_verdicts(results: Mapping[str, Mapping[str, ProbeResult]]) -> list[str]:
    """What the backbone, the last of the rows, has above each control."""
    from geo_pretrain.training.evaluation.features import RANDOM
    from geo_pretrain.training.evaluation.verdict import over_seeds, sentence

    *controls, name = results
    hint = "Other --seed values tell how far chance moves it."
    return [
        f"{probe}: " + sentence(name, "random weights" if c == RANDOM else c, over_seeds([r.miou], [other.miou]), hint)
        for probe, r in results[name].items()
        for c in controls
        if (other := results[c].get(probe)) is not None
    ]


@eval_app.command("folds")
def eval_folds(
    runs: Annotated[list[Path], typer.Argument(help="Folders of fine-tuned networks, one a fold.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add up the runs of a cross-validation, such as S3DIS' six areas, and measure all of them as one.

    Counts are added, not scores: the row "pooled" is what papers report as 6-fold. Below it is the mean of the folds.

    Example: `geo-pretrain eval folds runs/area1 runs/area2 runs/area3 runs/area4 runs/area5 runs/area6`
    """
    from geo_pretrain.training.finetune.folds import pool_folds

    folds = pool_folds(runs)
    if as_json:
        typer.echo(json.dumps(folds.to_dict()))
        return
    names = list(folds.pooled)
    mean = {name: sum(scores[name] for scores in folds.each) / len(folds.each) for name in names}
    rows = [(str(result.folder), scores) for result, scores in zip(folds.results, folds.each, strict=True)]
    rows += [("pooled", folds.pooled), ("mean of the folds", mean)]
    shown = [(name, *(f"{scores[key]:.1%}" for key in names)) for name, scores in rows]
    print_table((f"fold ({folds.level})", "mIoU", "mAcc", "accuracy"), shown)
    console.print(
        f"Cite the pooled {folds.pooled[names[0]]:.1%}; the folds lie "
        f"{100 * (max(s[names[0]] for s in folds.each) - min(s[names[0]] for s in folds.each)):.1f} points apart.",
        highlight=False,
        soft_wrap=True,
    )


def _show_recall(results: Mapping[str, MatchingResult], skips: SkippedFrames, as_json: bool) -> None:
    from geo_pretrain.training.evaluation.features import RANDOM
    from geo_pretrain.training.evaluation.verdict import sentence

    random = results.get(RANDOM)
    gains = {name: r.above(random) for name, r in results.items() if random is not None and r is not random}
    if as_json:
        trees = {name: asdict(r) | {"spread": r.spread} | _gain(gains.get(name)) for name, r in results.items()}
        typer.echo(json.dumps(trees))
        typer.echo(skips.summary(), err=True, nl=bool(skips.reasons))
        return
    measure = next(iter(results.values())).measure
    rows = [
        (name, f"{r.recall:.1%} ± {r.spread:.1%}", f"{r.chance:.1%}", str(len(r.per_pair)), str(r.queries))
        for name, r in results.items()
    ]
    print_table(("weights", measure, "chance", "pairs", "queries"), rows)
    hint = "More --pairs tell."
    for name, gain in gains.items():
        console.print(escape(sentence(name, "random weights", gain, hint)), highlight=False, soft_wrap=True)
    if any(gain.over.startswith("stretches") for gain in gains.values()):
        text = "Interval: for other pairs of the same scenes. Five scenes or more tell how it is in others."
        console.print(text, highlight=False, soft_wrap=True)
    if gains:
        text = "Next: `geo-pretrain eval probe` and `geo-pretrain finetune` show whether labels gain from it, too."
        console.print(text, highlight=False, soft_wrap=True)
    print_skips(skips)


def _gain(gain: Interval | None) -> dict[str, Any]:
    return {} if gain is None else {"above_random": asdict(gain)}
