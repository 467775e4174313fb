"""YAML and JSON of users' files: whatever a text states, it is read or refused in little time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import geo_pretrain
from geo_pretrain.cli.options import options_of
from geo_pretrain.errors import CheckpointError, GeoPretrainError, RecipeError
from geo_pretrain.files import parse_json, read_sealed
from geo_pretrain.training.config import Draft, changes
from geo_pretrain.training.finetune_recipe import FinetuneRecipe, load_finetune_recipe
from geo_pretrain.training.recipe import load_recipe
from geo_pretrain.yaml_text import LONGEST, parse_setting, parse_yaml, quoted


def laughs(kind: str, levels: int = 40) -> str:
    """Aliases of aliases: 2^levels values in some hundred characters."""
    lines = ["a0: &a0 [1]" if kind == "list" else "a0: &a0 {x: 1}"]
    form = {"mapping": "{{p: *a{0}, q: *a{0}}}", "list": "[*a{0}, *a{0}]", "merge": "{{<<: [*a{0}, *a{0}]}}"}[kind]
    lines += [f"a{level}: &a{level} {form.format(level - 1)}" for level in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "aliases of mappings": (laughs("mapping"), "aliases"),
    "aliases of lists": (laughs("list"), "aliases"),
    "merged aliases": (laughs("merge"), "aliases"),
    "a long text, often": (f"a: &a {'x' * 99_000}\nb: [{'*a, ' * 99}]", "aliases"),
    "deep lists": ("x: " + "[" * 2_000, "nested too deeply"),
    "deep mappings": ("{a: " * 30_000 + "1" + "}" * 30_000, "nested too deeply"),
    "itself": ("x: &x [*x]", "contains itself"),
    "itself in a mapping": ("&x {y: *x}", "contains itself"),
    "long": ("#" * (LONGEST + 1), "longer"),
    "long number": ("x: " + "9" * 5_000, "cannot be read"),
    "no date": ("x: 2020-13-45", "cannot be read"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_yaml_bomb_is_refused_before_it_is_built(what):
    text, reason = BOMBS[what]
    with pytest.raises(yaml.YAMLError, match=reason):
        parse_yaml(text)


def test_aliases_are_copies_and_merges_work():
    tree = parse_yaml("base: &b {x: 1, y: [2]}\none: *b\ntwo: {<<: *b, x: 3}\n")
    tree["one"]["x"] = 9
    assert tree == {"base": {"x": 1, "y": [2]}, "one": {"x": 9, "y": [2]}, "two": {"x": 3, "y": [2]}}
    assert parse_yaml(b"") is None
    assert parse_yaml(b"a: [1, x]") == {"a": [1, "x"]}
    with pytest.raises(yaml.YAMLError, match="given twice"):
        parse_yaml("a: 1\na: 2")


READERS: dict[str, Callable[[Path], object]] = {
    "recipe": lambda path: load_recipe(str(path)),
    "fine-tuning recipe": lambda path: load_finetune_recipe(str(path)),
    "stored recipe": lambda path: changes(path.read_text(), "a: 1", FinetuneRecipe),
    "draft": lambda path: Draft.read(path),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ["aliases of mappings", "deep mappings", "itself", "long"])
def test_every_reader_of_recipes_refuses_bombs_as_a_recipe_error(tmp_path, reader, what):
    path = tmp_path / "r.yaml"
    path.write_text(BOMBS[what][0])
    with pytest.raises(RecipeError, match=BOMBS[what][1]):
        READERS[reader](path)


def test_overrides_and_options_refuse_bombs():
    text = "{a: " * 9_000 + "1" + "}" * 9_000
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe("pri3d_view_r18", overrides=[f"optim.lr={text}"])
    with pytest.raises(Exception, match="no YAML value") as error:
        options_of([f"split={text}"])
    assert type(error.value).__name__ == "BadParameter"


def test_bytes_that_are_no_text_are_a_recipe_error(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(GeoPretrainError, match="not valid YAML"):
        load_recipe(str(path))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 200_000, "[" * 200_000 + "]" * 200_000, "9" * 5_000])
def test_deep_json_is_no_json(tmp_path, text):
    with pytest.raises(ValueError, match=r"nested too deeply|digits"):
        parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json: is not JSON \("):
        read_sealed(tmp_path / "x.json")


# Who parses by itself, and why nothing of a user's reaches it.
OWN = {
    "errors.py": "the last line of a run's log, which may be cut off",
    "files.py": "parse_json, and the digest of a tree that was parsed",
    "tensors.py": "refuses a key given twice, and catches RecursionError",
    "convert/out.py": "the header that the safetensors library has just made",
    "hub/unpickle/job.py": "the job that our own parent process sends",
    "training/bench/cell.py": "the job that our own parent process sends",
    "training/data/labelled/mapping.py": "label maps of the package",
    "training/finetune/sweep.py": "a recipe that was written in the same line",
}


def test_json_and_yaml_are_parsed_in_one_place_each():
    root = Path(geo_pretrain.__file__).parent
    parsing = re.compile(r"\b(json\.loads?|yaml\.(safe_|full_|unsafe_)?load(_all)?|yaml\.compose)\(")
    found = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if parsing.search(re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.S))
    }
    assert found == OWN.keys()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{split}annot", "{split}annot"),
        ("{split}", "{split}"),
        ("a/{split}/b", "a/{split}/b"),
        ("'{split}'", "{split}"),
        ("{images: '{split}', n: 3}", {"images": "{split}", "n": 3}),
        ("{scenes: 2}", {"scenes": 2}),
        ("{}", {}),
        ("[1, 2]", [1, 2]),
        ("0.5", 0.5),
    ],
)
def test_a_placeholder_in_a_setting_is_a_text(text, value):
    assert parse_setting(text) == value


def test_a_setting_that_is_no_yaml_is_still_refused():
    with pytest.raises(yaml.YAMLError):
        parse_setting("{a: [}")
    recipe = load_finetune_recipe("folder_unet", ["data.options.labels={split}annot"])
    assert recipe.data.options["labels"] == "{split}annot"


@pytest.mark.parametrize("text", ["a\U0001f600b", "x\udcff", "\x7f\x85\u2028", "C:\\a\\ud83d\\ude00", "q\"'#: [", ""])
def test_a_quoted_text_is_read_as_it_is(text):
    assert parse_yaml(f"key: {quoted(text)}") == {"key": text}
