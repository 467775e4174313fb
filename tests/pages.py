"""The pages that people read, and the code in them: README, docs/, benchmarks/*.md.

A block under the line `<!-- run -->` is run by `make snippets`, in order and in one folder; all others name data or a
network that is not here, and are checked for syntax by tests/test_pages.py.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
]
RUN = "<!-- run -->"
CODE = shutil.ignore_patterns("*.py", "__pycache__")
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["code"], above.strip() == RUN))
    return found


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The `geo-pretrain` commands of a page, in blocks and in sentences: where, and the words after the name."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in blocks(page):
        if block.language in ("", "bash", "sh", "console"):
            lines += [(str(block), line) for line in re.sub(r"\\\n\s*", " ", block.code).splitlines()]
    prose = _FENCE.sub("", text)
    lines += [(page.name, code.replace("\n", " ")) for code in re.findall(r"`(geo-pretrain [^`]+)`", prose)]
    for where, line in lines:
        if match := re.search(r"(?:^|\s)(?:geo-pretrain|-m geo_pretrain)\s+(.*)", line):
            words = shlex.split(match[1], comments=True)
            yield where, words[: words.index("|")] if "|" in words else words


def stage(folder: Path) -> None:
    """Copy what the site is made of, laid out as in the repository so that links hold; README becomes index.md."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "model_cards", "benchmarks", "examples"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__") if name == "examples" else CODE
        )
    shutil.copy(ROOT / "README.md", folder / "index.md")


def run_blocks(folder: Path) -> None:
    """Run all blocks under `<!-- run -->` in `folder`; lines with a PATH, which is not here, are left out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in (block for page in PAGES for block in blocks(page) if block.run):
        code = block.code
        if block.language != "python":
            code = "\n".join(["set -e", *(line for line in code.splitlines() if "PATH" not in line)])
        print(f"{block}\n{code}", flush=True)
        subprocess.run(
            [sys.executable if block.language == "python" else "bash", "-c", code],
            cwd=folder,
            env=environment,
            check=True,
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        run_blocks(ROOT / "build" / "snippets")
    else:
        stage(ROOT / "build" / "pages")
