"""Completion in the shell: commands, options, names of recipes and checkpoints, as bash asks for them."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from geo_pretrain import cli


def completed(line: str) -> list[str]:
    words = line.split(" ")
    asked = {"_GEO_PRETRAIN_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return CliRunner().invoke(cli.app, [], prog_name="geo-pretrain", env=asked).stdout.split()


@pytest.mark.parametrize(
    "line, found",
    [
        ("geo-pretrain fine", "finetune"),
        ("geo-pretrain train --to", "--toy"),
        ("geo-pretrain train gsc_r1", "gsc_r18.rooms"),
        ("geo-pretrain finetune folder_u", "folder_unet"),
        ("geo-pretrain finetune folder_unet -b csc_100k", "csc_100k_srunet34"),
        ("geo-pretrain recipes show folder_u", "folder_unet"),
        ("geo-pretrain visualize features ppkt_srunet3", "ppkt_srunet34"),
    ],
)
def test_words_are_completed(line, found):
    words = completed(line)
    assert found in words
    assert all(word.startswith(line.split(" ")[-1]) for word in words)


def test_paths_are_left_to_the_shell():
    assert completed("geo-pretrain info runs/") == []
