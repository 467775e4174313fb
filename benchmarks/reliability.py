"""What goes wrong between a user and a checkpoint, on purpose: how often it was survived, and what was lost.

    python -m benchmarks.reliability

Runs the tables of tests/hub/test_faults*.py (loopback servers that imitate the hosts, real processes, real disks) and
the hostile files of tests/hub/hostile/. Writes benchmarks/results/reliability.json and benchmarks/reliability.md. As
root it mounts small disks, to fill them and to make them read-only.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, write_results
from benchmarks.reliability_rooms import PROMISES, damaged_files, hostile_servers, secrets, wrapped_files
from geo_pretrain.errors import CheckpointError
from geo_pretrain.hub.extract import Limits, extract
from tests.hub import hostile
from tests.hub.hosts import BYTE_FAULTS, OTHER_FAULTS
from tests.hub.test_faults import CASES, FINE, RUNS, check_case, hosts_of
from tests.hub.test_faults_disk import SPECIAL, NoMount

COMMAND = "python -m benchmarks.reliability"
TABLE = Path(__file__).with_name("reliability.md")
CURED, EXPLAINED, REFUSED = "the right bytes arrived", "an error said what to do", "refused, nothing of it ran"


@dataclass(frozen=True)
class Outcome:
    """One fault that was tried. `failure`: what was not as promised; nothing was lost if it is empty."""

    room: str
    fault: str
    outcome: str
    seconds: float
    failure: str = ""
    skipped: str = ""


def transfers() -> list[Outcome]:
    """Faults of servers and connections, once and always."""
    outcomes = []
    for case, always in RUNS:
        expected = case.always if always else case.once
        seconds, failure = 0.0, ""
        with tempfile.TemporaryDirectory() as folder:
            try:
                seconds = check_case(case, Path(folder) / "cache", always=always)
            except Exception as error:  # whatever it is, it is the result
                failure = f"{type(error).__name__}: {error}"
        outcome = CURED if expected == FINE else EXPLAINED
        name = f"{case.name}, {'always' if always else 'once'}"
        outcomes.append(Outcome("servers and connections", name, outcome, round(seconds, 2), failure))
    return outcomes


def processes_disks_caches() -> list[Outcome]:
    """Killed and competing processes, full and read-only disks, damaged caches."""
    outcomes = []
    for fault in SPECIAL:
        begin, failure, skipped = time.perf_counter(), "", ""
        with tempfile.TemporaryDirectory() as folder, hosts_of(Path(folder) / "cache") as hosts:
            try:
                fault(Path(folder) / "cache", hosts)
            except NoMount as reason:
                skipped = str(reason)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
        seconds = round(time.perf_counter() - begin, 2)
        text = " ".join((fault.__doc__ or "").split()).rstrip(".")
        outcomes.append(Outcome("processes, disks and caches", text, CURED, seconds, failure, skipped))
    return outcomes


def hostile_files() -> list[Outcome]:
    """Pickles that ask for more than tensors, bombs and lies about sizes."""
    outcomes = []
    for name, attack in hostile.CORPUS.items():
        with tempfile.TemporaryDirectory() as folder:
            canary, path, out = Path(folder) / "canary", Path(folder) / "file", Path(folder) / "out.safetensors"
            path.write_bytes(attack.make(str(canary)))
            begin, failure = time.perf_counter(), ""
            try:
                extract(path, out, limits=Limits(**attack.limits))
                failure = "was read without an error"
            except CheckpointError as error:
                if not isinstance(error, attack.error):
                    failure = f"{type(error).__name__}: {error}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            if canary.exists():
                failure = "code of the file was executed"
            if sorted(Path(folder).iterdir()) != [path]:
                failure = failure or "files were left"
            seconds = round(time.perf_counter() - begin, 2)
        outcomes.append(Outcome("hostile files", name, REFUSED, seconds, failure))
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Numbers of one room."""
    tried = [one for one in outcomes if not one.skipped]
    ends: dict[str, int] = defaultdict(int)
    for one in tried:
        ends[one.outcome if not one.failure else "not as promised"] += 1
    return {
        "tried": len(tried),
        "survived": sum(not one.failure for one in tried),
        "ends": dict(ends),
        "skipped": len(outcomes) - len(tried),
        "slowest_seconds": max((one.seconds for one in tried), default=0.0),
    }


def table(rooms: dict[str, dict[str, Any]], outcomes: list[Outcome], python: str) -> str:
    """The page for readers."""
    tried, survived = (sum(room[key] for room in rooms.values()) for key in ("tried", "survived"))
    kinds = {case.fault.kind for case in CASES}
    lines = [
        "# What goes wrong, and what is lost",
        "",
        f"Written by `{COMMAND}`; each fault by name is in [results/reliability.json](results/reliability.json).",
        f"Python {python}, loopback servers, two cores. A real network has faults that nobody thought of.",
        "",
        f"**{tried} faults tried, {survived} survived, {tried - survived} with something lost.**",
        "",
        "| | tried | survived | the right bytes arrived | an error said what to do | refused, nothing ran | slowest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for room, numbers in rooms.items():
        ends = [str(numbers["ends"].get(end, 0)) for end in (CURED, EXPLAINED, REFUSED)]
        cells = [room, str(numbers["tried"]), str(numbers["survived"]), *ends, f"{numbers['slowest_seconds']:.1f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Survived means all of: the call ends within ten seconds, with the right bytes or with an error that says what",
        "to do; no part of a file and no half checkpoint stays in the cache; the next call without the fault succeeds.",
        "A hostile file is survived when it is refused as what it is, nothing of it runs and no file is left.",
        "",
        f"## Servers and connections: {len(kinds)} kinds",
        "",
        "Each strikes once and always, or just always where the same is expected, on a hub's file or an authors' file",
        "behind its host's redirects and pages.",
        "",
    ]
    lines += [f"- {text}" for kind, text in (BYTE_FAULTS | OTHER_FAULTS).items() if kind in kinds]
    lines += ["", "## Processes, disks and caches", ""]
    for one in outcomes:
        if one.room == "processes, disks and caches":
            note = f" (skipped: {one.skipped})" if one.skipped else ""
            lines.append(f"- {one.fault}{note}")
    lines += PROMISES.splitlines()
    failures = [one for one in outcomes if one.failure]
    if failures:
        lines += ["", "## Not as promised", ""]
        lines += [f"- {one.fault}: {one.failure.splitlines()[0]}" for one in failures]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything; about two minutes."""
    outcomes = [*transfers(), *processes_disks_caches(), *hostile_files()]
    for row in (
        *hostile_servers(CURED, EXPLAINED),
        *secrets(EXPLAINED),
        *wrapped_files(CURED, EXPLAINED),
        *damaged_files(EXPLAINED),
    ):
        outcomes.append(Outcome(*row))
    names = dict.fromkeys(one.room for one in outcomes)
    rooms = {name: summary([one for one in outcomes if one.room == name]) for name in names}
    facts = machine()
    TABLE.write_text(table(rooms, outcomes, facts["python"]), encoding="utf-8")
    faults = [{key: value for key, value in asdict(one).items() if value != ""} for one in outcomes]
    write_results("reliability", COMMAND, {"rooms": rooms, "machine": facts, "faults": faults}, timed=False)


if __name__ == "__main__":
    main()
