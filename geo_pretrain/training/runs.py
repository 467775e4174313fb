"""A run's folder `<out>.run`: one process at a time, state and log that survive a kill, requests to stop."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import geo_pretrain
from geo_pretrain.errors import CheckpointError, GeoPretrainError, MissingDependency, RecipeError, first_line, require
from geo_pretrain.files import atomic_write, locked, move, parse_json, sync_file, sync_folder
from geo_pretrain.training.states import (
    BadState,
    check_log,
    check_values,
    log_facts,
    read_recipe,
    read_state,
    write_state,
)
from geo_pretrain.training.stops import StopRequest, stop_requests
from geo_pretrain.yaml_text import parse_yaml

STATE, LOG, BOARD = "state.pt", "log.jsonl", "tensorboard"
EARLIER = "state.earlier.pt"  # the state before `STATE`
LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "safetensors")  # whose versions a result names

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch.distributed's errors where a peer is gone; gloo raises a RuntimeError with words of its own
DISTRIBUTED = ("DistBackendError", "DistNetworkError", "DistStoreError")
PEERS = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")

LENGTH = ("optim.steps:", "optim.epochs:")  # changes of a run's length

WriteLog = Callable[[Mapping[str, Any], Mapping[str, float]], None]  # a line {"step": ..., ...}; the losses in it


class Interrupted(GeoPretrainError):
    """The run was asked to stop and has saved its state.

    A command ends with `exit_code`: 0 where SIGTERM asked, for a scheduler that takes a job back must not see a failed
    one, 130 otherwise.
    """

    def __init__(self, message: str, *, terminated: bool = False) -> None:
        super().__init__(message)
        self.exit_code = 0 if terminated else 130


@dataclass(frozen=True)
class RunFolder:
    """The folder with state and log of a run, until its result is written to `out`."""

    out: Path
    writes: bool = True  # False: a process beside the main one, which only reads
    board: bool = False  # write TensorBoard's event files, where it is installed
    refused: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # states that are not used
    logs: list[_Log] = field(default_factory=list, init=False, repr=False, compare=False)  # the one that is open

    @property
    def path(self) -> Path:
        """The folder beside `out`."""
        return run_folder(self.out)

    @property
    def log_file(self) -> Path:
        """One JSON line a step, and one an evaluation."""
        return self.path / LOG

    def create(self) -> None:
        """Make the folder, unless it is there."""
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)

    def remove(self) -> None:
        """Delete the folder and its content; a kill on the way leaves no part of it that looks like a run."""
        gone = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        move(self.path, gone)
        shutil.rmtree(gone)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state and keep the one before; a kill at any moment leaves the old ones or the new ones.

        The state notes what the log is at this moment, and is on disk after it. Raises `CheckpointError` where the log
        is not as this run wrote it: a state must not vouch for lines that somebody changed.
        """
        if not self.writes:
            return
        for log in self.logs:
            log.check()
        if self.log_file.exists():
            sync_file(self.log_file)
        latest, earlier = self.path / STATE, self.path / EARLIER
        with atomic_write(latest) as part:
            write_state({**state, "log": log_facts(self.log_file)}, part)
            sync_file(part)
            if latest.exists() and STATE not in self.refused:
                move(latest, earlier)  # killed here, a run goes on from `earlier`
        sync_folder(self.path)
        self.refused.discard(STATE)

    def has_state(self) -> bool:
        """Whether a state was saved."""
        return any((self.path / name).exists() for name in (STATE, EARLIER))

    def kept(self) -> str:
        """What is kept of the run if it ends now, in words."""
        if not self.has_state():
            return "nothing is saved yet."
        return f"the last saved state stays in {self.path}, and the same command goes on from it."

    def logged_steps(self) -> int:
        """The last step in the log; 0 at the beginning."""
        return max((int(record["step"]) for _, record in _records(self.log_file)), default=0)

    def saved_recipe(self) -> str | None:
        """The recipe, YAML, of the saved state from which a run goes on; None where there is none that can be read.

        Weights are not read, and nothing is checked, which `load` does.
        """
        for name in (STATE, EARLIER):
            with suppress(BadState):
                return read_recipe(self.path / name)
        return None

    def refuse(self, recipe: str, changed: Sequence[str]) -> None:
        """Raise `RecipeError` if settings have `changed` since the run began by `recipe` (YAML), with what can be done.

        A run has one length, because its learning rate follows it: a longer one would have learned otherwise from the
        first step on.
        """
        if not changed:
            return
        text = f"The run in {self.path} was started with another recipe; it differs in: {'; '.join(changed[:5])}. "
        text += "Give the first settings again, choose another --out, or remove that folder."
        early = f" To end early, take {self.out}: it has the weights so far." if self.out.exists() else ""
        if any(change.startswith(LENGTH) for change in changed):
            tree, text = parse_yaml(recipe), text + " A run keeps its length, which its learning rate follows."
            start = "-b " if "network" in tree else "--set model.init=" if tree.get("model") else ""
            if start:
                text += f" Longer: let it end, then begin another from its weights, {start}{self.out}."
            stop = " Shorter: stop it by Ctrl-C, which writes the weights so far."
            early = early or ("" if start == "-b " else stop)
        raise RecipeError(text + early)

    def refuse_length(self, changed_settings: Callable[[str], list[str]]) -> None:
        """`refuse` another length, before states are read: one beyond a shorter run's end is not damaged."""
        recipe, changed = self.saved_recipe(), list[str]()
        with suppress(KeyError, TypeError, AttributeError, ValueError):  # of a state that is read, and refused, later
            changed = [] if recipe is None else changed_settings(recipe)
        self.refuse(recipe or "", [change for change in changed if change.startswith(LENGTH)])

    def load(self, steps: int | None = None) -> dict[str, Any] | None:
        """The latest saved state that can be used, its tensors on the CPU; None at the beginning of a run.

        A state must have its digest, finite values, at most `steps` steps, and a log that begins as it did when the
        state was saved. One that does not is named in a warning, and the one before is used. Raises `CheckpointError`
        with the reasons where there are states and none can be used.
        """
        reasons = []
        for name in (STATE, EARLIER):
            if not (self.path / name).exists():
                continue
            if (self.path / name).is_dir():
                raise CheckpointError(f"{self.path / name} is a folder, where the run keeps a file; move it away.")
            try:
                state = self._checked(self.path / name, steps)
            except BadState as bad:
                reasons.append(f"{name} {bad}")
                self.refused.add(name)
                continue
            if reasons and self.writes:
                what = f"{'; '.join(reasons)}. The run goes on from {name}, saved after step {state['step']}."
                warnings.warn(f"{self.path}: {what}", stacklevel=2)
            return state
        if reasons:
            raise CheckpointError(
                f"No saved state in {self.path} can be used: {'; '.join(reasons)}. Put the files back as they were, "
                "or remove that folder to start from the beginning."
            )
        return None

    def _checked(self, path: Path, steps: int | None) -> dict[str, Any]:
        state = read_state(path)
        step = state["step"]
        if steps is not None and step > steps:
            raise BadState(f"was saved after step {step} of a run of {steps} steps")
        check_values(state)
        if "log" in state:
            check_log(self.log_file, state["log"])
        elif self.log_file.exists() or step:
            _check_lines(self.log_file, step)
        return state

    @contextmanager
    def log(self, step: int) -> Iterator[WriteLog]:
        """A function that appends a line to the log, and shows losses in TensorBoard.

        Lines after `step`, where the run goes on, are dropped first, and so is a line that was broken off. At the end
        the log must be as it was written, see `save`.
        """
        if not self.writes:
            yield write_nothing
            return
        _drop_lines_after(self.log_file, step)
        board = _tensorboard(self.path / BOARD, step) if self.board else None
        with _Log(self.log_file) as log:

            def write(record: Mapping[str, Any], losses: Mapping[str, float]) -> None:
                log.write(json.dumps(record) + "\n")
                if board is not None:
                    for name, value in losses.items():
                        board.add_scalar(f"loss/{name}", value, record["step"])

            self.logs.append(log)
            try:
                yield write
                log.check()
            finally:
                self.logs.remove(log)
                if board is not None:
                    board.close()

    def keep_board(self) -> None:
        """Move the event files into `out`; those of an older run are deleted."""
        if (self.path / BOARD).exists():
            shutil.rmtree(self.out / BOARD, ignore_errors=True)
            shutil.move(self.path / BOARD, self.out / BOARD)


