"""The command line as a script sees it: commands, their options and arguments, and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer

from geo_pretrain import cli
from tests.front_door import geo_pretrain

NOWHERE = "NOWHERE"  # stands for a folder that does not exist
CALLS = """
--version
list
list --json
info pri3d_view_r50
card pri3d_view_r50
cache ls
no-such-command
list --no-such-option
recommend --for segmentation --input rgb --license permissive
recommend --for no-such-task
info
info no_such_backbone
pull no_such_backbone
verify NOWHERE
verify no_such_backbone
convert NOWHERE/x.pth
publish NOWHERE --to hf-hub:somebody/something
bundle no_such_backbone --out NOWHERE/x.tar
card no_such_backbone
cache rm no_such_backbone
train no_such_recipe --out NOWHERE/out
train pri3d_view_r18
train pri3d_view_r18 --out NOWHERE/out --set optim.no_such_key=1
train pri3d_view_r18 --out NOWHERE/out --data no_such_source
train pri3d_view_r18 --out NOWHERE/out --data scannet:NOWHERE
eval matching no_such_backbone --data rooms
eval probe no_such_backbone --data rooms
eval pixel-to-voxel no_such_backbone --data rooms
finetune no_such_recipe --backbone scratch --out NOWHERE/out
finetune rooms_unet_r18 --out NOWHERE/out
finetune rooms_unet_r18 --backbone no_such_backbone --out NOWHERE/out
finetune rooms_unet_r18 --backbone scratch --backbone imagenet --out NOWHERE/out
finetune rooms_unet_r18 --backbone scratch --out NOWHERE/out --set optim.no_such_key=1
finetune scannet_unet_r18 --backbone scratch --data scannet:NOWHERE --out NOWHERE/out
data preview no_such_source
recipes
recipes show pri3d_view_r18
recipes show no_such_recipe
recipes copy pri3d_view_r18 NOWHERE/x.txt
data preview scannet:NOWHERE
visualize features no_such_backbone
"""


def commands() -> dict[str, dict[str, list[str]]]:
    """Every command with the names of its options and of its arguments."""
    return {name: parameters(command) for name, command in walk(typer.main.get_command(cli.app), ())}


def walk(command: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """A command and those below it, by their words."""
    yield " ".join(names), command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*names, name))


def parameters(command: click.Command) -> dict[str, list[str]]:
    """Names of options as they are typed, and of arguments as they are shown."""
    options, arguments = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(str(parameter.name))
        else:
            options += [*parameter.opts, *parameter.secondary_opts]
    return {"options": sorted(options), "arguments": arguments}


def exit_codes(folder: Path, calls: list[str]) -> dict[str, int]:
    """How each call ends."""
    return {call: exit_code(call.replace(NOWHERE, str(folder / "nowhere"))) for call in calls}


def exit_code(call: str) -> int:
    """How one call ends; an error is one message."""
    ended = geo_pretrain(*call.split(), expected=None)
    assert "Traceback" not in ended.errors + ended.output, call
    assert ended.code != 1 or ended.errors.startswith("Error: "), ended
    return ended.code
