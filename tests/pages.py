"""The pages that people read, and the code in them: README, docs/, benchmarks/*.md.

Every block of code says above it what becomes of it (tests/test_pages.py refuses one that does not):

    <!-- run -->            `make snippets` runs it as it stands
    <!-- run small -->      the same with stand-ins for data and small sizes (tests/stand_ins.py)
    <!-- needs data -->     not run: each command is parsed by the real command line; NEEDS lists what may be needed

Blocks of `text` are layouts of folders, `json` and `toml` are parsed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
LANGUAGES = ("bash", "python", "json", "toml", "text")
NEEDS = (
    "an install",
    "colmap",
    "data",
    "GPUs",
    "SLURM",
    "the network",
    "training",
)  # what a block that is not run needs
_MARK = re.compile(r"<!-- (?P<what>run|run small|needs (?P<needs>[\w, ]+)) -->")
CODE = shutil.ignore_patterns("*.py", "__pycache__")
_FENCE = re.compile(r"^ *```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    mark: str  # "run", "run small", "needs ..." or nothing

    @property
    def needs(self) -> tuple[str, ...]:
        """What is needed to run it and is not here."""
        return tuple(self.mark.removeprefix("needs ").split(", ")) if self.mark.startswith("needs ") else ()

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        above = _MARK.fullmatch(text[: match.start()].rstrip("\n").rpartition("\n")[2].strip())
        line = text.count("\n", 0, match.start()) + 1
        code = textwrap.dedent(match["code"])
        found.append(Block(page, line, match["language"], code, above["what"] if above else ""))
    return found


def lines_of(code: str) -> list[str]:
    """The commands of a block, each on one line."""
    lines = (line.strip() for line in re.sub(r"\\\n\s*", " ", code).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The `geo-pretrain` commands of a page, in blocks and in sentences: where, and the words after the name."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in blocks(page):
        if block.language in ("", "bash", "sh", "console"):
            lines += [(str(block), line) for line in lines_of(block.code)]
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


def run_page(page: Path, folder: Path) -> None:
    """Run the blocks of a page that are to be run, in order and in `folder`; stops at the first that fails."""
    from tests.stand_ins import make_stand_ins, run_command

    chosen = [block for block in blocks(page) if block.mark in ("run", "run small")]
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_stand_ins("".join(block.code for block in chosen))
    for block in chosen:
        print(f"{block}\n{block.code}", flush=True)
        began, worked = time.perf_counter(), time.process_time()
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
        else:
            for line in lines_of(block.code):
                run_command(line, small_sizes=block.mark == "run small")
        took = f"{time.perf_counter() - began:.1f} s, {time.process_time() - worked:.1f} s of processor time"
        print(f"{block}: {took}", flush=True)


def run_pages(folder: Path, names: list[str]) -> None:
    """Run the blocks of all pages, or of those named, two pages at a time; ends with what failed."""
    if not names:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    pages = [page for page in PAGES if any(block.mark.startswith("run") for block in blocks(page))]
    pages = [page for page in pages if not names or str(page.relative_to(ROOT)) in names]
    environment = os.environ | {
        "GEO_PRETRAIN_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(page: Path) -> bool:
        name = str(page.relative_to(ROOT))
        place = folder / name.replace("/", "_")
        shutil.rmtree(place, ignore_errors=True)
        words = [sys.executable, "-m", "tests.pages", "page", name, str(place)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(done.stdout + (done.stderr if done.returncode else ""), flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(run, pages))
    if not all(right):
        raise SystemExit(f"failed: {', '.join(page.name for page, fine in zip(pages, right, strict=True) if not fine)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run_pages(ROOT / "build" / "snippets", sys.argv[2:])
    elif sys.argv[1:2] == ["page"]:
        run_page(ROOT / sys.argv[2], Path(sys.argv[3]))
    else:
        stage(ROOT / "build" / "pages")
