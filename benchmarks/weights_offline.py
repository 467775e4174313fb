"""The proof that shipped weights work offline: `python -m benchmarks.weights_offline` (`make weights-proof`).

In a copy of this clone: wheels are built of geo_pretrain and of every project in weights/, installed with their
dependencies into a new environment outside of it, and used there without a network: listed, loaded, verified, drawn.
Then each file is damaged in each way, and what the errors say is kept. While weights/ holds no checkpoint, or with
`--stand-ins`, networks of the true size are trained for two steps by the real recipes and added first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write_results

ROOT = Path(__file__).resolve().parents[1]
SMALL = "scenes: 2, frames: 6, width: 96, height: 72"
STAND_INS = {  # name -> changes of its recipe: two steps on small rooms, the network as it is
    "pri3d_view_r18.rooms": ["data.size=[72,96]", "optim.batch=2"],
    "csc_srunet34.rooms": ["data.size=[72,96]", "optim.batch=1", "optim.accumulate=1", "task.matches=256"],
}
NO_NETWORK = ("unshare", "--map-root-user", "--net")


def call(*command: Any, cwd: Path, **environment: str) -> str:
    """Run a command without this process's Python settings; its output, or an end with what it said."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "GEO_PRETRAIN")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=clean | environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def copy_of_clone(work: Path) -> Path:
    """What git tracks here, or would track, in a folder of its own."""
    clone = work / "clone"
    for name in call("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    return clone


def add_stand_ins(clone: Path, work: Path) -> None:
    """Train the stand-ins for two steps at full width, and add them to the copy's weights/."""
    here = {"PYTHONPATH": str(clone), "GEO_PRETRAIN_CACHE": str(work / "cache")}
    for name, changes in STAND_INS.items():
        every = [*changes, f"data.options={{{SMALL}}}", "optim.steps=2", "workers=0", "precision=fp32"]
        options = [word for change in every for word in ("--set", change)]
        command = (sys.executable, "-m", "geo_pretrain")
        call(*command, "train", name, "--out", work / "runs" / name, *options, cwd=clone, **here)
        print(call(*command, "weights", "add", work / "runs" / name, "--short", cwd=clone, **here))


def build(clone: Path, work: Path) -> list[Path]:
    """The wheel of the library and those of the weights."""
    out = work / "dist"
    for project in (clone, *sorted(path.parent for path in clone.glob("weights/*/pyproject.toml"))):
        call(uv(), "build", "--quiet", "--wheel", "--out-dir", out, project, cwd=work)
    return sorted(out.glob("*.whl"))


def uv() -> str:
    return str(Path(sys.executable).with_name("uv"))


def install(wheels: Sequence[Path], work: Path) -> Path:
    """A new environment with the wheels and what they depend on; its bin folder."""
    call(uv(), "venv", "--quiet", "--python", sys.executable, work / "venv", cwd=work)
    python = work / "venv/bin/python"
    call(
        uv(),
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--constraint",
        ROOT / "constraints.txt",
        *wheels,
        cwd=work,
    )
    return python.parent


def without_network() -> tuple[str, ...]:
    """The words before a command that take the network away from it; none where the system does not allow it."""
    allowed = shutil.which(NO_NETWORK[0]) and subprocess.run([*NO_NETWORK, "true"], check=False).returncode == 0
    return NO_NETWORK if allowed else ()


def prove(work: Path, *, stand_ins: bool) -> dict[str, Any]:
    """Run the whole path in `work`; the facts."""
    clone = copy_of_clone(work)
    if stand_ins or not list(clone.glob("weights/*/pyproject.toml")):
        stand_ins = True
        shutil.rmtree(clone / "weights")
        add_stand_ins(clone, work)
    wheels = build(clone, work)
    tools = install(wheels, work)
    empty = work / "elsewhere"
    empty.mkdir()
    apart = {"HOME": str(empty), "GEO_PRETRAIN_CACHE": str(empty / "cache"), "OMP_NUM_THREADS": "1"}
    apart |= {} if without_network() else {"HF_HUB_OFFLINE": "1"}

    def run(*command: Any) -> str:
        return call(*without_network(), tools / str(command[0]), *command[1:], cwd=empty, **apart)

    listed = json.loads(run("geo-pretrain", "list", "--offline", "--json"))
    names = [row["name"] for row in listed]
    for name in names:
        run("geo-pretrain", "pull", "--check", name)
        run("geo-pretrain", "verify", name)
        rooms = ("--set", "data.options={scenes: 2, frames: 8, width: 160, height: 120}", "--size", "120x160")
        run("geo-pretrain", "visualize", "matches", name, "--pairs", "1", *rooms, "-o", f"{name}.png")
    inside = json.loads(run("python", "-I", ROOT / "benchmarks/weights_inside.py", *names))
    assert Path(inside.pop("package")).is_relative_to(work / "venv")
    damage = inside.pop("damage")
    inside["damaged and told"] = {name: told(rows) for name, rows in damage.items()}
    inside["what is said"] = {row["fault"]: row["words"] for row in damage[names[0]] if row["told by"] == "load"}
    sizes = {path.name: path.stat().st_size for path in wheels}
    pictures = {name: (empty / f"{name}.png").stat().st_size for name in names}
    return {"stand-ins": stand_ins, "wheels": sizes, "ready offline": names, "pictures": pictures, **inside}


def told(rows: Sequence[dict[str, str]]) -> dict[str, str]:
    """Of each file the command that told the damage: one word where it was the same for every fault."""
    by_file: dict[str, set[str]] = {}
    for row in rows:
        by_file.setdefault(row["file"], set()).add(row["told by"])
    return {file: " or ".join(sorted(steps)) for file, steps in by_file.items()} | {"tries": str(len(rows))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stand-ins", action="store_true", help="take trial networks of true size, not those in weights/"
    )
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it")
    given = parser.parse_args()
    if given.keep is not None:
        given.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        facts = prove((given.keep or Path(temporary)).resolve(), stand_ins=given.stand_ins)
    write_results("weights_offline", "python -m benchmarks.weights_offline", facts, timed=False)


if __name__ == "__main__":
    main()
