"""What README and docs say can be typed: commands, options, names, Python and links exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml

from geo_pretrain import cli
from geo_pretrain.catalog import find
from geo_pretrain.errors import RecipeError
from geo_pretrain.training.recipe import recipe_path
from tests import pages, sentences
from tests.pages import LANGUAGES, NEEDS, PAGES, ROOT, blocks, commands, lines_of
from tests.stand_ins import small

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


def unchecked(line: str, needs: tuple[str, ...]) -> str:
    """Why a line of a `bash` block is checked by nothing, or an empty text."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words or words[0] == "geo-pretrain" or (words[0] == "torchrun" and "geo_pretrain" in words):
        return ""  # test_commands_are_ones_that_the_command_line_takes
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = {name for word in words for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")}
        return f"no extra {named - set(extras)}" if named - set(extras) else ""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return "" if set(words[1:]) <= set(targets) else f"no target {words[1:]}"
    if words[:2] == ["python", "-m"]:
        return "" if (ROOT / f"{words[2].replace('.', '/')}.py").exists() else f"no module {words[2]}"
    return "" if words[0] in needs else "nothing checks it"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_run_or_checked(page: Path):
    wrong = []
    for block in blocks(page):
        if block.language not in LANGUAGES:
            wrong.append(f"{block}: language {block.language!r} is none of {LANGUAGES}")
        elif block.language == "json":
            json.loads(block.code)
        elif block.language == "toml":
            tomllib.loads(block.code)
        elif block.language == "text":
            if "geo-pretrain" in block.code or "import " in block.code:
                wrong.append(f"{block}: a command inside a layout")
        elif not block.mark:
            wrong.append(f"{block}: neither run nor marked with what it needs")
        elif unknown := set(block.needs) - set(NEEDS):
            wrong.append(f"{block}: needs {unknown}, known: {NEEDS}")
        elif block.language == "bash":
            reasons = [(line, unchecked(line, block.needs)) for line in lines_of(block.code)]
            wrong += [f"{block}: {line}: {reason}" for line, reason in reasons if reason]
            if block.mark == "run small":  # what `make snippets` runs is a command, too
                for line in lines_of(block.code):
                    _, _, rest = parse(small(shlex.split(line, comments=True)[1:]))
                    wrong += [f"{block}: {line}: {word} has no stand-in" for word in rest if word.isupper()]
    assert not wrong, "\n".join(wrong)


def test_a_block_that_nobody_runs_is_refused(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```bash\ngeo-pretrain list\n```\n", encoding="utf-8")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="neither run nor marked"):
        test_every_block_is_run_or_checked(page)
    page.write_text("<!-- needs data -->\n```bash\nrm -r geo-pretrain\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="nothing checks it"):
        test_every_block_is_run_or_checked(page)


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


TASKS = (
    "Put the weights into DeepLabV3",
    "Pre-train on my recording",
    "Match two views",
    "Segment my clouds",
    "On a cluster",
)


def test_tasks_come_first_in_the_sites_navigation_and_are_linked_from_the_start_page():
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)["nav"]
    sections = {name: pages for row in nav for name, pages in row.items()}
    assert next(name for name, pages in sections.items() if isinstance(pages, list)) == "Tasks"
    tasks = {name: page for row in sections["Tasks"] for name, page in row.items()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for wanted in TASKS:
        (page,) = [page for name, page in tasks.items() if name.startswith(wanted)]
        assert f"({page})" in readme, wanted
        title, body = (ROOT / page).read_text(encoding="utf-8").split("\n", 1)
        assert title.startswith("# ")
        assert "```" in body[:600], f"{page} does not open with a command"


def test_badges_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r"Python :: 3\.\d", line)]
    badges = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "badges").glob("*.svg")}
    assert f">{' | '.join(versions)}<" in badges["python"]
    assert f">{project['license']}<" in badges["license"]
    assert "Typing :: Typed" in project["classifiers"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/badges/{name}.svg" in readme for name in badges)


def test_sentences_are_short():
    assert sentences.lengths("# A title\n\nOne two. Three `a b c`, four!\n\n- five\n- six\n\n| not | this |\n") == [
        2,
        3,
        1,
        1,
    ]
    found = [count for page in PAGES for count in sentences.of_page(page)]
    mean, share = sentences.mean_and_long(found)
    assert len(found) > 1500
    assert (mean <= 15, share <= 0.05) == (True, True), (
        f"mean {mean:.1f} words, {share:.1%} long: python -m tests.sentences"
    )
