"""What README and docs say can be typed: commands, options, names, Python and links exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import click
import pytest
import typer

from geo_pretrain import cli
from geo_pretrain.catalog import find
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.recipe import recipe_path
from tests.pages import PAGES, ROOT, blocks, commands

PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(\.\w+)?|\.\.\.|SUGGESTED")
OWN = re.compile(r"(runs|out|my|demo|/)[\w/.-]*|.*\.(yaml|yml|json|pkl|tar|pth)")


def parse(words: list[str]) -> tuple[str, dict, list[str]]:
    """Parse a command as the command line does, without running it: its name, options, and what is left over."""
    command = typer.main.get_command(cli.app)
    context, name = click.Context(command, info_name="geo-pretrain"), []
    words = list(words)
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            raise click.UsageError(f"no command {' '.join([*name, words[0]])}")
        name.append(words.pop(0))
        context, command = click.Context(inner, parent=context, info_name=name[-1], **inner.context_settings), inner
    if hasattr(command, "list_commands"):
        return " ".join(name), {}, []
    options, rest, _ = command.make_parser(context).parse_args(words)
    return " ".join(name), options, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_ones_that_the_command_line_takes(page: Path):
    wrong = []
    for where, words in commands(page):
        try:
            name, options, rest = parse(words)
            if name == "launch":  # carries another command
                name, options, rest = parse([*(options.get("command") or ()), *rest])
        except Exception as error:  # of click, which typer brings with it
            wrong.append(f"{where}: {' '.join(words)}: {getattr(error, 'message', error)}")
            continue
        if rest := [word for word in rest if not PLACEHOLDER.fullmatch(word)]:
            wrong.append(f"{where}: {' '.join(words)}: {rest} is too much")
        recipe = options.get("recipe")
        if name in ("train", "finetune") and recipe and not PLACEHOLDER.fullmatch(recipe) and not OWN.fullmatch(recipe):
            try:
                recipe_path(recipe, name)
            except RecipeError as error:
                wrong.append(f"{where}: {error}")
        for backbone in options.get("backbone") or () if isinstance(options.get("backbone"), list | tuple) else ():
            known = find(backbone) or backbone in ("scratch", "imagenet") or ":" in backbone or "/" in backbone
            if not known and not PLACEHOLDER.fullmatch(backbone) and not OWN.fullmatch(backbone):
                wrong.append(f"{where}: no backbone {backbone}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_the_pages_parses_and_imports_what_there_is(page: Path):
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.code, str(block))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("geo_pretrain"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("geo_pretrain"):
                        importlib.import_module(alias.name)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head)).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.relative_to(ROOT)}: no {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.relative_to(ROOT)}: no heading {target}"


def test_the_readme_is_one_screen():
    text = re.sub(r"^\|.*$", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) <= 700