class _Log:
    """A log that is open for appending, and a digest of what it has to hold by now."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("a+b")
        before = path.read_bytes()
        self.size, self.digest = len(before), hashlib.sha256(before)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, line: str) -> None:
        """Append a line."""
        data = line.encode()
        self.file.write(data)
        self.file.flush()
        self.digest.update(data)
        self.size += len(data)

    def check(self) -> None:
        """Raise `CheckpointError` unless the file is as it was written; one that was removed or replaced is put back.

        The open file has its lines even then, so a long run need not be lost for its log.
        """
        facts = {"bytes": self.size, "sha256": self.digest.hexdigest()}
        try:
            check_log(self.path, facts)
        except BadState as bad:
            self.file.seek(0)
            lines = self.file.read(self.size)
            if hashlib.sha256(lines).hexdigest() != facts["sha256"]:
                raise CheckpointError(
                    f"{self.path.parent}: {bad} while the run was writing it. Put it back as it was and give the same "
                    "command again, or remove that folder to start from the beginning."
                ) from None
            self.file.close()  # Windows replaces no file that is open
            with atomic_write(self.path) as part:
                part.write_bytes(lines)
            self.file = self.path.open("a+b")
            what = "was removed or replaced while the run was writing it; it was put back."
            warnings.warn(f"{self.path} {what}", stacklevel=3)


def write_nothing(record: Mapping[str, Any], losses: Mapping[str, float]) -> None:
    """A log that is not kept."""


def run_folder(out: Path) -> Path:
    """Where the run that ends in `out` keeps its state."""
    return out.with_name(out.name + ".run")


def check_out(out: Path, result: str, what: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if `out` holds a finished `what` (its file `result`) and there is no run to resume."""
    if (out / result).exists() and not run_folder(out).exists() and not overwrite:
        raise CheckpointError(f"{str(out)!r} already holds {what}. Choose another --out, or pass --overwrite.")


