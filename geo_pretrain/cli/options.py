"""Options that several commands share, and their parsers: data, sizes, ranges."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml

from geo_pretrain.cli.shared import console, escape
from geo_pretrain.errors import first_line
from geo_pretrain.files import is_file
from geo_pretrain.targets import file_fault, folder_fault, missing_folder, named
from geo_pretrain.yaml_text import quoted

if TYPE_CHECKING:
    from geo_pretrain.training.data.frame import SkippedFrames
    from geo_pretrain.training.recipe import DataSpec

DATA_HELP = (
    "SOURCE or SOURCE:PATH, such as rooms, seven_scenes:PATH, scannet:PATH. Another source than the recipe's "
    "does not take over the recipe's data.options."
)
FRAMES_HELP = "Part of each scene's frames in order of time, such as 0:0.75."
SET_HELP = (
    "KEY=VALUE: a setting under the name that recipes have for it, such as data.options.depth_scale=5000 or "
    "optim.lr=0.05; may be repeated."
)
OPTION_HELP = "KEY=VALUE: an option of the data set, or of cloud files, such as scale=0.001; may be repeated."
TURN_HELP = "3D only: clouds as their camera sees them, or turned at random in full or upright (about the world's z)."
LABELLED_HELP = (
    "SOURCE or SOURCE:PATH of labelled images (folder:PATH, rooms, scannet:PATH) or clouds (clouds:PATH, rooms3d, "
    "s3dis:PATH). Another source than the recipe's does not take over the recipe's data.options."
)


OUT = ("--out", "-o")


class Turn(StrEnum):
    """The values of `--turn` as an enum for Typer; see `evaluation.matching.Turn`."""

    CAMERA, FULL, UPRIGHT = "camera", "full", "upright"


def data_overrides(data: str | None, frames: str | None = None) -> list[str]:
    """Convert `--data` and `--frames` to overrides of a recipe."""
    overrides = []
    if data is not None:
        source, _, path = data.partition(":")
        if not source:
            raise typer.BadParameter(f"--data is {data!r}; accepted: SOURCE or SOURCE:PATH.")
        overrides += [f"data.source={source}", f"data.path={quoted(path) if path else 'null'}"]
    if frames is not None:
        overrides.append(f"data.frames={range_of('--frames', frames)}")
    return overrides


def data_spec(data: str, frames: str | None, overrides: list[str], overlap: str = "0:1") -> DataSpec:
    """Build a data section for commands without a recipe, for which `--set` changes nothing else."""
    for text in overrides:
        if not text.strip().startswith(("data.", "data=")):
            raise typer.BadParameter(f"--set {text!r}: this command has data, no recipe; accepted: data.KEY=VALUE.")
    from geo_pretrain.training.config import Draft
    from geo_pretrain.training.recipe import RENAMED, Recipe

    tree: dict[str, Any] = {"name": "command_line", "task": {"name": "none"}, "optim": {"steps": 1}}
    options = [*data_overrides(data, frames), f"data.overlap={range_of('--overlap', overlap)}", *overrides]
    return Draft(tree, "command line", RENAMED).override(options).parse(Recipe).data


def warn_of_other_options(folder: str, spec: DataSpec) -> None:
    """Warn where a run trained on the same recordings and read them otherwise, as `data check` had suggested."""
    from geo_pretrain.errors import GeoPretrainError
    from geo_pretrain.training.recipe import load_recipe

    path = Path(folder).expanduser() / "recipe.yaml"
    if spec.path is None or not is_file(path):
        return
    with suppress(GeoPretrainError):  # of fine-tuning, or another version's: nothing to compare
        trained = load_recipe(str(path)).data
        same = trained.path is not None and Path(trained.path).resolve() == Path(spec.path).resolve()
        if same and trained.source == spec.source and trained.options != spec.options:
            options = yaml.safe_dump(dict(trained.options), default_flow_style=True, width=10_000).strip()
            warnings.warn(
                f"{folder} was trained on these recordings with other data.options. Frames that are read otherwise may "
                f"turn a result around; as it was trained: --set data.options='{options}'.",
                stacklevel=2,
            )


def range_of(option: str, text: str) -> str:
    """Convert `LOW:HIGH` to a YAML list."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        low = high = 0.0
    if not 0 <= low < high <= 1:
        raise typer.BadParameter(f"{option} is {text!r}; expected LOW:HIGH with 0 <= LOW < HIGH <= 1, such as 0:0.75.")
    return f"[{low}, {high}]"


def shard_of(text: str) -> tuple[int, int]:
    """Parse `--shard I/N`, a share of the scenes."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index = count = 0
    if not 1 <= index <= count:
        raise typer.BadParameter(f"--shard is {text!r}; accepted: I/N with I from 1 to N, such as 1/4.")
    return index, count


def size_of(text: str | None) -> tuple[int, int] | None:
    """Parse `--size` into height and width."""
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        height = width = 0
    if min(height, width) < 32:
        raise typer.BadParameter(f"--size is {text!r}; expected HEIGHTxWIDTH, each from 32 up, such as 240x320.")
    return height, width


def print_skips(skips: SkippedFrames) -> None:
    """Print the skipped frames and the reasons, if any."""
    if skips.reasons:
        console.print(f"[yellow]{escape(skips.summary())}", soft_wrap=True, highlight=False)


def options_of(given: list[str]) -> dict[str, Any] | None:
    """Convert `--option KEY=VALUE`s to options of a data set; None without any."""
    import yaml

    from geo_pretrain.yaml_text import parse_setting

    for text in given:
        if "=" not in text:
            raise typer.BadParameter(f"--option is {text!r}; accepted: KEY=VALUE.")
    options = {}
    for key, _, value in (text.partition("=") for text in given):
        try:
            options[key] = parse_setting(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(
                f"--option {key}={value[:80]!r} is no YAML value ({first_line(error)})."
            ) from error
    return options or None


def file_option(help: str, accepted: Sequence[str], *names: str) -> Any:
    """An option for a file to write: refuses other suffixes, and places where it cannot lie, before any work."""

    def check(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            context.call_on_close(checked_target(path, file_fault(path, accepted)))
        return path

    return typer.Option(*names, help=help, callback=check)


def folder_option(help: str, *names: str) -> Any:
    """An option for a folder to write: refuses files, and places where it cannot lie, before any work."""
    return typer.Option(*names, help=help, callback=checked_folder)


def checked_folder(context: typer.Context, path: Path | None) -> Path | None:
    """The callback of a folder to write."""
    if path is not None:
        context.call_on_close(checked_target(path, folder_fault(path)))
    return None if path is None else named(path)


def device_option(help: str) -> Any:
    """The option --device: refuses one that is not there, before any work."""
    return typer.Option(help=help, callback=_usable)


def _usable(device: str | None) -> str | None:
    if device not in (None, "cpu"):
        from geo_pretrain.devices import device_fault

        if (fault := device_fault(device)) is not None:
            raise typer.BadParameter(fault)
    return device


def checked_target(path: Path, fault: str | None) -> Callable[[], None]:
    """Raise for a fault of a result's path. Returns what says, at the end, that a folder was made above it."""
    if fault is not None:
        raise typer.BadParameter(fault)
    missing = missing_folder(path)

    def say() -> None:
        if missing is not None and path.exists() and os.environ.get("RANK", "0") == "0":
            typer.echo(f"Made the folder {str(missing)!r} for {path.name!r}.", err=True)

    return say
