"""Scripts that call the command line go on working: commands, options and exit codes stay."""

from __future__ import annotations

import json
from unittest import mock

import pytest

from tests.front_door import geo_pretrain
from tests.pins.commands import commands, exit_codes
from tests.pins.training_runs import DATA

STORED = json.loads((DATA / "cli.json").read_text())


@pytest.mark.parametrize("name", STORED["commands"])
def test_command_keeps_its_options_and_arguments(name):
    stored, found = STORED["commands"][name], commands()[name]
    assert set(stored["options"]) <= set(found["options"])
    assert found["arguments"] == stored["arguments"]


def test_every_command_is_stored():
    assert commands().keys() == STORED["commands"].keys()  # a new one: python -m tests.pins.store


@pytest.mark.parametrize("name", STORED["commands"])
def test_help_is_shown_and_names_the_options(name):
    ended = geo_pretrain(*name.split(), "--help")
    for option in STORED["commands"][name]["options"]:
        assert option in ended.output


@pytest.mark.parametrize("name", STORED["commands"])
def test_unknown_option_is_a_mistake_of_use(name):
    geo_pretrain(*name.split(), "--no-such-option", expected=2)


def test_calls_end_as_they_ended(tmp_path):
    found = exit_codes(tmp_path, list(STORED["exit codes"]))
    assert found == STORED["exit codes"]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_interrupted_command_says_so_by_its_exit_code():
    with mock.patch("json.dumps", side_effect=KeyboardInterrupt):
        geo_pretrain("list", "--json", expected=130)