def run_lock(out: Path, what: str) -> AbstractContextManager[None]:
    """Hold the lock of `out` for `what` ("fine-tuning run"); while another holds it, raise `CheckpointError`."""
    busy = f"Another process is at work on the {what} in {str(out)!r}. Wait until it ends, or choose another --out."
    return locked(out.resolve(), busy=busy)  # the same lock, whatever links lead to it


@contextmanager
def watched(run: RunFolder | None) -> Iterator[StopRequest]:
    """What `stop_requests` and `explained` do for a run; without its folder signals act as ever."""
    with explained(run):
        if run is None:
            yield StopRequest()
        else:
            with stop_requests(run.kept if run.writes else None) as stop:
                yield stop


@contextmanager
def explained(run: RunFolder | None) -> Iterator[None]:
    """Turn what happens to a run from outside into one sentence: dead processes, full disks, limits on files.

    What was saved stays, and the sentence says how to go on.
    """
    try:
        yield
    except GeoPretrainError:
        raise
    except (OSError, RuntimeError) as error:
        what = _mishap(error)
        if what is None:
            raise
        kept = run is not None and run.has_state()
        rest = "Nothing was saved yet." if not kept or run is None else f"The last saved state is in {run.path}."
        raise GeoPretrainError(f"{what} {rest} Give the same command again to go on.") from error


def _mishap(error: Exception) -> str | None:
    """What happened, if it came from outside; None for a fault of a program."""
    text = str(error)
    chain: BaseException | None = error
    while chain is not None:  # torch.save hides the error of the disk behind its own
        if isinstance(chain, OSError) and chain.errno in NO_ROOM:
            where = f"{chain.filename}: " if chain.filename else ""
            return f"{where}{os.strerror(chain.errno)}: there is no room for what the run writes. Free some."
        chain = chain.__cause__ or chain.__context__
    if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
        return "A file of the run could not be written whole: the disk is full, or a limit on files was met. Free some."
    if "DataLoader worker" in text:
        return (
            f"A loader worker died ({first_line(error)}). If it was for lack of memory, take fewer 'workers' or "
            "smaller samples."
        )
    if type(error).__name__ in DISTRIBUTED or any(sign in text for sign in PEERS):
        return f"Another process of this run ended ({first_line(error)}); its own message tells why."
    return None


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a log up to `step`; those after it, and what is no line, are dropped."""
    kept = b"".join(line for line, record in _records(path) if record["step"] <= step)
    if not path.exists() or len(kept) != path.stat().st_size:
        with atomic_write(path) as part:  # the states need the lines before: none may be missing at any moment
            part.write_bytes(kept)


def _check_lines(path: Path, step: int) -> None:
    """Raise `BadState` unless the log has a line of each step up to this one: for states that note no digest of it."""
    steps = [record["step"] for _, record in _records(path) if "lr" in record and record["step"] <= step]
    if steps != list(range(1, step + 1)):
        raise BadState(f"was saved after step {step}, and {path.name} has {len(steps)} of these steps")


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a log and what they say, up to the first that was broken off."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = parse_json(line)
            record["step"] <= 0  # noqa: B015 - a number, or it is no line of ours
        except (ValueError, KeyError, TypeError):
            return
        if not line.endswith(b"\n"):
            return
        yield line, record


def _tensorboard(path: Path, step: int) -> Any:
    try:
        tensorboard = require("torch.utils.tensorboard", "training")
    except MissingDependency:  # the log file holds the same numbers
        return None
    return tensorboard.SummaryWriter(str(path), purge_step=step + 1)


def code_version() -> str:
    """The package version, with the commit when it runs from a git checkout."""
    root = Path(geo_pretrain.__file__).parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (root / ".git").exists():
        return geo_pretrain.__version__
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return geo_pretrain.__version__
    return f"{geo_pretrain.__version__}+{commit}"


def library_versions(*more: str) -> dict[str, str]:
    """The versions of the libraries that numbers depend on, and of `more`."""
    return {name: version(name) for name in (*LIBRARIES, *more)}
